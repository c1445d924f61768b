"""Who may import whom: a module imports only from the layers below its own, or from its own package.

The order is the data flow of the README. Imports inside functions and under TYPE_CHECKING count too: being lazy does
not turn an arrow round. A new module fails here until it is given a place.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "musicgen_fast"

# Lowest first. A name is a module or a sub-package of musicgen_fast; "" is musicgen_fast/__init__.py itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "checks", "sections"),
    ("config",),
    ("pattern", "windows"),
    ("roofline", "arena", "philox", "rng", "native", "beside", "loudness", "audio_encode", "seanet"),
    ("packing",),
    ("audio", "codec", "model", "machine"),
    ("kernels",),
    ("sampling", "checkpoints", "codec_stream"),
    ("place", "quantised"),
    ("board",),
    ("state",),
    ("prefill", "joint"),
    ("conditioning",),
    ("decoders",),
    ("shadow", "crossfade", "slots"),
    ("lanes",),
    ("decoder_for",),
    ("chain",),
    ("saving",),
    ("engine", "slot_engine"),
    ("lm", "stream"),
    ("loading", "live", "streaming", "settings", "packed_files"),
    ("genmodel",),
    ("musicgen", "audiogen"),
    ("", "data", "models"),
    ("evaluation", "doctor"),
    ("bench",),
    ("cli_output", "cli_bench"),
    ("cli_plan", "render"),
    ("cli_generate", "cli_info", "cli_doctor", "cli_render"),
    ("cli_stream", "cli_convert"),
    ("cli_commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of the modules of musicgen_fast that a file imports; `module` is its own name."""
    parts = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if target == PACKAGE:  # `from . import native` names a module, `from . import MusicGen` the package
                yield from (f"{target}.{a.name}" if a.name in LEVEL or a.name == "_C" else target for a in node.names)
            elif target == f"{PACKAGE}.decoders":
                yield from (f"{target}.{a.name}" for a in node.names)
            elif target.split(".")[0] == PACKAGE:
                yield target


def layer_name(module: str) -> str:
    return [*module.split("."), ""][1]


def violation(module: str, target: str, is_package: bool = False) -> str:
    """What is wrong with `module` importing `target`; empty if nothing is."""
    own, other = layer_name(module), layer_name(target)
    if own == "kernels":
        return "" if other == "kernels" else "kernels take tensors and ints: they import nothing of musicgen_fast"
    if other == "_C":
        return "" if own == "native" else "only native.py imports the C++ extension"
    for name in (own, other):
        if name not in LEVEL:
            return f"{name!r} has no layer yet: give it a place in LAYERS of tests/test_layering.py"
    if own == other == "decoders":
        file = len(target.split(".")) > 2 and (Path(ROOT, *target.split(".")).with_suffix(".py")).exists()
        family = {name.split(".")[-1].split("_")[0] for name in (module, target)}  # torch.py and torch_cache.py are one
        return "decoders never import each other" if file and not is_package and len(family) > 1 else ""
    if own == other:
        return ""
    return "" if LEVEL[other] < LEVEL[own] else f"{own or PACKAGE} is below or beside {other or PACKAGE}"


def python_files() -> list[tuple[Path, str]]:
    """(file, module name) of the package and of kernels/, which is installed as musicgen_fast.kernels."""
    files = []
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            files.append((path, ".".join([prefix, *(p for p in parts if p != "__init__")])))
    return files


def test_the_arrows_point_down() -> None:
    wrong = []
    for path, module in python_files():
        is_package = path.name == "__init__.py"
        if layer_name(module) not in LEVEL:
            wrong.append(f"{path.relative_to(ROOT)}: {violation(module, module)}")
            continue
        for target in imported(path.read_text(), module, is_package):
            if problem := violation(module, target, is_package):
                wrong.append(f"{path.relative_to(ROOT)} imports {target}: {problem}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_csrc_includes_no_torch_header() -> None:
    """One build of the extension serves every torch."""
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert files
    for path in files:
        includes = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        bad = [line for line in includes if any(f"{word}/" in line for word in ("torch", "ATen", "c10"))]
        assert not bad, f"{path.relative_to(ROOT)}: {bad}"


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("musicgen_fast.engine", "from .state import State", True),
        ("musicgen_fast.state", "from .engine import run", False),
        ("musicgen_fast.state", "def f():\n    from . import engine", False),
        ("musicgen_fast.model", "from musicgen_fast import MusicGen", False),
        ("musicgen_fast.cli", "from . import MusicGen", True),
        ("musicgen_fast.conditioning.text", "from ..errors import CheckpointError", True),
        ("musicgen_fast.conditioning.text", "from .style import f", True),
        ("musicgen_fast.conditioning.text", "import musicgen_fast.lm", False),
        ("musicgen_fast.decoders.cuda", "from .torch import TorchDecoder", False),
        ("musicgen_fast.decoders.cuda", "from . import torch", False),
        ("musicgen_fast.decoders.cuda", "from musicgen_fast.kernels import sample", True),
        ("musicgen_fast.native", "from . import _C", True),
        ("musicgen_fast.sampling", "from musicgen_fast._C import race_noise", False),
        ("musicgen_fast.kernels.sample", "from . import heuristics", True),
        ("musicgen_fast.kernels.sample", "from ..config import ModelConfig", False),
        ("musicgen_fast.brand_new", "from .config import ModelConfig", False),
        ("musicgen_fast.engine", "import torch, numpy\nfrom torch import Tensor", True),
    ],
)
def test_the_rule_itself(module: str, source: str, allowed: bool) -> None:
    problems = [violation(module, target) for target in imported(source, module, is_package=False)]
    assert (not any(problems)) == allowed, problems
