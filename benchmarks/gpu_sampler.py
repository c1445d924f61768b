"""Do the samplers of this GPU draw the right tokens? Golden ones, a million random rows, the odd shapes of the tests.

    python benchmarks/gpu_sampler.py --part rows:triton

Against the torch reference on the same device. Needs no more than torch (and what the backend needs).
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gpu_lines import Bench, Lines, run_part
from torch import Tensor

from musicgen_fast.bench.machine import ROOT
from musicgen_fast.sampling import Draw, SamplingParams, draw, sample
from musicgen_fast.sampling.backends import why_not

ROWS_AT_ONCE = 16_384


def golden_logits(case: dict[str, Any]) -> Tensor:
    """The inputs of a golden case by the formula in its file; as in tests/, but with nothing beyond torch."""
    shape = (case["NB"], case["B"], case["K"], case["V"])
    index = torch.arange(math.prod(shape))

    def uniform(stream: int) -> Tensor:
        x = (index * 0x9E3779B1 + (case["case"] * 0x85EBCA6B + stream * 0xC2B2AE35) % 2**32) % 2**32
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) % 2**32
        return (x ^ (x >> 16)).double() / 2.0**32

    s = (uniform(1) + uniform(2) + uniform(3) + uniform(4) - 2) * 6
    changed = {
        "ties": lambda: (s * 4).round() / 4,
        "flat": lambda: 0 * s,
        "inf": lambda: torch.where(uniform(5) < 0.5, -math.inf, s),
        "nan": lambda: torch.where(uniform(5) < 0.01, math.nan, s),
        "wide": lambda: 20 * s,
    }
    logits = changed.get(case["kind"], lambda: s)().float().view(shape)
    if case["kind"] == "posinf":
        logits[..., 5::97] = math.inf
    return logits.to(getattr(torch, case["dtype"]))


def check_golden(backend: str, device: str) -> dict[str, Any]:
    golden = json.loads((ROOT / "tests" / "assets" / "golden_sampling.json").read_text())
    wrong, cells, cases = 0, 0, golden["cases"] + golden["special"]
    names = ("temperature", "top_k", "top_p", "min_p", "cfg_coef", "cfg_coef_beta")
    for case in cases:
        given = {n: torch.tensor(case[n]) if isinstance(case[n], list) else case[n] for n in names}
        step, stream = torch.tensor(case["step"]), torch.tensor(case.get("streams", 0))
        logits, seed = golden_logits(case).to(device), torch.tensor(case["seeds"])
        drawn = sample(logits, **given, seed=seed, step=step, stream=stream, backend=backend).cpu()
        wrong += int((drawn != torch.tensor(case["tokens"])).sum())
        cells += drawn.numel()
    return {"cases": len(cases), "cells": cells, "mismatches": wrong}


@dataclass(frozen=True)
class Variant:
    """What a kernel is specialised for; few, because Triton compiles each for seconds."""

    branches: int
    dtype: torch.dtype
    vocab: int
    codebooks: int
    filters: str  # of k, p, m
    into_sequence: bool = False
    noise: bool = False


VARIANTS = (
    Variant(2, torch.float16, 2048, 4, "k", into_sequence=True),
    Variant(2, torch.float32, 2048, 4, "k"),
    Variant(2, torch.bfloat16, 2048, 4, "k", into_sequence=True),
    Variant(2, torch.float16, 2048, 8, "p"),
    Variant(2, torch.float32, 2048, 4, "p", into_sequence=True),
    Variant(1, torch.bfloat16, 2048, 4, "kpm"),
    Variant(3, torch.float16, 2048, 4, "kpm", into_sequence=True),
    Variant(3, torch.float32, 1024, 9, "m"),
    Variant(2, torch.float16, 2048, 4, "", into_sequence=True),
    Variant(1, torch.float32, 400, 4, "kp"),
    Variant(2, torch.float16, 2048, 4, "k", into_sequence=True, noise=True),
    Variant(2, torch.float32, 4096, 1, "kpm", noise=True),
)


def random_logits(variant: Variant, batch: int, generator: torch.Generator) -> Tensor:
    """[NB, B, K, V]; each cell of one kind: normal, narrow, wide, tied, flat, half -inf, some NaN, some +inf, none."""
    device = generator.device
    shape = (variant.branches, batch, variant.codebooks, variant.vocab)
    s = torch.randn(shape, generator=generator, device=device) * 2.5
    chance = torch.rand(shape, generator=generator, device=device)
    kind = torch.randint(0, 40, (1, batch, variant.codebooks, 1), generator=generator, device=device)
    s = torch.where(kind < 3, s * torch.tensor([1.0, 1e-3, 20.0], device=device)[kind.clamp(max=2)], s)
    s = torch.where((kind >= 3) & (kind <= 6), (s * 4).round() / 4, s)
    s = torch.where(kind == 7, -0.0 * chance, s)
    s = torch.where((kind == 8) & (chance < 0.5), -math.inf, s)
    s = torch.where((kind == 9) & (chance < 0.05), math.nan, s)
    s = torch.where((kind == 10) & (chance < 0.01), math.inf, s)
    s = torch.where(kind == 11, math.nan, s)
    return s.to(variant.dtype)


def random_inputs(number: int, batch: int, device: str) -> Draw:
    """Draw `number` of a sequence without end, all of its parameters per cell."""
    variant = VARIANTS[number % len(VARIANTS)]
    host = torch.Generator().manual_seed(number)
    there = torch.Generator(device).manual_seed(number)
    cells = (batch, variant.codebooks)

    def pick(values: list[float], shape: tuple[int, ...] = cells) -> Tensor:
        return torch.tensor(values)[torch.randint(0, len(values), shape, generator=host)]

    def integers(low: int, high: int, shape: tuple[int, ...] = (batch,)) -> Tensor:
        return torch.randint(low, high, shape, generator=host)

    params = SamplingParams.build(
        *cells,
        cfg_coef=pick([3.0, 1.0, 0.0, -2.0, 4.7], (batch,)),
        cfg_coef_beta=pick([5.0, 1.0, 0.3], (batch,)),
        temperature=pick([1.0, 1.0, 0.7, 1.3, 0.01, 30.0, 0.0]),
        top_k=pick([250, 250, 0, 1, 2, 50, 3000, 399]) if "k" in variant.filters else 0,
        top_p=pick([0.9, 0.9, 0.0, 1e-6, 0.3, 0.999, 1.0]) if "p" in variant.filters else 0.0,
        min_p=pick([0.05, 0.0, 0.5, 1e-4]) if "m" in variant.filters else 0.0,
    )
    logits = random_logits(variant, batch, there)
    inputs = Draw(logits, params, torch.zeros(cells, dtype=torch.int64), torch.zeros(cells, dtype=torch.int32))
    if variant.noise:
        inputs.noise = torch.empty(logits.shape[1:], device=device).exponential_(generator=there)
        inputs.divide = torch.device(device).type == "cpu"
    else:
        inputs.seed, inputs.stream = integers(-(2**63), 2**63 - 1), integers(0, 2**32)
        inputs.step = integers(0, 2**34)
    if variant.into_sequence:
        length = 8
        known = integers(0, 4, (*cells, length)) == 0
        inputs.tokens = torch.where(known, integers(0, variant.vocab, (*cells, length)), -1).int()
        inputs.column = integers(-1, length + 1).int()
        inputs.frames = integers(-1, 5, (length, variant.codebooks)).int()
    return moved(inputs, device)


def moved(inputs: Any, device: str) -> Any:
    """A Draw or SamplingParams with all of its tensors on `device`."""
    tensors = {name: value.to(device) for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    if isinstance(inputs, Draw):
        tensors["params"] = moved(inputs.params, device)
    return replace(inputs, **tensors)


def check_rows(backend: str, device: str, rows: int, at_once: int = ROWS_AT_ONCE) -> dict[str, Any]:
    """Tokens, sequences and status of at least `rows` cells, in whole passes over the variants."""
    done, wrong, number, bad = 0, 0, 0, []
    while done < rows or number % len(VARIANTS):
        variant = VARIANTS[number % len(VARIANTS)]
        inputs = random_inputs(number, max(1, at_once // variant.codebooks), device)
        other = replace(inputs, tokens=inputs.tokens.clone(), status=inputs.status.clone())
        draw(inputs, "torch")
        draw(other, backend)
        differs = (inputs.tokens != other.tokens).view(*inputs.status.shape, -1).any(-1)
        count = int((differs | (inputs.status != other.status)).sum())
        if count:
            bad.append({"number": number, "variant": str(variant), "mismatches": count})
        done, wrong, number = done + inputs.status.numel(), wrong + count, number + 1
    return {"rows": done, "mismatches": wrong, "bad": bad[:20]}


def check_draws(backend: str, device: str, count: int = 24, cells: int = 1000) -> dict[str, Any]:
    """The draws of the tests, few because each is another shape, hence another kernel of Triton's."""
    sys.path.insert(0, str(ROOT))
    from tests.sampler_cases import compare, describe, random_draw

    done, wrong, bad = 0, 0, []
    for seed in range(count):
        inputs = random_draw(seed, cells)
        found = compare(moved(inputs, device), lambda it: draw(it, backend))
        done, wrong = done + inputs.status.numel(), wrong + len(found)
        if found:
            bad.append({"seed": seed, "what": describe(inputs), "mismatches": len(found), "first": str(found[0])})
    return {"rows": done, "mismatches": wrong, "bad": bad}


def check(bench: Bench, lines: Lines, what: str, backend: str) -> None:
    """One kind of check of one backend: a line."""
    name = f"{what} {backend}"
    if reason := why_not(backend, torch.device(bench.device)):
        lines.add(check=name, status="absent", why=reason)
        return
    if what == "golden":
        found = check_golden(backend, bench.device)
    elif what == "rows":
        found = check_rows(backend, bench.device, bench.pick(1_000_000, 1), bench.pick(ROWS_AT_ONCE, 32))
    else:
        found = check_draws(backend, bench.device, bench.pick(24, 4), bench.pick(1000, 40))
    lines.add(check=name, status="failed" if found["mismatches"] else "passed", **found)


PARTS = {
    f"{what}:{backend}": partial(check, what=what, backend=backend)
    for what in ("golden", "rows", "draws")
    for backend in ("torch", "cpu", "triton", "cuda")
}

if __name__ == "__main__":
    sys.exit(run_part(PARTS, __doc__ or ""))
