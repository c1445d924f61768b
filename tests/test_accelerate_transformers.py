"""`accelerate` on transformers' live models: the calls, results and random numbers of the untouched object."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import musicgen_fast

from .oracle import transformers_lm as hf

KINDS: dict[str, dict[str, Any]] = {
    "text": {"vocab": 64},
    "stereo": {"dim": 96, "heads": 3, "vocab": 512},
    "melody": {"dim": 96, "vocab": 256},
    "stereo-melody": {"heads": 1, "vocab": 128, "text_dim": 64},  # as wide as the text: no projection
}
IDS = torch.tensor([[5, 6, 7, 8, 1], [9, 4, 1, 0, 0], [11, 1, 0, 0, 0]])
MASK = (IDS > 0).long()
NEW = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy without guidance": {"do_sample": False, "guidance_scale": 1.0},
    "sampled": {"do_sample": True},  # transformers fills in top_k 50
    "guidance off": {"do_sample": True, "guidance_scale": 1.0},
    "guidance unset": {"do_sample": True, "guidance_scale": None},
    "strong guidance": {"do_sample": True, "guidance_scale": 9.0},
    "temperature": {"do_sample": True, "temperature": 0.6, "top_k": 20},
    "top_p after top_k": {"do_sample": True, "top_p": 0.8},
    "top_p alone": {"do_sample": True, "top_p": 0.6, "top_k": 0, "temperature": 1.5},
    "top_p of zero": {"do_sample": True, "top_p": 0.0},
    "plain": {"do_sample": True, "top_k": 0},
    "max_length": {"do_sample": True, "max_length": 14, "max_new_tokens": None},
    "without a cache": {"do_sample": True, "use_cache": False},
    "few frames": {"do_sample": True, "max_new_tokens": 6},
    "fewer frames than delays": {"do_sample": True, "max_new_tokens": 4},
}


@contextmanager
def only_ours():
    """transformers' own loop fails here, and so does any warning."""
    from transformers.generation.utils import GenerationMixin

    def theirs(self, *args, **kwargs):
        raise AssertionError("transformers' own loop ran")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(GenerationMixin, "_sample", theirs)
        warnings.simplefilter("error")
        yield


def run(model, seed=1, **kwargs):
    """(result, state of the generator afterwards)."""
    torch.manual_seed(seed)
    return model.generate(**kwargs), torch.get_rng_state()


def same(model, *, ours=only_ours, **kwargs):
    """Asserts equal results of the untouched and the accelerated model; returns them."""
    expected, state = run(model, **kwargs)
    musicgen_fast.accelerate(model)
    try:
        with ours():
            result, after = run(model, **kwargs)
    finally:
        musicgen_fast.unaccelerate(model)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)
    assert torch.equal(after, state)
    return result


def inputs(kind: str, count=3, features=True) -> dict[str, Any]:
    given: dict[str, Any] = {"input_ids": IDS[:count], "attention_mask": MASK[:count]}
    if "melody" in kind and features:
        given["input_features"] = hf.chroma(torch.stack([hf.tune(b) for b in range(count)]))
    return given


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return hf.build(kind, **KINDS[kind])


@pytest.fixture(scope="module", params=["text", "stereo"])
def cross(request):
    return hf.build(request.param, **KINDS[request.param])


@pytest.fixture
def text():
    return hf.build("text", **KINDS["text"])


def accelerated(model):
    musicgen_fast.accelerate(model)
    return model


def channels(model) -> int:
    return model.config.decoder.audio_channels


# -- the same sound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(kind, model, setting):
    options = {"max_new_tokens": NEW, "guidance_scale": 3.0, **SETTINGS[setting]}
    options = {name: value for name, value in options.items() if value is not None}
    few = setting == "fewer frames than delays"  # there transformers runs, without a word
    wav = same(model, **inputs(kind), **options, **({"ours": warnings.catch_warnings} if few else {}))
    assert wav.shape[:2] == (3, channels(model)) and (few or wav.std() > 0)


def test_requests_differ(kind, model):
    wav = same(model, **inputs(kind), do_sample=True, max_new_tokens=NEW, guidance_scale=3.0)
    assert not torch.equal(wav[0], wav[1])
    other = same(model, **inputs(kind), do_sample=True, max_new_tokens=NEW, guidance_scale=3.0, seed=2)
    assert not torch.equal(wav, other)


def test_without_a_mask(kind, model):
    same(model, input_ids=IDS, do_sample=True, max_new_tokens=NEW, guidance_scale=3.0)
    same(model, inputs=IDS[:1], do_sample=True, max_new_tokens=NEW)


def test_requests_without_a_text(kind, model):
    given = {**inputs(kind), "attention_mask": MASK * torch.tensor([[1], [0], [1]])}
    same(model, **given, do_sample=True, max_new_tokens=NEW, guidance_scale=3.0)


def test_the_models_own_defaults(text):
    """What the published generation_config.json says: sampling, guidance 3, a length."""
    settings = text.generation_config
    settings.do_sample, settings.guidance_scale, settings.max_length = True, 3.0, 21
    wav = same(text, **inputs("text"))
    assert wav.shape[2] > 0
    settings.top_k = 5
    assert not torch.equal(same(text, **inputs("text")), wav)


def test_generation_config_as_an_object(kind, model):
    from transformers import GenerationConfig

    vocab = model.config.decoder.vocab_size
    ids = {"bos_token_id": vocab, "pad_token_id": vocab, "decoder_start_token_id": vocab}
    asked = GenerationConfig(do_sample=True, guidance_scale=2.0, top_k=7, max_new_tokens=NEW, **ids)
    wav = same(model, **inputs(kind), generation_config=asked)
    # keywords come before it
    assert not torch.equal(same(model, **inputs(kind), generation_config=asked, temperature=0.3), wav)


def test_unconditional(cross):
    same(cross, **cross.get_unconditional_inputs(num_samples=2), do_sample=True, max_new_tokens=NEW)


def test_melody_models_without_a_melody(kind, model):
    same(model, **inputs(kind, features=False), do_sample=True, max_new_tokens=NEW, guidance_scale=3.0)


def test_negative_prompts(cross):
    """Text states that are doubled by the caller: the second half takes the place of the null branch."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 5, cross.config.text_encoder.hidden_size, generator=generator)
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1, 2:] = mask[2, 3:] = 0
    given = {"input_ids": IDS[:2], "encoder_outputs": (states,), "do_sample": True, "max_new_tokens": NEW}
    wav = same(cross, **given, attention_mask=mask, guidance_scale=3.0)
    silent = mask * torch.tensor([[1], [1], [0], [0]])
    assert not torch.equal(same(cross, **given, attention_mask=silent, guidance_scale=3.0), wav)
    heard = mask * torch.tensor([[0], [0], [1], [1]])  # only the negative prompt is one
    assert not torch.equal(same(cross, **given, attention_mask=heard, guidance_scale=3.0), wav)


# -- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [3200, 2900])
def test_audio_prompts(cross, samples):
    sound = torch.stack([torch.stack([hf.tune(2 * b + c)[:samples] for c in range(channels(cross))]) for b in (0, 1)])
    padding = torch.ones(2, 1, samples, dtype=torch.long)
    padding[1, :, :700] = 0
    given = {**inputs("text", 2), "do_sample": True, "max_new_tokens": NEW, "guidance_scale": 3.0}
    same(cross, **given, input_values=sound)
    same(cross, **given, input_values=sound * padding, padding_mask=padding)


@pytest.mark.parametrize("frames", [1, 7])
def test_token_prompts(kind, model, frames):
    rows = 3 * model.decoder.num_codebooks
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, model.config.decoder.vocab_size, (rows, frames), generator=generator)
    given = {**inputs(kind), "do_sample": True, "max_new_tokens": NEW, "guidance_scale": 3.0}
    wav = same(model, **given, decoder_input_ids=prompt)
    start = torch.full((rows, 1), model.config.decoder.vocab_size)
    assert torch.equal(same(model, **given, decoder_input_ids=torch.cat([start, prompt], 1)), wav)
