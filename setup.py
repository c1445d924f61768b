"""The part of the build that needs code: one optional C++ extension, and `kernels/` mapped to musicgen_fast.kernels.

The extension `musicgen_fast._C` binds with nanobind and includes no torch header, so one build serves every torch and,
from Python 3.12 on, every Python (stable ABI). Without a working compiler the install goes on and plain torch does the
work. `MUSICGEN_FAST_NO_EXT=1` leaves the extension out on purpose.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

NO_EXTENSION_MESSAGE = """
==============================================================================
musicgen_fast: the C++ extension was not built, and the install goes on without
it. Everything works in plain torch; only drawing noise on the CPU is slower.
For the fast one, install a C++17 compiler (Debian: apt install g++; macOS:
xcode-select --install) and run the same install command again, with
--no-cache-dir --force-reinstall.
Set MUSICGEN_FAST_NO_EXT=1 to leave the extension out without this message.
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


class BuildExt(build_ext):
    """Turns any failure to build the extension into one message."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._configure(ext)
            super().build_extension(ext)
        except Exception as error:  # a compiler can fail in any way; none of them may stop the install
            print(NO_EXTENSION_MESSAGE.format(cause=f"{type(error).__name__}: {error}"), file=sys.stderr)
            if self.editable_mode:  # what an earlier build left in the source folder is not this source any more
                for stale in Path("musicgen_fast").glob("_C.*"):
                    stale.unlink()

    def _configure(self, ext: Extension) -> None:
        """Fills in what is known only here: where nanobind lies, and which compiler this is."""
        import nanobind

        root = Path(nanobind.include_dir()).parent
        ext.include_dirs = ["csrc", str(root / "include"), str(root / "src"), str(root / "ext/robin_map/include")]
        ext.define_macros = MACROS
        ext.extra_compile_args = MSVC_FLAGS if self.compiler.compiler_type == "msvc" else UNIX_FLAGS
        if sys.platform == "linux":
            ext.extra_link_args = ["-Wl,-s", "-Wl,--gc-sections"]


native = Extension(
    "musicgen_fast._C",
    sources=["csrc/bindings.cpp", "csrc/nanobind.cpp", "csrc/cpu/race.cpp"],
    depends=["csrc/cpu/isa.h", "csrc/cpu/philox.h", "csrc/cpu/race.h"],
    language="c++",
    optional=True,
    py_limited_api=STABLE_ABI,
)
with_extension = os.environ.get("MUSICGEN_FAST_NO_EXT", "0") in ("", "0")

setup(
    packages=[*find_packages(include=["musicgen_fast", "musicgen_fast.*"]), "musicgen_fast.kernels"],
    package_dir={"musicgen_fast.kernels": "kernels"},
    package_data={"musicgen_fast": ["py.typed", "assets/*"]},
    ext_modules=[native] if with_extension else [],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if STABLE_ABI and with_extension else {},
)
