"""The CUDA decoder on a GPU, on tiny models: what must hold, for v1 and v3, and every kind of model.

The checks are those of `make bench-gpu` (benchmarks/gpu_checks.py, gpu_failures.py), which runs them at the size of
musicgen-small. Without a GPU their logic is tried in test_bench_gpu.py.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_fast.config import ModelConfig, PatternConfig
from musicgen_fast.decoder_for import decoder_for, logits_error
from musicgen_fast.decoders.cuda import CudaDecoder
from musicgen_fast.engine import Generation, generate
from musicgen_fast.windows import WindowPlan, plan_windows

with pytest.MonkeyPatch.context() as patch:  # scripts, in a folder which is no package
    patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    checks, failures = map(importlib.import_module, ("gpu_checks", "gpu_failures"))
    lines, tools = map(importlib.import_module, ("gpu_lines", "gpu_tools"))

pytestmark = pytest.mark.gpu  # skipped, with a message, where torch sees no GPU (conftest.py)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BENCH = lines.Bench(DEVICE, tiny=True)
STEREO = PatternConfig(delays=(0, 0, 1, 1, 2, 2, 3, 3))
KINDS: dict[str, ModelConfig] = {
    "text": tools.TINY,
    "stereo": replace(tools.TINY, num_codebooks=8, pattern=STEREO, audio_channels=2),
    "prefix": replace(tools.TINY, conditioning="prefix"),
    "wide heads": replace(tools.TINY, dim=256, num_heads=2, ffn_dim=1024),
    "odd width": replace(tools.TINY, dim=192, num_heads=3, ffn_dim=768, vocab_size=37),
    "parallel": replace(tools.TINY, pattern=PatternConfig(kind="parallel")),
}


class Kept(lines.Lines):  # type: ignore[name-defined, misc]
    """Lines in memory."""

    def __init__(self) -> None:
        super().__init__(None)
        self.all: list[dict[str, Any]] = []

    def add(self, **line: Any) -> None:
        self.all.append(line)


@pytest.mark.parametrize("part", [*checks.PARTS, *failures.PARTS])
def test_what_must_hold(part):
    kept = Kept()
    (checks.PARTS | failures.PARTS)[part](BENCH, kept)
    assert kept.all and all(line["status"] == "passed" for line in kept.all), kept.all


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize(
    "precision,kv,limit",
    [("float32", None, 1e-4), ("float16", None, 3e-3), ("bfloat16", None, 3e-2), ("float16", "int8", 2e-2)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, precision, kv, limit, version):
    exact = tools.build_model(BENCH, precision="float32", config=KINDS[kind])
    decoder = tools.build_decoder(BENCH, tools.build_model(BENCH, precision=precision, config=KINDS[kind]), version, kv)
    assert logits_error(decoder, exact, 30) <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_of_version_1_in_float32(kind):
    """Windows and a prompt: the reference recomputes every step from nothing."""
    model = tools.build_model(BENCH, precision="float32", config=KINDS[kind])
    asked = tools.conditions(model.config, DEVICE, [5, 2], null=True)
    prompt = torch.randint(0, 37, (2, model.config.num_codebooks, 3), device=DEVICE)
    found = []
    for decoder in (checks.WholeSequence(model), tools.build_decoder(BENCH, model, "v1")):
        drawn = tools.sampler(model.config, DEVICE, None, 2, temperature=0.0)
        found.append(generate(decoder, plan_windows(25, 15, 9, 3), prompt, lambda _: asked, drawn))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["text", "stereo"])
def test_windows_with_a_shadow_are_those_with_a_prefill(kind):
    """v3: up to how a prefill rounds, which goes through torch's products: in float32 no token hangs on that."""
    model = tools.build_model(BENCH, precision="float32", config=KINDS[kind])
    decoder, asked = tools.build_decoder(BENCH, model), tools.conditions(model.config, DEVICE, [6])
    found = []
    for shadow in (True, False):
        drawn, prompt = tools.sampler(model.config, DEVICE, [4]), tools.no_prompt(model.config, DEVICE)
        plan = WindowPlan(50, 20, 12)
        frames = Generation(decoder, plan, prompt, lambda _: asked, drawn, shadow=shadow)
        found.append(torch.cat(list(frames), dim=2))
    assert torch.equal(*found)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has decoders of its own")
@pytest.mark.parametrize("precision,module", [("float16", "linear"), ("bfloat16", "linear"), ("float32", "reference")])
def test_the_decoder_that_serves(precision, module, caplog, monkeypatch):
    """The trial of `decoder_for` finds nothing wrong: v3 in half precision, v1 in float32, and no warning."""
    monkeypatch.delenv("MUSICGEN_FAST_CUDA", raising=False)
    with caplog.at_level(logging.WARNING):
        decoder = decoder_for(tools.build_model(BENCH, precision=precision))
    assert isinstance(decoder, CudaDecoder) and not caplog.records
    assert decoder._ops.norm_linear.__module__.endswith(module)


@pytest.mark.skipif(DEVICE == "cpu", reason="nothing waits for a CPU")
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_a_step_never_waits_for_the_device(version):
    """torch raises at every synchronising call while the steps run; one look at `status` in 50 columns is allowed."""
    decoder = tools.build_decoder(BENCH, tools.build_model(BENCH), version)
    held = tools.opened_at(BENCH, decoder, 2, 5)
    for _ in range(2):
        decoder.step(held.state)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            decoder.step(held.state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int((held.state.sequence[..., 8:15] < 0).sum()) == 0
