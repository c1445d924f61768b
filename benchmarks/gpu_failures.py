"""Does a request that fails leave the others alone? A row of NaN, and no memory for one more.

    python benchmarks/gpu_failures.py --part memory

At the size of musicgen-small with random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_checks import all_guided, alone, passed, played, some_request
from gpu_lines import Bench, Lines, run_part
from gpu_tools import build_decoder, build_model, conditions
from torch import Tensor

from musicgen_fast.decoders.cuda import CudaDecoder
from musicgen_fast.slot_engine import RequestError, SlotEngine


def nan(bench: Bench, lines: Lines) -> None:
    """A row of NaN is named, and takes no other with it."""
    model, frames = build_model(bench), bench.pick(70, 10)
    for version in ("v3", "v1"):
        with lines.guarded(check=f"nan {version}"):
            decoder = build_decoder(bench, model, version)
            mix = [some_request(bench, model.config, seed, frames) for seed in (1, 2, 3, 4)]
            all_guided(bench, model.config, mix)
            bad = conditions(model.config, bench.device, [5])
            assert bad.branches[0].cross is not None
            bad.branches[0].cross[0].fill_(float("nan"))
            others, _ = played(bench, decoder, 4, mix)
            mix[2].conditions_of = lambda _, c=bad: c  # type: ignore[misc]
            tokens, failed = played(bench, decoder, 4, mix)
            named = list(failed) == [2] and "NaN" in str(failed[2])
            wrong = [n for n in (0, 1, 3) if not torch.equal(tokens[n], others[n])]
            lines.add(check=f"nan {version}", status=passed(named and not wrong), failed=list(failed), wrong=wrong)


def memory(bench: Bench, lines: Lines) -> None:
    """A request that finds no room fails by name; those that run go on, and a later one is served again."""
    model, frames, window = build_model(bench), bench.pick(60, 10), bench.pick(1500, 30)
    decoder = build_decoder(bench, model)
    first, second = (some_request(bench, model.config, seed, frames, window=window) for seed in (1, 2))
    all_guided(bench, model.config, [first, second])
    expected = [alone(bench, decoder, r) for r in (first, second)]
    decoder = build_decoder(bench, model)  # its pool holds nothing yet
    engine = SlotEngine(decoder, 4, window, device=bench.device, shadow=False)
    (number,) = engine.admit(first)
    frames_of: dict[int, list[Tensor]] = {number: []}
    failure: RequestError | None = None
    after = None
    for step in range(100_000):
        if not engine.running:
            break
        if step == 5:
            (refused,) = engine.admit(second)
        with no_more_memory(bench, decoder, during=5 <= step < 10):
            try:
                for n, new in engine.step().items():
                    frames_of.setdefault(n, []).append(new)
            except RequestError as error:
                failure = error
        if step == 10:
            (after,) = engine.admit(second)
    named = failure is not None and failure.requests == [refused]
    cause = type(failure.__cause__).__name__ if failure else "no failure"
    tokens = [torch.cat(frames_of[n], 1).cpu() for n in (number, after) if n is not None]
    right = len(tokens) == 2 and all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=True))
    status = passed(named and right and cause == "OutOfMemoryError")
    lines.add(check="memory", status=status, named=named, cause=cause, others_right=right)


@contextmanager
def no_more_memory(bench: Bench, decoder: CudaDecoder, during: bool) -> Iterator[None]:
    """The pool of keys and values cannot grow: 64 MB are left, for all small things; where it is tiny, a pretence."""
    if not during:
        yield
        return
    if bench.tiny or not bench.cuda:
        pool: Any = decoder._cache
        kept = pool._memory
        pool._memory = _refuse
        try:
            yield
        finally:
            pool._memory = kept
        return
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(bench.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _refuse(*_: Any) -> Any:
    raise torch.OutOfMemoryError("no memory is left (pretended)")


PARTS = {"nan": nan, "memory": memory}

if __name__ == "__main__":
    sys.exit(run_part(PARTS, __doc__ or ""))
