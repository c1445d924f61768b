"""The CUDA decoder on the CPU: its launches in plain torch, and captures that are noted and replayed.

What a kernel computes is tested with the kernels; here is all that is around them: pools, tables, boards, buckets.
The tests of the engine run on this decoder too.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from musicgen_fast.checkpoints.random_weights import random_checkpoint
from musicgen_fast.config import ModelConfig, TextConfig
from musicgen_fast.decoder_for import logits_error
from musicgen_fast.decoders.cuda import CudaDecoder
from musicgen_fast.decoders.cuda_graphs import launch_at_once
from musicgen_fast.decoders.cuda_ops import torch_ops
from musicgen_fast.decoders.torch import TorchDecoder
from musicgen_fast.model import Transformer
from musicgen_fast.quantised import quantise
from musicgen_fast.slot_engine import SlotEngine
from musicgen_fast.state import Branch, Conditions

from .engine_tools import (
    STEREO,
    WAYS,
    WINDOW,
    build_decoder,
    plain,
    prompt_of,
    sampler_for,
    text_conditions,
    texts,
)
from .fake_capture import FakeCapture
from .test_cpu_decoder import small  # noqa: F401  (a fixture)
from .test_decoder import random_model
from .test_engine import request

CPU = torch.device("cpu")


def decoder_of(model: Transformer, **options) -> CudaDecoder:
    return CudaDecoder(model, torch_ops(CPU), capture=options.pop("capture", launch_at_once), **options)


# -- against the reference ----------------------------------------------------------------------------------------


KINDS = {
    "cross": {},
    "odd": {"dim": 36, "num_heads": 3, "ffn_dim": 70},
    "stereo": {"num_codebooks": 8, "pattern": STEREO},
}


@pytest.mark.parametrize("prompt", [0, 7])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_reference(kind, way, prompt):
    """In noise mode and with counters, over windows."""
    model = random_model("cross", **KINDS[kind])
    codebooks, conditions = model.config.num_codebooks, text_conditions(2)
    if model.config.dim != 32:
        generator = torch.Generator().manual_seed(1)
        branch = Branch(cross=[torch.randn(n, model.config.dim, generator=generator) for n in (3, 5)])
        conditions = Conditions(2, [branch, Branch()], 2)
    for seeds in (None, [3, 4]):
        tokens = []
        for decoder in (TorchDecoder(model), decoder_of(model)):
            torch.manual_seed(1)
            sampler, known = sampler_for(2, way, seeds, codebooks), prompt_of(2, prompt, codebooks)
            tokens.append(plain(decoder, 50, conditions, sampler, known))
        assert torch.equal(*tokens)


def test_prefixes_of_other_lengths_per_row():
    model = random_model("prefix")
    branches = [Branch(prefix=texts(4, 6)), Branch(prefix=texts(2, 6, seed=1))]
    conditions = Conditions(2, branches, 2)
    tokens = [plain(d, 40, conditions, sampler_for(2, seeds=[1, 2])) for d in (TorchDecoder(model), decoder_of(model))]
    assert torch.equal(*tokens)


def test_folded_texts_are_the_same_algebra():
    """Alone folded, in a crowd not; and a text that is too long never."""
    model = random_model("cross")
    decoder = decoder_of(model, fold=True)
    for lengths, way in (((3,), "folded"), ((3, 5), "folded"), ((9, 8), "plain"), ((40,), "plain")):
        conditions = Conditions(len(lengths), [Branch(cross=texts(*lengths)), Branch()], 2)
        seeds = list(range(len(lengths)))
        expected = logits_of(decoder_of(model), conditions)
        torch.testing.assert_close(logits_of(decoder, conditions), expected, rtol=2e-4, atol=2e-4)
        assert [key[2] for key in decoder._graphs][-1] == way
        assert torch.equal(
            plain(decoder, 40, conditions, sampler_for(len(lengths), seeds=seeds)),
            plain(TorchDecoder(model), 40, conditions, sampler_for(len(lengths), seeds=seeds)),
        )


@pytest.mark.slow
def test_small_for_60_steps(small):  # noqa: F811
    """Greedy and in noise mode, at musicgen-small's size."""
    states = torch.randn(1, 9, small.config.dim, generator=torch.Generator().manual_seed(2))
    conditions = Conditions(1, [Branch(cross=list(states)), Branch()], 2)
    for way in ("greedy", "top-k"):
        tokens = []
        for decoder in (TorchDecoder(small), decoder_of(small)):
            torch.manual_seed(3)
            tokens.append(plain(decoder, 60, conditions, sampler_for(1, way), window=60, stride=30))
        assert torch.equal(*tokens)


def halved(checkpoint) -> Transformer:
    """The matrices in float16, norms and conditioners as they are: what a GPU is given."""
    own = ("text_proj", "melody_proj")
    weights = {n: w.half() if w.dim() == 2 and not n.startswith(own) else w for n, w in checkpoint.lm.items()}
    return Transformer.from_weights(checkpoint.config, weights)


@pytest.mark.parametrize(("quantised", "limit"), [(False, 2e-3), (True, 0.025)])
def test_float16_over_200_steps(quantised, limit):
    """Teacher-forced, against float32 of the weights before they were rounded. As deep as musicgen-small."""
    checkpoint = random_checkpoint(
        ModelConfig(dim=128, num_layers=24, num_heads=4, ffn_dim=256, text=TextConfig(dim=24))
    )
    exact, model = Transformer.from_weights(checkpoint.config, checkpoint.lm), halved(checkpoint)
    if quantised:
        quantise(model)
    assert 1e-5 < logits_error(decoder_of(model), exact, frames=197) < limit


def logits_of(decoder, conditions, steps: int = 20):
    """Of every column of a greedy run that is forced to a plain decoder's tokens: [columns, R, K, V]."""
    kept, inner = [], decoder._forward

    def forward(states, filters):
        kept.append(inner(states, filters).clone())
        return kept[-1]

    decoder._forward = forward
    plain(decoder, steps, conditions, sampler_for(conditions.batch, "greedy", [1] * conditions.batch))
    decoder._forward = inner
    return torch.stack(kept)


@pytest.mark.parametrize(("what", "limit"), [("int8 keys and values", 0.01), ("int8 weights", 0.03)])
def test_eight_bits(what, limit):
    """Near full precision, and not the same: before the first token that differs."""
    model = random_model("cross", dim=64, ffn_dim=128)
    generator = torch.Generator().manual_seed(1)
    conditions = Conditions(1, [Branch(cross=[torch.randn(5, 64, generator=generator)]), Branch()], 2)
    expected = logits_of(decoder_of(model), conditions)
    if what == "int8 weights":
        quantise(model)
        assert (
            model.layers[0].qkv.weight.dtype == model.heads.weight.dtype == torch.int8 and model.dtype == torch.float32
        )
    found = logits_of(decoder_of(model, kv="int8" if "keys" in what else None), conditions)
    errors = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert 1e-6 < errors[1] < limit and errors[:3].max() < limit


def test_eight_bits_of_a_prompt_are_those_of_steps():
    """What a prefill writes into an int8 cache is what steps would have written."""
    model, conditions = random_model("cross"), text_conditions(1)
    for kv in (None, "int8"):
        decoder = decoder_of(model, kv=kv)
        whole = plain(decoder, 20, conditions, sampler_for(1, "greedy", [1]))
        again = plain(decoder, 20, conditions, sampler_for(1, "greedy", [1]), whole[:, :, :10])
        assert (whole == again).float().mean() > 0.9


# -- graphs -------------------------------------------------------------------------------------------------------


def test_a_graph_serves_every_request_of_its_bucket():
    """Captured once; other texts, parameters, lengths, windows and slots are in the tensors."""
    decoder = build_decoder("cuda")
    decoder.prepare(4, WINDOW + 8)
    assert decoder.fake.captured == 2
    for number, way in enumerate(("top-k", "greedy", "plain", "top-k")):
        engine = SlotEngine(decoder, 4, WINDOW, shadow=False)
        engine.admit(request(number, total=9 + 20 * number, text=number))
        if number:
            engine.admit(request(number, total=5, text=number + 7, way=way, branches=number - 1 or 2))
        while engine.running:
            engine.step()
    assert decoder.fake.captured == 2, "for two rows and for four"
    assert decoder.fake.replayed == len(decoder.rows)


def test_graph_and_eager_are_equal():
    model, conditions = random_model("cross"), text_conditions(2)
    fake = FakeCapture(torch_ops(CPU))
    captured = CudaDecoder(model, fake.ops, capture=fake)
    tokens = [plain(d, 60, conditions, sampler_for(2, seeds=[1, 2])) for d in (captured, decoder_of(model))]
    assert torch.equal(*tokens) and fake.captured == 1


def test_prepared_buckets_are_captured_from_the_large_ones_on():
    decoder = build_decoder("cuda")
    decoder.prepare(16, 40)
    assert [key[1] for key in decoder._graphs] == [16, 8, 4, 2]
    plain(decoder, 20, text_conditions(8), sampler_for(8, seeds=list(range(8))))
    plain(decoder, 20, text_conditions(1), sampler_for(1, seeds=[1]))
    assert decoder.fake.captured == 4
    decoder.allocate(2, 400)
    assert not decoder._graphs, "what was captured reads memory that is gone"
    plain(decoder, 20, text_conditions(1), sampler_for(1, seeds=[1]))
    assert decoder.fake.captured == 5


class NothingWaits(TorchDispatchMode):
    """Refuses what would read the device, or make a shape of what lies there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique2"), name
        for index in args[1] if name == "index" else ():
            assert index is None or index.dtype != torch.bool, "the shape depends on a mask's content"
        return func(*args, **(kwargs or {}))


def test_no_function_of_a_step_waits_for_the_device():
    """All of version 1 but its draw, which is Triton's on a GPU."""
    decoder = decoder_of(random_model("cross"))
    checked = []

    def watched(function):
        def call(*args, **kwargs):
            with NothingWaits():
                function(*args, **kwargs)
            checked.append(function.__name__)

        return call

    for name, function in vars(decoder._ops).items():
        if name != "sample_rows":
            setattr(decoder._ops, name, watched(function))
    plain(decoder, 6, text_conditions(2), sampler_for(2, seeds=[1, 2]))
    assert set(checked) == {"embed", "norm_linear", "linear_parts", "attention", "cross_attention", "advance"}
