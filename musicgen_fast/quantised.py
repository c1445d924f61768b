"""Linear layers that keep 8 bits of each weight: the int8 precision of GPUs. The CPU's is in `packing.py`.

A group of columns of a row shares a scale, its largest magnitude / 127. The kernels multiply whole numbers and scale
the sum of a group; where a whole sequence goes through (prefixes, prompts), the weights are made halves again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import Transformer

GROUP = 128  # columns; what the CPU decoder has, whose quality is measured


class QuantisedLinear(nn.Module):
    """Stands for a `Linear` without bias. Attributes: weight int8 [M, K], scales fp32 [M, K / group]."""

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, group: int = GROUP):
        super().__init__()
        self._dtype = linear.weight.dtype
        grouped = linear.weight.float().unflatten(1, (-1, group))
        scales = grouped.abs().amax(-1) / 127
        weight = (grouped / scales.clamp(min=1e-30)[..., None]).round().to(torch.int8)
        self.register_buffer("weight", weight.flatten(1))
        self.register_buffer("scales", scales)

    def dense(self) -> Tensor:
        """[M, K] in the dtype that the weights had."""
        grouped = self.weight.float().unflatten(1, (self.scales.shape[1], -1))
        return (grouped * self.scales[..., None]).flatten(1).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense())


def quantise(transformer: Transformer) -> None:
    """Replace the matrices of the layers and the heads, one by one; embeddings, norms and conditioners stay."""
    for module in [transformer, *transformer.layers]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name not in ("text_proj", "melody_proj"):
                group = next((g for g in (GROUP, 64, 32, 16) if child.in_features % g == 0), None)
                if group is not None:
                    setattr(module, name, QuantisedLinear(child, group))
