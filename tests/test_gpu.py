"""The same package on a CUDA device: the golden tokens bit for bit; logits, sound and generations near the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch

from musicgen_fast import MusicGen, sample
from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.sampling import Draw, draw, reference
from musicgen_fast.sampling.backends import why_not

from .checkpoint_writers import tiny
from .sampler_cases import describe, random_draw, random_draws
from .sampler_edges import edge_draws
from .test_sampling import GOLDEN, golden_arguments, golden_logits

pytestmark = pytest.mark.gpu  # skipped, with a message, where torch sees no GPU (conftest.py)


BACKENDS = ["torch", "triton", "cuda"]
CUDA = torch.device("cuda", 0)


def skip_if_missing(backend: str) -> None:
    if reason := why_not(backend, CUDA):
        pytest.skip(reason)


def on_gpu(inputs: Draw) -> Draw:
    """The same draw with every tensor on the device."""
    there = copy.copy(inputs)
    there.params = copy.copy(inputs.params)
    for name in ("cfg_coef", "cfg_coef_beta", "scale", "divisor", "top_k", "top_p", "min_p"):
        object.__setattr__(there.params, name, getattr(inputs.params, name).to(CUDA))
    for name in ("logits", "tokens", "status", "seed", "step", "stream", "noise", "column", "frames"):
        value = getattr(inputs, name)
        setattr(there, name, None if value is None else value.to(CUDA))
    return there


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GOLDEN["cases"] + GOLDEN["special"], ids=lambda c: f"{c['case']}-{c['kind']}")
def test_golden_tokens(case, backend):
    skip_if_missing(backend)
    drawn = sample(golden_logits(case).to(CUDA), **golden_arguments(case), backend=backend)
    assert drawn.tolist() == case["tokens"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_rows(backend):
    """Against the reference on the CPU: every kind of row, filter, counter and output."""
    skip_if_missing(backend)
    for inputs in random_draws(17, 4_000, 200):
        expected = copy.copy(inputs)
        expected.tokens, expected.status = inputs.tokens.clone(), inputs.status.clone()
        reference.draw(expected)
        there = on_gpu(inputs)
        draw(there, backend)
        assert torch.equal(there.tokens.cpu(), expected.tokens), describe(inputs)
        assert torch.equal(there.status.cpu(), expected.status), describe(inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges(backend):
    skip_if_missing(backend)
    for name, inputs in edge_draws(random_rows=20):
        expected = copy.copy(inputs)
        expected.tokens, expected.status = inputs.tokens.clone(), inputs.status.clone()
        reference.draw(expected)
        there = on_gpu(inputs)
        draw(there, backend)
        assert torch.equal(there.tokens.cpu(), expected.tokens), name


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_captured_graph_draws_anew_at_every_replay(backend):
    """Step, column and parameters are read on the device; no draw waits for it."""
    skip_if_missing(backend)
    inputs = on_gpu(random_draw(3, 16, vocab=2048, branches=2, dtype=torch.float16, noise=False, column=False))
    assert inputs.seed is not None
    batch, num_codebooks = inputs.status.shape
    steps = 6
    inputs.tokens = torch.full((batch, num_codebooks, steps), -1, device=CUDA)
    inputs.frames = torch.zeros(steps, num_codebooks, dtype=torch.int32, device=CUDA)
    inputs.column = torch.zeros(batch, dtype=torch.int32, device=CUDA)
    inputs.step = torch.zeros(batch, dtype=torch.int64, device=CUDA)
    eager = copy.copy(inputs)
    eager.tokens, eager.status = inputs.tokens.clone(), inputs.status.clone()
    eager.column, eager.step = inputs.column.clone(), inputs.step.clone()
    for _ in range(steps):
        draw(eager, backend)  # also compiles, before the capture
        eager.column += 1
        eager.step += 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw(eager, backend)  # columns are past the end: nothing is written
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            draw(inputs, backend)
            inputs.column.add_(1)
            inputs.step.add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(steps):
        graph.replay()
    assert torch.equal(inputs.tokens, eager.tokens) and (inputs.tokens >= 0).all()
    assert torch.equal(inputs.status, eager.status)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_is_named_and_the_device_lives_on(backend):
    skip_if_missing(backend)
    logits = torch.zeros(1, 2, 4, 2048, device=CUDA)
    logits[0, 1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"\(1, 2\)\]: all logits are NaN"):
        sample(logits, seed=0, step=0, backend=backend)
    assert sample(logits[:, :1], seed=0, step=0, backend=backend).shape == (1, 4)
    with pytest.raises(RuntimeError, match="reads the memory of the CPU"):
        sample(logits, seed=0, step=0, backend="cpu")


@pytest.fixture(scope="module", params=["text", "stereo", "melody"])
def folder(request, tmp_path_factory):
    return write_transformers_folder(tmp_path_factory.mktemp("gpu") / "model", checkpoint=tiny(request.param))


@pytest.mark.parametrize("precision,tolerance", [("float32", 1e-3), ("float16", 2e-2), ("bfloat16", 1e-1)])
def test_logits_and_sound(folder, precision, tolerance):
    exact = MusicGen.get_pretrained(folder, device="cpu")
    there = MusicGen.get_pretrained(folder, device="cuda", precision=precision)
    tokens = torch.randint(0, 64, (2, exact.lm.num_codebooks, 20), generator=torch.Generator().manual_seed(0))
    expected, got = exact.lm.transformer(tokens), there.lm.transformer(tokens.cuda()).float().cpu()
    assert (got - expected).norm() / expected.norm() < tolerance
    wav = exact.generate_audio(tokens)
    assert (there.generate_audio(tokens.cuda()).cpu() - wav).norm() / wav.norm() < 1e-3


@pytest.mark.parametrize("precision", ["float32", None])
def test_every_way_of_generating(folder, precision):
    model = MusicGen.get_pretrained(folder, device="cuda", precision=precision)
    model.set_generation_params(duration=1.0)
    wav, tokens = model.generate(["calm", None, "a much longer text than the others"], return_tokens=True, seed=3)
    assert wav.device.type == "cuda" and wav.shape == (3, model.audio_channels, 32000)
    assert torch.equal(
        tokens, model.generate(["calm", None, "a much longer text than the others"], True, True, seed=3)[1]
    )
    assert model.generate_unconditional(2).shape[0] == 2
    prompt = wav[:1, :, :9000].cpu()
    assert model.generate_continuation(prompt, 32000, ["calm"], seed=1).shape == (1, model.audio_channels, 32000)
    model.max_duration = 0.6
    model.set_generation_params(duration=1.5, top_p=0.9, cfg_coef_beta=2.0)
    if model.lm.config.melody is None:
        assert model.generate(["calm"], seed=1).shape[-1] == 48000
    else:
        tone = torch.sin(torch.arange(20000) / 11)[None]
        assert model.generate_with_chroma(["calm"], tone, 32000, separate=False, seed=1).shape[-1] == 48000
