"""The demo codec's quantiser while it trains: k-means start, moving-average codebooks, dead codes replaced.

Latents are float32 [B, D, T]; codes int64 [B, K, T]. Each book quantises what the ones before left over, by the nearest
entry, as transformers and `musicgen_fast.codec` do afterwards. Codebooks learn without gradients; the encoder's pass
straight through. It knows neither the network nor the losses. All randomness comes from generators that callers pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_POOL = 4096  # residuals a book remembers, to revive codes from: 16 batches
_DEAD = 0.1  # of the mean use: below it a code is replaced
_ROUNDS = 15  # of k-means


class ResidualBooks(nn.Module):
    """K codebooks of V entries of D numbers, none learnt by gradients; unusable until `start`."""

    entries: Tensor  # [K, V, D]
    uses: Tensor  # [K, V], moving averages of hits a batch
    sums: Tensor  # [K, V, D], moving averages of the residuals that hit
    pool: Tensor  # [K, P, D], a ring of recent residuals
    cursor: Tensor  # [], where the ring goes on
    spread: Tensor  # [], variance of the latents at `start`; 0 before

    def __init__(self, books: int, codes: int, dim: int, decay: float = 0.98) -> None:
        super().__init__()
        self.decay = decay
        shapes = {"entries": (codes, dim), "uses": (codes,), "sums": (codes, dim), "pool": (_POOL, dim)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(books, *shape))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))
        self.register_buffer("spread", torch.zeros(()))

    @property
    def ready(self) -> bool:
        return bool(self.spread > 0)

    @torch.no_grad()
    def start(self, latents: Tensor, per_batch: int, generator: torch.Generator) -> None:
        """k-means of each book on what the books before it leave of latents [N, D], N at least V.

        `per_batch` is how many latents a training step will bring, the unit of `uses`.
        """
        count, codes = len(latents), self.entries.shape[1]
        if count < codes:
            raise ValueError(f"{count} latents are too few for {codes} codes")
        residual = latents.float()
        # Of the fixed size, so that latents cannot lower their commitment by growing. Never 0, which means not started.
        self.spread.copy_(residual.var(0).mean().clamp(min=1e-12))
        for k in range(len(self.entries)):
            entries = _k_means(residual, codes, generator)
            hits = _nearest(residual, entries)
            self.entries[k] = entries
            self.uses[k] = torch.bincount(hits, minlength=codes) * (per_batch / count)
            self.sums[k] = entries * self.uses[k, :, None]
            self.pool[k] = residual[torch.randint(count, (_POOL,), generator=generator)]
            residual = residual - entries[hits]

    def forward(self, latents: Tensor, books: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise latents [B, D, T], item b with its first books[b] books (all if None).

        Returns:
            quantised [B, D, T] with the gradient of latents; codes [B, K, T] of all books; commitment, the mean square
            error in units of `spread`, whose gradient goes to the latents.
        """
        latents = latents.float()
        codes, total = self.encode(latents.detach(), books)
        commitment = (latents - total).square().mean() / self.spread
        return latents + (total - latents).detach(), codes, commitment

    @torch.no_grad()
    def encode(self, latents: Tensor, books: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents [B, D, T] -> codes [B, K, T] and the sum of the entries used, [B, D, T]."""
        batch, dim, frames = latents.shape
        residual = latents.transpose(1, 2).reshape(-1, dim)
        total, codes = torch.zeros_like(residual), []
        for k, entries in enumerate(self.entries):
            hits = _nearest(residual, entries)
            found = entries[hits]
            residual = residual - found
            if books is not None:
                found = found * (books > k).repeat_interleave(frames)[:, None]
            total += found
            codes.append(hits.view(batch, frames))
        return torch.stack(codes, 1), total.view(batch, frames, dim).transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, K, T] -> [B, D, T]."""
        return sum(self.entries[k][codes[:, k]] for k in range(codes.shape[1])).transpose(1, 2)

    @torch.no_grad()
    def learn(self, latents: Tensor, codes: Tensor) -> None:
        """Move the entries towards the residuals of latents [B, D, T] that chose them; codes from `forward`."""
        residual = latents.detach().float().transpose(1, 2).reshape(-1, latents.shape[1])
        gain = 1 - self.decay
        ones = torch.full((len(residual),), gain)
        places = (self.cursor + torch.arange(len(residual))) % _POOL
        for k in range(len(self.entries)):
            hits, before = codes[:, k].reshape(-1), self.entries[k]
            self.pool[k, places] = residual
            left = residual - before[hits]  # by the entries that made the codes
            self.uses[k].mul_(self.decay).index_add_(0, hits, ones)
            self.sums[k].mul_(self.decay).index_add_(0, hits, residual, alpha=gain)
            torch.div(self.sums[k], self.uses[k, :, None].clamp(min=1e-9), out=before)
            residual = left
        self.cursor.copy_((self.cursor + codes.shape[0] * codes.shape[2]) % _POOL)

    @torch.no_grad()
    def revive(self, generator: torch.Generator) -> int:
        """Put codes hardly used where recent residuals are, and give them the mean use; how many there were."""
        replaced = 0
        for k in range(len(self.entries)):
            mean = float(self.uses[k].mean())
            dead = (self.uses[k] < _DEAD * mean).nonzero()[:, 0]
            picks = torch.randint(_POOL, (len(dead),), generator=generator)
            self.entries[k, dead] = self.pool[k, picks]
            self.uses[k, dead] = mean
            self.sums[k, dead] = self.entries[k, dead] * mean
            replaced += len(dead)
        return replaced

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Into the quantiser of a transformers EncodecModel; its copy for training (embed_avg) too."""
        for entries, uses, layer in zip(self.entries, self.uses, model.quantizer.layers, strict=True):
            book = layer.codebook
            book.embed.copy_(entries)
            book.embed_avg.copy_(entries)
            book.cluster_size.copy_(uses)


def _nearest(points: Tensor, entries: Tensor) -> Tensor:
    """[N, D], [V, D] -> [N]. |x|^2 is left out: it is the same for every entry."""
    return torch.addmm(entries.square().sum(1), points, entries.t(), alpha=-2).argmin(1)


def _k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[N, D] -> [count, D]. An empty cluster restarts at a random point."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(_ROUNDS):
        hits = _nearest(points, centres)
        sizes = torch.bincount(hits, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, hits, points)
        centres = sums / sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero()[:, 0]
        centres[empty] = F.embedding(torch.randint(len(points), (len(empty),), generator=generator), points)
    return centres
