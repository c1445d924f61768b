"""Results of accelerated transformers models that take another form: several sequences, streams, dictionaries,
half precision, pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import musicgen_fast

from .oracle import transformers_lm as hf
from .test_accelerate_transformers import KINDS, NEW, accelerated, channels, inputs, only_ours, run


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


# -- what transformers gets wrong ------------------------------------------------------------------------------------


def repeated(given: dict[str, Any], count: int) -> dict[str, Any]:
    return {name: value.repeat_interleave(count, 0) for name, value in given.items()}


def test_several_sequences(kind, model):
    """As many requests side by side; transformers itself mixes their codebooks up."""
    given = inputs(kind, 2)
    options = {"do_sample": True, "max_new_tokens": NEW, "guidance_scale": 3.0}
    expected, _ = run(model, **repeated(given, 3), **options)
    try:
        with only_ours():
            wav, _ = run(accelerated(model), **given, **options, num_return_sequences=3)
    finally:
        musicgen_fast.unaccelerate(model)
    assert torch.equal(wav, expected) and len(wav) == 6
    assert not torch.equal(wav[0], wav[1])


def test_several_sequences_of_prompts(cross):
    k, n = cross.decoder.num_codebooks, 2
    prompt = torch.randint(0, 64, (2 * k, 5), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": True, "max_new_tokens": NEW, "guidance_scale": 3.0}
    rows = prompt.unflatten(0, (2, k)).repeat_interleave(n, 0).flatten(0, 1)
    expected, _ = run(cross, **repeated(inputs("text", 2), n), **options, decoder_input_ids=rows)
    free, _ = run(cross, **cross.get_unconditional_inputs(4), max_new_tokens=NEW, do_sample=True)
    accelerated(cross)
    try:
        given = {**inputs("text", 2), "decoder_input_ids": prompt, **options}
        assert torch.equal(run(cross, **given, num_return_sequences=n)[0], expected)
        given = {**cross.get_unconditional_inputs(2), "max_new_tokens": NEW, "do_sample": True}
        assert torch.equal(run(cross, **given, num_return_sequences=n)[0], free)
    finally:
        musicgen_fast.unaccelerate(cross)


def test_several_greedy_sequences_are_refused_as_ever(text):
    with pytest.raises(ValueError, match="num_return_sequences"):
        accelerated(text).generate(**inputs("text"), do_sample=False, num_return_sequences=2, max_new_tokens=NEW)


class Streamer:
    """Keeps what it is given; raises at put number `stop`."""

    def __init__(self, stop=-1):
        self.columns: list[torch.Tensor] = []
        self.stop, self.ends = stop, 0

    def put(self, value):
        assert not self.ends
        self.columns.append(value)
        if len(self.columns) == self.stop:
            raise InterruptedError

    def end(self):
        self.ends += 1


def test_streamer(kind, model):
    """The prompt first, then every column, then the end; without the delays they are the codec's tokens."""
    k, vocab = model.decoder.num_codebooks, model.config.decoder.vocab_size
    options = {**inputs(kind, 2), "do_sample": True, "max_new_tokens": NEW, "guidance_scale": 3.0}
    streamer = Streamer()
    with hf._tapped(model.audio_encoder) as codes:
        silent, _ = run(accelerated(model), **options)
        wav, _ = run(model, **options, streamer=streamer)
    musicgen_fast.unaccelerate(model)
    assert torch.equal(wav, silent)
    tokens = codes[-1] if channels(model) == 1 else torch.stack(codes[-2:], 2).flatten(1, 2)
    assert streamer.ends == 1 and streamer.columns[0].shape == (2 * k, 1)
    assert [tuple(c.shape) for c in streamer.columns[1:]] == [(2 * k,)] * NEW
    sheet = torch.cat([streamer.columns[0], torch.stack(streamer.columns[1:], 1)], 1).unflatten(0, (2, k))
    assert torch.equal(sheet[sheet != vocab], sheet[sheet < vocab])
    assert torch.equal(sheet[sheet < vocab].view(2, k, -1), tokens)


def test_streamer_is_given_every_step_when_it_happens(text):
    streamer = Streamer(stop=4)
    with pytest.raises(InterruptedError):
        accelerated(text).generate(**inputs("text"), do_sample=True, max_new_tokens=NEW, streamer=streamer)
    assert len(streamer.columns) == 4
    assert torch.equal(text.generate(**inputs("text"), max_new_tokens=NEW, do_sample=False), run(
        musicgen_fast.unaccelerate(text), **inputs("text"), max_new_tokens=NEW, do_sample=False)[0])  # fmt: skip


# -- other forms of the result ---------------------------------------------------------------------------------------


def test_return_dict(kind, model):
    options = {**inputs(kind), "do_sample": True, "max_new_tokens": NEW, "return_dict_in_generate": True}
    expected, _ = run(model, **options)
    with only_ours():
        result, _ = run(accelerated(model), **options)
    musicgen_fast.unaccelerate(model)
    assert type(result) is type(expected) and torch.equal(result.sequences, expected.sequences)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, dtype):
    """Ours keeps the residual stream in float32, so tokens may differ; form and type of the sound do not."""
    model = hf.build(kind, **KINDS[kind]).to(dtype)
    options = {**inputs(kind), "do_sample": True, "max_new_tokens": NEW, "guidance_scale": 3.0}
    if "input_features" in options:
        options["input_features"] = options["input_features"].to(dtype)
    expected, _ = run(model, **options)
    with only_ours():
        wav, _ = run(accelerated(model), **options)
    assert wav.dtype == expected.dtype == dtype and wav.shape == expected.shape and wav.isfinite().all()


def test_pipeline(text, tmp_path):
    from transformers import pipeline

    tokenizer = hf.tokenizer(hf.save(text, tmp_path))
    spoken = pipeline("text-to-audio", model=text, tokenizer=tokenizer)
    options = {"generate_kwargs": {"do_sample": True, "max_new_tokens": NEW, "guidance_scale": 3.0}}
    torch.manual_seed(3)
    expected = spoken("slow piano", **options)
    accelerated(text)
    torch.manual_seed(3)
    with only_ours():
        result = spoken("slow piano", **options)
    assert (result["audio"] == expected["audio"]).all() and result["sampling_rate"] == expected["sampling_rate"]
    with only_ours():
        assert pipeline("text-to-audio", model=text, tokenizer=tokenizer)("slow piano", **options)["audio"].size
