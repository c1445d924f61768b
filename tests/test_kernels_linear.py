"""`kernels/linear.py` under Triton's interpreter, on the CPU, against plain torch.

In a child process, because the interpreter must be chosen before triton is first imported. `test_gpu_kernels_linear.py`
runs the same cases on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpreted(check: str) -> Any:
    """What a check_... of kernels_linear_cases returns in a process where Triton interprets."""
    code = f"import json; from tests import kernels_linear_cases as c; print(json.dumps(c.{check}()))"
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # numpy warns of the NaN and infinities that are there on purpose
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code]
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_norm_linear() -> None:
    cases, wrong = interpreted("check_norm_linear")
    assert cases > 60 and wrong == []


def test_linear_parts() -> None:
    cases, wrong = interpreted("check_linear_parts")
    assert cases > 20 and wrong == []


def test_rows_do_not_depend_on_their_number() -> None:
    assert interpreted("check_rows_alone") == []


def test_parts_do_not_depend_on_the_number_of_rows() -> None:
    assert interpreted("check_parts_alone") == []


def test_broken_rows_break_no_others() -> None:
    assert interpreted("check_silent_and_broken_rows") == []
