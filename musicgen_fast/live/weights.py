"""A `Transformer` around the parameters of a live model: used where they lie if the layouts agree, stacked otherwise.

Knows names and shapes, not the two libraries. What decides about sharing: ours stacks q, k, v (transformers keeps three
matrices), the embeddings and the heads of the K codebooks, and keeps norms in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.layout import expected_shapes, stays_float32
from ..config import ModelConfig
from ..model import Transformer


@dataclass(frozen=True)
class Weights:
    """The transformer, and how many bytes of it belong to the live model and to us."""

    transformer: Transformer
    shared_bytes: int
    extra_bytes: int


def fingerprint(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Changes when a tensor is replaced, moved, converted or written to (`.data` apart): 0.2 us a tensor."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors)


def convert(
    config: ModelConfig,
    names: Iterable[tuple[str, list[str]]],
    tensors: Mapping[str, Tensor],
    kind: type[Transformer] = Transformer,
) -> Weights:
    """Our transformer around `tensors`.

    Args:
        names: (canonical name, live names whose rows make it up).
        tensors: every parameter of the live language model; none may be left over.

    Raises:
        ValueError: a parameter that is missing, left over, of another shape, quantized, offloaded, or elsewhere.
    """
    shapes = dict(expected_shapes(config))
    plan = dict(names)
    _check(plan, tensors)
    dtype = tensors[plan["layers.0.attn_out.weight"][0]].dtype
    weights, shared, extra = {}, 0, 0
    for name, sources in plan.items():
        parts = [_rows(name, tensors[source].detach(), config.dim) for source in sources]
        found = sum(len(p) for p in parts), *parts[0].shape[1:]
        if found != shapes[name]:
            raise ValueError(f"{sources[0]} has {list(found)} numbers where {list(shapes[name])} were expected")
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = joined.to(torch.float32 if stays_float32(name, joined.dim()) else dtype)
        if tensor.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr():
            shared += tensor.nbytes
        else:
            extra += tensor.nbytes
        weights[name] = tensor
    return Weights(kind.from_weights(config, weights), shared, extra)


def _rows(name: str, tensor: Tensor, dim: int) -> Tensor:
    """audiocraft stacks q, k, v of cross-attention, of which ours keeps q apart."""
    if name.endswith("cross_q.weight") and len(tensor) == 3 * dim:
        return tensor[:dim]
    if name.endswith("cross_kv.weight") and len(tensor) == 3 * dim:
        return tensor[dim:]
    return tensor


def _check(plan: Mapping[str, list[str]], tensors: Mapping[str, Tensor]) -> None:
    wanted = {source for sources in plan.values() for source in sources}
    missing, left = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or left:
        what = f"lacks {_some(missing)}" if missing else f"holds {_some(left)}"
        raise ValueError(
            f"the model {what}: it has other parts than a MusicGen (adapters, quantized layers, biases, ...), which "
            "musicgen_fast does not compute; merge adapters before"
        )
    device = tensors[min(wanted)].device
    for name in wanted:
        tensor = tensors[name].detach()
        if type(tensor) is not Tensor or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(f"{name} is no plain tensor of real numbers ({tensor.dtype}): quantized weights?")
        if tensor.device != device or device.type == "meta":
            raise ValueError(f"{name} lies on {tensor.device}: all weights must be on one device, none offloaded")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
