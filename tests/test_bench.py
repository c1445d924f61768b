"""`musicgen-fast bench latency`: what it says of given times, what parity finds, and that the command runs.

Times themselves are not looked at. The models are tiny ones in a folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from musicgen_fast import MusicGen, machine, native
from musicgen_fast.bench import latency, parity, providers, worker
from musicgen_fast.bench.job import PRECISIONS, AbsentError, Job, config_of
from musicgen_fast.bench.latency import Row
from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.cli import main
from musicgen_fast.cli_bench import latency as cli_latency
from musicgen_fast.cli_bench import options as cli_options
from musicgen_fast.errors import CheckpointError

from .checkpoint_writers import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    write_transformers_folder(folder, checkpoint=tiny("text"))
    return str(folder)


def row(provider: str, ms: float, precision: str = "float32", number: int = 0, start: int = 0, **job: Any) -> Row:
    made = Job(provider, precision=precision, steps=20, warmup=10, **job)
    return Row(made, number, start, start + 15, [ms - 1, ms, ms, ms + 1], 400, ms / 2, ms / 1.5, 12.0)


# -- what is said of times --------------------------------------------------------------------------------------------


def test_ratios_are_to_transformers_of_the_same_round_and_position():
    rows = [
        row("transformers", 80),
        row("transformers", 40, "bfloat16"),
        row("musicgen_fast", 20, "int8"),
        row("musicgen_fast", 20),
        row("transformers", 300, number=1),
        row("musicgen_fast", 20, "int8", number=1),
        row("musicgen_fast", 20, "int8", number=2),
        row("musicgen_fast", 20, "int8", start=500),
    ]
    assert [latency.ratio(r, rows) for r in rows] == [1, 1, 2, 4, 1, 15, None, None]


def test_lines_have_every_key_and_medians_over_rounds():
    rows = [row("musicgen_fast", ms, "int8", number) for number, ms in enumerate((10.0, 12.0, 50.0))]
    absent = {("openvino", "int8"): "openvino is not installed (pip install openvino)"}
    said = parity.verdict("int8", 40, 0.01, 0.5)
    ours, gone = latency.lines(rows, absent, {("musicgen_fast", "int8"): said}, {"versions": {"torch": "2"}})
    wanted = {"provider", "precision", "threads", "ms_per_step", "floor_ms", "percent_of_floor", "parity"}
    wanted |= {"model", "device", "machine", "versions", "ms_p10", "ms_p90"}
    measured = {"positions", "peak_mib", "ms_p99", "rtf", "rtfx", "audio_per_second", "tokens_per_second"}
    measured |= {"load_s", "compile_s", "cold_ms"}
    assert wanted | measured <= set(ours) and wanted <= set(gone)
    assert ours["rtf"] == pytest.approx(0.6) and ours["rtf"] * ours["rtfx"] == pytest.approx(1)  # 50 steps of 12 ms
    assert (ours["ms_per_step"], ours["floor_ms"], ours["percent_of_floor"]) == (12.0, 6.0, 50.0)
    assert ours["ms_p10"] < 12 < ours["ms_p90"] and ours["ms_per_round"] == [10, 12, 50]
    assert ours["positions"] == [10, 20] and ours["parity"]["ok"] is True and "absent" not in ours
    assert gone["ms_per_step"] is None and gone["absent"].startswith("openvino is not installed")
    text = latency.table(rows, absent, {("musicgen_fast", "int8"): said})
    assert "| musicgen_fast | int8 | 10..20 | 12.00 [" in text and "ok, logits 1.0e-02, tokens 50%" in text
    assert "| openvino | int8 | absent: openvino is not installed" in text


def test_peers_run_in_the_nearest_precision_that_they_have(monkeypatch):
    base = Job("", device="cpu")
    monkeypatch.setattr(providers, "cpu_flags", lambda: {"avx2"})
    jobs = latency.jobs_for(base, ["int8", "int4", "float32"], ["musicgen_fast", "transformers", "openvino"])
    assert [(j.provider, j.precision) for j in jobs] == [
        ("musicgen_fast", "int8"), ("transformers", "float32"), ("openvino", "int8"), ("musicgen_fast", "int4"),
        ("openvino", "int4"), ("musicgen_fast", "float32"), ("openvino", "float32"),
    ]  # fmt: skip
    monkeypatch.setattr(providers, "cpu_flags", lambda: {"avx2", "amx_bf16"})
    assert providers.fitting_precision("transformers", "int8", "cpu") == "bfloat16"
    assert providers.fitting_precision("audiocraft", "int8", "cpu") == "float32"
    assert providers.fitting_precision("audiocraft", "int8", "cuda") == "float16"


def test_default_providers_are_those_that_are_there(monkeypatch):
    monkeypatch.setattr(latency, "why_absent", lambda name: "gone" if name == "openvino" else "")
    jobs = latency.jobs_for(Job(""), ["float32"], None)
    assert [job.provider for job in jobs] == ["musicgen_fast", "transformers", "audiocraft", "fast_musicgen"]


def test_a_provider_that_fails_is_absent_and_not_tried_again(monkeypatch):
    tried: list[str] = []

    def answer(job: Job, timeout: float | None = None) -> dict[str, Any]:
        tried.append(job.provider)
        if job.provider == "transformers":
            return {"absent": "failed: MemoryError"}
        block = {"start": 0, "position": 15.0, "ms": [1.0], "floor_ms": 0.5, "floor_p50_ms": 0.6}
        return {"blocks": [block], "peak_mib": 1, "read_gb_s": 10.0, "read_p50_gb_s": 9.0}

    monkeypatch.setattr(latency, "in_own_process", answer)
    monkeypatch.setattr(latency, "why_absent", lambda name: "not there" if name == "openvino" else "")
    jobs = latency.jobs_for(Job(""), ["float32"], ["musicgen_fast", "transformers", "openvino"])
    rows, absent = latency.run_rounds(jobs, 3, lambda _: None)
    assert [r.round for r in rows] == [0, 1, 2] and tried.count("transformers") == 1
    assert absent == {("transformers", "float32"): "failed: MemoryError", ("openvino", "float32"): "not there"}


def test_parity_is_asked_of_those_with_the_same_weights(monkeypatch):
    asked: list[tuple[str, int, str]] = []

    def answer(job: Job, task: str) -> dict[str, Any]:
        asked.append((job.provider, job.steps, task))
        return {"absent": "failed: MemoryError"} if job.provider == "openvino" else {"ok": True}

    monkeypatch.setattr(latency, "in_own_process", answer)
    jobs = [Job(name) for name in ("musicgen_fast", "transformers", "openvino", "audiocraft")]
    found = latency.parities(jobs, {("audiocraft", "float32"): "gone"}, 9, lambda _: None)
    assert asked == [("musicgen_fast", 9, "parity"), ("openvino", 9, "parity")]
    assert [said["ok"] for said in found.values()] == [True, None, None]
    assert found["openvino", "float32"]["why"] == "failed: MemoryError"
    assert all(said["ok"] is None for said in latency.parities(jobs, {}, 0, lambda _: None).values())


@pytest.mark.parametrize(
    "precision,error,equal,ok",
    [
        ("float32", 1e-6, 1.0, True),
        ("float32", 1e-6, 0.999, False),
        ("float32", 1e-3, 1.0, False),
        ("float32", None, 1.0, True),
        ("int8", 0.014, 0.2, True),
        ("int8", 0.026, 1.0, False),
        ("int8", None, 1.0, None),
    ],
)
def test_verdicts(precision, error, equal, ok):
    assert parity.verdict(precision, 10, error, equal)["ok"] is ok


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("built", [True, False])
def test_the_read_touches_the_whole_buffer(monkeypatch, built):
    if built and (reason := native.why_not()):
        pytest.skip(reason)
    monkeypatch.setattr(native, "available", lambda: built)
    monkeypatch.setattr(machine, "_SMALLEST", 1)
    read: list[int] = []
    real = machine._readers
    monkeypatch.setattr(machine, "_readers", lambda buffer, *rest: read.append(buffer.nbytes) or real(buffer, *rest))
    speed = machine.read_speed("cpu", 2, 8_000_001, passes=5)
    assert read == [8_003_584]  # whole pages
    assert 1e8 < speed.median <= speed.best < 1e13


@pytest.mark.parametrize("decoder", ["torch", "cpu"])
@pytest.mark.parametrize("start", [0, 30])
def test_a_late_start_costs_no_prefill_and_steps_as_often(model, monkeypatch, start, decoder):
    monkeypatch.setenv("MUSICGEN_FAST_DECODER", decoder)
    lm: Any = MusicGen.get_pretrained(model, "cpu").lm
    inner, lengths, prefilled = lm.decoder, [], []
    real_step, real_prefill = inner.step, inner.prefill

    def stepped(*states: Any) -> None:
        lengths.append(list(states[0].lengths))
        assert decoder == "cpu" or start == 0 or len(lengths) > 1 or not states[0].kv.tensor.any()
        real_step(*states)

    inner.step = stepped
    inner.prefill = lambda *given: prefilled.append(1) or real_prefill(*given)
    monkeypatch.setattr(MusicGen, "get_pretrained", lambda *_, **__: SimpleNamespace(lm=lm))
    counted: list[int] = []
    job = Job("musicgen_fast", model, steps=12, threads=1, text_tokens=5)
    providers.ours(job)(lambda: counted.append(1), start)
    assert len(counted) == 12
    first = [start, start] if start else [1, 1]
    assert lengths[0] == first and lengths[-1] == [start + 11] * 2 and bool(prefilled) == (start == 0)


def test_the_text_has_as_many_states_as_asked(model):
    lm = MusicGen.get_pretrained(model, "cpu").lm
    conditions = providers.conditions_for(lm, Job("musicgen_fast", text_tokens=7, requests=2))
    assert conditions.batch == 2 and [len(states) for states in conditions.branches[0].cross or []] == [7, 7]


def test_parity_of_float32_and_bfloat16(model):
    exact = parity.parity(Job("musicgen_fast", model, steps=20))
    assert exact["ok"] is True and exact["tokens_equal"] == 1 and 0 <= exact["logits_error"] < 1e-5
    rough = parity.parity(Job("musicgen_fast", model, "bfloat16", steps=20))
    assert rough["ok"] is True and 1e-4 < rough["logits_error"] < 0.02


@pytest.mark.parametrize("levels,ok", [(127, True), (7, False)])
def test_parity_of_a_quantised_model(model, monkeypatch, levels, ok):
    """Weights on so many steps to either side in the place of an int8 decoder: 127 are enough, 7 are int4."""
    monkeypatch.setenv("MUSICGEN_FAST_DECODER", "torch")
    real = MusicGen.get_pretrained

    def quantised(name: str, device: str, precision: str) -> Any:
        assert precision == "int8"
        made = real(name, device)
        for layer in made.lm.transformer.layers:
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    scale = parameter.abs().amax(1, keepdim=True) / levels
                    parameter.data = (parameter / scale).round() * scale
        return made

    monkeypatch.setattr(MusicGen, "get_pretrained", quantised)
    found = parity.parity(Job("musicgen_fast", model, "int8", steps=20))
    assert found["ok"] is ok and found["logits_error_limit"] == 0.025 and found["logits_error"] > 1e-4


@pytest.mark.skipif(not native.available(), reason=f"int8 needs the C++ extension: {native.why_not()}")
def test_parity_of_int8(model):
    found = parity.parity(Job("musicgen_fast", model, "int8", steps=20))
    assert found["ok"] is True and 1e-3 < found["logits_error"] < 0.02


def test_parity_sees_a_wrong_decoder(model, monkeypatch):
    monkeypatch.setenv("MUSICGEN_FAST_DECODER", "torch")
    real = MusicGen.get_pretrained

    def wrong(*args: Any, **options: Any) -> Any:
        made = real(*args, **options)
        made.lm.transformer.layers[1].norm1.weight.data += 0.02
        return made

    monkeypatch.setattr(MusicGen, "get_pretrained", wrong)
    assert parity.parity(Job("musicgen_fast", model, steps=10))["ok"] is False


def test_openvino_computes_the_same_with_its_attention_fused(model):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    pytest.importorskip("nncf", reason="NNCF, which compresses weights for OpenVINO, is not installed")
    from musicgen_fast.bench import openvino_peer

    assert parity.parity(Job("openvino", model, "float32", steps=12))["logits_error"] < 1e-4
    assert parity.parity(Job("openvino", model, "int8", steps=12))["logits_error"] < 0.03
    reference = parity._reference(Job("openvino", model))
    with torch.no_grad():
        decoder = openvino_peer.OpenVinoDecoder(reference, torch.randn(4, 32), "int8", 1)
    assert decoder.kernels == reference.config.num_layers
    decoder.start(9)
    assert decoder.step(torch.zeros(4, dtype=torch.int64)).shape == (2, 4, 64) and decoder.position == 10


def test_fast_musicgen_is_stepped_by_its_own_loop(model):
    pytest.importorskip("fast_musicgen", reason="fast-musicgen is not installed")
    counted: list[int] = []
    run = providers.PROVIDERS["fast_musicgen"](Job("fast_musicgen", model, steps=12, text_tokens=5))
    tokens: Any = run(lambda: counted.append(1), 0)
    assert len(counted) == 12 and tokens.shape[:3] == (1, 1, 4) and tokens.max() < 64


@pytest.mark.parametrize("options,why", [({"requests": 2}, "one request"), ({"text_tokens": 21}, "up to 20 tokens")])
def test_what_fast_musicgen_is_not_made_for(model, monkeypatch, options, why):
    nothing = SimpleNamespace(CausalLM=None, LMRunner=None)
    monkeypatch.setitem(sys.modules, "fast_musicgen", SimpleNamespace(lm=nothing))
    monkeypatch.setitem(sys.modules, "fast_musicgen.lm", nothing)
    with pytest.raises(AbsentError, match=why):
        providers.PROVIDERS["fast_musicgen"](Job("fast_musicgen", model, **options))


def test_a_process_that_fails_or_hangs(model, monkeypatch):
    answer = worker.in_own_process(Job("musicgen_fast", model, precision="int3"))
    assert "KeyError" in answer["absent"] and answer["absent"].startswith("failed: ")
    assert worker.in_own_process(Job("musicgen_fast", model), timeout=0.1) == {"absent": "failed: not done after 0.1 s"}


def test_config_of_nothing():
    with pytest.raises(CheckpointError, match="unknown size 'tiny'"):
        config_of("random:tiny")


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_line_names_what_there_is():
    assert cli_latency.PROVIDERS == tuple(providers.PROVIDERS) and cli_options.PRECISIONS == PRECISIONS


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--providers", "musicgen_fast,vllm"], "expected some of musicgen_fast,transformers"),
        (["--precision", "int3"], "got 'int3'"),
        (["--steps", "9"], "at least 10"),
        (["--threads", "0"], "at least 1"),
        (["--positions", "16,1503"], "expected positions 0..1502"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "latency", *argv])
    assert message in capsys.readouterr().err


def test_the_command_knows_where_a_window_ends():
    assert cli_latency.LAST_POSITION == latency.COLUMNS
    assert latency.starts_for([0, 700, 1502], 40, 20) == (0, 670, 1463)


def test_what_a_step_means():
    found = latency.speeds(10.0, requests=8, codebooks=4)
    assert found == {"rtf": 0.5, "rtfx": 2.0, "audio_per_second": 16.0, "tokens_per_second": 3200.0}


def test_an_unknown_model(capsys):
    assert main(["bench", "latency", "-m", "random:huge"]) == 1
    assert "unknown size 'huge'" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys; from musicgen_fast.cli import main\ntry: main(['bench', 'latency', '-h'])\n"
    done = subprocess.run([sys.executable, "-c", code + "finally: print('torch' in sys.modules)"], text=True,
                          capture_output=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False" and "--providers" in done.stdout


def test_the_command_prints_one_line_a_provider(model):
    """From a folder that is not the checkout; OpenVINO is made absent, so that this is the same everywhere."""
    block = "import sys; sys.modules['nncf'] = None\nfrom musicgen_fast.bench import providers\n"
    block += "providers.find_spec = lambda name: None\nfrom musicgen_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    options = (
        f"-m {model} --device cpu --precision float32 --steps 10 --rounds 1 --threads 1 --parity-frames 6 --json -"
    )
    argv = [sys.executable, "-c", block, "bench", "latency", "--providers", "musicgen_fast,openvino", *options.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=environment, cwd=Path(model), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ours, gone = (json.loads(line) for line in done.stdout.splitlines())
    assert (ours["provider"], ours["precision"], ours["threads"]) == ("musicgen_fast", "float32", 1)
    assert 0 < ours["ms_p10"] <= ours["ms_per_step"] <= ours["ms_p90"] and ours["positions"] == [5, 10]
    assert ours["percent_of_floor"] == pytest.approx(100 * ours["floor_ms"] / ours["ms_per_step"], rel=1e-3)
    assert ours["parity"]["ok"] is True and ours["peak_mib"] > 50 and ours["versions"]["torch"]
    assert ours["load_s"] > 0 and ours["cold_ms"] > 0 and ours["compile_s"] is None
    assert gone["provider"] == "openvino" and "not installed" in gone["absent"]


def test_our_own_absence_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(latency, "in_own_process", lambda *_, **__: {"absent": "failed: ValueError: no int8"})
    assert main(["bench", "latency", "--precision", "int8", "--device", "cpu", "--providers", "musicgen_fast"]) == 1
    out, err = capsys.readouterr()
    assert "| musicgen_fast | int8 | absent: failed: ValueError: no int8" in out
    assert "could not be timed in int8: failed: ValueError: no int8" in err
