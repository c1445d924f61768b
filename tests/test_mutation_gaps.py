"""What planted faults (`mutations.py`) showed to be untested, or tested only where audiocraft or no extension is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from musicgen_fast.loudness import normalize_audio
from musicgen_fast.place import Place, Sampler
from musicgen_fast.quantised import QuantisedLinear
from musicgen_fast.render.ledger import Ledger, ledger_paths, read_ledgers
from musicgen_fast.sampling import sample

from .engine_tools import build_decoder, collected, plain, sampler_for, streamed, text_conditions
from .test_sampling import skip_if_missing


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_greedy_ties_go_to_the_lowest_token(backend: str) -> None:
    skip_if_missing(backend)
    logits = torch.tensor([1.0, torch.nan, 4.0, 4.0, -torch.inf, 4.0]).view(1, 1, 1, -1)
    assert sample(logits, temperature=0.0, seed=0, step=0, backend=backend).item() == 2


@pytest.mark.parametrize("shadow", [False, True], ids=["prefill", "shadow"])
def test_noise_is_counted_by_the_column_of_the_whole(monkeypatch: pytest.MonkeyPatch, shadow: bool) -> None:
    """Windows of 30 frames, 18 apart: a delay pattern has 34 columns for them, 28 for the last one, of 24 frames."""
    steps: list[int] = []
    inner = Sampler.__call__

    def recorded(self: Sampler, logits: Tensor, place: Place) -> None:
        steps.append(int(place.step[0]))
        inner(self, logits, place)

    monkeypatch.setattr(Sampler, "__call__", recorded)
    decoder, conditions, sampler = build_decoder("torch"), text_conditions(1), sampler_for(1, seeds=[3])
    if shadow:
        collected(streamed(decoder, 60, conditions, sampler))
    else:
        plain(decoder, 60, conditions, sampler)
    expected = [*range(1, 34), *range(18 + 13, 18 + 34), *range(36 + 13, 36 + 28)]
    assert sorted(steps) == sorted(expected)
    if not shadow:
        assert steps == expected


def test_eight_bits_round_to_the_nearest() -> None:
    """No weight moves by more than half a step, and the largest of each group is kept."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 32, bias=False)
    quantised = QuantisedLinear(linear, 64)
    moved = (quantised.dense() - linear.weight.detach()).unflatten(1, (-1, 64)).abs()
    assert quantised.weight.unflatten(1, (-1, 64)).abs().amax(-1).eq(127).all()
    assert (moved <= 0.5001 * quantised.scales[..., None]).all()


@pytest.mark.parametrize("strategy", ["rms", "loudness"])
def test_peaks_are_clipped_at_one(strategy: str) -> None:
    """A second of quiet noise with one loud sample, raised by some 20 dB."""
    wav = 0.01 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    wav[0, 4000] = -0.9
    out = normalize_audio(wav, strategy=strategy, sample_rate=8000)
    assert out.min().item() == -1.0 and out[0, 4000].item() == -1.0
    assert normalize_audio(-wav, strategy=strategy, sample_rate=8000).max().item() == 1.0


@pytest.mark.parametrize("finished", ["ledger-1-of-2.jsonl", "ledger-2-of-2.jsonl"])
def test_a_piece_that_any_ledger_calls_done_is_done(finished: str, tmp_path: Path) -> None:
    """Files have no common order: what another shard says of a piece, before or behind, does not undo it."""
    for name in ("ledger-1-of-2.jsonl", "ledger-2-of-2.jsonl"):
        with Ledger(tmp_path / name) as ledger:
            if name == finished:
                ledger.done("a", "f")
            else:
                ledger.start("a", "f", 1)
                ledger.fail("a", "f", 1, "x")
    state = read_ledgers(ledger_paths(tmp_path)).of("a", "f")
    assert state.done is not None and state.done["key"] == "a"
