"""The door to what is compiled: the C++ extension `_C` and the CUDA library, loaded when first asked and never before.

Knows where either may be missing (no compiler at install, or turned off with MUSICGEN_FAST_NATIVE=0) and says why.
Knows nothing of sampling: a draw is a struct (csrc/sample_args.h) that the caller fills. The plain-torch twins, which
give the same bits, are `philox.py` and `sampling/reference.py`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["available", "cuda_sample", "cuda_why_not", "extension", "sample", "why_not"]

CUDA_LIBRARY = Path(__file__).with_name("_cuda.dll" if sys.platform == "win32" else "_cuda.so")


def available() -> bool:
    """Whether the C++ functions of this module can be called."""
    return not why_not()


def why_not() -> str:
    """Why `available()` is False, in a sentence that says what to do; empty where it is True."""
    if os.environ.get("MUSICGEN_FAST_NATIVE", "1") == "0":
        return "turned off by MUSICGEN_FAST_NATIVE=0"
    return _load()[1]


def extension() -> Any:
    """The module `_C` itself. Raises RuntimeError with the reason where there is none."""
    reason = why_not()
    if reason:
        raise RuntimeError(f"musicgen_fast was asked for its C++ extension, which is missing: {reason}")
    return _load()[0]


def sample(args: ctypes.Structure) -> None:
    """Draws one column on the CPU with torch's number of threads; `args` is a filled SampleArgs."""
    _load()[0].sample(ctypes.addressof(args), torch.get_num_threads())


def cuda_why_not(device: torch.device) -> str:
    """Why `cuda_sample` cannot serve `device`; empty where it can."""
    if os.environ.get("MUSICGEN_FAST_NATIVE", "1") == "0":
        return "turned off by MUSICGEN_FAST_NATIVE=0"
    return _load_cuda()[1] or _cuda_device_problem(device.index if device.index is not None else 0)


def cuda_sample(args: ctypes.Structure, device: torch.device) -> None:
    """Draws one column on `device`, on torch's current stream; returns at once. RuntimeError if the launch failed."""
    library = _load_cuda()[0]
    with torch.cuda.device(device):
        code = library.mgf_sample(ctypes.byref(args), ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream))
    if code != 0:
        message = library.mgf_error_string(code).decode()
        raise RuntimeError(f"the CUDA sampler could not be launched on {device}: {message} (error {code})")


@functools.cache
def _load() -> tuple[Any, str]:
    """(module, "") or (None, reason)."""
    try:
        return importlib.import_module("musicgen_fast._C"), ""
    except ImportError as error:
        return None, (
            f"musicgen_fast._C cannot be imported ({error}). Plain torch does its work. To build it, install a C++17 "
            "compiler, then: pip install -v --no-cache-dir --force-reinstall --no-deps musicgen-fast"
        )


@functools.cache
def _load_cuda() -> tuple[Any, str]:
    """(library, "") or (None, reason)."""
    if not CUDA_LIBRARY.exists():
        return None, (
            "the CUDA library was not built, because nvcc was not found at install; Triton or torch serves. To build "
            "it, put nvcc on PATH, then: pip install -v --no-cache-dir --force-reinstall --no-deps musicgen-fast"
        )
    try:
        library = ctypes.CDLL(str(CUDA_LIBRARY))
    except OSError as error:
        return None, f"{CUDA_LIBRARY.name} cannot be loaded: {error}"
    library.mgf_sample.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.mgf_sample.restype = ctypes.c_int
    library.mgf_usable.argtypes = []
    library.mgf_usable.restype = ctypes.c_int
    library.mgf_error_string.argtypes = [ctypes.c_int]
    library.mgf_error_string.restype = ctypes.c_char_p
    return library, ""


@functools.cache
def _cuda_device_problem(index: int) -> str:
    """Whether the library holds code that this device and its driver run."""
    library = _load_cuda()[0]
    with torch.cuda.device(index):
        code = library.mgf_usable()
    return f"the CUDA library has no code for this device: {library.mgf_error_string(code).decode()}" if code else ""
