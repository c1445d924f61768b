"""Measuring: how well a model predicts tokens, whether clips sound as asked, how far sounds are from each other.

    likelihood   nats per token and codebook, teacher-forced          distance   codec figures of pairs of waveforms
    adherence    prompts against what small classifiers hear          frechet    distances between sets of embeddings
    features     the numbers they hear it in: rhythm, tonality, spectrum, level

Nothing here is needed to generate, and `import musicgen_fast` does not import it.
"""

from __future__ import annotations

from .adherence import (
    Adherence,
    Analyser,
    Score,
    cross_validated_ceiling,
    markdown_table,
    measure,
    score,
)
from .distance import (
    CodecFigures,
    codebook_perplexity,
    codec_figures,
    log_mel_distance,
    mu_law,
    si_snr,
    spectral_convergence,
)
from .features import ATTRIBUTE_FEATURES, brightness, clip_features, level, spectral_shape
from .frechet import BasicPitchEmbedder, basic_pitch_frechet_distance, embedding_distance, frechet_distance
from .likelihood import Likelihood, negative_log_likelihood, unigram_cross_entropy
from .rhythm import Drums, Tempo, density, drums, onset_envelope, onsets, tempo
from .tonality import Key, chroma, key

__all__ = [
    "ATTRIBUTE_FEATURES",
    "Adherence",
    "Analyser",
    "BasicPitchEmbedder",
    "CodecFigures",
    "Drums",
    "Key",
    "Likelihood",
    "Score",
    "Tempo",
    "basic_pitch_frechet_distance",
    "brightness",
    "chroma",
    "clip_features",
    "codebook_perplexity",
    "codec_figures",
    "cross_validated_ceiling",
    "density",
    "drums",
    "embedding_distance",
    "frechet_distance",
    "key",
    "level",
    "log_mel_distance",
    "markdown_table",
    "measure",
    "mu_law",
    "negative_log_likelihood",
    "onset_envelope",
    "onsets",
    "score",
    "si_snr",
    "spectral_convergence",
    "spectral_shape",
    "tempo",
    "unigram_cross_entropy",
]
