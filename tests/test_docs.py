"""The Markdown pages: every Python block runs, every command line parses, every link leads somewhere.

Python blocks of a page run in order, in one namespace, in a temporary folder. Models of the hub are replaced by local
ones (`STAND_INS`), and the files that README names lie in the folder, so that its own examples run as they stand. What
cannot run here carries a comment in the line before the block, and is listed below:

    <!-- not run: REASON -->                never
    <!-- needs the C++ extension -->        only where it is built
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from musicgen_fast import cli, musicgen, native
from musicgen_fast.checkpoints import load_checkpoint
from musicgen_fast.checkpoints.write import write_transformers_folder

from . import checkpoint_writers as writers

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)

# Page and reason of every Python block that never runs here.
NOT_RUN: list[tuple[str, str]] = [("docs/checkpoints.md", "needs a GPU")]

STAND_INS = {"facebook/musicgen-small": "demo", "facebook/musicgen-melody": "melody"}  # 'melody': random weights
ENVIRONMENT = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "8"}  # what --shard auto reads
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^ *(?P=fence) *$", re.M | re.S)
MARK = re.compile(r"<!-- (?:not run: (?P<reason>[^>]+)|(?P<extension>needs the C\+\+ extension)) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: the word behind its fence, its text, the line of its first line, and the comment before it."""

    language: str
    text: str
    line: int
    not_run: str = ""
    needs_extension: bool = False


@functools.cache
def blocks(page: str) -> list[Block]:
    text, out = (ROOT / page).read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        body = re.sub(f"^{match['indent']}", "", match["body"], flags=re.M)
        line = text.count("\n", 0, match.start()) + 2
        reason, extension = (mark["reason"] or "", bool(mark["extension"])) if mark else ("", False)
        out.append(Block(match["info"].strip().split(" ")[0], body, line, reason, extension))
    return out


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("python", "py")]


# -- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: models of the hub, a fine-tune in one file, an adapter, a melody."""
    import soundfile
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("shelf")
    write_transformers_folder(root / "melody", checkpoint=writers.tiny("melody", max_duration=1.0))
    write_transformers_folder(root / "tiny", checkpoint=writers.tiny("text", max_duration=1.0))
    demo = load_checkpoint("demo")
    torch.save(writers.audiocraft_state(demo), root / "lm_final.pt")
    (root / "my-lora").mkdir()
    head, rows = "base_model.model.decoder.lm_heads.0.", demo.config.vocab_size
    factors = {
        f"{head}lora_A.weight": torch.full((2, demo.config.dim), 0.01),
        f"{head}lora_B.weight": torch.ones(rows, 2),
    }
    save_file(factors, str(root / "my-lora/adapter_model.safetensors"))
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "facebook/musicgen-small"}
    (root / "my-lora/adapter_config.json").write_text(json.dumps(fields))
    soundfile.write(root / "tune.wav", 0.1 * torch.randn(16000).numpy(), 16000)
    return root


@pytest.fixture
def reader(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where somebody sits who copies from a page: a folder with those files, and names of the hub that are local."""
    import transformers

    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    real = musicgen.load_parts

    def local(name: Any) -> Any:
        found = STAND_INS.get(str(name), name)
        return shelf / found if found == "melody" else found

    def load_parts(name: Any, *args: Any) -> Any:
        given = list(args)  # device, text_encoder, precision, revision, cache_dir, style_encoder, base, ...
        given[6] = local(given[6])
        return real(local(name), *given)

    def pretrained(kind: Any) -> None:
        original = kind.from_pretrained
        swapped = {name: shelf / "tiny" for name in STAND_INS}
        monkeypatch.setattr(
            kind, "from_pretrained", lambda name, **options: original(swapped.get(name, name), **options)
        )

    monkeypatch.setattr(musicgen, "load_parts", load_parts)
    pretrained(transformers.MusicgenForConditionalGeneration)
    pretrained(transformers.AutoTokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_blocks_run(page: str, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("page")  # dataclasses ask for the module that they stand in
    monkeypatch.setitem(sys.modules, "page", module)
    with mock.patch.dict(os.environ):
        for block in python_blocks(page):
            if block.not_run or (block.needs_extension and not native.available()):
                continue
            # A traceback then names the page and its line.
            exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), vars(module))


def test_what_is_not_run() -> None:
    """Whoever exempts a block lists it here; a block that is nowhere run must at least be Python."""
    found = [(page, block.not_run) for page in PAGES for block in python_blocks(page) if block.not_run]
    assert found == NOT_RUN
    for page in PAGES:
        for block in python_blocks(page):
            compile(block.text, page, "exec")


# -- shell ------------------------------------------------------------------------------------------------------------


def commands(page: str) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of the commands in blocks of the shell: comments, pipes, redirections and variables cut off."""
    for block in blocks(page):
        if block.language not in ("", "sh", "bash", "shell", "console"):
            continue
        for number, line in enumerate(re.sub(r"\\\n", " ", block.text).splitlines(), block.line):
            for part in re.split(r"\s(?:\||&&|;|<|>|2>)\s", re.split(r"(?:^|\s)#", line)[0]):
                if re.search(r"\b(musicgen-fast|make)\b", part) is None:
                    continue
                words = [word for word in shlex.split(part.removeprefix("$ "))]
                while words and re.fullmatch(r"[A-Z_0-9]+=\S*|srun|time", words[0]):
                    words = words[1:]
                if words:
                    yield number, words


@pytest.mark.parametrize("page", [page for page in PAGES if any(True for _ in commands(page))])
def test_command_lines_parse(page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line, (program, *words) in commands(page):
        where = f"{page}, line {line}: {program} {' '.join(words)}"
        if program == "make":
            wrong = [word for word in words if "=" not in word and word not in targets]
            assert not wrong, f"{where}\nMakefile has no {wrong}"
        elif program == "musicgen-fast" and not {"--help", "--version"} & set(words):
            parser, by_name = cli.build_parser()
            try:
                cli._parse(by_name[words[0]], words[1:])
            except (SystemExit, KeyError):
                pytest.fail(f"{where}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("command", sorted(cli.build_parser()[1]))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0 and command in capsys.readouterr().out


# -- links and lists --------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{slug}-{count}" if (count := found.count(slug)) else slug)
    return set(found)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    wrong = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", text) + re.findall(
        r'(?:src|href)="([^"]+)"', text
    ):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or ROOT not in (file, *file.parents):
            wrong.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            wrong.append(f"{target}: no such heading among {sorted(anchors(file))}")
    assert not wrong, f"{page}\n" + "\n".join(wrong)


def test_every_variable_is_in_the_table() -> None:
    """docs/troubleshooting.md lists the variables of the environment that anything reads, and no others."""
    name = r"MUSICGEN_FAST_[A-Z0-9_]+\b"
    files = [ROOT / "setup.py", ROOT / "Makefile"]
    for folder in ("musicgen_fast", "kernels", "csrc", "tests"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".sh")]
    read = {found for file in files for found in re.findall(name, file.read_text(encoding="utf-8"))}
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    told = set(re.findall(rf"^\| `({name})", page, re.M))
    assert told == read, f"not in the table: {sorted(read - told)}; read nowhere: {sorted(told - read)}"


def test_quoted_messages_are_ours() -> None:
    """What docs/troubleshooting.md quotes as a message stands in the source, up to what is filled in."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "musicgen_fast").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals over several lines
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    first = " ".join(re.findall(r"^\| (.*?) \|", page, re.M))
    quoted = [
        part.strip() for text in re.findall(r"`([^`]+)`", first) for part in re.split(r"\.\.\.|[()]|'\w+'|, ", text)
    ]
    messages = [part for part in quoted if len(part.split()) >= 3]
    assert len(messages) > 10
    assert [message for message in messages if message not in source] == []


def test_every_guide_is_in_the_index_and_in_the_site() -> None:
    index, site = (ROOT / "docs/index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    guides = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md"]
    assert guides
    assert [name for name in guides if f"({name})" not in index] == []
    assert [name for name in guides if name not in site] == []
