"""The Triton sampler under Triton's interpreter, on the CPU: golden tokens and tables, random draws, single traps.

The interpreter must be chosen before triton is first imported, which other tests of the same process may have done. So
each test runs a `check_` function of this file in a child process of its own, and reads what it found as JSON.
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
import torch

from musicgen_fast.sampling import reference, sample
from musicgen_fast.sampling.backends import choose
from musicgen_fast.sampling.draw import DTYPES
from tests.sampler_cases import compare, describe, random_draws
from tests.sampler_edges import edge_draws
from tests.test_sampling import GOLDEN, golden_arguments, golden_logits

ROOT = Path(__file__).parent.parent
FUNCTIONS = Path(__file__).parent / "assets" / "golden_functions.json"
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpreted(check: str, *args: int) -> Any:
    """What check_... returns in a process where Triton interprets."""
    code = f"import json; from tests import test_triton as t; print(json.dumps(t.{check}(*{args})))"
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # numpy warns of the overflows that the rows of +-inf provoke on purpose
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code]
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_golden_tokens() -> None:
    cases, wrong = interpreted("check_golden_tokens")
    assert cases == len(GOLDEN["cases"]) + len(GOLDEN["special"]) and wrong == []


def test_golden_functions() -> None:
    table = json.loads(FUNCTIONS.read_text())
    for name, bits in interpreted("check_golden_functions").items():
        assert bits == table[name], name


def test_rounding_to_half_precision() -> None:
    assert interpreted("check_rounding") == []


def test_branches_are_mixed_with_a_rounding_for_every_operation() -> None:
    assert interpreted("check_mixing") == []


def test_random_rows() -> None:
    rows, wrong = interpreted("check_random_rows", 1, 400, 8)
    print(f"{rows} random rows")
    assert rows >= 400 and wrong == []


@pytest.mark.slow
def test_many_random_rows() -> None:
    rows, wrong = interpreted("check_random_rows", 2, 4000, 16)
    print(f"{rows} random rows")
    assert rows >= 4000 and wrong == []


@pytest.mark.slow
def test_edges() -> None:
    assert interpreted("check_edges") == []


# -- in the child ---------------------------------------------------------------------------------------------------


def check_golden_tokens() -> tuple[int, list]:
    cases, wrong = GOLDEN["cases"] + GOLDEN["special"], []
    for case in cases:
        drawn = sample(golden_logits(case), **golden_arguments(case), backend="triton")
        if drawn.tolist() != case["tokens"]:
            wrong.append((case["case"], drawn.tolist(), case["tokens"]))
    return len(cases), wrong


def check_golden_functions() -> dict[str, list[int]]:
    from tests.triton_functions import functions_kernel

    table = json.loads(FUNCTIONS.read_text())
    x = torch.tensor(table["x"]).to(torch.int32)
    t = torch.tensor(table["t_bits"], dtype=torch.int32).view(torch.float32)
    out = torch.empty(3, len(x))
    functions_kernel[(1,)](x, t, *out, N=len(x), enable_fp_fusion=False)
    return dict(zip(("E_bits", "w_bits", "iw_bits"), out.view(torch.int32).tolist(), strict=True))


def check_rounding() -> list:
    """Half precision as torch rounds it: ties to even, overflow to inf, subnormals, NaN."""
    from tests.triton_functions import rounding_kernel

    g = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=g).to(torch.int32).view(torch.float32)
    x[:2048] = torch.randn(2048, generator=g)
    x[:8] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 65519.0, 65520.0, 1 + 2**-8, 1 + 3 * 2**-8])
    out = torch.empty(2, 4096)
    rounding_kernel[(1,)](x, *out, N=4096)
    wrong = []
    for mine, dtype in zip(out, (torch.float16, torch.bfloat16), strict=True):
        expected = x.to(dtype).float()
        different = (mine.view(torch.int32) != expected.view(torch.int32)) & ~(mine.isnan() & expected.isnan())
        wrong += [(str(dtype), *row) for row in zip(x[different].tolist(), mine[different].tolist(), strict=True)]
    return wrong


def check_mixing() -> list:
    """Bit for bit: a rounding that is left out changes few tokens, so that random draws would hardly show it."""
    from tests.triton_functions import mixing_kernel

    g = torch.Generator().manual_seed(0)
    wrong = []
    for branches in (1, 2, 3):
        for dtype in DTYPES:
            logits = (torch.randn(branches, 1, 1, 1024, generator=g) * 4).to(dtype)
            cfg, beta, out = torch.tensor([3.3]), torch.tensor([1.7]), torch.empty(1024)
            mixing_kernel[(1,)](logits, logits.stride(0), cfg, beta, out, V=1024, NB=branches, enable_fp_fusion=False)
            if not torch.equal(out, reference.mix_branches(logits, cfg, beta).flatten()):
                wrong.append((branches, str(dtype)))
    return wrong


def check_random_rows(seed: int, rows: int, batch_rows: int) -> tuple[int, list]:
    done, wrong, draw_triton = 0, [], choose("triton", CPU)
    for draw in random_draws(seed, rows, batch_rows):
        done += draw.status.numel()
        wrong += [(describe(draw), *difference) for difference in compare(draw, draw_triton)]
    return done, wrong


def check_edges() -> list:
    wrong, draw_triton = [], choose("triton", CPU)
    for name, draw in edge_draws(random_rows=0):
        wrong += [(name, *difference) for difference in compare(draw, draw_triton)]
    return wrong
