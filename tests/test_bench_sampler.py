"""The sampler benchmark: do its samplers sample what they claim, does it see one of ours that does not?

Times are not looked at. Everything runs on the CPU; what needs CUDA can only be absent here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_fast import native
from musicgen_fast.bench import sampler, sampler_device, sampler_peers
from musicgen_fast.bench.job import DTYPES, AbsentError
from musicgen_fast.bench.sampler import Found, Row
from musicgen_fast.bench.sampler_case import Case
from musicgen_fast.cli import main
from musicgen_fast.cli_bench import sampler as cli
from musicgen_fast.sampling import Draw, backends, reference

from .oracle import audiocraft_lm as oracle

ROOT = Path(__file__).resolve().parent.parent
FILTERS = ("top_k250", "top_p0.9", "none")
NAMES = [name for name in sampler_peers.default_names("cpu") if name != "compiled"]  # compiling takes 20 s
OURS = [name for name in NAMES if sampler_peers.is_ours(name)]


def built(name: str, case: Case) -> Any:
    try:
        return sampler_peers.build(name, case)
    except AbsentError as reason:
        pytest.skip(f"absent: {reason}")


def guided(logits: torch.Tensor) -> torch.Tensor:
    return sampler_peers.guided(logits, 3.0).softmax(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FILTERS)
def test_every_sampler_draws_from_the_kept_tokens(name, kind):
    case = Case(batch=3, codebooks=2, filter=kind, vocab=512)
    logits, made = case.logits(), built(name, case)
    p = guided(logits)
    ranked = p.sort(-1, descending=True)
    if case.top_k:
        kept = p >= ranked.values[..., case.top_k - 1, None] * (1 - 1e-5)
    else:
        inside = ranked.values.cumsum(-1) - ranked.values <= (case.top_p or 2) + 1e-5
        kept = torch.zeros_like(inside).scatter_(-1, ranked.indices, inside)
    seen = set()
    for _ in range(10):
        tokens = sampler_peers.tokens_of(made, logits)
        assert tokens.shape == (3, 2) and kept.gather(-1, tokens.long()[..., None]).all()
        seen.add(tuple(tokens.flatten().tolist()))
    assert len(seen) > 1  # every draw is a new one


@pytest.mark.parametrize("kind", FILTERS)
@oracle.needs_audiocraft
def test_the_chain_draws_what_audiocraft_draws(kind):
    oracle.load()
    from audiocraft.utils import utils

    case = Case(batch=5, filter=kind, temperature=0.8)
    cond, null = logits = case.logits()
    torch.manual_seed(11)
    p = torch.softmax((null + (cond - null) * 3.0) / 0.8, dim=-1)
    if case.top_p:
        expected = utils.sample_top_p(p, p=case.top_p)
    elif case.top_k:
        expected = utils.sample_top_k(p, k=case.top_k)
    else:
        expected = utils.multinomial(p, num_samples=1)
    torch.manual_seed(11)
    assert torch.equal(sampler_peers.audiocraft_chain(logits, case), expected[..., 0])


@pytest.mark.parametrize("kind", FILTERS)
def test_the_chain_draws_what_our_noise_mode_draws(kind):
    case = Case(batch=5, filter=kind, temperature=0.8)
    logits, made = case.logits(), built("noise:torch", case)
    torch.manual_seed(12)
    ours = sampler_peers.tokens_of(made, logits)
    torch.manual_seed(12)
    assert torch.equal(sampler_peers.audiocraft_chain(logits, case), ours)


def test_a_sequence_is_emptied_when_it_is_full():
    case = Case(vocab=64)
    logits, made = case.logits(), built("draw:torch", case)
    for _ in range(sampler_peers.COLUMNS + 2):
        assert (sampler_peers.tokens_of(made, logits) >= 0).all()
    assert (made.sequence[:, :, made.next :] == -1).all()


def test_what_cannot_run_is_absent_with_its_reason(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no compiler found\nmany more lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(AbsentError, match="^RuntimeError: no compiler found$"):
        sampler_peers.build("compiled", Case(vocab=64))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    made = sampler_peers.build("compiled", Case())
    assert sampler_peers.tokens_of(made, Case().logits()).shape == (1, 4)
    monkeypatch.setattr(native, "why_not", lambda: "turned off")
    found = Found()
    sampler.measure_case(Case(), ["sample:cpu", "draw:cuda", "vllm", "flashinfer"], 1, 0.0, found)
    assert found.rows == [] and found.parity == {} and sampler.failures(found) == []
    reasons = {name: why for (_, name), why in found.absent.items()}
    assert reasons.pop("sample:cpu") == "turned off" and reasons.keys() == {"draw:cuda", "vllm", "flashinfer"}
    assert set(reasons.values()) == {"it needs logits on a CUDA device"}


def test_a_peer_without_tokens_is_absent(monkeypatch):
    monkeypatch.setitem(sampler_peers.SAMPLERS, "transformers", lambda case: lambda logits: torch.full((1, 4), 2048))
    with pytest.raises(AbsentError, match="tokens that are none"):
        sampler_peers.build("transformers", Case())


@pytest.mark.parametrize("wrong", [{"filter": "top_q3"}, {"filter": "top_p7"}, {"dtype": "int8"}, {"batch": 0}])
def test_cases_that_mean_nothing(wrong):
    with pytest.raises(ValueError):
        Case(**wrong)


# -- right or wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_of_what_is_right(name, kind, dtype):
    case = Case(batch=3, filter=kind, dtype=dtype)
    made = built(name, case)
    before = torch.get_rng_state()
    assert sampler.parity(name, made, case, case.logits()) is True
    assert torch.equal(torch.get_rng_state(), before)
    assert sampler.parity(name, made, case, case.logits()) is True, "wherever in its sequence it is"


def test_parity_compares_enough_tokens(monkeypatch):
    columns: list[int] = []
    real = reference.draw
    monkeypatch.setattr(reference, "draw", lambda inputs: columns.append(inputs.logits.shape[1]) or real(inputs))
    for batch, wanted in ((1, 64), (100, 2)):
        case = Case(batch=batch, vocab=32, filter="none")
        made = built("draw:torch", case)
        columns.clear()
        assert sampler.parity("draw:torch", made, case, case.logits())
        assert len(columns) == wanted


def off_by_one(inputs: Draw) -> None:
    """Right but for the last cell of the fourth column."""
    reference.draw(inputs)
    if int(inputs.column[-1]) == 3 if inputs.column is not None else int(inputs.step[-1]) == 3:  # type: ignore[index]
        cell = inputs.tokens[-1, -1:] if inputs.column is None else inputs.tokens[-1, -1, 3:4]
        cell.copy_((cell + 1) % inputs.logits.shape[-1])


def out_of_range(inputs: Draw) -> None:
    reference.draw(inputs)
    inputs.tokens += 5000


def breaks(inputs: Draw) -> None:
    raise OSError("a bus error")


@pytest.mark.parametrize("form", sampler_peers.FORMS)
@pytest.mark.parametrize(
    ("backend", "said", "timed"),
    [
        (off_by_one, "its tokens are not those of the torch reference", True),
        (out_of_range, "its tokens are not those of the torch reference", True),
        (breaks, "could not draw: OSError: a bus error", False),
    ],
)
def test_a_wrong_backend_is_found(form, backend, said, timed, monkeypatch):
    monkeypatch.setitem(backends._DRAW, "torch", backend)
    found = Found()
    name = f"{form}:torch"
    sampler.measure_case(Case(codebooks=2), ["audiocraft", name], 1, 0.0, found)
    assert found.parity == {(Case(codebooks=2), name): False}
    assert sampler.failures(found) == [f"{name} at batch 1, 2 codebooks, top_k250, float32: {said}"]
    lines = {line["provider"]: line for line in sampler.lines(found, Case(codebooks=2))}
    assert lines["audiocraft"]["parity"] is None and lines[name]["parity"] is False
    assert (lines[name]["us"] is not None) == timed == ("absent" not in lines[name])
    assert timed == ("| WRONG |" in sampler.table(found))


def test_other_seeds_would_be_found(monkeypatch):
    """The reference has its seeds from the constants, not from the sampler that it judges."""
    case = Case(batch=2)
    made = built("draw:torch", case)
    made.seeds[1] += 1
    assert sampler.parity("draw:torch", made, case, case.logits()) is False


# -- what is said -----------------------------------------------------------------------------------------------------


def test_ratios_are_to_audiocraft_of_the_same_case_and_round():
    one, two = Case(), Case(batch=4)
    rows = [
        Row(one, "audiocraft", 0, [90.0, 100.0, 500.0]),
        Row(one, "draw:torch", 0, [40.0, 50.0, 50.0]),
        Row(one, "audiocraft", 1, [300.0]),
        Row(one, "draw:torch", 1, [50.0]),
        Row(two, "draw:torch", 0, [1.0]),
    ]
    assert [sampler.ratio(row, rows) for row in rows] == [1.0, 2.0, 1.0, 6.0, None]
    found = Found(rows, {(two, "vllm"): "not | here"}, {rows[1].key: True})
    text = sampler.table(found)
    assert "| draw:torch | 50.0 [43.0..50.0] | 4.00 | ok |" in text
    assert "| vllm | absent: not / here | | |" in text and "| draw:torch | 1.0 [1.0..1.0] | - | - |" in text
    found.costs = {rows[1].key: {"kernels": 1.0, "kernel_us": 2.5, "graph_us": 3.25}}
    found.costs[rows[0].key] = {"graph_absent": "no | graph"}
    text = sampler.table(found)
    assert "| 4.00 | ok | 1.0 | 2.5 | 3.25 |" in text and "| 1.00 | - | - | - | no / graph |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {8}


def test_lines_have_the_fields_of_the_committed_ones():
    """What is absent has nulls."""
    found = Found([Row(Case(), "audiocraft", 0, [2.0])], {(Case(), "vllm"): "gone", (Case(batch=2), "vllm"): "gone"})
    timed, absent = sampler.lines(found, Case())
    assert timed["us"] == {"p50": 2.0, "p10": 2.0, "p90": 2.0} and absent["absent"] == "gone" and absent["us"] is None
    committed = sorted((ROOT / "benchmarks" / "results").glob("*-sampler.jsonl"))[-1]
    assert set(json.loads(committed.read_text().splitlines()[0])) == set(timed) | {"threads", "machine"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose costs are real ones")
def test_costs_on_a_device_that_is_not_there():
    assert set(sampler_device.device_costs(Case("cuda"), "draw:torch")) == {"graph_absent"}


def test_the_place_is_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), sampler.place(torch.device("cpu"), before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_line_names_what_there_is():
    assert cli.PROVIDERS == tuple(sampler_peers.SAMPLERS) and set(cli.PRECISIONS) == set(DTYPES)
    assert cli.VOCAB == Case().vocab
    for device in ("cpu", "cuda"):
        assert set(sampler_peers.default_names(device)) <= set(cli.PROVIDERS)
    assert "audiocraft" in sampler_peers.default_names("cpu") and "draw:cuda" in sampler_peers.default_names("cuda:1")


@pytest.mark.parametrize("text", ["none", "top_k1", "top_k2048", "top_p0.9", "top_p.05"])
def test_filters(text):
    assert cli._filter(text) == Case(filter=text).filter


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--providers", "draw:metal"], "expected some of audiocraft,"),
        (["--precision", "int8"], "got 'int8'"),
        (["--filters", "none,top_q3"], "got 'top_q3'"),
        (["--filters", "top_p1.5"], "got 'top_p1.5'"),
        (["--filters", "top_p0.0"], "got 'top_p0.0'"),
        (["--filters", "top_k2049"], "a codebook has 2048 tokens"),
        (["--batch", "1,0"], "at least 1"),
        (["--codebooks", "4,"], "at least 1"),
        (["--seconds", "0"], "above 0"),
        (["--rounds", "0"], "at least 1"),
        (["--threads", "0"], "at least 1"),
        (["--peers", "vllm"], "unrecognized arguments: --peers"),
    ],
)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "sampler", *argv])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "message"),
    [("meta", "measured on a CPU or a CUDA device"), ("cuda:99", "cuda"), ("abc", "unknown device")],
)
def test_devices_that_are_none(device, message, capsys):
    assert main(["bench", "sampler", "--device", device]) == 1
    assert message in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys; from musicgen_fast.cli import main\ntry: main(['bench', 'sampler', '-h'])\n"
    done = subprocess.run([sys.executable, "-c", code + "finally: print('torch' in sys.modules)"], text=True,
                          capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False" and "--providers" in done.stdout


QUICK = ["bench", "sampler", "--device", "cpu", "--rounds", "1", "--seconds", "0.001", "--threads", "1"]


def test_the_command_writes_json_lines(tmp_path):
    """From a folder that is not the checkout."""
    file = tmp_path / "lines.jsonl"
    options = "--batch 1,2 --codebooks 2 --filters top_k50,none --precision float32,bfloat16 --rounds 2"
    names = ["audiocraft", "draw:torch", "sample:torch", "draw:triton"]
    argv = [sys.executable, "-m", "musicgen_fast", *QUICK, *options.split(), "--providers", ",".join(names)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*argv, "--json", str(file)], env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    absent = [line for line in lines if "absent" in line]
    timed = [line for line in lines if "absent" not in line]
    assert len(timed) == 2 * 2 * 2 * 3 * 2 and {line["provider"] for line in timed} == set(names[:3])
    assert len(absent) == 2 * 2 * 2 and {line["provider"] for line in absent} == {"draw:triton"}
    for line in timed:
        assert line["us"]["p10"] <= line["us"]["p50"] <= line["us"]["p90"] and line["machine"]["versions"]["torch"]
        assert line["times_faster_than_audiocraft"] > 0 and line["threads"] == 1
        ours = line["provider"] != "audiocraft"
        assert line["parity"] is (True if ours else None) and (ours or line["times_faster_than_audiocraft"] == 1)
    assert all(line["parity"] is None and line["us"] is None and "CUDA" in line["absent"] for line in absent)
    assert done.stdout.count("| audiocraft |") == 8 and "batch 2, 2 codebooks, none, bfloat16" in done.stderr


def test_a_wrong_backend_gives_exit_code_1(monkeypatch, capsys):
    monkeypatch.setitem(backends._DRAW, "torch", off_by_one)
    argv = [*QUICK, "--batch", "1", "--filters", "none", "--providers", "audiocraft,draw:torch", "-q", "--json", "-"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["parity"] for line in out.splitlines()] == [None, False]
    assert err == (
        "musicgen-fast: draw:torch at batch 1, 4 codebooks, none, float32: "
        "its tokens are not those of the torch reference\n"
    )
    monkeypatch.undo()
    assert main(argv) == 0 and capsys.readouterr().err == ""
