"""Does a decoder compute what the torch decoder computes in float32? Logits of known tokens, and tokens drawn by seed.

The yardstick is plain: `Transformer.forward` over the whole sequence (no cache, no decoder) for the logits, and the
torch decoder in float32 for the tokens, both with the same weights and the same text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checkpoints import load_checkpoint
from ..config import ModelConfig
from ..decoders.torch import TorchDecoder
from ..lm import LMModel
from ..model import Transformer
from ..pattern import build_pattern
from ..sampling import SamplingParams
from ..state import Conditions, Place, Sampler, State
from . import openvino_peer
from .job import Job
from .providers import OURS, conditions_for

__all__ = ["COMPARED", "LIMITS", "decoder_logits", "parity", "verdict"]

COMPARED = (OURS, "openvino")  # the others have random weights of their own
# Norm of the difference over the norm of the logits, over all positions, against the weights before they are rounded.
# In int8 rounding alone costs 1.8 % at 24 layers of random weights, and no 8 bits a weight do better; the arithmetic
# adds 0.1 %. int4 is opt-in and warned about.
LIMITS = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.01, "int8": 0.025, "int4": 0.3}


def parity(job: Job) -> dict[str, Any]:
    """The `parity` of a JSON line, over `job.steps` frames, for a provider of `COMPARED`.

    `ok` is None where nothing could be compared.

    float32: ok where all tokens, drawn with one seed, are equal, and the logits within 1e-4. Other precisions: ok where
    the relative error of the logits is within `LIMITS`; `tokens_equal` is then what share happens to be the same.
    """
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    if job.provider == "openvino":
        return _of_openvino(job)
    assert job.provider == OURS
    from .. import MusicGen  # here, as in providers.py

    lm: Any = MusicGen.get_pretrained(job.model, job.device, precision=job.precision).lm
    conditions = conditions_for(lm, job)
    codes = _codes(lm.config, job)
    found = _logits(lm, conditions, codes)
    drawn = _drawn(lm, conditions, job)
    reference = _reference(job)
    error = None
    if found is not None:
        error = _error(found, _reference_logits(reference, conditions, codes))
    other = LMModel(reference, lm.conditioner)
    other.decoder = TorchDecoder(reference)
    equal = (_drawn(other, conditions, job) == drawn).float().mean().item()
    return verdict(job.precision, job.steps, error, equal)


def verdict(precision: str, frames: int, error: float | None, equal: float | None) -> dict[str, Any]:
    """What is said of a relative error of the logits and a share of equal tokens; None: not known."""
    limit = LIMITS[precision]
    close = None if error is None else error <= limit
    known = [value for value in (close, equal == 1 if precision == "float32" else None) if value is not None]
    return {
        "ok": all(known) if known else None,
        "against": "torch, float32",
        "frames": frames,
        "tokens_equal": equal,
        "logits_error": error,
        "logits_error_limit": limit,
    }


def _codes(config: ModelConfig, job: Job) -> Tensor:
    return torch.randint(0, config.vocab_size, (1, config.num_codebooks, job.steps)).to(job.device)


def _reference(job: Job) -> Transformer:
    checkpoint = load_checkpoint(job.model, dtype=torch.float32)
    return Transformer.from_weights(checkpoint.config, checkpoint.lm).to(job.device)


def _drawn(lm: LMModel, conditions: Conditions, job: Job) -> Tensor:
    return lm.generate(None, conditions, max_gen_len=job.steps, seed=[3])


class _Recorder(Sampler):
    """Keeps the logits and draws nothing: all tokens are known."""

    kept: list[Tensor]

    def __call__(self, logits: Tensor, place: Place) -> None:
        self.kept.append(logits.float().clone())


def _logits(lm: Any, conditions: Conditions, codes: Tensor) -> Tensor | None:
    """[branches, columns, K, V] of one request, see `decoder_logits`."""
    found = decoder_logits(lm, conditions, codes)
    return None if found is None else found[:, 0]


def decoder_logits(lm: Any, conditions: Conditions, codes: Tensor) -> Tensor | None:
    """What a decoder, KV cache included, makes of known tokens step by step.

    Args:
        lm: an `LMModel`; its decoder is asked.
        codes: int64 [B, K, T], on its device.

    Returns:
        float32 [branches, B, columns, K, V], of the columns from the first that holds a frame; None where the decoder
        asks no sampler.
    """
    config: ModelConfig = lm.config
    recorder = _Recorder(SamplingParams.build(len(codes), config.num_codebooks, lm.device))
    recorder.kept = []
    pattern = build_pattern(config.pattern, config.num_codebooks, codes.shape[2])
    room = max(conditions.prefix_lengths()) + pattern.num_steps
    kv = lm.decoder.allocate(conditions.num_rows, room)
    state = State(config, kv, [0] * conditions.num_rows, conditions, recorder)
    lm.decoder.condition(state)
    state.start_window(pattern, codes, 0, 0)
    lm.decoder.prefill(state)
    while not state.done:
        lm.decoder.step(state)
    return torch.stack(recorder.kept, dim=2) if recorder.kept else None


@torch.no_grad()
def _reference_logits(model: Transformer, conditions: Conditions, codes: Tensor) -> Tensor:
    """The same from one pass over the whole sequence, branch by branch."""
    pattern = build_pattern(model.config.pattern, model.config.num_codebooks, codes.shape[2])
    tokens = pattern.build(codes, model.config.special_token)[:, :, :-1]
    rows = []
    for branch in conditions.branches:
        prefix = branch.prefix[0][None].float() if branch.prefix else None
        cross = branch.cross[0][None].float() if branch.cross else None
        rows.append(model(tokens, prefix, cross)[0, pattern.first_step(0) - 1 :])
    return torch.stack(rows)


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def _of_openvino(job: Job) -> dict[str, Any]:
    model = _reference(job)
    config = model.config
    states = openvino_peer.text_states(config, job.text_tokens)
    tokens = torch.randint(0, config.vocab_size, (1, config.num_codebooks, job.steps))
    expected = torch.stack([model(tokens, cross=states[None])[0], model(tokens)[0]])
    decoder = openvino_peer.OpenVinoDecoder(model, states, job.precision, job.threads)
    decoder.start(0)
    found = torch.stack([decoder.step(column) for column in tokens[0].T], dim=1)
    return verdict(job.precision, job.steps, _error(found, expected), None)
