"""The notebooks of examples/: their cells run in order without Jupyter, and no output of anybody is stored in them."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    return loaded


def fake_display() -> tuple[types.ModuleType, list[Any]]:
    """What stands in for IPython.display, and what was shown."""
    module, shown = types.ModuleType("IPython.display"), []
    for kind in ("Audio", "Image"):
        setattr(module, kind, lambda *args, _kind=kind, **options: (_kind, args, options))
    module.display = lambda *things: shown.extend(things)  # type: ignore[attr-defined]
    return module, shown


def test_there_are_some() -> None:
    assert {"quickstart.ipynb", "streaming.ipynb"} <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_form(name: str) -> None:
    """Format 4.5, every cell with an id of its own, no outputs, no counts."""
    notebook = read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    display, shown = fake_display()
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.syspath_prepend(str(EXAMPLES))  # a notebook runs in its own folder
    module = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    for number, cell in enumerate(read(name)["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), vars(module))
    sounds = [args[0] for kind, args, options in shown if kind == "Audio" and options["rate"] == 16000]
    assert len(sounds) >= 3
    for sound in sounds:
        assert sound.ndim == 1 and len(sound) > 16000 and abs(sound).max() > 1e-3
    pictures = [Path(options["filename"]) for kind, _, options in shown if kind == "Image"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert bool(pictures) == (name == "quickstart.ipynb")
