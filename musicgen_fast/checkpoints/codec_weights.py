"""EnCodec's weights, from either published layout to `EnCodec`'s state dict.

Canonical tensors, all float32; i counts stages in the order they run, j residual blocks, l LSTM layers, q codebooks:
    {encoder,decoder}.{first,last}.{weight [C_out, kernel, C_in], bias [C_out]}
    encoder.stages.i.blocks.j.{wide,point}.*, encoder.stages.i.down.*     convolutions in the same form
    decoder.stages.i.up.{weight [stride C_out, 2, C_in], bias [C_out]}    transposed: the earlier input first
    decoder.stages.i.blocks.j.{wide,point}.*
    {encoder,decoder}.lstm.{weight_ih,weight_hh,bias_ih,bias_hh}_ll       as torch.nn.LSTM
    codebooks.q [V, D]
Weight norm is folded here. Reads no files: callers pass mappings of tensors. Configurations: `codec_config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import CodecConfig
from ..errors import CheckpointError
from .codec_config import codec_config_from_audiocraft, codec_config_from_transformers
from .files import checked_tensor

__all__ = ["canonical_codec_weights", "codec_config_from_audiocraft", "codec_config_from_transformers"]

_PREFIX = "audio_encoder."
_TRAINING_ONLY = (".inited", ".cluster_size", ".embed_avg")
_LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
# the tensors that make up a convolution's weight: folded, torch's old weight norm, its present one
_FORMS = (
    ("weight",),
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


@dataclass(frozen=True)
class _Layer:
    """A layer with weights: its canonical name, and its place and shape in the published layouts."""

    name: str  # e.g. decoder.stages.0.blocks.0.wide
    kind: str  # conv | up | lstm | codebook
    place: str  # index in its side's sequential, with .block.N inside residual blocks; of a codebook: its number
    shape: tuple[int, ...]  # of the published weight; of an LSTM: (width, layers)

    def published(self, layout: str) -> str:
        """The name that the layer's tensors share, without the last dot."""
        old = layout == "audiocraft"
        if self.kind == "codebook":
            return f"quantizer.vq.layers.{self.place}._codebook" if old else f"quantizer.layers.{self.place}.codebook"
        inner = {"lstm": "lstm", "up": "convtr.convtr" if old else "conv", "conv": "conv.conv" if old else "conv"}
        return f"{self.name.split('.')[0]}.{'model' if old else 'layers'}.{self.place}.{inner[self.kind]}"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor, as the weight is without weight norm."""
        if self.kind == "codebook":
            return {"embed": self.shape}
        if self.kind != "lstm":
            return {"weight": self.shape, "bias": (self.shape[1 if self.kind == "up" else 0],)}
        width, layers = self.shape
        shapes = {name: (4 * width, width) if "weight" in name else (4 * width,) for name in _LSTM}
        return {f"{name}_l{index}": shape for index in range(layers) for name, shape in shapes.items()}


def _layers(config: CodecConfig) -> Iterator[_Layer]:
    """Every layer with weights. Activations have a place of their own in both layouts, hence the gaps."""
    width = config.num_filters
    yield _Layer("encoder.first", "conv", "0", (width, config.channels, config.kernel_size))
    place = 1
    for i, stride in enumerate(reversed(config.ratios)):
        yield from _res_blocks(config, f"encoder.stages.{i}", place, width)
        place += config.num_residual_layers + 2
        yield _Layer(f"encoder.stages.{i}.down", "conv", str(place - 1), (2 * width, width, 2 * stride))
        width *= 2
    if config.lstm_layers:
        yield _Layer("encoder.lstm", "lstm", str(place), (width, config.lstm_layers))
        place += 1
    yield _Layer("encoder.last", "conv", str(place + 1), (config.dimension, width, config.last_kernel_size))

    yield _Layer("decoder.first", "conv", "0", (width, config.dimension, config.kernel_size))
    place = 1
    if config.lstm_layers:
        yield _Layer("decoder.lstm", "lstm", "1", (width, config.lstm_layers))
        place = 2
    for i, stride in enumerate(config.ratios):
        yield _Layer(f"decoder.stages.{i}.up", "up", str(place + 1), (width, width // 2, 2 * stride))
        width //= 2
        yield from _res_blocks(config, f"decoder.stages.{i}", place + 2, width)
        place += config.num_residual_layers + 2
    yield _Layer("decoder.last", "conv", str(place + 1), (config.channels, width, config.last_kernel_size))
    for q in range(config.num_codebooks):
        yield _Layer(f"codebooks.{q}", "codebook", str(q), (config.codebook_size, config.dimension))


def _res_blocks(config: CodecConfig, stage: str, place: int, width: int) -> Iterator[_Layer]:
    hidden = width // config.compress
    for j in range(config.num_residual_layers):
        name, base = f"{stage}.blocks.{j}", f"{place + j}.block"
        yield _Layer(f"{name}.wide", "conv", f"{base}.1", (hidden, width, config.residual_kernel_size))
        yield _Layer(f"{name}.point", "conv", f"{base}.3", (width, hidden, 1))


def canonical_codec_weights(tensors: Mapping[str, Tensor], config: CodecConfig, source: str) -> dict[str, Tensor]:
    """`EnCodec`'s state dict, float32, from the tensors of a file in either layout.

    Args:
        tensors: transformers' names (where some are under `audio_encoder.`, only those are looked at) or audiocraft's;
            weight norm as `weight_g` and `weight_v`, as `parametrizations.weight.original0` and `1`, or folded.
        source: the file, for messages.

    Raises:
        CheckpointError: a missing tensor (the first few are named), a wrong shape, or a tensor without a place.
    """
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors) else ""
    names = {name for name in tensors if name.startswith(prefix) and not name.endswith(_TRAINING_ONLY)}
    audiocraft = any(name.startswith(("encoder.model.", "decoder.model.", "quantizer.vq.")) for name in names)
    layers = [*_layers(config)]
    stems = [prefix + layer.published("audiocraft" if audiocraft else "transformers") for layer in layers]
    parts = [_parts(layer, stem, names) for layer, stem in zip(layers, stems, strict=True)]
    _check_names(names, {name for part in parts for group in part.values() for name in group}, source)
    weights = {}
    for layer, part in zip(layers, parts, strict=True):
        for name, shape in layer.tensors().items():
            found = [checked_tensor(tensors[each], each, source).to(torch.float32) for each in part[name]]
            gain = (shape[0], *(1 for _ in shape[1:]))
            for each, tensor, expected in zip(part[name], found, [gain, shape] if found[1:] else [shape], strict=True):
                if tuple(tensor.shape) != expected:
                    raise CheckpointError(
                        f"{source}: {each} has shape {list(tensor.shape)}, expected {list(expected)}; "
                        "the weights belong to another configuration"
                    )
            plain = _fold(*found) if found[1:] else found[0]
            target = layer.name if layer.kind == "codebook" else f"{layer.name}.{name}"
            weights[target] = _to_canonical(layer, plain) if name == "weight" else plain.clone()
    return weights


def _parts(layer: _Layer, stem: str, names: set[str]) -> dict[str, list[str]]:
    """For each tensor of a layer, the names in the file that it is made of."""
    parts = {name: [f"{stem}.{name}"] for name in layer.tensors()}
    if "weight" in parts:
        forms = [[f"{stem}.{name}" for name in form] for form in _FORMS]
        parts["weight"] = next((form for form in forms if names.intersection(form)), forms[0])
    return parts


def _check_names(names: set[str], wanted: set[str], source: str) -> None:
    missing, unknown = sorted(wanted - names), sorted(names - wanted)
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(f"{source}: lacks the codec's {', '.join(missing[:4])}{more}")
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise CheckpointError(
            f"{source}: the codec has tensors that its configuration has no place for: {', '.join(unknown[:4])}{more}"
        )


def _fold(gain: Tensor, direction: Tensor) -> Tensor:
    """Weight norm over all but the first dimension, for transposed convolutions too (there it is the input)."""
    return direction * (gain / torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True))


def _to_canonical(layer: _Layer, weight: Tensor) -> Tensor:
    if layer.kind == "conv":
        return weight.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    c_in, c_out, kernel = weight.shape
    # output row t stride + j takes tap j of input t and tap stride + j of input t - 1
    taps = weight.reshape(c_in, c_out, 2, kernel // 2).permute(3, 1, 2, 0).flip(2)
    return taps.reshape(kernel // 2 * c_out, 2, c_in)
