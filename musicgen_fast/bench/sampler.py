"""Microseconds per column of sampled tokens, ours beside those of `sampler_peers.py`, and whether ours are right.

All take turns in one process, in another order each round, because a draw is too short for anything else; the ratio is
to audiocraft's chain of the same round. Every sampler maps the same logits [2, B, K, V] to tokens [B, K]. Knows no
command line, and no model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..sampling import Draw, SamplingParams, reference
from ..sampling.noise import divides, multinomial_noise
from .job import AbsentError, turns
from .latency import quantile
from .machine import synchronize
from .sampler_case import Case, first_line
from .sampler_device import device_costs
from .sampler_peers import COLUMNS, REFERENCE, SEED, Sampler, build, is_ours, reset, tokens_of

__all__ = [
    "BURST",
    "Found",
    "Key",
    "Row",
    "failures",
    "lines",
    "measure",
    "measure_case",
    "parity",
    "place",
    "ratio",
    "table",
]

BURST = 20  # draws between two waits for a GPU: a generation does not wait for each of them either
COMPARED = 256  # tokens, at least, that are compared with the reference's
Key = tuple[Case, str]
QUANTILES = (("p50", 0.5), ("p10", 0.1), ("p90", 0.9))


@dataclass(frozen=True)
class Row:
    """One sampler in one round; `us` the time of each draw (on a GPU: mean times of bursts)."""

    case: Case
    name: str
    round: int
    us: list[float]

    @property
    def key(self) -> Key:
        return self.case, self.name

    @property
    def median(self) -> float:
        return quantile(self.us, 0.5)


@dataclass
class Found:
    """What was found, by case and sampler: times, why there are none, whether ours are right, and costs on a device."""

    rows: list[Row] = field(default_factory=list)
    absent: dict[Key, str] = field(default_factory=dict)
    parity: dict[Key, bool] = field(default_factory=dict)
    costs: dict[Key, dict[str, Any]] = field(default_factory=dict)


@contextmanager
def place(device: torch.device, threads: int) -> Iterator[None]:
    """The GPU that kernels and graphs are made for, and the number of threads; both as before at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield
    finally:
        torch.set_num_threads(before)


def measure(
    cases: list[Case],
    names: list[str],
    rounds: int,
    seconds: float,
    write: Callable[[list[dict[str, Any]]], object],
    say: Callable[[str], object],
) -> Found:
    """Every case in turn; `write` gets its JSON lines as they come, so that what is interrupted keeps what it has."""
    found = Found()
    for case in cases:
        say(case.title)
        measure_case(case, names, rounds, seconds, found)
        write(lines(found, case))
    # Last, and ours first: a capture that fails may leave torch's generator unfit for anything that comes after it.
    keys = dict.fromkeys(row.key for row in found.rows if torch.device(row.case.device).type == "cuda")
    for case, name in sorted(keys, key=lambda key: not is_ours(key[1])):
        found.costs[case, name] = device_costs(case, name)
        write([head("sampler_on_device", (case, name)) | found.costs[case, name]])
    return found


def measure_case(case: Case, names: list[str], rounds: int, seconds: float, found: Found) -> None:
    """All of `names` in turns; those that cannot run are absent, and one of ours that should and fails is wrong."""
    ready: list[tuple[str, Sampler]] = []
    logits = case.logits()
    for name in names:
        key = case, name
        try:
            sampler = build(name, case)
            if is_ours(name):
                found.parity[key] = parity(name, sampler, case, logits)
            ready.append((name, sampler))
        except AbsentError as reason:
            found.absent[key] = str(reason)
            if is_ours(name) and reason.__cause__ is not None:
                found.parity[key] = False
    for number, (name, sampler) in turns(ready, rounds):
        found.rows.append(Row(case, name, number, times(sampler, logits, seconds)))


def times(sampler: Sampler, logits: Tensor, seconds: float) -> list[float]:
    """Microseconds of each draw, for `seconds` but at least 5 times, after 5 that are left out."""
    device, burst = str(logits.device), BURST if logits.device.type == "cuda" else 1
    for _ in range(5):
        sampler(logits)
    synchronize(device)
    taken: list[float] = []
    end = perf_counter() + seconds
    while len(taken) < 5 or perf_counter() < end:
        start = perf_counter()
        for _ in range(burst):
            sampler(logits)
        synchronize(device)
        taken.append(1e6 * (perf_counter() - start) / burst)
    return taken


# -- right or wrong --------------------------------------------------------------------------------------------------


def parity(name: str, sampler: Sampler, case: Case, logits: Tensor) -> bool:
    """Whether one of ours draws the tokens of the torch reference, for fixed seeds: some columns, 256 tokens or more.

    The reference is called by itself, not through the backends and the forms, so that it finds a mistake in these too.
    AbsentError where a draw raises.
    """
    columns = range(min(COLUMNS, max(2, -(-COMPARED // (case.batch * case.codebooks)))))
    with torch.random.fork_rng(devices=[logits.device] if logits.device.type == "cuda" else []):
        torch.manual_seed(SEED)
        reset(sampler)
        try:
            drawn = [tokens_of(sampler, logits).clone() for _ in columns]
        except Exception as error:
            raise AbsentError(first_line(error)) from error
        torch.manual_seed(SEED)
        expected = reference_draws(name.partition(":")[0], case, logits)
        return all(torch.equal(tokens, wanted) for tokens, wanted in zip(drawn, expected, strict=False))


def reference_draws(form: str, case: Case, logits: Tensor) -> Iterator[Tensor]:
    """The tokens [B, K] of the torch reference for the columns of a sampler of ours, from its first on."""
    device = logits.device
    params = SamplingParams.build(case.batch, case.codebooks, device, **case.numbers())
    rows = torch.zeros(case.batch, dtype=torch.int64, device=device)
    seeds = rows + SEED if form == "sample" else torch.arange(case.batch, device=device) + SEED
    for column in range(COLUMNS):
        tokens = torch.empty(case.batch, case.codebooks, dtype=torch.int64, device=device)
        inputs = Draw(logits, params, tokens, torch.zeros_like(tokens, dtype=torch.int32))
        if form == "noise":
            inputs.noise, inputs.divide = multinomial_noise(logits, params), divides(device)
        else:
            inputs.seed, inputs.step, inputs.stream = seeds, rows + column, rows
        reference.draw(inputs)
        yield tokens


def failures(found: Found) -> list[str]:
    """A sentence for each of ours that is wrong."""
    told = []
    for (case, name), right in found.parity.items():
        if not right:
            why = found.absent.get((case, name))
            what = f"could not draw: {why}" if why else "its tokens are not those of the torch reference"
            told.append(f"{name} at {case.title}: {what}")
    return told


# -- what is said ----------------------------------------------------------------------------------------------------


def ratio(row: Row, rows: list[Row]) -> float | None:
    """How many times faster than audiocraft's chain of the same round and case."""
    for other in rows:
        if other.key == (row.case, REFERENCE) and other.round == row.round:
            return other.median / row.median
    return None


def head(benchmark: str, key: Key) -> dict[str, Any]:
    return {"benchmark": benchmark, "provider": key[1], **asdict(key[0])}


def lines(found: Found, case: Case) -> list[dict[str, Any]]:
    """The JSON lines of a case: one for every sampler and round, and one for each that is absent, with nulls."""
    made = []
    for row in (row for row in found.rows if row.case == case):
        measured = {
            "round": row.round,
            "us": {name: round(quantile(row.us, q), 3) for name, q in QUANTILES},
            "times_faster_than_audiocraft": ratio(row, found.rows),
            "parity": found.parity.get(row.key),
        }
        made.append(head("sampler", row.key) | measured)
    for key, why in found.absent.items():
        if key[0] == case:
            nothing = {"us": None, "times_faster_than_audiocraft": None, "parity": found.parity.get(key)}
            made.append(head("sampler", key) | nothing | {"absent": why})
    return made


def table(found: Found) -> str:
    """Markdown, a table a case: the draws of all rounds together; the ratio is the median over the rounds."""
    groups: dict[Case, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in found.rows:
        groups[row.case][row.name].append(row)
    for case, _ in found.absent:  # nobody may be there
        groups[case]
    extra = " kernels | us of kernels | us of a graph node |" if found.costs else ""
    text = []
    for case, named in groups.items():
        text += [f"\n{case.title}\n", f"| sampler | us/draw [p10..p90] | times {REFERENCE} | parity |{extra}"]
        text.append("|---|---|---|---|" + "---|---|---|" * bool(extra))
        for name, group in named.items():
            every = [us for row in group for us in row.us]
            low, median, high = (quantile(every, q) for q in (0.1, 0.5, 0.9))
            ratios = [r for row in group if (r := ratio(row, found.rows)) is not None]
            faster = f"{quantile(ratios, 0.5):.2f}" if ratios else "-"
            right = {None: "-", True: "ok", False: "WRONG"}[found.parity.get((case, name))]
            on_device = _cells(found.costs.get((case, name), {})) if extra else ""
            text.append(f"| {name} | {median:.1f} [{low:.1f}..{high:.1f}] | {faster} | {right} |{on_device}")
        gone = [(name, why) for (other, name), why in found.absent.items() if other == case]
        text += [f"| {name} | absent: {why.replace('|', '/')}" + " |" * (6 if extra else 3) for name, why in gone]
    return "\n".join(text)


def _cells(costs: dict[str, Any]) -> str:
    count, busy = (f"{costs[key]:.1f}" if key in costs else "-" for key in ("kernels", "kernel_us"))
    node = f"{costs['graph_us']:.2f}" if "graph_us" in costs else costs.get("graph_absent", "-").replace("|", "/")
    return f" {count} | {busy} | {node} |"
