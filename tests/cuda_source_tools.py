"""Builds csrc/cuda without a GPU: by g++ over the emulator, or by nvcc through setup.py; and calls what comes out.

Knows the flags and where cuobjdump may lie; nothing of what the tests expect.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from musicgen_fast.sampling import Draw
from musicgen_fast.sampling.native_args import SampleArgs, pack

ROOT = Path(__file__).parents[1]
EMULATOR = Path(__file__).parent / "cuda_emulator"
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}

# No contraction, as with -fmad=false; rows are read 16 bytes at a time through other types, as on a GPU.
GXX_FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared"]
GXX_FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def why_no_emulator() -> str:
    """Empty where the emulator can be built."""
    if sys.platform != "linux":
        return "the emulator needs ELF sections and ucontext: Linux"
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return "" if int(version.split(".")[0]) >= 12 else f"the emulator needs _Float16: g++ 12, this is {version.strip()}"


def build_emulated(source: Path, target: Path, *flags: str, csrc: Path = ROOT / "csrc") -> Path:
    """`source` as a shared library for this CPU."""
    command = ["g++", "-x", "c++", *GXX_FLAGS, *flags, f"-I{EMULATOR}", f"-I{csrc}", "-o", target, source]
    subprocess.run(command, check=True)
    return target


class EmulatedSampler:
    """The three entry points of the library, on tensors of the CPU; a backend to call with a `Draw`."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.mgf_sample.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.library.mgf_error_string.restype = ctypes.c_char_p
        self.library.emulator_order.argtypes = [ctypes.c_int, ctypes.c_uint64]

    def order(self, name: str, seed: int = 1) -> None:
        """In which order the threads of a block run: 'forward', 'backward' or 'shuffled' by `seed`."""
        self.library.emulator_order(ORDERS[name], seed)

    def sample(self, args: SampleArgs) -> int:
        """The error code."""
        return self.library.mgf_sample(ctypes.byref(args), None)

    def __call__(self, inputs: Draw) -> None:
        code = self.sample(pack(inputs))
        if code != 0:
            raise RuntimeError(f"error {code}: {self.library.mgf_error_string(code).decode()}")


def build_with_setup(folder: Path) -> Path:
    """The CUDA library as an install builds it; raises with the output of nvcc if there is none."""
    environment = {**os.environ, "MUSICGEN_FAST_NO_EXT": "1", "MUSICGEN_FAST_NO_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--force", f"--build-lib={folder}"]
    done = subprocess.run(
        [*command, f"--build-temp={folder}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    library = folder / "musicgen_fast" / "_cuda.so"
    assert library.exists(), done.stdout + done.stderr
    return library


def cuobjdump() -> str | None:
    """The one on PATH, or the one that Triton's wheel holds."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


@dataclass
class MachineCode:
    """One architecture: registers a thread, bytes of stack and of local and shared memory, and the instructions."""

    registers: int
    stack: int
    local: int
    shared: int
    instructions: list[str]


def machine_code(library: Path) -> dict[int, MachineCode]:
    """architecture -> code of the one kernel in the library."""
    tool = cuobjdump()
    assert tool is not None

    def parts(option: str) -> list[tuple[int, str]]:
        """(architecture, text) of each piece of code in the library; some pieces are empty."""
        text = subprocess.run([tool, option, str(library)], check=True, capture_output=True, text=True).stdout
        return [(int(part[:3]), part) for part in re.split(r"^arch = sm_", text, flags=re.M)[1:]]

    usage = {}
    for architecture, part in parts("-res-usage"):
        if numbers := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", part):
            usage[architecture] = tuple(map(int, numbers.groups()))
    code = {}
    for architecture, part in parts("-sass"):
        # "        /*0a80*/              @!P0 FADD R1, R2, R3 ;": the name without its predicate
        if instructions := re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", part, flags=re.M):
            registers, stack, shared, local = usage[architecture]
            code[architecture] = MachineCode(registers, stack, local, shared, instructions)
    return code
