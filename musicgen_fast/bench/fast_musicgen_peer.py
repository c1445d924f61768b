"""fast-musicgen 0.1.0 of PyPI as a provider: its model with random weights, through its own loops over the steps.

It wants checkpoint folders and a GPU to start; here its parts are put together without either, so that its eager loop
runs on a CPU too. On a GPU its CUDA graph is captured for the text's length (it captures one per length, up to 20).
Its attention runs over all 1,500 positions of the cache at every step: a block at a late position costs what one at
the beginning does, and is timed there.
"""

from __future__ import annotations

from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch

from ..config import ModelConfig
from .job import AbsentError, Compiled, Job, Run, Step, config_of
from .weights import default_dtype, fill, undrawn

__all__ = ["build"]

_LONGEST_TEXT = 20
_POSITIONS = 1500


def build(job: Job) -> Run:
    """AbsentError for what it is not made for: more than one request, other than mono text models, long texts."""
    try:
        from fast_musicgen.lm import CausalLM, LMRunner
    except ImportError as error:
        raise AbsentError(f"fast-musicgen is not installed ({error})") from error
    config = config_of(job.model)
    if job.requests != 1 or config.conditioning != "cross" or config.audio_channels != 1 or config.num_codebooks != 4:
        raise AbsentError("fast-musicgen makes one request at a time, of mono text models")
    if job.text_tokens > _LONGEST_TEXT or job.steps > _POSITIONS:
        raise AbsentError(f"fast-musicgen takes texts of up to {_LONGEST_TEXT} tokens and {_POSITIONS} steps")
    graph = torch.device(job.device).type == "cuda"
    with undrawn(), default_dtype(job.dtype):
        model = CausalLM(_settings(config), device=job.device, dtype=job.dtype)
    fill(model)
    model.eval().to(job.device)
    model.set_cache(max_length=_POSITIONS)
    runner: Any = LMRunner.__new__(LMRunner)  # its constructor reads a folder, and captures on every device
    runner.model, runner.max_length, runner.cuda_graph = model, _POSITIONS, graph
    runner.prompt_max_len, runner.graphs, runner.graph_vars = job.text_tokens, {}, {}
    assert config.text is not None
    states = torch.randn(1, job.text_tokens, config.text.dim, device=job.device)
    draw = model.top_k_sampling  # called once a step

    def run(step: Step, start: int) -> object:
        def counted(**options: Any) -> torch.Tensor:
            step()
            return draw(**options)

        model.top_k_sampling = counted
        generate = runner.generate_with_cuda_graph if graph else runner.generate
        with torch.device(job.device):  # it creates tensors on the default device
            return generate(states, max_steps=job.steps, top_k=min(250, config.vocab_size), guidance_coef=3.0)

    if not graph:
        return run
    began = perf_counter()
    with torch.device(job.device):
        runner.warmup()
        runner.capture_cuda_graph()
    return Compiled(run, perf_counter() - began)


def _settings(config: ModelConfig) -> Any:
    """What it reads of transformers' MusicgenConfig."""
    decoder = SimpleNamespace(
        num_codebooks=config.num_codebooks, bos_token_id=config.special_token, hidden_size=config.dim,
        num_attention_heads=config.num_heads, num_hidden_layers=config.num_layers, ffn_dim=config.ffn_dim,
    )  # fmt: skip
    assert config.text is not None
    return SimpleNamespace(
        decoder=decoder,
        audio_encoder=SimpleNamespace(codebook_size=config.vocab_size),
        text_encoder=SimpleNamespace(d_model=config.text.dim),
    )
