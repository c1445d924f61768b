"""examples/demo_model: token sets against transformers' codec, the tokenizer in both libraries, batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.demo_model import lm_data, tokens
from examples.demo_model.captions import caption, demands
from examples.demo_model.lm_data import Batches, Mixed
from examples.demo_model.synth import SCALES, STEP, compose, render
from examples.demo_model.text import SENTINELS, train_vocabulary, training_captions
from examples.demo_model.tokens import TokenSet, encode_songs, load_codec, make_tokens, read_tokens
from musicgen_fast.conditioning.text import TextTokenizer

from .demo_lm_parts import CLIPS, FRAMES, make_tokenizer, write_codec, write_token_sets

TEXTS = ["Slow, with DRUMS", "a Jazz zebra's quiz!! 99 ÄÖ", "", " two  spaces ", "at 187.5 bpm", "<extra_id_0>"]


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    return write_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def made(codec, tmp_path_factory) -> Path:
    return write_token_sets(codec, tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def data(made) -> TokenSet:
    return read_tokens(made / "train")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """A folder with the tokenizer's files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(vocabulary) -> TextTokenizer:
    return TextTokenizer.load(vocabulary)


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_a_row_is_its_song_through_transformers_codec(codec, data) -> None:
    from transformers import EncodecModel

    theirs: Any = EncodecModel.from_pretrained(codec)
    wav = torch.from_numpy(np.stack([render(compose(seed), FRAMES + 8) for seed in range(CLIPS)]))[:, None]
    with torch.no_grad():
        codes = theirs.quantizer.encode(theirs.encoder(wav), None).transpose(0, 1)[..., :FRAMES]
    assert len(codes.unique()) > 20
    np.testing.assert_array_equal(data.tokens, codes.numpy())
    assert data.tokens.dtype == np.int16 and isinstance(data.tokens, np.memmap)


def test_rows_bring_the_labels_and_a_caption_of_their_song(data, made) -> None:
    assert data.songs == tuple(compose(seed) for seed in range(CLIPS))
    assert data.captions == tuple(caption(compose(seed), seed) for seed in range(CLIPS))
    held = read_tokens(made / "held")
    assert held.captions[0] == caption(compose(-1), -1)
    assert not np.array_equal(held.tokens[:3], data.tokens[:3])


def test_an_interrupted_token_set_goes_on_and_ends_the_same(codec, data, tmp_path, monkeypatch) -> None:
    calls = []

    def failing(*args):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_songs(*args)

    monkeypatch.setattr(tokens, "encode_songs", failing)
    with pytest.raises(KeyboardInterrupt):
        make_tokens(codec, tmp_path, CLIPS, FRAMES, batch=4)
    with pytest.raises(ValueError, match="2 of 10 clips are missing"):
        read_tokens(tmp_path)
    again = make_tokens(codec, tmp_path, CLIPS, FRAMES, batch=4)
    assert calls[3:] == [[8, 9]], "what was there is not made again"
    np.testing.assert_array_equal(again.tokens, data.tokens)
    assert again.captions == data.captions


def test_a_folder_with_another_token_set_is_refused(codec, made) -> None:
    with pytest.raises(ValueError, match="frames 48 instead of 47"):
        make_tokens(codec, made / "train", CLIPS, 47, batch=4)
    with pytest.raises(ValueError, match="held False instead of True"):
        make_tokens(codec, made / "train", CLIPS, FRAMES, batch=4, held=True)


def test_a_codec_of_other_frames_is_refused(codec, tmp_path) -> None:
    config = json.loads((codec / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "upsampling_ratios": [8, 5, 4, 4]}))
    with pytest.raises(ValueError, match="frames of 320 samples"):
        load_codec(tmp_path)


# -- text -------------------------------------------------------------------------------------------------------------


def test_transformers_and_musicgen_fast_read_the_same_ids(vocabulary, tokenizer) -> None:
    from transformers import AutoTokenizer, T5Tokenizer

    captions = training_captions(300)
    for theirs in (T5Tokenizer.from_pretrained(vocabulary), AutoTokenizer.from_pretrained(vocabulary)):
        for text in [*captions, *(text.title() for text in captions[:50]), *TEXTS]:
            assert theirs(text).input_ids == tokenizer.ids(text), text


def test_capitals_do_not_matter_and_every_caption_is_covered(tokenizer) -> None:
    for text in training_captions(300):
        ids = tokenizer.ids(text)
        assert tokenizer.ids(text.upper()) == ids and ids[-1] == 1 and 2 not in ids
    assert 2 not in tokenizer.ids("jazz quiz, won't fix") and 2 in tokenizer.ids("§")
    assert tokenizer.vocab_size - SENTINELS <= 200


def test_the_vocabulary_is_deterministic(vocabulary) -> None:
    assert train_vocabulary(training_captions()) == (vocabulary / "spiece.model").read_bytes()


# -- batches ----------------------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_row_once(data, tokenizer) -> None:
    batches = Batches(data, tokenizer, size=5, frames=FRAMES)
    rows = [row.numpy().tobytes() for step in range(4) for row in batches.batch(step)[0]]
    wanted = sorted(np.asarray(row, dtype=np.int64).tobytes() for row in data.tokens)
    assert sorted(rows[:CLIPS]) == sorted(rows[CLIPS:]) == wanted
    assert rows[:CLIPS] != rows[CLIPS:]


def test_batches_follow_from_seed_and_step(data, tokenizer) -> None:
    def drawn(seed, step):
        return Batches(data, tokenizer, size=4, frames=40, seed=seed).batch(step)

    assert all(torch.equal(a, b) for a, b in zip(drawn(0, 3), drawn(0, 3), strict=True))
    assert not torch.equal(drawn(0, 3)[0], drawn(1, 3)[0])
    with pytest.raises(ValueError, match="shorter than crops of 49"):
        Batches(data, tokenizer, frames=49)


def test_crops_begin_where_the_song_does_or_on_any_frame(data, tokenizer) -> None:
    def starts(aligned):
        batches = Batches(data, tokenizer, size=5, frames=40, aligned=aligned)
        found = set()
        for step in range(12):
            for place, crop in enumerate(batches.batch(step)[0].numpy()):
                row = data.tokens[batches._row(step * 5 + place)]
                found.add(next(i for i in range(9) if np.array_equal(row[:, i : i + 40], crop)))
        return found

    assert starts(1.0) == {0}
    assert len(starts(0.0)) >= 6


def test_captions_are_drawn_anew_and_true_and_some_are_dropped(data, tokenizer, monkeypatch) -> None:
    texts: list[tuple[Any, str]] = []

    def noted(song, seed, start):
        texts.append((song.labels, caption(song, seed, start)))
        return texts[-1][1]

    monkeypatch.setattr(lm_data, "caption", noted)
    batches = Batches(data, tokenizer, size=CLIPS, frames=FRAMES, drop=0.5)
    keep = torch.cat([batches.batch(step)[3] for step in range(10)])
    assert 25 < keep.sum() < 75 and set(keep.tolist()) == {0.0, 1.0}
    assert len({text for _, text in texts}) > 90
    for labels, text in texts:
        assert all(getattr(labels, name) in allowed for name, allowed in demands(text).items())


def test_each_frame_knows_where_its_step_is_spelled(data, tokenizer) -> None:
    names = {tokenizer.ids(name)[0]: i for scale in SCALES.values() for i, (name, _) in enumerate(scale)}
    batches = Batches(data, tokenizer, size=CLIPS, frames=40, aligned=0.0)
    spelling = 0
    for step in range(6):
        crops, ids, _, _, spelled = batches.batch(step)
        assert spelled.shape == (CLIPS, 40)
        for place in range(CLIPS):
            row = batches._row(step * CLIPS + place)
            starts = [i for i in range(9) if np.array_equal(data.tokens[row, :, i : i + 40], crops[place].numpy())]
            told = [(frame, int(at)) for frame, at in enumerate(spelled[place]) if at >= 0]
            melody = data.songs[row].melody
            said = [names.get(int(ids[place, at])) for _, at in told]
            assert any(said == [melody[(start + frame) // STEP] for frame, _ in told] for start in starts)
            spelling += len(told) > 0
    assert spelling > 3 * CLIPS
    first = batches.first(3, True)[4]
    assert first.shape == (3, 40) and batches.first(3, True, 12)[4].shape == (3, 12)


def test_a_set_whose_songs_are_composed_otherwise_now_is_refused(made, tmp_path) -> None:
    folder = shutil.copytree(made / "held", tmp_path / "held")
    rows = [json.loads(line) for line in (folder / "songs.jsonl").read_text().splitlines()]
    rows[1]["tempo"] = "slow" if rows[1]["tempo"] != "slow" else "fast"
    (folder / "songs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="song -2 is composed otherwise now"):
        read_tokens(folder)


def test_beginnings_take_their_share_of_the_steps_in_order(data, tokenizer) -> None:
    long = Batches(data, tokenizer, size=2, frames=30, seed=1)
    short = [Batches(data, tokenizer, size=n, frames=t, seed=1, aligned=1.0) for n, t in ((4, 12), (3, 16))]
    mixed = Mixed(long, short, 0.4)
    drawn = [mixed.batch(step)[0] for step in range(10)]
    shapes = [tuple(crop.shape) for crop in drawn]
    assert [shapes.count(shape) for shape in ((2, 4, 30), (4, 4, 12), (3, 4, 16))] == [6, 2, 2]
    for part in (long, *short):
        rows = [crop for crop in drawn if crop.shape[2] == part.frames]
        for index, crop in enumerate(rows):
            assert torch.equal(crop, part.batch(index)[0]), "none is left out, none comes twice"
    starts = {tuple(clip[:, :12].ravel().tolist()) for clip in data.tokens}
    assert all(tuple(crop.flatten().tolist()) in starts for crop in short[0].batch(0)[0])
    with pytest.raises(ValueError, match="from 0 to 1"):
        Mixed(long, short, 1.5)
