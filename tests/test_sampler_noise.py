"""Noise mode against torch.multinomial and against audiocraft's own functions: the same torch seed, the same tokens."""

from __future__ import annotations

import pytest
import torch

from musicgen_fast.sampling import Draw, SamplingParams, draw
from musicgen_fast.sampling.noise import divides, multinomial_noise
from musicgen_fast.sampling.reference import scaled

from .oracle import audiocraft_lm as oracle
from .test_sampling import skip_if_missing

backends = pytest.mark.parametrize("backend", ["torch", "cpu"])


def draw_with_noise(logits: torch.Tensor, backend: str, order: str = "audiocraft", **given) -> torch.Tensor:
    """Tokens [B, K] with noise from the global generator, as the generation does it."""
    _, batch, num_codebooks, _ = logits.shape
    params = SamplingParams.build(batch, num_codebooks, **given)
    tokens = torch.empty(batch, num_codebooks, dtype=torch.int64)
    inputs = Draw(logits, params, tokens, torch.zeros(batch, num_codebooks, dtype=torch.int32))
    inputs.noise, inputs.divide = multinomial_noise(logits, params, order), divides(logits.device)
    draw(inputs, backend)
    return tokens


def random_logits(seed: int, batch: int, vocab: int = 2048) -> torch.Tensor:
    return torch.randn(1, batch, 4, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def multinomial_tokens(logits: torch.Tensor, top_k: int, temperature: float) -> torch.Tensor:
    p = torch.softmax(logits[0] / temperature, -1)
    if top_k:
        p = torch.where(p >= p.topk(top_k).values[..., -1:], p, 0.0)
        p = p / p.sum(-1, keepdim=True)
    return torch.multinomial(p.flatten(0, 1), 1).view(p.shape[:2])


def count_differences(draws: int, backend: str) -> tuple[int, int]:
    """Over `draws` tokens without top-p."""
    done = wrong = 0
    while done < draws:
        top_k, temperature = ((0, 1.0), (50, 1.0), (250, 0.7), (250, 1.0))[done // 1000 % 4]
        logits = random_logits(done, 250, vocab=(2048, 400)[done // 4000 % 2])
        torch.manual_seed(done)
        tokens = draw_with_noise(logits, backend, top_k=top_k, temperature=temperature)
        torch.manual_seed(done)
        wrong += int((tokens != multinomial_tokens(logits, top_k, temperature)).sum())
        done += tokens.numel()
    return done, wrong


@pytest.mark.parametrize("backend,draws", [("torch", 4_000), ("cpu", 12_000)])
def test_noise_mode_is_multinomial(backend, draws):
    skip_if_missing(backend)
    assert count_differences(draws, backend)[1] == 0


@pytest.mark.slow
def test_noise_mode_is_multinomial_over_100000_draws():
    skip_if_missing("cpu")
    draws, wrong = count_differences(100_000, "cpu")
    print(f"{draws} draws against torch.multinomial, {wrong} differences")
    assert wrong == 0


def count_differences_to_audiocraft(draws: int) -> tuple[int, int]:
    oracle.load()
    from audiocraft.utils import utils

    done = wrong = 0
    while done < draws:
        logits = random_logits(done + 7, 250)
        temperature, top_k = ((1.0, 250), (0.8, 50), (1.2, 0))[done // 1000 % 3]
        torch.manual_seed(done)
        tokens = draw_with_noise(logits, "cpu", top_k=top_k, temperature=temperature)
        torch.manual_seed(done)
        probs = torch.softmax(logits[0] / temperature, dim=-1)
        if top_k:
            theirs = utils.sample_top_k(probs, k=top_k)
        else:
            theirs = utils.multinomial(probs, num_samples=1)
        wrong += int((tokens != theirs[..., 0]).sum())
        done += tokens.numel()
    return done, wrong


@oracle.needs_audiocraft
def test_noise_mode_is_audiocraft():
    skip_if_missing("cpu")
    assert count_differences_to_audiocraft(6_000)[1] == 0


@oracle.needs_audiocraft
@pytest.mark.slow
def test_noise_mode_is_audiocraft_over_100000_draws():
    skip_if_missing("cpu")
    draws, wrong = count_differences_to_audiocraft(100_000)
    print(f"{draws} draws against audiocraft, {wrong} differences")
    assert wrong == 0


@backends
@pytest.mark.parametrize("order", ["audiocraft", "transformers"])
def test_order_of_the_draw_under_top_p(order, backend):
    """audiocraft draws among the sorted probabilities, transformers among those of the vocabulary in its order."""
    skip_if_missing(backend)
    logits = random_logits(6, 50, 512)
    torch.manual_seed(9)
    tokens = draw_with_noise(logits, backend, order, top_p=0.8)
    ranked, ids = torch.softmax(logits[0], -1).view(200, -1).sort(descending=True)
    ranked[ranked.cumsum(-1) - ranked > 0.8] = 0
    torch.manual_seed(9)
    if order == "audiocraft":
        expected = ids.gather(1, torch.multinomial(ranked / ranked.sum(-1, keepdim=True), 1))
    else:
        p = torch.zeros_like(ranked).scatter_(1, ids, ranked)
        expected = torch.multinomial(p / p.sum(-1, keepdim=True), 1)
    assert torch.equal(tokens, expected.view(50, 4))


def test_a_request_without_top_p_draws_in_its_own_order():
    """Beside one that has it."""
    logits = random_logits(7, 2, 512)
    torch.manual_seed(3)
    tokens = draw_with_noise(logits, "torch", top_p=torch.tensor([0.8, 0.0]))
    torch.manual_seed(3)
    assert torch.equal(tokens[1], multinomial_tokens(logits, 0, 1.0)[1])


def test_top_p_of_one_still_draws_in_sorted_order():
    logits = random_logits(8, 20, 256)
    torch.manual_seed(1)
    tokens = draw_with_noise(logits, "torch", top_p=1.0)
    ranked, ids = torch.softmax(logits[0], -1).view(80, -1).sort(descending=True)
    torch.manual_seed(1)
    assert torch.equal(tokens.view(80, 1), ids.gather(1, torch.multinomial(ranked, 1)))


@backends
def test_temperature_divides_on_a_cpu(backend):
    """The references divide there; a product with the inverse rounds differently, and may draw differently."""
    skip_if_missing(backend)
    assert divides(torch.device("cpu")) and not divides(torch.device("cuda"))
    params = SamplingParams.build(1, 4, temperature=0.7)
    logits = random_logits(4, 1)
    divided = scaled(logits[0], params, torch.float32, divide=True)
    assert torch.equal(divided, logits[0] / torch.tensor(0.7))
    assert not torch.equal(divided, scaled(logits[0], params, torch.float32, divide=False))
    # Two logits that tie after one of the two roundings only: top-k keeps one token or both.
    found = logits.flatten()[(logits / 0.7).flatten() != (logits * (1 / torch.tensor(0.7))).flatten()]
    for base in found.tolist():
        pair = torch.tensor([base, torch.tensor(base).nextafter(torch.tensor(9e9)).item()])
        quotient, product = pair / torch.tensor(0.7), pair * (1 / torch.tensor(0.7))
        if (quotient[0] == quotient[1]) != (product[0] == product[1]):
            break
    else:
        pytest.fail("no such pair in this row")
    both = quotient[0] == quotient[1]
    rows = pair.view(1, 1, 1, 2).expand(1, 64, 1, 2)
    torch.manual_seed(0)
    tokens = draw_with_noise(rows, backend, top_k=1, temperature=0.7)
    assert (len(tokens.unique()) == 2) == bool(both)
