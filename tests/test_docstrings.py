"""Public docstrings say what a caller needs: every parameter, shapes, units, errors, and where a behaviour comes from.

The rules are in docstring_rules.py. `FAULTY` holds each fault at least once, so that every rule is seen to fail.
"""

from __future__ import annotations

import re

import pytest

from .docstring_rules import (
    PACKAGE,
    ROOT,
    Definition,
    Item,
    Module,
    find,
    has_source,
    module,
    problems,
    public_items,
    with_members,
)

# Objects whose docstring, or their module's, names where the behaviour comes from.
SOURCED = {
    "audio": ("audio_info", "audio_read", "audio_write", "convert_audio", "convert_audio_channels"),
    "audiogen": ("AudioGen",),
    "checkpoints": ("load_checkpoint",),
    "codec": ("EnCodec", "InterleaveStereo"),
    "conditioning": ("ConditioningAttributes", "Conditioner", "WavCondition"),
    "conditioning.melody": ("ChromaExtractor", "melody_chroma"),
    "conditioning.style": ("StyleConditioner", "excerpt_start"),
    "conditioning.text": ("TextEncoder",),
    "config": ("GenerationParams",),
    "evaluation.adherence": ("Adherence", "Analyser", "measure", "score"),
    "evaluation.distance": ("codec_figures", "log_mel_distance", "mu_law", "si_snr", "spectral_convergence"),
    "evaluation.features": ("brightness", "clip_features", "level", "spectral_shape"),
    "evaluation.frechet": ("basic_pitch_frechet_distance", "embedding_distance", "frechet_distance"),
    "evaluation.likelihood": ("negative_log_likelihood", "unigram_cross_entropy"),
    "evaluation.rhythm": ("drums", "onset_envelope", "onsets", "tempo"),
    "evaluation.tonality": ("chroma", "key"),
    "live": ("accelerate",),
    "lm": ("LMModel",),
    "loudness": ("k_weighting", "loudness", "normalize_audio", "normalize_loudness"),
    "musicgen": ("MusicGen",),
    "pattern": ("Pattern", "build_pattern"),
    "sampling": ("filtered_probs", "sample"),
    "windows": ("plan_windows",),
}


@pytest.mark.parametrize("home", sorted({name.rpartition(".")[0].partition(".")[0] for name in public_items()}))
def test_docstrings_say_what_a_caller_needs(home: str) -> None:
    wrong = [
        f"{name}: {rule}: {what}"
        for name, item in public_items().items()
        if name.partition(".")[0] == home
        for rule, what in problems(item)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(("home", "name"), [(home, name) for home, names in SOURCED.items() for name in names])
def test_the_source_of_a_behaviour_is_named(home: str, name: str) -> None:
    where = module(f"{PACKAGE}.{home}")
    item = find(where, name) if where is not None else None
    assert item is not None, f"{home}.{name} is gone: take it from SOURCED"
    assert has_source(item), f"{home}.{name} or its module names neither a reference implementation nor a paper"


def test_what_is_public() -> None:
    """The search finds what there is: through lazy packages, other names and base classes."""
    items = public_items()
    assert {"musicgen.MusicGen", "genmodel.GenerationModel.generate", "codec.EnCodec.encode", "sampling.sample"} <= set(
        items
    )
    assert {"render.run.render", "lanes.Decoder.step", "kernels.linear.norm_linear", "live.accelerate"} <= set(items)
    assert len(items) > 250


def test_the_reference_names_the_front_door() -> None:
    """docs/reference.md has a section for everything that `musicgen_fast` and `musicgen_fast.models` export."""
    page = re.findall(r"^::: ([\w.]+)", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), re.M)
    for home in (PACKAGE, f"{PACKAGE}.models"):
        where = module(home)
        assert where is not None
        for name in where.exported():
            item = find(where, name)
            assert item is not None and f"{PACKAGE}.{item.name}" in page, f"{home}.{name} is not in docs/reference.md"


# -- the rules themselves ---------------------------------------------------------------------------------------------

SOUND = '''
class Player:
    """Plays wav [C, T] of `sample_rate` Hz, `loud` or not."""

    def __init__(self, sample_rate: int, loud: bool) -> None:
        self.rate = sample_rate

    def play(self, wav: Tensor, seconds: float) -> Tensor:
        """The first `seconds` of wav [C, T].

        ValueError where there are none.
        """
        if seconds <= 0:
            raise ValueError("none")
        return wav

    def again(self, wav: Tensor, seconds: float) -> Tensor:
        """Once more, any shape; see `play`."""
        return _checked(wav)

@dataclass
class Take:
    """A take: `rate` in Hz."""

    rate: int
    duration: float  # seconds

def _checked(wav):
    if wav is None:
        raise ValueError("nothing to play")
    return wav
'''

# What is done to SOUND -> the rule that must notice it, and where.
FAULTY = {
    ('    """Once more, any shape; see `play`."""\n', ""): ("Player.again", "docstring"),
    ('    """A take: `rate` in Hz."""\n', ""): ("Take", "docstring"),
    ("The first `seconds` of wav [C, T].", "The first part of wav [C, T], frames."): ("Player.play", "parameters"),
    ("of `sample_rate` Hz, `loud` or not", "of `sample_rate` Hz"): ("Player", "parameters"),
    ("of wav [C, T].\n\n", "of wav.\n\n"): ("Player.play", "shapes"),
    ("Once more, any shape;", "Once more;"): ("Player.again", "shapes"),
    ("of wav [C, T].\n\n", "of wav, in [0, 1).\n\n"): ("Player.play", "shapes"),
    ("        ValueError where there are none.\n", ""): ("Player.again", "errors"),
    ('raise ValueError("none")', 'raise TypeError("none")'): ("Player.play", "errors"),
    ('raise ValueError("nothing to play")', 'raise TypeError("nothing")'): ("Player.again", "errors"),
    (
        'seconds: float) -> Tensor:\n        """The first `seconds`',
        'late: float) -> Tensor:\n        """The `late_s`',
    ): (
        "Player.play",
        "parameters",
    ),
    ("of `sample_rate` Hz", "of a `sample_rate`"): ("Player", "units"),
    ("  # seconds", ""): ("Take", "fields"),
    ("  # seconds", "  # of the take"): ("Take", "units"),
}


def faults(source: str) -> set[tuple[str, str]]:
    """(name, rule) of all that is wrong in a source."""
    where = Module.parse("made_up", source)
    items = [member for name in where.exported() for member in with_members(Item(where, _top(where, name)))]
    return {(item.name.removeprefix("made_up."), rule) for item in items for rule, _ in problems(item)}


def _top(where: Module, name: str) -> Definition:
    found = find(where, name)
    assert found is not None
    return found.node


def test_nothing_is_wrong_with_what_is_sound() -> None:
    assert faults(SOUND) == set()


@pytest.mark.parametrize(("old", "new"), FAULTY)
def test_every_fault_is_found(old: str, new: str) -> None:
    assert SOUND.count(old) == 1
    assert FAULTY[old, new] in faults(SOUND.replace(old, new))


@pytest.mark.parametrize(
    ("doc", "known"),
    [
        ("As audiocraft `audio_read`.", True),
        ("The loudness of ITU-R BS.1770.", True),
        ("Philox (Salmon et al. 2011).", True),
        ("Profiles: Krumhansl and Kessler 1982.", True),
        ("Made in 44100 steps.", False),
        ("Faster than all others.", False),
    ],
)
def test_what_counts_as_a_source(doc: str, known: bool) -> None:
    where = Module.parse("made_up", f'def f():\n    """{doc}"""\n')
    assert has_source(Item(where, _top(where, "f"))) == known
