"""The language models that are timed, with guidance and top-k 250: this project and its peers.

Ours is any model; the others have the model's shapes with random weights (OpenVINO its weights) and do text models
only. Text encoder and codec are small ones: neither runs during a step. A provider is `build(job) -> run(step, start)`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import torch

from ..conditioning import ConditioningAttributes
from ..config import GenerationParams, ModelConfig
from ..pattern import build_pattern
from ..state import Conditions, State
from . import fast_musicgen_peer, openvino_peer
from .job import AbsentError, Compiled, Job, Run, Step, config_of
from .machine import ROOT, cpu_flags
from .weights import default_dtype, fill, undrawn

__all__ = ["PROVIDERS", "conditions_for", "fitting_precision", "why_absent"]

OURS = "musicgen_fast"


def ours(job: Job) -> Run:
    """The decoder that `MusicGen` picks for the device, through `LMModel.generate`: what a user gets."""
    from .. import MusicGen  # here: peers run where its libraries for sound are missing

    lm: Any = MusicGen.get_pretrained(job.model, job.device, precision=job.precision).lm
    lm.decoder = LateStart(lm.decoder)
    conditions = conditions_for(lm, job)
    config, batch = lm.config, job.requests

    def run(step: Step, start: int) -> object:
        prompt = torch.randint(0, config.vocab_size, (batch, config.num_codebooks, start), device=lm.device)
        frames = start + job.steps - _extra_columns(config)
        return lm.generate(prompt, conditions, max_gen_len=frames, callback=lambda *_: step())

    return run


class LateStart:
    """A decoder that does not compute a long prompt but takes the cache as if it had.

    Filling 1,500 positions takes as long as 100 steps, and the time of a step does not depend on the values: zeros are
    written to every page (pages that nobody wrote share one, which reads from the cache) and the lengths are set.
    """

    def __init__(self, decoder: Any):
        self._decoder = decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def prefill(self, state: State, draw: bool = True) -> None:
        if state.column < 8 or not draw:
            self._decoder.prefill(state, draw)
            return
        state.kv.clear()
        state.lengths = [prefix + state.column - 1 for prefix in state.conditions.prefix_lengths()]
        self._decoder.step(state)


def conditions_for(lm: Any, job: Job) -> Conditions:
    """A text of exactly `job.text_tokens` states for every request, whatever the tokenizer."""
    asked = [ConditioningAttributes({"description": "music " * job.text_tokens}) for _ in range(job.requests)]
    conditions = lm.encode(asked, GenerationParams(cfg_coef=3.0))
    for branch in conditions.branches:
        if branch.cross is not None:
            branch.cross = [states[: job.text_tokens] for states in branch.cross]
    return conditions


def _extra_columns(config: ModelConfig) -> int:
    """Columns that a sequence has more than frames, without the first: 3 in the released models."""
    return build_pattern(config.pattern, config.num_codebooks, 8).num_steps - 9


def transformers(job: Job) -> Run:
    return _transformers(job)[1]


def transformers_compiled(job: Job) -> Run:
    """Its decoder through torch.compile, compiled by two runs that are not measured."""
    model, run = _transformers(job)
    model.decoder.forward = torch.compile(model.decoder.forward, dynamic=True)
    began = perf_counter()
    for _ in range(2):
        run(lambda: None, 0)
    return Compiled(run, perf_counter() - began)


def _transformers(job: Job) -> tuple[Any, Run]:
    try:
        import transformers as tf
    except ImportError as error:
        raise AbsentError(f"transformers is not installed ({error})") from error
    tf.logging.set_verbosity_error()
    c = _text_model(job)
    decoder = tf.MusicgenDecoderConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        num_hidden_layers=c.num_layers,
        ffn_dim=c.ffn_dim,
        num_attention_heads=c.num_heads,
        num_codebooks=c.num_codebooks,
    )
    text = tf.T5Config(vocab_size=99, d_model=768, d_kv=64, d_ff=1536, num_layers=2, num_heads=12)
    codec = tf.EncodecConfig(
        sampling_rate=32000, target_bandwidths=[2.2], codebook_size=2048, hidden_size=16, num_filters=4,
        upsampling_ratios=[8, 5, 4, 4], use_causal_conv=False, use_conv_shortcut=False,
    )  # fmt: skip
    with undrawn(), default_dtype(job.dtype):
        config = tf.MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)
        model = tf.MusicgenForConditionalGeneration(config).eval()
    fill(model)
    model.to(job.device)
    special = c.special_token
    model.generation_config.update(bos_token_id=special, pad_token_id=special, decoder_start_token_id=special)
    ids = torch.arange(2, 2 + job.text_tokens, device=job.device)[None]
    options: dict[str, Any] = {"do_sample": True, "top_k": 250, "guidance_scale": 3.0, "max_new_tokens": job.steps}

    def run(step: Step, start: int) -> object:
        given = {}
        if start:
            given["decoder_input_ids"] = torch.randint(0, c.vocab_size, (c.num_codebooks, start), device=job.device)
        handle = model.decoder.register_forward_pre_hook(lambda *_: step())
        try:
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given, **options)
        finally:
            handle.remove()

    return model, run


def audiocraft(job: Job) -> Run:
    """Its own LMModel, as the tests build it. Below float32 the matrices of the layers are cast and the rest runs under
    autocast, which is what audiocraft does in float16 on a GPU."""
    if reason := why_absent("audiocraft"):
        raise AbsentError(reason)
    sys.path.insert(0, str(ROOT))
    oracle: Any = import_module("tests.oracle.audiocraft_lm")  # of the checkout, no part of the package
    oracle.load()
    c, dtype = _text_model(job), job.dtype
    with undrawn():
        lm = oracle.build_lm("text", dim=c.dim, num_heads=c.num_heads, num_layers=c.num_layers, card=c.vocab_size)
    conditioner: Any = lm.condition_provider.conditioners["description"]
    for module in (lm, conditioner.t5):  # the T5 is hidden from `lm.parameters()`
        fill(module)
        module.to(job.device)
    lm.condition_provider.device = conditioner.device = job.device
    if dtype != torch.float32:
        for parameter in lm.transformer.layers.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.to(dtype)
    texts = [" ".join(["word"] * (job.text_tokens - 1))]

    def run(step: Step, start: int) -> object:
        prompt = torch.randint(0, c.vocab_size, (1, c.num_codebooks, start), device=job.device) if start else None
        frames, top_k = start + job.steps - _extra_columns(c), min(250, c.vocab_size)

        def callback(*_: int) -> None:
            step()

        cast = torch.autocast(torch.device(job.device).type, dtype) if dtype != torch.float32 else nullcontext()
        with cast:
            return oracle.generate(lm, texts, "text", steps=frames, prompt=prompt, callback=callback, top_k=top_k)

    return run


def _text_model(job: Job) -> ModelConfig:
    """The shapes that a peer takes on; AbsentError for what it is not built to be here."""
    if job.requests != 1:
        raise AbsentError(f"{job.provider} is timed with one request only")
    config = config_of(job.model)
    if config.conditioning != "cross" or config.audio_channels != 1 or config.num_codebooks != 4:
        raise AbsentError(f"{job.provider} is timed on mono text models only")
    return config


PROVIDERS: dict[str, Callable[[Job], Run]] = {
    OURS: ours,
    "transformers": transformers,
    "transformers_compiled": transformers_compiled,
    "audiocraft": audiocraft,
    "openvino": openvino_peer.build,
    "fast_musicgen": fast_musicgen_peer.build,
}


def why_absent(provider: str) -> str:
    """Why a provider cannot run in this environment, as far as that shows without trying; empty if it may."""
    needed = {"transformers": ["transformers"], "transformers_compiled": ["transformers"],
              "audiocraft": ["audiocraft"], "openvino": ["openvino", "nncf"],
              "fast_musicgen": ["fast_musicgen"]}.get(provider, [])  # fmt: skip
    for package in needed:
        if find_spec(package) is None:
            bare = {"audiocraft": "--no-deps tts-webui-audiocraft", "fast_musicgen": "--no-deps fast-musicgen"}
            return f"{package} is not installed (pip install {bare.get(package, package)})"
    if provider == "audiocraft" and not os.path.isfile(ROOT / "tests" / "oracle" / "audiocraft_lm.py"):
        return "audiocraft is built by tests/oracle, which only a checkout of this project has"
    return ""


def fitting_precision(provider: str, asked: str, device: str) -> str:
    """`asked` where the provider has it, else the fastest that it has: a peer is compared at its best."""
    if provider == OURS:
        return asked
    cpu = torch.device(device).type == "cpu"
    if provider == "openvino":
        return asked if asked in openvino_peer.PRECISIONS else "int8"
    if asked in ("float32", "bfloat16", "float16"):
        return asked
    if not cpu:
        return "float16"
    # without these instructions bfloat16 is emulated; audiocraft's autocast is slower than its float32 in any case
    fast = bool({"avx512_bf16", "amx_bf16"} & cpu_flags()) and provider != "audiocraft"
    return "bfloat16" if fast else "float32"
