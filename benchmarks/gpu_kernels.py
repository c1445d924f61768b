"""Two Triton kernels that measure a GPU rather than a model: reading a buffer once, and a link of a dependent chain.

Nothing here knows of decoders. Sizes: a read takes buffers of whole `PIECE`s of fp32, a link 128 numbers a CTA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, ROUNDS = 4096, 8
PIECE = BLOCK * ROUNDS  # 128 KB a CTA
LINK = 128


@triton.jit
def read_kernel(buffer, sums, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (BLOCK * ROUNDS)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(ROUNDS):
        total += tl.load(buffer + first + part * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read(buffer: Tensor, sums: Tensor) -> None:
    """Read fp32 `buffer` once; `sums` gets the sum of every piece, so that nothing is optimised away."""
    read_kernel[(buffer.numel() // PIECE,)](buffer, sums, BLOCK=BLOCK, ROUNDS=ROUNDS, num_warps=8)


@triton.jit
def link_kernel(source, target, LINK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0) * LINK + tl.arange(0, LINK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.store(target + at, tl.load(source + at) + 1.0)


def link(source: Tensor, target: Tensor, pdl: bool) -> None:
    """target = source + 1: as little as a kernel can do that depends on the one before it."""
    options = {"launch_pdl": True} if pdl else {}
    link_kernel[(source.numel() // LINK,)](source, target, LINK=LINK, PDL=pdl, num_warps=4, **options)


def chain(buffers: tuple[Tensor, Tensor], length: int, pdl: bool) -> None:
    """So many dependent kernels, to and fro; an even length ends in the first buffer."""
    with torch.cuda.device_of(buffers[0]):
        for number in range(length):
            link(buffers[number % 2], buffers[1 - number % 2], pdl)
