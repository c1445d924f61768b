"""Which piece is which: seeds that follow from ids, and fingerprints that say whether a file is what is asked for.

A fingerprint covers all that the samples of a file depend on, and nothing else: not the batch, the order, the device's
number, the engine or the name of the file. No torch; weights are hashed as files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sections import plain

if TYPE_CHECKING:
    from .inputs import Inputs
    from .item import Item

__all__ = ["Estimate", "Identity", "bytes_per_second", "estimate", "frames_of", "seed_of", "weights_hash"]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "state_dict.bin")
_SIDE_FILES = (
    "config.json", "compression_state_dict.bin", "generation_config.json", "spiece.model", "tokenizer.json",
    "preprocessor_config.json", "adapter_config.json", "adapter_model.safetensors",
)  # fmt: skip


def seed_of(seed: int, identifier: str, variation: int = 0) -> int:
    """63 bits that follow from the run's seed, the id and the variation, not from other lines, order or machine."""
    told = json.dumps([seed, identifier, variation])
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Identity:
    """What all pieces of a run share.

    Attributes:
        weights: see `weights_hash`.
        precision: of the matrices, such as 'float32' or 'int8'.
        compat: 'isolated' or 'audiocraft'.
        version: of the package: another one may give other samples.
        output: format, level and what else changes the file.
    """

    weights: str
    precision: str
    version: str
    compat: str = "isolated"
    output: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self, item: Item, inputs: Inputs) -> str:
        """SHA-256 in hex, 32 digits. Reads the item's recordings from `inputs`; OSError, ValueError if that fails."""
        told = {
            "weights": self.weights,
            "precision": self.precision,
            "version": self.version,
            "compat": self.compat,
            "output": dict(self.output),
            "seed": item.seed,
            "prompt": item.prompt,
            "negative_prompt": item.negative_prompt,
            "params": _floats(asdict(item.params)),
            "sections": _floats([plain(item.sections), item.crossfade]) if item.sections else None,
            "melody": [inputs.content(item.melody), item.separate] if item.melody else None,
            "continuation": None,
            "tags": list(item.tags),
        }
        if item.continuation:
            part = _floats([item.continuation_start, item.continuation_seconds])
            told["continuation"] = [inputs.content(item.continuation), *part]
        text = json.dumps(told, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _floats(value: Any) -> Any:
    """3 and 3.0 are the same guidance, so their fingerprints are the same too."""
    if isinstance(value, dict):
        return {name: _floats(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_floats(one) for one in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def weights_hash(
    model: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    others: Iterable[str | None] = (),
) -> str:
    """SHA-256, 32 hex digits, of the files that a model is loaded from; 1 GB takes half a second to two.

    Args:
        model, revision, cache_dir: as for `load_checkpoint`; 'random:SIZE' follows from its name.
        others: folders or hub ids of encoders given besides, in a fixed order.

    Raises:
        CheckpointError: there is no such model.
    """
    from ..checkpoints import SHORT_NAMES
    from ..checkpoints.sources import open_source

    digest = hashlib.sha256()
    for number, name in enumerate([model, *others]):
        digest.update(f"\n{number}".encode())
        if name is None:
            continue
        if name.startswith("random:"):
            digest.update(name.encode())
            continue
        source = open_source(
            name if Path(name).is_dir() else SHORT_NAMES.get(name, name), revision=revision if not number else None,
            cache_dir=cache_dir,
        )  # fmt: skip
        for path in _files(source):
            digest.update(f"\n{path.name} ".encode())
            with open(path, "rb") as file:
                while block := file.read(2**22):
                    digest.update(block)
    return digest.hexdigest()[:32]


def _files(source: Any) -> Iterator[Path]:
    """The weights of the layout that is loaded, and what stands beside them."""
    from ..checkpoints.files import shard_names

    for name in _WEIGHTS:
        if (path := source.find(name)) is not None:
            yield path
            break
        if (index := source.find(f"{name}.index.json")) is not None:
            for shard in shard_names(index):
                if (path := source.find(shard)) is not None:
                    yield path
            break
    else:
        raise source.missing(*_WEIGHTS)
    for name in _SIDE_FILES:
        if (path := source.find(name)) is not None:
            yield path


# -- sizes, before anything is made -----------------------------------------------------------------------------------


def frames_of(item: Item, frame_rate: float = 50.0) -> int:
    """Frames of tokens that the piece will have, a continued recording included: `int(duration * frame_rate)`."""
    return int(item.params.duration * frame_rate)


def bytes_per_second(format: str, sample_rate: int = 32000, channels: int = 1) -> float:
    """Of a sound file, rather too many: measured on mono noise and music at 32 kHz, MP3 at its 320 kbit/s."""
    pcm = 2.0 * sample_rate * channels
    return {"wav": pcm, "flac": 0.85 * pcm, "ogg": 0.15 * pcm, "mp3": 40_000.0}[format]


@dataclass(frozen=True)
class Estimate:
    """What a run will make. `wall_seconds` is None where no speed is known."""

    pieces: int
    audio_seconds: float
    longest_seconds: float
    disk_bytes: float
    wall_seconds: float | None


def estimate(
    items: Iterable[Item], format: str, *, sample_rate: int = 32000, channels: int = 1, tokens: bool = False,
    speed: float | None = None,
) -> Estimate:  # fmt: skip
    """The sum over `items`; `speed` in seconds of audio per second. Of recordings that are continued only the rest is
    made, but here they count whole: an upper bound."""
    durations = [item.params.duration for item in items]
    total = sum(durations)
    per_second = bytes_per_second(format, sample_rate, channels) + (400.0 * channels if tokens else 0.0)
    disk = total * per_second + 3000.0 * len(durations)  # sidecar, ledger line, half a block lost at each end
    return Estimate(len(durations), total, max(durations, default=0.0), disk, total / speed if speed else None)
