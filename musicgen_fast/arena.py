"""Memory in huge pages on Linux CPUs: for weights, which a decoding step streams from end to end.

A step runs at the speed of the memory, and with 4 KB pages part of that time goes into page walks. 2 MB pages have to
be asked for (`madvise`); torch's allocator does not ask.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

_ALIGN = 64  # bytes: a cache line, and one AVX-512 load
_HUGE = 2 << 20


def aligned(size: int) -> int:
    """A number of bytes, rounded up to whole cache lines."""
    return -(-size // _ALIGN) * _ALIGN


def huge_pages(size: int) -> Tensor | None:
    """uint8 [size] of zeros on a 2 MB boundary; None where the system has no such pages.

    Views of it keep the mapping alive. Nothing is taken from the machine before it is written.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or size <= 0:
        return None
    try:
        # MAP_PRIVATE: Python's default, MAP_SHARED, is shared memory, which gets no transparent huge pages
        arena = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        arena.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without transparent huge pages, or no memory to reserve
        return None
    memory = torch.frombuffer(arena, dtype=torch.uint8)
    offset = -memory.data_ptr() % _HUGE
    return memory[offset : offset + size]


def allocate(size: int) -> Tensor:
    """uint8 [size] on a 64-byte boundary, in huge pages where there are any. MemoryError where there is no room."""
    memory = huge_pages(size)
    if memory is not None:
        return memory
    try:
        memory = torch.empty(size + _ALIGN, dtype=torch.uint8)
    except RuntimeError as error:  # torch has no MemoryError of its own
        raise MemoryError(f"no room for {size / 2**20:.0f} MiB of weights: {error}") from None
    offset = -memory.data_ptr() % _ALIGN
    return memory[offset : offset + size]


def move_to_huge_pages(module: nn.Module) -> bool:
    """Copy the parameters of `module` (on the CPU) into one huge-page mapping, one after the other.

    At most one parameter exists twice at a time, where nothing else holds the old ones. Returns False, with nothing
    changed, where the system has no such pages.
    """
    parameters = [p for p in module.parameters() if p.device.type == "cpu"]
    sizes = [aligned(p.numel() * p.element_size()) for p in parameters]
    memory = huge_pages(sum(sizes))
    if memory is None:
        return False
    offset = 0
    for parameter, size in zip(parameters, sizes, strict=True):
        place = memory[offset : offset + parameter.numel() * parameter.element_size()]
        copy = place.view(parameter.dtype).view(parameter.shape)
        copy.copy_(parameter.data)
        parameter.data = copy
        offset += size
    return True
