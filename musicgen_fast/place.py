"""Where a column of tokens is written, and how it is drawn: what one call of the sampler reads and writes.

Tensors on the device of the logits, for B requests at once; a part of the requests is a view of the same memory. Knows
no lanes, caches and branches. Shapes: sequence [B, K, S], logits [NB, B, K, V].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .rng import rng_state, set_rng_state
from .sampling import Draw, SamplingParams, draw
from .sampling.noise import divides, multinomial_noise


@dataclass
class Place:
    """Where a column is written, on the device of the logits: what the sampler reads and writes besides parameters.

    `sequence` int64 [B, K, S], `UNKNOWN` where a token is to be drawn; `frames` int32 [S, K] is all zeros: cells that
    the pattern masks hold the special token from the start, so one table serves every pattern and length. `column`
    int32 [B] is the place in the window (outside of [0, S): nothing is drawn), `step` int64 [B] the same counted over
    the whole generation; `status` int32 [B, K] is 1 where a draw failed. `reserved`: states of the global generator
    from which the next columns take their noise, see `Sampler.reserve`.
    """

    sequence: Tensor
    frames: Tensor
    column: Tensor
    step: Tensor
    status: Tensor
    reserved: list[Tensor] = field(default_factory=list)

    @staticmethod
    def allocate(batch: int, num_codebooks: int, num_steps: int, device: torch.device | str) -> Place:
        """Room for windows of up to S columns; no column is being drawn."""
        return Place(
            torch.zeros(batch, num_codebooks, num_steps, dtype=torch.int64, device=device),
            torch.zeros(num_steps, num_codebooks, dtype=torch.int32, device=device),
            torch.full((batch,), num_steps, dtype=torch.int32, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, num_codebooks, dtype=torch.int32, device=device),
        )

    def rows(self, first: int, last: int) -> Place:
        """The requests [first, last), on the same memory."""
        part = slice(first, last)
        return Place(self.sequence[part], self.frames, self.column[part], self.step[part], self.status[part])

    def advance(self) -> None:
        self.column.add_(1)
        self.step.add_(1)


@dataclass
class Sampler:
    """How the tokens of a column are drawn, for all B requests.

    Without `seeds` this is noise mode: `exponential_` from the global generator of the logits' device at every column,
    all K codebooks: the random numbers of audiocraft and transformers, in their order. With `seeds` the noise is
    counted by (seed, column of the whole generation, codebook, token).
    """

    params: SamplingParams
    seeds: Tensor | None = None  # int64 [B]
    backend: str = "auto"
    stream: Tensor | None = field(init=False)  # 0, ordinary sampling, for all

    def __post_init__(self) -> None:
        self.stream = None if self.seeds is None else torch.zeros_like(self.seeds)

    def __call__(self, logits: Tensor, place: Place) -> None:
        """logits [NB, B, K, V] -> the column of `place`: its unknown cells get their tokens."""
        inputs = Draw(logits, self.params, place.sequence, place.status, column=place.column, frames=place.frames)
        if self.seeds is not None:
            inputs.seed, inputs.step, inputs.stream = self.seeds, place.step, self.stream
        elif not self.params.all_greedy:
            inputs.noise, inputs.divide = self._noise(logits, place), divides(logits.device)
        draw(inputs, self.backend)

    def _noise(self, logits: Tensor, place: Place) -> Tensor:
        if not place.reserved:
            return multinomial_noise(logits, self.params)
        now = rng_state(logits.device)
        set_rng_state(logits.device, place.reserved.pop(0))
        noise = multinomial_noise(logits, self.params)
        set_rng_state(logits.device, now)
        return noise

    def reserve(self, place: Place, columns: int, vocab: int) -> None:
        """In noise mode, set the random numbers of the next columns aside: others may draw before these do."""
        if self.seeds is not None or self.params.all_greedy:
            return
        cells, device = place.status.numel(), place.status.device
        for _ in range(columns):
            place.reserved.append(rng_state(device))
            torch.empty(cells, vocab, device=device).exponential_(1)  # the numbers of `multinomial_noise`, thrown away

    def set_guidance(self, request: int, cfg_coef: float, temperature: float) -> None:
        """Other values for one request from the next draw on; a temperature <= 0 is greedy."""
        new = SamplingParams.build(1, self.params.scale.shape[1], cfg_coef=cfg_coef, temperature=temperature)
        for name in ("cfg_coef", "scale", "divisor"):  # in place: a captured graph reads these tensors
            getattr(self.params, name)[request] = getattr(new, name)[0]
        all_greedy = new.all_greedy and bool((self.params.scale < 0).all())
        if all_greedy != self.params.all_greedy:
            self.params = replace(self.params, all_greedy=all_greedy)
