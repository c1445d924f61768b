"""The public sampler on every backend: golden tokens, the meaning of its arguments, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen_fast import native, philox
from musicgen_fast.sampling import SamplingParams, filtered_probs, sample
from musicgen_fast.sampling.backends import BACKENDS, choose, why_not
from musicgen_fast.sampling.reference import mix_branches

GOLDEN = json.loads((Path(__file__).parent / "assets" / "golden_sampling.json").read_text())


def golden_logits(case: dict) -> torch.Tensor:
    """Inputs by the formula that stands in the golden file (`how`, `how_special`)."""
    shape = (case["NB"], case["B"], case["K"], case["V"])
    i = np.arange(math.prod(shape), dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)

    def uniform(a: int) -> np.ndarray:
        x = (i * np.uint64(0x9E3779B1) + np.uint64(case["case"] * 0x85EBCA6B) + np.uint64(a * 0xC2B2AE35)) & mask
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & mask
        return (x ^ (x >> np.uint64(16))).astype(np.float64) / 2.0**32

    u = [uniform(a) for a in range(1, 6)]
    s = (u[0] + u[1] + u[2] + u[3] - 2) * 6
    kind = case["kind"]
    if kind == "ties":
        s = np.round(s * 4) / 4
    elif kind == "flat":
        s = 0 * s
    elif kind == "inf":
        s = np.where(u[4] < 0.5, -np.inf, s)
    elif kind == "nan":
        s = np.where(u[4] < 0.01, np.nan, s)
    elif kind == "wide":
        s = 20 * s
    logits = torch.from_numpy(s.astype(np.float32)).view(shape)
    if kind == "posinf":
        logits[..., 5::97] = math.inf
    return logits.to(getattr(torch, case["dtype"]))


def golden_arguments(case: dict) -> dict:
    keys = ("temperature", "top_k", "top_p", "min_p", "cfg_coef", "cfg_coef_beta")
    given = {k: torch.tensor(case[k]) if isinstance(case[k], list) else case[k] for k in keys}
    step = case["step"] if isinstance(case["step"], int) else torch.tensor(case["step"])
    return given | {"seed": torch.tensor(case["seeds"]), "step": step, "stream": torch.tensor(case.get("streams", 0))}


# The GPU backends have their own files: test_triton.py, test_cuda_source.py, test_gpu.py.
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    "case", GOLDEN["cases"] + GOLDEN["special"], ids=lambda c: f"{c['case']}-{c['kind']}-{c['dtype']}"
)
def test_golden_tokens(case, backend):
    skip_if_missing(backend)
    drawn = sample(golden_logits(case), **golden_arguments(case), backend=backend)
    assert drawn.tolist() == case["tokens"]


def skip_if_missing(backend: str) -> None:
    if reason := why_not(backend, torch.device("cpu")):
        pytest.skip(reason)


def test_greedy_ties_and_nan():
    logits = torch.tensor([1.0, math.nan, 4.0, 4.0, -math.inf]).view(1, 1, 1, -1)
    assert sample(logits, temperature=0.0, seed=0, step=0).item() == 2
    assert sample(logits, temperature=-3.0, seed=0, step=0).item() == 2
    drawn = sample(logits.expand(1, 500, 1, -1), top_k=1, seed=torch.arange(500), step=0)
    assert set(drawn.flatten().tolist()) == {2, 3}  # top_k=1 keeps the tie


def test_branch_mixing():
    c, w, u = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(3))
    cfg, beta = torch.tensor([3.0, 1.5]), torch.tensor([5.0, 0.5])
    cb, bb = cfg[:, None, None], beta[:, None, None]
    torch.testing.assert_close(mix_branches(torch.stack([c, u]), cfg, beta), u + (c - u) * cb)
    double = mix_branches(torch.stack([c, w, u]), cfg, beta)
    torch.testing.assert_close(double, u + cb * (w + bb * (c - w) - u))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_row_without_a_finite_logit_is_named(backend):
    skip_if_missing(backend)
    bad = torch.zeros(1, 2, 4, 16)
    bad[0, 1, 3] = math.nan
    bad[0, 0, 2] = -math.inf
    for temperature in (1.0, 0.0):
        with pytest.raises(ValueError, match=r"\(0, 2\), \(1, 3\).*NaN or -inf"):
            sample(bad, temperature=temperature, seed=0, step=0, backend=backend)
    with pytest.raises(ValueError, match=r"\(0, 2\), \(1, 3\)"):
        filtered_probs(bad)


@pytest.mark.parametrize(
    "message,given",
    [
        (r"\[NB, B, K, V\]", {"logits": torch.zeros(2, 4, 16)}),
        (r"1 to 3 branches", {"logits": torch.zeros(4, 2, 4, 16)}),
        (r"\[1, 0, 4, 16\]", {"logits": torch.zeros(1, 0, 4, 16)}),
        ("4096", {"logits": torch.zeros(1, 1, 1, 4097)}),
        ("float64", {"logits": torch.zeros(1, 2, 4, 16, dtype=torch.float64)}),
        ("must be a tensor", {"logits": [[[[1.0]]]]}),
        ("temperature is NaN", {"temperature": math.nan}),
        ("top_p is NaN", {"top_p": torch.tensor([0.5, math.nan])}),
        ("cfg_coef is NaN", {"cfg_coef": math.nan}),
        (r"top_k of shape \[3\] does not fit \[2, 4\]", {"top_k": torch.tensor([1, 2, 3])}),
        (r"cfg_coef of shape \[2, 4\] does not fit", {"cfg_coef": torch.ones(2, 4)}),
        ("top_k must hold integers", {"top_k": 2.5}),
        ("min_p must be a number", {"min_p": "0.1"}),
        ("64 bits", {"seed": 2**64}),
        ("must be an int", {"seed": 1.5}),
        ("seed must hold integers", {"seed": torch.tensor([1.0, 2.0])}),
        (r"step of shape \[3\] does not fit \[2\]", {"step": torch.arange(3)}),
        ("backend must be auto, torch, cpu, triton, cuda; got 'gpu'", {"backend": "gpu"}),
    ],
)
def test_bad_input_says_what_is_wrong(message, given):
    arguments = {"logits": torch.zeros(1, 2, 4, 16), "seed": 0, "step": 0} | given
    with pytest.raises((ValueError, TypeError), match=message):
        sample(arguments.pop("logits"), **arguments)


def test_infinite_parameters_mean_something():
    """Temperature inf: all finite logits alike. Coefficients inf: NaN for every token, so an error and no crash."""
    logits = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0)) * 50
    assert torch.allclose(filtered_probs(logits, temperature=math.inf), torch.tensor(1 / 8))
    drawn = sample(logits.expand(-1, 400, -1, -1), temperature=math.inf, seed=torch.arange(400), step=0)
    assert len(drawn.unique()) == 8
    assert SamplingParams.build(1, 1, temperature=3e38).scale.item() == 0  # the inverse is subnormal, hence 0
    huge = torch.full((2, 1, 1, 8), 3.0)
    with pytest.raises(ValueError, match="NaN"):
        sample(huge, cfg_coef=math.inf, seed=0, step=0)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_scalars_rows_and_cells_mean_the_same(backend):
    """A number, one value a request, one a cell; seeds signed, unsigned and as numbers; steps beyond 32 bits."""
    skip_if_missing(backend)
    logits = torch.randn(2, 3, 4, 100, generator=torch.Generator().manual_seed(1)) * 2
    first = sample(logits, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=-5, step=7, backend=backend)
    again = sample(
        logits,
        cfg_coef=torch.full((3,), 3.0),
        temperature=torch.full((3,), 0.8),
        top_k=torch.full((3, 4), 20, dtype=torch.int16),
        top_p=torch.full((1, 4), 0.9),
        min_p=torch.tensor(0.01, dtype=torch.float64),
        seed=torch.full((3,), 2**64 - 5, dtype=torch.uint64),
        step=torch.tensor([7 + 2**32] * 3),
        stream=torch.zeros(3, dtype=torch.int32),
        backend=backend,
    )
    assert torch.equal(first, again)
    assert first.dtype == torch.int64 and first.shape == (3, 4)


def test_half_precision_is_mixed_in_half_precision():
    """float16 logits: u + (c - u) * cfg rounds at every operation, so a float32 mix would choose other maxima."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 64, 4, 2048, generator=g) * 3).half()
    c, u = logits
    expected = (u + (c - u) * torch.tensor(3.0, dtype=torch.half)).float().argmax(-1)
    assert torch.equal(sample(logits, temperature=0.0, seed=0, step=0), expected)
    c, u = logits.float()
    assert not torch.equal(expected, (u + (c - u) * 3.0).argmax(-1))


def test_filtered_probs_is_the_softmax_of_what_is_kept():
    logits = torch.randn(2, 3, 4, 200, generator=torch.Generator().manual_seed(2)) * 2
    c, u = logits.double()
    p = torch.softmax((u + (c - u) * 2.5) / 0.9, -1)
    plain = filtered_probs(logits, cfg_coef=2.5, temperature=0.9)
    torch.testing.assert_close(plain.double(), p, rtol=1e-4, atol=1e-8)
    kept = filtered_probs(logits, cfg_coef=2.5, temperature=0.9, top_k=torch.tensor([1, 10, 0]))
    assert (kept > 0).sum(-1).tolist() == [[1] * 4, [10] * 4, [200] * 4]
    expected = torch.where(p >= p.topk(10).values[..., -1:], p, 0)[1]
    torch.testing.assert_close(kept[1].double(), expected / expected.sum(-1, keepdim=True), rtol=1e-4, atol=1e-8)
    nucleus = filtered_probs(logits, cfg_coef=2.5, temperature=0.9, top_p=0.7)
    mass = torch.where(nucleus > 0, p, 0).sum(-1)
    smallest = torch.where(nucleus > 0, p, 2.0).amin(-1)
    assert (mass > 0.7 - 1e-6).all() and (mass - smallest <= 0.7 + 1e-6).all()
    relative = filtered_probs(logits, cfg_coef=2.5, temperature=0.9, min_p=0.1)
    assert torch.equal(relative > 0, p >= 0.1 * p.amax(-1, keepdim=True))
    torch.testing.assert_close(relative.sum(-1), torch.ones(3, 4))
    greedy = filtered_probs(logits, temperature=0.0)
    assert torch.equal(greedy.argmax(-1), sample(logits, temperature=0.0, seed=0, step=0))
    assert torch.equal(greedy.sum(-1), torch.ones(3, 4)) and (greedy.amax(-1) == 1).all()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_outputs_share_nothing_with_inputs(backend):
    """Nothing that the caller owns is written to, and two calls give two tensors."""
    skip_if_missing(backend)
    logits = torch.randn(1, 2, 4, 50, generator=torch.Generator().manual_seed(3), requires_grad=True)
    before, seed = logits.detach().clone(), torch.tensor([1, 2])
    first = sample(logits, top_k=5, seed=seed, step=0, backend=backend)
    second = sample(logits, top_k=5, seed=seed, step=1, backend=backend)
    assert torch.equal(logits, before) and seed.tolist() == [1, 2]
    assert first.data_ptr() != second.data_ptr() and not first.requires_grad


class TestChoice:
    CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")

    def test_auto(self, monkeypatch):
        monkeypatch.delenv("MUSICGEN_FAST_SAMPLER", raising=False)
        assert choose("auto", self.CPU) is choose("cpu" if native.available() else "torch", self.CPU)
        assert choose("auto", self.OTHER) is choose("torch", self.OTHER)
        monkeypatch.setenv("MUSICGEN_FAST_NATIVE", "0")
        assert choose("auto", self.CPU) is choose("torch", self.CPU)

    def test_the_variable_says_what_auto_means(self, monkeypatch):
        monkeypatch.setenv("MUSICGEN_FAST_SAMPLER", "torch")
        assert choose("auto", self.CPU) is choose("torch", self.CPU)
        if native.available():
            assert choose("cpu", self.CPU) is not choose("torch", self.CPU)  # a name given in code stands
        monkeypatch.setenv("MUSICGEN_FAST_SAMPLER", "fastest")
        with pytest.raises(ValueError, match="MUSICGEN_FAST_SAMPLER must be auto, torch, cpu, triton, cuda"):
            choose("auto", self.CPU)
        monkeypatch.setenv("MUSICGEN_FAST_SAMPLER", "cuda")
        with pytest.raises(RuntimeError, match="MUSICGEN_FAST_SAMPLER=cuda.* needs logits on a CUDA device"):
            sample(torch.zeros(1, 1, 1, 4), seed=0, step=0)

    @pytest.mark.parametrize("backend,reason", [("cuda", "CUDA device"), ("triton", "CUDA device")])
    def test_a_backend_that_cannot_serve_says_why(self, monkeypatch, backend, reason):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(RuntimeError, match=rf"the {backend} sampler .* cannot draw from logits on cpu: .*{reason}"):
            sample(torch.zeros(1, 1, 1, 4), seed=0, step=0, backend=backend)

    def test_missing_libraries_are_named(self, monkeypatch):
        monkeypatch.setenv("MUSICGEN_FAST_NATIVE", "0")
        with pytest.raises(RuntimeError, match="MUSICGEN_FAST_NATIVE=0"):
            choose("cpu", self.CPU)
        assert "MUSICGEN_FAST_NATIVE=0" in why_not("cuda", self.CUDA)
        assert why_not("cpu", self.CUDA) == "it reads the memory of the CPU only"
        assert {name for name in BACKENDS if not why_not(name, self.OTHER)} == {"torch"}

    def test_a_missing_cuda_library_says_how_to_get_it(self, monkeypatch, tmp_path):
        monkeypatch.delenv("MUSICGEN_FAST_NATIVE", raising=False)
        monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / "_cuda.so")
        native._load_cuda.cache_clear()
        assert "nvcc" in why_not("cuda", self.CUDA)
        (tmp_path / "_cuda.so").write_bytes(b"not a library")
        native._load_cuda.cache_clear()
        assert "cannot be loaded" in why_not("cuda", self.CUDA)
        monkeypatch.undo()
        native._load_cuda.cache_clear()


def test_exponential_noise_has_its_law():
    """Mean and variance 1, and the exact tail: words 0 and 2**32 - 1 give the largest and the smallest value."""
    zeros = torch.zeros(64, dtype=torch.int64)
    noise = philox.race_noise(torch.arange(64), zeros, zeros, 4, 2048)
    assert abs(noise.mean().item() - 1) < 0.005 and abs(noise.var().item() - 1) < 0.02
    assert (noise > 0).all()
    ends = philox.exponential(torch.tensor([0, 2**32 - 1]))
    assert ends[0].item() == pytest.approx(-math.log(0.5 / 2**32), rel=1e-6)
    assert ends[1].item() == pytest.approx(0.5 / 2**32, rel=1e-6)
