"""The sampler benchmark: do its samplers sample what they claim?

Times are not looked at. Everything runs on the CPU; what needs CUDA is in test_bench_gpu.py.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from musicgen_fast import native

from .oracle import audiocraft_lm as oracle

ROOT = Path(__file__).resolve().parent.parent
FILTERS = ("top_k250", "top_p0.9", "none")


def module(name: str):
    """A script of benchmarks/, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module(name)


peers, bench = module("sampler_peers"), module("bench_sampler")
NAMES = [name for name in peers.peers("cpu") if name != "compiled"]  # compiling takes 20 s


def built(name: str, case):
    try:
        return peers.build(name, case)
    except peers.AbsentError as reason:
        pytest.skip(f"absent: {reason}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FILTERS)
def test_every_sampler_draws_from_the_kept_tokens(name, kind):
    case = peers.Case(batch=3, codebooks=2, filter=kind, vocab=512)
    logits, sampler = case.logits(), built(name, case)
    p = peers.guided(logits, 3.0).softmax(-1)
    ranked = p.sort(-1, descending=True)
    if case.top_k:
        kept = p >= ranked.values[..., case.top_k - 1, None] * (1 - 1e-5)
    else:
        inside = ranked.values.cumsum(-1) - ranked.values <= (case.top_p or 2) + 1e-5
        kept = torch.zeros_like(inside).scatter_(-1, ranked.indices, inside)
    seen = set()
    for _ in range(10):
        tokens = peers.tokens_of(sampler, logits)
        assert tokens.shape == (3, 2) and kept.gather(-1, tokens.long()[..., None]).all()
        seen.add(tuple(tokens.flatten().tolist()))
    assert len(seen) > 1  # every draw is a new one


@pytest.mark.parametrize("kind", FILTERS)
@oracle.needs_audiocraft
def test_the_chain_draws_what_audiocraft_draws(kind):
    oracle.load()
    from audiocraft.utils import utils

    case = peers.Case(batch=5, filter=kind, temperature=0.8)
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
    assert torch.equal(peers.audiocraft_chain(logits, case), expected[..., 0])


@pytest.mark.parametrize("kind", FILTERS)
def test_the_chain_draws_what_our_noise_mode_draws(kind):
    case = peers.Case(batch=5, filter=kind, temperature=0.8)
    logits, sampler = case.logits(), built("noise:torch", case)
    torch.manual_seed(12)
    ours = peers.tokens_of(sampler, logits)
    torch.manual_seed(12)
    assert torch.equal(peers.audiocraft_chain(logits, case), ours)


def test_a_sequence_is_emptied_when_it_is_full():
    case = peers.Case(vocab=64)
    logits, sampler = case.logits(), built("draw:torch", case)
    for _ in range(peers.COLUMNS + 2):
        assert (peers.tokens_of(sampler, logits) >= 0).all()
    assert (sampler.sequence[:, :, sampler.next :] == -1).all()


def test_what_cannot_run_is_absent_with_its_reason(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no compiler found\nmany more lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(peers.AbsentError, match="^RuntimeError: no compiler found$"):
        peers.build("compiled", peers.Case(vocab=64))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert peers.tokens_of(peers.build("compiled", peers.Case()), peers.Case().logits()).shape == (1, 4)
    gone: dict = {}
    monkeypatch.setattr(native, "why_not", lambda: "turned off")
    assert bench.measure(peers.Case(), ["sample:cpu"], 1, 0.0, gone) == []
    assert gone == {(peers.Case(), "sample:cpu"): "turned off"}


@pytest.mark.parametrize("wrong", [{"filter": "top_q3"}, {"filter": "top_p7"}, {"dtype": "int8"}, {"batch": 0}])
def test_cases_that_mean_nothing(wrong):
    with pytest.raises(ValueError):
        peers.Case(**wrong)


def test_ratios_are_to_audiocraft_of_the_same_case_and_round():
    one, two = peers.Case(), peers.Case(batch=4)
    rows = [
        bench.Row(one, "audiocraft", 0, [90.0, 100.0, 500.0]),
        bench.Row(one, "draw:torch", 0, [40.0, 50.0, 50.0]),
        bench.Row(one, "audiocraft", 1, [300.0]),
        bench.Row(one, "draw:torch", 1, [50.0]),
        bench.Row(two, "draw:torch", 0, [1.0]),
    ]
    assert [bench.ratio(row, rows) for row in rows] == [1.0, 2.0, 1.0, 6.0, None]
    text = bench.table(rows, {(two, "vllm"): "not installed"}, {})
    assert "| draw:torch | 50.0 [43.0..50.0] | 4.00 |" in text
    assert "| vllm | absent: not installed | |\n" in text + "\n" and "| draw:torch | 1.0 [1.0..1.0] | - |" in text
    on_device = {rows[1].key: {"kernels": 1.0, "kernel_us": 2.5, "graph_us": 3.25}}
    assert "| 4.00 | 1.0 | 2.5 | 3.25 |" in bench.table(rows, {}, on_device)


def run(*command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    return subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, text=True,
                          capture_output=True, timeout=120)  # fmt: skip


def test_the_script_writes_json_lines(tmp_path):
    file = tmp_path / "lines.jsonl"
    options = "--batch 1,2 --codebooks 2 --filters top_k50,none --rounds 2 --seconds 0 --threads 1"
    names = "audiocraft,draw:torch,sample:torch"
    script = str(ROOT / "benchmarks" / "bench_sampler.py")
    done = run(script, *options.split(), "--peers", names, "--json", str(file))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2 * 2 * 3 * 2 and {line["provider"] for line in lines} == set(names.split(","))
    for line in lines:
        assert line["us"]["p10"] <= line["us"]["p50"] <= line["us"]["p90"] and line["machine"]["versions"]["torch"]
        assert line["times_faster_than_audiocraft"] > 0
        assert line["provider"] != "audiocraft" or line["times_faster_than_audiocraft"] == 1
    assert done.stdout.count("| audiocraft |") == 4
