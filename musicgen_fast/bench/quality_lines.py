"""What `quality.py` found, as JSON lines, a Markdown table, and sentences about what costs too much. No models."""

from __future__ import annotations

from typing import Any

from .providers import OURS
from .quality import Answers

__all__ = ["METRICS", "lines", "over", "table"]

METRICS = (
    "clips", "frames", "nats_per_token", "nats_per_codebook", "percent_over_float32", "difference_standard_error",
    "kl_nats", "logits_error", "same_argmax",
)  # fmt: skip


def lines(answers: Answers, data: str, card: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON lines. One that is absent has nulls, and says why in `absent`."""
    found = []
    for job, answer in answers:
        names = ("provider", "precision", "model", "device", "threads")
        head = {"benchmark": "quality", **{name: getattr(job, name) for name in names}, "data": data}
        found.append({**head, **dict.fromkeys(METRICS), **answer, "machine": card})
    return found


def over(said: list[dict[str, Any]], percent: float) -> list[str]:
    """Sentences about what is more than so many percent above float32: precisions of ours, int4 left out (it is opt-in
    and warned about)."""
    return [
        f"{line['precision']} costs {line['percent_over_float32']:+.3f} % nats over float32, more than {percent:g} %"
        for line in said
        if line["provider"] == OURS and line["precision"] != "int4" and "absent" not in line
        if not line["percent_over_float32"] <= percent  # NaN is no pass
    ]


def table(said: list[dict[str, Any]]) -> str:
    """Markdown; what is absent comes last, with the reason."""
    text = [
        "| provider | precision | nats per token | against float32 | KL, nats | logits, relative error | same argmax |",
        "|" + "---|" * 7,
    ]
    there = [line for line in said if "absent" not in line]
    for line in there:
        exact = line["nats_per_token"] / (1 + line["percent_over_float32"] / 100)
        spread = line["difference_standard_error"]
        shown = "" if spread is None else f" +- {100 * spread / exact:.3f}"
        text.append(
            f"| {line['provider']} | {line['precision']} | {line['nats_per_token']:.5f} "
            f"| {round(line['percent_over_float32'], 3) + 0.0:+.3f}{shown} % | {line['kl_nats']:.2g} "
            f"| {100 * line['logits_error']:.2g} % | {100 * line['same_argmax']:.2f} % |"
        )
    for line in said:
        if "absent" in line:
            text.append(f"| {line['provider']} | {line['precision']} | absent: {line['absent']} | | | | |")
    for clips, frames, data in sorted({(line["clips"], line["frames"], line["data"]) for line in there}):
        text.append(f"\n{clips} clips, {frames} frames: {data}")
    return "\n".join(text)
