"""A tiny model with conditions, samplers and runs for the tests of the engine; no text encoder, no codec."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from musicgen_fast import native
from musicgen_fast.config import PatternConfig
from musicgen_fast.decoders.cpu import CpuDecoder
from musicgen_fast.decoders.cuda import CudaDecoder
from musicgen_fast.decoders.cuda_ops import torch_ops
from musicgen_fast.decoders.torch import TorchDecoder
from musicgen_fast.engine import Generation, generate
from musicgen_fast.packing import pack_weights
from musicgen_fast.sampling import SamplingParams
from musicgen_fast.state import Branch, Conditions, Sampler
from musicgen_fast.windows import WindowPlan, plan_windows

from .fake_capture import FakeCapture
from .test_decoder import random_model

VOCAB = 50
WINDOW, STRIDE = 30, 18
STEREO = PatternConfig(delays=(0, 0, 1, 1, 2, 2, 3, 3))
WAYS = {
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.8, "temperature": 1.2},
    "plain": {},
    "greedy": {"temperature": 0.0},
}


# The tests of the engine run on all decoders: a fixture of theirs has these as its params. That of CUDA computes in
# torch on the CPU, and what it would capture is noted and replayed.
DECODERS = [
    "torch",
    pytest.param("cpu", marks=pytest.mark.skipif(not native.available(), reason=f"no extension: {native.why_not()}")),
    "cuda",
]


class Counting:
    """Notes what a decoder is asked to do."""

    def __init__(self, model, *args, **options):
        super().__init__(*args, **options)
        self.model = model
        self.prefilled, self.rows, self.projected, self.allocated = [], [], 0, 0

    def allocate(self, rows, capacity):
        self.allocated += 1
        return super().allocate(rows, capacity)

    def condition(self, state):
        self.projected += 1
        super().condition(state)

    def prefill(self, state, draw=True):
        super().prefill(state, draw)
        self.prefilled.append(max(state.lengths))
        self.rows.append(len(state.lengths))

    def step(self, *states):
        super().step(*states)
        self.rows.append(sum(len(state.lengths) for state in states))


class CountingTorch(Counting, TorchDecoder):
    def __init__(self, transformer):
        super().__init__(transformer, transformer)

    def break_down(self) -> None:
        """All further logits are NaN."""
        self.model.norm.bias.data.fill_(math.nan)


class CountingCpu(Counting, CpuDecoder):
    """Attributes: `model`, the transformer whose weights were packed; `packed`, what the kernels read."""

    def __init__(self, transformer, precision="float32", **options):
        self.packed = pack_weights(transformer.config, dict(transformer.state_dict()), precision)
        super().__init__(transformer, self.packed, **options)

    def break_down(self) -> None:
        """All further logits are NaN."""
        self.packed.tensors["norm.bias"].view(torch.float32).fill_(math.nan)


class CountingCuda(Counting, CudaDecoder):
    def __init__(self, transformer, **options):
        self.fake = FakeCapture(torch_ops(transformer.device))
        super().__init__(transformer, transformer, self.fake.ops, capture=self.fake, **options)

    def break_down(self) -> None:
        """All further logits are NaN."""
        self.model.norm.bias.data.fill_(math.nan)


def build_decoder(decoder: str, kind: str = "cross", **sizes) -> CountingTorch | CountingCpu | CountingCuda:
    """`decoder` is one of `DECODERS`; the same weights in each."""
    model = random_model(kind, **sizes)
    return {"torch": CountingTorch, "cpu": CountingCpu, "cuda": CountingCuda}[decoder](model)


def texts(*lengths: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 32, generator=g) for n in lengths]


def text_conditions(batch: int, branches: int = 2, seed: int = 0) -> Conditions:
    """1, 2 or 3 branches with texts of unequal lengths; the null branch of CFG attends to nothing."""
    lengths = [3 + i for i in range(batch)]
    asked = [Branch(cross=texts(*lengths, seed=seed + n)) for n in range(max(1, branches - 1))]
    return Conditions(batch, asked + ([Branch()] if branches > 1 else []), branches)


def sampler_for(batch: int, way: str = "top-k", seeds: list[int] | None = None, num_codebooks: int = 4) -> Sampler:
    params = SamplingParams.build(batch, num_codebooks, cfg_coef=2.0, cfg_coef_beta=1.5, **WAYS[way])
    return Sampler(params, None if seeds is None else torch.tensor(seeds))


def prompt_of(batch: int, frames: int = 0, num_codebooks: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCAB, (batch, num_codebooks, frames), generator=g)


def plain(decoder, total, conditions, sampler, prompt=None, window=WINDOW, stride=STRIDE, **options) -> Tensor:
    """The whole generation with a prefill per window: what the parity tests hold against the references."""
    prompt = prompt_of(conditions.batch, 0, decoder.config.num_codebooks) if prompt is None else prompt
    windows = plan_windows(total, window, stride, prompt.shape[2])
    return generate(decoder, windows, prompt, lambda _: conditions, sampler, **options)


def streamed(decoder, total, conditions, sampler, prompt=None, window=WINDOW, stride=STRIDE, **options) -> Generation:
    """The same as an iterator, with shadows."""
    prompt = prompt_of(conditions.batch, 0, decoder.config.num_codebooks) if prompt is None else prompt
    plan = WindowPlan(total, window, stride, prompt.shape[2])
    return Generation(decoder, plan, prompt, lambda _: conditions, sampler, **options)


def collected(generation: Generation, prompt: Tensor | None = None) -> Tensor:
    frames = list(generation)
    return torch.cat(frames if prompt is None else [prompt, *frames], dim=2)
