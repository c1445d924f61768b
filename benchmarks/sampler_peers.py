"""The samplers that `bench_sampler.py` times: audiocraft's chain, transformers, torch.compile, FlashInfer, vLLM, ours.

Each is built for one `Case` and then maps the same stacked logits [2, B, K, V] (conditional, null) to tokens [B, K].
The chain of audiocraft is written here from its behaviour: guidance, temperature, softmax, filter, multinomial. It is
kinder than the original on a GPU, where that one also copies an index from the host. Knows nothing of timing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from musicgen_fast.sampling import Draw, SamplingParams, draw, sample
from musicgen_fast.sampling.backends import why_not
from musicgen_fast.sampling.noise import divides, multinomial_noise

Sampler = Callable[[Tensor], Any]  # logits [2, B, K, V] -> tokens [B, K]; ours may keep them: see `tokens_of`

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = 256  # of the sequence that `draw` and `noise` fill; then it is emptied: 1 call in 256 pays for that
SEED = 7


class AbsentError(Exception):
    """This sampler cannot run here; says why. (Not the one of `providers.py`: that needs all that a model needs.)"""


@dataclass(frozen=True)
class Case:
    """What is sampled. `filter` is none, top_kN or top_pX; guidance of two branches."""

    device: str = "cpu"
    batch: int = 1
    codebooks: int = 4
    filter: str = "top_k250"
    dtype: str = "float32"
    vocab: int = 2048
    cfg_coef: float = 3.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"none|top_k[1-9]\d*|top_p0?\.\d+", self.filter):
            raise ValueError(f"a filter is none, top_k250 or top_p0.9 with numbers of your own, got {self.filter!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"a dtype is one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if min(self.batch, self.codebooks) < 1:
            raise ValueError(f"batch and codebooks must be at least 1, got {self.batch} and {self.codebooks}")

    @property
    def top_k(self) -> int:
        return int(self.filter[5:]) if self.filter.startswith("top_k") else 0

    @property
    def top_p(self) -> float:
        return float(self.filter[5:]) if self.filter.startswith("top_p") else 0.0

    @property
    def title(self) -> str:
        return f"batch {self.batch}, {self.codebooks} codebooks, {self.filter}, {self.dtype}"

    def logits(self) -> Tensor:
        """[2, B, K, V] normal with deviation 2.5, the null branch near the conditional one."""
        generator = torch.Generator().manual_seed(self.batch * 100 + self.codebooks)
        shape = (self.batch, self.codebooks, self.vocab)
        cond = torch.randn(shape, generator=generator) * 2.5
        null = cond + 0.5 * torch.randn(shape, generator=generator)
        return torch.stack([cond, null]).to(self.device, DTYPES[self.dtype])

    def numbers(self) -> dict[str, Any]:
        """The arguments that `sample` and `SamplingParams.build` share."""
        return {
            "cfg_coef": self.cfg_coef,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


def tokens_of(sampler: Sampler, logits: Tensor) -> Tensor:
    """One call, and its tokens [B, K]."""
    drawn = sampler(logits)
    return drawn if isinstance(drawn, Tensor) else sampler.latest()  # type: ignore[attr-defined]


def reset(sampler: Sampler) -> None:
    """Back to the first column, for those that write into a sequence; the others have no state."""
    if isinstance(sampler, IntoSequence):
        sampler.reset()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"


def build(name: str, case: Case) -> Sampler:
    """The sampler `name` of `peers(case.device)`, tried once. Raises AbsentError with the reason where it fails."""
    try:
        sampler = peers(case.device)[name](case)
        tokens = tokens_of(sampler, case.logits())
    except AbsentError:
        raise
    except Exception as error:  # whatever a compiler or a foreign library throws: the others go on
        raise AbsentError(first_line(error)) from error
    if tokens.shape != (case.batch, case.codebooks) or tokens.min() < 0 or tokens.max() >= case.vocab:
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
    """`musicgen_fast.sampling.sample` with numbers, a new step at each call."""

    def __init__(self, case: Case, backend: str) -> None:
        self.given, self.backend, self.step = case.numbers(), backend, 0

    def __call__(self, logits: Tensor) -> Tensor:
        self.step += 1
        return sample(logits, **self.given, seed=SEED, step=self.step, backend=self.backend)


def ours(form: str, backend: str, case: Case) -> Sampler:
    if reason := why_not(backend, torch.device(case.device)):
        raise AbsentError(reason)
    return PublicCall(case, backend) if form == "sample" else IntoSequence(case, backend, seeded=form == "draw")


FORMS = ("sample", "draw", "noise")
REFERENCE = "audiocraft"
_BACKENDS = {"cpu": ("torch", "cpu"), "cuda": ("torch", "triton", "cuda")}


def peers(device: str) -> dict[str, Callable[[Case], Sampler]]:
    """By name, all that can be asked for on a device; what is missing there says so when it is built."""
    kind = torch.device(device).type
    known: dict[str, Callable[[Case], Sampler]] = {
        REFERENCE: lambda case: partial(audiocraft_chain, case=case),
        "transformers": transformers,
        "compiled": compiled,
    }
    if kind == "cuda":
        known |= {"flashinfer": flashinfer, "vllm": vllm}
    return known | {f"{form}:{backend}": partial(ours, form, backend) for backend in _BACKENDS[kind] for form in FORMS}
