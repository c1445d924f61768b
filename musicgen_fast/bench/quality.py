"""What a precision costs in quality: known tokens through the decoder that serves it, beside the float32 reference.

Every provider and precision runs in a process of its own, which reads the clips from a file and compares, clip by clip,
its logits of the conditional branch with those of `Transformer.forward` in float32: nats per token, KL divergence,
relative error, the same most likely token. Ours goes step by step through its KV cache, transformers in one pass.
Counted are the cells that hold a frame, once each; sums are float64. Guidance and sampling are left out.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import load_checkpoint
from ..conditioning import Conditioner, ConditioningAttributes
from ..config import GenerationParams, ModelConfig
from ..evaluation import Likelihood
from ..model import Transformer
from ..pattern import Pattern, build_pattern
from ..state import Branch
from .job import AbsentError, Job
from .parity import decoder_logits
from .providers import OURS, why_absent
from .quality_clips import Clip, load_clips, save_clips
from .transformers_folder import load_folder, write_folder
from .worker import in_own_process

__all__ = ["PROVIDERS", "Answers", "QualityJob", "cell_sums", "jobs_for", "measure", "run", "summary"]

PROVIDERS = (OURS, "transformers")
_UNGUIDED = GenerationParams(cfg_coef=1.0)
_CELLS = 2**25  # logits at once: 128 MiB, kept twice
_ROWS = 8  # clips at once
_NATS, _EXACT, _KL, _SAME, _ERROR, _NORM = range(6)  # columns of `cell_sums`

Logits = Callable[[list[Clip]], Iterator[Tensor]]  # clips of one length -> [columns, K, V] of each
Answers = list[tuple["QualityJob", dict[str, Any]]]


@dataclass(frozen=True)
class QualityJob(Job):
    """`clips`: the file of `save_clips`. What `Job` says of steps means nothing here."""

    clips: str = ""


# -- one process ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(job: QualityJob) -> dict[str, Any]:
    """The METRICS (of quality_lines.py) of a provider in a precision, or {"absent": why}.

    `percent_over_float32`, `difference_standard_error` (nats, over clips, paired) and `kl_nats` (float32 || precision)
    are against the reference transformer on the same clips.
    """
    torch.set_num_threads(job.threads)
    clips = load_clips(job.clips)
    checkpoint = load_checkpoint(job.model, dtype=torch.float32)
    reference = Transformer.from_weights(checkpoint.config, checkpoint.lm).to(job.device)
    del checkpoint
    try:
        logits_of = {OURS: _ours, "transformers": _transformers}[job.provider](job, reference.config)
    except AbsentError as reason:
        return {"absent": str(reason)}
    config, conditioner = reference.config, Conditioner(reference.config, reference, text=_States(clips))
    sums = torch.zeros(len(clips), config.num_codebooks, 6, dtype=torch.float64)
    for rows in _groups(clips, config):
        for row, found in zip(rows, logits_of([clips[row] for row in rows]), strict=True):
            pattern, sequence = _sequence(config, clips[row], job.device)
            (branch,) = conditioner([_attributes(clips[row])], guidance="none").branches
            exact = reference(sequence[:, :, :-1], *_first_row(branch))[0]
            sums[row] = cell_sums(found, exact, sequence[0], pattern)
    return summary(sums, torch.tensor([clip.tokens.shape[1] for clip in clips]))


def cell_sums(found: Tensor, exact: Tensor, sequence: Tensor, pattern: Pattern) -> Tensor:
    """float64 [K, 6]: nats, the reference's nats, KL, equal argmax, squared difference and squared norm of the logits.

    Args:
        found, exact: logits [columns, K, V] of the last columns of the pattern, as many as there are.
        sequence: int64 [K, S].
    """
    sums = torch.zeros(sequence.shape[0], 6, dtype=torch.float64)
    for k in range(
        sequence.shape[0]
    ):  # one codebook at a time: float64 logits of all would be the largest tensors here
        steps = torch.from_numpy((pattern.table[:, k] >= 0).nonzero()[0]).to(sequence.device)
        p, q = (logits[steps - pattern.num_steps, k].double() for logits in (exact, found))
        norms = (q - p).square().sum(), p.square().sum()
        same = (p.argmax(1) == q.argmax(1)).sum()
        p, q = p.log_softmax(1), q.log_softmax(1)
        wanted = sequence[k, steps, None]
        divergence = (p.exp() * (p - q)).sum(1).clamp(min=0)  # below 0 it is rounding
        cells = (-q.gather(1, wanted).sum(), -p.gather(1, wanted).sum(), divergence.sum(), same.double(), *norms)
        sums[k] = torch.stack(cells).cpu()
    return sums


def summary(sums: Tensor, frames: Tensor) -> dict[str, Any]:
    """METRICS from `cell_sums` of all clips, [clips, K, 6], and their frames [clips]."""
    nats, exact = Likelihood(sums[..., _NATS], frames), Likelihood(sums[..., _EXACT], frames)
    cells = int(frames.sum()) * sums.shape[1]
    difference = Likelihood((sums[..., _NATS] - sums[..., _EXACT]).mean(1, keepdim=True), frames)
    spread = float(difference.standard_error)
    return {
        "clips": len(frames),
        "frames": int(frames.sum()),
        "nats_per_token": nats.mean,
        "nats_per_codebook": nats.per_codebook.tolist(),
        "percent_over_float32": 100 * difference.mean / exact.mean,
        "difference_standard_error": None if math.isnan(spread) else spread,
        "kl_nats": float(sums[..., _KL].sum()) / cells,
        "logits_error": float((sums[..., _ERROR].sum() / sums[..., _NORM].sum()).sqrt()),
        "same_argmax": float(sums[..., _SAME].sum()) / cells,
    }


class _States:
    """The text encoder of clips whose states are known."""

    def __init__(self, clips: list[Clip]):
        self._known = {clip.text: clip.states for clip in clips}

    def encode(self, text: str) -> Tensor | None:
        return self._known[text]


def _attributes(clip: Clip) -> ConditioningAttributes:
    return ConditioningAttributes({"description": clip.text})


def _first_row(branch: Branch) -> tuple[Tensor | None, Tensor | None]:
    prefix, cross = (None if states is None else states[0][None] for states in (branch.prefix, branch.cross))
    return prefix, cross


def _sequence(config: ModelConfig, clip: Clip, device: str) -> tuple[Pattern, Tensor]:
    """The pattern of a clip, and its tokens in it: int64 [1, K, S]."""
    pattern = build_pattern(config.pattern, *clip.tokens.shape)
    return pattern, pattern.build(clip.tokens[None].to(device), config.special_token)


def _groups(clips: list[Clip], config: ModelConfig) -> Iterator[list[int]]:
    """Clips of one length, as many as fit."""
    by_length: dict[int, list[int]] = {}
    for row, clip in enumerate(clips):
        by_length.setdefault(clip.tokens.shape[1], []).append(row)
    for frames, rows in by_length.items():
        steps = build_pattern(config.pattern, config.num_codebooks, frames).num_steps
        size = max(1, min(_ROWS, _CELLS // (steps * config.num_codebooks * config.vocab_size)))
        yield from (rows[first : first + size] for first in range(0, len(rows), size))


def _ours(job: QualityJob, config: ModelConfig) -> Logits:
    from .. import MusicGen  # here, as in providers.py

    try:
        lm: Any = MusicGen.get_pretrained(job.model, job.device, precision=job.precision).lm
    except ValueError as error:  # the model itself was loaded before: the precision is what cannot be had
        raise AbsentError(str(error)) from None

    def logits_of(clips: list[Clip]) -> Iterator[Tensor]:
        codes = torch.stack([clip.tokens for clip in clips]).to(lm.device)
        found = decoder_logits(lm, lm.encode([_attributes(clip) for clip in clips], _UNGUIDED), codes)
        if found is None:
            raise RuntimeError("this decoder draws by itself and shows nobody its logits")
        yield from found[0]

    return logits_of


def _transformers(job: QualityJob, config: ModelConfig) -> Logits:
    if reason := why_absent("transformers"):
        raise AbsentError(reason)
    if config.conditioning != "cross" or config.audio_channels != 1:
        raise AbsentError("transformers is compared on mono text models only")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # its files stay mapped
        write_folder(Path(folder), job.model, None)
        model = load_folder(Path(folder), job.dtype, job.device)

    def logits_of(clips: list[Clip]) -> Iterator[Tensor]:
        for clip in clips:
            pattern, sequence = _sequence(config, clip, job.device)
            given: dict[str, Any] = {"input_ids": torch.tensor([clip.ids], device=job.device)}
            if not clip.text:  # what it makes of a null condition: a state of zeros that nothing attends to
                width = model.text_encoder.config.hidden_size
                given = {"encoder_outputs": (torch.zeros(1, 1, width, dtype=job.dtype, device=job.device),)}
            mask = torch.full((1, max(1, len(clip.ids))), int(bool(clip.text)), device=job.device)
            tokens = sequence[0, :, :-1]
            yield model(**given, attention_mask=mask, decoder_input_ids=tokens, use_cache=False).logits.transpose(0, 1)

    return logits_of


# -- all of them ------------------------------------------------------------------------------------------------------


def jobs_for(base: QualityJob, precisions: Iterable[str], providers: Iterable[str] | None) -> list[QualityJob]:
    """One for every precision and provider. Without `providers`: ours and, if it is installed, transformers, which is
    left out where it lacks a precision (it has float32 and bfloat16, on a GPU float16)."""
    theirs = ("float32", "bfloat16") if torch.device(base.device).type == "cpu" else ("float32", "bfloat16", "float16")
    names = [name for name in PROVIDERS if not why_absent(name)] if providers is None else list(providers)
    return [
        replace(base, provider=name, precision=precision)
        for name in names
        for precision in dict.fromkeys(precisions)
        if name == OURS or precision in theirs
    ]


def run(jobs: list[QualityJob], clips: list[Clip], say: Callable[[str], object]) -> Answers:
    """The answer of every job, each from a process of its own."""
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clips.pt"
        save_clips(path, clips)
        for job in jobs:
            say(f"{job.provider} {job.precision}")
            asked = replace(job, clips=str(path))
            reason = why_absent(job.provider)
            answers.append((job, {"absent": reason} if reason else in_own_process(asked, "quality", module="quality")))
    return answers


def main(task: str, fields: str) -> None:
    """What `in_own_process` starts."""
    assert task == "quality"
    given = json.loads(fields)
    job = QualityJob(**{**given, "starts": tuple(given["starts"])})
    print(json.dumps(measure(job)))


if __name__ == "__main__":
    main(*sys.argv[1:])
