"""Weights in huge pages: one private mapping for all parameters of a module, on Linux CPUs.

A decoding step streams every weight once, so it runs at the speed of the memory, and with 4 KB pages part of that time
goes into page walks. 2 MB pages have to be asked for (`madvise`); torch's allocator does not ask.
"""

from __future__ import annotations

import mmap

import torch
from torch import nn

_ALIGN = 64  # bytes: a cache line, and one AVX-512 load
_HUGE = 2 << 20


def move_to_huge_pages(module: nn.Module) -> bool:
    """Copy the parameters of `module` (on the CPU) into one huge-page mapping, one after the other.

    At most one parameter exists twice at a time, where nothing else holds the old ones. Returns False, with nothing
    changed, where the system has no such pages.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    parameters = [p for p in module.parameters() if p.device.type == "cpu"]
    sizes = [-(-p.numel() * p.element_size() // _ALIGN) * _ALIGN for p in parameters]
    if not parameters:
        return False
    try:
        # MAP_PRIVATE: Python's default, MAP_SHARED, is shared memory, which gets no transparent huge pages
        arena = mmap.mmap(-1, sum(sizes) + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        arena.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without transparent huge pages, or no memory to reserve: keep what is there
        return False
    memory = torch.frombuffer(arena, dtype=torch.uint8)  # keeps the mapping alive as long as a view of it lives
    offset = -memory.data_ptr() % _HUGE
    for parameter, size in zip(parameters, sizes, strict=True):
        place = memory[offset : offset + parameter.numel() * parameter.element_size()]
        copy = place.view(parameter.dtype).view(parameter.shape)
        copy.copy_(parameter.data)
        parameter.data = copy
        offset += size
    return True
