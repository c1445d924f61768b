"""A whole run, checked: the options, the pieces of this shard of the manifest, and the names of their files.

Everything here happens before a model is loaded, and nothing is written. What a dry run says is here as well.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..audio_encode import check_format
from ..config import GenerationParams
from ..loudness import STRATEGIES
from .identity import Identity, estimate
from .inputs import Inputs
from .item import Item, Limits
from .ledger import ledger_paths, read_ledgers
from .manifest import read_manifest
from .names import check_template, plan_names
from .output import Settings
from .resume import Present, Rules, Task, files_present
from .shards import Shard
from .webdataset import shards_present

__all__ = ["ENGINES", "LAYOUTS", "Options", "Plan", "describe", "last_speed", "make_plan"]

LAYOUTS = ("files", "webdataset")
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Options:
    """What a run is told; the command line's options of the same names.

    Attributes:
        manifest, output_dir: the file that says what to make, the folder that it goes to.
        model, text_encoder, style_encoder, revision, cache_dir: as for `MusicGen.get_pretrained`.
        device, precision: None picks what suits the machine.
        seed: of the run; seeds of pieces follow from it and their ids.
        compat: padding of texts, 'isolated' or 'audiocraft'; see `conditioning`.
        params: of pieces whose line does not say.
        settings, layout: how sound becomes files, one each ('files') or in tars ('webdataset') of
            shard_pieces pieces.
        filename: template, see `names.plan_names`.
        input_root: recordings lie below it; None: the manifest's folder.
        manifest_format, ignore_extra, limits: how the manifest is read, see `read_manifest`.
        rules: what becomes of the results of earlier runs. shard: the part that this run makes.
        limit: only the first pieces of the shard. max_failures: the run ends when so many failed.
        batch_size: pieces made at once, None: from the memory. writers: threads that encode.
        item_timeout: seconds for one piece, None: no end.
        engine: 'local', this process, or 'ray', several of them; see `ray_engine.py` for address, workers and
            gpus_per_worker.
        progress: of `progress.MODES`, None: by the terminal. quiet: errors only.

    Raises:
        ValueError: a value that a run cannot have.
    """

    manifest: str | Path
    output_dir: str | Path
    model: str = "facebook/musicgen-small"
    device: str | None = None
    precision: str | None = None
    text_encoder: str | None = None
    style_encoder: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    compat: str = "isolated"
    seed: int = 0
    params: GenerationParams = field(default_factory=lambda: GenerationParams(duration=10.0))
    settings: Settings = field(default_factory=Settings)
    layout: str = "files"
    shard_pieces: int = 1000
    filename: str = "{id}"
    input_root: str | Path | None = None
    manifest_format: str | None = None
    ignore_extra: bool = False
    limits: Limits = field(default_factory=Limits)
    rules: Rules = field(default_factory=Rules)
    shard: Shard = field(default_factory=Shard)
    limit: int | None = None
    max_failures: int | None = None
    batch_size: int | None = None
    writers: int = 1
    item_timeout: float | None = None
    engine: str = "local"
    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    progress: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}; choose one of {', '.join(LAYOUTS)}")
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}; choose one of {', '.join(ENGINES)}")
        if self.engine != "ray" and (self.address, self.workers, self.gpus_per_worker) != (None, None, None):
            raise ValueError("address, workers and gpus_per_worker are for engine 'ray'")
        check_format(self.settings.format, 1, 32000)
        if self.settings.loudness not in STRATEGIES:
            raise ValueError(f"unknown loudness {self.settings.loudness!r}; choose one of {', '.join(STRATEGIES)}")
        if self.layout == "webdataset" and not self.settings.sidecar:
            raise ValueError("webdataset needs the JSON of each piece: it says what a tar holds after a crash")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 to 2**63 - 1, got {self.seed}")
        check_template(self.filename)


@dataclass(frozen=True)
class Plan:
    """A run that can be made. `items`: of this shard, as in the manifest; `stems`: key -> name of its file.

    `options`: what was asked for; `inputs`: the recordings.
    """

    options: Options
    items: list[Item]
    stems: dict[str, str]
    inputs: Inputs

    @property
    def folder(self) -> Path:
        """Where everything of the run goes."""
        return Path(self.options.output_dir)

    def identity(self, weights: str, precision: str) -> Identity:
        """What all pieces share, once it is known what the model's weights are; see `identity.weights_hash`.

        `precision`: as it is used, not None.
        """
        from .. import __version__

        options = self.options
        output = {"format": options.settings.format, "loudness": options.settings.loudness, "layout": options.layout}
        if options.layout == "webdataset":  # of files it shows whether there are tokens; a line tells not of a tar
            output["tokens"] = str(options.settings.tokens)
        return Identity(weights, precision, __version__, options.compat, output)

    def tasks(self, identity: Identity) -> list[Task]:
        """The pieces with their fingerprints."""
        return [Task(item, self.stems[item.key], identity.fingerprint(item, self.inputs)) for item in self.items]

    def present(self) -> Present:
        """Whether what a line of the ledger tells of is there, in the layout of this run."""
        if self.options.layout == "webdataset":
            return shards_present(self.folder)
        return files_present(self.folder, self.options.settings.suffixes)

    def file(self, name: str, suffix: str) -> Path:
        """A file of the run itself, `name` and `suffix`: `ledger.jsonl`, or `ledger-3-of-16.jsonl` for a shard."""
        shard = self.options.shard.name
        return self.folder / (f"{name}-{shard}{suffix}" if shard else f"{name}{suffix}")


def make_plan(options: Options) -> Plan:
    """Read and check everything that a run needs to know; writes nothing.

    Raises:
        ManifestError: the manifest, with all that is wrong with it. OSError: it cannot be read.
    """
    root = Path(options.manifest).parent if options.input_root is None else options.input_root
    inputs = Inputs(root, options.limits)
    items = read_manifest(
        options.manifest, options.params, seed=options.seed, inputs=inputs, format=options.manifest_format,
        limits=options.limits, ignore_extra=options.ignore_extra,
    )  # fmt: skip
    stems = plan_names(
        items, options.filename, format=options.settings.format, model=_short_name(options.model),
        dots=options.layout != "webdataset", manifest=str(options.manifest),
    )  # fmt: skip
    mine = [item for item in items if options.shard.has(item.id)][: options.limit]
    return Plan(options, mine, {item.key: stems[item.key] for item in mine}, inputs)


def _short_name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]


# -- a dry run --------------------------------------------------------------------------------------------------------


def describe(plan: Plan, speed: float | None = None) -> dict[str, Any]:
    """What a run would make. `speed`: seconds of audio per second; None: that of the last run in the folder, if any.

    What was made before is told by key: whether it is still what is asked for shows when the weights are known.
    Disk is counted for 32 kHz, mono unless the model's name says stereo.
    """
    options = plan.options
    made = _made_before(plan)
    speed = speed or last_speed(plan)
    channels = 2 if "stereo" in options.model else 1
    left = [item for item in plan.items if item.key not in made or options.rules.overwrite]
    settings = options.settings
    all_of_it, rest = (
        estimate(items, settings.format, channels=channels, tokens=settings.tokens, speed=speed)
        for items in (plan.items, left)
    )
    return {
        "manifest": str(options.manifest),
        "output_dir": str(plan.folder),
        "shard": str(options.shard),
        "lines": len({item.line for item in plan.items}),
        "pieces": all_of_it.pieces,
        "pieces_made_before": len(made),
        "pieces_left": rest.pieces,
        "audio_hours": all_of_it.audio_seconds / 3600,
        "audio_hours_left": rest.audio_seconds / 3600,
        "longest_seconds": all_of_it.longest_seconds,
        "recordings": len({name for item in plan.items for name in (item.melody, item.continuation) if name}),
        "disk_bytes_left": round(rest.disk_bytes),
        "disk_bytes_free": _free(plan.folder),
        "speed": speed,
        "hours_left": None if rest.wall_seconds is None else rest.wall_seconds / 3600,
    }


def _made_before(plan: Plan) -> set[str]:
    if not plan.folder.is_dir():
        return set()
    done, present = read_ledgers(ledger_paths(plan.folder)).done_keys(), plan.present()
    return {key for key, stem in plan.stems.items() if any(present(line, stem) for line in done.get(key, ()))}


def last_speed(plan: Plan) -> float | None:
    """Seconds of audio per second of the last run here that made any, if it was of the same model."""
    try:
        summary = json.loads(plan.file("summary", ".json").read_bytes())
        if summary["model"] == plan.options.model and summary["last_times_real_time"] > 0:
            return float(summary["last_times_real_time"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _free(folder: Path) -> int | None:
    """Bytes on the disk that the folder is on, or will be."""
    for existing in (folder, *folder.absolute().parents):
        if existing.is_dir():
            return shutil.disk_usage(existing).free
    return None
