"""Files and tars that `musicgen-fast render` leaves behind."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from musicgen_fast.audio import audio_write
from musicgen_fast.cli_output import FORMATS, set_level
from musicgen_fast.config import GenerationParams
from musicgen_fast.render.item import Item
from musicgen_fast.render.ledger import Ledger, read_ledgers
from musicgen_fast.render.output import Files, Piece, Settings, ends_run, sweep
from musicgen_fast.render.resume import Decision, Task, files_present
from musicgen_fast.render.webdataset import (
    TarShards,
    check_unchanged,
    remove_shards,
    shards_present,
    unrecorded,
)
from musicgen_fast.sections import Section

RATE = 32000


def piece(key: str = "a", stem: str | None = None, seconds: float = 0.5, wav: Any = None, **more: Any) -> Piece:
    item = Item(key, 3, 0, 5, "lofi", GenerationParams(duration=seconds), tags=(("artist", "me"),), **more)
    if wav is None:
        wav = torch.sin(torch.arange(int(seconds * RATE)) / 20)[None] * 0.3
    return Piece(Task(item, stem or key, "f" * 32), wav, RATE, torch.arange(100).view(4, 25), facts={"model": "m"})


@pytest.mark.parametrize("format", FORMATS)
def test_files_of_a_piece(format: str, tmp_path: Path) -> None:
    settings = Settings(format, tokens=True)
    one = piece(stem="sub/folder/a")
    ((same, written),) = Files(tmp_path, settings).write(one)
    assert same is one and [name for name, _ in written.files] == [f"sub/folder/a.{s}" for s in (format, "json", "npz")]
    assert all((tmp_path / name).stat().st_size == size for name, size in written.files)
    assert not list(tmp_path.rglob(".*"))
    told = json.loads((tmp_path / "sub/folder/a.json").read_text())
    assert (told["id"], told["seed"], told["prompt"], told["model"], told["file"]) == (
        "a", 5, "lofi", "m", f"a.{format}"
    )  # fmt: skip
    assert told["parameters"]["top_k"] == 250 and told["fingerprint"] == "f" * 32 and told["frames"] == 16000
    assert np.load(tmp_path / "sub/folder/a.npz")["tokens"].tolist() == torch.arange(100).view(4, 25).tolist()
    with soundfile.SoundFile(tmp_path / f"sub/folder/a.{format}") as sound:
        assert sound.samplerate == RATE and (format == "mp3" or sound.frames == 16000)
        assert sound.copy_metadata()["title"] == "lofi" and sound.copy_metadata()["artist"] == "me"
        if format in ("wav", "flac"):
            pcm = sound.read(dtype="int16").tobytes()
            assert hashlib.sha256(pcm).hexdigest() == told["sha256"] == written.sha256
    line = {"files": [list(f) for f in written.files]}
    assert files_present(tmp_path, settings.suffixes)(line, "sub/folder/a")


def test_sound_is_that_of_audio_write(tmp_path: Path) -> None:
    wav = torch.randn(2, 20000, generator=torch.Generator().manual_seed(0)) * 0.4
    for loudness in ("loudness", "peak", "rms", "clip", "none"):
        Files(tmp_path, Settings("wav", loudness, tags=False)).write(piece(wav=wav))
        strategy = {"none": "clip"}.get(loudness, loudness)
        audio_write(
            tmp_path / "b", wav, RATE, strategy=strategy, loudness_compressor=True,
            peak_clip_headroom_db=0 if loudness == "none" else 1,
        )  # fmt: skip
        assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes(), loudness
        assert torch.equal(wav, wav.clone()) and set_level(wav, RATE, loudness).abs().max() <= 1


def test_the_sidecar_tells_of_recordings_and_sections(tmp_path: Path) -> None:
    sections = (Section(0, "x"), Section(5, "y"))
    files = Files(tmp_path, Settings())
    files.write(piece("s", sections=sections))
    files.write(piece("c", continuation="in.wav", continuation_start=1.0))
    files.write(piece("m", melody="in.wav", separate=False))
    told = {key: json.loads((tmp_path / f"{key}.json").read_text()) for key in "scm"}
    assert [section["description"] for section in told["s"]["sections"]] == ["x", "y"]
    assert told["c"]["recording"] == {"use": "continuation", "file": "in.wav", "from": 1.0, "seconds": None}
    assert told["m"]["recording"] == {"use": "melody", "file": "in.wav", "separate": False}


@pytest.mark.parametrize(
    "wav", [torch.full((1, 9), float("nan")), torch.zeros(1, 0), torch.zeros(9), torch.full((1, 9), float("inf"))]
)
def test_what_is_no_sound_leaves_nothing(wav: torch.Tensor, tmp_path: Path) -> None:
    for sink in (Files(tmp_path, Settings()), TarShards(tmp_path, Settings())):
        with pytest.raises(ValueError):
            sink.write(piece(wav=wav))
        assert sink.close() == []
    assert not list(tmp_path.iterdir())


def test_tokens_that_are_asked_for_and_missing(tmp_path: Path) -> None:
    bare = Piece(piece().task, torch.zeros(1, 9), RATE)
    with pytest.raises(ValueError, match="the engine gave none"):
        Files(tmp_path, Settings(tokens=True)).write(bare)
    big = Piece(piece().task, torch.zeros(1, 9), RATE, torch.tensor([[70000]]))
    Files(tmp_path, Settings(tokens=True)).write(big)
    assert np.load(tmp_path / "a.npz")["tokens"].tolist() == [[70000]]


def test_links_are_not_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "precious.wav"
    folder.mkdir()
    outside.write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (folder / "a.wav").symlink_to(outside)
    (folder / "b.json").symlink_to(outside)
    (folder / "way").symlink_to(tmp_path / "elsewhere")
    files = Files(folder, Settings())
    for stem in ("a", "b"):
        with pytest.raises(ValueError, match="is a link"):
            files.write(piece(stem=stem))
    with pytest.raises(ValueError, match="is a link"):
        files.write(piece(stem="way/a"))
    assert outside.read_text() == "precious" and not list((tmp_path / "elsewhere").iterdir())


def test_an_error_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path, Settings(tokens=True))
    files.write(piece())
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".npz"}
    monkeypatch.setattr("musicgen_fast.audio_encode.os.fsync", _full)
    with pytest.raises(OSError) as caught:
        files.write(piece(seconds=1.0))
    assert ends_run(caught.value) and {path: path.read_bytes() for path in before} == before
    assert len(list(tmp_path.iterdir())) == 3


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_ends_a_run() -> None:
    assert all(ends_run(OSError(code, "x")) for code in (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES))
    assert not any(ends_run(e) for e in (OSError(errno.EINVAL, "x"), OSError("x"), ValueError("x"), MemoryError()))


def test_sweeping(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    root = tmp_path / "deep"
    for name in (".musicgen_fast-00.tmp", "er/.musicgen_fast-01.tmp", "er/keep.tmp", ".musicgen_fast.lock", "a.wav"):
        (root / name).touch()
    (tmp_path / "other/.musicgen_fast-02.tmp").touch()
    (root / "way").symlink_to(tmp_path / "other")
    assert sweep(root) == 2
    names = sorted(path.name for path in root.rglob("*") if path.is_file())
    assert names == [".musicgen_fast.lock", "a.wav", "keep.tmp"] and (tmp_path / "other/.musicgen_fast-02.tmp").exists()


# -- tars -------------------------------------------------------------------------------------------------------------


def members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_shards_fill_and_appear_whole(tmp_path: Path) -> None:
    shards = TarShards(tmp_path, Settings("flac", tokens=True), max_pieces=2)
    assert shards.write(piece("a")) == [] and not list(tmp_path.glob("*.tar"))
    stored = shards.write(piece("b", stem="sub/b"))
    assert [p.task.key for p, _ in stored] == ["a", "b"] and [p.name for p in tmp_path.iterdir()] == [
        "shard-000000.tar"
    ]
    assert shards.write(piece("c")) == [] and [p.task.key for p, _ in shards.close()] == ["c"]
    names = members(tmp_path / "shard-000000.tar")
    assert names == ["a.flac", "a.json", "a.npz", "sub/b.flac", "sub/b.json", "sub/b.npz"]
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        told = json.load(tar.extractfile("a.json"))  # type: ignore[arg-type]
        pcm, rate = soundfile.read(io.BytesIO(tar.extractfile("a.flac").read()), dtype="int16")  # type: ignore[union-attr]
        assert rate == RATE and hashlib.sha256(pcm.tobytes()).hexdigest() == told["sha256"]
    again = TarShards(tmp_path, Settings("flac"), max_pieces=2)
    again.write(piece("d"))
    again.close()
    assert members(tmp_path / "shard-000002.tar") == ["d.flac", "d.json"]
    again.write(piece("e"))
    assert [p.task.key for p in again.abort()] == ["e"] and again.close() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"shard-00000{n}.tar" for n in range(3)]


def test_the_same_pieces_are_the_same_tar(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shards = TarShards(tmp_path / name, Settings("flac"))
        for key in "xyz":
            shards.write(piece(key))
        shards.close()
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (tmp_path / "b/shard-000000.tar").read_bytes()


def test_a_shard_without_ledger_lines_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    shards = TarShards(tmp_path, Settings("flac"))
    for key in "abc":
        shards.write(piece(key))
    stored = shards.close()
    with Ledger(path) as ledger:
        ledger.done("a", "f" * 32, **stored[0][1].told())  # killed after the first line
    history = read_ledgers([path])
    found = list(unrecorded(tmp_path, history))
    assert [key for key, _, _ in found] == ["b", "c"]
    with Ledger(path) as ledger:
        for key, fingerprint, facts in found:
            ledger.done(key, fingerprint, **facts)
    history, present = read_ledgers([path]), shards_present(tmp_path)
    assert not list(unrecorded(tmp_path, history))
    lines = history.done_keys()
    assert all(present(lines[key][0], key) for key in "abc") and not present(lines["a"][0], "b")
    changed = Decision(Task(piece("a").task.item, "a", "other"), "render")
    with pytest.raises(ValueError, match="'a' \\(line 3\\) changed since it went into shard-000000.tar"):
        check_unchanged([changed], history, present)
    check_unchanged([Decision(changed.task, "skip"), Decision(piece("new").task, "render")], history, present)
    with open(tmp_path / "shard-000000.tar", "ab") as file:
        file.write(b"x")
    assert not shards_present(tmp_path)(lines["a"][0], "a")
    (tmp_path / "shard-000001.tar").write_bytes(b"no tar")
    assert [key for key, _, _ in unrecorded(tmp_path, read_ledgers([]))] == ["a", "b", "c"]
    assert remove_shards(tmp_path) == 2 and not list(tmp_path.glob("*.tar"))


def test_a_tar_on_a_full_disk_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = TarShards(tmp_path, Settings("flac"), max_pieces=2)
    shards.write(piece("a"))
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *args: _full(0))
    for key in "bc":
        with pytest.raises(OSError, match="cannot write .*shard-000000.tar") as caught:
            shards.write(piece(key))
        assert ends_run(caught.value)
    monkeypatch.undo()
    assert [p.task.key for p in shards.abort()] == ["a"] and not list(tmp_path.iterdir())
