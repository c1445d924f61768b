"""What a run leaves behind for people: `summary.json` with speeds, and `report.html`, a page that needs nothing else.

The page is static: a table of all pieces with players, a filter by text and outcome, and the failures with their
reasons. Every text in it comes from a manifest that anybody may have written, so all of it is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..audio_encode import replacing
from .resume import Task

__all__ = ["Outcome", "summarize", "write_report", "write_summary"]


@dataclass(frozen=True)
class Outcome:
    """A piece at the end of a run: 'done', 'skipped' (done before), 'failed' or 'open' (not made yet).

    `line`: what the ledger says of it.
    """

    task: Task
    status: str
    line: Mapping[str, Any]


def summarize(
    outcomes: Iterable[Outcome], elapsed: float, facts: Mapping[str, Any] | None = None, busy: float | None = None
) -> dict[str, Any]:
    """Counts and speeds of a run.

    Args:
        elapsed: seconds that the run took, loading included. busy: seconds from the first admission to the last file.
        facts: of the run: model, precision, device, versions.

    Real-time factor is seconds of computing per second of audio, its inverse how many times faster than real time.
    Both count the whole run, not a piece: pieces are made side by side.
    """
    counts = {"done": 0, "skipped": 0, "failed": 0, "open": 0}
    made = before = 0.0
    errors: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.status] += 1
        seconds = _number(outcome.line.get("audio_seconds"))
        if outcome.status == "done":
            made += seconds
        elif outcome.status == "skipped":
            before += seconds
        elif outcome.status == "failed":
            kind = str(outcome.line.get("error_type"))
            errors[kind] = errors.get(kind, 0) + 1
    busy = elapsed if busy is None else busy
    return {
        **(facts or {}),
        "pieces": sum(counts.values()),
        **counts,
        "errors": errors,
        "audio_seconds": made,
        "audio_seconds_before": before,
        "seconds": elapsed,
        "seconds_busy": busy,
        "real_time_factor": busy / made if made else None,
        "times_real_time": made / busy if made and busy else None,
    }


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """As JSON, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())


MAX_ROWS = 20_000  # 8 MB of page; browsers take seconds for more

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c24; --soft: #5a5a68; --paper: #fdfdfb; --card: #f1f0ec; --line: #a04; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf2; --soft: #a6a6b6; --paper: #15151c; --card: #20202b;
  --line: #fa8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0.5rem 0; }
form { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: end; background: var(--card); padding: 0.8rem;
  border-radius: 0.6rem; margin: 1rem 0; position: sticky; top: 0; }
label { color: var(--soft); font-size: 0.85rem; }
input, select { display: block; font: inherit; color: var(--ink); background: var(--paper); padding: 0.2rem 0.4rem;
  border: 1px solid var(--soft); border-radius: 0.3rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.4rem 0.6rem 0.4rem 0; border-top: 1px solid var(--card); }
th { color: var(--soft); font-weight: normal; white-space: nowrap; }
td:nth-child(4), td:nth-child(5) { white-space: nowrap; }
td:first-child { width: 20rem; }
tr.failed td { color: var(--line); }
audio { width: 19rem; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 0.8rem; }
dt, small { color: var(--soft); }
dd { margin: 0; }
a { color: inherit; }
"""

# The player of a row is made when its link is used: ten thousand players at once would stop a browser.
SCRIPT = """
const rows = [...document.querySelectorAll("tbody tr")];
const text = document.getElementById("text"), status = document.getElementById("status");
function filter() {
  const wanted = text.value.toLowerCase();
  let shown = 0;
  for (const row of rows) {
    row.hidden = !(status.value === "" || row.className === status.value)
      || !row.textContent.toLowerCase().includes(wanted);
    shown += !row.hidden;
  }
  document.getElementById("shown").textContent = shown + " of " + rows.length;
}
document.querySelector("form").hidden = false;
text.oninput = status.onchange = filter;
document.querySelector("form").onsubmit = event => event.preventDefault();
document.querySelector("tbody").addEventListener("click", event => {
  const link = event.target.closest("a.play");
  if (!link) return;
  event.preventDefault();
  for (const other of document.querySelectorAll("audio")) other.pause();
  const player = document.createElement("audio");
  player.controls = player.autoplay = true;
  player.src = link.href;
  player.setAttribute("aria-label", link.getAttribute("aria-label"));
  link.replaceWith(player);
  player.focus();
});
filter();
"""


def write_report(path: Path, outcomes: Sequence[Outcome], summary: Mapping[str, Any], title: str = "Rendering") -> None:
    """`report.html`; sound files are linked relative to its folder. Whole or not at all; OSError as of `replacing`."""
    shown = sorted(outcomes, key=lambda outcome: outcome.status != "failed")[:MAX_ROWS]
    rows = "".join(map(_row, outcomes if len(outcomes) <= MAX_ROWS else shown))
    note = f"<p>The first {MAX_ROWS} of {len(outcomes)} pieces; the ledger has all.</p>"
    states = "".join(f'<option value="{name}">{name}</option>' for name in ("done", "skipped", "failed", "open"))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
{_list(summary)}
</header>
<main>
<form hidden>
<label>Search <input id="text" type="search"></label>
<label>Outcome <select id="status"><option value="">all</option>{states}</select></label>
<span id="shown" role="status"></span>
</form>
{note if len(outcomes) > MAX_ROWS else ""}
<table>
<thead><tr><th>Sound</th><th>Id</th><th>Prompt</th><th>Seconds</th><th>Seed</th><th>Outcome</th></tr></thead>
<tbody>
{rows}</tbody>
</table>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
    with replacing(path) as file:
        file.write(page.encode("utf-8", "xmlcharrefreplace"))


def _row(outcome: Outcome) -> str:
    item, line = outcome.task.item, outcome.line
    seconds = _number(line.get("audio_seconds")) or item.params.duration
    prompt = " / ".join(f"{s.start:g} s: {s.description}" for s in item.sections) or item.prompt or ""
    why = ""
    if outcome.status == "failed":
        why = f"<br>{_text(line.get('error_type'))}: {_text(line.get('error'))}"
    return (
        f'<tr class="{outcome.status}"><td>{_sound(outcome)}</td><td>{_text(outcome.task.key)}<br>'
        f"<small>line {item.line}</small></td><td>{_text(prompt)}</td><td>{seconds:.1f}</td><td>{item.seed}</td>"
        f"<td>{outcome.status}{why}</td></tr>\n"
    )


def _sound(outcome: Outcome) -> str:
    """A link that becomes a player; the name of the tar for what lies in one."""
    files = outcome.line.get("files") or []
    if outcome.status not in ("done", "skipped") or not files:
        return ""
    name = str(files[0][0])
    if outcome.line.get("member"):
        return f"<small>{_text(outcome.line['member'])} in {_text(name)}</small>"
    link, label = escape(quote(f"./{name}", errors="replace")), _text(name)
    return f'<a class="play" href="{link}" aria-label="{label}">&#9654; {label}</a>'


def _text(value: object) -> str:
    """Escaped; characters that would turn the direction of the page round are shown by their numbers."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in str(value))
    return escape(shown)


def _list(facts: Mapping[str, Any]) -> str:
    told = ((name.replace("_", " "), value) for name, value in facts.items() if value not in (None, {}, ""))
    return "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(_short(v))}</dd>" for k, v in told) + "</dl>"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_short(one)}" for name, one in value.items())
    return str(value)
