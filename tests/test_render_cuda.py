"""`render` on the CUDA decoder, which computes in torch on the CPU here and replays what it noted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_fast import lm
from musicgen_fast.decoders.cuda import CudaDecoder
from musicgen_fast.decoders.cuda_ops import torch_ops
from musicgen_fast.decoders.cuda_pool import Pool

from .fake_capture import FakeCapture
from .test_render_run import _own_interrupts, mixed, models, options_of, run, short, summary  # noqa: F401
from .test_render_session import found


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch, exact: None) -> list[CudaDecoder]:
    """Those that were built."""
    built: list[CudaDecoder] = []

    def build(transformer: Any) -> CudaDecoder:
        fake = FakeCapture(torch_ops(transformer.device))
        built.append(CudaDecoder(transformer, fake.ops, capture=fake))
        return built[-1]

    monkeypatch.setenv("MUSICGEN_FAST_DECODER", "torch")
    monkeypatch.setattr(lm, "decoder_for", build)
    return built


def test_the_same_samples_in_any_batch(decoders: list[CudaDecoder], models: Path, tmp_path: Path) -> None:  # noqa: F811
    """Continuation, sections with crossfades, windows, parameters of all kinds; the memory is taken once."""
    options = options_of(tmp_path, models, mixed(20), precision="float32", batch_size=1)
    assert run(options) == 0
    assert run(replace(options, output_dir=tmp_path / "eight", batch_size=8)) == 0
    assert found(tmp_path / "out") == found(tmp_path / "eight")
    assert decoders[1]._cache.tensor.shape[2] >= 16 and not any(decoders[1]._cache._taken)


def test_less_at_once_where_the_memory_is_small(
    decoders: list[CudaDecoder],
    models: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Pool._memory

    def small(self: Pool, slots: int, capacity: int) -> Any:
        if slots > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return memory(self, slots, capacity)

    monkeypatch.setattr(Pool, "_memory", small)
    options = options_of(tmp_path, models, short(12), precision="float32", batch_size=16)
    assert run(options) == 0
    assert summary(options)["batch_size"] == 3 and len(found(tmp_path / "out")) == 12
