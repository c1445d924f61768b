"""The sampler inside a generation: every backend gives the same music, and a failed draw ends it with a name."""

from __future__ import annotations

import math

import pytest
import torch

from musicgen_fast import MusicGen, state
from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.config import ModelConfig
from musicgen_fast.pattern import UNKNOWN, build_pattern
from musicgen_fast.sampling import SamplingParams
from musicgen_fast.state import Branch, Conditions, Sampler, State

from .checkpoint_writers import tiny
from .packed_tools import scale_heads
from .test_sampling import skip_if_missing

WAYS = {
    "top-k": {},
    "top-p": {"top_p": 0.8},
    "double": {"cfg_coef_beta": 2.0, "temperature": 0.9},
    "plain": {"top_k": 0, "cfg_coef": 1.0},
    "greedy": {"use_sampling": False},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_transformers_folder(tmp_path_factory.mktemp("model"), checkpoint=tiny("text"))
    model = MusicGen.get_pretrained(folder, device="cpu")
    scale_heads(model.lm, 30)
    model.max_duration = 1.0
    return model


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_generation_is_the_same_with_every_backend(model, monkeypatch, way, seed):
    """Two windows, a batch of texts of different lengths; with seeds and in noise mode."""
    skip_if_missing("cpu")
    model.set_generation_params(duration=1.4, extend_stride=0.5, **WAYS[way])
    seen = []
    for backend in ("torch", "cpu"):
        monkeypatch.setenv("MUSICGEN_FAST_SAMPLER", backend)
        torch.manual_seed(1)
        _, tokens = model.generate(["calm", "a much longer text", None], return_tokens=True, seed=seed)
        seen.append(tokens)
    assert torch.equal(*seen)
    assert way == "greedy" or len(seen[0].unique()) > 20


def test_the_variable_is_checked(model, monkeypatch):
    monkeypatch.setenv("MUSICGEN_FAST_SAMPLER", "cude")
    with pytest.raises(ValueError, match="MUSICGEN_FAST_SAMPLER must be auto, torch, cpu, triton, cuda; got 'cude'"):
        model.generate(["calm"], seed=0)


def window(batch: int = 2, seeds: bool = True) -> State:
    """A window of 6 frames, of which request 0 knows one cell in the middle; the decoder is the test."""
    config = ModelConfig(dim=8, num_layers=1, num_heads=1, ffn_dim=8, vocab_size=20)
    sampler = Sampler(SamplingParams.build(batch, 4, top_k=5), torch.arange(batch) if seeds else None)
    state = State(config, torch.empty(0), [0] * batch, Conditions(batch, [Branch()], 1), sampler)
    codes = torch.full((batch, 4, 6), UNKNOWN)
    codes[0, 2, 3] = 13
    state.start_window(build_pattern(config.pattern, 4, 6), codes, 0, 0)
    return state


@pytest.mark.parametrize("seeds", [True, False])
def test_cells_that_are_known_or_masked_stay(seeds):
    state = window(seeds=seeds)
    g = torch.Generator().manual_seed(0)
    while not state.done:
        state.write_column(torch.randn(2, 4, 20, generator=g))
    codes = state.codes()
    assert codes[0, 2, 3] == 13 and (codes >= 0).all() and (codes < 20).all()
    masked = torch.from_numpy(state.pattern.table.T < 0)
    assert (state.sequence[:, masked] == 20).all() and (state.sequence[:, ~masked] < 20).all()


def test_masked_cells_may_fail_and_drawn_ones_may_not():
    """Logits of NaN hurt nobody where the pattern has no token to draw."""
    state = window()
    logits = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))
    logits[:, 1:] = math.nan  # step 1 of the delay pattern draws codebook 0 only
    state.write_column(logits)
    with pytest.raises(ValueError, match=r"\(0, 1\), \(1, 1\)\]: all logits are NaN"):
        state.write_column(logits.roll(1, dims=1).fill_(1.0).index_fill(1, torch.tensor([1]), math.nan))


def test_a_failure_is_reported_even_if_looked_for_later(monkeypatch):
    """On a GPU the status is read every so many columns, and at the end: it must stick until then."""
    looks, inner = [], state.raise_on_failure
    monkeypatch.setattr(state, "raise_on_failure", lambda status: looks.append(1) or inner(status))
    monkeypatch.setitem(state.STATUS_INTERVAL, "cpu", 50)
    current = window()
    g = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"\(0, 0\), \(1, 0\)"):
        while not current.done:
            logits = torch.randn(2, 4, 20, generator=g)
            current.write_column(logits * math.nan if current.column == 1 else logits)
    assert len(looks) == 1 and current.done
