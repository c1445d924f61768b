"""`accelerate` on audiocraft's live models: tokens, sound, progress and random numbers of the untouched object."""

from __future__ import annotations

import copy
import random
import warnings
from contextlib import contextmanager

import pytest
import torch

import musicgen_fast

from .oracle import audiocraft_lm as ac

pytestmark = ac.needs_audiocraft

UNEQUAL = ["slow piano waltz", "fast drums and a very long bass line", None]
SECONDS = 0.6  # 15 frames of the debug codec
PARAMS = {
    "defaults": {},
    "greedy": {"use_sampling": False},
    "top_k": {"top_k": 9, "temperature": 0.7},
    "top_p": {"top_p": 0.8},
    "guidance": {"cfg_coef": 1.5},
    "guidance of one": {"cfg_coef": 1.0},
    "two_step_cfg": {"two_step_cfg": True, "cfg_coef": 7.0},
    "double guidance": {"cfg_coef_beta": 5.0},
    "cold": {"temperature": 0.0},
}
KINDS = ("text", "stereo", "melody", "style")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return ac.build_musicgen(kind)


@pytest.fixture(scope="module")
def built():
    return ac.build_musicgen("text")


@pytest.fixture
def text(built):
    return copy.deepcopy(built)


@contextmanager
def only_ours():
    """audiocraft's own loop fails here, and so does any warning."""
    from audiocraft.models.lm import LMModel

    def theirs(*args, **kwargs):
        raise AssertionError("audiocraft's own loop ran")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(LMModel, "_sample_next_token", theirs)
        warnings.simplefilter("error")
        yield


def run(call, seed=4):
    """(tokens, sound, state of the generator afterwards) of `call(return_tokens=True)`."""
    torch.manual_seed(seed)
    random.seed(seed)
    wav, tokens = call(return_tokens=True)
    return tokens, wav, torch.get_rng_state()


def same(model, call):
    expected = run(call)
    musicgen_fast.accelerate(model)
    try:
        with only_ours():
            result = run(call)
    finally:
        musicgen_fast.unaccelerate(model)
    assert expected[0].unique().numel() > 4
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    return result[0]


def set_params(model, **options):
    model.set_generation_params(duration=SECONDS, **{"two_step_cfg": False, **options})


@pytest.mark.parametrize("name", PARAMS)
def test_parameters(model, name):
    set_params(model, **PARAMS[name])
    tokens = same(model, lambda **o: model.generate(UNEQUAL, **o))
    assert tokens.shape == (3, model.lm.n_q, 15)


def test_parameters_are_honoured(text):
    made = {}
    for name, options in PARAMS.items():
        set_params(text, **options)
        made[name] = str(same(text, lambda **o: text.generate(UNEQUAL[:2], **o)).tolist())
    # cold is greedy; audiocraft mixes two steps with the model's own coefficient, the default
    assert made["cold"] == made["greedy"] and made["two_step_cfg"] == made["defaults"]
    assert len(set(made.values())) == len(PARAMS) - 2


def test_unconditional(model):
    set_params(model)
    same(model, lambda **o: model.generate_unconditional(2, **o))


def test_continuation(model):
    set_params(model)
    rate, channels = model.sample_rate, model.audio_channels
    prompt = torch.stack([ac.waveform(b, rate // 5).expand(channels, -1) for b in range(3)])
    tokens = same(model, lambda **o: model.generate_continuation(prompt, rate, UNEQUAL, **o))
    assert torch.equal(tokens[..., :5], model.compression_model.encode(prompt)[0])
    same(model, lambda **o: model.generate_continuation(prompt, rate, **o))


def test_chroma(kind, model):
    if kind not in ("melody", "style"):
        with pytest.raises(RuntimeError):
            musicgen_fast.accelerate(model).generate_with_chroma(["a"], ac.waveform(0)[None], 32000)
        musicgen_fast.unaccelerate(model)
        return
    set_params(model)
    melodies = [ac.waveform(0), ac.waveform(1, 40000), None]
    tokens = same(model, lambda **o: model.generate_with_chroma(UNEQUAL, melodies, 32000, **o))
    other = same(model, lambda **o: model.generate_with_chroma(UNEQUAL, [None, *melodies[:2]], 32000, **o))
    assert not torch.equal(tokens, other)


def test_windows(text):
    model = text
    model.max_duration = 0.8
    model.set_generation_params(duration=1.6, extend_stride=0.4)
    tokens = same(model, lambda **o: model.generate(UNEQUAL, **o))
    assert tokens.shape[2] == 40


def test_progress(text, capsys):
    set_params(text)
    steps: tuple[list, list] = ([], [])
    for calls, prepare in zip(steps, (musicgen_fast.unaccelerate, musicgen_fast.accelerate), strict=True):
        prepare(text)
        text.set_custom_progress_callback(lambda *done, calls=calls: calls.append(done))
        text.generate(["slow piano"], progress=True)
    assert steps[0] == steps[1] and steps[1][-1] == (18, 18)
    text.set_custom_progress_callback(None)
    text.generate(["slow piano"], progress=True)
    assert "18 /     18" in capsys.readouterr().out


def test_audiogen(text):
    from audiocraft.models.audiogen import AudioGen

    model = AudioGen("oracle", text.compression_model, text.lm, max_duration=10)
    model.set_generation_params(duration=SECONDS, top_k=40)
    same(model, lambda **o: model.generate(UNEQUAL, **o))


@pytest.mark.parametrize("name", ["parallel", "unroll", "coarse_first", "musiclm", "delay"])
def test_patterns(text, name):
    options = {"flatten_first": 2, "empty_initial": 1} if name == "delay" else {}
    options = {"flattening": [0, 1, 1, 1], "delays": [0, 3, 3, 3]} if name == "unroll" else options
    text.lm.pattern_provider = ac.pattern_provider(name, 4, **options)
    set_params(text)
    same(text, lambda **o: text.generate(UNEQUAL, **o))


def test_the_language_model_alone():
    """Everything below `MusicGen` that calls the language model: no conditions, prompts, remove_prompts."""
    model = ac.build_musicgen("melody")
    lm = model.lm
    prompt = torch.randint(0, lm.card, (2, 4, 3), generator=torch.Generator().manual_seed(0))
    calls = [
        {"num_samples": 2},
        {"prompt": prompt, "remove_prompts": True, "use_sampling": False},
        {"prompt": prompt, "conditions": ac.conditions(UNEQUAL[:2], "melody"), "cfg_coef": 2.0, "check": True},
    ]
    for options in calls:
        torch.manual_seed(0)
        expected = lm.generate(max_gen_len=9, **options)
        musicgen_fast.accelerate(model)
        torch.manual_seed(0)
        with only_ours():
            assert torch.equal(lm.generate(max_gen_len=9, **options), expected)
        musicgen_fast.unaccelerate(model)


def test_what_audiocraft_refuses(text):
    musicgen_fast.accelerate(text)
    with pytest.raises(AssertionError):
        text.lm.generate(torch.zeros(1, 4, 9, dtype=torch.long), max_gen_len=9)
    with pytest.raises(AssertionError):  # a text model needs conditions, be they null
        text.lm.generate(num_samples=1, max_gen_len=9)
    with pytest.raises(TypeError, match="nonsense"):
        text.lm.generate(nonsense=1)
    text.lm.train()
    with pytest.raises(AssertionError, match="training"):
        text.generate(["a"])


def test_unsupported_fusion_falls_back(text):
    set_params(text)
    expected = run(lambda **o: text.generate(UNEQUAL, **o))
    musicgen_fast.accelerate(text)
    text.lm.fuser.fuse2cond["sum"] = ["genre"]
    with pytest.warns(UserWarning, match="sum") as seen:
        result = run(lambda **o: text.generate(UNEQUAL, **o))
    assert torch.equal(result[0], expected[0])
    assert len([w for w in seen if "musicgen_fast" in str(w.message)]) == 1


@pytest.mark.parametrize("change", ["rope", "activation", "bias"])
def test_other_architectures_are_refused(text, change):
    if change == "rope":
        text.lm.transformer.positional_embedding = "rope"
    elif change == "activation":
        text.lm.transformer.layers[1].activation = torch.nn.functional.relu
    else:
        text.lm.linears[0].bias = torch.nn.Parameter(torch.zeros(400))
    with pytest.raises(ValueError, match="does not compute"):
        musicgen_fast.accelerate(text)
    assert "generate" not in vars(text.lm) and "musicgen_fast" not in vars(text)


def test_memory(text):
    """q, k, v are stacked in both: only the embeddings and heads are copied."""
    held = musicgen_fast.accelerate(text).musicgen_fast
    tables = [*text.lm.emb.parameters(), *text.lm.linears.parameters()]
    assert held.extra_bytes == sum(p.nbytes for p in tables)
    fused = text.lm.transformer.layers[0].cross_attention.in_proj_weight
    ours = held.lm.transformer.layers[0].cross_kv.weight
    assert ours.data_ptr() == fused[text.lm.dim :].data_ptr()


def test_unaccelerate_and_copies(text):
    set_params(text, use_sampling=False)
    before, inside = dict(vars(text)), dict(vars(text.lm))
    expected = text.generate(["a b c"])
    assert musicgen_fast.accelerate(musicgen_fast.accelerate(text)) is text
    twin = copy.deepcopy(text)
    with torch.no_grad():
        twin.lm.linears[0].weight.mul_(-1)
    with only_ours():
        assert torch.equal(text.generate(["a b c"]), expected)
        assert not torch.equal(twin.generate(["a b c"]), expected)
    assert musicgen_fast.unaccelerate(text) is text
    assert dict(vars(text)) == before and dict(vars(text.lm)) == inside
    assert text.lm.generate.__func__ is type(text.lm).generate
    with only_ours():
        assert not torch.equal(twin.generate(["a b c"]), expected), "the copy is still accelerated"


def test_weights_that_change(text):
    set_params(text)
    musicgen_fast.accelerate(text)
    first = run(lambda **o: text.generate(UNEQUAL, **o))[0]
    text.lm.load_state_dict(ac.build_lm("text", seed=5, card=400).state_dict())
    with only_ours():
        second = run(lambda **o: text.generate(UNEQUAL, **o))[0]
    musicgen_fast.unaccelerate(text)
    assert torch.equal(run(lambda **o: text.generate(UNEQUAL, **o))[0], second)
    assert not torch.equal(first, second)


def test_another_language_model_in_its_place(text):
    set_params(text)
    musicgen_fast.accelerate(text)
    text.lm = ac.build_lm("text", seed=5, card=400)
    expected = run(lambda **o: text.generate(UNEQUAL, **o))
    musicgen_fast.accelerate(text)
    with only_ours():
        assert torch.equal(run(lambda **o: text.generate(UNEQUAL, **o))[0], expected[0])
