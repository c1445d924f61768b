"""A torch file of audiocraft's tools, opened: tensors and training configuration, whichever keys they are under.

Exports hold `best_state` and `xp.cfg`, fine-tuning tools write `model` and `xp.cfg`. Checkpoints of a training run hold
an optimizer and pickled objects as well: those are refused here, and converted once by `musicgen-fast convert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .files import check_is_weights
from .pickled import load_pickle
from .xp_config import parse_config, shown

__all__ = ["load_package", "training_checkpoint", "unpack"]

_OF_TRAINING = ("optimizer", "fsdp_best_state", "xp.sig")


def load_package(path: Path) -> Mapping[str, Any]:
    """The dict in a torch file. CheckpointError for anything else, or a checkpoint of a training run."""
    check_is_weights(path)
    package = load_pickle(path)
    if not isinstance(package, Mapping):
        raise CheckpointError(f"{path} holds a {type(package).__name__}, expected a dict with 'best_state'")
    if any(key in package for key in _OF_TRAINING) and "state_dict" not in package:
        raise training_checkpoint(str(path))
    return package


def training_checkpoint(label: str) -> CheckpointError:
    """The error for audiocraft's own `checkpoint.th`."""
    return CheckpointError(
        f"{label} is a training checkpoint, with pickled objects beside the weights. If you made it yourself: "
        "`musicgen-fast convert IN OUT --trust-pickle`, or export it with audiocraft.utils.export"
    )


def unpack(package: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, configuration with interpolations resolved) of a package; the tensors are not checked.

    Raises:
        CheckpointError: a part that is missing or of another type.
    """
    weights = "best_state" if "best_state" in package or "model" not in package else "model"
    for key in (weights, "xp.cfg"):
        if key not in package:
            found = ", ".join(shown(k) for k in list(package)[:4])
            raise CheckpointError(
                f"{path} lacks {key!r} (it holds {found or 'nothing'}); expected a file made by audiocraft.utils.export"
            )
    config = parse_config(package["xp.cfg"], f"{path}: xp.cfg")
    state = package[weights]
    if isinstance(state, Mapping) and set(state) == {"model"}:
        state = state["model"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: {weights!r} holds a {type(state).__name__}, expected a dict of tensors")
    return state, config
