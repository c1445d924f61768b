"""The options of `musicgen-fast render`, its dry run, its progress and its report."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from musicgen_fast import cli_render
from musicgen_fast.audio_encode import FORMATS as AUDIO_FORMATS
from musicgen_fast.config import GenerationParams
from musicgen_fast.loading import PRECISIONS
from musicgen_fast.loudness import STRATEGIES
from musicgen_fast.render.item import Item
from musicgen_fast.render.plan import Options
from musicgen_fast.render.progress import Progress
from musicgen_fast.render.report import MAX_ROWS, Outcome, summarize, write_report, write_summary
from musicgen_fast.render.resume import Task
from musicgen_fast.render.shards import Shard
from musicgen_fast.sections import Section

ROOT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="render", allow_abbrev=False)
    cli_render.add_options(made)
    return made


def parse(*argv: str) -> argparse.Namespace:
    return parser().parse_args(["m.jsonl", "-o", "out", *argv])


# -- options ----------------------------------------------------------------------------------------------------------


def test_defaults_of_the_command_line_are_those_of_the_library() -> None:
    assert cli_render.options_of(parse()) == Options("m.jsonl", "out", precision="auto")  # as of `generate`


def test_options() -> None:
    argv = """
        -m demo -d cpu --precision bfloat16 --seed 7 --secs 3 --topk 5 --topp .5 --temp 2 --guidance-scale 4
        --cfg-coef-beta 3 --no-sampling --two-step-cfg --extend-stride 9 -f mp3 --loudness peak --filename
        {hash:.2}/{id} --no-sidecar --tokens --shard 2/4 --limit 9 --retry-failed --max-attempts 5 --fail-fast
        --item-timeout 60 --batch-size 8 --writers 2 --progress json --input-root /in --manifest-format csv
        --ignore-extra --max-duration 60 --max-prompt 99 --compat audiocraft --max-variations 3 --max-input-seconds
        20 -q --revision r --cache-dir c
    """
    options = cli_render.options_of(parse(*argv.split()))
    assert options.params == GenerationParams(False, 5, 0.5, 2.0, 3.0, 4.0, 3.0, True, 9.0)
    assert (options.model, options.device, options.precision, options.seed) == ("demo", "cpu", "bfloat16", 7)
    assert options.settings.suffixes == ("mp3", "npz") and options.settings.loudness == "peak"
    assert (options.shard, options.limit, options.max_failures) == (Shard(2, 4), 9, 1)
    assert options.rules.retry_failed and options.rules.max_attempts == 5 and options.item_timeout == 60
    assert (options.limits.duration, options.limits.prompt_chars, options.limits.variations) == (60, 99, 3)
    assert options.limits.input_seconds == 20 and options.layout == "files" and options.filename == "{hash:.2}/{id}"
    tars = cli_render.options_of(parse("-f", "webdataset", "--shard-pieces", "5"))
    assert (tars.layout, tars.settings.format, tars.shard_pieces) == ("webdataset", "flac", 5)
    assert cli_render.options_of(parse("-f", "webdataset", "--audio-format", "ogg")).settings.format == "ogg"


def test_choices_are_those_of_the_library() -> None:
    choices = {a.dest: set(a.choices) for a in parser()._actions if a.choices}
    assert choices["precision"] == set(PRECISIONS) and choices["loudness"] == set(STRATEGIES)
    assert choices["format"] == {*AUDIO_FORMATS, "webdataset"} and choices["audio_format"] == set(AUDIO_FORMATS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "random"], "expected 0 to"), (["--seed", "-1"], "expected 0 to|expected one argument"),
        (["--shard", "0/4"], "shards count from 1"), (["--shard", "x"], "expected a shard"),
        (["--filename", "../{id}"], "no template"), (["--limit", "0"], "above 0"), (["--duration", "nan"], "above 0"),
        (["--fail-fast", "--max-failures", "3"], "not allowed"), (["--format", "opus"], "invalid choice"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "argv",
    [
        ["--overwrite", "--retry-failed"], ["-f", "webdataset", "--no-sidecar"], ["--duration", "99999"],
        ["--top-p", "2"], ["--max-input-seconds", "99999"],
    ],
)  # fmt: skip
def test_options_that_do_not_fit_together(argv: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        cli_render.run(parse(*argv))


def test_the_parser_needs_no_torch() -> None:
    code = (
        "import sys, argparse; from musicgen_fast import cli_render; p = argparse.ArgumentParser();"
        "cli_render.add_options(p); p.format_help(); p.parse_args(['m', '-o', 'x']);"
        "print([m for m in ('torch', 'numpy', 'soundfile', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_dry_run_says_how_much_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,prompt,duration,n\na,x,3600,2\nb,y,1800,\n")
    argv = [str(manifest), "-o", str(tmp_path / "out"), "--dry-run", "--speed", "5"]
    assert cli_render.run(parser().parse_args(argv)) == 0
    told = capsys.readouterr().out
    assert "3 pieces of 2 lines, 2.50 hours of audio, the longest 3600 s" in told and "time: 0.50 hours at 5.00" in told
    assert cli_render.run(parser().parse_args([*argv, "--progress", "json", "--shard", "1/1"])) == 0
    assert json.loads(capsys.readouterr().out)["audio_hours"] == 2.5 and not (tmp_path / "out").exists()


def test_mistakes_of_a_manifest_are_all_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "m.jsonl"
    rows = [
        {"id": f"{n}\x1b[31m\u202e", "prompt": "x", **({"duration": "y"} if n % 10 == 0 else {})} for n in range(99)
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"\\u001b[2J": 1}\n')
    assert cli_render.run(parser().parse_args([str(manifest), "-o", str(tmp_path / "out"), "--dry-run"])) == 1
    told = capsys.readouterr().err
    lines = [int(number) for number in re.findall(r"^  line (\d+): ", told, re.MULTILINE)]
    assert lines == [*range(1, 99, 10), 100] and "\x1b" not in told and "11 problems" in told


# -- progress ---------------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress_of(mode: str | None, stream: io.StringIO) -> str:
    clock = Clock()
    progress = Progress(4, 40.0, skipped=2, failed=1, mode=mode, stream=stream, clock=clock)
    clock.now += 1000  # while the model is loaded
    progress.begin()
    for n in range(3):
        clock.now += 6
        progress.finished(f"n{n}", 10.0, f"n{n}.wav")
    progress.gave_up("evil\x1b[2J\n", 10.0, "Error: \x1b]0;x\x07")
    progress.close()
    progress.close()
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = progress_of(None, io.StringIO()).splitlines()
    assert lines[0] == "3/7 pieces, 2 of them done before, 1 failed, 0.0 s of audio per second, ? left"
    assert lines[1] == "5/7 pieces, 2 of them done before, 1 failed, 1.7 s of audio per second, 0:12 left"
    assert lines[2].startswith("failed: evil\\x1b[2J\\n") and lines[-1].endswith("took 0:18") and len(lines) == 4


def test_json_lines_for_programs() -> None:
    lines = [json.loads(line) for line in progress_of("json", io.StringIO()).splitlines()]
    assert [line["event"] for line in lines] == ["start", "item", "item", "item", "item", "end"]
    assert lines[1] == {"event": "item", "key": "n0", "status": "done", "audio_seconds": 10.0, "path": "n0.wav"}
    assert lines[4]["status"] == "failed" and lines[5]["failed"] == 2 and lines[5]["done"] == 3
    assert lines[5]["audio_seconds_per_second"] == pytest.approx(30 / 18, abs=1e-3) and lines[0]["eta"] is None


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    shown = progress_of(None, Terminal())
    assert "4/4" in shown or "3/4" in shown
    assert "failed: evil\\x1b[2J" in shown and "\x1b[2J" not in shown
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert progress_of(None, Terminal()).startswith("3/7 pieces")
    assert progress_of("none", io.StringIO()) == ""
    with pytest.raises(ValueError, match="unknown progress"):
        Progress(1, 1.0, mode="loud")


def test_a_reader_that_went_away_does_not_end_the_run() -> None:
    stream = io.StringIO()
    progress = Progress(2, 2.0, mode="json", stream=stream)
    stream.close()
    progress.finished("a", 1.0)
    progress.close()
    assert progress.done == 1


# -- report -----------------------------------------------------------------------------------------------------------

EVIL = '</td><script>alert(1)</script><img src=x onerror="alert(1)">\u202e"\'&'


class Page(HTMLParser):
    """Tags and attributes of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, Any]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def outcome(n: int, status: str, text: str = "x", **more: Any) -> Outcome:
    item = Item(f"{n}{text}", n, n, 5, text, GenerationParams(duration=2), **more)
    line: dict[str, Any] = {"files": [[f"sub dir/{n}#?.wav", 3], ["x.json", 2]], "audio_seconds": 2.0}
    if status == "failed":
        line = {"error_type": "ValueError", "error": text}
    return Outcome(Task(item, f"{n}", "f"), status, line if status != "open" else {})


def test_the_report_shows_everything_and_runs_nothing_of_it(tmp_path: Path) -> None:
    outcomes = [outcome(n, status, EVIL) for n, status in enumerate(["done", "skipped", "failed", "open"])]
    outcomes.append(outcome(4, "done", sections=(Section(0, EVIL), Section(5, "end"))))
    summary = summarize(outcomes, 4.0, {"model": EVIL})
    write_report(tmp_path / "report.html", outcomes, summary, title=EVIL)
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1 and not page.all("img") and "\u202e" not in text
    assert [row.get("class") for row in page.all("tr")] == [None, "done", "skipped", "failed", "open", "done"]
    links = page.all("a")
    assert [link["href"] for link in links] == [f"./sub%20dir/{n}%23%3F.wav" for n in (0, 1, 4)]
    assert all(set(link) == {"class", "href", "aria-label"} for link in links)
    assert page.text.count("alert(1)") >= 8 and "5 s: end" in page.text
    assert not re.search(r"https?://", text)  # self-contained
    tar = Outcome(outcomes[0].task, "done", {"files": [["shard-000000.tar", 9]], "member": "a"})
    write_report(tmp_path / "report.html", [tar], summary)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert not page.all("a") and "a in shard-000000.tar" in page.text


def test_a_report_of_very_many_pieces_is_cut_and_says_so(tmp_path: Path) -> None:
    outcomes = [outcome(n, "failed" if n == MAX_ROWS + 5 else "done") for n in range(MAX_ROWS + 10)]
    write_report(tmp_path / "report.html", outcomes, {})
    text = (tmp_path / "report.html").read_text("utf-8")
    assert text.count("<tr class=") == MAX_ROWS and f"The first {MAX_ROWS} of" in text and '<tr class="failed">' in text


def test_a_summary_has_both_speeds(tmp_path: Path) -> None:
    outcomes = [outcome(n, "done") for n in range(5)] + [outcome(5, "skipped"), outcome(6, "failed")]
    told = summarize(outcomes, 8.0, busy=5.0)
    assert (told["done"], told["skipped"], told["failed"], told["errors"]) == (5, 1, 1, {"ValueError": 1})
    assert (told["audio_seconds"], told["real_time_factor"], told["times_real_time"]) == (10.0, 0.5, 2.0)
    assert summarize([], 1.0)["times_real_time"] is None
    write_summary(tmp_path / "summary.json", told)
    assert json.loads((tmp_path / "summary.json").read_text()) == told
