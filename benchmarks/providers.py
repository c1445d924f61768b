"""One language model timed in a process of its own: this project, transformers or audiocraft, with random weights.

    python benchmarks/providers.py '{"provider": "transformers", "size": "small", ...}'   (the fields of `Job`)

prints a JSON document as its last line. All draw 4 codebooks of 2048 tokens with classifier-free guidance, batch 1,
16 text tokens, top-k 250. Text encoder and codec are small ones: neither runs during a step.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from machine import ROOT, synchronize
from torch import nn

from musicgen_fast import MusicGen
from musicgen_fast.conditioning import ConditioningAttributes
from musicgen_fast.config import named_config

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXT_TOKENS = 16
DELAY = 3  # a sequence has 3 columns more than frames
Step = Callable[[], None]
Run = Callable[[Step], object]


@dataclass(frozen=True)
class Job:
    """What a process is asked to time. `steps` are columns of the sequence, the first `warmup` of them left out."""

    provider: str
    size: str = "small"
    precision: str = "float32"
    device: str = "cpu"
    threads: int = 1
    steps: int = 200
    warmup: int = 20

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


class AbsentError(Exception):
    """This provider cannot run here; says why."""


# -- the three -------------------------------------------------------------------------------------------------------


def ours(job: Job) -> Run:
    """The decoder that `MusicGen` picks for the device."""
    lm = MusicGen.get_pretrained(f"random:{job.size}", job.device, precision=job.precision).lm
    text = "x" * (TEXT_TOKENS - 1)  # the tokenizer of random models reads bytes
    asked = [ConditioningAttributes({"description": text})]
    return lambda step: lm.generate(None, asked, max_gen_len=job.steps - DELAY, callback=lambda *_: step())


def transformers(job: Job) -> Run:
    try:
        import transformers as tf
    except ImportError as error:
        raise AbsentError(f"transformers is not installed ({error})") from error
    tf.logging.set_verbosity_error()
    c = named_config(job.size)
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
    model.generation_config.update(bos_token_id=2048, pad_token_id=2048, decoder_start_token_id=2048)
    ids = torch.arange(2, 2 + TEXT_TOKENS, device=job.device)[None]
    options = {"do_sample": True, "top_k": 250, "guidance_scale": 3.0, "max_new_tokens": job.steps}

    def run(step: Step) -> object:
        handle = model.decoder.register_forward_pre_hook(lambda *_: step())
        try:
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        finally:
            handle.remove()

    return run


def audiocraft(job: Job) -> Run:
    """Its own LMModel, as the tests build it. Below float32 the matrices of the layers are cast and the rest runs under
    autocast, which is what audiocraft does in float16 on a GPU."""
    if find_spec("audiocraft") is None:
        raise AbsentError("audiocraft is not installed (pip install --no-deps tts-webui-audiocraft)")
    sys.path.insert(0, str(ROOT))
    from tests.oracle import audiocraft_lm as oracle

    oracle.load()
    c = named_config(job.size)
    with undrawn():
        lm = oracle.build_lm("text", dim=c.dim, num_heads=c.num_heads, num_layers=c.num_layers, card=c.vocab_size)
    conditioner: Any = lm.condition_provider.conditioners["description"]
    for module in (lm, conditioner.t5):  # the T5 is hidden from `lm.parameters()`
        fill(module)
        module.to(job.device)
    lm.condition_provider.device = conditioner.device = job.device
    if job.dtype != torch.float32:
        for parameter in lm.transformer.layers.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.to(job.dtype)
    texts = [" ".join(["word"] * (TEXT_TOKENS - 1))]

    def run(step: Step) -> object:
        cast = job.dtype != torch.float32
        with torch.autocast(torch.device(job.device).type, job.dtype) if cast else nullcontext():
            return oracle.generate(lm, texts, "text", steps=job.steps - DELAY, callback=lambda *_: step())

    return run


PROVIDERS: dict[str, Callable[[Job], Run]] = {
    "musicgen_fast": ours,
    "transformers": transformers,
    "audiocraft": audiocraft,
}


# -- weights ---------------------------------------------------------------------------------------------------------


@contextmanager
def undrawn() -> Iterator[None]:
    """Modules built inside keep raw memory where they would draw weights: 10 s less for the small size, a minute for
    the large one."""

    def keep(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    patches = (
        mock.patch.object(torch.Tensor, "normal_", keep),
        mock.patch.object(torch.Tensor, "uniform_", keep),
        mock.patch.object(nn.init, "trunc_normal_", keep),
    )
    with patches[0], patches[1], patches[2]:
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Matrices from one repeated block of normal values over sqrt(columns); vectors: 1 in weights, 0 in biases."""
    block = torch.randn(1_048_573)
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        values = (block / math.sqrt(math.prod(parameter.shape[1:]))).to(parameter.dtype)
        for part in parameter.data.view(-1).split(len(block)):
            part.copy_(values[: len(part)])


# -- timing ----------------------------------------------------------------------------------------------------------


def measure(job: Job) -> dict[str, Any]:
    """{"ms": [time of each step], "peak_mib": most memory while generating, of the GPU on cuda}, or {"absent": why}."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    try:
        run = PROVIDERS[job.provider](job)
    except AbsentError as reason:
        return {"absent": str(reason)}
    times: list[float] = []

    def step() -> None:
        synchronize(job.device)
        times.append(perf_counter())

    reset_peak(job.device)
    run(step)
    ms = [1000 * (after - before) for before, after in zip(times, times[1:], strict=False)]
    return {"ms": ms[job.warmup :], "peak_mib": round(peak_bytes(job.device) / 2**20)}


def reset_peak(device: str) -> None:
    """Forget what loading took: the peak is that of generating."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed: 740 MiB after a cast to bfloat16
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        pass  # not Linux, or not allowed: the peak of the process then


def peak_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.argv[1])))))
