"""Which decoder serves, and that none does whose numbers are wrong."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from musicgen_fast import decoder_for as module
from musicgen_fast.decoder_for import decoder_for, first_sound, logits_error
from musicgen_fast.decoders.cuda import CudaDecoder
from musicgen_fast.decoders.cuda_graphs import launch_at_once
from musicgen_fast.decoders.cuda_ops import torch_ops
from musicgen_fast.decoders.torch import TorchDecoder
from musicgen_fast.quantised import quantise

from .test_decoder import random_model

CPU = torch.device("cpu")


def captured(model: Any, ops: Any = None) -> CudaDecoder:
    return CudaDecoder(model, ops or torch_ops(CPU), capture=launch_at_once)


@pytest.mark.parametrize("kind", ["cross", "prefix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sound_decoder_is_within_the_limit(kind, dtype):
    model = random_model(kind, dim=64)
    for layer in [model, *model.layers]:
        for module_ in layer.children():
            if isinstance(module_, (torch.nn.Linear, torch.nn.Embedding)):
                module_.to(dtype)
    for decoder in (TorchDecoder(model), captured(model)):
        assert logits_error(decoder, model) < module._LIMIT[dtype] / 2


def test_int8_weights_are_held_against_themselves():
    model = random_model("cross", dim=64)
    quantise(model)
    assert logits_error(captured(model), model) < 1e-5


def wrong_ops(name: str, change: Any) -> Any:
    ops = torch_ops(CPU)
    inner = getattr(ops, name)
    setattr(ops, name, lambda *args, **kwargs: change(inner, *args, **kwargs))
    return ops


def off_by_two_percent(inner: Any, *args: Any, **kwargs: Any) -> None:
    inner(*args, **kwargs)
    args[3].mul_(1.02)


def no_compiler(inner: Any, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError("no C compiler was found")


@pytest.mark.parametrize(
    ("change", "said"), [(off_by_two_percent, "off the reference"), (no_compiler, "no C compiler was found")]
)
def test_what_is_wrong_or_does_not_run_is_passed_over(caplog, change, said):
    model = random_model("cross")
    good = captured(model)
    builders = {
        "v3": lambda: captured(model, wrong_ops("linear_parts", change)),
        "v1": lambda: good,
        "torch": lambda: TorchDecoder(model),
    }
    with caplog.at_level(logging.WARNING):
        assert first_sound(model, builders) is good
    assert len(caplog.records) == 1 and said in caplog.text and "v3" in caplog.text


def test_the_last_one_is_taken_as_it_is():
    model = random_model("cross")
    last = first_sound(
        model, {"v1": lambda: captured(model, wrong_ops("embed", no_compiler)), "torch": lambda: TorchDecoder(model)}
    )
    assert isinstance(last, TorchDecoder)


def gpu_model(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float16, quantised: bool = False) -> Any:
    """Looks like a transformer on a GPU; what is built for it are names."""
    heads = module.QuantisedLinear.__new__(module.QuantisedLinear) if quantised else None
    monkeypatch.setattr(module, "cuda_decoder", lambda transformer, version, kv: (version, kv))
    monkeypatch.setattr(module, "TorchDecoder", lambda transformer: "torch")
    monkeypatch.setattr(module, "first_sound", lambda transformer, builders: list(builders))
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, heads=heads)


@pytest.mark.parametrize(
    ("dtype", "quantised", "order"),
    [
        (torch.float16, False, ["v3", "v1", "torch"]),
        (torch.bfloat16, False, ["v3", "v1", "torch"]),
        (torch.float32, False, ["v1", "torch"]),
        (torch.float16, True, ["v3", "v1"]),
    ],
)
def test_the_order_on_a_gpu(monkeypatch, dtype, quantised, order):
    monkeypatch.delenv("MUSICGEN_FAST_CUDA", raising=False)
    assert decoder_for(gpu_model(monkeypatch, dtype, quantised)) == order


def test_one_that_is_asked_for_serves_or_says_why(monkeypatch):
    monkeypatch.setenv("MUSICGEN_FAST_CUDA", "v1")
    monkeypatch.setenv("MUSICGEN_FAST_KV", "int8")
    assert decoder_for(gpu_model(monkeypatch)) == ("v1", "int8")
    monkeypatch.setenv("MUSICGEN_FAST_CUDA", "torch")
    assert decoder_for(gpu_model(monkeypatch)) == "torch"
    with pytest.raises(RuntimeError, match="int8 weights: take v3 or v1"):
        decoder_for(gpu_model(monkeypatch, quantised=True))
    monkeypatch.setenv("MUSICGEN_FAST_CUDA", "v2")
    with pytest.raises(ValueError, match="must be auto, v3, v1, torch; got 'v2'"):
        decoder_for(gpu_model(monkeypatch))


def test_an_unknown_format_of_keys_and_values_is_refused():
    with pytest.raises(ValueError, match="unknown format 'fp4'"):
        CudaDecoder(random_model("cross"), torch_ops(CPU), capture=launch_at_once, kv="fp4")
