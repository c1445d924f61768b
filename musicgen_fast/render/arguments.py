"""The options of `musicgen-fast render`, for argparse. Imports neither torch nor anything that does."""

from __future__ import annotations

import argparse
import math
import os

from ..cli_output import FORMATS
from ..config import MAX_DURATION, GenerationParams
from .names import FIELDS, check_template
from .progress import MODES
from .shards import Shard, parse_shard

__all__ = ["add_options"]

DEFAULTS = GenerationParams(duration=10.0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """All options of `render`."""
    parser.add_argument(
        "manifest", metavar="MANIFEST",
        help="what to make: .jsonl, .csv or .tsv with a prompt and whatever else belongs to a piece; or a text file "
        "with one prompt a line",
    )  # fmt: skip
    for add in (
        _manifest_options, _model_options, _sampling_options, _output_options, _run_options, _engine_options,
    ):  # fmt: skip
        add(parser)


def _manifest_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("manifest")
    group.add_argument(
        "--manifest-format", choices=("jsonl", "csv", "tsv", "txt"), help="default: by the suffix of its name"
    )
    group.add_argument("--ignore-extra", action="store_true", help="pass over unknown fields (default: refuse them)")
    group.add_argument(
        "--input-root", metavar="DIR",
        help="recordings that the manifest names lie below this folder (default: that of the manifest)",
    )  # fmt: skip
    group.add_argument(
        "--shard", type=_shard, default=Shard(), metavar="I/N",
        help="make part I, from 1, of N; auto: as Slurm or torchrun says (default: everything)",
    )  # fmt: skip
    group.add_argument("--limit", type=_count, metavar="N", help="only the first N pieces")
    group.add_argument(
        "--max-duration", type=_positive, default=float(MAX_DURATION), metavar="S",
        help="refuse longer pieces (default: %(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--max-prompt", type=_count, default=4000, metavar="N", help="refuse longer texts (default: %(default)s)"
    )
    group.add_argument(
        "--max-variations", type=_count, default=1000, metavar="N", help="of one line (default: %(default)s)"
    )
    group.add_argument(
        "--max-input-seconds", type=_positive, default=600.0, metavar="S",
        help="refuse longer recordings (default: %(default)g)",
    )  # fmt: skip


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", default="facebook/musicgen-small", metavar="NAME",
        help="hub id, short name, folder, demo, or random:SIZE (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "-d", "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )
    group.add_argument(
        "--precision", choices=("float32", "float16", "bfloat16", "int8", "int4", "auto"), default="auto",
        help="of the matrices; auto: int8 on a CPU, float16 on a GPU (default: auto)",
    )  # fmt: skip
    group.add_argument("--text-encoder", metavar="NAME", help="folder or hub id of the T5, for files without one")
    group.add_argument("--style-encoder", metavar="NAME", help="folder or hub id of MERT, for style models")
    group.add_argument(
        "--batch-size", type=_count, metavar="N", help="pieces made at the same time (default: from the memory)"
    )
    group.add_argument("--compat", choices=("isolated", "audiocraft"), default="isolated", help="see generate")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    group.add_argument("--cache-dir", metavar="DIR", help="where the hub's files are kept")


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of pieces whose line does not say")
    group.add_argument(
        "--seed", type=_seed, default=0, metavar="N",
        help="of the run: the seeds of pieces follow from it and from their ids (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--duration", "--secs", "--seconds", type=_positive, default=DEFAULTS.duration, metavar="S",
        help="seconds (default: %(default)g)",
    )  # fmt: skip
    group.add_argument("--top-k", "--topk", type=int, default=DEFAULTS.top_k, metavar="K")
    group.add_argument("--top-p", "--topp", type=float, default=DEFAULTS.top_p, metavar="P")
    group.add_argument("--temperature", "--temp", type=float, default=DEFAULTS.temperature, metavar="T")
    group.add_argument("--greedy", "--no-sampling", action="store_true")
    group.add_argument(
        "--cfg-coef", "--guidance", "--guidance-scale", "--cfg", "--cfg-scale", type=float, default=DEFAULTS.cfg_coef,
        metavar="C",
    )  # fmt: skip
    group.add_argument("--cfg-coef-beta", type=float, metavar="B")
    group.add_argument("--two-step-cfg", action="store_true")
    group.add_argument("--extend-stride", type=_positive, metavar="S", help="all of these as for generate")


def _output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output-dir", required=True, metavar="DIR", help="made if need be; one run at a time")
    group.add_argument(
        "-f", "--format", choices=(*FORMATS, "webdataset"), default="wav",
        help="of the files; webdataset: tars of flac and JSON (default: wav)",
    )  # fmt: skip
    group.add_argument("--audio-format", choices=FORMATS, help="of the sound in the tars of webdataset (default: flac)")
    group.add_argument(
        "--shard-pieces", type=_count, default=1000, metavar="N", help="pieces of a tar (default: %(default)s)"
    )
    group.add_argument(
        "--loudness", choices=("loudness", "peak", "rms", "clip", "none"), default="loudness", help="see generate"
    )
    group.add_argument(
        "--filename", type=_template, default="{id}", metavar="TEMPLATE",
        help=f"of {' '.join(f'{{{name}}}' for name in FIELDS)}, without the suffix; sub-folders such as "
        "{hash:.2}/{id} work (default: {id})",
    )  # fmt: skip
    group.add_argument("--no-sidecar", action="store_true", help="no JSON files")
    group.add_argument("--tokens", action="store_true", help="keep the tokens too, as .npz")
    group.add_argument("--writers", type=_count, default=1, metavar="N", help="threads that encode (default: 1)")


def _run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--dry-run", action="store_true", help="check everything, say how much it is, make nothing")
    group.add_argument(
        "--speed", type=_positive, metavar="X",
        help="with --dry-run: seconds of audio per second (default: those of the last run in the folder)",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="make everything again (default: what is missing)")
    group.add_argument("--retry-failed", action="store_true", help="make again what failed in earlier runs")
    group.add_argument(
        "--max-attempts", type=_count, default=3, metavar="N", help="for one piece, then it failed (default: 3)"
    )
    group.add_argument("--item-timeout", type=_positive, metavar="S", help="for one piece (default: none)")
    ends = group.add_mutually_exclusive_group()
    ends.add_argument("--fail-fast", action="store_true", help="end at the first piece that fails")
    ends.add_argument("--max-failures", type=_count, metavar="N", help="end when N pieces failed")
    group.add_argument(
        "--progress", choices=MODES, help="json: lines for programs (default: a bar on a terminal, else lines)"
    )
    group.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    group.add_argument("-v", "--verbose", action="store_true", help="more messages, and tracebacks of errors")


def _engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes, GPUs or machines (pip install musicgen-fast[ray])")
    group.add_argument(
        "--engine", choices=("local", "ray"), default="local",
        help="local: this process; ray: workers that are started again when they die (default: local)",
    )  # fmt: skip
    group.add_argument(
        "--address", metavar="ADDRESS",
        help="of a Ray cluster with shared folders; auto: the one that this machine is in (default: none is needed)",
    )  # fmt: skip
    group.add_argument(
        "--workers", type=_count, metavar="N", help="processes (default: one for every GPU; one on CPUs)"
    )
    group.add_argument(
        "--gpus-per-worker", type=_share, metavar="G", help="0.5: two share one (default: 1 where there is a GPU)"
    )


def _share(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else _positive(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def _seed(text: str) -> int:
    """No random ones: a run that is taken up again must know its seed."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected 0 to 2**63 - 1, got {text!r}")
    return int(text)


def _shard(text: str) -> Shard:
    try:
        return parse_shard(text, os.environ)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _template(text: str) -> str:
    try:
        return check_template(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
