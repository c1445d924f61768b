"""Tokens and sound against transformers' own classes: the same folder, the same torch seed, fp32 on CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from musicgen_fast import MusicGen
from musicgen_fast.conditioning import ConditioningAttributes

from .checkpoint_writers import tiny, write_audiocraft, write_transformers
from .oracle import transformers_lm as hf

FRAMES = 24
ONE = ["slow piano waltz"]
EQUAL = ["slow piano", "loud piano"]
UNEQUAL = ["slow piano", "80s pop track with bassy drums and a very bright synth", "loud drums"]
KINDS: dict[str, dict[str, Any]] = {
    "text": {"vocab": 64},
    "stereo": {"dim": 96, "heads": 3, "vocab": 512},  # heads of 32
    "melody": {"dim": 96, "vocab": 256},  # heads of 24
    "stereo-melody": {"heads": 1, "vocab": 128},  # one head of 64
}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": False},
    "top_k": {"top_k": 50},
    "top_k above the vocabulary": {"top_k": 2500},
    "temperature": {"top_k": 20, "temperature": 0.6},
    "hot": {"top_k": 0, "temperature": 1.7},
    "plain": {"top_k": 0},
    "guidance": {"guidance": 1.7},
    "strong guidance": {"guidance": 9.0},
    "no guidance": {"guidance": 1.0},
    "greedy without guidance": {"sampling": False, "guidance": 1.0},
}


@dataclass
class Pair:
    """A model as transformers runs it and as this project does, from one folder."""

    kind: str
    theirs: Any
    tokenize: Any
    mine: MusicGen

    def ours(self, texts, frames=FRAMES, *, seed=0, melodies=None, recording=None, prompt=None, **settings):
        """The arguments and results of `transformers_lm.generate`; no sound where tokens are the prompt."""
        self.set_params(frames, **settings)
        torch.manual_seed(seed)
        if prompt is not None:
            asked = [ConditioningAttributes({"description": text}) for text in texts]
            draw = {k: v for k, v in self.mine.generation_params.items() if k != "cfg_coef_beta"}
            return self.mine.lm.generate(prompt, asked, max_gen_len=frames, **draw), None
        run: Any = partial(self.mine.generate, texts)
        if melodies is not None:
            run = partial(self.mine.generate_with_chroma, texts, melodies[:, None], hf.RATE, separate=False)
        elif recording is not None:
            run = partial(self.mine.generate_continuation, recording, hf.RATE, texts)
        wav, tokens = run(return_tokens=True)
        return tokens, wav

    def set_params(self, frames, *, sampling=True, top_k=50, temperature=1.0, guidance=3.0):
        duration = (frames + 0.25) / 50  # a quarter of a frame, so that rounding cannot lose one
        self.mine.set_generation_params(sampling, top_k, 0.0, temperature, duration, guidance)

    def melodies(self, count):
        return torch.stack([hf.tune(b) for b in range(count)]) if "melody" in self.kind else None

    def same(self, texts, frames=FRAMES, *, compat="isolated", **options):
        """Asserts equal tokens and sound; returns the tokens."""
        self.mine.compat = compat
        if "prompt" not in options:
            options.setdefault("melodies", self.melodies(len(texts)))
        expected, sound = hf.generate(self.theirs, self.tokenize, texts, frames, **options)
        tokens, wav = self.ours(texts, frames, **options)
        assert expected.shape == (len(texts), self.mine.lm.num_codebooks, frames)
        assert len(expected.unique()) > 4, "tokens that hardly vary would show nothing"
        assert torch.equal(tokens, expected)
        if wav is not None:
            assert wav.shape == sound.shape == (len(texts), self.mine.audio_channels, frames * hf.HOP)
            assert relative_error(wav, sound) < 1e-5
        return tokens


def relative_error(wav, expected):
    return ((wav - expected).abs().max() / expected.abs().max()).item()


def make_pair(folder, kind, **sizes) -> Pair:
    theirs = hf.build(kind, **sizes)
    hf.save(theirs, folder)
    return Pair(kind, theirs, hf.tokenizer(folder), MusicGen.get_pretrained(folder, device="cpu"))


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp(request.param), request.param, **KINDS[request.param])


@pytest.fixture(scope="module", params=["text", "stereo"])
def cross_pair(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp(request.param), request.param, **KINDS[request.param])


@pytest.fixture(scope="module", params=["melody", "stereo-melody"])
def prefix_pair(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp(request.param), request.param, **KINDS[request.param])


# -- one request -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_request(pair, setting):
    pair.same(ONE, seed=5, **SETTINGS[setting])


def test_global_generator_ends_in_the_same_state(pair):
    options = {"seed": 5, "melodies": pair.melodies(1)}
    hf.generate(pair.theirs, pair.tokenize, ONE, FRAMES, **options)
    expected = torch.get_rng_state()
    pair.ours(ONE, **options)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("frames", [3, 4, 5])
def test_few_frames(pair, frames):
    """Below 3 frames transformers generates without any delays, which no model was trained for."""
    pair.same(ONE, frames, seed=1)


# head sizes 16, 16, 64, 24, 64; the last has a text encoder as wide as the model: no projection between them
@pytest.mark.parametrize("dim,heads,vocab", [(32, 2, 64), (48, 3, 2048), (128, 2, 1024), (96, 4, 256), (64, 1, 512)])
def test_widths_and_vocabularies(tmp_path, dim, heads, vocab):
    text_dim = 64 if dim == 64 else 24
    pair = make_pair(tmp_path, "text", seed=dim, dim=dim, heads=heads, vocab=vocab, text_dim=text_dim)
    assert (pair.mine.lm.transformer.text_proj is None) == (text_dim == dim)
    pair.same(ONE, 48, seed=9, top_k=40)


def test_melody_model_as_wide_as_its_text_encoder(tmp_path):
    make_pair(tmp_path, "melody", dim=64, text_dim=64).same(ONE, seed=4)


# -- batches ---------------------------------------------------------------------------------------------------------


def test_texts_of_equal_lengths(pair):
    assert len(set(map(len, pair.tokenize(EQUAL).input_ids))) == 1
    tokens = pair.same(EQUAL, seed=2)
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("setting", ["greedy", "top_k", "no guidance"])
def test_texts_of_unequal_lengths(cross_pair, setting):
    """transformers masks the padding of cross-attention: each request is what it is alone."""
    tokens = cross_pair.same(UNEQUAL, seed=3, **SETTINGS[setting])
    if setting == "greedy":
        for b, text in enumerate(UNEQUAL):
            assert torch.equal(cross_pair.same([text], sampling=False)[0], tokens[b])


def test_texts_of_unequal_lengths_before_a_melody(prefix_pair):
    """transformers attends to the padding of a prefix, as audiocraft does."""
    tokens = prefix_pair.same(UNEQUAL, compat="audiocraft", seed=3)
    prefix_pair.mine.compat = "isolated"
    isolated, _ = prefix_pair.ours(UNEQUAL, seed=3, melodies=prefix_pair.melodies(3))
    assert torch.equal(isolated[1], tokens[1]), "the longest text is not padded in either"
    assert not torch.equal(isolated[0], tokens[0])


def test_requests_without_a_text(cross_pair):
    cross_pair.same(["slow piano", None, ""], seed=2)
    cross_pair.same(["slow piano", None], seed=2, guidance=1.0)


def test_unconditional(cross_pair):
    """transformers' `get_unconditional_inputs`: one position of zeros that is masked, and no guidance."""
    cross_pair.set_params(FRAMES)
    inputs = cross_pair.theirs.get_unconditional_inputs(num_samples=2)
    torch.manual_seed(6)
    expected = cross_pair.theirs.generate(**inputs, do_sample=True, top_k=50, max_new_tokens=FRAMES + 3)
    torch.manual_seed(6)
    assert relative_error(cross_pair.mine.generate_unconditional(2), expected) < 1e-5


def test_melody_models_without_a_melody(prefix_pair):
    prefix_pair.same(ONE, seed=7, melodies=None)


# -- melodies --------------------------------------------------------------------------------------------------------


def test_melodies_longer_than_a_window(prefix_pair):
    prefix_pair.same(ONE, seed=1, melodies=hf.tune(3, 33.0)[None])


def test_the_melody_is_heard(prefix_pair):
    tokens = [prefix_pair.same(ONE, seed=1, melodies=hf.tune(b)[None]) for b in (0, 1)]
    assert not torch.equal(*tokens)


# -- continuation ----------------------------------------------------------------------------------------------------


def random_prompt(pair, batch=1, frames=7):
    shape = (batch, pair.mine.lm.num_codebooks, frames)
    return torch.randint(0, pair.mine.lm.card, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frames", [1, 7, FRAMES - 1])
def test_tokens_as_prompt(pair, frames):
    prompt = random_prompt(pair, frames=frames)
    assert torch.equal(pair.same(ONE, seed=4, prompt=prompt)[..., :frames], prompt)


def test_prompts_in_a_batch(cross_pair):
    cross_pair.same(UNEQUAL, seed=4, prompt=random_prompt(cross_pair, batch=3), guidance=2.0)
    cross_pair.same(UNEQUAL, seed=4, prompt=random_prompt(cross_pair, batch=3), guidance=1.0)


@pytest.mark.parametrize("samples", [7 * hf.HOP, 5 * hf.HOP + 311])
def test_recording_as_prompt(cross_pair, samples):
    """Through the codec's encoder; the last frame of a recording may be a part of one."""
    channels = cross_pair.mine.audio_channels
    recording = torch.stack([torch.stack([hf.tune(2 * b + c)[:samples] for c in range(channels)]) for b in range(2)])
    tokens = cross_pair.same(EQUAL, seed=8, melodies=None, recording=recording)
    known = tokens[..., : -(-samples // hf.HOP)]
    assert torch.equal(known, cross_pair.mine.compression_model.encode(recording)[0])
    assert len(known.unique()) > 8, "the codec hears something"


# -- the two layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_of_the_same_weights(tmp_path, kind):
    """One set of weights as a folder of transformers and of audiocraft: equal logits, tokens and, within the rounding
    of weight norm, sound."""
    checkpoint = tiny(kind, seed=3)
    folders = [write(tmp_path / write.__name__, checkpoint) for write in (write_transformers, write_audiocraft)]
    pairs = [Pair(kind, None, None, MusicGen.get_pretrained(folder, device="cpu")) for folder in folders]
    columns = torch.randint(0, 65, (2, checkpoint.config.num_codebooks, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(p.mine.lm.transformer(columns) for p in pairs))
    melodies = pairs[0].melodies(len(UNEQUAL))
    (tokens, wav), (others, other) = (p.ours(UNEQUAL, seed=1, melodies=melodies) for p in pairs)
    assert torch.equal(tokens, others)
    assert relative_error(wav, other) < 1e-5


def test_transformers_reads_what_we_write(tmp_path):
    """`checkpoints.write` against the real class: the tokens of what it loaded."""
    import transformers

    folder = write_transformers(tmp_path, tiny("stereo", seed=3))
    theirs = transformers.MusicgenForConditionalGeneration.from_pretrained(folder).eval()
    Pair("stereo", theirs, hf.tokenizer(folder), MusicGen.get_pretrained(folder, device="cpu")).same(UNEQUAL, seed=1)
