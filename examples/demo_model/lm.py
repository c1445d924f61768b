"""The demo's language model while it trains: musicgen_fast's transformer and a small T5 encoder under one loss.

    ids, mask [B, N] -> T5 -> projection -> cross [B, N, d];  tokens [B, K, T] -> delay pattern -> nats [B, K, T]

The weights are those of `musicgen_fast.model.Transformer`; the forward pass is another one, for gradients: batches with
padded captions, and attention that is quick in both directions. It knows no files, no optimiser and no songs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from musicgen_fast.config import ModelConfig, TextConfig
from musicgen_fast.model import Layer, Transformer, embed_tokens, position_table
from musicgen_fast.pattern import build_pattern

READING = (1, 0)  # the layer and the head that read the melody
SECONDS = 10.0  # the window the model is shipped with; crops are longer, so that all of its positions are trained


@dataclass(frozen=True)
class Sizes:
    """Shapes. With the defaults 4.33 M parameters of the language model, 0.31 M for texts."""

    dim: int = 192  # heads of 64
    layers: int = 6
    ffn: int = 768
    books: int = 4
    codes: int = 512
    text_dim: int = 128
    text_layers: int = 2
    text_ffn: int = 256
    text_rows: int = 224  # ids of the tokenizer, sentinels included, rounded up

    def __post_init__(self) -> None:
        if self.dim % 64 or self.text_dim % 64:
            raise ValueError(f"widths are multiples of 64 (the heads'), not {self.dim} and {self.text_dim}")
        if self.dim == self.text_dim:
            raise ValueError(f"transformers has no projection between equal widths: dim and text_dim are {self.dim}")

    def model(self) -> ModelConfig:
        """musicgen_fast's configuration of the language model."""
        return ModelConfig(
            dim=self.dim, num_layers=self.layers, num_heads=self.dim // 64, ffn_dim=self.ffn, num_codebooks=self.books,
            vocab_size=self.codes, text=TextConfig("demo", self.text_dim), max_duration=SECONDS,
        )  # fmt: skip

    def text(self) -> Any:
        """transformers' T5Config of the text encoder."""
        from transformers import T5Config

        return T5Config(
            vocab_size=self.text_rows, d_model=self.text_dim, d_kv=32, num_heads=self.text_dim // 32,
            d_ff=self.text_ffn, num_layers=self.text_layers, dropout_rate=0.0,
        )  # fmt: skip


class DemoLM(nn.Module):
    """Transformer, projection and T5 encoder, weights drawn from torch's global generator."""

    def __init__(self, sizes: Sizes) -> None:
        from transformers import T5EncoderModel

        super().__init__()
        self.sizes, self.config = sizes, sizes.model()
        self.transformer = Transformer(self.config)
        self.text: Any = T5EncoderModel(sizes.text())
        self._positions = torch.empty(0, sizes.dim)
        _draw(self.transformer)
        _look_back(self.text)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Projected states [B, N, d] of padded captions: ids and mask int64 [B, N]; zero where the mask is."""
        states = self.text(input_ids=ids, attention_mask=mask).last_hidden_state
        assert self.transformer.text_proj is not None
        return self.transformer.text_proj(states) * mask[..., None]

    def forward(
        self, tokens: Tensor, ids: Tensor, mask: Tensor, keep: Tensor, spelled: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood float32 [B, K, T] in nats; and how far the reading head is from the melody, a scalar.

        Args:
            tokens: int64 [B, K, T].
            ids, mask: the captions, int64 [B, N].
            keep: float [B], 0 where the caption is dropped. Its states become zero, which attends to nothing: what
                guidance takes for the unconditional branch.
            spelled: int64 [B, T], the place in `ids` of the step that each frame belongs to, -1 where the caption
                spells none. One head of one layer is then judged by where it looks (nats of attention; 0 without it).
                Left to themselves the heads read no melody: after 400 steps a caption saved 0.003 nats, with this guide
                and `_look_back` 0.09. Guided attention is from Tachibana et al., arXiv 1710.08969, for speech.
        """
        cross = self.encode(ids, mask) * keep[:, None, None]
        pattern = build_pattern(self.config.pattern, tokens.shape[1], tokens.shape[2])
        sequence = pattern.build(tokens, self.config.special_token)
        x = embed_tokens(self.transformer.emb.weight, sequence[:, :, :-1])
        x = x + self._position(x.shape[1])
        seen = mask[:, None, None].bool()
        astray = x.new_zeros(())
        for i, layer in enumerate(self.transformer.layers):
            assert isinstance(layer, Layer)
            x, looks = _block(layer, x, cross, seen)
            if spelled is not None and i == READING[0]:
                read = (spelled >= 0) & (keep[:, None] > 0)
                there = looks[:, READING[1], : spelled.shape[1]].float().gather(2, spelled.clamp(min=0)[..., None])
                astray = -(there[..., 0].clamp(min=1e-6).log() * read).sum() / read.sum().clamp(min=1)
        logits = self.transformer.logits(x)  # [B, S, K, V]; the special token has no output
        wanted = sequence[:, :, 1:].transpose(1, 2).masked_fill(~_held(pattern.table[1:]), -100)
        nats = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), ignore_index=-100, reduction="none")
        nats = nats.view(wanted.shape).transpose(1, 2)
        return pattern.revert(F.pad(nats, (1, 0))), astray

    def _position(self, length: int) -> Tensor:
        if len(self._positions) < length:
            self._positions = position_table(length, self.sizes.dim)
        return self._positions[:length]


def _held(table: Any) -> Tensor:
    """Bool [S, K]: the cell holds a frame."""
    return torch.from_numpy(table >= 0)


def _block(layer: Layer, x: Tensor, cross: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """`Layer.forward` for training: x [B, S, d], cross [B, N, d], seen bool [B, 1, 1, N]; and where its heads look in
    the caption, [B, H, S, N]."""
    q, k, v = (layer.heads(part) for part in layer.qkv(layer.norm1(x)).chunk(3, dim=-1))
    x = x + layer.attn_out(_joined(_causal(q, k, v)))
    q = layer.heads(layer.cross_q(layer.norm_cross(x)))
    k, v = (layer.heads(part) for part in layer.cross_kv(cross).chunk(2, dim=-1))
    looks = _weights(q, k, seen)
    x = x + layer.cross_out(_joined(looks @ v))
    return x + layer.ffn_out(F.gelu(layer.ffn_in(layer.norm2(x)))), looks


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention [B, H, S, e] in two halves, the first of which never looks at the second."""
    length = q.shape[2]
    half = -(-length // 2)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    first = _weights(q[:, :, :half], k[:, :, :half], seen[:half, :half]) @ v[:, :, :half]
    return torch.cat([first, _weights(q[:, :, half:], k, seen[half:]) @ v], dim=2)


def _weights(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Attention. Plain products: forward and backward in bfloat16 on one core, 24 heads of 64 take 38 ms against 47 of
    torch's fused attention at 515 x 515, and 7 against 22 at 515 x 25 (its backward pass is the slow half)."""
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias
    with torch.autocast("cpu", enabled=False):  # which would compute the softmax in float32
        return scores.softmax(-1)


def _joined(heads: Tensor) -> Tensor:
    return rearrange(heads, "r h s e -> r s (h e)")


@torch.no_grad()
def _draw(transformer: Transformer) -> None:
    """Initial weights: each matrix keeps the scale of its input, branches start small, all tokens equally likely.

    Embeddings have variance 1, so that tokens stand out from the sinusoids of the positions (0.5). Held-out nats after
    50 steps of 8 x 256 frames at a rate of 1.5e-3: 5.03; with 0.35 in place of 1 5.21, with 0.1 or all matrices at 0.02
    5.9.
    """
    quiet = (3 * len(transformer.layers)) ** -0.5
    for name, weight in transformer.named_parameters():
        if weight.dim() < 2:
            continue
        scale = weight.shape[1] ** -0.5
        if name.endswith(("attn_out.weight", "cross_out.weight", "ffn_out.weight")):
            scale *= quiet
        weight.normal_(std=1.0 if name == "emb.weight" else 0.02 if name == "heads.weight" else scale)


@torch.no_grad()
def _look_back(text: Any) -> None:
    """Each head of the text encoder begins with its eye on one of the words before, so that a note soon knows the
    number of its group. The reading head then misses by 0.34 nats after 160 steps of the guide alone; with biases of 0,
    which grow by the learning rate a step, by 2.88."""
    bias = text.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias.zero_()
    for head in range(bias.shape[1]):
        bias[head + 1, head] = 6.0  # the rows are distances; the first half of them looks back


def optimizer(model: DemoLM, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW with (0.9, 0.95); weight decay on matrices only, not on embeddings, norms and biases."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, weight in model.named_parameters():
        spared = weight.dim() < 2 or name == "transformer.emb.weight" or "shared" in name or "relative" in name
        parts[not spared].append(weight)
    groups = [{"params": parts[True], "weight_decay": decay}, {"params": parts[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def cosine(progress: float, step: int, warmup: int) -> float:
    """Factor on the learning rate: linear over `warmup` steps, then half a cosine to 0 at progress 1."""
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
