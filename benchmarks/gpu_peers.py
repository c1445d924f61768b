"""What others take for a step on this GPU: transformers and audiocraft, eager, and fast-musicgen's graph.

    python benchmarks/gpu_peers.py --part peers

The measurement is that of `musicgen-fast bench latency` (`musicgen_fast/bench/`), with a time stamp every 10 steps, so
that waiting for the GPU does not count. What is not installed, or does not run here, is named with the reason.
"""

from __future__ import annotations

import sys
import tempfile

from gpu_lines import POSITIONS, Bench, Lines, run_part

from musicgen_fast.bench.job import Job
from musicgen_fast.bench.latency import quantile
from musicgen_fast.bench.providers import why_absent
from musicgen_fast.bench.worker import in_own_process

PROVIDERS = ("transformers", "audiocraft", "fast_musicgen")
LIMIT = 90  # seconds for one of them


def peers(bench: Bench, lines: Lines) -> None:
    """One request with guidance at musicgen-small's size, in float16."""
    for provider in PROVIDERS:
        with lines.guarded(measures="peer", provider=provider), tempfile.TemporaryDirectory() as folder:
            if reason := why_absent(provider):
                lines.add(measures="peer", provider=provider, absent=reason)
                continue
            model = _tiny_model(folder) if bench.tiny else "random:small"
            starts = bench.pick(tuple(p - 40 for p in POSITIONS), (0,))
            size = {"steps": 80, "warmup": 20, "every": 10} if not bench.tiny else {"steps": 8, "warmup": 2, "every": 2}
            precision = "float16" if bench.cuda else "float32"
            job = Job(provider, model, precision, bench.device, threads=4, starts=starts, **size)
            answer = in_own_process(job, timeout=LIMIT)
            if "absent" in answer:
                lines.add(measures="peer", provider=provider, absent=answer["absent"])
                continue
            for block in answer["blocks"]:
                ms = quantile(block["ms"], 0.5)
                lines.add(
                    measures="peer", provider=provider, precision=precision, position=block["position"], ms=ms,
                    stamps=len(block["ms"]),
                )  # fmt: skip


def _tiny_model(folder: str) -> str:
    from musicgen_fast.checkpoints.write import write_transformers_folder

    return str(write_transformers_folder(f"{folder}/tiny"))


if __name__ == "__main__":
    sys.exit(run_part({"peers": peers}, __doc__ or ""))
