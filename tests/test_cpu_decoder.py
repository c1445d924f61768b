"""The CPU decoder's numbers: against the reference transformer, between ways of cutting the work, between machines."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from musicgen_fast import native
from musicgen_fast.checkpoints.random_weights import random_checkpoint
from musicgen_fast.config import ModelConfig, TextConfig
from musicgen_fast.decoders.cpu import CpuDecoder
from musicgen_fast.decoders.torch import TorchDecoder
from musicgen_fast.model import Transformer
from musicgen_fast.packing import PACKED_PRECISIONS, pack_weights, packed_layout, unpack_weights
from musicgen_fast.state import Branch, Conditions

from .engine_tools import STEREO, WAYS, plain, sampler_for
from .test_decoder import random_model

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")

# Heads of 16 for two threads; three heads; heads of 12 and widths that are no multiples of 16; inputs of a group and a
# quarter; one head; eight codebooks.
KINDS: dict[str, dict[str, Any]] = {
    "cross": {},
    "prefix": {"conditioning": "prefix", "dim": 48, "num_heads": 3},
    "odd": {"dim": 36, "num_heads": 3, "ffn_dim": 70, "vocab_size": 51},
    "wide": {"dim": 160, "num_heads": 5, "ffn_dim": 200, "vocab_size": 37},
    "one head": {"num_heads": 1, "num_layers": 1, "ffn_dim": 33},
    "stereo": {"num_codebooks": 8, "pattern": STEREO, "dim": 40},
}
STEPS = 21  # positions of the tests: more than a tile of 16


def model_of(kind: str) -> Transformer:
    return random_model(**{"conditioning": "cross", **KINDS[kind]})


def decoder_of(model: Transformer, precision: str = "float32", **options: Any) -> CpuDecoder:
    return CpuDecoder(pack_weights(model.config, dict(model.state_dict()), precision), **options)


def inputs_of(config: ModelConfig, rows: int = 2, steps: int = STEPS) -> dict[str, Any]:
    """Arguments of `decoded`: tokens, and a text or a prefix for each row, all of other lengths."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, config.vocab_size + 1, (rows, config.num_codebooks, steps), generator=g)
    states = [torch.randn(3 + 2 * row, config.dim, generator=g) for row in range(rows)]
    return {"tokens": tokens, ("cross" if config.conditioning == "cross" else "prefix"): states}


def reference(model: Transformer, tokens: Tensor, prefix: list[Tensor] = (), cross: list[Tensor] = ()) -> Tensor:
    """Logits [R, S, K, V], row by row; rows beyond the texts attend to none."""
    with torch.no_grad():
        rows = [
            model(t[None], prefix[r][None] if len(prefix) else None, cross[r][None] if r < len(cross) else None)
            for r, t in enumerate(tokens)
        ]
    return torch.cat(rows)


def decoded(
    decoder: CpuDecoder, tokens: Tensor, prefix: list[Tensor] = (), cross: list[Tensor] = (), cuts: list[int] = ()
) -> Tensor:
    """Logits [R, S, K, V] through the binding itself, in passes that end at the positions `cuts`; no cuts: one."""
    lengths = [len(p) for p in prefix] or [0] * len(tokens)
    rows, codebooks, steps = tokens.shape
    cache, texts = decoder.allocate(rows, max(lengths) + steps), decoder._texts(list(cross))
    decoder._require_positions(cache.capacity)
    result = np.full((rows, steps, codebooks * decoder.config.vocab_size), np.nan, np.float32)
    ends = [*(cut for cut in cuts if cut < max(lengths) + steps), max(lengths) + steps]
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        segments, fed, states, wanted, targets, count = [], [], [], [], [], 0
        for row, length in enumerate(lengths):
            last = min(end, length + steps)
            if last <= first:
                continue
            embedded = max(0, min(last, length) - first)
            text = (1, row, texts.lengths[row]) if row < len(cross) else (-1, 0, 0)
            segments.append((0, row, first, last - first, *text, embedded))
            states += list(prefix[row][first : first + embedded]) if embedded else []
            columns = range(max(first - length, 0), max(last - length, 0))
            fed += list(tokens[row, :, columns.start : columns.stop].T)
            wanted += range(count + embedded, count + last - first)
            targets += [(row, column) for column in columns]
            count += last - first
        logits = np.empty((len(wanted), result.shape[2]), np.float32)
        decoder._native.run(
            [cache, texts.cache] if cross else [cache],
            np.array(segments, np.int32),
            torch.stack(fed).numpy() if fed else np.empty((0, codebooks), np.int64),
            torch.stack(states).numpy() if states else np.empty((0, decoder.config.dim), np.float32),
            np.array(wanted, np.int32),
            logits,
        )
        for target, own in zip(targets, logits, strict=True):
            result[target] = own
    return torch.from_numpy(result).unflatten(2, (codebooks, -1))


def error(x: Tensor, expected: Tensor) -> float:
    """Relative, of the worst position."""
    return float(((x - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)).max())


# -- against the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_the_reference(kind, threads):
    model = model_of(kind)
    inputs = inputs_of(model.config)
    assert error(decoded(decoder_of(model, threads=threads), **inputs), reference(model, **inputs)) < 1e-5


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.02), ("int8", 0.02), ("int4", 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_smaller_precisions_are_near_it(kind, precision, bound):
    model = model_of(kind)
    inputs = inputs_of(model.config)
    found = error(decoded(decoder_of(model, precision), **inputs), reference(model, **inputs))
    assert 1e-4 < found < bound, "that exact would be another precision"


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("precision", PACKED_PRECISIONS)
def test_every_cache_with_every_precision(precision, kv):
    model = model_of("wide")
    inputs = inputs_of(model.config)
    expected = decoded(decoder_of(model, precision, kv="float32"), **inputs)
    found = error(decoded(decoder_of(model, precision, kv=kv), **inputs), expected)
    assert found == 0 if kv == "float32" else 1e-5 < found < 0.03


def test_rows_without_a_text_attend_to_nothing():
    """Two texts, four rows: the last two are null branches."""
    model = model_of("odd")
    inputs = inputs_of(model.config, rows=4)
    inputs["cross"] = inputs["cross"][:2]
    expected = reference(model, **inputs)
    for cuts in ([], list(range(1, STEPS))):
        assert error(decoded(decoder_of(model), **inputs, cuts=cuts), expected) < 1e-5


@pytest.mark.parametrize("way", ["greedy", *(way for way in WAYS if way != "greedy")])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_torch_decoder(kind, way):
    """60 frames in three windows; what is random comes from the global generator."""
    model = model_of(kind)
    same_tokens(model, decoder_of(model), way, window=30, stride=18)


def same_tokens(model: Transformer, decoder: CpuDecoder, way: str, **plan: int) -> None:
    c = model.config
    states = inputs_of(c)["cross" if c.conditioning == "cross" else "prefix"]
    null = [torch.zeros(2, c.dim) for _ in states]
    given = [Branch(cross=states), Branch()] if c.conditioning == "cross" else [Branch(states), Branch(null)]
    tokens = []
    for each in (TorchDecoder(model), decoder):
        torch.manual_seed(2)
        sampler = sampler_for(2, way, None, c.num_codebooks)
        tokens.append(plain(each, 60, Conditions(2, given, 2), sampler, **plan))
    assert torch.equal(*tokens) and len(tokens[0].unique()) > 8


# -- what must not matter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PACKED_PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_cuts_of_passes_change_no_bit(kind, precision):
    """A prefill at once, position by position, at a tile's edges, and with two threads."""
    model = model_of(kind)
    inputs = inputs_of(model.config, rows=3)
    decoder = decoder_of(model, precision)
    whole = decoded(decoder, **inputs)
    assert whole.isfinite().all()
    for cuts in (list(range(1, 40)), [16], [1, 2, 15, 17, 20], [5, 6, 7]):
        assert torch.equal(decoded(decoder, **inputs, cuts=cuts), whole), cuts
    assert torch.equal(decoded(decoder_of(model, precision, threads=2), **inputs, cuts=[7]), whole)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_long_prefills_are_cut_by_the_decoder(precision):
    """Past the rows that each thread prepares for itself (32), and past those of a pass (64)."""
    model = model_of("wide")
    inputs = inputs_of(model.config, rows=1, steps=150)
    steps = decoded(decoder_of(model, precision), **inputs, cuts=list(range(1, 150)))
    for threads in (1, 2, 3):
        decoder = decoder_of(model, precision, threads=threads)
        assert torch.equal(decoder.logits(inputs["tokens"], cross=inputs["cross"][0][None]), steps)
        assert torch.equal(decoded(decoder, **inputs, cuts=[40, 75]), steps)
        assert torch.equal(decoded(decoder, **inputs), steps)


@pytest.mark.parametrize("precision", PACKED_PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets_give_the_same_bits(kind, precision):
    """int8 and int4 on all; float32 and bfloat16 on all with FMA."""
    model = model_of(kind)
    inputs = inputs_of(model.config, rows=6)  # a matrix unit multiplies from five rows on
    found = {}
    for isa in native.extension().linear_isas():
        decoder = decoder_of(model, precision, isa=isa, kv="int8" if precision == "int4" else None)
        found[isa] = decoded(decoder, **inputs)
        assert torch.equal(decoded(decoder, **inputs, cuts=[9, 10]), found[isa]), isa
    baseline = found.pop("baseline")
    if precision in ("int8", "int4"):
        assert all(torch.equal(x, baseline) for x in found.values())
    for x in found.values():
        assert torch.equal(x, next(iter(found.values()))) and error(x, baseline) < 1e-4


GOLDEN = {  # SHA-256 of the logits
    "int8": "27d9e0037e05b9ad37c85da723fc4afcfe9942327ef0238fe3e590cacab38694",
    "int4": "c181f932c3d3a17390ac81d44c84329afc4b5481188b408407fd273c8febb02d",
}


@pytest.mark.parametrize("precision", GOLDEN)
def test_integer_logits_are_the_same_on_every_machine(precision):
    """Weights, states and positions from integers alone: torch's cosines and random normals are its build's own."""
    config = ModelConfig(160, 2, 5, 200, vocab_size=37, text=TextConfig(dim=12))
    rng = np.random.RandomState(1)  # frozen, as the generators of today are not

    def numbers(*shape: int) -> Tensor:
        return torch.from_numpy(rng.randint(-999, 1000, shape).astype(np.float32) / np.float32(2048))

    shapes = {name: p.shape for name, p in sorted(Transformer(config).state_dict().items())}
    weights = {name: numbers(*shape) for name, shape in shapes.items()}
    for isa in native.extension().linear_isas():
        decoder = CpuDecoder(pack_weights(config, dict(weights), precision), isa=isa)
        rng = np.random.RandomState(2)
        decoder._native.set_positions(numbers(2048, 160).numpy())
        tokens = torch.from_numpy(rng.randint(0, 38, (6, 4, 40)).astype(np.int64))
        logits = decoded(decoder, tokens, cross=[numbers(n, 160) for n in (4, 9, 17)], cuts=[30, 31, 32])
        assert logits.isfinite().all() and logits.std() > 0.1
        assert hashlib.sha256(logits.numpy().tobytes()).hexdigest() == GOLDEN[precision], isa


def test_what_an_int8_step_reads():
    """Bytes of the layout: a matrix takes a byte a weight and 4 for 128 of them."""
    sizes = {name: size for name, form, size in packed_layout(model_of("wide").config, "int8") if form is not None}
    assert sizes["layers.0.qkv.weight"] == 480 * (160 + 2 * 4)
    assert sizes["heads.weight"] == 160 * (160 + 2 * 4)  # 4 codebooks x 37, in tiles of 16


# -- small's size -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Transformer:
    checkpoint = random_checkpoint("small")
    return Transformer.from_weights(checkpoint.config, checkpoint.lm)


@pytest.mark.slow
def test_small_in_float32(small):
    """Logits, then 60 greedy steps and 60 in noise mode. The bound of int8 is that of its use."""
    inputs = inputs_of(small.config, steps=60)
    decoder, expected = decoder_of(small), reference(small, **inputs)
    assert error(decoded(decoder, **inputs), expected) < 1e-4
    for way in ("greedy", "top-k"):
        same_tokens(small, decoder, way, window=60, stride=30)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rounding"), [("int8", 0.02), ("bfloat16", 0.008)])
def test_small_in_smaller_precisions(small, precision, rounding):
    """Against fp32 of the same, rounded weights; and with the rounding. Random weights are the worst case: their
    largest of 128 is 2.7 deviations, and nothing in them is worth more than the rest."""
    inputs = inputs_of(small.config, steps=60)
    packed = pack_weights(small.config, dict(small.state_dict()), precision)
    logits = decoded(CpuDecoder(packed), **inputs)
    rounded = Transformer.from_weights(small.config, unpack_weights(packed))
    assert error(logits, reference(rounded, **inputs)) < 0.015
    assert error(logits, reference(small, **inputs)) < rounding


@pytest.mark.parametrize(
    ("precision", "asked", "best", "packed"),
    [
        ("float32", "", "avx2", True),
        ("float32", "", "baseline", False),
        ("float32", "cpu", "baseline", True),
        ("float32", "torch", "amx", False),
        ("float16", "cpu", "amx", False),
        ("int8", "torch", "baseline", True),
    ],
)
def test_which_decoder_serves(monkeypatch, precision, asked, best, packed):
    from types import SimpleNamespace

    from musicgen_fast.loading import packs

    monkeypatch.setenv("MUSICGEN_FAST_DECODER", asked)
    monkeypatch.setattr(native, "extension", lambda: SimpleNamespace(linear_isas=lambda: ["baseline", best]))
    assert packs(precision, torch.device("cpu")) is packed
    assert not packs(precision, torch.device("meta"))
