"""The public classes: audiocraft's interface, and a clear exception for everything that cannot be done."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest
import torch

from musicgen_fast import AudioGen, CheckpointError, MusicGen
from musicgen_fast.checkpoints import expected_shapes
from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.conditioning import ConditioningAttributes
from musicgen_fast.config import CodecConfig, GenerationParams, named_config

from .checkpoint_writers import tiny, write_audiocraft
from .packed_tools import scale_heads

RATE = 32000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("text", "stereo", "melody"):
        write_transformers_folder(root / kind, checkpoint=tiny(kind))
    return root


@pytest.fixture(scope="module")
def loaded(folders):
    models = {kind: MusicGen.get_pretrained(folders / kind, device="cpu") for kind in ("text", "stereo", "melody")}
    for model in models.values():
        scale_heads(model.lm, 30)
    return models


@pytest.fixture
def model(loaded):
    loaded["text"].set_generation_params(duration=1)
    loaded["text"].set_custom_progress_callback()
    return loaded["text"]


def test_audiocraft_script_with_its_imports_renamed(folders, tmp_path):
    from musicgen_fast.data.audio import audio_read, audio_write
    from musicgen_fast.models import MusicGen

    model = MusicGen.get_pretrained(str(folders / "text"))
    model.set_generation_params(duration=0.5)
    wav = model.generate(["happy rock", "energetic EDM"])
    for index, one in enumerate(wav):
        path = audio_write(tmp_path / str(index), one.cpu(), model.sample_rate, strategy="loudness")
        assert audio_read(path)[0].shape == (1, 16000)


def test_attributes_that_scripts_read(loaded):
    model = loaded["stereo"]
    assert (model.sample_rate, model.frame_rate, model.audio_channels) == (RATE, 50, 2)
    assert model.max_duration == 30 and model.lm.num_codebooks == 8 and model.lm.special_token_id == model.lm.card
    assert model.compression_model.num_codebooks == 8 and model.device.type == "cpu"
    assert model.cfg.dataset.segment_duration == 30 and next(model.lm.parameters()).device.type == "cpu"
    assert "self_wav" not in model.lm.condition_provider.conditioners
    assert "self_wav" in loaded["melody"].lm.condition_provider.conditioners


def test_unnamed_parameters_return_to_their_defaults(model):
    model.set_generation_params(top_k=5, temperature=0.5, cfg_coef=1.0, duration=12, extend_stride=7)
    assert model.generation_params["top_k"] == 5 and model.extend_stride == 7
    model.set_generation_params(duration=8)
    assert model.generation_params == {
        "use_sampling": True, "temp": 1.0, "top_k": 250, "top_p": 0.0, "cfg_coef": 3.0, "two_step_cfg": False,
        "cfg_coef_beta": None,
    }  # fmt: skip
    assert model.duration == 8 and model.extend_stride == 18


@pytest.mark.parametrize("kind,channels,codebooks", [("text", 1, 4), ("stereo", 2, 8), ("melody", 1, 4)])
def test_shapes(loaded, kind, channels, codebooks):
    model = loaded[kind]
    model.set_generation_params(duration=0.5)
    wav, tokens = model.generate(["calm", None], return_tokens=True, seed=0)
    assert wav.shape == (2, channels, 16000) and wav.dtype == torch.float32
    assert tokens.shape == (2, codebooks, 25) and tokens.dtype == torch.int64
    torch.testing.assert_close(model.generate_audio(tokens), wav)
    wav = model.generate_unconditional(3)
    assert wav.shape == (3, channels, 16000)


def test_continuation_starts_with_the_prompt(loaded):
    for kind in ("text", "stereo"):
        model = loaded[kind]
        model.set_generation_params(duration=1)
        prompt = torch.randn(1, 2, 11025) * 0.1  # stereo, another rate
        wav, tokens = model.generate_continuation(prompt, 22050, return_tokens=True, seed=1)
        assert wav.shape == (1, model.audio_channels, RATE) and tokens.shape[-1] == 50
        from musicgen_fast.audio import convert_audio

        codes, _ = model.compression_model.encode(convert_audio(prompt, 22050, RATE, model.audio_channels))
        assert torch.equal(tokens[:, :, :25], codes)
        assert model.generate_continuation(prompt[0], 22050, ["calm"]).shape == wav.shape


def test_melody_inputs(loaded):
    model = loaded["melody"]
    model.set_generation_params(duration=0.4)
    tone = torch.sin(torch.arange(RATE * 2) * (6.2832 * 440 / RATE))[None]  # A, not the C of a null melody
    forms = (tone, tone[None], [tone, None], tone[:, :1])  # a single sample is audiocraft's sign for none
    texts = (["calm"], ["calm"], ["calm", "fast"], ["calm"])
    for melody, descriptions in zip(forms, texts, strict=True):
        wav = model.generate_with_chroma(descriptions, melody, RATE, separate=False, seed=0)
        assert wav.shape == (len(descriptions), 1, 12800)
    with_melody = model.generate_with_chroma(["calm"], tone, RATE, separate=False, seed=0, return_tokens=True)[1]
    assert not torch.equal(with_melody, model.generate(["calm"], seed=0, return_tokens=True)[1])


def test_a_single_sample_is_no_melody_in_any_number_of_windows(loaded, monkeypatch):
    model = loaded["melody"]
    monkeypatch.setattr(model, "max_duration", 0.4)
    for duration in (0.3, 1.0):
        model.set_generation_params(duration=duration)
        expected = model.generate(["calm"], seed=0)
        for rate in (RATE, 48000):  # at 48 kHz nothing is left of it
            one = torch.ones(1, 1)
            assert torch.equal(model.generate_with_chroma(["calm"], one, rate, separate=False, seed=0), expected)


@pytest.mark.parametrize("compat,seed,shifts", [("isolated", None, 2), ("audiocraft", None, 1), ("audiocraft", 7, 2)])
def test_the_shift_of_demucs(loaded, monkeypatch, compat, seed, shifts):
    """audiocraft separates a batch in one call, with one random shift for all of it; here each request has its own."""
    import musicgen_fast.conditioning.melody as melody

    drawn = []

    def separate(wav, sample_rate, device, seed, demucs):
        drawn.append((random if seed is None else random.Random(seed)).randint(0, 10**9))
        return wav

    monkeypatch.setattr(melody, "load_demucs", lambda device: object())
    monkeypatch.setattr(melody, "separate_stems", separate)
    model = loaded["melody"]
    monkeypatch.setattr(model.lm, "_compat", compat)
    model.set_generation_params(duration=0.1)
    model.generate_with_chroma(["a", "b"], torch.randn(2, 1, 9000), RATE, seed=seed)
    assert len(drawn) == 2 and len(set(drawn)) == shifts


def test_null_rows_run_only_where_they_matter(loaded):
    for model in loaded.values():
        asked, nothing = [ConditioningAttributes(text={"description": t}) for t in ("calm", None)]
        for attributes, params, rows in (
            ([asked], GenerationParams(), 2),
            ([asked], GenerationParams(cfg_coef=1.0), 1),
            ([nothing], GenerationParams(), 1),
            ([asked, nothing], GenerationParams(), 4),
        ):
            assert model.lm.encode(attributes, params).num_rows == rows


def test_a_codec_with_more_codebooks_than_the_model(tmp_path):
    """The released codec can have more than a model uses: prompts are encoded with the model's number."""
    codec = CodecConfig(num_filters=4, dimension=16, lstm_layers=1, num_codebooks=6, codebook_size=64)
    folder = write_audiocraft(tmp_path / "m", tiny("text", codec_config=codec))
    model = MusicGen.get_pretrained(folder, device="cpu")
    model.set_generation_params(duration=0.4)
    assert model.generate_continuation(torch.randn(1, 1, 5000) * 0.1, RATE, seed=0).shape == (1, 1, 12800)


def test_separation_without_demucs_names_the_extra(loaded, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "demucs.pretrained", None)
    monkeypatch.setattr(loaded["melody"].lm.conditioner, "_demucs", None)
    with pytest.raises(ImportError, match=r"musicgen-fast\[melody\].*separate=False"):
        loaded["melody"].generate_with_chroma(["calm"], torch.ones(1, 1000) / 2, RATE)


def test_seeds(model):
    a = model.generate(["calm", "fast"], seed=5, return_tokens=True)[1]
    assert torch.equal(a, model.generate(["calm", "fast"], seed=[5, 6], return_tokens=True)[1])
    assert not torch.equal(a, model.generate(["calm", "fast"], seed=0, return_tokens=True)[1])
    before = torch.get_rng_state()
    model.generate(["calm"], seed=2**64 - 1)
    assert torch.equal(before, torch.get_rng_state()), "a seeded run leaves the global generator alone"
    numbers = np.int64(5)
    assert torch.equal(a, model.generate(["calm", "fast"], seed=numbers, return_tokens=True)[1])
    for seed, error in ((1.5, TypeError), ("7", TypeError), (True, TypeError), ([1], ValueError), (2**64, ValueError)):
        with pytest.raises(error, match="seed"):
            model.generate(["calm", "fast"], seed=seed)


def test_progress_callback_only_when_asked(model):
    calls = []
    model.set_custom_progress_callback(lambda done, total: calls.append((done, total)))
    model.generate(["calm"])
    assert not calls
    model.generate(["calm"], progress=True)
    assert calls[-1] == (53, 53)


def test_cancelling_from_the_callback_leaves_the_model_usable(model):
    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    expected = model.generate(["calm"], seed=1)
    model.set_custom_progress_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        model.generate(["calm"], progress=True, seed=1)
    assert torch.equal(model.generate(["calm"], seed=1), expected)


@pytest.mark.parametrize("descriptions,error,message", [
    ("a single text", TypeError, r"list of texts.*\['a single text'\]"),
    ([], ValueError, "empty"),
    (7, TypeError, "list of texts"),
    (["calm", 3], TypeError, "texts or None"),
])  # fmt: skip
def test_descriptions_that_cannot_be(model, descriptions, error, message):
    with pytest.raises(error, match=message):
        model.generate(descriptions)


BAD = [{name: value} for name in ("temperature", "top_p", "cfg_coef", "cfg_coef_beta", "duration", "top_k")
       for value in (math.nan, math.inf)]  # fmt: skip
BAD += [{"duration": 0}, {"duration": -3}, {"duration": 1e9}, {"duration": "30"}, {"top_p": 1.5}, {"top_k": 2.5}]
BAD += [{"extend_stride": 30}, {"extend_stride": 0}, {"extend_stride": math.nan}]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_parameters_that_cannot_be(model, change):
    before = (model.duration, model.extend_stride, dict(model.generation_params))
    with pytest.raises((TypeError, ValueError), match=next(iter(change))):
        model.set_generation_params(**change)
    assert before == (model.duration, model.extend_stride, dict(model.generation_params)), "half set"


def test_parameters_set_by_hand_are_checked_too(model):
    model.duration = math.nan
    with pytest.raises(ValueError, match="duration"):
        model.generate(["calm"])
    model.duration = 0.001
    with pytest.raises(ValueError, match="shorter than one frame"):
        model.generate(["calm"])
    model.set_generation_params(duration=1)
    model.generation_params["temperture"] = 1
    with pytest.raises(ValueError, match="temperture"):
        model.generate(["calm"])


@pytest.mark.parametrize("change", [{"top_k": -5}, {"top_p": -0.5}, {"temperature": -1.0}, {"top_k": 10**6}])
def test_negative_means_off_or_greedy(model, change):
    model.set_generation_params(duration=0.2, **change)
    assert model.generate(["calm"]).shape == (1, 1, 6400)


def test_prompts_that_cannot_be(model):
    second = torch.zeros(1, 1, RATE)
    for prompt, message in (
        (second, "as long as"),
        (second[..., :0], "no samples"),
        (torch.full((1, 1, 100), math.nan), "NaN"),
        (torch.zeros(100), r"\[B, C, n\]"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), "floats"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate_continuation(prompt, RATE)
    with pytest.raises(ValueError, match="2 descriptions"):
        model.generate_continuation(second[..., :100], RATE, ["a", "b"])
    with pytest.raises(ValueError, match="sample rate"):
        model.generate_continuation(second[..., :100], 0)
    with pytest.raises(TypeError, match="torch tensor"):
        model.generate_continuation([0.0], RATE)


def test_melodies_that_cannot_be(loaded, model):
    melody = torch.zeros(1, 1000)
    with pytest.raises(RuntimeError, match="melody or style model"):
        model.generate_with_chroma(["calm"], melody, RATE)
    chroma = loaded["melody"]
    for bad, message in (
        ([melody, melody], "2 melodies"),
        (torch.zeros(1000), r"\[B, C, n\]"),
        ([torch.zeros(1000)], r"\[C, n\]"),
        ([melody * math.nan], "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            chroma.generate_with_chroma(["calm"], bad, RATE, separate=False)
    with pytest.raises(ValueError, match="no style conditioner"):
        chroma.set_style_conditioner_params()


def test_tokens_that_cannot_be(model):
    for prompt, message in (
        (torch.zeros(1, 3, 5, dtype=torch.int64), r"\[B, 4, frames\]"),
        (torch.zeros(1, 4, 5), "integers"),
        (torch.full((1, 4, 5), 64), r"0\.\.63"),
        (torch.zeros(1, 4, 20, dtype=torch.int64), "prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            model.lm.generate(prompt, max_gen_len=20)
    with pytest.raises(ValueError, match="numbers of requests"):
        model.lm.generate(None, [ConditioningAttributes()], num_samples=2)
    assert model.lm.generate(num_samples=2, max_gen_len=4).shape == (2, 4, 4)
    prompt = torch.zeros(1, 4, 5, dtype=torch.int64)
    assert model.lm.generate(prompt, max_gen_len=9, remove_prompts=True).shape == (1, 4, 4)


def test_choices_that_cannot_be(folders, model):
    with pytest.raises(ValueError, match="precision 'int3'.*float32"):
        MusicGen.get_pretrained(folders / "text", precision="int3")
    with pytest.raises(ValueError, match="device"):
        MusicGen.get_pretrained(folders / "text", device="toaster")
    with pytest.raises(ValueError, match="compat"):
        model.compat = "sloppy"
    with pytest.raises(CheckpointError, match="no-such-model"):
        MusicGen.get_pretrained("someone/no-such-model")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            MusicGen.get_pretrained(folders / "text", device="cuda")


def test_nan_weights_are_named(folders):
    model = MusicGen.get_pretrained(folders / "text", device="cpu")
    model.lm.transformer.norm.bias.data.fill_(math.nan)
    model.set_generation_params(duration=0.2)
    with pytest.raises(ValueError, match="NaN"):
        model.generate(["calm"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precisions_run_and_stay_near(folders, precision):
    exact = MusicGen.get_pretrained(folders / "text", device="cpu")
    half = MusicGen.get_pretrained(folders / "text", device="cpu", precision=precision)
    tokens = torch.randint(0, 64, (2, 4, 20), generator=torch.Generator().manual_seed(0))
    expected, got = (m.lm.transformer(tokens) for m in (exact, half))
    assert got.dtype == half.lm.transformer.dtype
    assert (got.float() - expected).norm() / expected.norm() < 0.02
    half.set_generation_params(duration=0.4)
    assert half.generate(["calm"], seed=0).shape == (1, 1, 12800)


@pytest.mark.parametrize("options", ["", "-stereo", "-melody", "-stereo-melody"])
def test_random_names_go_through_the_same_path(options, monkeypatch):
    import musicgen_fast.config as config

    monkeypatch.setitem(config._SIZES, "small", (64, 2, 4))  # the released widths are for benchmarks
    model = MusicGen.get_pretrained("random:small" + options, device="cpu")
    model.set_generation_params(duration=0.1)
    again = MusicGen.get_pretrained("random:small" + options, device="cpu")
    again.set_generation_params(duration=0.1)
    wav = model.generate(["calm"], seed=0)
    assert wav.shape == (1, 2 if "stereo" in options else 1, 3200)
    assert torch.equal(wav, again.generate(["calm"], seed=0))


@pytest.mark.parametrize(
    "size,millions",
    [("small", 420.4), ("medium", 1838.7), ("large", 3257.0), ("small-stereo", 437.2), ("medium-stereo", 1864.0),
     ("large-stereo", 3290.6), ("medium-melody", 1385.6), ("large-melody", 2451.5), ("medium-stereo-melody", 1410.8)],
)  # fmt: skip
def test_random_names_have_the_released_sizes(size, millions):
    """Parameters of the published language models."""
    shapes = expected_shapes(named_config(size))
    assert sum(math.prod(shape) for _, shape in shapes) / 1e6 == pytest.approx(millions, abs=0.3)


def test_short_windows_can_be_loaded(tmp_path):
    """audiocraft cannot construct a model whose window is not longer than its default stride."""
    folder = write_transformers_folder(tmp_path / "m", checkpoint=tiny("text", max_duration=2.0))
    model = MusicGen.get_pretrained(folder, device="cpu")
    assert model.max_duration == 2 and model.extend_stride == pytest.approx(1.2)
    model.set_generation_params(duration=3.0)
    assert model.generate(["calm"], seed=0).shape == (1, 1, 96000)


def test_audiogen(tmp_path):
    folder = write_audiocraft(tmp_path / "a", tiny("text", family="audiogen", max_duration=10.0))
    model = AudioGen.get_pretrained(folder, device="cpu")
    assert (model.duration, model.extend_stride) == (5, 2)
    model.set_generation_params(duration=0.4)
    assert model.generate_unconditional(1, seed=0).shape == (1, 1, int(0.4 * model.sample_rate))
    barks = model.generate(["a dog barks", "rain"], seed=0)
    assert barks.shape[0] == 2 and not torch.equal(*barks)
    model.set_generation_params()
    assert (model.duration, model.extend_stride) == (10, 2)


def test_short_names_warn_like_audiocraft():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(CheckpointError, match="facebook/musicgen-small"):
            MusicGen.get_pretrained("small")
    assert any("facebook/musicgen-small" in str(w.message) for w in caught)
