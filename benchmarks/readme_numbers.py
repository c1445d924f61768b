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
    """`kinds` are the ends of the names of results files, `commands` what a stranger types to measure it again."""

    kinds: tuple[str, ...]
    text: Callable[[list[Line]], str]
    commands: tuple[str, ...]


MACHINE = "cpu-2core"
BENCH = "musicgen-fast bench"
BLOCKS = {
    "steps": Block(("decoder",), tables.steps, ("python benchmarks/bench_cpu.py --sections step --rounds 2",
                     "python benchmarks/bench_cpu.py --sections batch,busy --precision int8 --rounds 1")),
    "codec": Block(("codec",), tables.codec, ("python benchmarks/bench_codec.py",)),
    "sampler": Block(("sampler",), tables.sampler, (f"{BENCH} sampler --batch 1,64",)),
    "stream": Block(
        ("stream", "windows"), tables.stream,
        (f"{BENCH} stream", f"{BENCH} stream -m random:small --duration 30 --rounds 1",
         "python benchmarks/bench_stream.py --rounds 2"),
    ),
    "throughput": Block(
        ("throughput",), tables.throughput,
        (f"{BENCH} throughput --peer-batches 8,16",
         f"{BENCH} throughput -m random:small --pieces 32 --longest 4 --rounds 1 --peer-batches 8,16"),
    ),
    "precision": Block(
        ("quality",), tables.precision,
        ("python examples/demo_model/held_out.py --count 32 --seconds 10 -o out/held_out",
         f"{BENCH} quality --clips out/held_out/songs.jsonl",
         f"{BENCH} quality -m random:small --count 2 --duration 1.5"),
    ),
}  # fmt: skip


def newest(kind: str, folder: Path = RESULTS) -> Path:
    """The results file of a kind with the latest date in front. FileNotFoundError where there is none."""
    found = sorted(folder.glob(f"*-{MACHINE}-{kind}.jsonl"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no results *-{MACHINE}-{kind}.jsonl")
    return found[-1]


def written(readme: str, folder: Path = RESULTS) -> str:
    """The README with all its figures anew. ValueError: a place that no block is for, a block without a place."""
    names = [match[2] for match in _PLACE.finditer(readme)]
    if sorted(names) != sorted(BLOCKS):
        raise ValueError(f"README has the places {sorted(names)}, the blocks are {sorted(BLOCKS)}")

    def place(match: re.Match[str]) -> str:
        block = BLOCKS[match[2]]
        paths = [newest(kind, folder) for kind in block.kinds]
        lines = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
        made = ", ".join(f"`{command}`" for command in block.commands)
        files = ", ".join(f"[{path.name}](benchmarks/results/{path.name})" for path in paths)
        return f"{match[1]}{block.text(lines)}\n\nMade by {made}: {files}.\n{match[4]}"

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
