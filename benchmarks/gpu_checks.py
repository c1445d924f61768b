"""Is the CUDA decoder right on this GPU? The lines that must hold, at the size of musicgen-small with random weights.

    python benchmarks/gpu_checks.py --part seeds

`exact`, `logits`: against the reference transformer, one pass over the whole sequence, no cache. The others hold the
decoder against itself: alone and in company, captured and launched at once. `gpu_failures.py` has what happens when a
request fails.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from gpu_lines import Bench, Lines, run_part
from gpu_tools import (
    TINY,
    build_decoder,
    build_model,
    conditions,
    no_prompt,
    sampler,
    whole_window,
)  # fmt: skip
from torch import Tensor

from musicgen_fast.config import ModelConfig
from musicgen_fast.decoder_for import logits_error
from musicgen_fast.decoders.cuda import CudaDecoder
from musicgen_fast.engine import generate
from musicgen_fast.model import Transformer
from musicgen_fast.slot_engine import Request, RequestError, SlotEngine
from musicgen_fast.state import Conditions, State

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # requests: 2 rows each
# Relative error of the logits against float32 with unrounded weights. float16 is what must hold; of the others rounding
# the weights alone costs 0.6 % (bfloat16) and 1.8 % (int8) at 24 layers, and int8 keys and values cost less than that.
LIMITS = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 2.5e-2, "int8 cache": 1e-2}


# -- against the reference ---------------------------------------------------------------------------------------------


class WholeSequence:
    """The reference as a decoder: every step is a forward pass over all columns so far. Slow and plain."""

    def __init__(self, model: Transformer):
        self.model, self.config = model, model.config

    def allocate(self, rows: int, capacity: int) -> Any:
        return SimpleNamespace(rows=rows, capacity=capacity, clear=lambda: None)

    def condition(self, state: State) -> None:
        pass

    def prefill(self, state: State, draw: bool = True) -> None:
        self.step(state)

    @torch.no_grad()
    def step(self, *states: State) -> None:
        for state in states:
            tokens, rows = state.fed_tokens(0), []
            for branch in state.conditions.branches:
                for request in range(state.conditions.batch):
                    prefix, cross = (None if s is None else s[request][None] for s in (branch.prefix, branch.cross))
                    rows.append(self.model(tokens[request : request + 1], prefix, cross)[0, -1])
            state.write_column(torch.stack(rows))


def exact(bench: Bench, lines: Lines) -> None:
    """Greedy and noise-mode tokens of v1 in float32."""
    model, frames = build_model(bench, precision="float32"), bench.pick(57, 9)  # and 3 columns of the delay pattern
    config, asked = model.config, conditions(model.config, bench.device, [7])
    ways: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "noise": {}}
    for way, options in ways.items():
        with lines.guarded(check=f"exact {way}"):
            tokens = []
            for decoder in (WholeSequence(model), build_decoder(bench, model, "v1")):
                torch.manual_seed(5)
                drawn = sampler(config, bench.device, None, **options)
                prompt = no_prompt(config, bench.device)
                tokens.append(generate(decoder, whole_window(frames), prompt, lambda _: asked, drawn))  # type: ignore[arg-type]
            differing = int((tokens[0] != tokens[1]).sum())
            lines.add(check=f"exact {way}", status=passed(differing == 0), steps=frames + 3, differing=differing)


def logits(bench: Bench, lines: Lines) -> None:
    """Teacher-forced over 200 steps."""
    exact_model = build_model(bench, precision="float32")
    for version, precision, kv in (
        ("v3", "float16", None), ("v1", "float16", None), ("v3", "float16", "int8"), ("v3", "bfloat16", None),
        ("v3", "int8", None), ("v1", "int8", None), ("v3", "float32", None),
    ):  # fmt: skip
        name, limit = f"logits {version} {precision}", LIMITS.get(precision, 1e-4)
        if kv:
            name, limit = f"{name}, int8 cache", LIMITS["int8 cache"]
        with lines.guarded(check=name):
            decoder = build_decoder(bench, build_model(bench, precision=precision), version, kv)
            error = logits_error(decoder, exact_model, bench.pick(197, 20))
            lines.add(check=name, status=passed(error <= limit), relative_error=error, limit=limit)


def passed(good: bool) -> str:
    return "passed" if good else "failed"


# -- in company --------------------------------------------------------------------------------------------------------


def some_request(bench: Bench, config: ModelConfig, seed: int, frames: int, **options: Any) -> Request:
    """A request whose text and parameters follow from its seed."""
    chance = random.Random(seed)
    ways: list[dict[str, Any]] = [{"top_k": 250}, {"top_k": 20, "temperature": 1.3}, {"top_k": 0, "top_p": 0.9}]
    way = chance.choice(ways) | {"cfg_coef": chance.choice((1.5, 3.0, 6.0))}
    given = {"window": frames, "stride": frames - 1, "prompt": 0} | options
    prompt = torch.randint(0, config.vocab_size, (config.num_codebooks, given.pop("prompt"))).to(bench.device)
    asked = conditions(config, bench.device, [chance.randint(3, 20)], seed, null=chance.random() < 0.9)
    params = sampler(config, bench.device, None, **way).params
    return Request(prompt, frames, given["window"], given["stride"], partial(_given, asked), params, seed)


def played(
    bench: Bench, decoder: CudaDecoder, slots: int, requests: Sequence[Request], *, every: int = 0, shadow: bool = False
) -> tuple[dict[int, Tensor], dict[int, RequestError]]:
    """All requests through the slots, one admitted `every` so many steps (0: as many as fit, at once).

    The tokens [K, T] of each by its number in `requests`, and what the others failed of.
    """
    engine = SlotEngine(decoder, slots, max(r.window for r in requests), device=bench.device, shadow=shadow)
    waiting, step = list(range(len(requests))), 0
    frames: dict[int, list[Tensor]] = {}
    failed: dict[int, RequestError] = {}
    numbers: dict[int, int] = {}
    while waiting or engine.running:
        while waiting and engine.free and (not every or step >= every * waiting[0]):
            numbers[engine.admit(requests[waiting[0]])[0]] = waiting[0]
            frames[waiting.pop(0)] = []
        try:
            for number, new in engine.step().items():
                frames[numbers[number]].append(new)
        except RequestError as error:
            for number in error.requests:
                failed[numbers[number]] = error
                del frames[numbers[number]]
        step += 1
    return {n: torch.cat(parts, 1).cpu() for n, parts in frames.items()}, failed


def alone(bench: Bench, decoder: CudaDecoder, request: Request, shadow: bool = False) -> Tensor:
    return played(bench, decoder, 1, [request], shadow=shadow)[0][0]


def seeds(bench: Bench, lines: Lines) -> None:
    """v3: a request alone, in every bucket, in some slot, among neighbours that come and go."""
    model, chance = build_model(bench), random.Random(1)
    for kv, buckets in ((None, BUCKETS), ("int8", (8, 64))):
        decoder = build_decoder(bench, model, "v3", kv)
        for count in bench.pick(buckets, buckets[:3]):
            name = f"seeds, {2 * count} rows" + (f", {kv} cache" if kv else "")
            with lines.guarded(check=name):
                longest = bench.pick(40, 8)
                lengths = [chance.randint(longest // 2, longest + 5) for _ in range(count)]
                mix = [some_request(bench, model.config, 100 * count + n, t) for n, t in enumerate(lengths)]
                tokens, failed = played(bench, decoder, count, mix)
                looked = {0, count // 3, count - 1, chance.randrange(count)}
                wrong = [n for n in looked if not torch.equal(tokens[n], alone(bench, decoder, mix[n]))]
                lines.add(check=name, status=passed(not wrong and not failed), looked_at=len(looked), wrong=wrong)


def fixed(bench: Bench, lines: Lines) -> None:
    """v1 promises the same tokens in a bucket of the same size only: other slots, other neighbours."""
    model, frames, count = build_model(bench), bench.pick(40, 8), bench.pick(8, 3)
    decoder = build_decoder(bench, model, "v1")
    asked, found = some_request(bench, model.config, 7, frames), []
    for place in (0, count - 1):
        mix = [some_request(bench, model.config, 1000 * place + n, frames) for n in range(20, 20 + count - 1)]
        mix.insert(place, asked)
        all_guided(bench, model.config, mix)
        found.append(played(bench, decoder, count, mix)[0][place])
    lines.add(check="seeds of v1 in one bucket", status=passed(torch.equal(*found)), rows=2 * count)


def all_guided(bench: Bench, config: ModelConfig, mix: list[Request]) -> None:
    """Buckets count rows, and a request without guidance has fewer: give all of them texts with guidance."""
    for request in mix:
        asked = conditions(config, bench.device, [6], (request.seed or 0) + 1)
        request.conditions_of = partial(_given, asked)


def _given(asked: Conditions, _: object) -> Conditions:
    return asked


def graph(bench: Bench, lines: Lines) -> None:
    """Captured and launched kernel by kernel: the same tokens."""
    model, frames = build_model(bench), bench.pick(60, 8)
    mix = [some_request(bench, model.config, seed, frames) for seed in (1, 2, 3)]
    for version in ("v3", "v1"):
        for pdl in {False, bench.pdl} if version == "v3" else {False}:
            name = f"graph {version}" + (", dependent launches" if pdl else "")
            with lines.guarded(check=name):
                decoders = [build_decoder(bench, model, version, graphs=g, pdl=pdl and g) for g in (True, False)]
                a, b = (played(bench, decoder, 3, mix, every=5)[0] for decoder in decoders)
                wrong = [n for n in a if not torch.equal(a[n], b[n])]
                lines.add(check=name, status=passed(not wrong), wrong=wrong)


def fuzz(bench: Bench, lines: Lines) -> None:
    """v3, a small model: requests of any length, windows, prompts and parameters that come and go; each as if alone."""
    model, chance = build_model(bench, config=TINY), random.Random(3)
    decoder = build_decoder(bench, model)
    mix = []
    for number in range(bench.pick(150, 5)):
        total, options = chance.randint(4, 45), {"window": 30, "stride": 18, "prompt": chance.choice((0, 0, 0, 3))}
        mix.append(some_request(bench, model.config, number, total, **options))
    with lines.guarded(check="fuzz"):
        tokens, failed = played(bench, decoder, bench.pick(16, 3), mix, every=1, shadow=True)
        wrong = [n for n in tokens if not torch.equal(tokens[n], alone(bench, decoder, mix[n], shadow=True))]
        lines.add(check="fuzz", status=passed(not wrong and not failed), requests=len(mix), wrong=wrong[:20])


def short(bench: Bench, lines: Lines) -> None:
    """Every kernel a few times, for compute-sanitizer and Triton's interpreter: three requests that come and go."""
    for version, precision, kv in (
        ("v3", "float16", None), ("v3", "float16", "int8"), ("v3", "int8", None), ("v3", "bfloat16", None),
        ("v1", "float16", None),
    ):  # fmt: skip
        name = f"short {version} {precision}" + (f", {kv} cache" if kv else "")
        with lines.guarded(check=name):
            decoder = build_decoder(bench, build_model(bench, precision=precision, config=TINY), version, kv)
            mix = [some_request(bench, TINY, seed, 6) for seed in (1, 2, 3)]
            tokens, failed = played(bench, decoder, 3, mix, every=2)
            lines.add(check=name, status=passed(len(tokens) == 3 and not failed))


PARTS = {
    "exact": exact, "logits": logits, "seeds": seeds, "graph": graph, "fixed": fixed, "fuzz": fuzz,
    "short": short,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(run_part(PARTS, __doc__ or ""))
