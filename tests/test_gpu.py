"""The same package on a CUDA device: the golden tokens bit for bit; logits, sound and generations near the CPU's."""

from __future__ import annotations

import pytest
import torch

from musicgen_fast import MusicGen, sample
from musicgen_fast.checkpoints.write import write_transformers_folder

from .checkpoint_writers import tiny
from .test_sampling import GOLDEN, golden_logits

pytestmark = pytest.mark.gpu  # skipped, with a message, where torch sees no GPU (conftest.py)


@pytest.mark.parametrize("case", GOLDEN["cases"] + GOLDEN["special"], ids=lambda c: f"{c['case']}-{c['kind']}")
def test_golden_tokens(case):
    keys = ("temperature", "top_k", "top_p", "min_p", "cfg_coef", "cfg_coef_beta")
    step = case["step"]
    drawn = sample(
        golden_logits(case).cuda(),
        **{k: torch.tensor(case[k]) if isinstance(case[k], list) else case[k] for k in keys},
        seed=torch.tensor(case["seeds"]),
        step=step if isinstance(step, int) else torch.tensor(step),
        stream=torch.tensor(case.get("streams", 0)),
    )
    assert drawn.tolist() == case["tokens"]


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
