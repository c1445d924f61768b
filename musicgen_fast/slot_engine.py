"""The loop for requests that come and go: fixed slots, admission at any step, one pass through the weights for all.

Knows no device, no text and no audio. A request's end is known when it is admitted; its slot is free after it, or after
`cancel`. Shapes: prompt int64 [K, P], new frames int64 [K, t] per request and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .chain import Chain, ConditionsOf
from .crossfade import Change
from .lanes import Decoder, Guidance
from .place import Sampler
from .sampling import SamplingParams, signed_seed
from .slots import Slots
from .state import Branch, Conditions
from .windows import Window, WindowPlan

_OWN_FAULTS = (ValueError, MemoryError, torch.OutOfMemoryError)  # of one request: a draw, or no room for its cache


@dataclass
class Request:
    """What one user asks for: all numbers in frames.

    Attributes:
        prompt: int64 [K, P] frames to continue, P may be 0.
        total: frames in all, the prompt included; None: until cancelled.
        window, stride: as in `plan_windows`; the window is at most the engine's.
        conditions_of: the conditions (of a batch of one) of a window; the same object where they do not change.
        params: of a batch of one.
        seed: 64 bits. None is noise mode, which only a batch admitted into an empty engine can have.
        guidance: frame -> (cfg_coef, temperature), see `Generation`.
        changes: conditions from a frame on, see `Generation`; not for batches in lockstep.
    """

    prompt: Tensor
    total: int | None
    window: int
    stride: int
    conditions_of: ConditionsOf
    params: SamplingParams
    seed: int | None = None
    guidance: Guidance | None = None
    changes: Sequence[Change] = ()

    def plan(self) -> WindowPlan:
        return WindowPlan(self.total, self.window, self.stride, self.prompt.shape[1])


class RequestError(ValueError):
    """A request that failed and was removed; the others go on. `requests`: its number, or those of its batch.

    `__cause__` says why: a ValueError, or a MemoryError or torch.OutOfMemoryError where its cache found no room.
    """

    def __init__(self, message: str, requests: list[int]):
        super().__init__(message)
        self.requests = requests


class SlotEngine:
    """Fixed slots that requests enter and leave at any step.

    Requests are numbered by admission. With seeds, the tokens of a request do not depend on its slot, its neighbours or
    the step of its admission (on the torch decoder: up to what BLAS makes of another number of rows).
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        window: int,
        *,
        device: torch.device | str = "cpu",
        shadow: bool = True,
    ):
        """`slots` requests at once, windows of up to `window` frames; `shadow` as in `Generation`."""
        self._decoder, self._shadow = decoder, shadow
        self.slots = Slots.on(decoder, slots, window, device, lanes=1 + shadow)
        self._device = torch.device(device)
        self._batches: list[_Batch] = []
        self._count = 0

    @property
    def free(self) -> int:
        """Slots that wait for a request."""
        return self.slots.free

    @property
    def running(self) -> list[int]:
        """The numbers of the requests that are not done."""
        return [number for batch in self._batches for number in batch.numbers if number not in batch.cancelled]

    def admit(self, *requests: Request) -> list[int]:
        """Put requests into slots; several at once run in lockstep, as one batch of the same plan.

        Raises:
            ValueError: not enough slots side by side; plans that differ; windows that are too long; or noise mode
                (seed None) beside other requests: there the global generator's numbers would go to whoever draws first.
        """
        plan = self._checked(requests)
        sampler = _join_samplers(requests)
        where = self.slots.take(len(requests))
        if where is None:
            raise ValueError(f"{len(requests)} slots side by side are needed, {self.free} in all are free")
        prompt = torch.stack([r.prompt.to(self._device) for r in requests])
        guidance = [r.guidance for r in requests]
        chain = Chain(
            self._decoder, self.slots, where, plan.at, prompt, _join_conditions(requests), sampler,
            shadow=self._shadow, endless=plan.total is None, guidance=guidance if any(guidance) else (),
            changes=requests[0].changes,
        )  # fmt: skip
        numbers = list(range(self._count, self._count + len(requests)))
        self._count += len(requests)
        self._batches.append(_Batch(chain, numbers, set(), sampler.seeds is None))
        return numbers

    def steps_left(self, number: int) -> int | None:
        """Steps until a request is done: known from its admission on; None where it has no end."""
        chain = self._batch_of(number).chain
        return None if chain.steps_total is None else chain.steps_total - chain.steps_done

    def cancel(self, number: int) -> None:
        """End a request. Its slot is free when all requests of its batch are cancelled."""
        batch = self._batch_of(number)
        batch.cancelled.add(number)
        if batch.cancelled.issuperset(batch.numbers):
            batch.chain.close()
            self._batches.remove(batch)

    def step(self, whole: bool = False) -> dict[int, Tensor]:
        """One step of all requests: the new frames int64 [K, t] of each, t >= 0. Those that ended are gone after it.

        Args:
            whole: only of those that ended, all frames that were not given before: cheaper by 20 us a request.

        Raises:
            RequestError: a request failed and was removed; frames of the others come with the next step.
        """
        self._step()
        frames = {}
        for batch in list(self._batches):
            if whole and not batch.chain.done:
                continue
            for number, new in zip(batch.numbers, batch.chain.take(), strict=True):
                if number not in batch.cancelled:
                    frames[number] = new
            if batch.chain.done:
                self._batches.remove(batch)
        return frames

    def _step(self) -> None:
        """One pass through the weights for all that do not prefill; a failed draw ends its own batch only."""
        running = [batch for batch in self._batches if not batch.chain.done]  # one that ended may wait to be taken
        failed: dict[int, Exception] = {}  # by place in `running`
        lanes = []
        for index, batch in enumerate(running):
            try:
                lanes += batch.chain.begin()
            except _OWN_FAULTS as error:
                failed[index] = error
        try:
            if lanes:
                self._decoder.step(*lanes)
        except ValueError as error:  # every lane has advanced: the decoder looks for failures at the end
            found = {i: error for i, batch in enumerate(running) if i not in failed and batch.chain.failed()}
            if not found:
                raise
            failed |= found
        for index, batch in enumerate(running):
            try:
                if index not in failed:
                    batch.chain.end()
            except _OWN_FAULTS as error:
                failed[index] = error
        if failed:
            self._remove([running[index] for index in failed], next(iter(failed.values())))

    def _remove(self, batches: list[_Batch], error: Exception) -> None:
        for batch in batches:
            batch.chain.close()
            self._batches.remove(batch)
        numbers = [number for batch in batches for number in batch.numbers]
        raise RequestError(f"request {', '.join(map(str, numbers))} was removed: {error}", numbers) from error

    def close(self) -> None:
        """Cancel everything."""
        for number in self.running:
            self.cancel(number)

    def _batch_of(self, number: int) -> _Batch:
        for batch in self._batches:
            if number in batch.numbers and number not in batch.cancelled:
                return batch
        raise ValueError(f"request {number} is not running: it has ended, was cancelled or never was")

    def _checked(self, requests: Sequence[Request]) -> WindowPlan:
        """The plan of a batch that can be admitted."""
        if not requests:
            raise ValueError("no request was given")
        plan = requests[0].plan()
        num_codebooks = self._decoder.config.num_codebooks
        for request in requests:
            if request.prompt.dim() != 2 or len(request.prompt) != num_codebooks:
                raise ValueError(f"prompt tokens must be [{num_codebooks}, frames], got {list(request.prompt.shape)}")
            if request.plan() != plan:
                raise ValueError("requests of one batch must agree in total, window, stride and prompt length")
        if len(requests) > 1 and any(request.changes for request in requests):
            raise ValueError("requests whose conditions change must be admitted one by one")
        first = plan.at(0)
        if first is None or first.length > self.slots.num_frames:
            raise ValueError(f"windows of {plan.window} frames do not fit slots of {self.slots.num_frames}")
        noise = requests[0].seed is None
        if self._batches and (noise or any(batch.noise for batch in self._batches)):
            raise ValueError(
                "noise mode (seed None) draws from torch's global generator, whose numbers mean nothing when requests "
                "come and go: give every request a seed, or admit one batch alone into an empty engine"
            )
        return plan


@dataclass
class _Batch:
    """Requests that were admitted together."""

    chain: Chain
    numbers: list[int]
    cancelled: set[int]
    noise: bool


def _join_samplers(requests: Sequence[Request]) -> Sampler:
    """One sampler for a batch of requests."""
    seeds = [r.seed for r in requests if r.seed is not None]
    if len(seeds) not in (0, len(requests)):
        raise ValueError("either all requests of a batch have a seed, or none has")
    counted = torch.tensor([signed_seed(s) for s in seeds], dtype=torch.int64) if seeds else None
    parts = [r.params for r in requests]
    joined: dict[str, Any] = {}
    for item in fields(SamplingParams):
        values = [getattr(p, item.name) for p in parts]
        if isinstance(values[0], Tensor):
            joined[item.name] = torch.cat(values)
        else:
            joined[item.name] = all(values) if item.name == "all_greedy" else any(values)
    return Sampler(SamplingParams(**joined), counted)


def _join_conditions(requests: Sequence[Request]) -> ConditionsOf:
    """Conditions of a batch from those of its requests; the same object while theirs are the same objects."""
    if len(requests) == 1:
        return requests[0].conditions_of
    last: list[Conditions] = []
    joined: Conditions | None = None

    def conditions_of(window: Window) -> Conditions:
        nonlocal last, joined
        parts = [r.conditions_of(window) for r in requests]
        if joined is None or any(a is not b for a, b in zip(parts, last, strict=True)):
            last, joined = parts, _join(parts)
        return joined

    return conditions_of


def _join(parts: list[Conditions]) -> Conditions:
    layouts = {(c.mix, tuple((b.prefix is None, b.cross is None) for b in c.branches)) for c in parts}
    if len(layouts) > 1:
        raise ValueError("requests of one batch must have the same branches: admit them one by one")

    def both(name: str, index: int) -> list[Tensor] | None:
        lists = [getattr(c.branches[index], name) for c in parts]
        return None if lists[0] is None else [t for tensors in lists for t in tensors]

    branches = [Branch(both("prefix", i), both("cross", i)) for i in range(len(parts[0].branches))]
    return Conditions(sum(c.batch for c in parts), branches, parts[0].mix)
