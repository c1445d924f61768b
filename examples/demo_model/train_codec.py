"""Train the demo model's codec on the CPU: `python -m examples.demo_model.train_codec OUT --minutes 30`.

It starts as a lapped transform (`codec_init`), learns without quantiser for a share of the budget, then with codebooks
(`codec_books`). OUT gets state.pt (every minute and at Ctrl-C, whole or not at all; go on with --resume), log.jsonl,
and at the end codec/ and codec-fp16/, for transformers and musicgen_fast. All that is random follows from --seed and
the step: a run of --steps is repeatable and resumes exactly, one of --minutes depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from .codec_data import held_out_excerpts, held_out_songs, read_tracks
from .codec_judge import judge
from .codec_trainer import Options, Trainer


class _Stop:
    """Ctrl-C ends the run after the step under way; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Stop:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)


def train(trainer: Trainer, out: Path, held: dict[str, Tensor]) -> bool:
    """Until the budget is used (then True, and the codec is exported) or Ctrl-C (False).

    Appends to out/log.jsonl: the parts of the loss every `log_every` steps, and figures on the clips of `held`.
    """
    o, start = trainer.options, time.monotonic() - trainer.elapsed
    judged = saved = trainer.elapsed
    with (out / "log.jsonl").open("a") as log, _Stop() as stop:
        if trainer.step == 0:
            _judge(trainer, held, log)
        while trainer.progress < 1 and not stop.asked:
            parts = trainer.advance()
            trainer.elapsed = time.monotonic() - start
            if trainer.step % o.log_every == 0:
                _note(trainer, log, {name: round(float(value), 6) for name, value in parts.items()})
            if trainer.elapsed - judged > 60 * o.eval_minutes:
                _judge(trainer, held, log)
                judged = trainer.elapsed = time.monotonic() - start
            if trainer.elapsed - saved > 60 * o.save_minutes:
                trainer.save(out / "state.pt")
                saved = trainer.elapsed
        trainer.save(out / "state.pt")
        if stop.asked:
            return False
        if not trainer.books.ready:
            raise RuntimeError(
                "the budget ended before the codebooks began: resume with a larger one, or a smaller --warm"
            )
        _judge(trainer, held, log, final=True)
    trainer.export(out)
    return True


def _note(trainer: Trainer, log: TextIO, entry: dict[str, Any]) -> None:
    log.write(json.dumps({"step": trainer.step, "seconds": round(trainer.elapsed, 1), **entry}) + "\n")
    log.flush()


def _judge(trainer: Trainer, held: dict[str, Tensor], log: TextIO, final: bool = False) -> None:
    """A third of the clips; all of them, beside the yardsticks, when `final`."""
    for name, clips in held.items():
        part, generator = (clips, trainer.generator("judge")) if final else (clips[: -(-len(clips) // 3)], None)
        found = judge(trainer.model, trainer.books, part, generator)
        _note(trainer, log, {"held_out": name, **found})
        print(f"{trainer.step:6d} {trainer.elapsed:7.0f} s  {name}: {json.dumps(found)}", flush=True)


def _arguments(argv: Sequence[str] | None) -> tuple[Path, bool, int, dict[str, Any]]:
    """Folder, whether to resume, threads, and the options that were given."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo_model.train_codec", argument_default=argparse.SUPPRESS,
        description="Train the demo model's codec.", epilog="To finish an interrupted run now: --resume --minutes 0.",
    )  # fmt: skip
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--resume", action="store_true", default=False, help="go on from OUT/state.pt, with its options"
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own choice)")
    for field in fields(Options):
        name = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=type(field.default), help=f"default {field.default}")
    given = vars(parser.parse_args(argv))
    out, resume, threads = (given.pop(name) for name in ("out", "resume", "threads"))
    if resume != (out / "state.pt").exists():
        missing = f"{out / 'state.pt'} is not there: nothing to resume"
        parser.error(missing if resume else f"{out / 'state.pt'} exists: pass --resume, or take another folder")
    if not resume and not given.get("minutes") and not given.get("steps"):
        parser.error("pass --minutes or --steps")
    return out, resume, threads, given


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 when the codec was written, 130 when it was interrupted."""
    out, resume, threads, given = _arguments(argv)
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(out / "state.pt", weights_only=True) if resume else None
    if state is not None:
        given = {**state["options"], **({"minutes": 0.0} if "steps" in given else {}), **given}
    options = Options(**given)
    tracks, kept = read_tracks() if options.real else ([], [])
    if options.real and not tracks:
        print("immich_memories_music is not installed: training on synthetic songs only")
    trainer = Trainer(options, tracks, fresh=state is None)
    if state is not None:
        trainer.restore(state)
    held = {"synth": held_out_songs(3 * options.eval_clips, 100)}
    if kept:
        held["real"] = held_out_excerpts(kept, 3 * options.eval_clips, 100)
    if train(trainer, out, held):
        print(f"written: {out / 'codec'} and {out / 'codec-fp16'}")
        return 0
    print(f"interrupted at step {trainer.step}: go on with --resume")
    return 130


if __name__ == "__main__":
    raise SystemExit(main())
