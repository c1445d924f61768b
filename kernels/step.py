"""The kernels of a decoding step in Triton, under the names and with the arguments of their definitions, reference.py.

Imports only. `sample_rows` has its definition in the sampler: musicgen_fast/sampling/reference.py.
"""

from __future__ import annotations

from .attention import attention
from .cross import absorbed_output, absorbed_scores, cross_attention
from .embed import advance, embed
from .linear import linear_parts, norm_linear
from .sample import sample_rows

__all__ = [
    "absorbed_output",
    "absorbed_scores",
    "advance",
    "attention",
    "cross_attention",
    "embed",
    "linear_parts",
    "norm_linear",
    "sample_rows",
]
