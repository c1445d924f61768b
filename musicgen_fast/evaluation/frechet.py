"""Frechet distance between two sets of embeddings, and one embedder that needs no download: basic-pitch's ONNX model.

The published "FAD" figures (Kilgour et al. 2019) use VGGish or CLAP; what is computed here with another embedder cannot
be compared with them, so its name says which: `basic_pitch_frechet_distance`. Good for ordering runs of one project, as
a smoke alarm. Sets are float [N, D]; clips are waveforms [n] or [C, n].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .spectra import mono

EMBEDDING_DIM = 880  # mean and deviation of 88 notes, 88 onsets and 264 contour bins
_RATE, _WINDOW = 22050, 43844  # what the model takes: Hz, samples
_INSTALL = "pip install onnxruntime && pip install --no-deps basic-pitch (its own requirements ask for TensorFlow)"


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians: `mean1`, `mean2` [D], `cov1`, `cov2` [D, D].

    The covariances are symmetric; the distance is that of Heusel et al. 2017.

    The root's trace is taken as that of (S C2 S)^(1/2) with S = C1^(1/2): symmetric matrices only, so eigenvalues are
    real, and those below zero by rounding are cut. Never negative. Like the published figures it is the squared
    distance.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite.
    """
    arrays = [np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2)]
    m1, c1, m2, c2 = arrays
    size = len(np.atleast_1d(m1))
    if m1.shape != (size,) or m2.shape != (size,) or c1.shape != (size, size) or c2.shape != (size, size):
        raise ValueError(f"shapes do not fit: {[a.shape for a in arrays]}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("means and covariances must be finite")
    values, vectors = np.linalg.eigh((c1 + c1.T) / 2)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ ((c2 + c2.T) / 2) @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum()
    return max(float((m1 - m2) @ (m1 - m2) + np.trace(c1) + np.trace(c2) - 2 * cross), 0.0)


def embedding_distance(reference: Any, other: Any, components: int | None = None) -> float:
    """Frechet distance between Gaussians fitted to two sets of embeddings [N1, D] and [N2, D].

    Args:
        components: first project both on that many principal axes of the reference, and drop the rest. Needed where N
            is not far above D: the fit then has no full rank, and the distance grows as N falls.

    Raises:
        ValueError: fewer than two embeddings in a set, other shapes, more components than axes.
    """
    first, second = _matrix(reference), _matrix(other)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"embeddings of {first.shape[1]} and {second.shape[1]} numbers")
    if components is not None:
        if not 1 <= components < min(first.shape[0], first.shape[1] + 1):
            raise ValueError(f"{components} components need more than that many embeddings, got {first.shape}")
        centre = first.mean(0)
        turn = np.linalg.svd(first - centre, full_matrices=False)[2][:components].T
        first, second = (first - centre) @ turn, (second - centre) @ turn
    return frechet_distance(*_gaussian(first), *_gaussian(second))


def basic_pitch_frechet_distance(
    references: Sequence[Any],
    clips: Sequence[Any],
    sample_rate: int,
    *,
    components: int = 16,
    embedder: BasicPitchEmbedder | None = None,
) -> float:
    """`embedding_distance` on `components` axes between the basic-pitch features of two sets of clips; not FAD.

    `references` and `clips` are [n] or [C, n] at `sample_rate` Hz, `embedder` one that is open already. The features
    are those of Bittner et al. 2022. Every window of 2 s is one embedding. Raises ImportError where the model or
    onnxruntime is missing.
    """
    embed = embedder or BasicPitchEmbedder()
    first, second = (np.concatenate([embed(clip, sample_rate) for clip in part]) for part in (references, clips))
    return embedding_distance(first, second, components)


class BasicPitchEmbedder:
    """Pooled outputs of basic-pitch's note model, run by onnxruntime on one CPU thread.

    Args:
        model: path of `nmp.onnx`; None: from the installed package, whose code is not imported.

    Raises:
        ImportError: onnxruntime or the package's model is not installed; the message says what to install.
    """

    def __init__(self, model: str | Path | None = None):
        path = _model_path() if model is None else Path(model)
        try:
            import onnxruntime
        except ImportError:
            raise ImportError(f"the basic-pitch embedder needs onnxruntime: {_INSTALL}") from None
        if not path.is_file():
            raise ImportError(f"no model of basic-pitch at {path}: {_INSTALL}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the same sums in the same order everywhere
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, wav: Any, sample_rate: int) -> np.ndarray:
        """Float64 [windows, 880] of wav [n] or [C, n] at `sample_rate` Hz: whole windows of 1.99 s, without overlap; a
        shorter clip is padded."""
        import julius

        signal = julius.resample_frac(mono(wav, sample_rate), int(sample_rate), _RATE)
        count = max(len(signal) // _WINDOW, 1)
        signal = torch.nn.functional.pad(signal, (0, max(count * _WINDOW - len(signal), 0)))[: count * _WINDOW]
        outputs = self._session.run(None, {self._input: signal.reshape(count, _WINDOW, 1).numpy()})
        outputs = sorted((np.asarray(o, np.float64) for o in outputs), key=lambda o: o.shape[2])
        return np.concatenate([pooled for o in outputs for pooled in (o.mean(1), o.std(1))], axis=1)


def _model_path() -> Path:
    spec = importlib.util.find_spec("basic_pitch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(folder).glob("saved_models/*/nmp.onnx"))
        if found:
            return found[0]
    raise ImportError(f"the model of basic-pitch is not installed: {_INSTALL}")


def _matrix(embeddings: Any) -> np.ndarray:
    matrix = np.asarray(embeddings, np.float64)
    if matrix.ndim != 2 or len(matrix) < 2 or not np.isfinite(matrix).all():
        raise ValueError(f"embeddings must be at least two finite rows [N, D], got {matrix.shape}")
    return matrix


def _gaussian(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False))
