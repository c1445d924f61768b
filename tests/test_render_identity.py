"""Seeds, fingerprints and hashes: what says whether a piece is still the piece that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile

from musicgen_fast.config import GenerationParams
from musicgen_fast.render.identity import Identity, estimate, frames_of, weights_hash
from musicgen_fast.render.inputs import Inputs
from musicgen_fast.render.item import Limits

from .test_render_manifest import items_of, write_tone


def test_a_piece_as_a_row_is_the_same_piece(tmp_path: Path) -> None:
    write_tone(tmp_path / "in/a.wav", 2)
    rows = [
        {"id": "a", "prompt": "x", "num_variations": 2, "negative_prompt": "n", "tags": {"title": "t"}},
        {"id": "b", "melody": "in/a.wav", "separate": False, "seed": 3, "num_variations": 2, "output": "o/p"},
        {"id": "c", "prompt": "x", "continuation": "in/a.wav", "continue_from": 0.5, "continue_seconds": 1},
        {"id": "d", "sections": [[0, "x"], {"start": 5, "prompt": "y", "cfg_coef": 2}], "crossfade": 1},
        {"id": "e", "unconditional": True, "cfg_coef_beta": 3},
    ]
    items = items_of(tmp_path, *rows, defaults=GenerationParams(duration=9, extend_stride=4), seed=7)
    again = items_of(tmp_path, *(item.row() for item in items))
    inputs, identity = Inputs(tmp_path), Identity("w", "float32", "1")
    assert [i.key for i in again] == [i.key for i in items]
    assert [(i.seed, i.output) for i in again] == [(i.seed, i.output) for i in items]
    assert [identity.fingerprint(i, inputs) for i in again] == [identity.fingerprint(i, inputs) for i in items]


def test_fingerprints_change_with_what_changes_the_sound_and_with_nothing_else(tmp_path: Path) -> None:
    write_tone(tmp_path / "a.wav", 2)
    base: dict[str, Any] = {"id": "a", "prompt": "x", "duration": 8, "seed": 5}
    identity, inputs = Identity("w", "float32", "1"), Inputs(tmp_path)

    def fingerprint(*others: dict[str, Any], **row: Any) -> str:
        return identity.fingerprint(items_of(tmp_path, *others, base | row)[-1], inputs)

    same = [fingerprint(), fingerprint(id="b"), fingerprint({"prompt": "other"}), fingerprint(duration=8.0)]
    same += [fingerprint(output="elsewhere"), fingerprint(top_k=250), fingerprint(cfg_coef=3)]
    assert len(set(same)) == 1
    changes: list[dict[str, Any]] = [
        {"prompt": "y"}, {"duration": 9}, {"seed": 6}, {"top_k": 1}, {"top_p": 0.1}, {"temperature": 0.5},
        {"cfg_coef": 2}, {"use_sampling": False}, {"negative_prompt": "y"}, {"melody": "a.wav"}, {"extend_stride": 3},
        {"continuation": "a.wav"}, {"continuation": "a.wav", "continue_from": 1}, {"tags": {"title": "t"}},
        {"melody": "a.wav", "separate": False}, {"prompt": None, "sections": [[0, "x"]]}, {"two_step_cfg": True},
    ]  # fmt: skip
    found = [fingerprint(**change) for change in changes] + [same[0]]
    assert len(set(found)) == len(found)
    (item,) = items_of(tmp_path, base)
    others = [Identity("v", "float32", "1"), Identity("w", "float16", "1"), Identity("w", "float32", "2")]
    others += [Identity("w", "float32", "1", "audiocraft"), Identity("w", "float32", "1", output={"format": "mp3"})]
    assert len({other.fingerprint(item, inputs) for other in [identity, *others]}) == 6
    before = fingerprint(melody="a.wav")
    write_tone(tmp_path / "a.wav", 1)
    inputs = Inputs(tmp_path)
    assert fingerprint(melody="a.wav") != before


def test_weights_are_told_by_their_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    assert weights_hash(str(tmp_path / "a")) == weights_hash(str(tmp_path / "b"))
    assert weights_hash(str(tmp_path / "a"), others=[None]) != weights_hash(str(tmp_path / "a"), others=["demo"])
    (tmp_path / "b/config.json").write_text("{}")
    assert weights_hash(str(tmp_path / "a")) != weights_hash(str(tmp_path / "b"))
    assert len({weights_hash(name) for name in ("demo", "random:small", "random:large")}) == 3
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        weights_hash(str(tmp_path / "c"))


def test_frames_and_estimates(tmp_path: Path) -> None:
    items = items_of(tmp_path, *({"prompt": "x", "duration": d} for d in (0.99, 10, 30)))
    assert [frames_of(item) for item in items] == [49, 500, 1500]
    told = estimate(items, "wav", speed=2.0)
    assert (told.pieces, told.longest_seconds, told.wall_seconds) == (3, 30, pytest.approx(40.99 / 2))
    assert 40.99 * 64000 < told.disk_bytes < 40.99 * 64000 * 1.01
    assert estimate(items, "mp3").disk_bytes < told.disk_bytes and estimate(items, "mp3").wall_seconds is None
    assert estimate(items, "wav", tokens=True, channels=2).disk_bytes > 2 * 40.99 * 64000


def test_a_flac_that_claims_to_be_endless_is_measured(tmp_path: Path) -> None:
    write_tone(tmp_path / "a.flac", 3)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0  # the 36 bits of STREAMINFO that count the samples: 0 is "unknown"
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(bytes(data))
    assert soundfile.info(tmp_path / "a.flac").frames > 1e9
    assert Inputs(tmp_path).check("a.flac").seconds == 3.0
    with pytest.raises(ValueError, match="longer than 2 s"):
        Inputs(tmp_path, Limits(input_seconds=2.0)).check("a.flac")
    with pytest.raises(ValueError, match="MB are read"):
        Inputs(tmp_path, Limits(input_bytes=100)).check("a.flac")
