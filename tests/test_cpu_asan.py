"""The CPU decoder under the address, undefined-behaviour and thread sanitizers: csrc/cpu with a driver of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETS = ["baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "amx"]
# -O1 keeps the vectors' code close to what is shipped, without the minutes that -O3 takes under the sanitizers.
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread"]
SANITIZERS = ["address,undefined", "thread"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if not found:
        pytest.skip("no C++ compiler on this machine")
    return found


@pytest.fixture(scope="module", params=SANITIZERS)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, cxx = tmp_path_factory.mktemp("sanitized"), compiler()
    sanitize = [f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = subprocess.run([cxx, *sanitize, str(probe), "-o", str(folder / "probe")], capture_output=True, text=True)
    if built.returncode or subprocess.run([folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"{cxx} has no sanitizers that run here: {built.stderr.strip()[:200]}")
    sources = [s for s in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if not s.name.startswith("sample")]
    sources.append(ROOT / "tests/cpu_asan/driver.cpp")

    def compiled(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        command = [cxx, *FLAGS, *sanitize, "-I", str(ROOT / "csrc"), "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / "driver"
    subprocess.run([cxx, *sanitize, "-pthread", *objects, "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("isa", SETS)
def test_nothing_to_report(driver: Path, isa: str) -> None:
    """All formats of weights, keys and values, 1 to 3 threads, arrays without a byte to spare; nothing is leaked."""
    command = [str(driver), str(SETS.index(isa))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode == 77:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == "" and int(done.stdout) == 3 * 4 * 3 * 6
