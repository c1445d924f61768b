"""Train the demo's language model: `python -m examples.demo_model.train_lm TOKENS HELD OUT --minutes 50`.

TOKENS and HELD are folders that `tokens` made (HELD with --held). OUT gets spiece.model, state.pt (every minute and at
Ctrl-C, whole or not at all; go on with --resume), log.jsonl with nats per codebook, and at the end lm.pt for `ship`.
All that is random follows from --seed and the step: a run of --steps is repeatable and resumes exactly, one of
--minutes depends on the machine's speed. It knows nothing of audio.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from musicgen_fast.conditioning.text import TextTokenizer
from musicgen_fast.evaluation.likelihood import unigram_cross_entropy

from .lm import DemoLM, Sizes, cosine, optimizer
from .lm_data import Batch, Batches, Mixed
from .text import train_vocabulary, training_captions, write_tokenizer
from .tokens import TokenSet, read_tokens

_START = 25  # frames, half a second
_FEWEST = 16  # frames that a beginning counts for when they are put together: there are captions to encode, too


@dataclass(frozen=True)
class Options:
    """Everything the command line sets; `minutes` 0 means that `steps` is the budget."""

    minutes: float = 0.0
    steps: int = 0
    seed: int = 0
    dim: int = Sizes.dim
    layers: int = Sizes.layers
    ffn: int = Sizes.ffn
    text_dim: int = Sizes.text_dim
    text_layers: int = Sizes.text_layers
    text_ffn: int = Sizes.text_ffn
    batch: int = 16
    frames: int = 512  # in a crop, 10.24 s
    aligned: float = 0.5  # share of crops that begin where the song does; half of the others on a step
    drop: float = 0.15  # share of captions that are dropped, for guidance
    beginnings: str = ""  # a token set of short clips: the first second or two of many songs
    start: str = "8,32,72"  # frames of them, in turn
    share: float = 0.5  # of the steps that take them
    guide: float = 0.1  # weight of where the reading head looks
    weights: str = "1,1,1,1"  # of the codebooks in the loss
    lr: float = 4e-3  # held-out nats after 50 steps: 5.03 at 1.5e-3, 4.60 at 3e-3, 4.24 at 6e-3, 4.77 at 12e-3
    decay: float = 0.05
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.0  # e.g. 0.999: judge and export a moving average of the weights
    log_every: int = 20
    eval_minutes: float = 2.0
    save_minutes: float = 1.0
    eval_clips: int = 32  # the last evaluation takes all of HELD
    fp32: bool = False

    def sizes(self, tokens: TokenSet, vocabulary: int) -> Sizes:
        return Sizes(
            self.dim, self.layers, self.ffn, tokens.tokens.shape[1], tokens.codes, self.text_dim, self.text_layers,
            self.text_ffn, -(-vocabulary // 32) * 32,
        )  # fmt: skip


class Trainer:
    """The model, its optimiser and average, and how far they are."""

    def __init__(self, options: Options, sizes: Sizes) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        self.model = DemoLM(sizes)
        self.average = self._weights() if options.ema else None
        self.optimizer = optimizer(self.model, options.lr, options.decay)
        weights = torch.tensor([float(weight) for weight in options.weights.split(",")])
        if len(weights) != sizes.books:
            raise ValueError(f"weights: {sizes.books} codebooks need as many, not {options.weights!r}")
        self.book_weights = weights / weights.sum()
        self.step, self.frames, self.elapsed = 0, 0, 0.0

    @property
    def progress(self) -> float:
        """Share of the budget used, 0..1."""
        o = self.options
        spent = self.elapsed / (60 * o.minutes) if o.minutes else self.step / o.steps if o.steps else 1.0
        return min(1.0, spent)

    def advance(self, batch: Batch) -> dict[str, Any]:
        """One step; figures as tensors."""
        o = self.options
        rate = o.lr * cosine(self.progress, self.step, o.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._precision():
            nats, astray = self.model(*batch)
        books = nats.mean((0, 2))
        loss = books @ self.book_weights + o.guide * astray
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), o.clip)
        if not norm.isfinite():  # before it gets into the weights, and these into state.pt
            raise RuntimeError(f"the gradient of step {self.step} is not finite: resume with a lower --lr")
        self.optimizer.step()
        if self.average is not None:
            for name, weight in self._weights(copied=False).items():
                self.average[name].lerp_(weight, 1 - min(o.ema, (self.step + 1) / (self.step + 10)))
        self.step += 1
        self.frames += batch[0].shape[0] * batch[0].shape[2]
        return {"loss": loss.detach(), "books": books.detach(), "astray": astray.detach(), "norm": norm, "lr": rate}

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=not self.options.fp32)

    def _weights(self, copied: bool = True) -> dict[str, Tensor]:
        return {name: w.detach().clone() if copied else w.detach() for name, w in self.model.named_parameters()}

    @torch.no_grad()
    def judge(self, batch: Batch) -> Tensor:
        """Nats per token of each codebook [K], in float32, of the averaged weights if there are any."""
        own = self._weights()
        self._load(self.average or own)
        parts = [self.model(*(part[i : i + 8] for part in batch))[0].sum((0, 2)) for i in range(0, len(batch[0]), 8)]
        self._load(own)
        return torch.stack(parts).sum(0) / (len(batch[0]) * batch[0].shape[2])

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    def save(self, path: Path) -> None:
        """Everything that goes on."""
        state = {name: getattr(self, name) for name in ("step", "frames", "elapsed", "average")}
        state |= {"options": asdict(self.options), "model": self.model.state_dict()}
        _save({**state, "optimizer": self.optimizer.state_dict()}, path)

    def restore(self, state: dict[str, Any]) -> None:
        """From what `save` wrote, `torch.load`ed; the options stay those of this trainer."""
        for name in ("dim", "layers", "ffn", "text_dim", "text_layers", "text_ffn", "seed"):
            if (then := state["options"][name]) != (now := getattr(self.options, name)):
                raise ValueError(f"the saved run has {name} {then}, not {now}: resume it with --{name} {then}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.frames, self.elapsed = (state[name] for name in ("step", "frames", "elapsed"))
        self.average = (state["average"] or self._weights()) if self.options.ema else None

    def export(self, path: Path) -> None:
        """Sizes and float32 weights, for `ship`."""
        self._load(self.average or self._weights())
        parts = {"transformer": self.model.transformer.state_dict(), "text": self.model.text.state_dict()}
        _save({"sizes": asdict(self.model.sizes), **parts}, path)


def _save(content: dict[str, Any], path: Path) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(content, part)
    os.replace(part, path)


def train(trainer: Trainer, data: Batches | Mixed, held: Batches, out: Path) -> bool:
    """Until the budget is used (then True, and lm.pt is written) or Ctrl-C (False), which lets a step end."""
    o, start = trainer.options, time.monotonic() - trainer.elapsed
    judged = saved = trainer.elapsed
    asked: list[int] = []

    def ask(number: int, *_: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)  # a second Ctrl-C ends the run at once

    before = signal.signal(signal.SIGINT, ask)
    try:
        with (out / "log.jsonl").open("a") as log:
            while trainer.progress < 1 and not asked:
                found = trainer.advance(data.batch(trainer.step))
                trainer.elapsed = time.monotonic() - start
                if trainer.step % o.log_every == 0:
                    _note(trainer, log, {name: _rounded(value) for name, value in found.items()})
                if trainer.elapsed - judged > 60 * o.eval_minutes:
                    _judge(trainer, data, held, o.eval_clips, log)
                    judged = trainer.elapsed = time.monotonic() - start
                if trainer.elapsed - saved > 60 * o.save_minutes:
                    trainer.save(out / "state.pt")
                    saved = trainer.elapsed
            trainer.save(out / "state.pt")
            if not asked:
                _judge(trainer, data, held, len(held.data.tokens), log)
                trainer.export(out / "lm.pt")
    finally:
        signal.signal(signal.SIGINT, before)
    return not asked


def _rounded(value: Any) -> Any:
    return [round(v, 4) for v in value.tolist()] if torch.is_tensor(value) and value.dim() else round(float(value), 6)


def _note(trainer: Trainer, log: TextIO, entry: dict[str, Any]) -> None:
    passed = {"step": trainer.step, "seconds": round(trainer.elapsed, 1), "frames": trainer.frames}
    log.write(json.dumps({**passed, **entry}) + "\n")
    log.flush()


def _judge(trainer: Trainer, data: Batches | Mixed, held: Batches, clips: int, log: TextIO) -> None:
    """Nats with captions and without, beside those of the training set's token frequencies, of the same tokens; and
    what the captions save on codebook 1 of the first half second, where the sound has not told everything yet."""
    trained_on = torch.from_numpy(np.array(data.data.tokens))
    unigram = unigram_cross_entropy(trained_on, held.first(clips, True)[0], data.data.codes)
    found = {"unigram": unigram} | {
        name: trainer.judge(held.first(clips, captions)) for name, captions in (("captions", True), ("none", False))
    }
    report = {name: _rounded(value) for name, value in found.items()}
    report["saved"] = round(100 * (1 - float(found["captions"].mean() / unigram.mean())), 1)  # percent
    blind, told = (trainer.judge(held.first(clips, captions, _START)) for captions in (False, True))
    report["start"] = round(float(blind[0] - told[0]), 3)
    _note(trainer, log, {"held_out": report})
    print(f"{trainer.step:6d} {trainer.elapsed:7.0f} s  {json.dumps(report)}", flush=True)


def _arguments(argv: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Folders, threads and --resume; and the options that were given."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo_model.train_lm", argument_default=argparse.SUPPRESS,
        description="Train the demo's language model.", epilog="To finish an interrupted run: --resume --minutes 0.",
    )  # fmt: skip
    for name in ("tokens", "held", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--resume", action="store_true", default=False, help="go on from OUT/state.pt, its options")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own choice)")
    for field in fields(Options):
        kind: dict[str, Any] = {"type": type(field.default), "help": f"default {field.default}"}
        kind = {"action": "store_true"} if field.type == "bool" else kind
        parser.add_argument("--" + field.name.replace("_", "-"), **kind)
    given = vars(parser.parse_args(argv))
    run = {name: given.pop(name) for name in ("tokens", "held", "out", "resume", "threads")}
    if run["resume"] != (run["out"] / "state.pt").exists():
        where = run["out"] / "state.pt"
        parser.error(f"nothing to resume: no {where}" if run["resume"] else f"{where} exists: pass --resume or move it")
    if not run["resume"] and not given.get("minutes") and not given.get("steps"):
        parser.error("pass --minutes or --steps")
    return run, given


def _batches(options: Options, tokens: TokenSet, tokenizer: TextTokenizer) -> Batches:
    o = options
    return Batches(tokens, tokenizer, size=o.batch, frames=o.frames, seed=o.seed, aligned=o.aligned, drop=o.drop)


def _with_beginnings(options: Options, long: Batches, tokenizer: TextTokenizer) -> Batches | Mixed:
    """`long`, or that mixed with beginnings, up to as many frames a step."""
    if not (o := options).beginnings:
        return long
    tokens = read_tokens(Path(o.beginnings))
    if tokens.codes != long.data.codes:
        raise ValueError(f"{o.beginnings} has codebooks of {tokens.codes}, not {long.data.codes}: of another codec")
    # What a beginning has to teach is the labels; without a melody its caption is a fifth as long.
    made = partial(Batches, tokens, tokenizer, seed=o.seed, aligned=1.0, drop=o.drop, spelling=False)
    fit = [(frames, max(1, o.batch * o.frames // max(frames, _FEWEST))) for frames in map(int, o.start.split(","))]
    return Mixed(long, [made(size=size, frames=frames) for frames, size in fit], o.share)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 when lm.pt was written, 130 when it was interrupted."""
    run, given = _arguments(argv)
    if run["threads"]:
        torch.set_num_threads(run["threads"])
    out: Path = run["out"]
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(out / "state.pt", weights_only=True) if run["resume"] else None
    if state is None:
        write_tokenizer(out, train_vocabulary(training_captions()))
    else:
        given = {**state["options"], **({"minutes": 0.0} if "steps" in given else {}), **given}
    options, tokenizer = Options(**given), TextTokenizer.load(out)
    data, held = (_batches(options, read_tokens(run[name]), tokenizer) for name in ("tokens", "held"))
    trainer = Trainer(options, options.sizes(data.data, tokenizer.vocab_size))
    if state is not None:
        trainer.restore(state)
    mixed = _with_beginnings(options, data, tokenizer)
    if train(trainer, mixed, held, out):
        print(f"written: {out / 'lm.pt'}")
        return 0
    print(f"interrupted at step {trainer.step}: go on with --resume")
    return 130


if __name__ == "__main__":
    raise SystemExit(main())
