"""`musicgen-fast convert`: every tensor bit for bit, and files that their own packages load with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from musicgen_fast import MusicGen
from musicgen_fast.checkpoints import CheckpointError, load_checkpoint
from musicgen_fast.checkpoints.convert import convert
from musicgen_fast.checkpoints.entries import Entry, write_safetensors, write_torch
from musicgen_fast.cli import main
from musicgen_fast.config import CodecConfig, TextConfig

from . import checkpoint_writers as writers
from .checkpoint_writers import KINDS, assert_same, tiny, write_audiocraft, write_transformers
from .oracle import audiocraft_lm as ac
from .oracle import transformers_lm as hf
from .test_parity_transformers import UNEQUAL, Pair


def states(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an audiocraft folder, by file and name; torch's own reader."""
    out = {f"t5/{name}": tensor for name, tensor in load_file(folder / "text_encoder/model.safetensors").items()}
    for file in ("state_dict.bin", "compression_state_dict.bin"):
        best = torch.load(folder / file, weights_only=True)["best_state"]
        out.update({f"{file}/{name}": tensor for name, tensor in best.items()})
    return out


def made_up(names: set[str]) -> set[str]:
    """Those of `names` that are no bookkeeping of a codec's codebooks, which audiocraft wants and inference not."""
    return {name for name in names if not name.endswith((".inited", ".cluster_size", ".embed_avg"))}


# -- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_audiocraft_and_back(tmp_path: Path, kind: str, half: bool) -> None:
    """audiocraft -> transformers -> transformers -> audiocraft: every tensor bit for bit, the loaded model too."""
    first = write_audiocraft(tmp_path / "a", tiny(kind, seed=5), half=half)
    for source, target, layout in (("a", "b", "transformers"), ("b", "c", "transformers"), ("c", "d", "audiocraft")):
        result, notes = convert(tmp_path / source, tmp_path / target, layout)
        assert result.layout == layout and not [note for note in notes if "keep" in note]
    before, after = states(first), states(tmp_path / "d")
    assert_same(before, {name: after[name] for name in before})
    assert not made_up(after.keys() - before.keys())
    assert_same(load_file(tmp_path / "b/model.safetensors"), load_file(tmp_path / "c/model.safetensors"))
    loaded, again = load_checkpoint(first, dtype=None), load_checkpoint(tmp_path / "d", dtype=None)
    assert loaded.config == again.config and loaded.codec_config == again.codec_config
    assert_same(loaded.lm, again.lm)
    assert_same(loaded.codec, again.codec)


@pytest.mark.parametrize("options", [{"mha": True}, {"nested": True}, {"legacy": True}, {"codec": "pointer"}])
def test_variants_of_audiocraft(tmp_path: Path, options: dict[str, Any]) -> None:
    checkpoint = tiny("stereo", seed=2)
    convert(write_audiocraft(tmp_path / "a", checkpoint, **options), tmp_path / "t", "transformers")
    convert(tmp_path / "t", tmp_path / "b", "audiocraft")
    assert_same(load_checkpoint(tmp_path / "b").lm, checkpoint.lm)
    want = states(write_audiocraft(tmp_path / "plain", checkpoint))
    assert_same(want, {name: tensor for name, tensor in states(tmp_path / "b").items() if name in want})


@pytest.mark.parametrize("options", [{"form": "bin"}, {"shards": 3}, {"old_norms": True}])
def test_variants_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    checkpoint = tiny("melody", seed=2)
    convert(write_transformers(tmp_path / "t", checkpoint, **options), tmp_path / "a", "audiocraft")
    want = states(write_audiocraft(tmp_path / "plain", checkpoint))
    assert_same(want, {name: tensor for name, tensor in states(tmp_path / "a").items() if name in want})


def test_style(tmp_path: Path) -> None:
    """Within audiocraft's layout only; its configuration and the bookkeeping of its codebooks stay."""
    first = write_audiocraft(tmp_path / "a", tiny("style", seed=5), half=True)
    convert(first, tmp_path / "b", "audiocraft")
    before, after = states(first), states(tmp_path / "b")
    assert_same(before, {name: after[name] for name in before})
    cfgs = [torch.load(folder / "state_dict.bin", weights_only=True)["xp.cfg"] for folder in (first, tmp_path / "b")]
    assert cfgs[0] == cfgs[1]
    with pytest.raises(CheckpointError, match="no class for style and AudioGen models; --to audiocraft keeps it"):
        convert(first, tmp_path / "t", "transformers")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("layout", ["transformers", "audiocraft"])
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_precision(tmp_path: Path, layout: str, precision: torch.dtype) -> None:
    """The result is what `load_checkpoint` makes of the source at that precision."""
    source = write_transformers(tmp_path / "t", tiny("text"))
    convert(source, tmp_path / "out", layout, precision=precision)
    wanted, found = load_checkpoint(source, dtype=precision), load_checkpoint(tmp_path / "out", dtype=None)
    assert_same(wanted.lm, found.lm)
    assert_same(wanted.codec, found.codec)
    back = tmp_path / "back"
    convert(tmp_path / "out", back, "transformers", precision=torch.float32)
    assert {t.dtype for t in load_file(back / "model.safetensors").values()} == {torch.float32}


def test_float16_is_refused_where_it_overflows(tmp_path: Path) -> None:
    checkpoint = tiny("text")
    checkpoint.lm["layers.1.ffn_in.weight"][3, 4] = 70000.0
    source = write_transformers(tmp_path / "t", checkpoint)
    with pytest.raises(CheckpointError, match=r"layers.1.fc1.weight' holds numbers beyond float16's 65504"):
        convert(source, tmp_path / "out", "transformers", precision=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t"]
    convert(source, tmp_path / "out", "transformers", precision=torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layers.0.qkv.weight", "norm.bias"])
def test_numbers_that_are_none(tmp_path: Path, name: str, value: float) -> None:
    checkpoint = tiny("text")
    checkpoint.lm[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        convert(write_audiocraft(tmp_path / "a", checkpoint), tmp_path / "out", "transformers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_fine_tunes_in_one_file(tmp_path: Path) -> None:
    """`lm.state_dict()` alone, completed by its base, becomes a folder that brings everything."""
    base, tuned = tiny("stereo", seed=1), tiny("stereo", seed=2)
    write_transformers(tmp_path / "base", base)
    torch.save(writers.audiocraft_state(tuned), tmp_path / "lm_final.pt")
    out = tmp_path / "out"
    argv = ["convert", str(tmp_path / "lm_final.pt"), str(out), "--to", "transformers", "-q"]
    assert main(argv) == 1 and main([*argv, "--base", str(tmp_path / "base")]) == 0
    assert_same(load_checkpoint(out).lm, tuned.lm)
    before, after = load_checkpoint(tmp_path / "base"), load_checkpoint(out)
    assert before.text is not None and after.text is not None
    assert_same(before.text.tensors, after.text.tensors)
    for name, tensor in before.codec.items():
        assert torch.allclose(after.codec[name], tensor, rtol=1e-6, atol=1e-7)


def test_equal_widths(tmp_path: Path) -> None:
    """transformers has no text projection where the T5 is as wide as the model, audiocraft always has one."""
    theirs = hf.build("text", dim=32, heads=2, text_dim=32)
    source = hf.save(theirs, tmp_path / "t")
    convert(source, tmp_path / "a", "audiocraft")
    assert_same(load_file(source / "model.safetensors"), _from(convert(tmp_path / "a", tmp_path / "b", "transformers")))
    models = [MusicGen.get_pretrained(tmp_path / name) for name in "ta"]
    for model in models:
        model.set_generation_params(duration=0.2)
    assert torch.equal(*(model.generate(["drum"], return_tokens=True, seed=1)[1] for model in models))
    checkpoint = tiny("text", text=TextConfig(dim=32))
    write_audiocraft(tmp_path / "projected", checkpoint)
    with pytest.raises(CheckpointError, match="this model has one, so transformers cannot hold it"):
        convert(tmp_path / "projected", tmp_path / "no", "transformers")


def _from(result: Any) -> dict[str, Tensor]:
    return load_file(Path(result[0].name) / "model.safetensors")


def test_finetuned_t5(tmp_path: Path) -> None:
    """A T5 inside of audiocraft's file goes to both layouts; back it is inside no more, but in text_encoder/."""
    checkpoint = tiny("text")
    folder = write_audiocraft(tmp_path / "a", checkpoint, changes={"conditioners.description.t5.finetune": True})
    package = torch.load(folder / "state_dict.bin", weights_only=True)
    assert checkpoint.text is not None
    inside = {f"{writers.DESCRIPTION}t5.{name}": tensor + 1 for name, tensor in checkpoint.text.tensors.items()}
    package["best_state"].update(inside)
    torch.save(package, folder / "state_dict.bin")
    convert(folder, tmp_path / "t", "transformers")
    convert(folder, tmp_path / "b", "audiocraft")
    for name, tensor in checkpoint.text.tensors.items():
        assert torch.equal(load_file(tmp_path / "t/model.safetensors")[f"text_encoder.{name}"], tensor + 1)
        assert torch.equal(states(tmp_path / "b")[f"t5/{name}"], tensor + 1)
        assert torch.equal(states(tmp_path / "b")[f"state_dict.bin/{writers.DESCRIPTION}t5.{name}"], tensor + 1)


def test_folded_codec(tmp_path: Path) -> None:
    """A codec without weight norm gets one that computes the same within rounding."""
    checkpoint = tiny("text")
    folder = write_audiocraft(tmp_path / "a", checkpoint)
    package = torch.load(folder / "compression_state_dict.bin", weights_only=True)
    state = package["best_state"]
    for name in [n for n in state if n.endswith("weight_g")]:
        gain, direction = state.pop(name), state.pop(name[:-1] + "v")
        state[name[:-2]] = direction * gain / direction.flatten(1).norm(dim=1)[:, None, None]
    cfg = yaml.safe_load(package["xp.cfg"])
    cfg["seanet"]["norm"] = "none"
    torch.save({**package, "xp.cfg": yaml.safe_dump(cfg)}, folder / "compression_state_dict.bin")
    want = load_checkpoint(folder).codec
    for layout in ("transformers", "audiocraft"):
        convert(folder, tmp_path / layout, layout)
        found = load_checkpoint(tmp_path / layout).codec
        for name in want:
            assert torch.allclose(found[name], want[name], rtol=1e-6, atol=1e-7), name


def test_patterns_and_settings_survive(tmp_path: Path) -> None:
    """What only audiocraft's configuration says is there after a second conversion, or the layout is refused."""
    changes = {"codebooks_pattern.modeling": "parallel", "transformer_lm.two_step_cfg": True}
    folder = write_audiocraft(tmp_path / "a", tiny("text"), changes=changes)
    convert(folder, tmp_path / "b", "audiocraft")
    assert load_checkpoint(tmp_path / "b").config == load_checkpoint(folder).config
    with pytest.raises(CheckpointError, match=r"transformers knows the delays \[0, 1, 2, 3\] only"):
        convert(folder, tmp_path / "t", "transformers")
    folder = write_audiocraft(tmp_path / "c", tiny("text"), changes={"transformer_lm.two_step_cfg": True})
    _, notes = convert(folder, tmp_path / "t", "transformers")
    assert notes == ["the layout does not keep two_step_cfg: it was True and reads back as False"]


def test_random_models_and_side_files(tmp_path: Path) -> None:
    """From memory too: a model without files. Tokenizer, model card and licence are carried along."""
    _, notes = convert("demo", tmp_path / "a", "audiocraft")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        *("state_dict.bin", "compression_state_dict.bin", "text_encoder", "README.md")
    }
    assert (tmp_path / "a/text_encoder/spiece.model").is_file()
    assert notes == ["audiocraft itself fetches 't5-base' from the hub; text_encoder/ is for others"]
    convert(tmp_path / "a", tmp_path / "t", "transformers")
    demo, back = (MusicGen.get_pretrained(name) for name in ("demo", tmp_path / "t"))
    for model in (demo, back):
        model.set_generation_params(duration=0.4)
    assert torch.equal(demo.generate(["bells"], seed=1), back.generate(["bells"], seed=1))


# -- the writers of files ------------------------------------------------------------------------------------------


def test_files_of_every_dtype(tmp_path: Path) -> None:
    """Read by the libraries themselves: scalars, empty tensors, transposed ones, pieces, conversions."""
    given = {str(d): torch.arange(6).reshape(2, 3).to(d) for d in
             (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.bool)}  # fmt: skip
    given |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 3), "turned": torch.randn(5, 4).T}
    entries = [Entry.of(name, tensor) for name, tensor in given.items()]
    entries.append(Entry.of("joined", given["turned"][:1], given["turned"][1:], dtype=torch.float16))
    want = {**given, "joined": given["turned"].half()}
    write_safetensors(tmp_path / "x.safetensors", entries)
    assert_same(load_file(tmp_path / "x.safetensors"), want)
    write_torch(tmp_path / "x.bin", {"state": {e.name: e for e in entries}, "words": ["a", 1, None]})
    for mapped in (False, True):
        read = torch.load(tmp_path / "x.bin", weights_only=True, mmap=mapped)
        assert read["words"] == ["a", 1, None]
        assert_same(read["state"], want)
    assert all(
        t.data_ptr() % 64 == 0 for t in torch.load(tmp_path / "x.bin", mmap=True)["state"].values() if len(t.shape)
    )


# -- the packages themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_result(tmp_path: Path, kind: str) -> None:
    """Same tokens from transformers' class and from ours, without a word on dtypes."""
    import transformers

    convert(write_audiocraft(tmp_path / "a", tiny(kind, seed=3), half=True), tmp_path / "t", "transformers")
    melody = "Melody" if "melody" in kind else ""
    loader = getattr(transformers, f"Musicgen{melody}ForConditionalGeneration")
    theirs, report = loader.from_pretrained(tmp_path / "t", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and theirs.dtype == torch.float32
    mine = MusicGen.get_pretrained(tmp_path / "t", device="cpu")
    pair = Pair(kind, theirs.eval(), hf.tokenizer(tmp_path / "t"), mine)
    pair.same(UNEQUAL[:1], seed=1, melodies=pair.melodies(1))
    config = json.loads((tmp_path / "t/config.json").read_text())
    assert config["torch_dtype"] == "float32"


@ac.needs_audiocraft
@pytest.mark.parametrize("kind", ["text", "stereo", "melody"])
def test_audiocraft_loads_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Its strict loading takes both files, and T5's classes the folder beside; same tokens, same sound."""
    import types

    import transformers

    ac.load()
    import audiocraft.modules.conditioners as conditioners
    from audiocraft.models.musicgen import MusicGen as TheirMusicGen

    folder, name = tmp_path / "a", TextConfig(name="toy-t5", dim=24)  # a name that the stand-in knows
    source = write_transformers(tmp_path / "t", tiny(kind, seed=3, text=name))
    _, notes = convert(source, folder, "audiocraft")
    assert any("audiocraft does not know a text encoder 'toy-t5'" in note for note in notes)
    encoder = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder")
    monkeypatch.setattr(
        conditioners, "T5EncoderModel", types.SimpleNamespace(from_pretrained=lambda name, **_: encoder)
    )
    words = hf.tokenizer(folder / "text_encoder")
    monkeypatch.setattr(conditioners, "T5Tokenizer", types.SimpleNamespace(from_pretrained=lambda name, **_: words))
    monkeypatch.setattr(conditioners, "ChromaStemConditioner", ac._wav_conditioners()[0])
    monkeypatch.setattr("audiocraft.models.builders.ChromaStemConditioner", ac._wav_conditioners()[0])

    theirs, mine = (
        TheirMusicGen.get_pretrained(str(folder), device="cpu"),
        MusicGen.get_pretrained(folder, device="cpu"),
    )
    made = []
    for model, options in ((theirs, {}), (mine, {"separate": False})):
        model.set_generation_params(duration=0.4, top_k=50)
        torch.manual_seed(4)
        if kind == "melody":
            asked: Any = (["a warm pad"], ac.waveform(0), 32000)
            made.append(model.generate_with_chroma(*asked, return_tokens=True, **options))
        else:
            made.append(model.generate(["a warm pad"], return_tokens=True))
    (wav, tokens), (ours, found) = made
    assert len(tokens.unique()) > 20 and torch.equal(found, tokens)
    assert torch.allclose(ours, wav, rtol=1e-4, atol=1e-5 * float(wav.abs().max()))


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_transformers(tmp_path / "t", tiny("text")))
    out = str(tmp_path / "new/a")
    assert main(["convert", source, out, "--to", "audiocraft", "--precision", "float16"]) == 0
    printed, told = capsys.readouterr()
    assert f"{out}: written in the layout of audiocraft, read back and compared" in printed
    assert "EnCodec, 32000 Hz" in printed and "stored as       float16" in printed
    assert (
        told == "musicgen-fast: note: audiocraft itself fetches 't5-base' from the hub; text_encoder/ is for others\n"
    )
    assert main(["convert", source, out, "--to", "transformers"]) == 1
    assert (
        capsys.readouterr().err
        == f"musicgen-fast: error: {out} exists; give another folder, or --overwrite to replace it\n"
    )
    assert main(["convert", source, out, "--to", "transformers", "--overwrite", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert (Path(out) / "config.json").is_file() and not (Path(out) / "state_dict.bin").exists()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a"]
    assert main(["convert", out, out, "--to", "audiocraft", "--overwrite", "-q"]) == 0, "in place"
    assert_same(load_checkpoint(out).lm, load_checkpoint(source).lm)


def test_other_peoples_folders_are_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_transformers(tmp_path / "t", tiny("text")))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "t")
    for name in ("home", "file", "link"):
        assert main(["convert", source, str(tmp_path / name), "--to", "audiocraft", "--overwrite"]) == 1
        assert "is not replaced" in capsys.readouterr().err
    assert (tmp_path / "home/thesis.txt").read_text() == "years" and (tmp_path / "file").read_text() == "a file"


def test_a_codec_without_lstm(tmp_path: Path) -> None:
    codec = CodecConfig(num_filters=4, dimension=16, lstm_layers=0, num_codebooks=4, codebook_size=64)
    with pytest.raises(ValueError, match="no EnCodec without an LSTM"):
        writers.transformers_tensors(tiny("text", codec_config=codec))
