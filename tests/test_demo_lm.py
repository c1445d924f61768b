"""examples/demo_model: the language model's loss, its training and resuming, and the shipped folder, at tiny sizes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.demo_model import ship, train_lm
from examples.demo_model.lm import DemoLM, Sizes
from examples.demo_model.lm_data import Batches, Mixed
from examples.demo_model.tokens import TokenSet, read_tokens
from examples.demo_model.train_lm import Options, Trainer
from musicgen_fast import MusicGen
from musicgen_fast.conditioning.text import TextTokenizer
from musicgen_fast.evaluation.likelihood import negative_log_likelihood

from .demo_lm_parts import CLIPS, FRAMES, SIZES, make_tokenizer, write_codec, write_token_sets


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


@pytest.fixture(scope="module")
def shipped(codec, vocabulary, tmp_path_factory) -> tuple[DemoLM, Path]:
    """A model with random weights, and the folder that `ship` makes of it."""
    folder = tmp_path_factory.mktemp("shipped")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        trainer = Trainer(Options(), SIZES)
        for name, weight in trainer.model.transformer.named_parameters():
            if name == "heads.weight" or "cross" in name:  # captions and context decide, so that mistakes show
                weight.data.normal_(std=0.5 if "heads" in name else 0.25)
        for weight in trainer.model.parameters():
            weight.data.copy_(weight.half())  # what shipping rounds to
    trainer.export(folder / "lm.pt")
    shutil.copy(vocabulary / "spiece.model", folder)
    ship.write(ship.assemble(codec, folder), (folder / "spiece.model").read_bytes(), folder / "out")
    return trainer.model, folder


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_likelihood_of_the_shipped_model(shipped, data, tokenizer) -> None:
    """Captions of unequal lengths in one batch, and dropped ones, against musicgen_fast one text at a time."""
    model, folder = shipped
    batches = Batches(data, tokenizer, frames=FRAMES)
    lm = MusicGen.get_pretrained(folder / "out", device="cpu").lm
    figures = []
    for captions in (True, False):
        batch = batches.first(6, captions)
        with torch.no_grad():
            nats, _ = model(*batch)
        assert nats.shape == (6, 4, FRAMES)
        wanted = negative_log_likelihood(lm, batch[0], data.captions[:6] if captions else None)
        torch.testing.assert_close(nats.double().sum(2), wanted.totals, rtol=1e-5, atol=1e-3)
        figures.append(wanted.mean)
    assert abs(figures[0] - figures[1]) > 0.01, "captions that change nothing would show nothing"


def test_bfloat16_training_computes_nearly_the_same(shipped, data, tokenizer) -> None:
    batch = Batches(data, tokenizer, frames=FRAMES).first(4, True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half, _ = shipped[0](*batch)
    torch.testing.assert_close(half.mean((0, 2)), shipped[0](*batch)[0].mean((0, 2)), rtol=0.02, atol=0)


def test_every_weight_learns(data, tokenizer) -> None:
    trainer = Trainer(Options(fp32=True), SIZES)
    trainer.advance(Batches(data, tokenizer, size=4, frames=20).batch(0))
    idle = [name for name, weight in trainer.model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert idle == []


def test_twenty_steps_lower_the_loss_and_the_average_follows(data, tokenizer) -> None:
    options = Options(steps=20, warmup=2, lr=3e-3, ema=0.8)
    trainer, batches = Trainer(options, SIZES), Batches(data, tokenizer, size=8, frames=40)
    held = batches.first(CLIPS, True)
    before = trainer.judge(held)
    losses = [float(trainer.advance(batches.batch(step))["loss"]) for step in range(20)]
    assert losses[-1] < losses[0] - 0.3
    averaged = trainer.judge(held)
    assert (averaged < before - 0.2).all()
    trainer.average = None
    assert not torch.equal(trainer.judge(held), averaged)


def test_widths_that_cannot_be_shipped_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 64"):
        Sizes(dim=96)
    with pytest.raises(ValueError, match="no projection between equal widths"):
        Sizes(dim=128, text_dim=128)


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_does_harm(data, tokenizer) -> None:
    trainer, batch = Trainer(Options(), SIZES), Batches(data, tokenizer, size=2, frames=20).batch(0)
    before = trainer.model.transformer.heads.weight.clone()
    with pytest.raises(RuntimeError, match="lower --lr"):
        trainer.advance((*batch[:3], torch.full((2,), torch.inf)))
    assert torch.equal(trainer.model.transformer.heads.weight, before)


def test_weights_of_codebooks_and_of_the_guide(data, tokenizer) -> None:
    batch = Batches(data, tokenizer, size=8, frames=20, drop=0.0).batch(0)
    found = Trainer(Options(weights="2,1,1,0", guide=0.5), SIZES).advance(batch)
    books = found["books"] @ torch.tensor([0.5, 0.25, 0.25, 0.0])
    assert found["astray"] > 1, "nats of attention, before any training"
    torch.testing.assert_close(found["loss"], books + 0.5 * found["astray"])
    with pytest.raises(ValueError, match="4 codebooks"):
        Trainer(Options(weights="1,1"), SIZES)


# -- runs -------------------------------------------------------------------------------------------------------------


def run(made: Path, out: Path, *extra: str) -> int:
    given = {"dim": 64, "layers": 1, "ffn": 64, "text-dim": 128, "text-layers": 1, "text-ffn": 64}
    given |= {"batch": 4, "frames": 40, "warmup": 2, "log-every": 1, "threads": 1}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return train_lm.main([str(made / "train"), str(made / "held"), str(out), *extra, *options])


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(made, tmp_path, monkeypatch, capsys) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--steps", "6", "--ema", "0.9", "--beginnings", str(made / "train"), "--start", "12"]
    assert run(made, whole, *options) == 0
    drawn = Mixed.batch

    def interrupting(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C: the step under way still ends
        return drawn(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Mixed, "batch", interrupting)
        assert run(made, parts, *options) == 130
    assert "interrupted at step 4" in capsys.readouterr().out
    assert not (parts / "lm.pt").exists()
    assert run(made, parts, "--resume") == 0
    a, b = (torch.load(folder / "lm.pt", weights_only=True) for folder in (whole, parts))
    assert a["sizes"] == b["sizes"]
    for part in ("transformer", "text"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (whole, parts)]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6, 6]
    assert logs[0][-1]["held_out"] == logs[1][-1]["held_out"]
    assert set(logs[0][-1]["held_out"]) == {"unigram", "captions", "none", "saved", "start"}
    assert logs[0][-1]["frames"] == 3 * 4 * 40 + 3 * 10 * 12, "a beginning counts for 16 frames"
    assert len(logs[0][-1]["held_out"]["captions"]) == 4


def test_what_cannot_be_resumed_is_said(made, tmp_path, capsys) -> None:
    for extra, message in ((["--resume"], "nothing to resume"), ([], "pass --minutes or --steps")):
        with pytest.raises(SystemExit):
            run(made, tmp_path / "none", *extra)
        assert message in capsys.readouterr().err


# -- shipping ---------------------------------------------------------------------------------------------------------


def test_both_libraries_make_the_same_tokens_of_the_shipped_folder(codec, shipped, tmp_path, capsys) -> None:
    _, folder = shipped
    assert ship.main([str(codec), str(folder), str(tmp_path / "out"), "--frames", "24"]) == 0
    assert capsys.readouterr().out.count("100.00 % of the two libraries' tokens are equal") == 2
    for seed in (None, 1):
        found = ship.compare(tmp_path / "out", 24, seed=seed)
        assert found.tokens == 1.0 and found.sound < 1e-4 and found.distinct > 15
    with pytest.raises(SystemExit):
        ship.main([str(codec), str(folder), str(tmp_path / "out")])
    assert "is not empty" in capsys.readouterr().err


def test_what_is_in_the_shipped_folder(shipped) -> None:
    from safetensors.torch import load_file
    from transformers import AutoProcessor, MusicgenForConditionalGeneration

    out = shipped[1] / "out"
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    loading: Any = MusicgenForConditionalGeneration.from_pretrained(out, output_loading_info=True)[1]
    assert not loading["missing_keys"] and not loading["unexpected_keys"], "transformers would print a report of it"
    assert str(shipped[1].parent) not in (out / "config.json").read_text(), "a folder of this machine"
    model = MusicGen.get_pretrained(out, device="cpu")
    assert (model.max_duration, model.sample_rate, model.frame_rate) == (10.0, 16000, 50.0)
    processor = AutoProcessor.from_pretrained(out)
    assert processor.feature_extractor.sampling_rate == 16000


def test_a_folder_that_is_too_large_fails(codec, shipped, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ship, "LIMIT", 100_000)
    assert ship.main([str(codec), str(shipped[1]), str(tmp_path / "out"), "--frames", "8"]) == 1


def test_a_codec_that_does_not_fit_is_refused(shipped, tmp_path) -> None:
    with pytest.raises(ValueError, match="4 x 128 codes, the language model 4 x 64"):
        ship.assemble(write_codec(tmp_path, codes=128), shipped[1])
