"""A LoRA adapter of PEFT (`adapter_config.json`, `adapter_model.safetensors`), added to a model's weights as they load.

The update is computed in float32 and added before a matrix is cast, so a merged model costs nothing at run time. Module
names are those of transformers' MusicGen, of its decoder or T5 alone, or of audiocraft's language model; a module that
the model does not have is refused. Trained copies of whole tensors (`modules_to_save`, biases) are put in as well.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from .adapter_config import LoraConfig
from .checkpoint import TextSource
from .files import TensorFiles, read_json
from .layout import Edits, expected_shapes
from .sources import open_source

__all__ = ["Adapter"]

log = logging.getLogger(__name__)

_FACTOR = re.compile(r"(.+)\.lora_(?:(A|B)(?:\.default)?\.weight|embedding_(A|B)(?:\.default)?)")
_TEXT = ("text_encoder.", "condition_provider.conditioners.description.t5.")
Change = Callable[[Tensor], None]  # in place, on float32


@dataclass(frozen=True)
class _Update:
    """One tensor's change: B A times a scale (transposed for a table of embeddings), or a trained copy blended in."""

    name: str  # of the tensor, as in the model that was trained
    files: tuple[str, ...]  # A and B, or the copy
    table: bool = False

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


class Adapter:
    """An adapter, opened: `edits` for the language model, `edit_text` for the T5."""

    def __init__(self, config: LoraConfig, tensors: TensorFiles, scale: float, label: str) -> None:
        self.config, self.tensors, self.scale, self.label = config, tensors, scale, label
        self._updates = list(self._parse())
        if not self._updates:
            raise CheckpointError(f"{tensors.label} holds no LoRA weights")
        self._text = [update for update in self._updates if _text_name(update.name) is not None]

    @classmethod
    def open(cls, place: str | os.PathLike[str], scale: float = 1.0, cache_dir: str | Path | None = None) -> Adapter:
        """The adapter in a folder or hub repository; nothing of it is applied yet.

        Args:
            scale: multiplies the whole difference from the base; 0 leaves the base, 1 is the adapter as trained.

        Raises:
            TypeError, ValueError: a scale that is no finite number.
            CheckpointError: no adapter there, or one that is not plain LoRA.
        """
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"adapter_scale must be a number, got {type(scale).__name__}")
        if not math.isfinite(scale):
            raise ValueError(f"adapter_scale must be finite, got {scale}")
        source = open_source(place, cache_dir=cache_dir)
        path = source.find("adapter_config.json")
        if path is None:
            raise source.missing("adapter_config.json")
        config = LoraConfig(read_json(path), str(path))
        for name in ("adapter_model.safetensors", "adapter_model.bin"):
            weights = source.find(name)
            if weights is not None:
                return cls(config, TensorFiles.from_file(weights), float(scale), source.label)
        raise source.missing("adapter_model.safetensors", "adapter_model.bin")

    def _parse(self) -> Iterator[_Update]:
        """The updates, by the names of the file's tensors; every tensor has to have a place."""
        pairs: dict[tuple[str, bool], dict[str, str]] = {}
        for name in self.tensors:
            plain = name.removeprefix("base_model.model.")
            factor = _FACTOR.fullmatch(plain)
            if factor is not None:
                side = factor[2] or factor[3]
                pairs.setdefault((factor[1], factor[3] is not None), {})[side] = name
            elif "lora_" in plain or "trainable_tokens" in plain:
                kind = "DoRA" if "magnitude" in plain else "a part of it that plain LoRA does not have"
                raise CheckpointError(f"{self.tensors.where(name)} holds {name!r} ({kind}); only plain LoRA is merged")
            else:
                yield _Update(re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", plain), (name,))
        for (module, table), sides in pairs.items():
            if len(sides) != 2:
                (only,) = sides.values()
                raise CheckpointError(f"{self.tensors.where(only)} holds {only!r} without its other half")
            yield _Update(f"{module}.weight", (sides["A"], sides["B"]), table)

    def edits(self, config: ModelConfig) -> Edits:
        """Canonical name -> what is to be done to that tensor in float32, for a model of `config`.

        Raises:
            CheckpointError: a module that the model does not have, or updates of another shape.
        """
        places, shapes = _places(config), dict(expected_shapes(config))
        found: dict[str, list[tuple[slice, Change]]] = {}
        unknown = []
        for update in self._updates:
            place = places.get(update.name) or places.get(f"decoder.{update.name}")
            if place is not None:
                canonical, rows = place
                shape = (rows.stop - rows.start, *shapes[canonical][1:])
                found.setdefault(canonical, []).append((rows, self._change(update, shape)))
            elif update not in self._text:
                unknown.append(update.module)
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise CheckpointError(
                f"{self.label} updates {', '.join(map(repr, unknown[:3]))}{more}, which the model does not have; "
                f"the adapter was trained on {self.config.base or 'another model'}"
            )
        return {name: partial(_apply, changes) for name, changes in found.items()}

    def edit_text(self, text: TextSource | None) -> None:
        """Merge what concerns the T5 into `text`, in place. CheckpointError where it does not fit."""
        for update in self._text:
            name = _text_name(update.name)
            assert name is not None
            if text is None or name not in text.tensors:
                origin = text.origin if text is not None else "the model, which reads no text"
                raise CheckpointError(f"{self.label} updates {update.module!r}, which is not in {origin}")
            tensor = text.tensors[name]
            self._change(update, tuple(tensor.shape))(tensor)
        count = len(self._updates)
        log.info("merged the adapter %s: %d modules, scale %g", self.label, count, self.scale)

    def _change(self, update: _Update, shape: tuple[int, ...]) -> Change:
        """The change of a tensor of `shape`, every shape checked now and every value when it is made."""
        if len(update.files) == 1:
            self._expect(update.files[0], shape)
            return partial(self._blend, update.files[0])
        first, second = (self.tensors.shape(name) for name in update.files)
        rank = first[0] if len(first) == 2 else 0
        rows, columns = (shape if not update.table else shape[::-1]) if len(shape) == 2 else (0, 0)
        for name, wanted in zip(update.files, ((rank, columns), (rows, rank)), strict=True):
            self._expect(name, wanted)
        scaling = self.config.scaling(update.module, rank)
        return partial(self._add, update, scaling)

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.tensors.shape(name)
        if found != shape or not all(shape):
            raise CheckpointError(
                f"{self.tensors.where(name)}: {name!r} has shape {list(found)}, the model asks for {list(shape)}; "
                f"the adapter was trained on {self.config.base or 'another model'}"
            )

    def _add(self, update: _Update, scaling: float, target: Tensor) -> None:
        first, second = (self.tensors.real(name).float() for name in update.files)
        product = second @ first
        target += (product.T if update.table else product) * (scaling * self.scale)

    def _blend(self, name: str, target: Tensor) -> None:
        trained = self.tensors.real(name).float()
        target.copy_(trained if self.scale == 1 else torch.lerp(target, trained, self.scale))


def _apply(changes: list[tuple[slice, Change]], tensor: Tensor) -> None:
    for rows, change in changes:
        change(tensor[rows])


def _text_name(name: str) -> str | None:
    """A T5 tensor's name in `TextSource`; None for a tensor of something else. The tied table has two names."""
    prefix = next((p for p in _TEXT if name.startswith(p)), "")
    plain = name.removeprefix(prefix)
    if not prefix and not plain.startswith(("encoder.block.", "encoder.final_layer_norm.", "shared.")):
        return None
    return "shared.weight" if plain == "encoder.embed_tokens.weight" else plain


def _places(config: ModelConfig) -> Mapping[str, tuple[str, slice]]:
    """Name of a tensor in either layout -> (canonical name, rows of it). Halves of in_proj_weight are no modules."""
    from . import audiocraft, transformers

    shapes, places = dict(expected_shapes(config)), {}
    for layout in (transformers, audiocraft):
        for name, theirs in layout.names_in_file(config):
            rows = shapes[name][0] // len(theirs)
            for i, each in enumerate(theirs):
                if not each.endswith("cross_attention.in_proj_weight"):
                    places[each] = (name, slice(i * rows, (i + 1) * rows))
    return places
