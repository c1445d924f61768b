"""examples/demo_model, the codec: its start, its codebooks, its losses, its data, and runs that stop and go on."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from examples.demo_model import codec_trainer, train_codec
from examples.demo_model.codec_books import ResidualBooks
from examples.demo_model.codec_data import Crops, held_out_excerpts, held_out_songs, read_tracks
from examples.demo_model.codec_init import codec_config, lapped_start, mdct
from examples.demo_model.codec_judge import judge, wrong_in_bfloat16
from examples.demo_model.codec_losses import CodecLoss
from examples.demo_model.codec_trainer import Options, Trainer
from examples.demo_model.synth import FRAME, RATE, compose, render
from musicgen_fast.evaluation.distance import codec_figures, log_mel_distance, spectral_convergence

from . import codecs

TINY = Options(
    steps=12, filters=4, hidden=32, codes=16, batch=2, frames=16, real=0.0, init_clips=4, latents=256, warm=0.34,
    log_every=1, eval_clips=1,
)  # fmt: skip
TINY_FLAGS = (
    "--steps=6 --filters=4 --hidden=32 --codes=16 --batch=2 --frames=16 --real=0 --init-clips=4 --latents=256 "
    "--warm=0.3 --log-every=1 --eval-clips=1"
).split()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def started(codes: int = 16, dim: int = 8, books: int = 3) -> tuple[ResidualBooks, torch.Tensor]:
    latents = torch.randn(600, dim, generator=generator())
    found = ResidualBooks(books, codes, dim)
    found.start(latents, 100, generator(1))
    return found, latents.view(6, 100, dim).transpose(1, 2)


@pytest.mark.parametrize("stride", [2, 4, 5, 8])
def test_the_lapped_transform_undoes_itself(stride: int) -> None:
    weight = mdct(stride)[:, None]
    x = torch.randn(1, 1, 20 * stride, dtype=torch.float64, generator=generator())
    back = F.conv_transpose1d(F.conv1d(x, weight, stride=stride), weight, stride=stride)
    inner = slice(stride, -stride)  # a block at either end lacks its partner
    torch.testing.assert_close(back[..., inner], x[..., inner])


def test_the_start_is_nearly_lossless() -> None:
    from transformers import EncodecModel

    torch.manual_seed(0)
    model = EncodecModel(codec_config())
    lapped_start(model, Crops(100).batch(0, 24))
    wav = held_out_songs(6, 100)
    with torch.no_grad():
        found = model.decoder(model.encoder(wav[:, None]))[:, 0]
    assert codec_figures(list(wav), list(found), RATE).si_snr > 15  # measured: 20; transformers' own start: below -40
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_every_weight_of_the_start_can_learn() -> None:
    trainer = Trainer(replace(TINY, fp32=True))
    wav = trainer.crops.batch(0, 2)
    trainer.model.decoder(trainer.model.encoder(wav)).square().sum().backward()
    stuck = [name for name, p in trainer.model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert stuck == []


@pytest.mark.parametrize(("books", "codes"), [(4, 512), (4, 1024), (2, 16), (4, 256), (8, 2048)])
def test_the_configuration_has_its_codebooks_in_both_libraries(books: int, codes: int) -> None:
    from musicgen_fast.checkpoints.codec_config import codec_config_from_transformers

    config = codec_config(books=books, codes=codes)
    ours = codec_config_from_transformers(config.to_dict())
    assert (config.num_quantizers, ours.num_codebooks, ours.codebook_size) == (books, books, codes)
    assert (ours.sample_rate, ours.hop_length, ours.lstm_layers) == (RATE, FRAME, 1)


def test_codes_that_are_no_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two, got 500"):
        codec_config(codes=500)


def test_the_books_quantise_as_transformers_does() -> None:
    from transformers import EncodecModel

    model = EncodecModel(codec_config(4, 8, 3, 16))
    books, latents = started()
    books.write(model)
    codes, total = books.encode(latents)
    assert torch.equal(model.quantizer.encode(latents).transpose(0, 1), codes)
    torch.testing.assert_close(model.quantizer.decode(codes.transpose(0, 1)), total)
    torch.testing.assert_close(books.decode(codes), total)


def test_each_book_explains_more() -> None:
    books, latents = started()
    errors = []
    for used in range(4):
        _, total = books.encode(latents, torch.full((6,), used))
        errors.append(float((latents - total).square().mean()))
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.1 * errors[2] > 1.2 * 1.1 * 1.1 * errors[3] > 0


def test_an_item_may_use_fewer_books() -> None:
    books, latents = started()
    codes, total = books.encode(latents, torch.tensor([1, 3, 2, 3, 3, 3]))
    torch.testing.assert_close(total[0], books.decode(codes[:1, :1])[0])
    torch.testing.assert_close(total[1], books.decode(codes[1:2])[0])
    torch.testing.assert_close(total[2], books.decode(codes[2:3, :2])[0])


def test_the_gradient_passes_the_quantiser_straight() -> None:
    books, latents = started()
    latents = latents.clone().requires_grad_()
    quantised, _, commitment = books(latents)
    weights = torch.randn(quantised.shape, generator=generator(3))
    (passed,) = torch.autograd.grad((quantised * weights).sum(), latents, retain_graph=True)
    assert torch.equal(passed, weights)
    (pull,) = torch.autograd.grad(commitment, latents)
    torch.testing.assert_close(pull, 2 * (latents - quantised).detach() / latents.numel() / books.spread)


def test_the_commitment_is_in_units_of_the_first_latents() -> None:
    books, latents = started()
    spread = float(books.spread)
    assert spread == pytest.approx(float(latents.transpose(1, 2).reshape(-1, 8).var(0).mean()))
    for _ in range(3):
        books.learn(10 * latents, books.encode(10 * latents)[0])
    assert float(books.spread) == spread  # does not follow latents that grow


def test_entries_move_to_the_mean_of_what_chose_them() -> None:
    books, latents = started(books=2)
    codes = torch.randint(0, 16, (6, 2, 100), generator=generator(5))
    for _ in range(600):  # 0.98 ** 600 is 5e-6
        books.learn(latents, codes)
    flat, hits = latents.transpose(1, 2).reshape(-1, 8), codes[:, 0].reshape(-1)
    means = torch.stack([flat[hits == i].mean(0) for i in range(16)])
    torch.testing.assert_close(books.entries[0], means, atol=1e-3, rtol=1e-3)
    left, second = flat - means[hits], codes[:, 1].reshape(-1)
    rest = torch.stack([left[second == i].mean(0) for i in range(16)])
    torch.testing.assert_close(books.entries[1], rest, atol=1e-3, rtol=1e-3)


def test_codes_hardly_used_come_back() -> None:
    books, latents = started()
    assert books.revive(generator(2)) == 0
    books.entries[1, 3:5] = 1e6  # nothing will choose them
    books.uses[1, 3:5] = 0
    books.sums[1, 3:5] = 0
    assert books.revive(generator(2)) == 2
    assert books.entries[1].abs().max() < 10
    codes, _ = books.encode(latents)
    assert torch.isin(torch.tensor([3, 4]), codes[:, 1]).all()
    books.learn(latents, codes)
    assert books.entries[1].abs().max() < 10


def test_too_few_latents_for_the_codes() -> None:
    with pytest.raises(ValueError, match="9 latents are too few for 16 codes"):
        ResidualBooks(1, 16, 4).start(torch.randn(9, 4), 9, generator())


def test_the_losses_are_those_that_judge() -> None:
    wav = held_out_songs(3, 50)
    found = wav + 0.02 * torch.randn(wav.shape, generator=generator())
    parts = CodecLoss(RATE)(wav, found)
    pairs = list(zip(wav, found, strict=True))
    mel, convergence = (
        sum(measure(a, b, RATE) for a, b in pairs) / len(pairs) for measure in (log_mel_distance, spectral_convergence)
    )
    assert float(parts["mel"]) == pytest.approx(mel, rel=1e-3)
    assert float(parts["convergence"]) == pytest.approx(convergence, rel=1e-3)


def test_silence_and_equal_sounds_are_no_accident() -> None:
    loss, wav = CodecLoss(RATE), held_out_songs(1, 32)
    for reference in (wav, 1e-4 * wav, 0 * wav):
        for estimate in (reference, 0 * wav, 0.1 * wav.flip(1)):
            estimate = estimate.clone().requires_grad_()
            parts = loss(reference, estimate)
            sum(parts.values()).backward()
            assert estimate.grad.isfinite().all()
            assert all(0 <= float(part.detach()) < 20 for part in parts.values()), parts  # 755 without a floor
            if torch.equal(reference, estimate):
                assert all(float(part.detach()) < 1e-3 for part in parts.values()), parts


def test_crops_depend_on_seed_and_step_alone() -> None:
    first, again = Crops(8, seed=3), Crops(8, seed=3)
    assert first.batch(0, 2).shape == (2, 1, 8 * FRAME)
    assert torch.equal(first.batch(7, 4), again.batch(7, 4))
    assert not torch.equal(first.batch(7, 4), first.batch(8, 4))
    assert not torch.equal(first.batch(7, 4), Crops(8, seed=4).batch(7, 4))


def test_crops_begin_on_frames() -> None:
    track = torch.arange(50 * FRAME, dtype=torch.float32)
    starts = Crops(8, [track, track[:100]], share=1.0).batch(0, 60)[:, 0, 0]
    assert (starts % FRAME == 0).all()
    assert len(starts.unique()) > 20 and starts.max() <= 42 * FRAME
    songs = Crops(1, seed=1).batch(0, 64)[:, 0]
    loud = songs[songs.abs().amax(1) > 0.05]
    # Notes are zero at every border; only drums, in the middle of a hit, are not.
    assert (loud[:, 0].abs() < 1e-3).float().mean() > 0.7
    assert (loud[:, 7].abs() < 1e-3).float().mean() < 0.3


def test_held_out_songs_are_those_of_negative_seeds() -> None:
    wav = held_out_songs(2, 10)
    assert torch.equal(wav[1], torch.from_numpy(render(compose(-2), 10)))


def test_held_out_excerpts_are_spread_over_the_tracks() -> None:
    tracks = [torch.full((100 * FRAME,), float(i)) + torch.arange(100 * FRAME) / 1e6 for i in range(2)]
    rows = held_out_excerpts(tracks, 5, 10)
    assert rows.shape == (5, 10 * FRAME)
    assert rows[:, 0].int().tolist() == [0, 1, 0, 1, 0]
    assert rows[0, 0] < rows[2, 0] < rows[4, 0]


def test_no_music_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert read_tracks() == ([], [])


def losses(trainer: Trainer, steps: int) -> list[float]:
    return [float(trainer.advance()["loss"]) for _ in range(steps)]


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("stop", [2, 7])  # before and after the codebooks begin
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, fp32: bool, stop: int) -> None:
    options = replace(TINY, fp32=fp32)
    whole = losses(Trainer(options), 12)
    trainer = Trainer(options)
    first = losses(trainer, stop)
    trainer.save(tmp_path / "state.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    resumed = Trainer(options, fresh=False)
    resumed.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert first + losses(resumed, 12 - stop) == pytest.approx(whole, rel=1e-6)
    assert resumed.books.ready and resumed.progress == 1


def test_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    Trainer(TINY).save(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="has codes 16, not 32: resume it with --codes 16"):
        Trainer(replace(TINY, codes=32), fresh=False).restore(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.slow
def test_training_helps() -> None:
    options = replace(TINY, steps=120, filters=8, hidden=64, codes=64, batch=4, latents=1024, warm=0.05, fp32=True)
    trainer = Trainer(options)
    held = held_out_songs(4, 50)
    while not trainer.books.ready:
        trainer.advance()
    before = judge(trainer.model, trainer.books, held)
    losses(trainer, 120 - trainer.step)
    after = judge(trainer.model, trainer.books, held, generator())
    assert after["codec"]["log_mel"] < 0.95 * before["codec"]["log_mel"]
    assert after["codec"]["spectral_convergence"] < 0.5 * after["random codes"]["spectral_convergence"]
    assert min(after["perplexity"]) > 4
    assert set(after) == {"unquantised", "codec", "random codes", "mu-law 2 bits", "mu-law 4 bits", "perplexity"}


def test_a_wrong_bfloat16_is_found() -> None:
    trainer = Trainer(replace(TINY, fp32=True))
    wav = trainer.crops.batch(0, 2)
    layer = trainer.model.encoder.layers[6]
    layer.register_forward_hook(lambda _, x, y: 1.5 * y if torch.is_autocast_enabled("cpu") else y)
    wrong = wrong_in_bfloat16(trainer.model, wav)
    assert "output" in wrong and "encoder.layers.0.conv.parametrizations.weight.original1" in wrong
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_where_bfloat16_is_wrong_float32_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_trainer, "wrong_in_bfloat16", lambda *_: ["output"])
    with pytest.warns(UserWarning, match="output differs.*float32"):
        trainer = Trainer(TINY)
    first = losses(trainer, 1)
    assert first == losses(Trainer(replace(TINY, fp32=True)), 1)
    monkeypatch.setattr(codec_trainer, "wrong_in_bfloat16", lambda *_: [])
    assert losses(Trainer(TINY), 1) != first


def test_the_command_stops_at_ctrl_c_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(signal, "default_int_handler", pytest.fail)
    advance = Trainer.advance

    def interrupted(self: Trainer):
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return advance(self)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupted)
        assert train_codec.main([str(tmp_path), *TINY_FLAGS]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted at step 4" in capsys.readouterr().out
    assert not (tmp_path / "codec").exists()
    with pytest.raises(SystemExit):
        train_codec.main([str(tmp_path), *TINY_FLAGS])
    assert "pass --resume" in capsys.readouterr().err
    assert train_codec.main([str(tmp_path), "--resume"]) == 0
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in entries if entry.get("held_out") == "synth"] == [0, 6]
    assert "mu-law 2 bits" in entries[-1] and math.isfinite(entries[-1]["codec"]["si_snr"])
    check_both_libraries(tmp_path)


def check_both_libraries(folder: Path) -> None:
    from transformers import EncodecModel

    wav = held_out_songs(2, 40)[:, None]
    for name in ("codec", "codec-fp16"):
        theirs = EncodecModel.from_pretrained(folder / name, dtype=torch.float32).eval()
        ours = codecs.ours(theirs)
        encoded = theirs.encode(wav)
        codes, _ = ours.encode(wav)
        assert codes.shape == (2, 4, 40) and len(codes.unique()) > 4
        # Untrained entries lie close together: a tie may fall either way.
        assert (codes == encoded.audio_codes[0]).float().mean() > 0.99
        codecs.assert_near(ours.decode(codes), theirs.decode(codes[None], [None]).audio_values)
    size = sum(path.stat().st_size for path in (folder / "codec").iterdir())
    assert sum(path.stat().st_size for path in (folder / "codec-fp16").iterdir()) < 0.7 * size


@pytest.mark.parametrize(
    ("flags", "message"), [([], "pass --minutes or --steps"), (["--resume", "--steps=3"], "nothing to resume")]
)
def test_wrong_command_lines(tmp_path: Path, capsys, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        train_codec.main([str(tmp_path), *flags])
    assert message in capsys.readouterr().err
