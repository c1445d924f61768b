"""The suite finds planted faults: each of `mutations.py`, in a copy of the tree, makes one of its tests fail.

The same tests pass in the copy as it is, so that a broken environment is not taken for a find. A plugin in the copy
says after each run where the package came from: an editable install may point back to this checkout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from musicgen_fast import native
from musicgen_fast.checkpoints.write import write_transformers_folder

from .checkpoint_writers import tiny
from .mutations import CPP, QUICK, SLOW, Mutation

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("musicgen_fast", "kernels", "tests", "csrc", "pyproject.toml", "setup.py")
WITNESS = """\
import json, os, sys
def pytest_terminal_summary(terminalreporter):
    files = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "musicgen_fast" and m.__file__]
    strange = [file for file in files if not file.startswith(os.getcwd() + os.sep)]
    terminalreporter.write_line(f"WITNESS {len(files)} modules, from elsewhere: {json.dumps(strange)}")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the tests need; large files and what was compiled are links."""
    return copy_tree(tmp_path_factory.mktemp("tree"), compiled=True)


def copy_tree(target: Path, compiled: bool) -> Path:
    def skipped(folder: str, names: list[str]) -> list[str]:
        package = Path(folder) == ROOT / "musicgen_fast"
        linked = {"assets", "kernels"} if package else set()
        return [n for n in names if n in linked | {"__pycache__"} or n.endswith((".so", ".dll", ".pyd"))]

    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=skipped)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, target / name)
    package = target / "musicgen_fast"
    (package / "kernels").symlink_to(target / "kernels", target_is_directory=True)
    (package / "assets").symlink_to(ROOT / "musicgen_fast" / "assets", target_is_directory=True)
    for path in (ROOT / "musicgen_fast").iterdir():
        if compiled and path.suffix in (".so", ".dll", ".pyd"):
            (package / path.name).symlink_to(path)
    (target / "mutation_witness.py").write_text(WITNESS)
    return target


def environment(tree: Path) -> dict[str, str]:
    """Of a run of its own: nothing of this run's options, workers and coverage, and the copy before all else."""
    ours = ("PYTEST_", "COV_", "MUSICGEN_FAST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MUSICGEN_FAST_NO_CUDA": "1"}


def run_tests(tree: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """pytest over `tests` in the copy. AssertionError where the package came from anywhere else."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "mutation_witness", *tests]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=500)
    found = re.search(r"^WITNESS (.*)$", done.stdout, re.M)
    assert found is not None and re.fullmatch(r"[1-9]\d* modules, from elsewhere: \[\]", found[1]), said(done)
    return done


def said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout[-3000:] + done.stderr[-3000:]


def with_fault(mutation: Mutation, source: str) -> str:
    """The source with the fault in it."""
    count = source.count(mutation.text)
    assert count == 1, f"the list is stale: {mutation.name!r} names a text that {mutation.file} has {count} times"
    return source.replace(mutation.text, mutation.planted)


@contextmanager
def planted(tree: Path, mutation: Mutation) -> Iterator[None]:
    """The fault in the copy while the context lasts."""
    path = tree / mutation.file
    source = path.read_text()
    faulty = with_fault(mutation, source)
    compiled = Path(importlib.util.cache_from_source(str(path)))
    try:
        path.write_text(faulty)
        compiled.unlink(missing_ok=True)  # two versions within a second could share a time and a size
        yield
    finally:
        path.write_text(source)
        compiled.unlink(missing_ok=True)


def needed(mutation: Mutation) -> None:
    """Skip where the tests of a fault cannot run."""
    if mutation.needs == "extension" and not native.available():
        pytest.skip(f"no C++ extension: {native.why_not()}")
    if mutation.needs == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")


def runnable(mutations: Sequence[Mutation]) -> list[str]:
    """The tests of those that can run here, each once."""
    missing = {"extension": not native.available(), "triton": importlib.util.find_spec("triton") is None}
    return list(dict.fromkeys(test for m in mutations if not missing.get(m.needs) for test in m.tests))


def catches(done: subprocess.CompletedProcess[str], mutation: Mutation) -> None:
    """One of the tests must have failed: an error of collecting, or a crash, is none."""
    assert done.returncode == 1, f"{mutation.name!r} survived (exit {done.returncode}):\n{said(done)}"
    named = re.findall(r"^FAILED (\S+)", done.stdout, re.M)
    assert named and named[0].startswith(tuple(test.split("[")[0] for test in mutation.tests)), said(done)


def test_every_fault_can_be_planted() -> None:
    """In this checkout, without trying it: a list that went stale is told by the quick suite."""
    for mutation in (*QUICK, *SLOW, *CPP, SLOWER):
        faulty = with_fault(mutation, (ROOT / mutation.file).read_text())
        if mutation.file.endswith(".py"):
            compile(faulty, mutation.file, "exec")
    names = [mutation.name for mutation in (*QUICK, *SLOW, *CPP, SLOWER)]
    assert len(set(names)) == len(names)


def test_nothing_is_found_where_nothing_is_planted(tree: Path) -> None:
    done = run_tests(tree, runnable(QUICK))
    assert done.returncode == 0, said(done)


@pytest.mark.slow
@pytest.mark.parametrize("mutations", [SLOW[::2], SLOW[1::2], CPP], ids=["even", "odd", "compiled"])
def test_nor_by_the_slower_ones(tree: Path, mutations: Sequence[Mutation]) -> None:
    tests = runnable(mutations)
    if not tests:
        pytest.skip(f"no C++ extension: {native.why_not()}")
    done = run_tests(tree, tests)
    assert done.returncode == 0, said(done)


@pytest.mark.parametrize("mutation", QUICK, ids=lambda m: m.name)
def test_a_fault_is_found(tree: Path, mutation: Mutation) -> None:
    with planted(tree, mutation):
        catches(run_tests(tree, mutation.tests), mutation)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", SLOW, ids=lambda m: m.name)
def test_more_faults_are_found(tree: Path, mutation: Mutation) -> None:
    needed(mutation)
    with planted(tree, mutation):
        catches(run_tests(tree, mutation.tests), mutation)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without anything compiled: a build in it must not write through a link."""
    if importlib.util.find_spec("nanobind") is None:
        pytest.skip("nanobind is not installed: the extension cannot be built")
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("there is no C++ compiler")
    return copy_tree(tmp_path_factory.mktemp("sources"), compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", CPP, ids=lambda m: m.name)
def test_faults_of_the_extension_are_found(sources: Path, mutation: Mutation) -> None:
    """Each in an extension built anew: about a minute of one core."""
    needed(mutation)
    for built in (sources / "musicgen_fast").glob("_C.*"):
        built.unlink()
    with planted(sources, mutation):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
        done = subprocess.run(command, cwd=sources, env=environment(sources), capture_output=True, text=True)
        assert any((sources / "musicgen_fast").glob("_C.*")), said(done)
        catches(run_tests(sources, mutation.tests), mutation)


# -- a step that takes 15 % longer ------------------------------------------------------------------------------------

SLOWER = Mutation(
    "a step takes 15 % longer",
    "musicgen_fast/engine.py",
    "    lanes = chain.begin()\n    if lanes:\n        decoder.step(*lanes)\n    chain.end()\n",
    "    from time import perf_counter\n\n    begun = perf_counter()\n"
    "    lanes = chain.begin()\n    if lanes:\n        decoder.step(*lanes)\n    chain.end()\n"
    "    end = 1.15 * perf_counter() - 0.15 * begun\n    while perf_counter() < end:\n        pass\n",
    (),
)
ROUNDS, TRIES = 3, 3
# Median / tenth percentile of the steps: 1.05 where nothing else runs, 2 and more where much does.
STEADY, REPEATS = 1.12, 4


def bench(tree: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """`musicgen-fast bench` of a copy."""
    command = [sys.executable, "-m", "musicgen_fast", "bench", *argv]
    return subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=300)


def measure(tree: Path, model: Path, results: Path) -> None:
    """One more line in `results`: 400 steps of about 2 ms. Measured again while the steps are not steady, which says
    that others took the core, whatever the speed of a step; if they never are, the steadiest counts."""
    options = ("--providers", "musicgen_fast", "-d", "cpu", "--threads", "1", "--rounds", "1", "--parity-frames", "0")
    found: list[tuple[float, str]] = []
    for number in range(REPEATS):
        file = results.with_name(f"{results.name}-{number}")
        file.unlink(missing_ok=True)
        done = bench(tree, "latency", "-m", str(model), *options, "--steps", "400", "--json", str(file))
        assert done.returncode == 0, said(done)
        line = json.loads(file.read_text())
        found.append((line["ms_per_step"] / line["ms_p10"], file.read_text()))
        if found[-1][0] < STEADY:
            break
    with results.open("a") as collected:
        collected.write(min(found)[1])


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a try takes 70 s of one core; three of them beside other work may take long
def test_a_step_that_takes_15_percent_longer_fails_the_comparison(tree: Path, tmp_path: Path) -> None:
    """And the same code, measured again in between, does not. Other work on the machine moves a median by several
    percent, so the rounds take turns, their median counts, and all of it has three tries."""
    # 38 MB of weights, few keys and values: a step takes about as long at the end as at the start
    checkpoint = tiny("text", dim=256, num_layers=3, num_heads=8, ffn_dim=4096, vocab_size=2048)
    model = write_transformers_folder(tmp_path / "model", checkpoint=checkpoint)
    told: list[str] = []
    quiet = 0
    for number in range(TRIES):
        folder = tmp_path / str(number)
        folder.mkdir()
        before, again, slower = (folder / name for name in ("before", "again", "slower"))
        for _ in range(ROUNDS):
            measure(tree, model, before)
            with planted(tree, SLOWER):
                measure(tree, model, slower)
            measure(tree, model, again)
        pairs = ((before, again), (again, before), (before, slower), (again, slower))
        done = [bench(tree, "compare", str(a), str(b), "--fail-if", "median:5%") for a, b in pairs]
        codes = [one.returncode for one in done]
        if codes == [0, 0, 1, 1] and all("median is" in one.stderr for one in done[2:]):
            return
        if codes[:2] == [0, 0]:  # the machine was quiet enough to tell, and nothing was told
            quiet += 1
            told += [f"try {number + 1}: {codes}", *(said(one) for one in done)]
    if quiet < 2:  # one such try may be chance
        pytest.skip(f"too busy a machine to time on: in {TRIES} tries the same code differed by more than 5 %")
    pytest.fail("\n".join(told))
