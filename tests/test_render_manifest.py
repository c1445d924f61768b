"""Manifests of `musicgen-fast render`: fields, aliases, formats, and every mistake with its line."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen_fast.config import GenerationParams
from musicgen_fast.render.fields import ALIASES, PARAMETERS
from musicgen_fast.render.identity import Identity, seed_of
from musicgen_fast.render.inputs import Inputs
from musicgen_fast.render.item import Item, Limits, ManifestError
from musicgen_fast.render.manifest import read_manifest
from musicgen_fast.sections import Section


def items_of(folder: Path, *rows: Any, name: str = "m.jsonl", **options: Any) -> list[Item]:
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return read_manifest(path, **options)


def problems_of(folder: Path, *rows: Any, name: str = "m.jsonl", **options: Any) -> list[tuple[int, str]]:
    with pytest.raises(ManifestError) as caught:
        items_of(folder, *rows, name=name, **options)
    return [(problem.line, problem.message) for problem in caught.value.problems]


def write_tone(path: Path, seconds: float, rate: int = 8000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(int(seconds * rate)) / 9).astype(np.float32) * 0.5, rate)


def test_parameters_are_those_of_generation_params() -> None:
    assert set(PARAMETERS) == set(GenerationParams.__dataclass_fields__)
    spelled = [alias for name, aliases in ALIASES.items() for alias in (name, *aliases)]
    assert len(spelled) == len(set(spelled))


def test_fields_of_a_line(tmp_path: Path) -> None:
    row = {
        "custom_id": 17, "Caption": "lofi", "secs": 3, "guidance-scale": 4, "topk": 50, "topp": 0.5, "temp": 0.9,
        "seed": 0, "negative": "drums", "tags": {"artist": "me"}, "output": "a/b.wav", "do_sample": False,
        "two_step_cfg": True, "cfg_coef_beta": 2, "extend_stride": 9, "error": "old", "attempts": 3,
    }  # fmt: skip
    (item,) = items_of(tmp_path, "", row, "")
    params = GenerationParams(False, 50, 0.5, 0.9, 3.0, 4.0, 2.0, True, 9.0)
    assert item == Item(
        "17", 2, 0, 0, "lofi", params, negative_prompt="drums", tags=(("artist", "me"),), output="a/b.wav"
    )


@pytest.mark.parametrize("name", list(ALIASES))
def test_every_alias_reads_the_same(name: str, tmp_path: Path) -> None:
    write_tone(tmp_path / "x.wav", 1)
    values: dict[str, Any] = {
        "id": "x", "negative_prompt": "x", "duration": 3, "seed": 5, "num_variations": 2, "variation": 1,
        "unconditional": True, "use_sampling": False, "top_k": 5, "top_p": 0.5, "temperature": 0.5, "cfg_coef": 2,
        "cfg_coef_beta": 2, "two_step_cfg": True, "extend_stride": 2, "melody": "x.wav", "separate": False,
        "continuation": "x.wav", "continue_from": 0.25, "continue_seconds": 0.5, "sections": [[0, "x"]],
        "crossfade": 0.1, "output": "x", "tags": {"title": "x"}, "prompt": "other",
    }  # fmt: skip
    needs = {"separate": "melody", "continue_from": "continuation", "continue_seconds": "continuation"}
    base: dict[str, Any] = {} if name in ("prompt", "sections", "unconditional", "crossfade") else {"prompt": "y"}
    base |= {"sections": [[0, "a"], [5, "b"]]} if name == "crossfade" else {}
    base |= {needs[name]: "x.wav"} if name in needs else {}
    for alias in ALIASES[name]:
        assert items_of(tmp_path, base | {alias: values[name]}) == items_of(tmp_path, base | {name: values[name]})
    base = base or {"prompt": "y"}
    if name not in ("prompt", "sections", "unconditional", "crossfade"):
        assert items_of(tmp_path, base | {name: values[name]}) != items_of(tmp_path, base)


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_csv_tsv_and_jsonl_say_the_same(delimiter: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "one, two", "duration": 3, "seed": 4, "two_step_cfg": True, "sections": None},
        {"id": "b", "prompt": 'with "quotes"\nand lines', "duration": None, "seed": -1, "two_step_cfg": False},
        {"id": "c", "prompt": None, "duration": 30, "seed": None, "sections": [[0, "x"], [20, "y"]]},
        {"id": "d", "prompt": "Grüße 🎵"},
    ]
    sheet = io.StringIO(newline="")
    writer = csv.writer(sheet, delimiter=delimiter, lineterminator="\r\n")
    names = ["id", "prompt", "duration", "seed", "two_step_cfg", "sections"]
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        writer.writerow(["" if c is None else c if isinstance(c, str) else json.dumps(c) for c in cells])
    suffix = "csv" if delimiter == "," else "tsv"
    (tmp_path / f"m.{suffix}").write_bytes(b"\xef\xbb\xbf" + sheet.getvalue().encode())
    sheet_items = read_manifest(tmp_path / f"m.{suffix}")
    assert [i.line for i in sheet_items] == [2, 3, 5, 6]
    plain = [i.__dict__ | {"line": 0} for i in items_of(tmp_path, *rows)]
    assert [i.__dict__ | {"line": 0} for i in sheet_items] == plain
    assert plain[2]["sections"] == (Section(0.0, "x"), Section(20.0, "y")) and plain[2]["prompt"] == "x"


def test_a_text_has_a_prompt_a_line_and_ids_do_not_depend_on_where_they_stand(tmp_path: Path) -> None:
    before = items_of(tmp_path, "lofi", "", "  jazz ", "lofi", "日本", name="m.txt")
    assert [i.prompt for i in before] == ["lofi", "jazz", "lofi", "日本"] and [i.line for i in before] == [1, 3, 4, 5]
    after = items_of(tmp_path, "new", "jazz", "lofi", "lofi", name="m.txt")
    assert {i.key: i.seed for i in before[:3]} == {i.key: i.seed for i in after[1:]}
    assert len({i.key for i in before}) == 4 and len({i.seed for i in before}) == 4


def test_variations_and_seeds(tmp_path: Path) -> None:
    a = items_of(tmp_path, {"id": "a", "prompt": "x", "num_variations": 3, "seed": 5}, {"id": "b", "prompt": "x"})
    assert [(i.key, i.seed, i.index) for i in a[:3]] == [("a", 5, 0), ("a#1", 6, 0), ("a#2", 7, 0)]
    assert a[3].seed == seed_of(0, "b") and a[3].index == 1
    b = items_of(tmp_path, {"id": "b", "prompt": "x", "num_variations": 3}, seed=1)
    assert [i.seed for i in b] == [seed_of(1, "b", v) for v in range(3)] and b[0].seed != a[3].seed
    assert seed_of(0, "b") == 1998461820176946470  # stored music depends on it: never change this
    drawn = items_of(tmp_path, *({"id": f"{n}", "prompt": "x", "seed": s} for n, s in enumerate([-1, None, "random"])))
    assert [i.seed for i in drawn] == [seed_of(0, str(n)) for n in range(3)]


MISTAKES: list[tuple[Any, str]] = [
    ("{", "is not JSON"),
    ("[1]", "expected an object"),
    ('{"prompt": "a", "prompt": "b"}', "'prompt' stands in it twice"),
    ('{"prompt": "a", "top_p": NaN}', "NaN is no number"),
    ('{"prompt": "a", "top_k": 1' + "0" * 5000 + "}", "top_k|not JSON"),
    ("[" * 60000, "nested too deeply|not JSON"),
    ({"prompt": "a", "promt": 1}, "unknown field 'promt'"),
    ({"prompt": "a", "text": "b"}, "prompt is given twice, as 'prompt' and as 'text'"),
    ({"prompt": 5}, "expected a text, got 5"),
    ({"prompt": "a\0b"}, "which is no text"),
    ('{"prompt": "\\ud800"}', "which is no text"),
    ({"id": "", "prompt": "a"}, "id: is empty"),
    ({"id": "x" * 600, "prompt": "a"}, "600 characters"),
    ({"prompt": "x" * 5000}, "5000 characters, at most 4000"),
    ({"prompt": "a", "duration": "ten"}, "expected a number, got 'ten'"),
    ({"prompt": "a", "duration": True}, "expected a number, got True"),
    ({"prompt": "a", "duration": 0}, "must be above 0"),
    ({"prompt": "a", "duration": 1e9}, "at most 10800 seconds"),
    ({"prompt": "a", "top_k": 1.5}, "expected a whole number"),
    ({"prompt": "a", "top_p": 2}, "top_p must be at most 1"),
    ({"prompt": "a", "seed": -2}, "expected 0 to 2\\*\\*63 - 1"),
    ({"prompt": "a", "seed": 2**63}, "expected 0 to 2\\*\\*63 - 1"),
    ({"prompt": "a", "seed": True}, "expected 0 to 2\\*\\*63 - 1"),
    ({"prompt": "a", "num_variations": 0}, "must be 1 to 1000"),
    ({"prompt": "a", "num_variations": 1001}, "must be 1 to 1000"),
    ({"prompt": "a", "num_variations": 2, "variation": 1}, "no num_variations besides"),
    ({"prompt": "a", "use_sampling": "yes"}, "expected true or false"),
    ({}, "has no prompt"),
    ({"prompt": "  "}, "has no prompt"),
    ({"unconditional": True, "prompt": "a"}, "unconditional takes neither"),
    ({"unconditional": True, "negative_prompt": "a"}, "needs a prompt to lead away from"),
    ({"prompt": "a", "sections": [[0, "b"]]}, "no prompt besides"),
    ({"sections": []}, "expected a list such as"),
    ({"sections": [[1, "b"]]}, "must start at 0"),
    ({"sections": [[0, "b"], [99, "c"]]}, "beyond the duration"),
    ({"sections": [{"start": 0, "descriptio": "b"}]}, "a section has start, description"),
    ({"sections": [[0, ""]]}, "empty description"),
    ({"sections": [["0", "x"]]}, "start must be a number"),
    ({"prompt": "a", "crossfade": 1}, "crossfade needs sections"),
    ({"prompt": "a", "separate": True}, "separate needs a melody"),
    ({"prompt": "a", "continue_from": 1}, "need a continuation"),
    ({"prompt": "a", "tags": {"colour": "b"}}, "unknown tag 'colour'"),
    ({"prompt": "a", "melody": "none.wav"}, "No such file"),
    ({"prompt": "a", "melody": "https://example.com/a.wav"}, "URLs are not fetched"),
    ({"prompt": "a", "melody": "file:///etc/passwd"}, "URLs are not fetched"),
    ({"prompt": "a", "melody": "../outside.wav"}, "outside of the input root"),
    ({"prompt": "a", "melody": "/etc/passwd"}, "outside of the input root"),
    ({"prompt": "a", "melody": "link.wav"}, "outside of the input root"),
    ({"prompt": "a", "melody": "."}, "is not a file"),
    ({"prompt": "a", "melody": "text.wav"}, "cannot read .* as audio"),
    ({"prompt": "a", "melody": "long.wav"}, "is longer than 5 s"),
    ({"prompt": "a", "melody": "empty.wav"}, "holds no sound"),
    ({"prompt": "a", "melody": "in.wav", "continuation": "in.wav"}, "exclude each other"),
    ({"prompt": "a", "continuation": "in.wav", "duration": 1.5}, "includes the recording, of which 2.00 s"),
    ({"prompt": "a", "continuation": "in.wav", "continue_from": 3}, "past the end"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest") / "root"
    write_tone(folder / "in.wav", 2)
    write_tone(folder / "long.wav", 6)
    write_tone(folder / "empty.wav", 0)
    write_tone(folder.parent / "outside.wav", 1)
    (folder / "text.wav").write_text("no sound")
    (folder / "link.wav").symlink_to(folder.parent / "outside.wav")
    return folder


@pytest.mark.parametrize(("row", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_told_with_their_line(row: Any, message: str, root: Path) -> None:
    limits = Limits(input_seconds=5.0)
    found = problems_of(root, {"prompt": "good"}, row, {"prompt": "good too"}, limits=limits)
    assert [line for line, _ in found] == [2], found
    assert re.search(message, found[0][1]), found


def test_several_mistakes_of_one_line_and_twins(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "x"},
        {"id": "a", "prompt": "y"},
        {"id": "b", "prompt": "x", "duration": -1, "seed": "x", "colour": 1},
        {"id": "e\u0301", "prompt": "x"},
        {"id": "\u00e9", "prompt": "x"},
        {"id": "a", "variation": 1, "prompt": "x"},
    ]
    found = problems_of(tmp_path, *rows)
    assert [line for line, _ in found] == [2, 3, 3, 3, 5]
    assert "stands in line 1 already" in found[0][1] and "line 4 already" in found[4][1]


def test_ten_thousand_lines_with_fifty_bad_ones(tmp_path: Path) -> None:
    rows: list[Any] = [{"id": f"{n:05}", "prompt": f"prompt {n}", "duration": 1 + n % 30} for n in range(10_000)]
    bad = range(100, 10_000, 198)
    for n in bad:
        rows[n] = MISTAKES[n % 30][0]
    (tmp_path / "link.wav").symlink_to("/")
    began = time.perf_counter()
    found = problems_of(tmp_path, *rows)
    assert time.perf_counter() - began < 10  # 0.3 s on an idle core
    assert sorted({line for line, _ in found}) == [n + 1 for n in bad] and len(bad) == 50


def test_limits(tmp_path: Path) -> None:
    good = {"prompt": "x"}
    assert problems_of(tmp_path, good, "x" * 3000, good, name="m.txt", limits=Limits(line_bytes=2000)) == [
        (2, "has more than 2000 bytes")
    ]
    (tmp_path / "m.jsonl").write_bytes(b'{"prompt": "a"}\n' + b"\0" * 200_000)
    with pytest.raises(ManifestError, match="line 2: has more than"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.txt").write_bytes("grün\nschön\n".encode("latin-1"))
    with pytest.raises(ManifestError, match="line 2: is not UTF-8"):
        read_manifest(tmp_path / "m.txt")
    found = problems_of(
        tmp_path, good | {"num_variations": 60}, good | {"num_variations": 60}, limits=Limits(items=100)
    )
    assert found[0][0] == 2 and "more than 100 pieces" in found[0][1]
    found = problems_of(tmp_path, *["{"] * 50, limits=Limits(problems=10))
    assert len(found) == 11 and "reading stopped after 10" in found[-1][1]
    assert problems_of(tmp_path, "", "") == [(0, "there is nothing to render in it")]


def test_csv_mistakes(tmp_path: Path) -> None:
    text = 'id,prompt,nonsense\na,x,\nb,x,,\nc,"x"y,\nd,"open\n' + "e,x,\n" * 20
    found = problems_of(tmp_path, text.rstrip("\n"), name="m.csv")
    assert [line for line, _ in found] == [1, 3, 4, 5], found
    assert "unknown column 'nonsense'" in found[0][1] and "has 4 cells, the header 3" in found[1][1]
    assert len(items_of(tmp_path, "id,prompt,nonsense", "a,x,1", name="m.csv", ignore_extra=True)) == 1
    assert "stands there twice" in problems_of(tmp_path, "prompt,prompt", "a,b", name="m.csv")[0][1]
    assert "unknown field ''" in problems_of(tmp_path, "prompt,", "a,b", name="m.csv")[0][1]
    big = 'prompt\n"' + "long\n" * 50_000
    assert "is a quote left open" in problems_of(tmp_path, big, name="m.csv")[0][1]


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=300), format=st.sampled_from(["jsonl", "csv", "tsv", "txt"]))
def test_any_bytes_are_items_or_problems(data: bytes, format: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(data)
    try:
        assert read_manifest(path, format=format)
    except ManifestError as error:
        assert error.problems and all(problem.line >= 0 for problem in error.problems)
        str(error).encode("utf-8", "backslashreplace")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(row=st.dictionaries(st.sampled_from(sorted(ALIASES)), JSON, max_size=6))
def test_any_values_are_items_or_problems(row: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text(json.dumps({"prompt": "x"} | row))
    try:
        for item in read_manifest(path, limits=Limits(variations=5)):
            json.dumps(item.row(), allow_nan=False)
            Identity("w", "p", "v").fingerprint(item, Inputs(path.parent))
    except ManifestError as error:
        assert error.problems
