"""How many pieces fit beside each other, and what a folder remembers of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from musicgen_fast.config import GenerationParams, named_config
from musicgen_fast.render import Options, capacity, make_plan
from musicgen_fast.render.capacity import Memory, batch_size, bytes_per_piece, free_memory
from musicgen_fast.render.item import Item
from musicgen_fast.render.requests import rows_of
from musicgen_fast.sections import Section

CPU = torch.device("cpu")


def test_bytes_of_a_piece() -> None:
    small = named_config("small")
    assert bytes_per_piece(small, "int8", 1500, 2) == pytest.approx(2 * 24 * 1024 * 1568 * 2 * (1 + 4 / 64))
    assert bytes_per_piece(small, "float32", 1500, 2) == pytest.approx(4 * 2 * 24 * 1024 * 1568 * 2)
    melody = bytes_per_piece(named_config("small-melody"), "float32", 1500, 2)
    assert melody > bytes_per_piece(small, "float32", 1500, 2)


def test_a_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    small = named_config("small")
    piece = bytes_per_piece(small, "int8", 1500, 2)
    for pieces, size in ((0.1, 1), (3.5, 3), (1000, 16)):
        monkeypatch.setattr(capacity, "free_memory", lambda device, room=pieces * piece / 0.7: room)
        assert batch_size(small, "int8", 1500, 2, CPU) == size


def test_free_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    assert 2**20 < free_memory(CPU) < 2**50
    assert capacity._of_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity._of_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    assert capacity._of_container(tmp_path) == 400


def test_a_folder_remembers(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("a\n")
    plan = make_plan(Options(tmp_path / "m.txt", tmp_path))
    memory = Memory(plan, ("model", "int8", "cpu"))
    assert memory.read() is None
    memory.write(3)
    assert memory.read() == 3 and Memory(plan, ("model", "float32", "cpu")).read() is None
    (tmp_path / ".musicgen_fast-batch.json").write_text("[1")
    assert memory.read() is None


@pytest.mark.parametrize(
    ("params", "sections", "rows"),
    [
        ({}, (), 2),
        ({"cfg_coef": 1.0}, (), 1),
        ({"cfg_coef_beta": 5.0}, (), 3),
        ({}, (Section(0, "a"), Section(2, "b")), 4),
        ({"cfg_coef": 1.0}, (Section(0, "a"), Section(2, "b", cfg_coef=3.0)), 4),
    ],
)
def test_rows_of_a_piece(params: dict[str, float], sections: tuple[Section, ...], rows: int) -> None:
    item = Item("a", 1, 0, 5, "x", GenerationParams(duration=4, **params), sections=sections)
    assert rows_of(item) == rows
