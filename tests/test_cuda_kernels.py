"""The CUDA decoder on its Triton kernels, interpreted on the CPU: whole generations, token for token the reference's.

One kernel at a time is tested in test_kernels_*.py. The interpreter takes a second a step: few steps, tiny models.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from musicgen_fast.decoders.cuda import CudaDecoder
from musicgen_fast.decoders.cuda_graphs import launch_at_once
from musicgen_fast.decoders.cuda_ops import torch_ops, triton_ops
from musicgen_fast.decoders.torch import TorchDecoder
from musicgen_fast.model import Transformer
from musicgen_fast.quantised import quantise
from musicgen_fast.slot_engine import SlotEngine
from musicgen_fast.state import Branch, Conditions

from .engine_tools import plain, prompt_of, sampler_for, text_conditions, texts
from .test_decoder import random_model
from .test_engine import alone, request
from .test_kernels_attention import interpreted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def kernels(model: Transformer, **options: Any) -> CudaDecoder:
    return CudaDecoder(model, triton_ops(), capture=launch_at_once, **options)


def in_torch(model: Transformer, **options: Any) -> CudaDecoder:
    return CudaDecoder(model, torch_ops(torch.device("cpu")), capture=launch_at_once, **options)


def different(
    decoder: Any, expected: Any, conditions: Conditions, way: str, seeds: Any, frames: int, prompt: int = 0
) -> bool:
    tokens = []
    for each in (decoder, expected):
        torch.manual_seed(1)
        known = prompt_of(conditions.batch, prompt)
        tokens.append(plain(each, prompt + frames, conditions, sampler_for(conditions.batch, way, seeds), known))
    return not torch.equal(*tokens)


def check_ways() -> list:
    """Greedy, noise mode, counters; with CFG and double CFG; after a prompt."""
    model, wrong = random_model("cross"), []
    decoder, expected = kernels(model), TorchDecoder(model)
    for way, seeds, branches, prompt in (
        ("greedy", None, 2, 0),
        ("top-k", None, 2, 6),
        ("top-k", [7], 2, 0),
        ("top-p", [8], 3, 0),
    ):
        if different(decoder, expected, text_conditions(1, branches), way, seeds, 3, prompt):
            wrong.append((way, seeds, branches, prompt))
    return wrong


def check_kinds() -> list:
    """Prefixes, widths that are no power of two; and, against torch's functions, 8 bits and half precision."""
    wrong = []
    prefix = Conditions(1, [Branch(prefix=texts(5)), Branch(prefix=texts(3, seed=1))], 2)
    for kind, sizes, conditions in (
        ("prefix", {}, prefix),
        ("cross", {"dim": 48, "num_heads": 3, "ffn_dim": 80}, None),
    ):
        model = random_model(kind, **sizes)
        asked = conditions or Conditions(1, [Branch(cross=[torch.randn(4, 48)]), Branch()], 2)
        if different(kernels(model), TorchDecoder(model), asked, "greedy", [1], 4):
            wrong.append(kind)
    model = random_model("cross")
    for options in ({"kv": "int8"}, {"fold": True}):
        if different(kernels(model, **options), in_torch(model, **options), text_conditions(1), "greedy", [1], 4):
            wrong.append(options)
    quantise(model)
    if different(kernels(model), in_torch(model), text_conditions(1), "greedy", [1], 4):
        wrong.append("int8 weights")
    return wrong


def check_engine() -> list:
    """Requests that come and go, of other lengths, texts, branches and parameters: each as if it were alone."""
    decoder, wrong = kernels(random_model("cross")), []
    asked = [
        request(1, total=9, text=1),
        request(2, total=4, text=2, way="greedy", branches=1),
        request(3, total=5, text=3, way="top-p", branches=3),
    ]
    engine = SlotEngine(decoder, 2, 12, shadow=False)
    for r in asked:
        r.window, r.stride = 12, 6
    waiting, frames, requests = list(asked), {}, {}
    while waiting or engine.running:
        while waiting and engine.free:
            (number,) = engine.admit(waiting[0])
            requests[number], frames[number] = waiting.pop(0), []
        for number, new in engine.step().items():
            frames[number].append(new)
    for number, r in requests.items():
        if not torch.equal(torch.cat(frames[number], 1), alone(in_torch(decoder.model), r)):
            wrong.append(number)
    return wrong


def test_every_way_of_drawing() -> None:
    assert interpreted("test_cuda_kernels", "check_ways") == []


@pytest.mark.slow
def test_every_kind_of_model_and_number() -> None:
    assert interpreted("test_cuda_kernels", "check_kinds") == []


@pytest.mark.slow
def test_requests_that_come_and_go() -> None:
    assert interpreted("test_cuda_kernels", "check_engine") == []
