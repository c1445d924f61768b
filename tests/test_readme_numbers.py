"""README's figures are those of benchmarks/results: written by `benchmarks/readme_numbers.py`, none typed by hand."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from musicgen_fast.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

with pytest.MonkeyPatch.context() as patch:  # scripts, in a folder which is no package
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    numbers: Any = importlib.import_module("readme_numbers")

PLACES = {match[2]: match[3] for match in re.finditer(r"(<!-- figures: (\w+) -->\n)(.*?)<!-- end -->", README, re.S)}
# A number that is a measurement by its unit. What may stand outside of the places, and why.
MEASURED = re.compile(r"\d+(?:[.,]\d+)*\s?(?:(?:ms|us|µs|MB|GB/s|GiB|MiB|x|times|fold|nats)\b|%)")
NO_MEASUREMENTS = {
    "20 ms": "the time of a frame",
    "0.6 x": "a rule for the stride",
    "5%": "an option",
    "15 MB": "the size of a file",
}


def test_readme_says_what_the_results_say() -> None:
    assert numbers.written(README) == README, "run: python benchmarks/readme_numbers.py"


@pytest.mark.parametrize("name", numbers.BLOCKS)
def test_a_changed_digit_in_readme_is_found(name: str) -> None:
    figure = re.search(r"\d\.\d", PLACES[name])
    assert figure, f"{name} has no figure"
    digit = figure[0][-1]
    changed = PLACES[name].replace(figure[0], figure[0][:-1] + str((int(digit) + 1) % 10), 1)
    wrong = README.replace(PLACES[name], changed)
    assert numbers.written(wrong) != wrong


def test_changed_results_are_found(tmp_path: Path) -> None:
    for path in numbers.RESULTS.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    assert numbers.written(README, tmp_path) == README
    path = numbers.newest("decoder", tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["ms_per_step"] *= 1.1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert numbers.written(README, tmp_path) != README


def test_a_newer_file_counts(tmp_path: Path) -> None:
    for date in ("2026-01-31", "2025-12-31"):
        (tmp_path / f"{date}-cpu-2core-codec.jsonl").write_text("")
    assert numbers.newest("codec", tmp_path).name.startswith("2026-01-31")
    with pytest.raises(FileNotFoundError, match="no results"):
        numbers.newest("colours", tmp_path)


def test_a_place_without_a_block_is_said() -> None:
    with pytest.raises(ValueError, match="the places"):
        numbers.written(README.replace("figures: codec", "figures: codecs"))


def test_no_measurement_is_typed_by_hand() -> None:
    text = re.sub(r"<!-- figures: \w+ -->\n.*?<!-- end -->", "", README, flags=re.S)
    text = re.sub(r"```.*?```|`[^`\n]*`|https?:\S+", "", text, flags=re.S)
    found = [match[0] for match in MEASURED.finditer(text) if match[0] not in NO_MEASUREMENTS]
    assert not found, f"these figures of README come from no results file: {found}"


def test_the_commands_behind_the_figures_exist() -> None:
    parser, _ = build_parser()
    for block in numbers.BLOCKS.values():
        for command in block.commands:
            program, *words = command.split()
            if program == "python":
                assert (ROOT / words[0]).is_file(), command
            else:
                assert program == "musicgen-fast" and parser.parse_args(words).command.startswith("bench"), command


def test_the_pictures_are_there() -> None:
    shown = re.findall(r'(?:src|srcset)="([^"]+)"|!\[[^\]]*\]\(([^)]+)\)', README)
    paths = [ROOT / (one or other) for one, other in shown]
    assert len(paths) > 10
    for path in paths:
        assert path.is_file() and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", path
        assert path.stat().st_size < 300_000, path


def test_the_script_checks_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    path = tmp_path / "README.md"
    path.write_text(README.replace(PLACES["codec"], "nothing\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["readme_numbers.py", "--check"])
    assert numbers.main() == 1 and "nothing" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["readme_numbers.py"])
    assert numbers.main() == 0 and path.read_text(encoding="utf-8") == README
    monkeypatch.setattr(sys, "argv", ["readme_numbers.py", "--check"])
    assert numbers.main() == 0
