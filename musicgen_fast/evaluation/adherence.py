"""Do clips sound as their prompts asked? Small classifiers, fitted on labelled clips, judge those that a model made.

`Analyser` is one classifier per attribute (tempo, mode, drums, ...), saved as JSON. `Adherence` counts how often its
verdict is the wanted label, next to chance and to the ceiling that it reaches on clips whose labels are true: where the
ceiling is low, the ruler is short, and the model may be better than it reads. Knows nothing of models. A measure of our
own; audiocraft's `CLAPTextConsistencyMetric` asks a CLAP model instead.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .classifier import Classifier, cross_validated, fit
from .features import ATTRIBUTE_FEATURES, TEMPO_CANDIDATES, clip_features

Labels = Mapping[str, str]  # attribute -> label of one clip
FORMAT = 1


@dataclass(frozen=True)
class Score:
    """How often n verdicts were the wanted label.

    Attributes:
        n, hits: clips that asked for the attribute, and those that got it.
        chance: the best that a guess without hearing the clip can do: the share of the most wanted label.
    """

    n: int
    hits: int
    chance: float

    @property
    def accuracy(self) -> float:
        """hits / n."""
        return self.hits / self.n

    @property
    def standard_error(self) -> float:
        """Of `accuracy`, after adding two hits and two misses (Agresti and Coull), so that 32 of 32 is not certain."""
        n = self.n + 4
        share = (self.hits + 2) / n
        return math.sqrt(share * (1 - share) / n)

    @property
    def z(self) -> float:
        """Standard errors above chance, the error being that of guesses at chance. NaN where all want one label."""
        spread = math.sqrt(self.chance * (1 - self.chance) / self.n)
        return (self.accuracy - self.chance) / spread if spread > 0 else math.nan


@dataclass(frozen=True)
class Analyser:
    """Classifiers of some attributes for clips at one sample rate.

    Attributes:
        sample_rate: Hz, of the clips.
        classifiers: by attribute.
        candidates: BPM that the tempo features compare.
    """

    sample_rate: int
    classifiers: Mapping[str, Classifier]
    candidates: tuple[float, ...] = TEMPO_CANDIDATES

    @classmethod
    def fitted(
        cls,
        clips: Sequence[Any],
        labels: Sequence[Labels],
        sample_rate: int,
        *,
        features: Mapping[str, Sequence[str]] = ATTRIBUTE_FEATURES,
        candidates: Sequence[float] = TEMPO_CANDIDATES,
        penalty: float = 1.0,
    ) -> Analyser:
        """Fit on clips [n] or [C, n] at `sample_rate` Hz and their labels: one classifier an attribute that all have.

        Fit on what will be judged: sounds through the codec, not before it. `features` says what each attribute is read
        from; attributes that it does not name are read from everything that it does. `candidates`: as for `measure`;
        `penalty`: half the L2 weight of the classifiers.
        """
        measured = measure(clips, sample_rate, candidates)
        return cls.fitted_on_features(
            measured, labels, sample_rate, features=features, candidates=candidates, penalty=penalty
        )

    @classmethod
    def fitted_on_features(
        cls,
        measured: Sequence[Mapping[str, float]],
        labels: Sequence[Labels],
        sample_rate: int,
        *,
        features: Mapping[str, Sequence[str]] = ATTRIBUTE_FEATURES,
        candidates: Sequence[float] = TEMPO_CANDIDATES,
        penalty: float = 1.0,
    ) -> Analyser:
        """`fitted` for clips that are `measured` already (`measure`, at this `sample_rate` in Hz, with `candidates`).

        `labels`, `features` and `penalty`: as there.
        """
        classifiers = {
            name: fit(measured, [row[name] for row in labels], features_of(name, features), penalty=penalty)
            for name in _attributes(labels, len(measured))
        }
        return cls(sample_rate, classifiers, tuple(candidates))

    def measure(self, clips: Sequence[Any]) -> list[dict[str, float]]:
        """The features of clips, as this analyser compares them."""
        return measure(clips, self.sample_rate, self.candidates)

    def labels(self, measured: Sequence[Mapping[str, float]]) -> list[dict[str, str]]:
        """The verdict on each measured clip."""
        columns = {name: classifier.predict(measured) for name, classifier in self.classifiers.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(measured))]

    def save(self, path: str | Path) -> None:
        """Write JSON: a few hundred numbers."""
        content = {
            "format": FORMAT,
            "sample_rate": self.sample_rate,
            "candidates": list(self.candidates),
            "classifiers": {name: classifier.to_json() for name, classifier in self.classifiers.items()},
        }
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Analyser:
        """Read what `save` wrote. Raises ValueError for other content."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']} is not {FORMAT}: fit the analyser anew")
            classifiers = {name: Classifier.from_json(part) for name, part in content["classifiers"].items()}
            return cls(int(content["sample_rate"]), classifiers, tuple(map(float, content["candidates"])))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved analyser: {error}") from None


@dataclass(frozen=True)
class Adherence:
    """`scores` by attribute, of clips and (`ceiling`, or None) of clips whose labels are true."""

    scores: Mapping[str, Score]
    ceiling: Mapping[str, Score] | None = None

    @classmethod
    def of(
        cls,
        analyser: Analyser,
        clips: Sequence[Any],
        wanted: Sequence[Labels],
        *,
        ceiling: Mapping[str, Score] | None = None,
    ) -> Adherence:
        """Score clips [n] or [C, n] at the analyser's rate. `wanted` may leave attributes out of some clips.

        `ceiling`: kept beside, see `cross_validated_ceiling`.
        The standard errors count clips as independent: one clip per prompt, or the same number of each.
        """
        return cls(score(analyser.labels(analyser.measure(clips)), wanted), ceiling)


def measure(
    clips: Sequence[Any], sample_rate: int, candidates: Sequence[float] = TEMPO_CANDIDATES
) -> list[dict[str, float]]:
    """`clip_features` of all `clips` [n] or [C, n] at `sample_rate` Hz, with these `candidates` in BPM."""
    return [clip_features(clip, sample_rate, candidates) for clip in clips]


def score(verdicts: Sequence[Labels], wanted: Sequence[Labels]) -> dict[str, Score]:
    """Scores of every attribute that both name, `verdicts` and `wanted` labels, one each for a clip.

    ValueError where there are not as many of both. The ceiling, where the verdicts are on clips whose labels are true.
    """
    if len(verdicts) != len(wanted) or not wanted:
        raise ValueError(f"{len(verdicts)} verdicts for {len(wanted)} wanted labels")
    scores = {}
    for name in dict.fromkeys(name for row in wanted for name in row):
        pairs = [(v[name], w[name]) for v, w in zip(verdicts, wanted, strict=True) if name in v and name in w]
        if pairs:
            most = max(Counter(w for _, w in pairs).values())
            scores[name] = Score(len(pairs), sum(v == w for v, w in pairs), most / len(pairs))
    return scores


def cross_validated_ceiling(
    measured: Sequence[Mapping[str, float]],
    labels: Sequence[Labels],
    *,
    features: Mapping[str, Sequence[str]] = ATTRIBUTE_FEATURES,
    folds: int = 5,
    penalty: float = 1.0,
) -> dict[str, Score]:
    """The ceiling from the clips that an analyser is fitted on, each judged by a fit that left it out.

    `measured`, `labels`, `features` and `penalty`: as for `Analyser.fitted_on_features`; `folds`: fits.
    """
    verdicts: list[dict[str, str]] = [{} for _ in measured]
    for name in _attributes(labels, len(measured)):
        column = [row[name] for row in labels]
        for verdict, label in zip(
            verdicts,
            cross_validated(measured, column, features_of(name, features), folds=folds, penalty=penalty),
            strict=True,
        ):
            verdict[name] = label
    return score(verdicts, labels)


def features_of(attribute: str, features: Mapping[str, Sequence[str]] = ATTRIBUTE_FEATURES) -> tuple[str, ...]:
    """The features that an attribute is read from: its own, else all."""
    if attribute in features:
        return tuple(features[attribute])
    return tuple(dict.fromkeys(name for names in features.values() for name in names))


def markdown_table(columns: Mapping[str, Mapping[str, Score]], ceiling: Mapping[str, Score] | None = None) -> str:
    """A table of attributes: n, chance, ceiling, and accuracy, standard error and z of every column ('cfg 1', ...).

    Percent; z is against chance. n and chance are those of the first of the `columns`; ValueError for none.
    """
    if not columns:
        raise ValueError("no columns were given")
    first = next(iter(columns.values()))
    head = ["attribute", "n", "chance", "ceiling", *(f"{title}{part}" for title in columns for part in ("", " z"))]
    lines = [_row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
    for name, base in first.items():
        best = None if ceiling is None else ceiling.get(name)
        cells = [name, str(base.n), f"{100 * base.chance:.0f}", "-" if best is None else _percent(best)]
        for scores in columns.values():
            found = scores.get(name)
            cells += ["-", "-"] if found is None else [_percent(found), f"{found.z:+.1f}"]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _percent(found: Score) -> str:
    return f"{100 * found.accuracy:.0f} ± {100 * found.standard_error:.0f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _attributes(labels: Sequence[Labels], count: int) -> list[str]:
    """The attributes that all rows name, in the order of the first row."""
    if len(labels) != count or not labels:
        raise ValueError(f"{count} clips, but {len(labels)} rows of labels")
    shared = [name for name in labels[0] if all(name in row for row in labels)]
    if not shared:
        raise ValueError("no attribute is labelled on every clip")
    return shared
