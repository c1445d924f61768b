"""The reference transformer of MusicGen in plain torch: short, slow and right; the oracle of every decoder.

Holds the weights under the project's canonical names (`checkpoints/` translates both published layouts into them), with
q, k, v and the heads stacked. Knows nothing of caches, sampling, text or files. Its `forward` runs a whole sequence.

    tokens [R, K, S] -> embeddings [R, S, d] -> L x (self-attention, cross-attention, FFN) -> logits [R, S, K, V]

No Linear of the body has a bias, the norms come first, GELU is the exact (erf) one: the released models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import ModelConfig

EPS = 1e-5


def position_table(num_positions: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Sinusoidal positions [P, d] float32: cosines first, then sines; frequencies 10000 ** -(i / (d/2 - 1)).

    Written in the arithmetic of audiocraft's `create_sin_embedding` (a power and a division in fp32).
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=device)
    position = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None]
    phase = position / torch.full((), 10000.0, device=device) ** (index / (half - 1))
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def embed_tokens(table: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the codebooks' embeddings in fp32: table [K*(V+1), d], tokens [R, K, S] -> [R, S, d]."""
    num_codebooks = tokens.shape[1]
    rows_each = table.shape[0] // num_codebooks
    total = F.embedding(tokens[:, 0], table).float()
    for k in range(1, num_codebooks):
        total = total + F.embedding(tokens[:, k] + k * rows_each, table).float()
    return total


class Layer(nn.Module):
    """One block: causal self-attention, attention to the text (cross models only), feed-forward; pre-norm, residual."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, cross = config.dim, config.conditioning == "cross"
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(d, eps=EPS)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.has_cross = cross
        if cross:
            self.norm_cross = nn.LayerNorm(d, eps=EPS)
            self.cross_q = nn.Linear(d, d, bias=False)
            self.cross_kv = nn.Linear(d, 2 * d, bias=False)
            self.cross_out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d, eps=EPS)
        self.ffn_in = nn.Linear(d, config.ffn_dim, bias=False)
        self.ffn_out = nn.Linear(config.ffn_dim, d, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """[R, S, d] -> [R, H, S, d/H]."""
        return rearrange(x, "r s (h e) -> r h s e", h=self.num_heads)

    def folded_text(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The query projection folded into a text's keys, the values into the output projection: two [R, H, N, d].

        scores = (h Wq) K^T = h (Wq K^T), and (p V) Wo = p (V Wo): the same algebra, with matrices of H * N rows where
        the projections have d, so less to read for N < d / H. The scale 1 / sqrt(d / H) is in the first. keys and
        values are [R, H, N, d/H].
        """
        heads, head_dim = keys.shape[1], keys.shape[3]
        query = self.cross_q.weight.unflatten(0, (heads, head_dim))  # [H, dh, d]
        output = self.cross_out.weight.unflatten(1, (heads, head_dim))  # [d, H, dh]
        to_scores = torch.einsum("rhne,hed->rhnd", keys, query) * head_dim**-0.5
        return to_scores, torch.einsum("rhne,dhe->rhnd", values, output)

    def forward(self, x: Tensor, causal: Tensor, cross: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x [R, S, d]; causal [S, S] bool, True where attended; cross [R, N, d], all of it attended; dtype of the
        products, which is the weights' own."""
        q, k, v = (self.heads(part) for part in self.qkv(self.norm1(x).to(dtype)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        x = x + self.attn_out(rearrange(attended, "r h s e -> r s (h e)")).to(x.dtype)
        if self.has_cross and cross is not None:
            q = self.heads(self.cross_q(self.norm_cross(x).to(dtype)))
            k, v = (self.heads(part) for part in self.cross_kv(cross.to(dtype)).chunk(2, dim=-1))
            attended = F.scaled_dot_product_attention(q, k, v)
            x = x + self.cross_out(rearrange(attended, "r h s e -> r s (h e)")).to(x.dtype)
        return x + self.ffn_out(F.gelu(self.ffn_in(self.norm2(x).to(dtype)))).to(x.dtype)


class Transformer(nn.Module):
    """The language model's weights, with a forward pass over whole sequences.

    `text_proj` (D -> d) and `melody_proj` (12 -> d) turn conditioner outputs into model width; the conditioners apply
    them. Residual stream and norms are fp32 in every precision, as they are in audiocraft under autocast.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, stacked = config.dim, config.num_codebooks
        self.config = config
        self.emb = nn.Embedding(stacked * (config.vocab_size + 1), d)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d, eps=EPS)
        self.heads = nn.Linear(d, stacked * config.vocab_size, bias=False)
        self.text_proj = nn.Linear(config.text.dim, d) if config.text is not None else None
        self.melody_proj = nn.Linear(config.melody.n_chroma, d) if config.melody is not None else None

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: dict[str, Tensor]) -> Transformer:
        """A transformer around `weights` (canonical names, not copied). Missing names or wrong shapes raise."""
        with torch.device("meta"):
            model = cls(config)
        if model.text_proj is not None and "text_proj.weight" not in weights:
            model.text_proj = None  # transformers drops the projection where the text is as wide as the model
        model.load_state_dict(weights, strict=True, assign=True)
        return model.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and logits; of the weights too, unless they are quantised."""
        return self.emb.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.emb.weight.device

    def logits(self, x: Tensor) -> Tensor:
        """Residual [..., d] -> logits [..., K, V] in the model's dtype."""
        return self.heads(self.norm(x).to(self.dtype)).unflatten(-1, (self.config.num_codebooks, -1))

    def forward(self, tokens: Tensor, prefix: Tensor | None = None, cross: Tensor | None = None) -> Tensor:
        """Logits [R, S, K, V] of a whole sequence at once, for rows of equal lengths.

        Args:
            tokens: int64 [R, K, S], the special token included.
            prefix: [R, P, d] prepended to the sequence; positions count it.
            cross: [R, N, d] states that every layer attends to; a row of zeros contributes exactly nothing.
        """
        x = embed_tokens(self.emb.weight, tokens)
        if prefix is not None:
            x = torch.cat([prefix.to(x.dtype), x], dim=1)
        length = x.shape[1]
        x = x + position_table(length, self.config.dim, x.device)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        for layer in self.layers:
            x = layer(x, causal, cross, self.dtype)
        return self.logits(x[:, -tokens.shape[2] :])
