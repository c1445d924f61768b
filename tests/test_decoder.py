"""The torch decoder against the reference transformer, which recomputes everything: logits of every column."""

from __future__ import annotations

import pytest
import torch

from musicgen_fast.arena import move_to_huge_pages
from musicgen_fast.config import ModelConfig, TextConfig
from musicgen_fast.decoders.torch import TorchDecoder
from musicgen_fast.model import Transformer, position_table
from musicgen_fast.pattern import UNKNOWN, build_pattern
from musicgen_fast.sampling import SamplingParams
from musicgen_fast.state import Branch, Conditions, Sampler, State

FRAMES = 9


def random_model(conditioning: str, **sizes) -> Transformer:
    config = ModelConfig(
        **{"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "vocab_size": 50, **sizes},
        conditioning=conditioning, text=TextConfig(dim=12),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return model


class Recorder:
    """Stands in for `Sampler`: keeps the logits of every column and draws greedily."""

    def __init__(self, batch):
        self.logits, self.inner = [], Sampler(SamplingParams.build(batch, 4, temperature=0.0))

    def __call__(self, logits, place):
        self.logits.append(logits.clone())
        self.inner(logits, place)


def run(model: Transformer, conditions: Conditions, prompt: int = 0) -> tuple[list, State]:
    decoder, recorder = TorchDecoder(model), Recorder(conditions.batch)
    pattern = build_pattern(model.config.pattern, 4, FRAMES)
    capacity = max(conditions.prefix_lengths()) + pattern.num_steps - 1
    kv = decoder.allocate(conditions.num_rows, capacity)
    state = State(model.config, kv, [0] * conditions.num_rows, conditions, recorder)
    decoder.condition(state)
    codes = torch.full((conditions.batch, 4, FRAMES), UNKNOWN)
    codes[:, :, :prompt] = torch.randint(0, 50, (conditions.batch, 4, prompt))
    state.start_window(pattern, codes, prompt, 0)
    decoder.prefill(state)
    while not state.done:
        decoder.step(state)
    return recorder.logits, state


def check(model: Transformer, conditions: Conditions, prompt: int = 0) -> State:
    """Every column's logits equal those of one pass of the reference over the finished sequence, row by row."""
    logits, state = run(model, conditions, prompt)
    first = state.pattern.first_step(prompt)
    for n, branch in enumerate(conditions.branches):
        for b in range(conditions.batch):
            expected = model(
                state.sequence[b : b + 1],
                None if branch.prefix is None else branch.prefix[b][None],
                None if branch.cross is None else branch.cross[b][None],
            )[0]
            for i, column in enumerate(logits):
                torch.testing.assert_close(column[n, b], expected[first - 1 + i], rtol=2e-4, atol=2e-4)
    return state


def states(*lengths: int) -> list[torch.Tensor]:
    return [torch.randn(n, 32) for n in lengths]


@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("lengths,absorbed", [((5,), True), ((2, 6), True), ((3, 4, 1), True), ((3, 7, 1), False)])
def test_cross_attention(lengths, absorbed, prompt):
    """Texts of one batch differ in length; short ones are folded into the projections; the null branch is skipped,
    and is what zeros would have given."""
    model = random_model("cross")
    state = check(model, Conditions(len(lengths), [Branch(cross=states(*lengths)), Branch()], 2), prompt)
    assert bool(state.texts.absorbed) == absorbed
    zeros = model(torch.zeros(1, 4, 3, dtype=torch.int64), None, torch.zeros(1, 6, 32))
    torch.testing.assert_close(zeros, model(torch.zeros(1, 4, 3, dtype=torch.int64)), rtol=0, atol=0)


@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (3, 7, 1)])
def test_prefixes_of_any_length_per_row(lengths, prompt):
    model = random_model("prefix")
    null = [torch.zeros(2, 32) for _ in lengths]
    branches = [Branch(prefix=states(*lengths)), Branch(prefix=states(*lengths)), Branch(prefix=null)]
    check(model, Conditions(len(lengths), branches, 3), prompt)


@pytest.mark.parametrize("sizes", [{"num_heads": 1}, {"dim": 48, "num_heads": 3}, {"num_heads": 16}, {"num_layers": 1}])
def test_head_sizes(sizes):
    width = sizes.get("dim", 32)
    cross = [torch.randn(4, width)]
    check(random_model("cross", **sizes), Conditions(1, [Branch(cross=cross), Branch()], 2))


def test_a_window_leaves_nothing_behind():
    """One cache serves the windows of a generation: a run after another one in it equals a run in a fresh one."""
    model = random_model("prefix")
    decoder = TorchDecoder(model)
    conditions = Conditions(2, [Branch(prefix=states(6, 2)), Branch(prefix=states(1, 4))], 2)
    pattern = build_pattern(model.config.pattern, 4, FRAMES)
    results = []
    kv = decoder.allocate(4, 6 + pattern.num_steps)
    for _ in range(2):
        state = State(model.config, kv, [0] * 4, conditions, Recorder(2))
        state.start_window(pattern, torch.full((2, 4, FRAMES), UNKNOWN), 0, 0)
        decoder.prefill(state)
        while not state.done:
            decoder.step(state)
        results.append(state.codes())
        kv.tensor.fill_(7.0)  # what a window before may have left
    assert torch.equal(*results)


def test_positions():
    """Cosines first; the last frequency is 1/10000 (a denominator of d/2 - 1)."""
    table = position_table(3000, 32)
    for i in range(16):
        angle = 1234 / 10000 ** (i / 15)
        assert table[1234, i].item() == pytest.approx(
            torch.cos(torch.tensor(angle, dtype=torch.float64)).item(), abs=1e-3
        )
        assert table[1234, 16 + i].item() == pytest.approx(
            torch.sin(torch.tensor(angle, dtype=torch.float64)).item(), abs=1e-3
        )


def test_huge_pages_change_no_bit():
    model = random_model("cross")
    before = {name: p.clone() for name, p in model.named_parameters()}
    move_to_huge_pages(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())


def test_missing_and_misshapen_weights_are_refused():
    model = random_model("cross")
    weights = dict(model.state_dict())
    with pytest.raises(RuntimeError, match="heads.weight"):
        Transformer.from_weights(model.config, {k: v for k, v in weights.items() if k != "heads.weight"})
    with pytest.raises(RuntimeError, match="norm.weight"):
        Transformer.from_weights(model.config, {**weights, "norm.weight": torch.zeros(3)})
