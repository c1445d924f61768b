"""Names of files from ids and templates: safe on every disk, inside of the folder, one for each piece."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from musicgen_fast.config import GenerationParams
from musicgen_fast.render.item import Item, ManifestError
from musicgen_fast.render.names import (
    check_relative,
    check_template,
    file_name,
    fold,
    inside,
    named_as,
    numbered,
    plan_names,
)

HOSTILE = [
    "../../etc/passwd", "/etc/passwd", "..", ".", "", " ", "-rf", "~", "C:\\x", "a\\b", "\\\\host\\x", "a:b", "a\0b",
    "CON", "nul.txt", "com1", "COM¹", "aux ", "conin$", "a.", "a ", ".hidden", "x" * 5000, "日本", "é", "e\u0301", "🎵",
    "\u202egnp.exe", "a\nb", "\ud800", "$(rm -rf)", "`id`", "%2e%2e%2f", "summary", "Summary", "a/b", "ſ", "ﬁ", "İ",
]  # fmt: skip


def item(identifier: str, line: int = 1, variation: int = 0, output: str | None = None, prompt: str = "a b") -> Item:
    return Item(identifier, line, line - 1, 7, prompt, GenerationParams(), variation, output=output)


def assert_safe(name: str) -> None:
    assert name.isascii() and 0 < len(name) <= 120 and not name.startswith((".", "-")) and not name.endswith(".")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    check_relative(name)


@pytest.mark.parametrize("identifier", HOSTILE, ids=ascii)
def test_hostile_ids(identifier: str) -> None:
    for dots in (True, False):
        assert_safe(file_name(identifier, dots))
        assert file_name(identifier, dots) != identifier
    assert "." not in file_name(identifier, dots=False)


@pytest.mark.parametrize("identifier", ["a", "song_01", "0123", "A-b.c", "_x", "YouTube_dQw4w9", "console", "com10"])
def test_plain_ids_are_their_own_names(identifier: str) -> None:
    assert file_name(identifier) == identifier


@settings(max_examples=400, deadline=None)
@given(one=st.text(max_size=200), other=st.text(max_size=200))
@example(one="a", other="A")
@example(one="é", other="e\u0301")
def test_any_id_is_a_safe_name_of_its_own(one: str, other: str) -> None:
    names = [file_name(one), file_name(other)]
    for name in names:
        assert_safe(name)
        assert unicodedata.normalize("NFD", name) == name
    plan: Any = None
    try:
        plan = plan_names([item(one, 1), item(other, 2)])
    except ManifestError as error:
        assert one == other or fold(names[0]) == fold(names[1])
        assert [problem.line for problem in error.problems] == [2]
    if plan is not None and one != other:
        assert fold(plan[one]) != fold(plan[other])


@settings(max_examples=400, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab./\\:* \0-~\u202eé$CONcon1\ud800"), max_size=30) | st.text())
def test_any_output_is_refused_or_stays_inside(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        (stem,) = plan_names([item("a", output=text)]).values()
    except ManifestError:
        return
    path = inside(folder, stem)
    assert path.resolve().is_relative_to(folder.resolve()) and path != folder
    assert ".." not in path.parts and "\\" not in stem and "\0" not in stem
    assert all(len(part.encode()) <= 200 for part in path.relative_to(folder).parts)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("/etc/x", "absolute"), ("a//b", "empty name"), ("../x", "on every system"), ("a/../b", "on every system"),
        ("a/.b", "on every system"), ("a\\b", "on every system"), ("C:x", "on every system"), ("a./b", "every system"),
        ("nul", "a device"), ("x/COM1.y", "a device"), ("x" * 201, "more than 200"), ("a/" * 9 + "b", "8 names"),
        ("summary", "belongs to the run"), ("a\u202eb", "cannot be seen"), ("a.mp3", "no name for a wav file"),
        ("summary-3-of-16", "belongs to the run"), ("-x", "on every system"),
    ],
)  # fmt: skip
def test_outputs_that_are_refused(output: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message) as caught:
        plan_names([item("a", 4, output=output)])
    assert caught.value.problems[0].line == 4


def test_names_that_look_like_other_formats() -> None:
    names = plan_names([item("song.mp3"), item("x.wav", 2)])
    assert names == {"song.mp3": "song.mp3", "x.wav": "x"}
    again = [item(key, output=named_as(stem, "wav")) for key, stem in names.items()]
    assert plan_names(again) == names
    assert [numbered(name, 2) for name in ("x", "d/x.wav", "x.y")] == ["x_2", "d/x_2.wav", "x.y_2"]


def test_names_of_a_plan() -> None:
    items = [item("a", 1), item("a", 1, 1), item("b/c", 2), item("d", 3, output="x/y.WAV"), item("e", 4, 2, "x/z")]
    names = plan_names(items)
    assert list(names.values()) == ["a", "a_1", file_name("b/c"), "x/y", "x/z"]
    assert list(plan_names(items[:2], "{id}-{variation:02}").values()) == ["a-00", "a-01"]
    assert list(plan_names(items[:1], "{hash:.2}/{index:04}_{prompt}_{model}", model="a b").values()) == [
        "ca/0000_a-b_a-b"
    ]
    assert plan_names(items[:1], "{id}.wav") == {"a": "a"}
    assert plan_names([item("a.b")], dots=False) == {"a.b": file_name("a.b", dots=False)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (item("Kick", 1), item("kick", 2)), (item("a_1", 1), item("a", 2, 1)), (item("a", 1), item("b", 2, output="A")),
        (item("a", 1, output="é"), item("b", 2, output="e\u0301")), (item("a", 1), item("b", 2, output="a.wav/x")),
        (item("a", 1, output="ﬁ"), item("b", 2, output="FI")), (item("a", 1), item("b", 2, output="A.json/x")),
    ],
)  # fmt: skip
def test_two_pieces_never_share_a_name(one: Item, other: Item) -> None:
    for pair in ([one, other], [other, one]):
        with pytest.raises(ManifestError) as caught:
            plan_names(pair)
        assert len(caught.value.problems) == 1
        told = str(caught.value)
        assert "line 1" in told and "line 2" in told
    assert len(plan_names([item("Kick", 1), item("kick", 2)], "{id}-{hash}")) == 2


@pytest.mark.parametrize("text", ["{nope}", "{id", "", "/x", "a/", "../{id}", "{id!z}", "{id:d}", "con", "{0}", "{}"])
def test_templates_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no template"):
        check_template(text)


@pytest.mark.parametrize("text", ["{id}", "{hash:.2}/{id}", "{index:05d}_{prompt}", "take {variation} of {seed}"])
def test_templates_that_are_good(text: str) -> None:
    assert check_template(text) == text


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "way").symlink_to(outside)
    (folder / "sub").mkdir()
    with pytest.raises(ValueError, match="is a link"):
        inside(folder, "way/a")
    assert inside(folder, "sub/a") == folder / PurePosixPath("sub/a")
    (tmp_path / "alias").symlink_to(folder)  # the folder itself may be one
    assert inside(tmp_path / "alias", "sub/a")
