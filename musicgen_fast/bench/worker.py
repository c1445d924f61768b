"""One job in a process of its own, so that caches, allocators and peak memory are its own.

    python -m musicgen_fast.bench.worker time '{"provider": "transformers", "model": "random:small", ...}'

prints a JSON document as its last line: of `measure` or, with `parity`, of `parity.parity`. The fields are those of
`job.Job`.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..roofline import step_bytes
from .job import AbsentError, Job, config_of
from .machine import ROOT, read_speed, synchronize
from .parity import parity
from .providers import PROVIDERS

__all__ = ["in_own_process", "measure"]


def in_own_process(
    job: Job, task: str = "time", timeout: float | None = None, module: str = "worker"
) -> dict[str, Any]:
    """The answer of a fresh process; {"absent": the last line of its errors} if it fails or is not done in time.

    `module`: of this package; called with the task and the job's fields, it prints the answer as its last line.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"OMP_NUM_THREADS": str(job.threads), "PYTHONPATH": path}
    if job.model.startswith("random:"):
        settings["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-m", f"{__package__}.{module}", task, json.dumps(asdict(job))]
    try:
        done = subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=timeout
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"absent": f"failed: not done after {timeout:g} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"absent": f"failed: {lines[-1]}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(job: Job) -> dict[str, Any]:
    """Times of the steps in ms, block by block, with the floor of each; or {"absent": why}.

    {"blocks": [{"start", "position", "ms", "floor_ms", "floor_p50_ms"}], "peak_mib", "read_gb_s", "read_p50_gb_s",
    "load_s", "compile_s", "cold_ms", "codebooks"}

    `position` is the middle of the block; `floor_ms` the bytes of a step there over the best speed of reading as many
    with as many threads, in this process just before, `floor_p50_ms` over the median. `peak_mib`: the most memory while
    generating, of the GPU on cuda. `load_s`: until the model was ready; `compile_s`: what compiling took after that
    (None: nothing is compiled); `cold_ms`: the first call of this process until its first step was done.
    """
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    config = config_of(job.model)
    positions = [start + (job.warmup + job.steps) / 2 for start in job.starts]
    sizes = [
        step_bytes(config, job.precision, position, requests=job.requests, text_tokens=job.text_tokens)
        for position in positions
    ]
    speed = read_speed(job.device, job.threads, min(sum(sizes) / len(sizes), 1.5e9))
    began = perf_counter()
    try:
        run = PROVIDERS[job.provider](job)
    except AbsentError as reason:
        return {"absent": str(reason)}
    load_s, compile_s, cold_ms = perf_counter() - began, getattr(run, "compile_s", None), 0.0
    reset_peak(job.device)
    blocks = []
    for start, position, size in zip(job.starts, positions, sizes, strict=True):
        times: list[float] = []
        count = itertools.count()

        def step(times: list[float] = times, count: Iterator[int] = count) -> None:
            if next(count) % job.every == 0:
                synchronize(job.device)
                times.append(perf_counter())

        began = perf_counter()
        run(step, start)
        cold_ms = cold_ms or 1000 * (times[1] - began)  # peers are stamped before a step, so the second stamp is meant
        ms = [1000 * (after - before) / job.every for before, after in zip(times, times[1:], strict=False)]
        floors = {"floor_ms": 1000 * size / speed.best, "floor_p50_ms": 1000 * size / speed.median}
        blocks.append({"start": start, "position": position, "ms": ms[job.warmup // job.every :], **floors})
    return {
        "blocks": blocks,
        "peak_mib": round(peak_bytes(job.device) / 2**20),
        "read_gb_s": speed.best / 1e9,
        "read_p50_gb_s": speed.median / 1e9,
        "load_s": load_s - (compile_s or 0),
        "compile_s": compile_s,
        "cold_ms": cold_ms,
        "codebooks": config.num_codebooks,
    }


def reset_peak(device: str) -> None:
    """Forget what loading took: the peak is that of generating."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed: 740 MiB after a cast to bfloat16
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        pass  # not Linux, or not allowed: the peak of the process then


def peak_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(task: str, fields: str) -> None:
    given = json.loads(fields)
    job = Job(**{**given, "starts": tuple(given.get("starts", Job.starts))})
    print(json.dumps({"time": measure, "parity": parity}[task](job)))


if __name__ == "__main__":
    main(*sys.argv[1:])
