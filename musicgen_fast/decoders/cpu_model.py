"""A `Transformer` of which only the packed form exists: what conditioners and scripts ask of one, on a CPU decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..model import EPS
from ..packing import PackedWeights
from .cpu import CpuDecoder


class PackedTransformer(nn.Module):
    """The conditioners' projections, the last norm, and a forward pass in the decoder's own arithmetic.

    Attributes: `config`, `decoder`, `text_proj`, `melody_proj`, `norm`. The other weights exist only packed:
    `packing.unpack_weights` gives them back.
    """

    def __init__(self, packed: PackedWeights, *, threads: int | None = None):
        super().__init__()
        self.config: ModelConfig = packed.config
        self.packed = packed
        self.decoder = CpuDecoder(packed, threads=threads)
        self.norm = nn.LayerNorm(self.config.dim, eps=EPS)
        self.norm.weight = nn.Parameter(packed.tensors["norm.weight"].view(torch.float32), requires_grad=False)
        self.norm.bias = nn.Parameter(packed.tensors["norm.bias"].view(torch.float32), requires_grad=False)
        self.text_proj = _projection(packed, "text_proj")
        self.melody_proj = _projection(packed, "melody_proj")
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream and the logits."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def forward(self, tokens: Tensor, prefix: Tensor | None = None, cross: Tensor | None = None) -> Tensor:
        """Logits [R, S, K, V] of a whole sequence at once; arguments as `Transformer.forward`."""
        return self.decoder.logits(tokens, prefix, cross)


def _projection(packed: PackedWeights, name: str) -> nn.Linear | None:
    weight = packed.projections.get(f"{name}.weight")
    if weight is None:
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.load_state_dict({"weight": weight, "bias": packed.projections[f"{name}.bias"]}, assign=True)
    return linear.requires_grad_(False)
