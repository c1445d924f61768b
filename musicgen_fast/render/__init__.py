"""Batch rendering: thousands of pieces from a manifest, with nothing lost and nothing made twice.

    options = Options("prompts.jsonl", "out", model="facebook/musicgen-small", seed=1)
    plan = make_plan(options)         # every mistake in the manifest, before a model is loaded
    code = render(plan)               # 0: everything is there

From a manifest to files: `manifest.py`, `plan.py`, `session.py` (what is left to do, and what is kept of it), `run.py`
(the loop), `engine.py` (the slots), `output.py`.

Names are imported when they are first used: the command line reads its options without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .identity import Identity, weights_hash
    from .item import Item, Limits, ManifestError
    from .manifest import read_manifest
    from .output import Settings
    from .plan import Options, Plan, make_plan
    from .resume import Decision, Rules
    from .run import render
    from .session import Session, TooManyFailuresError
    from .shards import Shard

__all__ = [
    "Decision",
    "Identity",
    "Item",
    "Limits",
    "ManifestError",
    "Options",
    "Plan",
    "Rules",
    "Session",
    "Settings",
    "Shard",
    "TooManyFailuresError",
    "make_plan",
    "read_manifest",
    "render",
    "weights_hash",
]

_HOME = {
    "Decision": "resume",
    "Identity": "identity",
    "Item": "item",
    "Limits": "item",
    "ManifestError": "item",
    "Options": "plan",
    "Plan": "plan",
    "Rules": "resume",
    "Session": "session",
    "Settings": "output",
    "Shard": "shards",
    "TooManyFailuresError": "session",
    "make_plan": "plan",
    "read_manifest": "manifest",
    "render": "run",
    "weights_hash": "identity",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
