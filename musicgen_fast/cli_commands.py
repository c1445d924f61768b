"""The commands beside `generate` on the command line: their options and help. What they do is in modules of their own.

Imported for every command line, so nothing heavy: what runs is imported when it runs.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_CODES = """\
exit codes:
  0    done
  1    failed: the message says why; files written so far are complete and stay
  2    a mistake on the command line; nothing was done
  130  interrupted with Ctrl-C; files written so far are complete and stay
"""


def place_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_argument("--cache-dir", metavar="DIR", help="where the hub's files are kept")


def _add_info(commands: _Commands) -> argparse.ArgumentParser:
    info = commands.add_parser(
        "info",
        help="what a model is: sizes, parameters, memory, time, what is missing",
        description="What a model is: sizes, conditioning, codec, licence, parameters, memory, time of a step on this "
        "machine, and what is missing. Reads configurations and headers; no weight is read or downloaded.",
        allow_abbrev=False,
    )
    info.set_defaults(run=_run_info, command="info")
    info.add_argument("model", metavar="MODEL", help="hub id, short name, folder, demo or random:SIZE")
    info.add_argument("--json", action="store_true", help="print JSON")
    place_options(info)
    info.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")
    return info


def _add_convert(commands: _Commands) -> argparse.ArgumentParser:
    convert = commands.add_parser(
        "convert",
        help="a checkpoint in another layout or precision",
        description="Write a checkpoint in another layout, tensor by tensor: memory does not depend on its size. The "
        "result is read back and compared, and OUT appears only when it is whole.",
        allow_abbrev=False,
    )
    convert.set_defaults(run=_run_convert, command="convert")
    convert.add_argument("input", metavar="IN", help="hub id, short name, folder, file, demo or random:SIZE")
    convert.add_argument("output", metavar="OUT", help="a folder that does not exist yet")
    convert.add_argument(
        "--to", required=True, choices=("transformers", "audiocraft", "packed"),
        help="layout of OUT. audiocraft's files hold no T5: it is put beside, in text_encoder/. packed is what the CPU "
        "decoder reads as it is: it loads in a second or two, and nothing else reads it",
    )  # fmt: skip
    convert.add_argument(
        "--precision", choices=("float32", "float16", "bfloat16", "int8", "int4"),
        help="of the language model's matrices; its norms and projections are float32 then (default: all as stored; "
        "packed: int8). int8 and int4 are packed only",
    )  # fmt: skip
    convert.add_argument("--text-encoder", metavar="NAME", help="folder or hub id of the T5, for files without one")
    convert.add_argument("--base", metavar="NAME", help="the model that a fine-tune was made from, for files alone")
    convert.add_argument("--adapter", metavar="NAME", help="folder or hub id of a LoRA adapter (PEFT) to merge")
    convert.add_argument("--adapter-scale", type=float, default=1.0, metavar="X", help="how much of it (default: 1)")
    convert.add_argument(
        "--trust-pickle", action="store_true",
        help="read a training checkpoint.th, which can run code: in a child process without network",
    )  # fmt: skip
    convert.add_argument("--overwrite", action="store_true", help="replace OUT if it is the folder of a checkpoint")
    place_options(convert)
    convert.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    convert.add_argument("-v", "--verbose", action="store_true", help="more messages, and tracebacks of errors")
    return convert


def _add_doctor(commands: _Commands) -> argparse.ArgumentParser:
    doctor = commands.add_parser(
        "doctor",
        help="whether this installation works: versions, compiled parts, GPU, caches, a self-test",
        description="Whether this installation works. Exit code 1 where something is broken, with what to do about it.",
        allow_abbrev=False,
    )
    doctor.set_defaults(run=_run_doctor, command="doctor")
    doctor.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    doctor.add_argument("--no-self-test", action="store_true", help="generate nothing")
    doctor.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")
    return doctor


def _run_info(args: argparse.Namespace) -> int:
    from .cli_info import run

    return run(args)


def _run_convert(args: argparse.Namespace) -> int:
    from .cli_convert import run

    return run(args)


def _run_doctor(args: argparse.Namespace) -> int:
    from .cli_doctor import run

    return run(args)


OTHERS = {"info": _add_info, "convert": _add_convert, "doctor": _add_doctor}
