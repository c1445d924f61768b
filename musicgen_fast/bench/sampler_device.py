"""What a draw costs on a GPU: number and time of its kernels, and its time as a node of a CUDA graph.

Needs a CUDA device, which must be the current one. Knows nothing of what is sampled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .latency import quantile
from .sampler_case import Case, first_line
from .sampler_peers import Sampler, build, reset

__all__ = ["device_costs", "graph_us", "kernels"]

DRAWS = 20  # that are profiled
NODES = 100  # draws in the captured graph


def device_costs(case: Case, name: str) -> dict[str, Any]:
    """{"kernels": count, "kernel_us": their time} of a draw, {"graph_us": time of a node} or {"graph_absent": why}."""
    try:
        sampler, logits = build(name, case), case.logits()
        costs: dict[str, Any] = kernels(sampler, logits)
    except Exception as error:
        return {"graph_absent": first_line(error)}
    if name.startswith("sample:") or name == "flashinfer":
        return costs | {"graph_absent": "waits for the device, or takes its seed from the host"}
    try:
        return costs | {"graph_us": graph_us(sampler, logits)}
    except Exception as error:
        return costs | {"graph_absent": first_line(error)}


def kernels(sampler: Sampler, logits: Tensor) -> dict[str, Any]:
    """Number and time of what a draw runs on the device, copies and fills among them: means of 20 draws."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    reset(sampler)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(DRAWS):
            sampler(logits)
        torch.cuda.synchronize()
    waits = ("Sync", "Wait")  # newer profilers list these beside the kernels
    ran = [e for e in trace.events() if e.device_type == DeviceType.CUDA and not any(w in e.name for w in waits)]
    busy = sum(event.time_range.elapsed_us() for event in ran)
    return {"kernels": len(ran) / DRAWS, "kernel_us": busy / DRAWS}


def graph_us(sampler: Sampler, logits: Tensor, replays: int = 30) -> float:
    """Time of a draw as a node of a CUDA graph: the median replay of 100 draws, over 100."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            sampler(logits)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reset(sampler)  # captured as well: every replay must find unknown cells
        for _ in range(NODES):
            sampler(logits)
    taken = []
    for number in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            taken.append(1000 * start.elapsed_time(end) / NODES)
    return quantile(taken, 0.5)
