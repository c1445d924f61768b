"""Faults to plant in the source, each with the few tests that must find it: `test_mutations.py` tries them.

A fault is a piece of text that stands in its file exactly once, and what takes its place; both compile. The tests are
narrow ones, so that a fault costs seconds. Knows nothing of how a fault is tried.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPP", "QUICK", "SLOW", "Mutation"]


@dataclass(frozen=True)
class Mutation:
    """`text` of `file` becomes `planted`, and one of `tests` must fail.

    `needs` is what these tests cannot run without: 'extension', 'triton', or nothing.
    """

    name: str
    file: str
    text: str
    planted: str
    tests: tuple[str, ...]
    needs: str = ""


# The quick suite tries these: a tie rule, a dropped codebook mask, positions and steps that are off by one.
QUICK = (
    Mutation(
        "greedy ties go to the highest token",
        "musicgen_fast/sampling/reference.py",
        "finite.argmax(-1)",
        "finite.shape[-1] - 1 - finite.flip(-1).argmax(-1)",
        ("tests/test_mutation_gaps.py::test_greedy_ties_go_to_the_lowest_token",),
    ),
    Mutation(
        "token 0 in the gaps of the pattern",
        "musicgen_fast/pattern.py",
        "return torch.where(frames >= 0, taken, special_token)",
        "return torch.where(frames >= 0, taken, 0)",
        ("tests/test_sampler_wiring.py::test_cells_that_are_known_or_masked_stay",),
    ),
    Mutation(
        "positions count from 1",
        "musicgen_fast/model.py",
        "torch.arange(num_positions, dtype=torch.float32, device=device)",
        "torch.arange(1, num_positions + 1, dtype=torch.float32, device=device)",
        ("tests/test_decoder.py::test_positions",),
    ),
    Mutation(
        "a window overlaps the last one by a frame less",
        "musicgen_fast/windows.py",
        "        overlap = self.window - self.stride\n",
        "        overlap = self.window - self.stride - 1\n",
        ("tests/test_windows.py::test_known_plans",),
    ),
    Mutation(
        "the noise of a window is counted from the next column",
        "musicgen_fast/state.py",
        "place.step.fill_(step_offset + column)",
        "place.step.fill_(step_offset + column + 1)",
        ("tests/test_mutation_gaps.py::test_noise_is_counted_by_the_column_of_the_whole",),
    ),
)

SLOW = (
    # -- the sampler --------------------------------------------------------------------------------------------------
    Mutation(
        "greedy ties of Triton go to the highest token",
        "kernels/sample.py",
        "tl.min(tl.where(x == top, ids, 0x7FFFFFFF), 0), -1)",
        "tl.max(tl.where(x == top, ids, -1), 0), -1)",
        ("tests/test_triton.py::test_random_rows",),
        needs="triton",
    ),
    Mutation(
        "top-k keeps one token more",
        "musicgen_fast/sampling/reference.py",
        "order.gather(-1, k[..., None] - 1)",
        "order.gather(-1, k[..., None].clamp(max=vocab - 1))",
        ("tests/test_sampling.py::test_golden_tokens",),
    ),
    Mutation(
        "top-p drops the token that crosses the limit",
        "musicgen_fast/sampling/reference.py",
        "inside = ranked.cumsum(-1) - ranked <= limit",
        "inside = ranked.cumsum(-1) <= limit",
        ("tests/test_sampling.py::test_golden_tokens",),
    ),
    Mutation(
        "the temperature comes before guidance",  # the same but for rounding: told by half precision alone
        "musicgen_fast/sampling/reference.py",
        "kept_weights(scaled(mixed, params, logits.dtype, inputs.divide), params)",
        "kept_weights(mix_branches((logits.float() * params.scale[..., None]).to(logits.dtype), params.cfg_coef, "
        "params.cfg_coef_beta), params)",
        ("tests/test_sampling.py::test_golden_tokens",),
    ),
    Mutation(
        "guidance away from the text",
        "musicgen_fast/sampling/reference.py",
        "rnd(rnd(rnd(c - u) * cfg) + u)",
        "rnd(rnd(rnd(u - c) * cfg) + u)",
        ("tests/test_sampling.py::test_branch_mixing",),
    ),
    Mutation(
        "the null branch comes first",
        "musicgen_fast/sampling/reference.py",
        "c, u = branches",
        "u, c = branches",
        ("tests/test_sampling.py::test_branch_mixing",),
    ),
    Mutation(
        "double guidance starts from the text",
        "musicgen_fast/sampling/reference.py",
        "m = rnd(w + rnd(rnd(c - w) * beta))",
        "m = rnd(c + rnd(rnd(c - w) * beta))",
        ("tests/test_sampling.py::test_branch_mixing",),
    ),
    Mutation(
        "a token where the pattern has none",
        "musicgen_fast/sampling/reference.py",
        "value = torch.where(masked, inputs.logits.shape[3], tokens)",
        "value = torch.where(masked, tokens, tokens)",
        ("tests/test_sampler_cpu.py::test_random_rows",),
        needs="extension",
    ),
    Mutation(
        "known cells are drawn anew",
        "musicgen_fast/sampling/reference.py",
        "unknown = (present == -1) & inside",
        "unknown = (present == present) & inside",
        ("tests/test_sampler_cpu.py::test_random_rows",),
        needs="extension",
    ),
    Mutation(
        "the halves of the Philox key change places",
        "musicgen_fast/philox.py",
        "seed & _MASK, (seed >> 32) & _MASK)",
        "(seed >> 32) & _MASK, seed & _MASK)",
        ("tests/test_sampling.py::test_golden_tokens",),
    ),
    Mutation(
        "the noise depends on the place in the batch",
        "musicgen_fast/place.py",
        "torch.zeros_like(self.seeds)",
        "torch.arange(len(self.seeds))",
        ("tests/test_engine.py::test_a_batch_in_lockstep_equals_its_requests",),
    ),
    # -- positions and windows ----------------------------------------------------------------------------------------
    Mutation(
        "a step of rows of unequal lengths has the position before",
        "musicgen_fast/decoders/torch.py",
        "[at], RowPlaces(at,",
        "[at - 1], RowPlaces(at,",
        ("tests/test_decoder.py::test_prefixes_of_any_length_per_row",),
    ),
    Mutation(
        "the C++ decoder is told the position before",
        "musicgen_fast/decoders/cpu.py",
        "part.segments.append((cache, row, length, 1,",
        "part.segments.append((cache, row, length - 1, 1,",
        ("tests/test_cpu_decoder.py::test_tokens_are_those_of_the_torch_decoder",),
        needs="extension",
    ),
    Mutation(
        "a token attends to all but itself",
        "musicgen_fast/decoders/torch_cache.py",
        "<= positions[:, None]",
        "< positions[:, None]",
        ("tests/test_decoder.py::test_prefixes_of_any_length_per_row",),
    ),
    Mutation(
        "a later window counts its columns from a frame further",
        "musicgen_fast/chain.py",
        "return window.start * columns_per_frame",
        "return (window.start + (window.start > 0)) * columns_per_frame",
        ("tests/test_mutation_gaps.py::test_noise_is_counted_by_the_column_of_the_whole",),
    ),
    # -- sound --------------------------------------------------------------------------------------------------------
    Mutation(
        "pieces of a stream meet at the wrong row",
        "musicgen_fast/seanet/streaming.py",
        "self.held = rows[:, -1:].clone()",
        "self.held = rows[:, :1].clone()",
        ("tests/test_codec_stream.py::test_short_clips_in_every_cut",),
    ),
    Mutation(
        "a stream promises a frame too early",
        "musicgen_fast/codec_stream.py",
        "return -(-self._stream.look_ahead // self._mono.config.hop_length)",
        "return self._stream.look_ahead // self._mono.config.hop_length",
        ("tests/test_codec_stream.py::test_the_look_ahead_of_released_codecs",),
    ),
    Mutation(
        "peaks are not clipped",
        "musicgen_fast/loudness.py",
        "    return wav.clamp(-1, 1)\n",
        "    return wav\n",
        ("tests/test_mutation_gaps.py::test_peaks_are_clipped_at_one",),
    ),
    # -- files --------------------------------------------------------------------------------------------------------
    Mutation(
        "a finished piece is rendered again",
        "musicgen_fast/render/ledger.py",
        "    whole.done = part.done or whole.done\n",
        "    whole.done = part.done\n",
        ("tests/test_mutation_gaps.py::test_a_piece_that_any_ledger_calls_done_is_done",),
    ),
    Mutation(
        "two shards claim the same pieces",
        "musicgen_fast/render/shards.py",
        "% self.count == self.index - 1",
        "% self.count >= self.index - 1",
        ("tests/test_render_locks.py::test_shards_part_the_ids",),
    ),
    Mutation(
        "a conversion drops a tensor",
        "musicgen_fast/checkpoints/convert_layouts.py",
        "for name, rows in found.style.items():\n        state[",
        "for name, rows in list(found.style.items())[1:]:\n        state[",
        ("tests/test_convert.py::test_style",),
    ),
    Mutation(
        "int8 weights are cut off instead of rounded",
        "musicgen_fast/quantised.py",
        "[..., None]).round()",
        "[..., None]).trunc()",
        ("tests/test_mutation_gaps.py::test_eight_bits_round_to_the_nearest",),
    ),
)

# Each costs a build of the extension.
CPP = (
    Mutation(
        "top-p of the compiled sampler keeps its ties from the highest token on",
        "csrc/cpu/sample_filters.h",
        "    for (int i = 0; i < n; ++i) {\n        if (key[i] != low) continue;",
        "    for (int i = n - 1; i >= 0; --i) {\n        if (key[i] != low) continue;",
        ("tests/test_sampler_cpu.py::test_golden_tokens",),
        needs="extension",
    ),
    Mutation(
        "the compiled decoder adds the position after",
        "csrc/cpu/decoder_worker.h",
        "w_.positions + ptrdiff_t(s.first + i) * w_.dim",
        "w_.positions + ptrdiff_t(s.first + i + 1) * w_.dim",
        ("tests/test_cpu_decoder.py::test_float32_is_the_reference",),
        needs="extension",
    ),
    Mutation(
        "a compiled prefill sees tokens to come",
        "csrc/cpu/attention_body.h",
        "sums[j] = exponentials(h.weight + j * h.positions, length + j);",
        "sums[j] = exponentials(h.weight + j * h.positions, length + Q - 1);",
        ("tests/test_cpu_attention.py::test_a_prefill_is_its_steps",),
        needs="extension",
    ),
)
