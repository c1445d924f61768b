"""The figures of README, written from benchmarks/results: no number there is typed by hand.

    python benchmarks/readme_numbers.py            # writes them anew; --check only says where README differs

README has places `<!-- figures: NAME -->` ... `<!-- end -->`. What stands between them is what `readme_tables.py` makes
of the newest results of that kind; each ends with the command that measures it and the file. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import readme_tables as tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Line = dict[str, Any]
_PLACE = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)


@dataclass(frozen=True)
class Block:
    """`file` is how the name of a results file ends, `command` what a stranger types to measure it again."""

    file: str
    text: Callable[[list[Line]], str]
    command: str


BLOCKS = {
    "steps": Block("cpu-2core-decoder.jsonl", tables.steps, "python benchmarks/bench_cpu.py"),
    "codec": Block("cpu-2core-codec.jsonl", tables.codec, "python benchmarks/bench_codec.py"),
    "sampler": Block("cpu-2core-sampler.jsonl", tables.sampler, "musicgen-fast bench sampler --batch 1,64"),
    "stream": Block(
        "cpu-2core-stream.jsonl", tables.stream, "musicgen-fast bench stream -m random:small --duration 30"
    ),
    "throughput": Block("cpu-2core-throughput.jsonl", tables.throughput, "musicgen-fast bench throughput"),
    "precision": Block("cpu-2core-quality.jsonl", tables.precision, "musicgen-fast bench quality"),
}


def newest(ending: str, folder: Path = RESULTS) -> Path:
    """The results file whose name ends so, the latest date in front. FileNotFoundError where there is none."""
    found = sorted(folder.glob(f"*-{ending}"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no results *-{ending}")
    return found[-1]


def written(readme: str, folder: Path = RESULTS) -> str:
    """The README with all its figures anew. ValueError: a place that no block is for, a block without a place."""
    names = [match[2] for match in _PLACE.finditer(readme)]
    if sorted(names) != sorted(BLOCKS):
        raise ValueError(f"README has the places {sorted(names)}, the blocks are {sorted(BLOCKS)}")

    def place(match: re.Match[str]) -> str:
        block = BLOCKS[match[2]]
        path = newest(block.file, folder)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        source = f"Made by `{block.command}`; [results](benchmarks/results/{path.name})."
        return f"{match[1]}{block.text(lines)}\n\n{source}\n{match[4]}"

    return _PLACE.sub(place, readme)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where README differs")
    args = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = written(before)
    if args.check:
        wrong = [line for line in before.splitlines() if line not in after.splitlines()]
        print("\n".join(wrong) or "README says what the results say")
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    print(f"{path.name}: {'nothing to change' if before == after else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
