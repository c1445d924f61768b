"""One run of training of the demo codec: the network, its codebooks and optimiser, a step, and the state between runs.

Everything random follows from the seed and the step, so that nothing of it is stored and a resumed run repeats the
uninterrupted one. Waveforms are float32 [B, 1, n], whole frames. It prints nothing and keeps no time: the caller sets
`elapsed`.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .codec_books import ResidualBooks
from .codec_data import Crops
from .codec_init import codec_config, lapped_start
from .codec_judge import wrong_in_bfloat16
from .codec_losses import CodecLoss, Weights
from .synth import RATE

_RAMP = 50  # steps until the full learning rate
_REVIVE = 25  # steps between searches for dead codes: half of what the averages remember


@dataclass(frozen=True)
class Options:
    """Everything the command line sets; `minutes` 0 means that `steps` is the budget."""

    minutes: float = 0.0
    steps: int = 0
    seed: int = 0
    filters: int = 16
    hidden: int = 128
    books: int = 4
    codes: int = 512
    scale: float = 0.1
    batch: int = 8
    frames: int = 32  # in a crop, 0.64 s
    lr: float = 3e-4
    bias_lr: float = 0.01  # of the learning rate
    lstm_lr: float = 0.1
    warm: float = 0.1  # share of the budget without quantiser
    dropout: float = 0.25  # share of items that use fewer books
    clip: float = 500.0  # norms are 50 to 700 in the first steps: the last gain is 10
    real: float = 0.2
    mel: float = Weights.mel
    convergence: float = Weights.convergence
    wave: float = Weights.wave
    commitment: float = Weights.commitment
    init_clips: int = 60  # songs of 4 s for the components of the start
    latents: int = 8192  # for k-means
    log_every: int = 20
    eval_minutes: float = 5.0
    save_minutes: float = 1.0
    eval_clips: int = 12  # of 2 s; the last evaluation takes three times as many
    fp32: bool = False


class Trainer:
    """The network, its codebooks and optimiser, and how far they are."""

    def __init__(self, options: Options, tracks: Sequence[Tensor] = (), *, fresh: bool = True) -> None:
        from transformers import EncodecModel

        o = self.options = options
        torch.manual_seed(o.seed)
        self.model: Any = EncodecModel(codec_config(o.filters, o.hidden, o.books, o.codes))
        self.crops = Crops(o.frames, tracks, o.real, o.seed)
        if fresh:
            clips = Crops(200, tracks, o.real, o.seed).batch(-1, o.init_clips)
            lapped_start(self.model, clips, scale=o.scale, seed=o.seed)
        self.books = ResidualBooks(o.books, o.codes, o.hidden)
        # Every direction is normalised and every gain free: there is nothing that decay would hold back.
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.loss = CodecLoss(RATE)
        self.bf16 = not o.fp32 and self._bf16_works()
        self.step, self.elapsed = 0, 0.0

    @property
    def progress(self) -> float:
        """Share of the budget used, 0..1."""
        o = self.options
        spent = self.elapsed / (60 * o.minutes) if o.minutes else self.step / o.steps if o.steps else 1.0
        return min(1.0, spent)

    def _groups(self) -> list[dict[str, Any]]:
        """Adam moves every number by the learning rate, but activations are around 0.01: biases must move less."""
        o, factors = self.options, {}
        for name, parameter in self.model.named_parameters():
            factor = o.bias_lr if "bias" in name else o.lstm_lr if ".lstm." in name else 1.0
            factors.setdefault(factor, []).append(parameter)
        return [{"params": parameters, "lr": o.lr, "factor": factor} for factor, parameters in factors.items()]

    def advance(self) -> dict[str, Tensor | float]:
        """One step; the parts of the loss, as tensors where reading them would cost a wait."""
        o = self.options
        if not self.books.ready and self.progress >= o.warm:
            self._start_books()
        rate = o.lr * min(1.0, (self.step + 1) / _RAMP) * 0.5 * (1 + math.cos(math.pi * self.progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        wav = self.crops.batch(self.step, o.batch)
        with self._precision():
            latents = self.model.encoder(wav)
        parts: dict[str, Any] = {}
        quantised, codes = latents, None
        if self.books.ready:
            quantised, codes, parts["commitment"] = self.books(latents, self._books_used())
        with self._precision():
            estimate = self.model.decoder(quantised)
        parts |= self.loss(wav[:, 0], estimate[:, 0])
        total = sum(getattr(o, name) * value for name, value in parts.items())
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        parts["norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), o.clip)
        self.optimizer.step()
        if codes is not None:
            self.books.learn(latents, codes)
            if self.step % _REVIVE == _REVIVE - 1:
                parts["revived"] = self.books.revive(self.generator("revive"))
        self.step += 1
        parts |= {"loss": total, "lr": rate}
        return {name: value.detach() if torch.is_tensor(value) else value for name, value in parts.items()}

    def _bf16_works(self) -> bool:
        wrong = wrong_in_bfloat16(self.model, self.crops.batch(-1, self.options.batch))
        if wrong:
            warnings.warn(f"bfloat16 is wrong here ({wrong[0]} differs): training in float32, slower", stacklevel=3)
        return not wrong

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers that follow from seed, step and purpose: nothing to store, nothing to restore."""
        place = ("books", "dropout", "revive", "judge").index(purpose)
        return torch.Generator().manual_seed((self.options.seed * 1_000_003 + self.step) * 4 + place)

    def _books_used(self) -> Tensor:
        o, rng = self.options, self.generator("dropout")
        fewer = torch.randint(1, max(o.books, 2), (o.batch,), generator=rng)
        return torch.where(torch.rand(o.batch, generator=rng) < o.dropout, fewer, o.books)

    @torch.no_grad()
    def _start_books(self) -> None:
        o = self.options
        batches = -(-max(o.latents, o.codes) // (o.batch * o.frames))
        found = [self.model.encoder(self.crops.batch(-2 - i, o.batch)).float() for i in range(batches)]
        flat = torch.cat(found).transpose(1, 2).flatten(0, 1)
        self.books.start(flat, o.batch * o.frames, self.generator("books"))

    def save(self, path: Path) -> None:
        """Everything that goes on, in one file that is there whole or not at all."""
        state = {
            "options": asdict(self.options),
            "step": self.step,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "books": self.books.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        part = path.with_name(path.name + ".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self, state: dict[str, Any]) -> None:
        """From what `save` wrote, `torch.load`ed; the options stay those of this trainer."""
        for name in ("filters", "hidden", "books", "codes", "seed"):
            if (then := state["options"][name]) != (now := getattr(self.options, name)):
                raise ValueError(f"the saved run has {name} {then}, not {now}: resume it with --{name} {then}")
        self.model.load_state_dict(state["model"])
        self.books.load_state_dict(state["books"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]

    def export(self, folder: Path) -> None:
        """Folders codec/ (float32) and codec-fp16/ for `EncodecModel.from_pretrained` and for musicgen_fast."""
        self.books.write(self.model)
        self.model.save_pretrained(folder / "codec")
        copy.deepcopy(self.model).half().save_pretrained(folder / "codec-fp16")
