"""The ctypes twin of `csrc/sample_args.h`: one draw as the pointers and sizes that the C++ and CUDA samplers read.

Knows the layout of the struct, nothing of its meaning. The tensors must outlive the call that reads the struct.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .draw import Draw

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class SampleArgs(ctypes.Structure):
    """Field for field the C struct; `size` lets a library refuse a caller of another version."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("stride_nb", ctypes.c_int64),
        ("stride_b", ctypes.c_int64),
        ("stride_k", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("NB", ctypes.c_int32),
        ("B", ctypes.c_int32),
        ("K", ctypes.c_int32),
        ("V", ctypes.c_int32),
        ("divide", ctypes.c_int32),
        ("scale", ctypes.c_void_p),
        ("cfg", ctypes.c_void_p),
        ("cfg_beta", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("min_p", ctypes.c_void_p),
        ("noise", ctypes.c_void_p),
        ("seed", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("tokens_are_64_bit", ctypes.c_int32),
        ("S", ctypes.c_int32),
        ("column", ctypes.c_void_p),
        ("frames", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
    ]


def pack(draw: Draw) -> SampleArgs:
    """The struct for a draw whose tensors are as `Draw` says."""
    logits, params = draw.logits, draw.params
    branches, batch, num_codebooks, vocab = logits.shape
    return SampleArgs(
        ctypes.sizeof(SampleArgs),
        logits.data_ptr(),
        *logits.stride()[:3],
        _DTYPES[logits.dtype],
        branches,
        batch,
        num_codebooks,
        vocab,
        draw.divide,
        (params.divisor if draw.divide else params.scale).data_ptr(),
        params.cfg_coef.data_ptr(),
        params.cfg_coef_beta.data_ptr(),
        params.top_k.data_ptr() if params.any_top_k else None,
        params.top_p.data_ptr() if params.any_top_p else None,
        params.min_p.data_ptr() if params.any_min_p else None,
        _pointer(draw.noise),
        _pointer(draw.seed),
        _pointer(draw.step),
        _pointer(draw.stream),
        draw.tokens.data_ptr(),
        draw.tokens.dtype == torch.int64,
        draw.tokens.shape[2] if draw.column is not None else 1,
        _pointer(draw.column),
        _pointer(draw.frames),
        draw.status.data_ptr(),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
