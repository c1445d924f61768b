"""The samplers that `bench sampler` times: audiocraft's chain, transformers, torch.compile, FlashInfer, vLLM, ours.

Each is built for one `Case` and then maps the same stacked logits [2, B, K, V] (conditional, null) to tokens [B, K].
The chain of audiocraft is written here from its behaviour: guidance, temperature, softmax, filter, multinomial. It is
kinder than the original on a GPU, where that one also copies an index from the host; it needs no audiocraft. Knows
nothing of timing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..sampling import Draw, SamplingParams, draw, sample
from ..sampling.backends import BACKENDS, why_not
from ..sampling.noise import divides, multinomial_noise
from .job import AbsentError
from .sampler_case import Case, first_line

__all__ = [
    "COLUMNS", "REFERENCE", "SAMPLERS", "SEED", "Sampler", "build", "default_names", "is_ours", "reset", "tokens_of",
]  # fmt: skip

Sampler = Callable[[Tensor], Any]  # logits [2, B, K, V] -> tokens [B, K]; ours may keep them: see `tokens_of`

COLUMNS = 256  # of the sequence that `draw` and `noise` fill; then it is emptied: 1 call in 256 pays for that
SEED = 7


def tokens_of(sampler: Sampler, logits: Tensor) -> Tensor:
    """One call, and its tokens [B, K]."""
    drawn = sampler(logits)
    return drawn if isinstance(drawn, Tensor) else sampler.latest()  # type: ignore[attr-defined]


def reset(sampler: Sampler) -> None:
    """Ours back to the first column; the others have no state but torch's generator."""
    if isinstance(sampler, (IntoSequence, PublicCall)):
        sampler.reset()


def build(name: str, case: Case) -> Sampler:
    """The sampler `name` of `SAMPLERS`, tried once. Raises AbsentError with the reason where it fails.

    Tokens that are none make a peer absent; ours are compared with the reference, which says more.
    """
    try:
        sampler = SAMPLERS[name](case)
        tokens = tokens_of(sampler, case.logits())
    except AbsentError:
        raise
    except Exception as error:  # whatever a compiler or a foreign library throws: the others go on
        raise AbsentError(first_line(error)) from error
    cells = (case.batch, case.codebooks)
    if not is_ours(name) and (tokens.shape != cells or tokens.min() < 0 or tokens.max() >= case.vocab):
        raise AbsentError(f"returned tokens that are none: {list(tokens.shape)}, {tokens.flatten()[:8].tolist()}")
    return sampler


# -- the others ------------------------------------------------------------------------------------------------------


def guided(logits: Tensor, cfg_coef: float) -> Tensor:
    """[2, B, K, V] -> [B, K, V], in the dtype of the logits."""
    cond, null = logits[0], logits[1]
    return null + (cond - null) * cfg_coef


def one_each(p: Tensor) -> Tensor:
    """p [B, K, V] -> an index for each row, [B, K]."""
    return torch.multinomial(p.flatten(0, -2), 1).view(p.shape[:-1])


def audiocraft_chain(logits: Tensor, case: Case) -> Tensor:
    """Top-p switches top-k off. All ties at the k-th probability stay; the token that crosses p stays."""
    p = torch.softmax(guided(logits, case.cfg_coef) / case.temperature, -1, dtype=torch.float32)
    if case.top_p > 0:
        ranked, ids = p.sort(dim=-1, descending=True)
        ranked = ranked * (ranked.cumsum(-1) - ranked <= case.top_p)
        place = one_each(ranked / ranked.sum(-1, keepdim=True))
        return ids.gather(-1, place[..., None])[..., 0]
    if case.top_k > 0:
        least = p.topk(case.top_k).values[..., -1:]
        p = p * (p >= least)
        p = p / p.sum(-1, keepdim=True)
    return one_each(p)


def compiled(case: Case) -> Sampler:
    torch.compiler.reset()  # each case gets a graph of its own, and none meets the limit of recompilations
    return torch.compile(partial(audiocraft_chain, case=case), dynamic=False)


def transformers(case: Case) -> Sampler:
    """As its `generate` does for MusicGen: float32, a row for each codebook, only the warpers that change something."""
    try:
        from transformers.generation import logits_process as processors
    except ImportError as error:
        raise AbsentError(f"transformers is not installed ({error})") from error
    chain: list[Any] = [processors.ClassifierFreeGuidanceLogitsProcessor(case.cfg_coef)]
    if case.temperature != 1:
        chain.append(processors.TemperatureLogitsWarper(case.temperature))
    if case.top_k:
        chain.append(processors.TopKLogitsWarper(case.top_k))
    if case.top_p:
        chain.append(processors.TopPLogitsWarper(case.top_p))
    ids = torch.zeros(case.batch * case.codebooks, 1, dtype=torch.int64, device=case.device)

    def run(logits: Tensor) -> Tensor:
        scores = logits.flatten(0, 2).float()
        for process in chain:
            scores = process(ids, scores)
        return torch.multinomial(scores.softmax(-1), 1).view(case.batch, case.codebooks)

    return run


def flashinfer(case: Case) -> Sampler:
    """Its rejection samplers; it has none for guidance, which runs in torch."""
    _needs_cuda(case)
    try:
        from flashinfer import sampling
    except ImportError as error:
        raise AbsentError(f"FlashInfer is not installed ({error})") from error

    def run(logits: Tensor) -> Tensor:
        mixed = (guided(logits, case.cfg_coef) / case.temperature).flatten(0, 1)
        if case.top_p:
            drawn = sampling.top_p_sampling_from_probs(mixed.softmax(-1, dtype=torch.float32), case.top_p)
        elif case.top_k:
            drawn = sampling.top_k_sampling_from_probs(mixed.softmax(-1, dtype=torch.float32), case.top_k)
        else:
            drawn = sampling.sampling_from_logits(mixed.float())
        return drawn.view(case.batch, case.codebooks)

    return run


def vllm(case: Case) -> Sampler:
    """Its own filters (Triton from 8 rows up) and its draw; guidance runs in torch."""
    _needs_cuda(case)
    try:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample
    except ImportError as error:
        raise AbsentError(f"vLLM is not installed ({error})") from error
    rows = case.batch * case.codebooks
    k = torch.full((rows,), case.top_k, dtype=torch.int32, device=case.device) if case.top_k else None
    p = torch.full((rows,), case.top_p, device=case.device) if case.top_p else None

    def run(logits: Tensor) -> Tensor:
        mixed = (guided(logits, case.cfg_coef) / case.temperature).flatten(0, 1).float()
        probs = apply_top_k_top_p(mixed, k, p).softmax(-1, dtype=torch.float32)
        return random_sample(probs, {}).view(case.batch, case.codebooks)

    return run


def _needs_cuda(case: Case) -> None:
    if torch.device(case.device).type != "cuda":
        raise AbsentError("it needs logits on a CUDA device")


# -- ours ------------------------------------------------------------------------------------------------------------


class IntoSequence:
    """`draw` as a generation calls it: parameters built once, the next column of a sequence at each call.

    `seeded`: noise counted by seed and column. Otherwise from torch's generator, as audiocraft draws it.
    """

    def __init__(self, case: Case, backend: str, seeded: bool) -> None:
        device = torch.device(case.device)
        self.backend, self.seeded = backend, seeded
        self.params = SamplingParams.build(case.batch, case.codebooks, device, **case.numbers())
        self.divide = divides(device)
        self.sequence = torch.empty(case.batch, case.codebooks, COLUMNS, dtype=torch.int64, device=device)
        self.status = torch.zeros(case.batch, case.codebooks, dtype=torch.int32, device=device)
        self.frames = torch.zeros(COLUMNS, case.codebooks, dtype=torch.int32, device=device)
        self.seeds = torch.arange(case.batch, device=device) + SEED
        self.stream = torch.zeros_like(self.seeds)
        # A tensor a column: the counters are the decoder's to advance, and no part of the sampler's time.
        self.columns = [torch.full((case.batch,), c, dtype=torch.int32, device=device) for c in range(COLUMNS)]
        self.steps = [column.long() for column in self.columns]
        self.reset()

    def reset(self) -> None:
        self.next = 0
        self.sequence.fill_(-1)  # a known cell would be left alone, in no time

    def __call__(self, logits: Tensor) -> None:
        if self.next == COLUMNS:
            self.reset()
        at = self.next
        self.next += 1
        inputs = Draw(logits, self.params, self.sequence, self.status, column=self.columns[at], frames=self.frames)
        if self.seeded:
            inputs.seed, inputs.step, inputs.stream = self.seeds, self.steps[at], self.stream
        else:
            inputs.noise, inputs.divide = multinomial_noise(logits, self.params), self.divide
        draw(inputs, self.backend)

    def latest(self) -> Tensor:
        return self.sequence[:, :, self.next - 1]


class PublicCall:
    """`musicgen_fast.sampling.sample` with numbers, one seed for all requests, a new step at each call."""

    def __init__(self, case: Case, backend: str) -> None:
        self.given, self.backend = case.numbers(), backend
        self.reset()

    def reset(self) -> None:
        self.next = 0

    def __call__(self, logits: Tensor) -> Tensor:
        self.next += 1
        return sample(logits, **self.given, seed=SEED, step=self.next - 1, backend=self.backend)


def ours(form: str, backend: str, case: Case) -> Sampler:
    if reason := why_not(backend, torch.device(case.device)):
        raise AbsentError(reason)
    return PublicCall(case, backend) if form == "sample" else IntoSequence(case, backend, seeded=form == "draw")


FORMS = ("sample", "draw", "noise")
REFERENCE = "audiocraft"
SAMPLERS: dict[str, Callable[[Case], Sampler]] = {  # what cannot run on a device says so when it is built
    REFERENCE: lambda case: partial(audiocraft_chain, case=case),
    "transformers": transformers,
    "compiled": compiled,
    "flashinfer": flashinfer,
    "vllm": vllm,
    **{f"{form}:{backend}": partial(ours, form, backend) for backend in BACKENDS for form in FORMS},
}


def is_ours(name: str) -> bool:
    return ":" in name


def default_names(device: str | torch.device) -> list[str]:
    """What is of interest on a device, installed or not: all that could run there."""
    cuda = torch.device(device).type == "cuda"
    backends = ("torch", "triton", "cuda") if cuda else ("torch", "cpu")
    peers = [REFERENCE, "transformers", "compiled", *(("flashinfer", "vllm") if cuda else ())]
    return peers + [f"{form}:{backend}" for backend in backends for form in FORMS]
