"""Multinomial logistic regression on a few dozen named numbers: small, convex, deterministic, saved as JSON.

Fitted by damped Newton steps in float64 numpy on standardised features with an L2 penalty, so the same data give the
same weights. Knows nothing of audio. Shapes: N clips, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_STEPS = 50
_DIGITS = 7  # significant, in JSON


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier of one attribute.

    Attributes:
        classes: C labels, in the order of the columns of `weight`.
        features: F names, in the order of its rows.
        mean, scale: float64 [F], of the standardisation.
        weight: float64 [F, C]; bias: float64 [C].
    """

    classes: tuple[str, ...]
    features: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def probabilities(self, clips: Sequence[Mapping[str, float]]) -> np.ndarray:
        """Float64 [N, C]. Raises ValueError where a clip lacks a feature."""
        standard = (_matrix(clips, self.features) - self.mean) / self.scale
        return _softmax(np.clip(standard, -10, 10) @ self.weight + self.bias)

    def predict(self, clips: Sequence[Mapping[str, float]]) -> list[str]:
        """The likeliest class of each clip; of equal ones the first."""
        return [self.classes[i] for i in self.probabilities(clips).argmax(1)]

    def to_json(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name) for name in ("mean", "scale", "weight", "bias")}
        rounded = {name: _rounded(array.tolist()) for name, array in arrays.items()}
        return {"classes": list(self.classes), "features": list(self.features), **rounded}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Classifier:
        """Raises ValueError for content whose shapes do not fit each other."""
        try:
            classes, features = tuple(content["classes"]), tuple(content["features"])
            arrays = {n: np.asarray(content[n], np.float64) for n in ("mean", "scale", "weight", "bias")}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a saved classifier: {error!r}") from None
        shapes = {
            "mean": (len(features),),
            "scale": (len(features),),
            "weight": (len(features), len(classes)),
            "bias": (len(classes),),
        }
        for name, shape in shapes.items():
            if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
                raise ValueError(f"not a saved classifier: {name} must be finite numbers of shape {list(shape)}")
        return cls(classes, features, **arrays)


def fit(
    clips: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    features: Sequence[str],
    *,
    classes: Sequence[str] = (),
    penalty: float = 1.0,
) -> Classifier:
    """Fit a classifier.

    Args:
        clips: N dicts of numbers (`clip_features`), of which `features` are used.
        labels: N labels.
        classes: the order of the classes; empty: sorted. Ordering decides ties only.
        penalty: half the L2 weight on standardised features, as if against the summed log-likelihood.

    Raises:
        ValueError: N that differ, fewer than two classes, a class without clips, missing features.
    """
    if len(clips) != len(labels):
        raise ValueError(f"{len(clips)} clips, but {len(labels)} labels")
    names = tuple(classes) or tuple(sorted(set(labels)))
    if len(names) < 2 or set(names) != set(labels):
        raise ValueError(f"need two classes or more and clips of each: {list(names)} against {sorted(set(labels))}")
    if not features or penalty <= 0:
        raise ValueError("need at least one feature and a penalty above 0")
    raw = _matrix(clips, features)
    mean, scale = raw.mean(0), raw.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    design = np.concatenate([np.clip((raw - mean) / scale, -10, 10), np.ones((len(raw), 1))], axis=1)
    wanted = np.eye(len(names))[[names.index(label) for label in labels]]
    solution = _newton(design, wanted, penalty)
    return Classifier(names, tuple(features), mean, scale, solution[:-1], solution[-1])


def cross_validated(
    clips: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    features: Sequence[str],
    *,
    folds: int = 5,
    penalty: float = 1.0,
) -> list[str]:
    """A prediction of every clip by a classifier that did not see it: clip i is in fold i mod `folds`."""
    if not 2 <= folds <= len(clips):
        raise ValueError(f"folds must lie in 2..{len(clips)}, got {folds}")
    predicted = [""] * len(clips)
    for fold in range(folds):
        kept = [i for i in range(len(clips)) if i % folds != fold]
        model = fit([clips[i] for i in kept], [labels[i] for i in kept], features, penalty=penalty)
        held = range(fold, len(clips), folds)
        for i, label in zip(held, model.predict([clips[i] for i in held]), strict=True):
            predicted[i] = label
    return predicted


def _newton(design: np.ndarray, wanted: np.ndarray, penalty: float) -> np.ndarray:
    """Weights [F + 1, C] that minimise the penalised loss of design [N, F + 1] (last column 1) and one-hot [N, C]."""
    size, count = design.shape[1], wanted.shape[1]
    ridge = np.full((size, count), penalty)
    ridge[-1] = 1e-6  # the bias is free; this only removes the direction in which softmax does not change

    def loss(weights: np.ndarray) -> float:
        scores = design @ weights
        top = scores.max(1, keepdims=True)
        normaliser = top[:, 0] + np.log(np.exp(scores - top).sum(1))
        return float((normaliser - (scores * wanted).sum(1)).sum() + 0.5 * (ridge * weights**2).sum())

    weights = np.zeros((size, count))
    for _ in range(_STEPS):
        probability = _softmax(design @ weights)
        gradient = design.T @ (probability - wanted) + ridge * weights
        hessian = np.zeros((count, size, count, size))
        for a in range(count):
            for b in range(count):
                curvature = probability[:, a] * ((a == b) - probability[:, b])
                hessian[a, :, b] = design.T @ (design * curvature[:, None])
        flat = hessian.reshape(count * size, count * size) + np.diag(ridge.T.reshape(-1))
        step = np.linalg.solve(flat, gradient.T.reshape(-1)).reshape(count, size).T
        length, before = 1.0, loss(weights)
        while length > 1e-4 and loss(weights - length * step) > before:
            length /= 2
        weights = weights - length * step
        if np.abs(step).max() * length < 1e-9:
            break
    return weights


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _matrix(clips: Sequence[Mapping[str, float]], features: Sequence[str]) -> np.ndarray:
    missing = sorted({name for clip in clips for name in features if name not in clip})
    if missing:
        raise ValueError(f"clips lack the features {missing}; see clip_features")
    if not clips:
        raise ValueError("no clips were given")
    matrix = np.array([[clip[name] for name in features] for clip in clips], np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError("features must be finite")
    return matrix


def _rounded(values: Any) -> Any:
    return [_rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.{_DIGITS}g}")
