"""A running generation as plain tensors and numbers, and back: what `torch.load(weights_only=True)` accepts.

Keys and values are not saved: they follow from the tokens, and are computed again. Conditions are, because a
conditioner may have drawn them at random (style excerpt, demucs shift).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chain import Chain
from .lanes import Lane
from .rng import rng_state, set_rng_state
from .state import Branch, Conditions, State

FORMAT = 1


def save(chain: Chain) -> dict[str, Any]:
    """Everything that `restore` into a chain with the same arguments needs."""
    chain.collect()
    lane, follower = chain.lane if chain.started else None, chain.next
    saved: dict[str, Any] = {
        "format": FORMAT,
        **_identity(chain),
        "index": chain.index,
        "alone": chain.alone,
        "in_force": chain.in_force,
        "steps_done": chain.steps_done,
        "taken": chain.taken,
        "pending": torch.cat(chain.pending, 2).cpu() if chain.pending else None,
        "prompt": chain.prompt.cpu() if lane is None else None,
        "lane": None if lane is None else _lane_to_dict(lane.state),
        "conditions": None if lane is None else _conditions_to_dict(lane.state.conditions),
        "next": None if follower is None else _lane_to_dict(follower.state),
        "next_conditions": None,
        "rng": rng_state(chain.device) if chain.sampler.seeds is None else None,
    }
    if lane is not None and follower is not None and follower.state.conditions is not lane.state.conditions:
        saved["next_conditions"] = _conditions_to_dict(follower.state.conditions)
    return saved


def restore(chain: Chain, saved: dict[str, Any]) -> None:
    """Go on where `save` was called: fills the caches from the tokens and sets the global generator (noise mode).

    Raises ValueError where the state does not belong to such a generation.
    """
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"this is no saved generation of format {FORMAT}")
    chain.index, chain.window = saved["index"], chain.window_at(saved["index"]) or chain.window
    expected = _identity(chain)
    found = {name: saved[name] for name in expected}
    if found != expected:
        raise ValueError(f"the saved state is of another generation: it holds {found}, expected {expected}")
    chain.steps_done, chain.taken, chain.alone = saved["steps_done"], saved["taken"], saved["alone"]
    chain.pending = [] if saved["pending"] is None else [saved["pending"].to(chain.device)]
    if saved["lane"] is None:
        chain.prompt = saved["prompt"].to(chain.device)
    else:
        _restore_lane(chain, saved)
    chain.overlap = chain.overlap_with_next(chain.index, chain.window, chain.alone)
    if saved["next"] is not None:
        _restore_shadow(chain, saved)
    if saved["rng"] is not None:
        set_rng_state(chain.device, saved["rng"])


def _identity(chain: Chain) -> dict[str, Any]:
    window = chain.window
    return {"window": [window.start, window.prompt, window.length], "shape": list(chain.shape)}


def _restore_lane(chain: Chain, saved: dict[str, Any]) -> None:
    window, pattern, offset = chain.window, chain.pattern(chain.window), chain.offset(chain.window)
    changed = saved["in_force"] > chain.changes_until(window.start + window.prompt)
    conditions = (
        chain.conditions_at_start(window) if changed else _conditions_from_dict(saved["conditions"], chain.device)
    )
    lane = chain.open(conditions, 0)
    sequence, column = _sequence_of(saved["lane"], chain.device)
    lane.state.begin_at(pattern, sequence, column, offset)
    lane.enter(window, pattern)
    chain.lane, chain.started = lane, True
    if changed:
        _replay(chain, lane, column)
        _reserve(lane, saved["lane"])
    else:
        chain.in_force = saved["in_force"]
        _refill(chain, lane, saved["lane"])


def _replay(chain: Chain, lane: Lane, column: int) -> None:
    """Run the window again up to `column` without drawing: its cache was written under more than one condition."""
    state, place = lane.state, lane.state.place
    assert place is not None
    step = place.step.clone()
    chain.overlap, chain.in_force = None, chain.changes_until(chain.window.start + chain.window.prompt)
    state.column = chain.first(chain.window)
    place.column.fill_(place.sequence.shape[2])
    chain.decoder.prefill(state)
    while lane.state.column < column:
        chain.decoder.step(*chain.begin())
    place.column.fill_(column)
    place.step.copy_(step)


def _restore_shadow(chain: Chain, saved: dict[str, Any]) -> None:
    following = chain.window_at(chain.index + 1)
    assert chain.lane is not None and chain.overlap is not None and following is not None
    conditions = chain.lane.state.conditions
    if saved["next_conditions"] is not None:
        conditions = _conditions_from_dict(saved["next_conditions"], chain.device)
    sequence, column = _sequence_of(saved["next"], chain.device)
    follower = chain.follow(chain.lane, chain.overlap, following, conditions, sequence, column)
    _refill(chain, follower, saved["next"])


def _refill(chain: Chain, lane: Lane, saved: dict[str, Any]) -> None:
    """Fill the cache up to the column that the next step consumes."""
    _reserve(lane, saved)
    if saved["filled"]:
        chain.decoder.prefill(lane.state, draw=False)


def _reserve(lane: Lane, saved: dict[str, Any]) -> None:
    assert lane.state.place is not None
    lane.state.place.reserved.extend(saved["reserved"])


def _conditions_to_dict(conditions: Conditions) -> dict[str, Any]:
    branches = [{"prefix": _copies(b.prefix), "cross": _copies(b.cross)} for b in conditions.branches]
    return {"batch": conditions.batch, "mix": conditions.mix, "branches": branches}


def _conditions_from_dict(saved: dict[str, Any], device: torch.device) -> Conditions:
    branches = [Branch(_there(b["prefix"], device), _there(b["cross"], device)) for b in saved["branches"]]
    return Conditions(saved["batch"], branches, saved["mix"])


def _lane_to_dict(state: State) -> dict[str, Any]:
    """The tokens of a lane's window and how far it is."""
    assert state.pattern is not None and state.place is not None
    sequence = state.sequence[:, :, : state.pattern.num_steps].to("cpu", torch.int32)
    reserved = [r.clone() for r in state.place.reserved]
    return {"sequence": sequence, "column": state.column, "filled": state.lengths[0] > 0, "reserved": reserved}


def _sequence_of(saved: dict[str, Any], device: torch.device) -> tuple[Tensor, int]:
    return saved["sequence"].to(device, torch.int64), saved["column"]


def _copies(tensors: list[Tensor] | None) -> list[Tensor] | None:
    return None if tensors is None else [t.detach().to("cpu", copy=True) for t in tensors]


def _there(tensors: list[Tensor] | None, device: torch.device) -> list[Tensor] | None:
    return None if tensors is None else [t.to(device) for t in tensors]
