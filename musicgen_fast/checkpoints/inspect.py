"""A checkpoint as it lies on disk: configurations, names, shapes and dtypes, every tensor a view that was not read yet.

For `info`, which reads nothing more, and for `convert`, which copies the views piece by piece. Both published layouts
are opened so; any other form that `load_checkpoint` knows is loaded whole. All checks of the loaders apply.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..config import CodecConfig, ModelConfig
from ..errors import CheckpointError
from ..packing import unpack_weights
from . import SHORT_NAMES, load_checkpoint
from . import audiocraft as old
from . import transformers as new
from .audiocraft_config import check_family, model_config, text_encoder_name
from .checkpoint import Checkpoint, TextSource
from .codec_weights import codec_config_from_transformers
from .codec_write import transformers_codec_weights
from .files import TensorFiles, read_json
from .inspect_parts import open_codec, read_state, text_views
from .layout import Plan, check, check_nothing_left
from .sources import HubRepo, LocalFolder, Source, open_source, open_weights
from .text import find_tokenizer, open_text_source, read_text_config
from .xp_config import Section

__all__ = ["OnDisk", "TextOnDisk", "open_on_disk"]

T = TypeVar("T")


@dataclass
class TextOnDisk:
    """A T5 encoder: its configuration, its tensors in transformers' names (none: not read), where its tokenizer is."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: Path | None = None


@dataclass
class OnDisk:
    """A checkpoint, opened.

    Attributes:
        layout: 'transformers', 'audiocraft', or 'memory' where it had to be loaded.
        lm, style: by canonical name, the rows of each tensor in order. Empty where the weights are missing.
        codec: names of either layout, without a prefix.
        rest: tensors of an audiocraft file that nothing here uses: bookkeeping of training, a finetuned T5.
        xp_cfg, codec_xp_cfg: audiocraft's configurations, resolved; raw_xp_cfg and raw_codec_xp_cfg as in the file.
        missing: what is not there, in sentences that say what to do.
        source: where the other files of the checkpoint are.
    """

    name: str
    label: str
    layout: str
    config: ModelConfig
    codec_config: CodecConfig | None = None
    lm: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    style: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    codec: Mapping[str, Tensor] = field(default_factory=dict)
    text: TextOnDisk | None = None
    rest: dict[str, Tensor] = field(default_factory=dict)
    xp_cfg: dict[str, Any] | None = None
    raw_xp_cfg: str | None = None
    raw_codec_xp_cfg: str | None = None
    missing: list[str] = field(default_factory=list)
    source: Source | None = None


def open_on_disk(
    name: str | os.PathLike[str],
    *,
    text_encoder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    strict: bool = True,
    **patches: Any,
) -> OnDisk:
    """Opens what `load_checkpoint` loads.

    Args:
        patches: `base`, `adapter`, `adapter_scale` of `load_checkpoint`; with them the model is loaded whole.
        strict: raise where a part is missing. False: list it in `missing`, and take a hub's weights from the local
            cache only, so that nothing large is downloaded.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    name = os.fspath(name)
    own_cache = cache_dir or os.environ.get("AUDIOCRAFT_CACHE_DIR") or None
    if not patches and not name.startswith("random:") and not Path(name).is_file():
        opener = Opener(open_source(SHORT_NAMES.get(name, name), revision=revision, cache_dir=own_cache), strict)
        opener.name, opener.text_encoder, opener.cache_dir = name, text_encoder, cache_dir
        found = opener.open()
        if found is not None:
            return found
    full = SHORT_NAMES.get(name, name)
    options: dict[str, Any] = {"text_encoder": text_encoder, "revision": revision, "cache_dir": cache_dir}
    loaded = load_checkpoint(full, dtype=None, **options, **patches)
    if loaded.packed is not None:  # what its kernels compute with, in float32; the original's bits where these allow
        loaded.lm = unpack_weights(loaded.packed)
    return _of_checkpoint(loaded)


class Opener:
    """One call of `open_on_disk`."""

    name = ""
    text_encoder: str | os.PathLike[str] | None = None
    cache_dir: str | None = None

    def __init__(self, source: Source, strict: bool) -> None:
        self.source, self.strict = source, strict
        self.weights = source
        if isinstance(source, HubRepo) and not strict:
            self.weights = HubRepo(source.repo, source.revision, source.cache_dir)
            self.weights.offline = True
        self.missing: list[str] = []

    def open(self) -> OnDisk | None:
        """None where the source has neither layout."""
        path = self.source.find("config.json")
        if path is not None and read_json(path).get("model_type") in new.FAMILIES:
            tensors = open_weights(self.weights)
            if tensors is not None or not self.weights.find("state_dict.bin"):
                return self._transformers(path, tensors)
        state = self.weights.find("state_dict.bin")
        if state is not None:
            return self._audiocraft(*read_state(state))
        if self.weights is not self.source and path is None:
            raise self._absent(self.weights, "config.json", "state_dict.bin")
        return None

    def attempt(self, read: Callable[[], T]) -> T | None:
        """What `read` returns; None, and a line in `missing`, where that part is not there and need not be."""
        try:
            return read()
        except CheckpointError as error:
            if self.strict:
                raise
            self.missing.append(str(error))
            return None

    def _absent(self, source: Source, *names: str) -> CheckpointError:
        """The error for files that are not there, or (of a hub, where nothing large is fetched) not in the cache."""
        if self.strict or not isinstance(source, HubRepo):
            return source.missing(*names)
        wanted = " or ".join(names)
        return CheckpointError(f"{wanted} of {source.label} is not in the local cache: hf download {source.repo}")

    def _transformers(self, path: Path, tensors: TensorFiles | None) -> OnDisk:
        raw = read_json(path)
        optional = (self.source.find(f"{part}_config.json") for part in ("generation", "preprocessor"))
        config = new.model_config(raw, path, *(read_json(found) if found else None for found in optional))
        found = OnDisk(self.name, self.source.label, "transformers", config, missing=self.missing, source=self.source)
        found.codec_config = codec_config_from_transformers(raw.get("audio_encoder") or {})
        text, codec = new.TEXT, new.CODEC
        found.text = TextOnDisk(raw["text_encoder"], {})
        if tensors is None:
            self.attempt(lambda: _raise(self._absent(self.weights, "model.safetensors", "pytorch_model.bin")))
        else:
            plan = new._plan(config, tensors)
            check(plan, tensors)
            known = {piece.name for parts in plan.values() for piece in parts} | {*new._IGNORED}
            check_nothing_left(tensors, [*known, *(n for n in tensors if n.startswith((text, codec)))])
            found.lm = _views(plan, tensors)
            found.codec = {n.removeprefix(codec): tensors[n] for n in tensors if n.startswith(codec)}
            found.text.tensors = text_views(raw["text_encoder"], tensors, text)
        self._tokenizer(found.text, self.source, *self._beside())
        if self.text_encoder is not None:
            found.text = self._text_of(open_source(self.text_encoder, cache_dir=self.cache_dir)) or found.text
        return found

    def _audiocraft(self, tensors: TensorFiles, xp_cfg: dict[str, Any], raw_xp_cfg: str | None) -> OnDisk:
        root = Section(xp_cfg, f"{tensors.label}: xp.cfg: ")
        check_family(root)
        config = model_config(root, old._text_dim(root, tensors))
        plan, style = old._plan(config), old._style_plan(config)
        check({**plan, **style}, tensors)
        check_nothing_left(tensors, old._known(config, plan, style, tensors))
        used = {piece.name for parts in (*plan.values(), *style.values()) for piece in parts}
        found = OnDisk(self.name, self.source.label, "audiocraft", config, missing=self.missing, source=self.source)
        found.xp_cfg, found.raw_xp_cfg = xp_cfg, raw_xp_cfg
        found.lm, found.style = _views(plan, tensors), _views(style, tensors)
        found.rest = {name: tensors[name] for name in tensors if name not in used}
        codec = self.attempt(lambda: open_codec(self.source, xp_cfg, self.cache_dir))
        if codec is not None:
            found.codec_config, found.codec, found.raw_codec_xp_cfg = codec
        if config.text is not None:
            found.text = self.attempt(lambda: self._audiocraft_text(root, tensors))
        return found

    def _audiocraft_text(self, root: Section, tensors: TensorFiles) -> TextOnDisk | None:
        place = open_text_source(self.text_encoder, self.source, text_encoder_name(root), self.cache_dir)
        inside = old.DESCRIPTION + "t5."
        if self.text_encoder is not None or not any(name.startswith(inside) for name in tensors):
            return self._text_of(place)
        config = read_text_config(place)
        text = TextOnDisk(config, text_views(config, tensors, inside))
        self._tokenizer(text, place)
        return text

    def _text_of(self, place: Source) -> TextOnDisk | None:
        config = read_text_config(place)
        if isinstance(place, HubRepo) and not self.strict:
            place.offline = True
        tensors = open_weights(place)
        text = TextOnDisk(config, {})
        if tensors is None:
            self.attempt(lambda: _raise(self._absent(place, "model.safetensors", "pytorch_model.bin")))
        else:
            inside = new.TEXT if any(name.startswith(new.TEXT) for name in tensors) else ""
            text.tensors = text_views(config, tensors, inside)
        self._tokenizer(text, place)
        return text

    def _tokenizer(self, text: TextOnDisk, *places: Source) -> None:
        text.tokenizer = find_tokenizer(*places)
        if text.tokenizer is None:
            self.missing.append(
                f"{places[0].label} has no tokenizer (spiece.model or tokenizer.json): the model cannot read texts. "
                "Put that of its T5 beside, or give it as the text encoder"
            )

    def _beside(self) -> list[Source]:
        return [LocalFolder(self.source.path / "text_encoder")] if isinstance(self.source, LocalFolder) else []


def _raise(error: CheckpointError) -> None:
    raise error


def _views(plan: Plan, tensors: TensorFiles) -> dict[str, tuple[Tensor, ...]]:
    return {name: tuple(tensors[p.name][p.start : p.stop] for p in parts) for name, parts in plan.items()}


def _of_checkpoint(loaded: Checkpoint) -> OnDisk:
    """A checkpoint in memory in the same form."""
    found = OnDisk(loaded.name, loaded.name, "memory", loaded.config, loaded.codec_config, xp_cfg=loaded.xp_cfg)
    found.lm = {name: (tensor,) for name, tensor in loaded.lm.items()}
    found.style = {name: (tensor,) for name, tensor in (loaded.style or {}).items()}
    found.codec = transformers_codec_weights(loaded.codec, loaded.codec_config)
    if loaded.text is not None:
        text: TextSource = loaded.text
        found.text = TextOnDisk(text.config, text.tensors, text.tokenizer_folder)
        if text.tokenizer_folder is None and text.tokenizer is None:
            found.missing.append(f"{loaded.name} has no tokenizer: the model cannot read texts")
    return found
