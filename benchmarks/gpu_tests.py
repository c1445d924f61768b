"""The tests that are marked `gpu`, where pytest is installed, with whatever plugins there are.

python benchmarks/gpu_tests.py --part tests:decoder
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

from gpu_lines import Bench, Lines, run_part

from musicgen_fast.bench.machine import ROOT

FILES = {"decoder": "test_gpu_decoder.py", "package": "test_gpu.py"}


def tests(bench: Bench, lines: Lines, what: str) -> None:
    """One file; absent where pytest is, or something that the file imports. On a CPU all of them are skipped."""
    if find_spec("pytest") is None:
        lines.add(check=f"tests {what}", status="absent", why="pytest is not installed")
        return
    # No options of pyproject.toml: they ask for plugins, and are strict about it.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short", "-rs"]
    done = subprocess.run(
        [*command, f"tests/{FILES[what]}"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
    lines.add(check=f"tests {what}", **outcome(done.returncode, done.stdout))


def outcome(status: int, output: str) -> dict[str, object]:
    """What pytest's exit status and its last lines say."""
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error)", output[-2000:])}
    missing = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", output)
    if status == 2 and missing and "musicgen_fast" not in missing[1]:
        return {"status": "absent", "why": f"{missing[1]} is not installed", **counts}
    if status == 0 and not counts.get("passed"):
        return {"status": "absent", "why": "all tests were skipped", **counts}
    return {"status": "passed" if status == 0 else "failed", "exit_status": status, **counts}


PARTS = {f"tests:{what}": partial(tests, what=what) for what in FILES}

if __name__ == "__main__":
    sys.exit(run_part(PARTS, __doc__ or ""))
