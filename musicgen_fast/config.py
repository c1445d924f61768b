"""What a model is and how it is asked to generate: frozen dataclasses, no torch, no files.

`ModelConfig` and `CodecConfig` are filled in by `checkpoints/` from either published layout; everything else in the
package reads shapes from here. Letters used across the project: B requests, R rows (B x branches), K codebooks,
V vocabulary (audiocraft's `card`), T frames, S steps of the pattern sequence, L layers, H heads, d width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

__all__ = [
    "CodecConfig",
    "GenerationParams",
    "MelodyConfig",
    "ModelConfig",
    "PatternConfig",
    "StyleConfig",
    "TextConfig",
    "named_config",
]


@dataclass(frozen=True, slots=True)
class PatternConfig:
    """How K codebooks are interleaved over the steps of the sequence; see `pattern.py` for each kind.

    `flatten_first`: so many first frames are emitted one codebook a step; `empty_initial`: more empty steps before
    them.
    """

    kind: str = "delay"  # delay | parallel | unroll | musiclm | coarse_first
    delays: tuple[int, ...] = ()  # empty: 0..K-1 for delay, zeros elsewhere
    flatten_first: int = 0
    empty_initial: int = 0
    flattening: tuple[int, ...] = ()  # unroll only; empty: 0..K-1
    group_by: int = 2  # musiclm only


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The text encoder: `name` is what the checkpoint asks for (a T5 hub id), `dim` its width D."""

    name: str = "t5-base"
    dim: int = 768


@dataclass(frozen=True, slots=True)
class MelodyConfig:
    """Chromagram conditioning of the melody checkpoints (audiocraft `ChromaStemConditioner`).

    `sample_rate` in Hz; `n_chroma` pitch classes; `duration`: seconds that the prefix covers; `argmax`: one-hot frames.
    """

    sample_rate: int = 32000
    n_chroma: int = 12
    radix2_exp: int = 14  # n_fft = window = 2**14, hop = n_fft / 4
    duration: float = 30.0
    argmax: bool = True

    @property
    def chroma_length(self) -> int:
        """Frames of the prefix: 235 for 30 s at 32 kHz."""
        return int(self.duration * self.sample_rate) // (2**self.radix2_exp // 4) + 1


@dataclass(frozen=True, slots=True)
class StyleConfig:
    """Style conditioning of musicgen-style (audiocraft `StyleConditioner`): MERT, transformer, RVQ, every 15th.

    Attributes:
        sample_rate: Hz, of the waveform as it is given.
        feature_name, feature_dim: hub id of MERT and its width; feature_rate in Hz and feature_hop in samples are its.
        dim, num_heads, num_layers, ffn_dim: of the transformer over its frames.
        batch_norm: normalise before the quantiser of num_codebooks books with codebook_size entries each.
        ds_factor, eval_q, excerpt_length: frames for each token, codebooks used, seconds of the excerpt.
        use_middle: cut the excerpt from the middle instead of drawing where it starts.
    """

    sample_rate: int = 32000
    feature_name: str = "m-a-p/MERT-v1-95M"
    feature_dim: int = 768
    feature_rate: int = 24000
    feature_hop: int = 320
    dim: int = 512
    num_heads: int = 8
    num_layers: int = 8
    ffn_dim: int = 2048
    num_codebooks: int = 6
    codebook_size: int = 1024
    batch_norm: bool = True
    ds_factor: int = 15
    eval_q: int = 3
    excerpt_length: float = 3.0
    use_middle: bool = False


@dataclass(frozen=True, slots=True)
class CodecConfig:
    """An EnCodec (SEANet + RVQ; Défossez et al. 2022). Defaults: the 32 kHz codec of MusicGen, 50 frames a second.

    Attributes:
        sample_rate, channels: Hz and channels of the waveform.
        num_filters: channels of the outermost convolutions, doubled at every stage. dimension: width of the latents.
        kernel_size, last_kernel_size, residual_kernel_size: widths of the first, last and residual convolutions.
        num_residual_layers, dilation_base, compress: residual blocks a stage; block j is dilated by dilation_base**j,
            and its hidden width is that of the stage over compress.
        lstm_layers: between the convolutions and the latents; 0 for none.
        trim_right_ratio: kept for the files; it tells of causal codecs only, which are not read.
        num_codebooks, codebook_size: K and the entries of each.
    """

    sample_rate: int = 32000
    channels: int = 1
    ratios: tuple[int, ...] = (8, 5, 4, 4)  # decoder order; hop = product
    num_filters: int = 64
    dimension: int = 128
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    num_residual_layers: int = 1
    dilation_base: int = 2
    compress: int = 2
    lstm_layers: int = 2
    pad_mode: str = "reflect"  # 'reflect' (transformers' files) or 'constant' (audiocraft's): read, never assumed
    trim_right_ratio: float = 1.0
    num_codebooks: int = 4
    codebook_size: int = 2048

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return math.prod(self.ratios)

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.hop_length


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The language model and what conditions it.

    `conditioning` is 'cross' (text through cross-attention) or 'prefix' (chroma or style, then text, prepended to
    the sequence). `audio_channels` 2 means that the K codebooks interleave left and right.

    Attributes:
        dim, num_layers, num_heads, ffn_dim: d, L, H and the width of the feed-forward layers.
        num_codebooks, vocab_size, pattern: K, V, and how the codebooks are interleaved.
        text, melody, style: the conditioners; None for those that the model lacks.
        max_duration: seconds of one window. cfg_coef, two_step_cfg: the checkpoint's guidance.

    Raises:
        ValueError: fields that contradict each other.
    """

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    num_codebooks: int = 4
    vocab_size: int = 2048
    pattern: PatternConfig = field(default_factory=PatternConfig)
    conditioning: str = "cross"
    text: TextConfig | None = field(default_factory=TextConfig)
    melody: MelodyConfig | None = None
    style: StyleConfig | None = None
    audio_channels: int = 1
    max_duration: float = 30.0
    cfg_coef: float = 3.0
    two_step_cfg: bool = False
    family: str = "musicgen"  # or 'audiogen'

    def __post_init__(self) -> None:
        if self.conditioning not in ("cross", "prefix"):
            raise ValueError(f"conditioning must be 'cross' or 'prefix', got {self.conditioning!r}")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"width {self.dim} does not split into {self.num_heads} heads of an even size; "
                "the checkpoint's configuration is inconsistent"
            )
        if self.audio_channels not in (1, 2):
            raise ValueError(f"audio_channels must be 1 or 2, got {self.audio_channels}")
        if self.melody is not None and self.style is not None:
            raise ValueError("a model has either a melody or a style conditioner, not both")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.num_heads

    @property
    def special_token(self) -> int:
        """The id that stands in cells without a frame; it has an embedding row but no head output."""
        return self.vocab_size


MAX_DURATION = 3 * 3600  # seconds: 2.8 GB of stereo sound in memory


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """audiocraft's generation parameters, its names and defaults (`MusicGen.set_generation_params`).

    Negative `top_k` and `top_p` mean off and a `temperature` <= 0 means greedy, as in audiocraft; NaN and infinities
    raise. `extend_stride` None means min(18, 0.6 x max_duration). `duration` and `extend_stride` are seconds; for
    `use_sampling`, `cfg_coef`, `cfg_coef_beta` and `two_step_cfg` see `MusicGen.set_generation_params`.

    Raises:
        TypeError: a value that is no number.
        ValueError: NaN, infinities, a top_k that is not whole, top_p above 1, a duration that is not above 0 or is
            longer than three hours.
    """

    use_sampling: bool = True
    top_k: int = 250
    top_p: float = 0.0
    temperature: float = 1.0
    duration: float = 30.0
    cfg_coef: float = 3.0
    cfg_coef_beta: float | None = None
    two_step_cfg: bool = False
    extend_stride: float | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "top_p", "temperature", "duration", "cfg_coef", "cfg_coef_beta", "extend_stride"):
            value = getattr(self, name)
            if value is None and name in ("cfg_coef_beta", "extend_stride"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not math.isfinite(float(value)):
                raise ValueError(f"{name} must be finite, got {value}")
        if int(self.top_k) != self.top_k:
            raise ValueError(f"top_k must be a whole number, got {self.top_k}")
        if self.top_p > 1.0:
            raise ValueError(f"top_p must be at most 1, got {self.top_p}")
        if not 0 < self.duration <= MAX_DURATION:
            raise ValueError(f"duration must be above 0 and at most {MAX_DURATION} seconds, got {self.duration}")

    def stride(self, max_duration: float) -> float:
        """Seconds between the starts of two windows of `max_duration` seconds; ValueError where none would overlap."""
        if self.extend_stride is None:
            return min(18.0, 0.6 * max_duration)
        if not 0 < self.extend_stride < max_duration:
            raise ValueError(
                f"extend_stride ({self.extend_stride} s) must be above 0 and below the model's window "
                f"({max_duration} s): the next window needs some of the last one as its prompt"
            )
        return float(self.extend_stride)

    def with_(self, **changes) -> GenerationParams:
        """A copy with other values in the fields that `changes` names, checked like new ones."""
        return replace(self, **changes)


# name: (width, layers, heads); every released size has heads of 64
_SIZES = {"small": (1024, 24, 16), "medium": (1536, 48, 24), "large": (2048, 48, 32)}
_STEREO_DELAYS = (0, 0, 1, 1, 2, 2, 3, 3)


def named_config(name: str) -> ModelConfig:
    """The configuration of a released size: 'small', 'medium', 'large', also with '-stereo' and/or '-melody'.

    ValueError for other names.
    """
    size, *options = name.split("-")
    if size not in _SIZES or set(options) - {"stereo", "melody"} or len(set(options)) != len(options):
        raise ValueError(f"unknown size {name!r}: expected small, medium or large, with -stereo and/or -melody behind")
    dim, layers, heads = _SIZES[size]
    stereo, melody = "stereo" in options, "melody" in options
    return ModelConfig(
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        ffn_dim=4 * dim,
        num_codebooks=8 if stereo else 4,
        pattern=PatternConfig(delays=_STEREO_DELAYS if stereo else (0, 1, 2, 3)),
        conditioning="prefix" if melody else "cross",
        melody=MelodyConfig() if melody else None,
        audio_channels=2 if stereo else 1,
    )
