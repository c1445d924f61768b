"""The CUDA library as an install builds it, without a GPU: it loads, and its machine code is what the source asks for.

Needs nvcc, and cuobjdump for the machine code. That the source is right is for test_cuda_source.py.
"""

from __future__ import annotations

import ctypes
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from .cuda_source_tools import build_with_setup, cuobjdump, machine_code

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build_with_setup(tmp_path_factory.mktemp("cuda"))


@needs_nvcc
def test_the_library_loads_where_there_is_no_gpu(built):
    """It must say why it cannot draw, in words, because a GPU may be missing or its driver too old."""
    library = ctypes.CDLL(str(built))
    library.mgf_error_string.restype = ctypes.c_char_p
    code = library.mgf_usable()
    assert code == 0 or not torch.cuda.is_available()
    assert len(library.mgf_error_string(code)) > 5
    assert library.mgf_sample(None, None) == 1
    assert built.stat().st_size < 2_000_000


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is neither on PATH nor in a Triton wheel")
def test_machine_code(built, capsys):
    """Room for two blocks of 2048 tokens on every multiprocessor, no spills, and not one fused multiply-add."""
    code = machine_code(built)
    lines = ["", f"{built.name}: {built.stat().st_size / 1024:.0f} KiB"]
    lines += ["        registers  stack  shared  instructions  barriers  shuffles"]
    for architecture, kernel in code.items():
        kinds = Counter(name.split(".")[0] for name in kernel.instructions)
        lines.append(
            f"sm_{architecture:<5}{kernel.registers:9}{kernel.stack + kernel.local:7}{kernel.shared:8}"
            f"{len(kernel.instructions):14}{kinds['BAR']:10}{kinds['SHFL']:10}"
        )
    with capsys.disabled():
        print("\n".join(lines))
    assert len(code) >= 2
    for architecture, kernel in code.items():
        fused = {name for name in kernel.instructions if name.startswith(("FFMA", "DFMA", "MUFU"))}
        spills = {name for name in kernel.instructions if name.startswith(("LDL", "STL"))}
        assert not fused and not spills, (architecture, fused, spills)
        assert kernel.stack == kernel.local == 0
        assert kernel.registers <= 128 and kernel.shared <= 16 * 1024
        assert len(kernel.instructions) <= 5000
