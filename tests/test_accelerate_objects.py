"""What `accelerate` does to an object, and `unaccelerate` undoes: attributes, weights, copies, errors."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref

import pytest
import torch

import musicgen_fast
from musicgen_fast import accelerate, unaccelerate

from .oracle import transformers_lm as hf
from .test_accelerate_transformers import NEW, inputs, only_ours, run

OPTIONS = {**inputs("text"), "do_sample": True, "max_new_tokens": NEW, "guidance_scale": 3.0}


@pytest.fixture
def text():
    return hf.build("text")


def test_public_names():
    """Also after the module of our implementation has been imported: no submodule takes the function's name."""
    assert {"accelerate", "unaccelerate"} <= set(musicgen_fast.__all__)
    assert musicgen_fast.accelerate is accelerate and callable(musicgen_fast.accelerate)


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_everything_is_restored(kind):
    model = hf.build(kind)
    before, names, modules = dict(vars(model)), set(model.state_dict()), len(list(model.modules()))
    signature = inspect.signature(model.generate)
    assert accelerate(model) is model and accelerate(model) is model
    assert set(model.state_dict()) == names and len(list(model.modules())) == modules
    assert list(inspect.signature(model.generate).parameters) == list(signature.parameters)
    assert unaccelerate(model) is model and unaccelerate(model) is model
    assert dict(vars(model)) == before
    assert model.generate.__func__ is type(model).generate


def test_accelerate_again_after_unaccelerate(text):
    expected, _ = run(text, **OPTIONS)
    for _ in range(2):
        with only_ours():
            assert torch.equal(run(accelerate(text), **OPTIONS)[0], expected)
        assert torch.equal(run(unaccelerate(text), **OPTIONS)[0], expected)


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(2, 2), [], "facebook/musicgen-small"])
def test_other_objects(thing):
    with pytest.raises(TypeError, match="MusicgenForConditionalGeneration.*AudioGen"):
        accelerate(thing)
    assert unaccelerate(thing) is thing


def test_our_own_model_is_no_live_object_of_others(text, tmp_path):
    mine = musicgen_fast.MusicGen.get_pretrained(hf.save(text, tmp_path), device="cpu")
    with pytest.raises(TypeError, match="supported"):
        accelerate(mine)


def test_subclasses(text):
    cls = type("Mine", (type(text),), {})
    text.__class__ = cls
    expected, _ = run(text, **OPTIONS)
    with only_ours():
        assert torch.equal(run(accelerate(text), **OPTIONS)[0], expected)


# -- weights ---------------------------------------------------------------------------------------------------------


def test_memory_is_stated(text):
    held = accelerate(text).musicgen_fast
    stacked = ("q_proj", "k_proj", "v_proj", "embed_tokens", "lm_heads")
    named = dict(text.decoder.named_parameters())
    copied = [p.nbytes for n, p in named.items() if any(s in n for s in stacked) and "encoder_attn.q_proj" not in n]
    assert held.extra_bytes == sum(copied)
    assert held.extra_bytes + held.shared_bytes == sum(p.nbytes for p in named.values())
    ours = held.lm.transformer.layers[0]
    theirs = text.decoder.model.decoder.layers[0]
    assert ours.ffn_in.weight.data_ptr() == theirs.fc1.weight.data_ptr()
    assert ours.cross_q.weight.data_ptr() == theirs.encoder_attn.q_proj.weight.data_ptr()


def test_gradients_stay_as_they_were(text):
    text.requires_grad_(True)
    accelerate(text)
    assert all(p.requires_grad for p in text.parameters())
    with torch.no_grad():
        run(text, **OPTIONS)
    assert all(p.requires_grad and p.grad is None for p in text.parameters())


def changes():
    def load(model):
        model.load_state_dict(hf.build("text", seed=7).state_dict())

    def train_step(model):
        model.requires_grad_(True)
        weight = model.decoder.model.decoder.layers[1].self_attn.k_proj.weight
        optimizer = torch.optim.SGD([weight], lr=50.0)
        weight.square().sum().backward()
        optimizer.step()

    def replace(model):
        projection = model.decoder.model.decoder.layers[0].self_attn.q_proj
        projection.weight = torch.nn.Parameter(projection.weight.detach().flip(0).clone())

    def heads(model):
        with torch.no_grad():
            model.decoder.lm_heads[1].weight.mul_(-1)

    def text_projection(model):
        with torch.no_grad():
            model.enc_to_dec_proj.weight.mul_(-1)

    def double_and_back(model):
        model.half().float()

    return [load, train_step, replace, heads, text_projection, double_and_back]


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
def test_weights_that_change(text, change):
    first, _ = run(accelerate(text), **OPTIONS)
    change(text)
    with only_ours():
        second, _ = run(text, **OPTIONS)
    expected, _ = run(unaccelerate(text), **OPTIONS)
    assert torch.equal(second, expected) and not torch.equal(second, first)


def test_precision_that_changes(text):
    accelerate(text)
    assert text.musicgen_fast.lm.transformer.dtype == torch.float32
    text.bfloat16()
    with only_ours():
        assert run(text, **OPTIONS)[0].dtype == torch.bfloat16
    assert text.musicgen_fast.lm.transformer.dtype == torch.bfloat16


def test_accelerate_again_reads_the_weights_anew(text):
    """Writing through `.data` leaves no trace in a tensor: asking again is the way."""
    run(accelerate(text), **OPTIONS)
    for layer in text.decoder.model.decoder.layers:
        layer.self_attn.q_proj.weight.data.mul_(-1)
    with only_ours():
        result, _ = run(accelerate(text), **OPTIONS)
    assert torch.equal(result, run(unaccelerate(text), **OPTIONS)[0])


def test_weights_are_read_once(text):
    accelerate(text)
    lm = text.musicgen_fast.lm
    run(text, **OPTIONS)
    assert text.musicgen_fast.lm is lm


def test_parts_that_are_not_ours(text):
    layer = text.decoder.model.decoder.layers[0]
    layer.fc1.bias = torch.nn.Parameter(torch.ones(layer.fc1.out_features))
    with pytest.raises(ValueError, match="fc1.bias"):
        accelerate(text)
    assert "generate" not in vars(text)


def test_parts_that_become_not_ours(text):
    accelerate(text)
    layer = text.decoder.model.decoder.layers[0]
    layer.fc1.bias = torch.nn.Parameter(torch.ones(layer.fc1.out_features))
    with pytest.warns(UserWarning, match="fc1.bias"):
        result, _ = run(text, **OPTIONS)
    assert torch.equal(result, run(unaccelerate(text), **OPTIONS)[0])


@pytest.mark.parametrize("field,value", [("activation_function", "relu"), ("scale_embedding", True)])
def test_configurations_that_are_not_ours(text, field, value):
    setattr(text.config.decoder, field, value)
    with pytest.raises(ValueError, match=field):
        accelerate(text)


def test_offloaded_weights(text):
    text.decoder.model.decoder.layers[0].fc2.to("meta")
    with pytest.raises(ValueError, match="one device"):
        accelerate(text)


# -- copies and the end ----------------------------------------------------------------------------------------------


def test_a_deep_copy_is_accelerated_on_its_own(text):
    expected, _ = run(accelerate(text), **OPTIONS)
    twin = copy.deepcopy(text)
    with torch.no_grad():
        twin.decoder.lm_heads[0].weight.mul_(-1)
    with only_ours():
        other, _ = run(twin, **OPTIONS)
        assert torch.equal(run(text, **OPTIONS)[0], expected)
    assert torch.equal(other, run(unaccelerate(twin), **OPTIONS)[0]) and not torch.equal(other, expected)


def test_pickling_says_what_to_do(text, tmp_path):
    accelerate(text)
    with pytest.raises(TypeError, match="unaccelerate"):
        pickle.dumps(text.musicgen_fast)
    text.save_pretrained(tmp_path)  # weights and configuration: nothing of ours is among them
    assert torch.equal(run(type(text).from_pretrained(tmp_path).eval(), **OPTIONS)[0], run(text, **OPTIONS)[0])


def test_the_model_is_freed_with_its_last_reference():
    model = accelerate(hf.build("text"))
    run(model, **OPTIONS)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None, "a cycle would keep gigabytes until the collector comes"
    finally:
        gc.enable()


def test_threads(text):
    """Two calls at once, greedy: neither sees the other's arguments."""
    calls = [{**inputs("text", n), "max_new_tokens": NEW + n, "guidance_scale": 1.0 + n} for n in (1, 2, 3)]
    expected = [text.generate(**c, do_sample=False) for c in calls]
    accelerate(text)
    results: dict[int, torch.Tensor] = {}

    def work(index):
        results[index] = text.generate(**calls[index], do_sample=False)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(3))
