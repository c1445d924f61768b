"""The command line, `musicgen-fast`: `generate`, `render`, `info`, `convert`, `doctor` and `bench`.

Options, help, error messages and exit codes. What the commands do is in `cli_generate.py`, `cli_info.py` and so on,
imported when they run: `--help` and mistakes on the command line cost no import of torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from . import __version__
from .cli_bench import add_commands as add_bench_commands
from .cli_commands import EXIT_CODES, OTHERS, place_options
from .cli_output import FORMATS, logging_to_stderr, name_template
from .cli_render import add_command as add_render_command
from .config import GenerationParams

DEFAULTS = GenerationParams(duration=10.0)
_EXAMPLES = """\
examples:
  musicgen-fast generate "lofi beat with warm piano"
  musicgen-fast generate "80s synth pop" "slow blues" --duration 20 --seed 7 -n 3 -f mp3
  musicgen-fast generate - -o album < prompts.txt
  musicgen-fast generate "ambient pads" --endless -o - | aplay -f S16_LE -r 32000 -c 1
  musicgen-fast generate "add drums" --continue song.ogg --continue-seconds 5 --duration 20
  musicgen-fast generate "string quartet" -m facebook/musicgen-melody --melody tune.wav
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own) and return its exit code; argparse itself exits with 0 or 2."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser()
    args = _parse(commands[given[0]], given[1:]) if given and given[0] in commands else parser.parse_args(given)
    try:
        with logging_to_stderr(args.verbose, getattr(args, "quiet", False)):
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except argparse.ArgumentError as error:
        commands[args.command].error(str(error))
    except KeyboardInterrupt:
        print("musicgen-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our lines is gone; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if args.verbose:
            traceback.print_exc()
        print(f"musicgen-fast: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Prompts may stand before, between and behind the options; what follows `--` is prompts only.

    The `--` is taken off here because `parse_intermixed_args` of Python 3.11 loses its way there.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    words = [_with_dashes(word) if word.startswith("--") else word for word in argv[:end]]
    if parser.get_default("command") != "generate":
        return parser.parse_args(words + argv[end:])
    args = parser.parse_intermixed_args(words)
    args.prompts = [*args.prompts, *argv[end + 1 :]]
    return args


def _with_dashes(option: str) -> str:
    """`--top_k=5` as `--top-k=5`: both spellings are in use."""
    name, equals, value = option.partition("=")
    return name.replace("_", "-") + equals + value


def _one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 2]"
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and the parser of each command by its name."""
    parser = argparse.ArgumentParser(
        prog="musicgen-fast",
        description="Music from text with MusicGen models.",
        epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"musicgen-fast {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="{generate,render,info,convert,doctor,bench}", required=True
    )
    generate = commands.add_parser(
        "generate",
        help="make music: one sound file and one JSON file for every piece",
        usage="%(prog)s [options] [PROMPT ...]",
        description="Make music. Writes a sound file for every piece, and beside it a JSON file with its prompt,\n"
        "every parameter and the seed. Options may be spelled with - or with _.",
        epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    generate.set_defaults(run=_run_generate, command="generate")
    for add in (_prompt_options, _model_options, _sampling_options, _audio_options, _output_options):
        add(generate)
    render = add_render_command(commands)
    others = {name: add(commands) for name, add in OTHERS.items()}
    return parser, {"generate": generate, **render, **others, **add_bench_commands(commands)}


def _run_generate(args: argparse.Namespace) -> int:
    from .cli_plan import streams

    if streams(args):
        from .cli_stream import run
    else:
        from .cli_generate import run
    return run(args)


def _prompt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to make")
    group.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="a description; - reads them from standard input, one a line"
    )
    group.add_argument(
        "--prompt", "--text", "--description", action="append", default=[], dest="more_prompts", metavar="TEXT",
        help="a description, as an option; may be given several times",
    )  # fmt: skip
    group.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from, for all prompts")
    group.add_argument(
        "--sections", metavar="FILE",
        help="a prompt for every part: lines such as '0:20 drums enter'; writes the file while it is made",
    )  # fmt: skip
    group.add_argument(
        "--crossfade", type=float, metavar="S", help="seconds over which a section takes over (default: 0.5)"
    )
    group.add_argument("--unconditional", type=_count, metavar="N", help="N pieces without a description")
    group.add_argument(
        "-n", "--variations", "--num-variations", type=_count, default=1, metavar="N",
        help="pieces of every prompt, each with its own seed (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--duration", "--secs", "--seconds", type=float, default=DEFAULTS.duration, metavar="S",
        help=f"length in seconds, a continued recording included (default: {DEFAULTS.duration:g})",
    )  # fmt: skip


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", default="facebook/musicgen-small", metavar="NAME",
        help="hub id, short name (small, medium, large, melody, style), folder, demo (small, comes with this package, "
        "needs no network), or random:SIZE for random weights (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "-d", "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )
    group.add_argument(
        "--precision", choices=("float32", "float16", "bfloat16", "int8", "int4", "auto"), default="auto",
        help="of the matrices; auto: int8 on a CPU, float16 on a GPU; float32 gives the reference's tokens; int4 is "
        "faster still, and audibly worse (default: auto)",
    )  # fmt: skip
    group.add_argument("--text-encoder", metavar="NAME", help="folder or hub id of the T5, for files without one")
    group.add_argument(
        "--base", metavar="NAME", help="the model that a fine-tune was made from: lends codec and T5 to files without"
    )
    group.add_argument("--adapter", metavar="NAME", help="folder or hub id of a LoRA adapter (PEFT) for the model")
    group.add_argument(
        "--adapter-scale", type=float, default=1.0, metavar="X",
        help="how much of the adapter; 0: nothing (default: 1)",
    )  # fmt: skip
    group.add_argument("--style-encoder", metavar="NAME", help="folder or hub id of MERT, for style models")
    group.add_argument(
        "--batch-size", type=_count, metavar="N", help="pieces made at the same time (default: 1 on a CPU, 8 on a GPU)"
    )
    group.add_argument(
        "--compat", choices=("isolated", "audiocraft"), default="isolated",
        help="isolated: a piece does not depend on its batch; audiocraft: its padding of batches (default: isolated)",
    )  # fmt: skip
    place_options(group)


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--seed", type=_seed, metavar="N",
        help="0 or more; variation v of prompt p gets N + p * variations + v, both from 0. -1, none or random draw a "
        "seed, which is printed and stored (default: random)",
    )  # fmt: skip
    group.add_argument(
        "--top-k", "--topk", type=int, default=DEFAULTS.top_k, metavar="K",
        help="keep the K most likely tokens; 0: all (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--top-p", "--topp", type=float, default=DEFAULTS.top_p, metavar="P",
        help="keep the most likely tokens up to this mass, instead of --top-k; 0: off (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--temperature", "--temp", type=float, default=DEFAULTS.temperature, metavar="T",
        help="above 1 wilder, below 1 tamer (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--greedy", "--no-sampling", action="store_true", help="always the most likely token; the seed has no effect"
    )
    group.add_argument(
        "--cfg-coef", "--guidance", "--guidance-scale", "--cfg", "--cfg-scale", type=float, default=DEFAULTS.cfg_coef,
        metavar="C", help="how strictly the description is followed; 1: no guidance, twice as fast (default: 3)",
    )  # fmt: skip
    group.add_argument(
        "--cfg-coef-beta", type=float, metavar="B", help="double guidance of style models (default: off)"
    )
    group.add_argument("--two-step-cfg", action="store_true", help="pad the branch without a description on its own")
    windows = group.add_mutually_exclusive_group()
    windows.add_argument(
        "--extend-stride", type=float, metavar="S",
        help="beyond the model's window (30 s): seconds between two windows (default: 18, at most 0.6 windows)",
    )  # fmt: skip
    windows.add_argument("--overlap", type=float, metavar="S", help="the same by the seconds that two windows share")


def _audio_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("from a recording (wav, flac, ogg, opus, mp3)")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--continue", "--continuation", dest="continuation", metavar="FILE", help="the music starts as this recording"
    )
    kind.add_argument(
        "--melody", "--style", dest="melody", metavar="FILE",
        help="the music follows this melody (melody models) or sounds like it (style models)",
    )  # fmt: skip
    group.add_argument(
        "--continue-from", type=float, metavar="S", help="start S seconds into the recording (default: 0)"
    )
    group.add_argument("--continue-seconds", type=float, metavar="S", help="use S seconds of it (default: all)")
    group.add_argument(
        "--no-separate",
        action="store_true",
        help="melody: follow the whole mix, which needs no demucs (default: without drums and bass)",
    )


def _output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output-dir", default="out", metavar="DIR",
        help="made if need be; - writes raw 16-bit samples to standard output while they are made (default: out)",
    )  # fmt: skip
    group.add_argument(
        "--stream", action="store_true", help="write the file while it is made; it can be played at once"
    )
    group.add_argument("--endless", action="store_true", help="--stream without an end; Ctrl-C stops it")
    group.add_argument(
        "--fade-out", type=float, default=0.0, metavar="S", help="with --stream: fade the last S seconds (default: 0)"
    )
    group.add_argument("-f", "--format", choices=FORMATS, default="wav", help="of the files (default: wav)")
    group.add_argument(
        "--loudness", choices=("loudness", "peak", "rms", "clip", "none"),
        help="level of the files. loudness: -14 LUFS, peaks bent softly; peak: the highest sample at -1 dBFS; rms: the "
        "mean at -18 dBFS; clip: as made, cut at -1 dBFS; none: as made, cut at 0 dBFS (default: loudness)",
    )  # fmt: skip
    group.add_argument(
        "--filename", type=name_template, default=name_template("{prompt}_{seed}"), metavar="TEMPLATE",
        help="of {index} {prompt} {seed} {model} {variation}, without the suffix; {index:03d} and sub-folders work "
        "(default: {prompt}_{seed})",
    )  # fmt: skip
    group.add_argument(
        "--overwrite", action="store_true", help="replace files of the same name (default: name_2, name_3, ...)"
    )
    group.add_argument("--no-sidecar", action="store_true", help="no JSON files")
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="a bar on standard error (default: on a terminal)"
    )
    group.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    group.add_argument("-v", "--verbose", action="store_true", help="more messages, and tracebacks of errors")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _seed(text: str) -> int | None:
    """A seed; None stands for one that is drawn. 0 is a seed like any other."""
    if text.lower() in ("-1", "none", "random"):
        return None
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected 0 to 2**63 - 1, or -1, none or random, got {text!r}")
    return int(text)
