"""Captions in plain words for the songs of synth.py, and what such a caption demands of a song.

    a slow sad tune in minor with bells and no drums, notes 1 d5 - a5 c6 2 - f5 - - 3 g5 ...

One lexicon serves both directions: `caption` draws from it, `demands` reads it back, so that a prompt can be scored
against the song that a model made of it. The melody is spelled in its steps of 160 ms, in numbered groups of four; "-"
is a step on which no note begins. Lower case, no punctuation but commas, about 100 words in all: a sentencepiece model
of some 200 pieces covers them. It does not know audio.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from examples.demo_model.synth import SCALES, STEP, VALUES, Labels, Song

# Words for one label each. Of drums only the kind is here; see _SHARED.
_LEXICON: dict[str, dict[str, tuple[str, ...]]] = {
    "tempo": {
        "slow": ("slow", "unhurried"),
        "medium": ("medium tempo", "moderate"),
        "fast": ("fast", "quick"),
    },
    "mode": {
        "major": ("in major", "in a major key"),
        "minor": ("in minor", "in a minor key"),
    },
    "instrument": {
        "chip": ("a square wave", "a chip lead", "a retro synth"),
        "bell": ("bells", "a glockenspiel"),
        "flute": ("a flute", "a recorder"),
    },
    "brightness": {
        "dark": ("dark", "muffled", "mellow"),
        "bright": ("bright", "crisp", "shiny"),
    },
    "drums": {
        "off": ("no drums", "no percussion"),
        "rock": ("rock drums", "a rock beat"),
        "dance": ("dance drums", "a dance beat", "four on the floor drums"),
    },
    "density": {
        "sparse": ("sparse", "simple"),
        "dense": ("dense", "busy"),
    },
    "loudness": {
        "soft": ("soft", "quiet"),
        "loud": ("loud", "strong"),
    },
}
_MOOD_WORDS: dict[str, tuple[str, ...]] = {
    "calm": ("calm", "peaceful"),
    "happy": ("happy", "cheerful"),
    "playful": ("playful", "joyful"),
    "sad": ("sad", "lonely"),
    "mysterious": ("mysterious", "serious"),
    "tense": ("tense", "urgent"),
}
_SHARED = ("drums", "a beat")  # drums of any kind
_NOUNS = ("tune", "melody", "song", "loop", "piece", "chiptune", "game tune")
GROUP = 4  # steps of the melody behind one number
GROUPS = 16  # that a caption spells at most: 64 steps, 10.24 s
_ADJECTIVES = ("tempo", "mood", "brightness", "loudness", "density")

Demands = dict[str, frozenset[str]]


def caption(song: Song, seed: int, start: int = 0) -> str:
    """A caption that says only what is true of the song from frame `start` on. Pure.

    Three of ten name every label, the others about half of them; eight of ten spell the melody too, of a song that has
    one, and most of these spell all GROUPS.
    """
    rng = Random(f"caption {seed}")
    said = _choose(song.labels, rng)
    if rng.random() < 0.4:
        phrases = list(said.values()) + rng.sample(_NOUNS, rng.randrange(2))
        rng.shuffle(phrases)
        text = ", ".join(phrases)
    else:
        text = _sentence(said, rng)
    if rng.random() < 0.2 or not song.melody:
        return text
    groups = GROUPS if rng.random() < 0.85 else rng.randrange(1, GROUPS)
    return f"{text}, {spelled(melody_from(song, start, groups * GROUP), song.labels.mode)}"


def melody_from(song: Song, start: int, steps: int) -> tuple[int | None, ...]:
    """The melody's steps from the one that holds frame `start` on."""
    first = start // STEP
    return tuple(song.melody[(first + i) % len(song.melody)] for i in range(steps))


def spelled(melody: Sequence[int | None], mode: str) -> str:
    """How a caption spells a melody (steps of the mode's scale, None where no note begins)."""
    names = ["-" if step is None else SCALES[mode][step][0] for step in melody]
    groups = [names[i : i + GROUP] for i in range(0, len(names), GROUP)]
    return " ".join(["notes", *(f"{number} {' '.join(group)}" for number, group in enumerate(groups, 1))])


def _choose(labels: Labels, rng: Random) -> dict[str, str]:
    """A phrase for each attribute that is mentioned; at least one is."""
    share = 1.0 if rng.random() < 0.3 else 0.5
    said = {name: rng.choice(words[getattr(labels, name)]) for name, words in _LEXICON.items() if rng.random() < share}
    if labels.drums != "off" and "drums" in said and rng.random() < 0.5:
        said["drums"] = rng.choice(_SHARED)
    if rng.random() < share:
        said["mood"] = rng.choice(_MOOD_WORDS[labels.mood])
    if rng.random() < 0.3 * share:
        said["bpm"] = f"at {labels.bpm:g} bpm"
    return said or {"instrument": rng.choice(_LEXICON["instrument"][labels.instrument])}


def _sentence(said: dict[str, str], rng: Random) -> str:
    """[article adjectives] noun [with lead and drums] [in a key] [at a tempo], the last three in any order."""
    adjectives = [said[name] for name in _ADJECTIVES if name in said]
    rng.shuffle(adjectives)
    head = " ".join([*adjectives, rng.choice(_NOUNS)])
    tails = [said[name] for name in ("mode", "bpm") if name in said]
    players = [said[name] for name in ("instrument", "drums") if name in said]
    if players:
        rng.shuffle(players)
        tails.append("with " + " and ".join(players))
    rng.shuffle(tails)
    return " ".join([f"{'an' if head[0] in 'aeiou' else 'a'} {head}", *tails])


def demands(text: str) -> Demands:
    """For each label that the text speaks of, the values that it allows; a mood limits tempo and mode.

    Phrases are taken from the left, so that "no drums" is not also "drums"; words that are not in the lexicon are
    ignored; where two phrases contradict each other the set is empty.
    """
    found: Demands = {}
    for match in _PHRASES.finditer(text.lower()):
        for name, allowed in _MEANING[match.group()].items():
            found[name] = found.get(name, allowed) & allowed
    return found


def _meanings() -> dict[str, Demands]:
    meaning: dict[str, Demands] = {phrase: {"drums": frozenset(("rock", "dance"))} for phrase in _SHARED}
    for name, words in _LEXICON.items():
        for value, phrases in words.items():
            meaning |= {phrase: {name: frozenset((value,))} for phrase in phrases}
    first = {name: values[0] for name, values in VALUES.items()}
    for tempo in VALUES["tempo"]:
        labels = Labels(**(first | {"tempo": tempo}))
        meaning[f"at {labels.bpm:g} bpm"] = {"tempo": frozenset((tempo,))}
        for mode in VALUES["mode"]:
            mood = Labels(**(first | {"tempo": tempo, "mode": mode})).mood
            limits = {"tempo": frozenset((tempo,)), "mode": frozenset((mode,))}
            meaning |= {word: limits for word in _MOOD_WORDS[mood]}
    return meaning


_MEANING = _meanings()
# No phrase begins another, so their order here does not matter.
_PHRASES = re.compile(r"\b(?:" + "|".join(map(re.escape, _MEANING)) + r")\b")
