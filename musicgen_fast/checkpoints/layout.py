"""The canonical names and shapes of a model, and the assembly of canonical tensors from the pieces a file holds.

Both published layouts are translated here: an adapter says which tensors of the file make up each canonical one (a
`Piece` is a range of rows), `check` compares all names and shapes before anything is read, `assemble` copies piece by
piece into place. Letters: K codebooks, V vocabulary, d width, D width of the text encoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig, StyleConfig
from ..errors import CheckpointError
from .files import TensorFiles

__all__ = [
    *("Edits", "Piece", "assemble", "check", "check_nothing_left", "expected_shapes"),
    *("stays_float32", "style_shapes"),
]

Shape = tuple[int, ...]
# canonical name -> a change of that tensor, in place, while it is float32 (an adapter's update)
Edits = Mapping[str, Callable[[Tensor], None]]


def expected_shapes(config: ModelConfig) -> list[tuple[str, Shape]]:
    """(canonical name, shape) of every tensor of the language model, in order.

    `text_proj` is always listed; transformers' files lack it where the text is as wide as the model (identity).
    """
    d, stacked = config.dim, config.num_codebooks
    shapes: list[tuple[str, Shape]] = [("emb.weight", (stacked * (config.vocab_size + 1), d))]
    for i in range(config.num_layers):
        shapes += [(f"layers.{i}.{name}", shape) for name, shape in _layer_shapes(config)]
    shapes += [*_norm("norm", d), ("heads.weight", (stacked * config.vocab_size, d))]
    if config.text is not None:
        shapes += [("text_proj.weight", (d, config.text.dim)), ("text_proj.bias", (d,))]
    if config.melody is not None:
        shapes += [("melody_proj.weight", (d, config.melody.n_chroma)), ("melody_proj.bias", (d,))]
    return shapes


def _norm(name: str, width: int) -> list[tuple[str, Shape]]:
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def _layer_shapes(config: ModelConfig) -> list[tuple[str, Shape]]:
    d, ffn = config.dim, config.ffn_dim
    shapes = [*_norm("norm1", d), ("qkv.weight", (3 * d, d)), ("attn_out.weight", (d, d))]
    if config.conditioning == "cross":
        shapes += [*_norm("norm_cross", d), ("cross_q.weight", (d, d))]
        shapes += [("cross_kv.weight", (2 * d, d)), ("cross_out.weight", (d, d))]
    return [*shapes, *_norm("norm2", d), ("ffn_in.weight", (ffn, d)), ("ffn_out.weight", (d, ffn))]


def style_shapes(config: StyleConfig, dim: int) -> list[tuple[str, Shape]]:
    """(name, shape) of the style conditioner's tensors, audiocraft's names without their prefix; `dim` is d.

    The bookkeeping of the codebooks (`inited`, `cluster_size`, `embed_avg`) is not listed: inference does not use it.
    """
    inner, ffn = config.dim, config.ffn_dim
    shapes: list[tuple[str, Shape]] = [("output_proj.weight", (dim, inner)), ("output_proj.bias", (dim,))]
    shapes += [("embed.weight", (inner, config.feature_dim)), ("embed.bias", (inner,))]
    for i in range(config.num_layers):
        layer = f"transformer.layers.{i}."
        shapes += [(layer + "self_attn.in_proj_weight", (3 * inner, inner))]
        shapes += [(layer + "self_attn.out_proj.weight", (inner, inner))]
        shapes += [(layer + "linear1.weight", (ffn, inner)), (layer + "linear2.weight", (inner, ffn))]
        shapes += [*_norm(layer + "norm1", inner), *_norm(layer + "norm2", inner)]
    for q in range(config.num_codebooks):
        shapes.append((f"rvq.vq.layers.{q}._codebook.embed", (config.codebook_size, inner)))
    if config.batch_norm:
        shapes += [("batch_norm.running_mean", (inner,)), ("batch_norm.running_var", (inner,))]
    return shapes


def stays_float32(name: str, ndim: int) -> bool:
    """Norms and the conditioners' projections are kept in fp32 in every precision (small, and they decide accuracy)."""
    return ndim < 2 or name.startswith(("text_proj.", "melody_proj."))


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of the tensor `name` of a file, whose whole shape must be `shape`."""

    name: str
    shape: Shape
    start: int
    stop: int

    @classmethod
    def whole(cls, name: str, shape: Shape) -> Piece:
        return cls(name, shape, 0, shape[0])


Plan = dict[str, list[Piece]]


def check(plan: Plan, tensors: TensorFiles) -> None:
    """Every piece is there, has its shape and holds real numbers; nothing is read.

    Raises:
        CheckpointError: naming the file and the first keys at fault.
    """
    pieces = list(dict.fromkeys(piece for parts in plan.values() for piece in parts))
    missing = [piece.name for piece in pieces if piece.name not in tensors]
    if missing:
        raise CheckpointError(f"{tensors.label} lacks {_listed(missing)}; it is incomplete or of another model")
    for piece in pieces:
        shape = tensors.shape(piece.name)
        if shape != piece.shape:
            raise CheckpointError(
                f"{tensors.where(piece.name)}: {piece.name!r} has shape {list(shape)}, the configuration asks for "
                f"{list(piece.shape)}; the weights and the configuration belong to different models"
            )


def check_nothing_left(tensors: TensorFiles, known: Iterable[str]) -> None:
    """CheckpointError naming the tensors of the file that are not `known`: a model that we would compute wrongly."""
    left = sorted(set(tensors) - set(known))
    if left:
        raise CheckpointError(
            f"{tensors.where(left[0])} holds {_listed(left)}, which no supported MusicGen has; "
            "the model has parts that this package does not compute"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def assemble(
    plan: Plan, tensors: TensorFiles, dtype: torch.dtype | None, edits: Edits | None = None
) -> dict[str, Tensor]:
    """Canonical tensors in memory of their own, matrices in `dtype` (None: as stored), the rest in float32.

    Each source is let go of after its last use, so the peak is the result and one tensor of the file. A tensor with an
    edit is put together in float32, edited, and only then rounded.
    """
    edits = edits or {}
    uses = Counter(piece.name for parts in plan.values() for piece in parts)
    absent = sorted(set(edits) - set(plan))
    if absent:
        raise CheckpointError(f"{tensors.label} has no {_listed(absent)}, which the adapter updates")
    result: dict[str, Tensor] = {}
    for name, parts in plan.items():
        rows = sum(piece.stop - piece.start for piece in parts)
        shape = (rows, *parts[0].shape[1:])
        wanted = torch.float32 if stays_float32(name, len(shape)) else dtype
        held = torch.float32 if name in edits else wanted
        target: Tensor | None = None
        done = 0
        for piece in parts:
            source = tensors.real(piece.name)
            wanted = wanted or source.dtype
            target = torch.empty(shape, dtype=held or source.dtype) if target is None else target
            target[done : done + piece.stop - piece.start].copy_(source[piece.start : piece.stop])
            done += piece.stop - piece.start
            uses[piece.name] -= 1
            if not uses[piece.name]:
                tensors.release(piece.name)
        assert target is not None
        if name in edits:
            edits[name](target)
        result[name] = target.to(wanted)
    return result
