"""The part of the build that needs code: what is compiled, and `kernels/` mapped to musicgen_fast.kernels.

The extension `musicgen_fast._C` binds with nanobind and includes no torch header, so one build serves every torch and,
from Python 3.12 on, every Python (stable ABI). Without a working compiler the install goes on and plain torch does the
work. Where nvcc is found, `musicgen_fast/_cuda.so` is built too: a plain shared library with its own CUDA runtime, so
one serves every torch as well. `MUSICGEN_FAST_NO_EXT=1` and `MUSICGEN_FAST_NO_CUDA=1` leave them out on purpose.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

NO_EXTENSION_MESSAGE = """
==============================================================================
musicgen_fast: the C++ extension was not built, and the install goes on without
it. Everything works in plain torch; drawing tokens on the CPU is slower.
For the fast one, install a C++17 compiler (Debian: apt install g++; macOS:
xcode-select --install) and run the same install command again, with
--no-cache-dir --force-reinstall.
Set MUSICGEN_FAST_NO_EXT=1 to leave the extension out without this message.
Cause: {cause}
==============================================================================
"""

NO_CUDA_MESSAGE = """
==============================================================================
musicgen_fast: the CUDA library was not built, and the install goes on without
it. On a GPU the tokens are the same, drawn by Triton or by torch.
Set MUSICGEN_FAST_NO_CUDA=1 to leave it out without this message.
Cause: {cause}
==============================================================================
"""

# abi3 needs CPython 3.12 (nanobind's own floor for it); free-threaded builds have no stable ABI before 3.15.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
STABLE_ABI = sys.implementation.name == "cpython" and sys.version_info >= (3, 12) and not FREE_THREADED

# The arithmetic is specified to the bit: no contraction into FMAs, no fast-math, and never -march=native in a build
# that may travel (csrc/cpu/isa.h picks the instruction set at run time). -fno-trapping-math changes no value, but
# gcc 12 vectorises the logarithm only with it (4 x 2048 variates with AVX-512: about 17 us with it, 115 without; best
# of many on a shared Xeon). Strict aliasing is off for nanobind's sake.
UNIX_FLAGS = ["-std=c++17", "-O3", "-fno-fast-math", "-ffp-contract=off", "-fno-trapping-math"]
UNIX_FLAGS += ["-fvisibility=hidden", "-fno-strict-aliasing", "-ffunction-sections", "-fdata-sections", "-g0"]
MSVC_FLAGS = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"]

MACROS: list[tuple[str, str | None]] = [("NDEBUG", None), ("NB_COMPACT_ASSERTIONS", None)]
if STABLE_ABI:
    MACROS.append(("Py_LIMITED_API", "0x030C0000"))
if FREE_THREADED:
    MACROS.append(("NB_FREE_THREADED", None))


# A100, RTX 30, RTX 40, H100, B200, RTX 50: machine code for those that this nvcc knows. PTX of the first serves the
# GPUs between them, PTX of the last those to come. All of it takes 10 s of one core.
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Icsrc", "-shared", "-cudart=static", "--threads=2"]
if sys.platform != "win32":
    NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=-s,--exclude-libs=ALL"]


class CudaLibrary(Extension):
    """What nvcc builds: no Python module, and named as ctypes finds it."""

    suffix = ".dll" if sys.platform == "win32" else ".so"


class BuildExt(build_ext):
    """Turns any failure to build the extension or the CUDA library into one message."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if isinstance(ext, CudaLibrary):
                self._build_cuda(ext)
                return
            self._configure(ext)
            super().build_extension(ext)
        except Exception as error:  # a compiler can fail in any way; none of them may stop the install
            message = NO_CUDA_MESSAGE if isinstance(ext, CudaLibrary) else NO_EXTENSION_MESSAGE
            print(message.format(cause=f"{type(error).__name__}: {error}"), file=sys.stderr)
            if self.editable_mode:  # what an earlier build left in the source folder is not this source any more
                for stale in Path("musicgen_fast").glob(ext.name.rpartition(".")[2] + ".*"):
                    stale.unlink()

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] != "_cuda":
            return super().get_ext_filename(fullname)
        return os.path.join(*fullname.split(".")) + CudaLibrary.suffix

    def _build_cuda(self, ext: CudaLibrary) -> None:
        target, present = Path(self.get_ext_fullpath(ext.name)), Path(self.get_ext_filename(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        newest = max(os.path.getmtime(path) for path in ["setup.py", *ext.sources, *ext.depends])
        if not self.force and present.exists() and present.stat().st_mtime > newest:
            shutil.copy2(present, target)  # the source folder holds what an editable install built of these sources
        else:
            subprocess.run([nvcc(), *NVCC_FLAGS, *cuda_code(), "-o", target, *ext.sources], check=True)

    def _configure(self, ext: Extension) -> None:
        """Fills in what is known only here: where nanobind lies, and which compiler this is."""
        import nanobind

        root = Path(nanobind.include_dir()).parent
        ext.include_dirs = ["csrc", str(root / "include"), str(root / "src"), str(root / "ext/robin_map/include")]
        ext.define_macros = MACROS
        ext.extra_compile_args = MSVC_FLAGS if self.compiler.compiler_type == "msvc" else UNIX_FLAGS
        if sys.platform == "linux":
            ext.extra_link_args = ["-Wl,-s", "-Wl,--gc-sections"]


def nvcc() -> str | None:
    """The compiler that CUDACXX or CUDA_HOME name, or else the one on PATH; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = (os.environ.get("CUDACXX"), home and str(Path(home, "bin", "nvcc")), "nvcc")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def cuda_code() -> list[str]:
    """Machine code for the architectures that this nvcc knows, PTX for the lowest and the highest of them."""
    listed = subprocess.run([nvcc(), "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    known = [a for a in CUDA_ARCHITECTURES if a in map(int, re.findall(r"sm_(\d+)\b", listed))]
    ptx = sorted({known[0], known[-1]})
    real = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
    return real + [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx]


native = Extension(
    "musicgen_fast._C",
    sources=[*map(str, sorted(Path("csrc").glob("*.cpp"))), *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))],
    depends=[*map(str, sorted(Path("csrc").glob("*.h"))), *map(str, sorted(Path("csrc/cpu").glob("*.h")))],
    language="c++",
    optional=True,
    py_limited_api=STABLE_ABI,
)
cuda = CudaLibrary(
    "musicgen_fast._cuda",
    sources=["csrc/cuda/sample.cu"],
    depends=["csrc/sample_args.h", *map(str, sorted(Path("csrc").glob("c*/*.*h")))],
    optional=True,
)
with_cuda = os.environ.get("MUSICGEN_FAST_NO_CUDA", "0") in ("", "0") and nvcc() is not None
with_extension = os.environ.get("MUSICGEN_FAST_NO_EXT", "0") in ("", "0")

setup(
    packages=[*find_packages(include=["musicgen_fast", "musicgen_fast.*"]), "musicgen_fast.kernels"],
    package_dir={"musicgen_fast.kernels": "kernels"},
    package_data={"musicgen_fast": ["py.typed", "assets/demo/*"]},
    ext_modules=[native] * with_extension + [cuda] * with_cuda,
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if STABLE_ABI and with_extension else {},
)
