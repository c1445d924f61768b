"""How fast is the CUDA decoder on this GPU? Milliseconds a step, throughput of batches, the first frame, starting up.

    python benchmarks/gpu_steps.py --part small

Floors come from the speed of reading that was measured in the same process. `replay` is the captured step alone, one
after the other: what the device needs. `window` is `engine.generate` over 30 s, the host included: what a user gets.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from gpu_floor import replay_ms
from gpu_lines import Bench, Lines, Part, run_part
from gpu_tools import (
    TEXT_TOKENS,
    average_floor_ms,
    build_decoder,
    build_model,
    conditions,
    floor_ms,
    no_prompt,
    opened_at,
    read_gb_s,
    sampler,
    whole_window,
)  # fmt: skip

from musicgen_fast.decoder_for import decoder_for
from musicgen_fast.decoders.cuda import CudaDecoder
from musicgen_fast.engine import Generation, generate
from musicgen_fast.machine import synchronize
from musicgen_fast.model import Transformer
from musicgen_fast.slot_engine import Request, SlotEngine
from musicgen_fast.windows import WindowPlan

H100_GB_S = 3000.0  # what the ceilings of the design were computed with
# With the text folded into the projections around it, where the decoder has that.
FOLDED = (("v3 folded", "float16", None),) if "fold" in inspect.signature(CudaDecoder).parameters else ()
VARIANTS = (
    ("v3", "float16", None), ("v1", "float16", None), ("v3", "float16", "int8"), ("v3", "int8", None),
    ("v3", "int8", "int8"), ("v3", "bfloat16", None), ("v1", "float32", None), *FOLDED,
)  # fmt: skip
SECONDS = 30.0  # of a window


# -- a step ------------------------------------------------------------------------------------------------------------


def steps(bench: Bench, lines: Lines, size: str) -> None:
    """One request with guidance: the device's time at three positions, and a whole window."""
    gb_s = read_gb_s(bench)
    lines.add(measures="read", gb_s=gb_s)
    for version, precision, kv in VARIANTS if size == "small" else (*VARIANTS[:4], *FOLDED):
        named = {"size": size, "version": version, "precision": precision, "kv": kv or "as activations"}
        with lines.guarded(measures="step", **named):
            model = build_model(bench, size, precision)
            decoder = build_decoder(bench, model, version, kv)
            for position in bench.positions:
                ms = replay_ms(bench, decoder, 1, position)
                least = floor_ms(model.config, precision, kv, 1, position, gb_s)
                lines.add(measures="step", **named, position=position, ms=ms, floor_ms=least, percent=100 * least / ms)
            ms = window_ms(bench, decoder, 1)
            least = average_floor_ms(model.config, precision, kv, 1, bench.frames, gb_s)
            lines.add(measures="window", **named, ms=ms, floor_ms=least, percent=100 * least / ms, real_time=20 / ms)
            del model, decoder
            if bench.cuda:
                torch.cuda.empty_cache()


def window_ms(bench: Bench, decoder: CudaDecoder, requests: int) -> float:
    """A step's average over a whole window, by `engine.generate`, the second time."""
    config = decoder.config
    asked = conditions(config, bench.device, [TEXT_TOKENS] * requests)
    seconds = 0.0
    for _ in range(2):  # the first pass sizes the pools and captures
        drawn = sampler(config, bench.device, list(range(requests)), requests)
        prompt = no_prompt(config, bench.device, requests)
        synchronize(bench.device)
        start = perf_counter()
        generate(decoder, whole_window(bench.frames), prompt, lambda _: asked, drawn)
        synchronize(bench.device)
        seconds = perf_counter() - start
    return 1000 * seconds / (bench.frames + 3)


# -- batches -----------------------------------------------------------------------------------------------------------


def batch(bench: Bench, lines: Lines) -> None:
    """Seconds of sound a second at 1, 8, 32 and 64 requests in lockstep, and of the ceiling that reading sets."""
    gb_s, model = read_gb_s(bench), build_model(bench)
    for kv in (None, "int8"):
        decoder = build_decoder(bench, model, "v3", kv)
        for requests in bench.pick((1, 8, 32, 64), (1, 3)):
            named: dict[str, Any] = {"requests": requests, "kv": kv or "as activations"}
            with lines.guarded(measures="batch", **named):
                ms = window_ms(bench, decoder, requests)
                least = average_floor_ms(model.config, "float16", kv, requests, bench.frames, gb_s)
                usual = average_floor_ms(model.config, "float16", kv, requests, bench.frames, H100_GB_S)
                real_time = 20 * requests  # a step is 20 ms of sound for each
                lines.add(
                    measures="batch", **named, ms=ms, audio_per_second=real_time / ms, ceiling=real_time / least,
                    ceiling_at_3_tb_s=real_time / usual, percent=100 * least / ms,
                )  # fmt: skip
        del decoder
    with lines.guarded(measures="slots"):
        slots(bench, lines, model)


def slots(bench: Bench, lines: Lines, model: Transformer) -> None:
    """What the host adds when 32 requests come one by one, each with a lane of its own, instead of in lockstep."""
    count, measured, config = bench.pick(32, 3), bench.pick(200, 10), model.config
    decoder = build_decoder(bench, model)
    engine = SlotEngine(decoder, count, bench.frames, device=bench.device, shadow=False)
    for seed in range(count):
        asked = conditions(config, bench.device, [TEXT_TOKENS], seed)
        prompt = no_prompt(config, bench.device)[0]
        params = sampler(config, bench.device, None).params
        window = bench.frames
        engine.admit(Request(prompt, window, window, window - 1, partial(_same, asked), params, seed))
    for _ in range(10):
        engine.step()
    synchronize(bench.device)
    start = perf_counter()
    for _ in range(measured):
        engine.step()
    synchronize(bench.device)
    ms = 1000 * (perf_counter() - start) / measured
    engine.close()
    replay = replay_ms(bench, decoder, count, bench.pick(110, 10))
    lines.add(measures="slots", requests=count, ms=ms, replay_ms=replay, position=bench.pick(110, 10))


def _same(asked: Any, _: Any) -> Any:
    return asked


# -- the first frame, and starting up ----------------------------------------------------------------------------------


def first(bench: Bench, lines: Lines) -> None:
    """From the call to the first frame on the host, the text being encoded: projections of the text, four steps."""
    decoder = build_decoder(bench, build_model(bench))
    config = decoder.config
    asked, times = conditions(config, bench.device, [TEXT_TOKENS]), []
    for _ in range(bench.pick(22, 4)):
        synchronize(bench.device)
        start = perf_counter()
        plan = WindowPlan(bench.frames, bench.frames, bench.frames - 1)
        drawn = sampler(config, bench.device, [1])
        with_first = Generation(decoder, plan, no_prompt(config, bench.device), lambda _: asked, drawn)
        next(frames.cpu() for frames in with_first if frames.shape[2])
        times.append(1000 * (perf_counter() - start))
        with_first.close()
    kept = times[2:]
    lines.add(measures="first frame", ms=statistics.median(kept), worst_ms=max(kept), first_call_ms=times[0])


def startup(bench: Bench, lines: Lines) -> None:
    """A process with an empty cache of compiled kernels, and another one with the cache that the first one left."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            file = Path(folder) / f"{name}.jsonl"
            command = [sys.executable, __file__, "--part", "start", "--device", bench.device, "--json", str(file)]
            environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
            with lines.guarded(measures="startup", cache=name):
                try:
                    done = subprocess.run(
                        command + ["--tiny"] * bench.tiny, env=environment, timeout=100, capture_output=True, text=True
                    )  # fmt: skip
                except subprocess.TimeoutExpired:
                    raise RuntimeError("not done after 100 s") from None
                if done.returncode:
                    raise RuntimeError(done.stderr.strip().splitlines()[-1])
                lines.add(measures="startup", cache=name, **json.loads(file.read_text().splitlines()[-1]))


def start(bench: Bench, lines: Lines) -> None:
    """One start: what `decoder_for` does (the trial against the reference), all buckets captured, a first step."""
    model = build_model(bench)
    synchronize(bench.device)
    begin = perf_counter()
    decoder: Any = decoder_for(model) if bench.cuda else build_decoder(bench, model)
    chosen = perf_counter()
    held = opened_at(bench, decoder, 1, bench.positions[0])  # its pools are what will be captured
    if hasattr(decoder, "prepare"):
        sizes = {"rows": bench.pick(128, 8), "capacity": bench.frames + 3}
        wanted = inspect.signature(decoder.prepare).parameters
        decoder.prepare(**{name: size for name, size in sizes.items() if name in wanted})
    synchronize(bench.device)
    captured = perf_counter()
    decoder.step(held.state)
    synchronize(bench.device)
    end = perf_counter()
    served = decoder._ops.norm_linear.__module__.split(".")[-1] if isinstance(decoder, CudaDecoder) else "torch"
    lines.add(
        decoder=served, seconds=end - begin, choose_s=chosen - begin, capture_s=captured - chosen, step_s=end - captured
    )


PARTS: dict[str, Part] = {
    **{size: partial(steps, size=size) for size in ("small", "medium", "large")},
    "batch": batch, "first": first, "startup": startup, "start": start,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(run_part(PARTS, __doc__ or ""))
