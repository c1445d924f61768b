"""`import musicgen_fast` is cheap, and works on a bare machine: no GPU, no compiled extension, nothing heavy loaded.

Each check runs in a fresh interpreter, because what pytest itself has imported must not count.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("triton", "transformers", "sentencepiece", "soundfile", "huggingface_hub", "tokenizers", "demucs", "ray")


def run(code: str, **environment: str) -> Any:
    """The JSON that `code` prints on its last line, run without a GPU."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_takes_under_a_second_after_torch_and_loads_nothing_heavy() -> None:
    code = """
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import musicgen_fast
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "new": sorted(set(sys.modules) - before), "cuda": torch.cuda.is_initialized()}))
"""
    runs = [run(code) for _ in range(3)]
    new = {name.split(".")[0] for name in runs[0]["new"]}
    assert "musicgen_fast" in new
    heavy = sorted(new & set(HEAVY))
    assert not heavy, f"import musicgen_fast loads {heavy}; import them where they are used"
    assert "musicgen_fast._C" not in runs[0]["new"], "the extension is loaded when first used, not at import"
    assert not runs[0]["cuda"]
    assert statistics.median(r["seconds"] for r in runs) < 1.0, runs


def test_works_without_the_extension() -> None:
    code = """
import json, sys
sys.modules["musicgen_fast._C"] = None  # what an install without a compiler looks like to an import
import musicgen_fast
import torch
from musicgen_fast import native, philox
x = torch.arange(2)
shape = list(philox.race_noise(x, x, x, 4, 8).shape)
print(json.dumps({"available": native.available(), "why": native.why_not(), "noise": shape}))
"""
    seen = run(code)
    assert seen["available"] is False and seen["noise"] == [2, 4, 8]
    assert "compiler" in seen["why"] and "pip install" in seen["why"]


def test_kernels_are_installed_inside_the_package() -> None:
    """`kernels/` of the repository is `musicgen_fast.kernels`; a top-level `kernels` belongs to somebody else."""
    where = run("import json, musicgen_fast.kernels as k; print(json.dumps(k.__file__))")
    assert Path(where).name == "__init__.py" and Path(where).parent.name == "kernels"


def test_the_installed_version_is_the_declared_one() -> None:
    declared = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert version("musicgen-fast") == declared.split('"')[1]
