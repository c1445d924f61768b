"""`render` on tiny models: the same samples whatever runs beside, and what goes wrong on the way."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from musicgen_fast import MusicGen, native
from musicgen_fast.chain import Chain
from musicgen_fast.cli import main
from musicgen_fast.render import Options, Rules, Settings, make_plan, render
from musicgen_fast.render import engine as engine_module
from musicgen_fast.render.ledger import ledger_paths, read_ledgers

from .cli_tools import write_models
from .test_render_cli import Page
from .test_render_kills import tars
from .test_render_session import found

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _own_interrupts() -> Iterator[None]:
    """Whoever started the tests may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def mixed(count: int) -> list[dict[str, Any]]:
    """Pieces of every kind that a text model makes, of 0.1 to 2.6 s; its window has 1 s."""
    kinds: list[dict[str, Any]] = [
        {"prompt": "a b", "duration": 0.3},
        {"prompt": "c", "duration": 0.2, "cfg_coef": 1.0, "top_p": 0.8, "temperature": 1.3},
        {"prompt": "d e", "negative_prompt": "f", "duration": 0.4},
        {"prompt": "g", "continuation": "in.wav", "continue_from": 0.1, "continue_seconds": 0.3, "duration": 0.7},
        {"sections": [[0, "h"], [0.3, "i"]], "crossfade": 0.1, "duration": 0.6},
        {"prompt": "j", "duration": 2.6, "extend_stride": 0.5},
        {"unconditional": True, "duration": 0.1},
        {"prompt": "k", "duration": 0.5, "use_sampling": False},
        {"sections": [{"start": 0, "description": "l"}, {"start": 0.9, "description": "m", "cfg_coef": 2.0}],
         "crossfade": 0.3, "cfg_coef": 1.0, "duration": 1.7},
        {"prompt": "n", "continuation": "in.wav", "duration": 1.9},
    ]  # fmt: skip
    return [{"id": f"n{n:03}", **kinds[n % len(kinds)]} for n in range(count)]


def options_of(
    folder: Path, models: Path, rows: list[dict[str, Any]], model: str = "text", out: str = "out", **more: Any
) -> Options:
    if not (folder / "in.wav").exists():  # written again it would be another file: libsndfile puts the time into it
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
        soundfile.write(folder / "in.wav", noise, 16000, subtype="FLOAT")
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"progress": "none", "settings": Settings(loudness="none"), "device": "cpu"} | more
    return Options(folder / "m.jsonl", folder / out, model=str(models / model), **given)


def short(count: int, duration: float = 0.2) -> list[dict[str, Any]]:
    return [{"id": f"n{n:03}", "prompt": f"p{n}", "duration": duration} for n in range(count)]


def run(options: Options) -> int:
    return render(make_plan(options))


def summary(options: Options) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((Path(options.output_dir) / "summary.json").read_text())
    return told


def failures(options: Options) -> dict[str, str]:
    """id -> why."""
    path = Path(options.output_dir) / "failures.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {row["id"]: f"{row['error_type']}: {row['error']}" for row in rows}


def before_steps(monkeypatch: pytest.MonkeyPatch, hook: Callable[[int, tuple], None]) -> None:
    """`hook(number of the step, lanes)` before every step of the CPU decoder."""
    from musicgen_fast.decoders.cpu import CpuDecoder

    step, count = CpuDecoder.step, [0]

    def hooked(self: CpuDecoder, *states: Any) -> None:
        count[0] += 1
        hook(count[0], states)
        step(self, *states)

    monkeypatch.setattr(CpuDecoder, "step", hooked)


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_the_samples_do_not_depend_on_the_batch(models: Path, tmp_path: Path) -> None:
    rows, made = mixed(40), {}
    for size in (1, 4, 16):
        settings = Settings(loudness="none", tokens=True)
        options = options_of(tmp_path, models, rows, out=f"out{size}", batch_size=size, settings=settings)
        assert run(options) == 0, failures(options)
        out = tmp_path / f"out{size}"
        made[size] = found(out)
        told = summary(options)
        assert (told["done"], told["batch_size"]) == (40, size) and 0.9 < told["slot_occupancy"] <= 1
        assert len(list(out.glob("*.wav"))) == len(list(out.glob("*.json"))) - 1 == len(list(out.glob("*.npz"))) == 40
        page = Page((out / "report.html").read_text("utf-8"))
        assert len(page.all("a")) == 40 and [row.get("class") for row in page.all("tr")].count("done") == 40
    assert made[1] == made[4] == made[16] and len(set(made[1].values())) > 20
    for n in range(40):
        both = [np.load(tmp_path / f"out{size}/n{n:03}.npz")["tokens"] for size in (1, 16)]
        assert np.array_equal(*both)


@pytest.mark.parametrize("precision", ["int8", "int4", "bfloat16"])
def test_nor_do_they_in_other_precisions_or_with_other_threads(precision: str, models: Path, tmp_path: Path) -> None:
    made, before = [], torch.get_num_threads()
    for size, threads in ((1, 1), (7, 2)):
        options = options_of(tmp_path, models, mixed(10), out=f"out{size}", batch_size=size, precision=precision)
        torch.set_num_threads(threads)
        try:
            assert run(options) == 0, failures(options)
            assert torch.get_num_threads() == threads, "given back"
        finally:
            torch.set_num_threads(before)
        made.append(found(tmp_path / f"out{size}"))
    assert made[0] == made[1] and len(made[0]) == 10


def test_webdataset(models: Path, tmp_path: Path) -> None:
    settings = Settings("flac", "none")
    options = options_of(
        tmp_path, models, mixed(10), batch_size=4, settings=settings, layout="webdataset", shard_pieces=4
    )
    assert run(options) == 0 and len(tars(tmp_path / "out")) == 10
    files = options_of(tmp_path, models, mixed(10), out="files", batch_size=4)
    assert run(files) == 0
    told = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "files").glob("n*.json")}
    assert tars(tmp_path / "out") == {name: one["sha256"] for name, one in told.items()}
    assert run(options) == 0 and summary(options)["skipped"] == 10


def test_a_piece_is_what_generate_makes(models: Path, tmp_path: Path) -> None:
    rows = mixed(10)
    options = options_of(tmp_path, models, rows, batch_size=3, settings=Settings(loudness="none", tokens=True))
    assert run(options) == 0
    model = MusicGen.get_pretrained(models / "text", "cpu")
    items = {item.id: item for item in make_plan(options).items}
    for name, ways in (("n000", {}), ("n002", {"negative_prompt": "f"}), ("n005", {}), ("n007", {})):
        item = items[name]
        model.set_generation_params(
            duration=item.params.duration, extend_stride=item.params.extend_stride, use_sampling=name != "n007"
        )
        wav, tokens = model.generate([item.prompt], return_tokens=True, seed=[item.seed], **ways)
        check(tmp_path / f"out/{name}", wav, tokens)
    wav, rate = soundfile.read(tmp_path / "in.wav", dtype="float32")
    model.set_generation_params(duration=1.9)
    sound = torch.from_numpy(wav)[None]
    check(
        tmp_path / "out/n009",
        *model.generate_continuation(sound, rate, ["n"], seed=[items["n009"].seed], return_tokens=True),
    )
    model.set_generation_params(duration=0.6)
    sections = items["n004"].sections
    with model.stream(duration=0.6, seed=[items["n004"].seed], sections=sections, crossfade=0.1) as stream:
        check(tmp_path / "out/n004", *stream.collect())


def check(stem: Path, wav: torch.Tensor, tokens: torch.Tensor) -> None:
    assert np.array_equal(np.load(f"{stem}.npz")["tokens"], tokens[0].numpy())
    samples = torch.from_numpy(soundfile.read(f"{stem}.wav", dtype="float32", always_2d=True)[0]).T
    assert samples.shape == wav[0].shape and float((samples - wav[0].clamp(-1, 1)).abs().max()) < 2 / 2**15


def test_melodies(models: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "x", "melody": "in.wav", "separate": False, "duration": 0.4},
        {"id": "b", "prompt": "y", "duration": 0.3},
        {"id": "c", "melody": "in.wav", "separate": False, "duration": 1.3, "extend_stride": 0.6},
    ]
    made = []
    for size in (1, 3):
        options = options_of(tmp_path, models, rows, "melody", f"out{size}", batch_size=size)
        assert run(options) == 0, failures(options)
        made.append(found(tmp_path / f"out{size}"))
    assert made[0] == made[1] and len(set(made[0].values())) == 3


def test_nothing_is_loaded_where_nothing_is_left(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of(tmp_path, models, [{"prompt": "x", "id": "x", "num_variations": 3, "duration": 0.1}])
    argv = ["render", str(options.manifest), "-o", str(options.output_dir), "-m", options.model, "-d", "cpu"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(MusicGen, "get_pretrained", refuse)
        assert main([*argv, "--dry-run"]) == 0 and "3 pieces of 1 lines" in capsys.readouterr().out
        assert not (tmp_path / "out").exists()
    assert main([*argv, "--precision", "int8", "-q"]) == 0 and len(list((tmp_path / "out").glob("*.wav"))) == 3
    monkeypatch.setattr(MusicGen, "get_pretrained", refuse)
    assert main([*argv, "--progress", "json"]) == 0  # auto is int8 here
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["event"], last["skipped"], last["done"]) == ("end", 3, 0)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_piece_that_the_model_cannot_make_fails_alone(models: Path, tmp_path: Path) -> None:
    rows = [*short(5), {"id": "bad", "prompt": "x", "melody": "in.wav", "duration": 0.2}]
    rows.append({"id": "gone", "prompt": "x", "continuation": "here.wav", "duration": 1.5})
    options = options_of(tmp_path, models, rows, batch_size=4)
    (tmp_path / "here.wav").write_bytes((tmp_path / "in.wav").read_bytes())
    plan = make_plan(options)
    plan.identity("", "")
    plan.inputs.content("here.wav")
    (tmp_path / "here.wav").unlink()  # after it was hashed
    assert render(plan) == 3 and len(found(tmp_path / "out")) == 5
    why = failures(options)
    assert set(why) == {"bad", "gone"} and "takes no melody" in why["bad"] and "here.wav" in why["gone"]


def test_a_draw_that_fails_and_an_error_of_the_decoder(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(tmp_path, models, short(8), batch_size=4)
    seeds = {item.id: item.seed for item in make_plan(options).items}
    end, tries = Chain.end, Counter[str]()

    def drawn(self: Chain) -> None:
        if self.sampler.seeds is not None and int(self.sampler.seeds[0]) == seeds["n001"]:
            raise ValueError("no probabilities")
        end(self)

    def poisoned(_: int, lanes: tuple) -> None:
        if any(int(lane.sampler.seeds[0]) == seeds["n003"] for lane in lanes):
            tries["n003"] += 1
            raise RuntimeError("kernel failed")

    monkeypatch.setattr(Chain, "end", drawn)
    before_steps(monkeypatch, poisoned)
    assert run(options) == 3
    assert failures(options) == {"n001": "ValueError: no probabilities", "n003": "RuntimeError: kernel failed"}
    assert tries["n003"] == 1 + 3, "with others, then alone"
    assert set(found(tmp_path / "out")) == set(seeds) - {"n001", "n003"}
    states = read_ledgers(ledger_paths(tmp_path / "out")).states
    assert all(state.attempts == 0 or state.failed for state in states.values())
    monkeypatch.undo()
    assert run(replace(options, rules=Rules(retry_failed=True))) == 0
    assert run(replace(options, output_dir=tmp_path / "calm")) == 0
    assert found(tmp_path / "out") == found(tmp_path / "calm")


@pytest.mark.parametrize("where", ["cache", "step"])
def test_the_batch_is_halved_where_memory_runs_out(
    where: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from musicgen_fast.decoders.cpu import CpuDecoder

    options, allocate, caches = options_of(tmp_path, models, short(20)), CpuDecoder.allocate, [0]

    def scarce(self: CpuDecoder, rows: int, capacity: int) -> Any:
        caches[0] += 1
        if caches[0] > 3:
            raise MemoryError("no room")
        return allocate(self, rows, capacity)

    def tight(_: int, lanes: tuple) -> None:
        if len(lanes) > 2:
            raise MemoryError("no room")

    with monkeypatch.context() as patch:
        if where == "cache":
            patch.setattr(CpuDecoder, "allocate", scarce)
        else:
            before_steps(patch, tight)
        assert run(replace(options, batch_size=16)) == 0
        states = read_ledgers(ledger_paths(tmp_path / "out")).states
        assert all(state.attempts == 0 and state.lost == 0 for state in states.values()), "nobody is to blame"
    size = summary(options)["batch_size"]
    assert size == 2
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short(30)))
    assert run(options) == 0 and summary(options)["batch_size"] == 2, "remembered"
    assert run(replace(options, rules=Rules(overwrite=True), batch_size=5)) == 0
    assert summary(options)["batch_size"] == 5 and len(found(tmp_path / "out")) == 30


def test_a_piece_that_is_too_large_for_the_memory(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(tmp_path, models, short(3), batch_size=4, rules=Rules(max_attempts=2))

    def never(*_: object) -> None:
        raise MemoryError("no room at all")

    monkeypatch.setattr("musicgen_fast.decoders.cpu.CpuDecoder.allocate", never)
    assert run(options) == 3
    assert set(failures(options).values()) == {"MemoryError: no room at all"} and len(failures(options)) == 3


def test_a_piece_that_takes_too_long(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*short(6), {"id": "long", "prompt": "x", "duration": 5}]
    options = options_of(tmp_path, models, rows, batch_size=4, item_timeout=1.0, rules=Rules(max_attempts=2))
    now = [0.0]

    def tick(*_: object) -> None:
        now[0] += 0.02

    before_steps(monkeypatch, tick)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert run(options) == 3 and failures(options) == {"long": "TimeoutError: took longer than 1 s"}
    assert len(found(tmp_path / "out")) == 6 and 1.9 < now[0] < 3


# -- how it ends ------------------------------------------------------------------------------------------------------


def test_a_first_interrupt_finishes_what_is_in_work(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = options_of(tmp_path, models, short(12), batch_size=3)
    before_steps(monkeypatch, lambda number, _: signal.raise_signal(signal.SIGINT) if number == 4 else None)
    assert run(options) == 130 and len(found(tmp_path / "out")) == 3 and "3 pieces are finished first" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert summary(options)["open"] == 9
    assert run(options) == 0 and len(found(tmp_path / "out")) == 12


def test_a_second_interrupt_drops_it(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(tmp_path, models, short(12), batch_size=3)
    before_steps(monkeypatch, lambda number, _: signal.raise_signal(signal.SIGINT) if number in (20, 22) else None)
    assert run(options) == 130 and len(found(tmp_path / "out")) <= 3, "the second three were not done"
    states = read_ledgers(ledger_paths(tmp_path / "out")).states
    assert [state.lost for state in states.values()] == [0] * len(states) and len(states) == 6
    monkeypatch.undo()
    assert run(options) == 0 and len(found(tmp_path / "out")) == 12


def test_exit_codes_of_the_command_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [{"id": f"bad{n}", "prompt": "x", "melody": "in.wav", "duration": 0.1} for n in range(3)]
    options = options_of(tmp_path, models, [*bad, *short(3, 0.1)])
    argv = ["render", str(options.manifest), "-o", str(options.output_dir), "-m", options.model, "-d", "cpu", "-q"]
    assert main([*argv, "--max-failures", "2"]) == 3 and "pieces failed; --max-failures ends" in capsys.readouterr().err
    assert main(argv) == 3 and len(found(tmp_path / "out")) == 3 and len(failures(options)) == 3
    assert main([*argv[:4], "-m", str(tmp_path / "nothing"), "-d", "cpu"]) == 1
    before_steps(monkeypatch, lambda *_: signal.raise_signal(signal.SIGINT))
    assert main([*argv, "--overwrite"]) == 130
    for wrong in (["--overwrite", "--retry-failed"], ["--workers", "2"], ["--engine", "clay"]):
        with pytest.raises(SystemExit) as stop:
            main([*argv, *wrong])
        assert stop.value.code == 2


def test_ray_that_is_missing_is_named_before_anything_is_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"musicgen-fast\[ray\]"):
        run(options_of(tmp_path, models, short(2), engine="ray"))
    assert not (tmp_path / "out").exists()
