"""`accelerate` with transformers 4.57, which lives in an environment of its own: MUSICGEN_FAST_TRANSFORMERS_457 names
its python (torch, transformers 4.57 and what musicgen_fast needs)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "MUSICGEN_FAST_TRANSFORMERS_457"

SCRIPT = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import torch, transformers
assert transformers.__version__.startswith("4.57."), transformers.__version__
import musicgen_fast
from transformers.generation.utils import GenerationMixin
from tests.oracle import transformers_lm as hf

torch.set_num_threads(1)
# 4.57 takes the parts of a configuration as dicts
for cls in (transformers.MusicgenConfig, transformers.MusicgenMelodyConfig):
    def accepting(self, *args, init=cls.__init__, **parts):
        init(self, *args, **{k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in parts.items()})
    cls.__init__ = accepting
ids = torch.tensor([[5, 6, 7, 8, 1], [9, 4, 1, 0, 0]])
given = {"input_ids": ids, "attention_mask": (ids > 0).long(), "max_new_tokens": 18}
settings = [
    {"do_sample": False, "guidance_scale": 3.0},
    {"do_sample": True, "guidance_scale": 3.0},
    {"do_sample": True, "guidance_scale": 1.0, "temperature": 0.7},
    {"do_sample": True, "guidance_scale": 3.0, "top_p": 0.8},
]

def run(model, **options):
    torch.manual_seed(1)
    return model.generate(**options)

own = GenerationMixin._sample
def forbidden(*args, **kwargs):
    raise AssertionError("transformers' own loop ran")

class Streamer:
    puts, ends = 0, 0
    def put(self, value):
        self.puts += 1
    def end(self):
        self.ends += 1

for kind in ("text", "stereo"):
    model = hf.build(kind)
    channels = model.config.decoder.audio_channels
    calls = [{**given, **s} for s in settings]
    calls.append({**given, "do_sample": True, "input_values": torch.stack([torch.stack(
        [hf.tune(2 * b + c)[:3200] for c in range(channels)]) for b in range(2)])})
    calls.append({**model.get_unconditional_inputs(2), "do_sample": True, "max_new_tokens": 18})
    calls.append({**given, "do_sample": True, "return_dict_in_generate": True})
    expected = [run(model, **call) for call in calls]
    musicgen_fast.accelerate(model)
    GenerationMixin._sample = forbidden
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [run(model, **call) for call in calls]
        streamer = Streamer()
        run(model, **calls[1], streamer=streamer)
        several = run(model, **calls[1], num_return_sequences=3)
    GenerationMixin._sample = own
    for n, (a, b) in enumerate(zip(results, expected)):
        assert torch.equal(getattr(a, "sequences", a), getattr(b, "sequences", b)), (kind, n)
    assert (streamer.puts, streamer.ends) == (19, 1)
    assert several.shape[0] == 6 and several.shape[1:] == expected[1].shape[1:]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(model, **calls[1], typical_p=0.9)
    assert ["Typical" in str(w.message) for w in seen if "musicgen_fast" in str(w.message)] == [True]
    musicgen_fast.unaccelerate(model)
    assert model.generate.__func__ is type(model).generate

model = hf.build("melody")
call = {**given, **settings[1], "input_features": hf.chroma(torch.stack([hf.tune(b) for b in range(2)]))}
expected = run(model, **call)
musicgen_fast.accelerate(model)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert torch.equal(run(model, **call), expected)
assert ["melody" in str(w.message) for w in seen if "musicgen_fast" in str(w.message)] == [True]
print("all equal")
"""


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} does not name a python with transformers 4.57")
def test_transformers_4_57():
    python = os.environ[VARIABLE]
    done = subprocess.run([python, "-c", SCRIPT, str(ROOT)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "all equal"
