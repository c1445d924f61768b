"""The reference sampler against the golden tokens, an independent sort-based twin, and the laws of its distribution."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen_fast import philox, sampling
from musicgen_fast.sampling import SamplingParams, _scaled, mix_branches, sample, sample_with_noise

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


@pytest.mark.parametrize(
    "case", GOLDEN["cases"] + GOLDEN["special"], ids=lambda c: f"{c['case']}-{c['kind']}-{c['dtype']}"
)
def test_golden_tokens(case):
    keys = ("temperature", "top_k", "top_p", "min_p", "cfg_coef", "cfg_coef_beta")
    drawn = sample(
        golden_logits(case),
        **{k: torch.tensor(case[k]) if isinstance(case[k], list) else case[k] for k in keys},
        seed=torch.tensor(case["seeds"]),
        step=case["step"] if isinstance(case["step"], int) else torch.tensor(case["step"]),
        stream=torch.tensor(case.get("streams", 0)),
    )
    assert drawn.tolist() == case["tokens"]


def reference_keep(p: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Kept tokens by a plain sort over probabilities in float64."""
    order = np.argsort(-p, kind="stable")
    keep = np.ones(len(p), bool)
    if 0 < top_k < len(p):
        keep &= p >= p[order[top_k - 1]]
    if 0 < top_p < 1:
        kept = np.where(keep, p, 0)
        before = np.cumsum(kept[order]) - kept[order]
        keep[order[before > top_p * kept.sum()]] = False
    return keep


@pytest.mark.parametrize("top_k,top_p,temperature", [(0, 0.0, 1.0), (5, 0.0, 1.0), (0, 0.6, 1.3), (12, 0.7, 0.8)])
def test_distribution(top_k, top_p, temperature):
    """Chi-square of 40,000 draws against the exact probabilities: a bound past the 1e-6 quantile, fixed seeds."""
    logits = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 2
    p = np.exp((logits.double() / temperature).numpy())
    p /= p.sum()
    keep = reference_keep(p, top_k, top_p)
    p = np.where(keep, p, 0) / p[keep].sum()
    draws = 40_000
    tokens = sample(
        logits.view(1, 1, 1, -1).expand(1, draws, 1, -1),
        temperature=temperature, top_k=top_k, top_p=top_p, seed=torch.arange(draws), step=7,
    )  # fmt: skip
    counts = np.bincount(tokens.flatten().numpy(), minlength=32)
    assert counts[~keep].sum() == 0
    expected = p[keep] * draws
    chi2 = float(((counts[keep] - expected) ** 2 / expected).sum())
    dof = keep.sum() - 1
    assert chi2 < dof + 7 * math.sqrt(2 * dof) + 12


def test_a_request_does_not_depend_on_its_batch():
    logits = torch.randn(2, 5, 4, 2048, generator=torch.Generator().manual_seed(1))
    seeds = torch.tensor([3, -1, 2**62, 0, 77])
    whole = sample(logits, top_k=250, seed=seeds, step=torch.arange(5))
    for b in (4, 0, 2):
        assert torch.equal(sample(logits[:, b : b + 1], top_k=250, seed=seeds[b : b + 1], step=b)[0], whole[b])


def test_noise_mode_is_multinomial():
    """The same torch seed gives the tokens of softmax -> top-k (ties kept) -> torch.multinomial, as in audiocraft."""
    logits = torch.randn(1, 3, 4, 512, generator=torch.Generator().manual_seed(2)) * 3
    for top_k, temperature in ((0, 1.0), (50, 1.0), (250, 0.7)):
        params = SamplingParams.build(3, 4, temperature=temperature, top_k=top_k)
        torch.manual_seed(5)
        tokens, _ = sample_with_noise(logits, params, torch.empty(12, 512).exponential_(1))
        torch.manual_seed(5)
        p = torch.softmax(logits[0] / temperature, -1)
        if top_k:
            p = torch.where(p >= p.topk(top_k).values[..., -1:], p, 0.0)
        expected = torch.multinomial((p / p.sum(-1, keepdim=True)).view(12, -1), 1).view(3, 4)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("order", ["audiocraft", "transformers"])
def test_order_of_the_draw_under_top_p(order):
    """audiocraft draws among the sorted probabilities, transformers among those of the vocabulary in its order."""
    logits = torch.randn(1, 5, 4, 512, generator=torch.Generator().manual_seed(6)) * 3
    params = SamplingParams.build(5, 4, top_p=0.8)
    torch.manual_seed(9)
    tokens, _ = sample_with_noise(logits, params, torch.empty(20, 512).exponential_(1), order)
    ranked, ids = torch.softmax(logits[0], -1).view(20, -1).sort(descending=True)
    ranked[ranked.cumsum(-1) - ranked > 0.8] = 0
    torch.manual_seed(9)
    if order == "audiocraft":
        drawn = ids.gather(1, torch.multinomial(ranked / ranked.sum(-1, keepdim=True), 1))
    else:
        p = torch.zeros_like(ranked).scatter_(1, ids, ranked)
        drawn = torch.multinomial(p / p.sum(-1, keepdim=True), 1)
    assert torch.equal(tokens, drawn.view(5, 4))


def test_temperature_divides_on_a_cpu_in_noise_mode():
    """The references divide there; a product with the inverse rounds differently, and may draw another token."""
    logits = torch.randn(1, 1, 1, 4096, generator=torch.Generator().manual_seed(4))
    params = SamplingParams.build(1, 1, temperature=0.7)
    divided = _scaled(logits[0], params, torch.float32, divide=True)
    assert torch.equal(divided, logits[0] / torch.tensor(0.7))
    assert not torch.equal(divided, _scaled(logits[0], params, torch.float32, divide=False))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        inner = _scaled
        patch.setattr(sampling, "_scaled", lambda *a, divide: seen.append(divide) or inner(*a, divide=divide))
        sample_with_noise(logits, params, torch.empty(1, 4096).exponential_())
        sample(logits, temperature=0.7, seed=0, step=0)
    assert seen == [True, False]


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


def test_unusable_input():
    logits = torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match=r"\(1, 3\).*NaN or -inf"):
        bad = logits.clone()
        bad[0, 1, 3] = math.nan
        sample(bad, seed=0, step=0)
    with pytest.raises(ValueError, match="temperature is NaN"):
        sample(logits, temperature=math.nan, seed=0, step=0)
    with pytest.raises(ValueError, match=r"\[NB, B, K, V\]"):
        sample(logits[0], seed=0, step=0)
    with pytest.raises(ValueError, match="4096"):
        sample(torch.zeros(1, 1, 1, 5000), seed=0, step=0)
    with pytest.raises(ValueError, match="does not fit"):
        sample(logits, top_k=torch.tensor([1, 2, 3]), seed=0, step=0)


def test_exponential_noise_has_its_law():
    """Mean and variance 1, and the exact tail: words 0 and 2**32 - 1 give the largest and the smallest value."""
    zeros = torch.zeros(64, dtype=torch.int64)
    noise = philox.race_noise(torch.arange(64), zeros, zeros, 4, 2048)
    assert abs(noise.mean().item() - 1) < 0.005 and abs(noise.var().item() - 1) < 0.02
    assert (noise > 0).all()
    ends = philox.exponential(torch.tensor([0, 2**32 - 1]))
    assert ends[0].item() == pytest.approx(-math.log(0.5 / 2**32), rel=1e-6)
    assert ends[1].item() == pytest.approx(0.5 / 2**32, rel=1e-6)
