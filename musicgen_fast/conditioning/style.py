"""An excerpt of audio to style tokens: MERT features, a small transformer, residual quantisation, every n-th frame.

The numbers are audiocraft's (`StyleConditioner`, feature extractor MERT) at batch 1, always float32. Knows nothing
about CFG or text. The quantiser is the bottleneck that makes this a *style*: three of its six codebooks by default,
more let more of the excerpt through. MERT is transformers' HuBERT; the code in its repository is never executed.
Shapes: wav [C, T] samples; features [F, 768] at 75 a second; tokens [ceil(F / 15), d]: 15 for the usual 3 s.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.files import TensorFiles, read_json
from ..checkpoints.sources import open_source
from ..config import StyleConfig
from ..errors import CheckpointError
from ..model import position_table

__all__ = ["StyleConditioner", "excerpt_start", "load_mert"]

# what training keeps beside the weights: counts and running sums of the codebooks, a counter of the batch norm
_TRAINING_ONLY = ("._codebook.inited", "._codebook.cluster_size", "._codebook.embed_avg", ".num_batches_tracked")


def excerpt_start(num_samples: int, length: int, seed: int | None = None) -> int:
    """First sample of a random excerpt: `randint(0, num_samples - length)`, drawn once.

    None draws from Python's global `random`, as audiocraft does; a seed from a generator of its own.
    ValueError (randint's) where the audio is shorter than the excerpt.
    """
    return (random if seed is None else random.Random(seed)).randint(0, num_samples - length)


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim).normal_(std=dim**-0.5))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [F, dim]
        q, k, v = F.linear(x, self.in_proj_weight).unflatten(-1, (3, self.num_heads, -1)).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return self.out_proj(mixed.transpose(0, 1).flatten(1))


class _Layer(nn.Module):
    def __init__(self, config: StyleConfig):
        super().__init__()
        self.self_attn = _SelfAttention(config.dim, config.num_heads)
        self.linear1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.linear2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.norm1 = nn.LayerNorm(config.dim)
        self.norm2 = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class _Node(nn.Module):
    """A name in the checkpoint with modules or buffers below it."""

    def __init__(self, **children: nn.Module | Tensor):
        super().__init__()
        for name, child in children.items():
            self.register_buffer(name, child) if isinstance(child, Tensor) else self.add_module(name, child)


class StyleConditioner(nn.Module):
    """Style tokens of an excerpt. Its parameters have the names of the checkpoint's `...conditioners.self_wav.`.

    `load_state_dict` skips the training-only tensors of a checkpoint. MERT is no part of it: it is not in the
    checkpoint either, and is loaded at the first waveform, so that a text-only user never needs it.

    Args:
        config: of the model.
        dim: width d of the music model.
        mert: maps [1, samples] at `config.feature_rate`, on the device of the weights, to an object with
            `last_hidden_state` [1, F, feature_dim]; None loads `config.feature_name` when it is needed.
    """

    def __init__(self, config: StyleConfig, dim: int, mert: Callable[..., Any] | None = None):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.feature_dim, config.dim)
        self.transformer = _Node(layers=nn.ModuleList(_Layer(config) for _ in range(config.num_layers)))
        if config.batch_norm:
            self.batch_norm = _Node(running_mean=torch.zeros(config.dim), running_var=torch.ones(config.dim))
        books = [_Node(embed=torch.randn(config.codebook_size, config.dim)) for _ in range(config.num_codebooks)]
        self.rvq = _Node(vq=_Node(layers=nn.ModuleList(_Node(_codebook=book) for book in books)))
        self.output_proj = nn.Linear(config.dim, dim)
        self.register_load_state_dict_pre_hook(_drop_training_only)
        self.requires_grad_(False)
        self._mert = [] if mert is None else [mert]  # in a list: neither a submodule nor in the state dict
        self.eval_q, self.excerpt_length, self.ds_factor = config.eval_q, config.excerpt_length, config.ds_factor
        self.encodec_n_q: int | None = None

    @classmethod
    def from_weights(
        cls, config: StyleConfig, dim: int, tensors: Mapping[str, Tensor], mert: Callable[..., Any] | None = None
    ) -> StyleConditioner:
        """On the CPU, from the checkpoint's tensors below `condition_provider.conditioners.self_wav.`, in any dtype.

        CheckpointError names what is missing, left over or of the wrong shape.
        """
        with torch.device("meta"):  # no weight is drawn only to be replaced
            conditioner = cls(config, dim, mert)
        conditioner.to_empty(device="cpu")
        try:
            conditioner.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"the style conditioner of this checkpoint does not fit: {error}") from error
        return conditioner

    def set_params(
        self, eval_q: int = 3, excerpt_length: float = 3.0, ds_factor: int | None = None, encodec_n_q: int | None = None
    ) -> None:
        """audiocraft's `set_params`: what is not named goes back to its default, save `ds_factor`, which stays.

        Args:
            eval_q: codebooks used, 1 to 6 in the released model.
            excerpt_length: seconds.
            ds_factor: every how many frames one becomes a token.
            encodec_n_q: kept, but without effect: it belongs to models with EnCodec features, and none was released.

        Raises:
            ValueError: a value out of range, an excerpt below 0.02 seconds.
        """
        if not 1 <= eval_q <= self.config.num_codebooks or int(eval_q) != eval_q:
            raise ValueError(f"eval_q must be a whole number from 1 to {self.config.num_codebooks}, got {eval_q}")
        if not (math.isfinite(excerpt_length) and excerpt_length >= 0.02):
            raise ValueError(f"excerpt_length must be at least 0.02 seconds (one frame of MERT), got {excerpt_length}")
        for name, value in (("ds_factor", ds_factor), ("encodec_n_q", encodec_n_q)):
            if value is not None and (value < 1 or int(value) != value):
                raise ValueError(f"{name} must be a whole number above 0, got {value}")
        self.eval_q, self.excerpt_length = int(eval_q), float(excerpt_length)
        self.ds_factor = self.ds_factor if ds_factor is None else int(ds_factor)
        self.encodec_n_q = self.encodec_n_q if encodec_n_q is None else int(encodec_n_q)

    def draw_start(self, wav: Tensor | None, sample_rate: int, seed: int | None = None) -> int:
        """First sample, at `config.sample_rate`, of the excerpt of `wav` [C, T]: see `excerpt_start`.

        `sample_rate` in Hz, `seed` of the draw. 0 without a draw for no audio; the middle where the model was made so.
        ValueError for audio that is too short.
        """
        if wav is None or wav.shape[-1] == 1:
            return 0
        num_samples, length = self._mono(wav, sample_rate).shape[-1], self._excerpt_samples()
        if num_samples < length:
            seconds = num_samples / self.config.sample_rate
            raise ValueError(
                f"the style audio lasts {seconds:.3g} s but must last at least {self.excerpt_length:g} s, the length "
                "of the excerpt; take longer audio or lower excerpt_length (set_style_conditioner_params)"
            )
        return (num_samples - length) // 2 if self.config.use_middle else excerpt_start(num_samples, length, seed)

    def _excerpt_samples(self) -> int:
        return int(self.excerpt_length * self.config.sample_rate)

    def _mono(self, wav: Tensor, sample_rate: int) -> Tensor:
        """[C, T] -> [1, T'] at `config.sample_rate` on the device of the weights."""
        if wav.dim() != 2 or wav.numel() == 0:
            raise ValueError(f"a style must be a waveform [channels, samples], got shape {tuple(wav.shape)}")
        if not torch.isfinite(wav).all():
            raise ValueError("the style audio holds NaN or infinite samples")
        from ..audio import convert_audio

        return convert_audio(wav.to(self.output_proj.weight), sample_rate, self.config.sample_rate, 1)

    def forward(
        self, wav: Tensor | None, sample_rate: int, *, start: int | None = None, seed: int | None = None
    ) -> Tensor:
        """Tokens [tokens, d] of an excerpt of `wav` [C, T] at `sample_rate` Hz; a zero one for None or a single sample.

        Args:
            start: first sample of the excerpt at `config.sample_rate`; None draws it (`draw_start`, `seed`).

        Raises:
            ValueError: audio that is too short, an excerpt beyond its end, NaN or infinite samples.
        """
        if wav is None or wav.shape[-1] == 1:
            return self.output_proj.weight.new_zeros(1, self.output_proj.out_features)
        start = self.draw_start(wav, sample_rate, seed) if start is None else start
        excerpt = self._mono(wav, sample_rate)[:, max(start, 0) : start + self._excerpt_samples()]
        if excerpt.shape[-1] < self._excerpt_samples():
            raise ValueError(f"no excerpt of {self.excerpt_length:g} s starts at sample {start} of this audio")
        with torch.no_grad(), torch.autocast(excerpt.device.type, enabled=False):
            return self.tokens(self.features(excerpt))

    def features(self, excerpt: Tensor) -> Tensor:
        """MERT's last hidden state [F, feature_dim] of an excerpt [1, T] at `config.sample_rate`.

        The raw waveform goes in: audiocraft skips the normalisation of MERT's own feature extractor.
        """
        from ..audio import convert_audio

        if not self._mert:
            self._mert.append(load_mert(self.config.feature_name, excerpt.device))
        wav = convert_audio(excerpt, self.config.sample_rate, self.config.feature_rate, 1)
        return self._mert[0](wav).last_hidden_state[0]

    def tokens(self, features: Tensor) -> Tensor:
        """Features [F, feature_dim] -> tokens [ceil(F / ds_factor), d]."""
        x = self.embed(features)
        if self.config.num_layers:
            x = x + position_table(len(x), self.config.dim, x.device)
        for index in range(self.config.num_layers):
            x = self.get_submodule(f"transformer.layers.{index}")(x)
        if self.config.batch_norm:
            mean, variance = (self.get_buffer(f"batch_norm.running_{name}") for name in ("mean", "var"))
            x = F.batch_norm(x, mean, variance, training=False)
        if self.config.num_codebooks:
            x = self._quantised(x)
        return self.output_proj(x[:: self.ds_factor])

    def _quantised(self, x: Tensor) -> Tensor:
        """Sum of the nearest entries of the first `eval_q` codebooks, each of what the ones before left over."""
        total, rest = torch.zeros_like(x), x
        for index in range(self.eval_q):
            book = self.get_buffer(f"rvq.vq.layers.{index}._codebook.embed")
            # the expanded square, not cdist: the rounding of the reference decides between near-equal entries
            distance = rest.square().sum(1, keepdim=True) - 2 * rest @ book.T + book.square().sum(1)
            entry = book[distance.argmin(-1)]
            total, rest = total + entry, rest - entry
        return total


def _drop_training_only(module, state_dict, *_) -> None:
    """Hook of `load_state_dict`, which works on a copy of the dict."""
    for name in [n for n in state_dict if n.endswith(_TRAINING_ONLY)]:
        del state_dict[name]


# what HuBERT's configuration shares with MERT's as far as inference goes
_MERT_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
    "feat_extract_norm", "feat_extract_activation", "feat_proj_layer_norm", "conv_dim", "conv_stride", "conv_kernel",
    "conv_bias", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "do_stable_layer_norm",
)  # fmt: skip
_MERT_HINT = (
    "a style model needs MERT: put m-a-p/MERT-v1-95M (config.json, pytorch_model.bin) into a folder mert/ beside the "
    "checkpoint, or name its folder as style_encoder="
)


def load_mert(name_or_folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """MERT (Li et al. 2023) as transformers' `HubertModel`: float32, eval mode, no gradients, on `device`.

    `name_or_folder`: hub id or folder. MERT-v1-95M is a HuBERT trained on music. CheckpointError where it cannot be
    found, lacks weights, or uses one of MERT's additions that HuBERT does not have (constant-Q features, deepnorm,
    relaxed attention).
    """
    from transformers import HubertConfig, HubertModel

    source = open_source(name_or_folder)
    config_path = source.find("config.json")
    if config_path is None:
        raise CheckpointError(f"{source.missing('config.json')}; {_MERT_HINT}")
    path = source.find("model.safetensors") or source.find("pytorch_model.bin")
    if path is None:
        raise CheckpointError(f"{source.missing('model.safetensors', 'pytorch_model.bin')}; {_MERT_HINT}")
    settings = read_json(config_path)
    if settings.get("model_type") not in ("mert_model", "hubert"):
        raise CheckpointError(f"{name_or_folder} holds a {settings.get('model_type')!r} model; {_MERT_HINT}")
    additions = [n for n in ("feature_extractor_cqt", "deepnorm", "attention_relax") if (settings.get(n) or 0) > 0]
    if additions:
        raise CheckpointError(f"the MERT of {name_or_folder} needs {', '.join(additions)}: not supported; {_MERT_HINT}")
    known = {name: settings[name] for name in _MERT_FIELDS if name in settings}
    with torch.device("meta"):
        model = HubertModel(HubertConfig(**known, mask_time_prob=0.0, mask_feature_prob=0.0))
    weights = {_mert_name(name): tensor.float() for name, tensor in TensorFiles.from_file(path).items()}
    missing = sorted(model.state_dict().keys() - weights.keys())
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of MERT: {', '.join(missing[:6])}")
    try:
        model.load_state_dict(weights, strict=False, assign=True)  # left over are parts that only training uses
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its config.json: {error}") from error
    return nn.Module.to(model, device).eval().requires_grad_(False)


def _mert_name(name: str) -> str:
    """Name in a published file -> in today's HubertModel: weight norm of old torch versions has other names."""
    name = name.removeprefix("mert_model.").removeprefix("hubert.")
    name = name.replace("conv.weight_g", "conv.parametrizations.weight.original0")
    return name.replace("conv.weight_v", "conv.parametrizations.weight.original1")
