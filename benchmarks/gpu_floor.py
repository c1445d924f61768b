"""What this GPU can do, before any decoder is blamed: six measurements, each a few lines of JSON.

    python benchmarks/gpu_floor.py --part floor

Reading 1.5 GB; the gap between dependent kernels of a graph; products with a few rows against cuBLAS, the weights from
memory and not from the cache; a step without attention as one graph; attention over a cache; the clocks meanwhile.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from gpu_lines import Bench, Lines, run_part, smi
from gpu_tools import (
    build_decoder,
    build_model,
    build_ops,
    graph_of,
    median_ms,
    opened_at,
    read_gb_s,
    sized,
)  # fmt: skip
from torch import Tensor

from musicgen_fast.kernels import heuristics
from musicgen_fast.roofline import step_weights

CHAIN = 200  # dependent kernels
ROTATED = 240e6  # bytes of distinct weights, and of distinct caches: several times any L2
HALF = torch.float16
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")


def floor(bench: Bench, lines: Lines) -> None:
    """All six; the first one that fails does not keep the others from running."""
    with lines.guarded(measures="read"):
        gb_s = read_gb_s(bench)
        lines.add(measures="read", gb_s=gb_s)
    for part in (bubble, step_chain, attention, clocks, products):
        with lines.guarded(measures=part.__name__):
            part(bench, lines)


# -- 2: the gap between kernels ----------------------------------------------------------------------------------------


def bubble(bench: Bench, lines: Lines) -> None:
    """Microseconds a kernel that does next to nothing but wait for the one before it."""
    if bench.cuda:
        from gpu_kernels import LINK, chain
    else:
        LINK, chain = 128, _torch_chain
    for ctas in bench.pick((1, 132, 528), (1,)):
        buffers = (torch.zeros(ctas * LINK, device=bench.device), torch.zeros(ctas * LINK, device=bench.device))
        for pdl in (False, True) if bench.pdl or not bench.cuda else (False,):

            def body(buffers: tuple[Tensor, Tensor] = buffers, pdl: bool = pdl) -> None:
                chain(buffers, CHAIN, pdl)

            with lines.guarded(measures="bubble", ctas=ctas, pdl=pdl):
                launch = graph_of(bench, body)
                buffers[0].zero_()
                launch()
                right = bool((buffers[0] == CHAIN).all())  # each waited for the one before it
                us = 1000 * median_ms(bench, launch) / CHAIN
                lines.add(measures="bubble", ctas=ctas, pdl=pdl, us_per_kernel=us, right=right)


def _torch_chain(buffers: tuple[Tensor, Tensor], length: int, pdl: bool) -> None:
    for number in range(length):
        torch.add(buffers[number % 2], 1.0, out=buffers[1 - number % 2])


# -- 3: products with a few rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A product of a layer of width d: [M, K] weights; those with a norm before them run `norm_linear`."""

    name: str
    m: int
    k: int
    normed: bool
    gelu: bool = False


def shapes(d: int) -> list[Shape]:
    return [
        Shape("out", d, d, False),
        Shape("qkv", 3 * d, d, True),
        Shape("ffn_in", 4 * d, d, True, gelu=True),
        Shape("ffn_out", d, 4 * d, False),
    ]


def products(bench: Bench, lines: Lines) -> None:
    """Ours and cuBLAS's, over so many matrices in one graph that each comes from memory; the norm is in ours."""
    ops, gb_s = build_ops(bench, "v3"), read_gb_s(bench)
    widths = bench.pick(((1024, (2, 8, 16, 128)), (1536, (2,)), (2048, (2, 16))), ((128, (2, 8)),))
    for d, all_rows in widths:
        for shape in shapes(d):
            count = max(2, round(bench.pick(ROTATED, 1e5) / (2 * shape.m * shape.k)))
            weights = [torch.randn(shape.m, shape.k, device=bench.device, dtype=HALF) / d**0.5 for _ in range(count)]
            for rows in all_rows:
                ours = _ours(bench, ops, shape, weights, rows)
                bodies = {"musicgen_fast": ours, "cublas": _cublas(bench, shape, weights, rows)}
                for who, body in bodies.items():
                    named: dict[str, Any] = {"measures": "product", "who": who, "product": shape.name, "d": d}
                    with lines.guarded(**named, rows=rows):
                        us = 1000 * median_ms(bench, graph_of(bench, body)) / count
                        speed = weights[0].nbytes / us / 1e3
                        lines.add(**named, rows=rows, us=us, gb_s=speed, percent_of_read=100 * speed / gb_s)


def _cublas(bench: Bench, shape: Shape, weights: list[Tensor], rows: int) -> Callable[[], None]:
    x = torch.randn(rows, shape.k, device=bench.device, dtype=HALF)

    def body() -> None:
        for weight in weights:
            F.linear(x, weight)

    return body


def _ours(bench: Bench, ops: Any, shape: Shape, weights: list[Tensor], rows: int) -> Callable[[], None]:
    device, d = bench.device, shape.k
    if not shape.normed:
        a = torch.randn(rows, d, device=device, dtype=HALF)
        parts = torch.zeros(heuristics.parts(shape.m, d), rows, shape.m, device=device)

        def body() -> None:
            for weight in weights:
                ops.linear_parts(a, weight, None, parts, pdl=bench.pdl)

        return body
    x, scratch = torch.randn(rows, d, device=device), torch.zeros(rows, d, device=device, dtype=HALF)
    summed = torch.zeros(heuristics.parts(d, d), rows, d, device=device)  # of the product before it, as in a step
    gamma, beta, closed = torch.ones(d, device=device), torch.zeros(d, device=device), torch.empty_like(x)
    out = torch.empty(rows, shape.m, device=device, dtype=HALF)

    def normed() -> None:
        for weight in weights:
            ops.norm_linear(
                x, summed, closed, scratch, gamma, beta, weight, None, out, gelu=shape.gelu, pdl=bench.pdl
            )  # fmt: skip

    return normed


# -- 4: the chain of a step --------------------------------------------------------------------------------------------


def step_chain(bench: Bench, lines: Lines) -> None:
    """A step of musicgen-small as one graph: whole, and with kernels left out, to see what each kind costs.

    Without attention it is the lower bound of any tuning of attention: above 0.40 ms on an H100, count the boundaries
    between kernels instead of tuning them. `weights_floor_ms`: reading all weights of the products, nothing else.
    """
    model, gb_s = build_model(bench), read_gb_s(bench)
    every, config = build_ops(bench, "v3"), model.config
    names = [name for name in dir(every) if callable(getattr(every, name)) and not name.startswith("_")]
    kinds: dict[str, tuple[str, ...]] = {
        "whole step": (),
        "without attention": ("attention", "cross_attention"),
        "without products": ("norm_linear", "linear_parts"),
        "without the draw": ("sample_rows",),
    }
    weights = 2 * step_weights(config, text_tokens=10**6) / gb_s / 1e6  # cross-attention is not folded in v3
    for title, left_out in kinds.items():
        for pdl in (False, True) if bench.pdl else (False,):
            named: dict[str, Any] = {"measures": "chain", "kernels": title, "pdl": pdl}
            with lines.guarded(**named):
                functions = {name: _nothing if name in left_out else getattr(every, name) for name in names}
                decoder = build_decoder(bench, model, "v3", pdl=pdl, ops=SimpleNamespace(**functions))
                ms = replay_ms(bench, decoder, 1, bench.positions[1])
                lines.add(**named, ms=ms, weights_floor_ms=weights)


def _nothing(*_: Any, **__: Any) -> None:
    pass


@torch.no_grad()
def replay_ms(bench: Bench, decoder: Any, requests: int, position: int, steps: int = 30) -> float:
    """The captured step alone, one after the other without the host between: what the device needs."""
    held = opened_at(bench, decoder, requests, position)
    decoder.step(held.state)  # captures, and tells the table who is there
    launch = list(decoder._graphs.values())[-1]
    each = max(1, min(steps, bench.frames - position - 1) // 3)  # timed twice after a warm-up: all within the window

    def several() -> None:
        for _ in range(each):
            launch()

    ms = median_ms(bench, several, passes=2, warm=1) / each
    decoder._table.forget()  # the kernels have counted further than the host
    return ms


# -- 5: attention ------------------------------------------------------------------------------------------------------


def attention(bench: Bench, lines: Lines) -> None:
    """Ours over caches of several layers, so that none of them is in L2; bytes are those of the positions held."""
    ops, gb_s, config = build_ops(bench, "v3"), read_gb_s(bench), sized(bench)
    capacity, heads, head_dim = bench.pick(1536, 64), config.num_heads, config.head_dim
    for rows in bench.pick((2, 16, 64), (2,)):
        for kv in (None, "int8"):
            per_layer = 2 * rows * heads * capacity * head_dim * (2 if kv is None else 1)
            layers = max(2, min(config.num_layers, round(bench.pick(ROTATED, 1e5) / per_layer)))
            shape = (layers, 2, rows, heads, capacity)
            if kv is None:
                cache, scales = torch.randn(*shape, head_dim, device=bench.device, dtype=HALF), None
            else:
                cache = torch.randint(-127, 128, (*shape, head_dim), device=bench.device, dtype=torch.int8)
                scales = torch.full(shape, 0.01, device=bench.device)
            for position in bench.pick((100, 750, 1500), (20,)):
                named: dict[str, Any] = {"measures": "attention", "rows": rows, "kv": kv or "float16"}
                with lines.guarded(**named, position=position):
                    body = _attention(bench, ops, config.dim, cache, scales, position)
                    us = 1000 * median_ms(bench, graph_of(bench, body)) / layers
                    held = (cache.nbytes + (0 if scales is None else scales.nbytes)) / layers * position / capacity
                    speed = held / us / 1e3
                    percent = 100 * speed / gb_s
                    lines.add(**named, position=position, us=us, gb_s=speed, percent_of_read=percent, layers=layers)


def _attention(
    bench: Bench, ops: Any, dim: int, cache: Tensor, scales: Tensor | None, position: int
) -> Callable[[], None]:
    layers, _, rows, heads, capacity, head_dim = cache.shape
    device = bench.device
    qkv = torch.randn(rows, 3 * dim, device=device, dtype=HALF)
    slot = torch.arange(rows, dtype=torch.int32, device=device)
    length = torch.full((rows,), position - 1, dtype=torch.int32, device=device)
    out = torch.empty(rows, dim, device=device, dtype=HALF)
    scratch = torch.zeros(rows, heads, heuristics.num_splits(capacity), head_dim + 2, device=device)
    arrived = torch.zeros(rows, heads, dtype=torch.int32, device=device)

    def body() -> None:
        for layer in range(layers):
            own = None if scales is None else scales[layer]
            ops.attention(qkv, cache[layer], own, slot, length, out, scratch, arrived, pdl=bench.pdl)

    return body


# -- 6: the clocks -----------------------------------------------------------------------------------------------------


def clocks(bench: Bench, lines: Lines) -> None:
    """nvidia-smi's figures at rest and in the middle of two seconds of steps."""
    rest = smi(CLOCKS)
    if rest is None:
        lines.add(measures="clocks", absent="nvidia-smi is not there or says nothing")
        return
    busy: list[dict[str, str] | None] = []
    model = build_model(bench)
    x = torch.ones(2, model.config.dim, device=bench.device, dtype=HALF)
    weights: list[Tensor] = [layer.qkv.weight for layer in model.layers]  # type: ignore[misc, union-attr]

    def body() -> None:
        for weight in weights:
            F.linear(x, weight)

    launch = graph_of(bench, body)
    watcher = threading.Timer(1.0, lambda: busy.append(smi(CLOCKS)))
    watcher.start()
    while watcher.is_alive():
        for _ in range(100):
            launch()
        if bench.cuda:
            torch.cuda.synchronize()
    lines.add(measures="clocks", rest=rest, busy=busy[0] if busy else None)


PARTS = {"floor": floor}

if __name__ == "__main__":
    sys.exit(run_part(PARTS, __doc__ or ""))
