"""The report of `make bench-gpu` without a GPU: every section on the CPU with a tiny model, and what is said of it.

Times are not looked at. On a CPU the reference kernels stand for Triton's, and launches for graphs.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_fast import native
from musicgen_fast.bench import worker
from musicgen_fast.bench.job import Job
from musicgen_fast.cli import build_parser
from musicgen_fast.machine import ReadSpeed

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks"


def module(name: str) -> Any:
    """A script of benchmarks/, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return importlib.import_module(name)


report, sampler, lines = module("gpu_report"), module("gpu_sampler"), module("gpu_lines")
summary, plots, tests_section = module("gpu_summary"), module("gpu_plots"), module("gpu_tests")
checks, failures, tools = module("gpu_checks"), module("gpu_failures"), module("gpu_tools")
floor, steps, peers = module("gpu_floor"), module("gpu_steps"), module("gpu_peers")
BENCH = lines.Bench("cpu", tiny=True)


class Kept(lines.Lines):  # type: ignore[name-defined, misc]
    """Lines in memory."""

    def __init__(self) -> None:
        super().__init__(None)
        self.all: list[dict[str, Any]] = []

    def add(self, **line: Any) -> None:
        self.all.append(json.loads(json.dumps(line)))


def found_by(part: Any) -> list[dict[str, Any]]:
    kept = Kept()
    part(BENCH, kept)
    assert kept.all and not [line for line in kept.all if "error" in line], kept.all
    return kept.all


def run(*command: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(SCRIPTS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], env=environment, timeout=timeout, capture_output=True, text=True, cwd=ROOT
    )


# -- every section ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [*checks.PARTS, *failures.PARTS])
def test_checks_pass(part):
    assert {line["status"] for line in found_by((checks.PARTS | failures.PARTS)[part])} == {"passed"}


@pytest.fixture(scope="module")
def measured() -> dict[str, list[dict[str, Any]]]:
    """What the measuring sections find, by section."""
    parts = {"floor": floor.floor, "small": steps.PARTS["small"], "batch": steps.batch, "first": steps.first}
    return {name: found_by(part) for name, part in parts.items()}


def test_measurements(measured):
    kinds = {line["measures"] for found in measured.values() for line in found}
    assert kinds == {
        "read", "bubble", "chain", "attention", "clocks", "product", "step", "window", "batch", "slots", "first frame"
    }  # fmt: skip
    assert all(line["right"] for line in measured["floor"] if line["measures"] == "bubble")
    for line in sum(measured.values(), []):
        assert all(value > 0 for key, value in line.items() if key in ("ms", "us", "gb_s", "floor_ms", "percent"))
    windows = [line for line in measured["small"] if line["measures"] == "window"]
    assert len(windows) == len(steps.VARIANTS)
    floors = {(w["precision"], w["kv"]): w["floor_ms"] for w in windows if w["version"] == "v3"}
    assert floors["int8", "int8"] < floors["int8", "as activations"] < floors["float16", "int8"]
    assert floors["float16", "int8"] < floors["float16", "as activations"] == floors["bfloat16", "as activations"]


def test_one_start():
    (line,) = found_by(steps.start)
    assert line["seconds"] > 0 and line["decoder"] == "reference"


@pytest.mark.slow
def test_starting_cold_and_warm():
    assert [line["cache"] for line in found_by(steps.startup)] == ["cold", "warm"]


@pytest.mark.slow
def test_peers():
    found = found_by(peers.peers)
    assert {line["provider"] for line in found} == {"transformers", "audiocraft", "fast_musicgen"}
    assert all("absent" in line or line["ms"] > 0 for line in found)


def test_a_failing_kernel_stops_no_other_measurement(monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(floor, "bubble", broken)
    monkeypatch.setattr(floor, "products", broken)
    monkeypatch.setattr(floor, "step_chain", broken)
    broken.__name__ = "broken"
    kept = Kept()
    floor.floor(BENCH, kept)
    failed = [line for line in kept.all if line.get("status") == "failed"]
    assert len(failed) == 3 and failed[0]["error"] == "RuntimeError: no such instruction"
    assert "attention" in {line["measures"] for line in kept.all if "error" not in line}


def test_wrong_tokens_fail_a_check(monkeypatch):
    """A decoder whose rows depend on the batch is found, and so is one with wrong logits."""
    made = tools.build_ops

    def leaky(bench: Any, version: str) -> Any:
        ops = made(bench, version)
        product = ops.norm_linear

        def norm_linear(x: torch.Tensor, *args: Any, **options: Any) -> None:
            product(x, *args, **options)
            out = args[-1]
            out += 0.05 * len(x)

        ops.norm_linear = norm_linear
        return ops

    monkeypatch.setattr(tools, "build_ops", leaky)
    kept = Kept()
    checks.seeds(BENCH, kept)
    assert "failed" in {line["status"] for line in kept.all}
    kept = Kept()
    checks.logits(BENCH, kept)
    assert {line["status"] for line in kept.all} == {"failed"}


# -- the sampler's checks ---------------------------------------------------------------------------------------------


def test_golden_tokens_in_the_report():
    found = sampler.check_golden("torch", "cpu")
    assert found["mismatches"] == 0 and found["cells"] > 500


def test_random_rows_of_the_cpu_backend():
    if reason := native.why_not():
        pytest.skip(reason)
    found = sampler.check_rows("cpu", "cpu", 1, at_once=64)
    assert found["rows"] > 60 * len(sampler.VARIANTS) and found["mismatches"] == 0, found


def test_odd_draws_of_the_cpu_backend():
    if reason := native.why_not():
        pytest.skip(reason)
    found = sampler.check_draws("cpu", "cpu", count=8, cells=60)
    assert found["rows"] >= 480 and found["mismatches"] == 0, found


def test_wrong_rows_are_counted(monkeypatch):
    """One token, one known cell and one status wrong in one draw: three rows."""
    drawn = sampler.draw

    def broken(inputs, backend):
        drawn(inputs, "torch")
        if backend == "cpu" and inputs.tokens.dim() == 3 and inputs.noise is not None:
            inputs.tokens[0, 0, 3] += 1
            inputs.tokens[1, 2, 5] += 1
            inputs.status[2, 1] ^= 1

    monkeypatch.setattr(sampler, "draw", broken)
    found = sampler.check_rows("cpu", "cpu", 1, at_once=32)
    assert found["mismatches"] == 3 and [bad["mismatches"] for bad in found["bad"]] == [3]
    monkeypatch.setattr(sampler, "draw", lambda inputs, _: drawn(inputs, "torch") or inputs.status.fill_(5))
    found = sampler.check_draws("cpu", "cpu", count=2, cells=20)
    assert found["mismatches"] == found["rows"] and len(found["bad"]) == 2


@pytest.mark.parametrize("part", ["golden:torch", "draws:torch", "rows:triton"])
def test_lines_of_the_sampler(part):
    (line,) = found_by(sampler.PARTS[part])
    assert line["status"] == ("absent" if "triton" in part else "passed")


# -- the kernels that measure ------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_measuring_kernels_in_the_interpreter():
    code = """
import torch, gpu_kernels as g
buffer, sums = torch.randn(2 * g.PIECE), torch.zeros(2)
g.read(buffer, sums)
torch.testing.assert_close(sums, buffer.view(2, -1).sum(1), rtol=1e-3, atol=1e-2)
buffers = torch.zeros(3 * g.LINK), torch.zeros(3 * g.LINK)
g.chain(buffers, 6, False)
assert (buffers[0] == 6).all() and (buffers[1] == 5).all()
"""
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
def test_measuring_kernels_compile():
    """For GPUs that need not be there; dependent launches have their two instructions."""
    code = """
import triton, gpu_kernels as g
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
def built(kernel, constants, warps, arch, **options):
    signature = {name: "constexpr" if name in constants else "*fp32" for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in range(2)})
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, **options}).asm["ptx"]
for arch, pdl in ((80, False), (90, False), (90, True), (120, True)):
    read = built(g.read_kernel, {"BLOCK": g.BLOCK, "ROUNDS": g.ROUNDS}, 8, arch)
    link = built(g.link_kernel, {"LINK": g.LINK, "PDL": pdl}, 4, arch, launch_pdl=pdl)
    assert "ld.global.v4" in read, "16 bytes a load"
    assert ("griddepcontrol.wait" in link) == ("griddepcontrol.launch_dependents" in link) == pdl
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_needs_no_more_than_torch():
    """A GPU machine may lack what a whole model or the tests need."""
    absent = ["pytest", "soundfile", "julius", "einops", "sentencepiece", "transformers", "audiocraft", "yaml", "tqdm"]
    scripts = "gpu_report, gpu_sampler, gpu_checks, gpu_failures, gpu_floor, gpu_steps, gpu_tests"
    sampler = (
        "bench sampler -d cpu --batch 1 --filters none --providers draw:torch,transformers --rounds 1 --seconds .01"
    )
    code = f"""
import sys; sys.modules.update(dict.fromkeys({absent})); del sys.modules["einops"]
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "einops": raise ImportError(name)
sys.meta_path.insert(0, Missing())
import {scripts}
from musicgen_fast.cli import main
assert main({sampler.split()}) == 0
lines = gpu_steps.Lines(None)
gpu_steps.start(gpu_steps.Bench("cpu", True), lines)
gpu_checks.exact(gpu_steps.Bench("cpu", True), lines)
"""
    done = run("-c", code)
    assert done.returncode == 0 and done.stdout.count('"status": "passed"') == 2, done.stderr


def test_the_sampler_section_is_a_command_that_there_is(monkeypatch):
    """What the report asks for is understood; a short one runs, and its lines come back."""
    python, module, *argv = report.SAMPLER.split()
    args = build_parser()[0].parse_args(argv)
    assert (python, module, args.command) == ("-m", "musicgen_fast", "bench sampler") and args.precision == ["float16"]
    short = f"{report.SAMPLER} --batch 1 --filters none --rounds 1 --providers audiocraft,draw:torch"
    monkeypatch.setitem(report.SECTIONS, "sampler", report.Section(short, 100))
    found = report.run_section("sampler", "cpu", True, 100)
    assert found["status"] == "done", found
    assert [(line["provider"], line["parity"]) for line in found["lines"]] == [
        ("audiocraft", None),
        ("draw:torch", True),
    ]


def test_the_whole_report_in_processes(tmp_path):
    """Sections that cannot be made here are absent by name, what has no time left is skipped, and the rest is there."""
    file = tmp_path / "results" / "gpu.json"
    sections = "golden:triton,exact"
    done = run(
        str(SCRIPTS / "gpu_report.py"), "--device", "cpu", "--tiny", "--sections", sections, "--json", str(file),
        "--seconds", "60",
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert done.returncode == 1, "no golden check could be made"
    status = {name: section["status"] for name, section in found["sections"].items()}
    assert status["golden:triton"] == "absent" and status["exact"] == "passed"
    assert not found["passed"] and found["tiny"] and found["machine"]["versions"]["torch"]
    assert "A CHECK FAILED" in done.stdout and "ms to the first frame" in done.stdout


def test_sections_that_crash_hang_or_have_no_time(tmp_path, monkeypatch):
    (tmp_path / "crash.py").write_text("raise OSError('broken')")
    (tmp_path / "half.py").write_text(
        "import json, os, sys\nopen(sys.argv[-1], 'a').write(json.dumps({'check': 'a', 'status': 'passed'}) + '\\n')\n"
        "os.abort()"
    )
    # its child holds the output open: ending the section must end the child too
    (tmp_path / "hang.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    )
    monkeypatch.setattr(report, "HERE", tmp_path)
    made = {name: report.Section(f"{name}.py", 60, True) for name in ("crash", "half", "hang")}
    monkeypatch.setattr(report, "SECTIONS", made)
    crash, half, hang = (report.run_section(name, "cpu", False, 1.5) for name in ("crash", "half", "hang"))
    assert crash["status"] == half["status"] == hang["status"] == "failed"
    assert crash["why"] == "exit status 1" and crash["errors"][-1] == "OSError: broken"
    assert half["lines"] == [{"check": "a", "status": "passed"}] and half["why"] == "exit status -6"
    assert "not done" in hang["why"] and hang["seconds"] < 10
    said = summary.summary({"crash": crash, "half": half})
    assert said["failed"] == ["crash: exit status 1", "half: exit status -6"]


@pytest.mark.parametrize(
    "statuses,passed",
    [
        (("passed", "passed", "passed", "passed"), True),
        (("absent", "passed", "passed", "absent"), True),
        (("passed", "failed", "passed", "passed"), False),
        (("absent", "passed", "passed", "failed"), False),
        (("absent", "absent", "passed", "passed"), False),
        (("passed", "passed", "absent", "passed"), False),
        (("passed", "passed", "skipped", "passed"), False),
    ],
)
def test_the_verdict(statuses, passed):
    names = ("golden:triton", "golden:cuda", "seeds", "tests:decoder")
    sections = {name: {"status": status} for name, status in zip(names, statuses, strict=True)}
    assert report.verdict(sections | {"small": {"status": "failed"}}) is passed


def test_what_pytest_says():
    missing = "ERROR tests/test_gpu.py\nE   ModuleNotFoundError: No module named 'yaml'\n1 error in 0.5s"
    assert tests_section.outcome(2, missing) == {"status": "absent", "why": "yaml is not installed", "error": 1}
    ours = missing.replace("'yaml'", "'musicgen_fast.kernels.step'")
    assert tests_section.outcome(2, ours)["status"] == "failed"
    assert tests_section.outcome(0, "12 passed, 3 skipped in 4s")["status"] == "passed"
    assert tests_section.outcome(0, "3 skipped in 4s")["status"] == "absent"
    assert tests_section.outcome(1, "1 failed, 12 passed in 4s") == {
        "status": "failed", "exit_status": 1, "failed": 1, "passed": 12
    }  # fmt: skip


def test_averages_over_a_window():
    assert summary.average([]) is None
    assert summary.average([(50, 4.0)]) == 4.0
    line = [1.0 if t < 100 else 1 + (t - 100) / 100 if t < 200 else 2.0 for t in range(1000)]
    assert summary.average([(200, 2.0), (100, 1.0)], 1000) == pytest.approx(sum(line) / 1000, rel=1e-3)


def sections_of(measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    peer = [{"measures": "peer", "provider": "audiocraft", "position": p, "ms": 1e6} for p in (60, 1460)]
    peer += [{"measures": "peer", "provider": "fast_musicgen", "absent": "not installed"}]
    large = {**next(m for m in measured["small"] if m["measures"] == "window"), "size": "large", "ms": 2.4}
    found = {name: {"status": "done", "lines": said} for name, said in measured.items()}
    return found | {"peers": {"status": "done", "lines": peer}, "large": {"status": "done", "lines": [large]}}


def test_the_summary(measured):
    said = summary.summary(sections_of(measured) | {"medium": {"status": "skipped", "lines": []}})
    assert said["peers"]["audiocraft"]["times_v3"] > 12 and said["peers"]["fast_musicgen"]["absent"]
    met = {target["what"]: target["met"] for target in said["targets"]}
    assert met["ms a step, large"] is True and met["times audiocraft, v3"] is True
    assert met["ms a step, medium"] is None and met["times fast-musicgen, v3"] is None
    assert said["skipped"] == ["medium"] and said["failed"] == []
    text = summary.text({"summary": said, "passed": True})
    assert "large v3 float16" in text and "not measured" in text and text.endswith("all checks passed")
    nothing = summary.summary({})
    assert all(target["met"] is None for target in nothing["targets"]) and summary.text(
        {"summary": nothing, "passed": 0}
    )


def test_plots(measured, tmp_path):
    sections = sections_of(measured)
    made = {"sections": sections, "summary": summary.summary(sections), "tiny": True, "machine": {"gpu": "A <GPU>"}}
    written = plots.draw_plots(made, tmp_path / "2026-gpu.json")
    assert [path.name for path in written] == [f"2026-gpu-{n}.svg" for n in ("step", "batch", "ratios", "products")]
    for path in written:
        root = ET.parse(path).getroot()
        assert "A <GPU>" in "".join(root.itertext())
        for shape in root.iter("{http://www.w3.org/2000/svg}polyline"):
            numbers = [float(n) for pair in shape.attrib["points"].split() for n in pair.split(",")]
            assert all(0 <= n <= plots.WIDTH for n in numbers)
    nothing = {"sections": {}, "summary": summary.summary({}), "tiny": False, "machine": {"cpu": "x"}}
    assert plots.draw_plots(nothing, tmp_path / "none.json") == []


@pytest.mark.parametrize("most,expected", [(0, 1), (0.29, 0.3), (1, 1), (8.5, 10), (361, 400), (1200, 1500)])
def test_axes_end_at_round_numbers(most, expected):
    assert plots._rounded(most) == pytest.approx(expected)


def test_stamps_every_few_steps(tmp_path, monkeypatch):
    """Between two stamps lie `every` steps, and a time is that of one of them."""
    clock = iter(range(1000))
    monkeypatch.setattr(worker, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(worker, "read_speed", lambda *_: ReadSpeed(1.0, 1.0))
    monkeypatch.setattr(worker, "PROVIDERS", {"fake": lambda job: lambda step, start: [step() for _ in range(21)]})
    (block,) = worker.measure(Job("fake", steps=20, warmup=4, every=2))["blocks"]
    assert block["ms"] == [500.0] * 8
