"""Calls that `accelerate` hands to transformers' own generate: the same result, and one warning that says why."""

from __future__ import annotations

import warnings

import pytest
import torch

import musicgen_fast

from .oracle import transformers_lm as hf
from .test_accelerate_results import Streamer
from .test_accelerate_transformers import NEW, inputs, run


@pytest.fixture
def text():
    return hf.build("text")


def processor(ids, scores):
    return scores + torch.arange(scores.shape[-1]).flip(0) * 0.2


def criterion(ids, scores, **_):
    return torch.zeros(len(ids), dtype=torch.bool)


CALLS = {
    "logits_processor": lambda: {"logits_processor": [processor]},
    "stopping_criteria": lambda: {"stopping_criteria": [criterion]},
    "RepetitionPenalty": lambda: {"repetition_penalty": 1.3},
    "MinP": lambda: {"min_p": 0.05},
    "MaxTime": lambda: {"max_time": 1000.0},
    "EosToken": lambda: {"eos_token_id": 70},
    "output_scores": lambda: {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": lambda: {"output_logits": True, "return_dict_in_generate": True},
    "output_attentions": lambda: {"output_attentions": True, "return_dict_in_generate": True},
    "decoder_attention_mask": lambda: {"decoder_attention_mask": torch.ones(12, 1, dtype=torch.long)},
    "special tokens": lambda: {"decoder_input_ids": torch.tensor([[64, 3, 64, 5]] * 12)},
}


def lists(options):
    from transformers import LogitsProcessorList, StoppingCriteriaList

    made = dict(options)
    if "logits_processor" in made:
        made["logits_processor"] = LogitsProcessorList(made["logits_processor"])
    if "stopping_criteria" in made:
        made["stopping_criteria"] = StoppingCriteriaList(made["stopping_criteria"])
    return made


@pytest.mark.parametrize("name", CALLS)
def test_unsupported_arguments(text, name):
    given = {**inputs("text"), "do_sample": True, "max_new_tokens": NEW, "guidance_scale": 1.0}

    def outcome():
        try:
            result, state = run(text, **given, **lists(CALLS[name]()))
        except Exception as error:  # what transformers makes of it is transformers' affair
            return repr(error), None
        return getattr(result, "sequences", result), state

    expected, state = outcome()
    musicgen_fast.accelerate(text)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result, after = outcome()
    told = [str(w.message) for w in seen if "musicgen_fast" in str(w.message)]
    assert len(told) == 1 and name in told[0], told
    if isinstance(expected, str):
        assert result == expected
    else:
        assert torch.equal(result, expected) and torch.equal(after, state)


def test_several_at_once_are_one_warning(text):
    musicgen_fast.accelerate(text)
    options = lists({"logits_processor": [processor], "stopping_criteria": [criterion]})
    with pytest.warns(UserWarning, match="logits_processor, stopping_criteria") as seen:
        text.generate(**inputs("text"), max_new_tokens=NEW, **options)
    assert len([w for w in seen if "musicgen_fast" in str(w.message)]) == 1


def test_beams_are_refused_in_transformers_words(text):
    musicgen_fast.accelerate(text)
    with pytest.warns(UserWarning, match="num_beams"), pytest.raises(ValueError, match="beam"):
        text.generate(**inputs("text"), max_new_tokens=NEW, num_beams=2)


def test_assistants(text):
    musicgen_fast.accelerate(text)
    with pytest.warns(UserWarning, match="assistant_model"), pytest.raises((ValueError, TypeError, AttributeError)):
        text.generate(**inputs("text"), max_new_tokens=NEW, assistant_model=text)


def test_training_mode(text):
    """Dropout draws: the result is transformers', dropout included."""
    given = {**inputs("text"), "do_sample": True, "max_new_tokens": NEW}
    text.train()
    expected, _ = run(text, **given)
    musicgen_fast.accelerate(text)
    with pytest.warns(UserWarning, match="training mode"):
        assert torch.equal(run(text, **given)[0], expected)


def test_fallback_streams(text):
    """Where the loop is transformers', its columns reach the streamer too."""
    musicgen_fast.accelerate(text)
    streamer = Streamer()
    with pytest.warns(UserWarning, match="RepetitionPenalty"):
        text.generate(**inputs("text"), max_new_tokens=NEW, repetition_penalty=1.3, streamer=streamer)
    assert len(streamer.columns) == NEW + 1 and streamer.ends == 1


def test_melody_where_transformers_forgets_it(monkeypatch):
    """4.57 and early 5: a cache is there before the first step, and the conditioning is dropped for it."""
    import transformers as tf

    cls = tf.MusicgenMelodyForConditionalGeneration
    prepare = cls.prepare_inputs_for_generation

    def forgetful(self, *args, past_key_values=None, encoder_hidden_states=None, **kwargs):
        kept = encoder_hidden_states if past_key_values is None else None
        return prepare(self, *args, past_key_values=past_key_values, encoder_hidden_states=kept, **kwargs)

    monkeypatch.setattr(cls, "prepare_inputs_for_generation", forgetful)
    model = hf.build("melody")
    given = {**inputs("melody"), "do_sample": True, "max_new_tokens": NEW, "guidance_scale": 3.0}
    expected, _ = run(model, **given)
    musicgen_fast.accelerate(model)
    with pytest.warns(UserWarning, match="melody"):
        assert torch.equal(run(model, **given)[0], expected)


def test_other_ways_into_the_loop_are_transformers(text):
    """Whoever calls the class's method gets the class's loop, without a warning."""
    given = {**inputs("text"), "do_sample": True, "max_new_tokens": NEW}
    expected, _ = run(text, **given)
    musicgen_fast.accelerate(text)
    seen = []
    text.decoder.register_forward_hook(lambda *_: seen.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(1)
        assert torch.equal(type(text).generate(text, **given), expected)
        assert seen
        seen.clear()
        assert torch.equal(run(text, **given)[0], expected) and not seen
