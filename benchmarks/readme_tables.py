"""The text of each place with figures in README, from lines of results. Knows files and README not at all."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

__all__ = ["codec", "precision", "sampler", "steps", "stream", "throughput"]

Line = dict[str, Any]
OURS = "musicgen_fast"
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_PACKAGES = {"transformers": "transformers", "audiocraft": "tts-webui-audiocraft", "openvino": "openvino",
             "fast_musicgen": "fast-musicgen"}  # fmt: skip


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = list(heads)
    text = [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]
    return "\n".join(text + [f"| {' | '.join(row)} |" for row in rows])


def _measured(lines: Iterable[Line], benchmark: str, **named: Any) -> list[Line]:
    return [
        line for line in lines
        if line["benchmark"] == benchmark and "absent" not in line and all(line[k] == v for k, v in named.items())
    ]  # fmt: skip


def _one(lines: Iterable[Line], benchmark: str, **named: Any) -> Line:
    (line,) = _measured(lines, benchmark, **named)
    return line


def _named(line: Line) -> str:
    """'transformers 5.23.0', 'musicgen_fast'."""
    provider = line["provider"].removesuffix("_compiled")
    version = line["machine"]["versions"].get(_PACKAGES.get(provider, ""), "")
    provider = provider.replace("fast_musicgen", "fast-musicgen")
    compiled = ", torch.compile" if line["provider"].endswith("_compiled") else ""
    return f"{provider} {version}".strip() + compiled


def _number(value: float, digits: int = 3) -> str:
    """So many digits that count, no exponent: 4.92 -> '4.92', 164.4 -> '164'."""
    if value == 0:
        return "0"
    before = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - before)}f}"


def _size(model: str) -> str:
    return f"{model.removeprefix('random:')}'s sizes" if model.startswith("random:") else model


# -- the decoder ------------------------------------------------------------------------------------------------------


def steps(lines: list[Line]) -> str:
    """Milliseconds a step at five positions of a window, average, ratio to a plain read; then what else it says."""
    shown = _measured(lines, "cpu", section="step")
    order = {name: i for i, name in enumerate((OURS, "openvino", "fast_musicgen", "transformers"))}
    shown.sort(key=lambda line: (order.get(line["provider"], 9), line["ms_per_step"]))
    heads = ["ms a step at position", *(f"{block['position']:.0f}" for block in shown[0]["positions"])]
    rows = []
    for line in shown:
        average = _number(line["ms_per_step"])
        rows.append([
            f"{_named(line)} {_SHORT.get(line['precision'], line['precision'])}",
            *(_number(block["ms"]) for block in line["positions"]),
            f"**{average}**" if line["provider"] == OURS else average,
            f"{line['times_of_a_plain_read']:.2f}",
        ])  # fmt: skip
    return _table([*heads, "average", "times a plain read"], rows) + "\n\n" + _beside_the_steps(lines)


def _beside_the_steps(lines: list[Line]) -> str:
    def of(section: str, precision: str, **named: Any) -> Line:
        return _one(lines, "cpu", section=section, provider=OURS, precision=precision, **named)

    int8, fp32 = of("step", "int8"), of("step", "float32")
    eight = of("batch", "int8", requests=8)["times"]
    alone, busy = of("busy", "int8", busy_core=False), of("busy", "int8", busy_core=True)
    times = int8["times"]
    return (
        f"So int8 is {times['transformers']:.1f} times as fast as transformers' best, {times['audiocraft']:.1f} times "
        f"as audiocraft, {times['openvino']:.1f} times as OpenVINO; fp32 "
        f"{fp32['times']['transformers, same precision']:.1f} times as transformers' fp32. Eight requests at once give "
        f"{eight['audio of one, 30 s']:.1f} times the sound of one ({eight['audio of one, 10 s']:.1f} times in clips "
        f"of 10 s). With another process on one of the cores a step takes {busy['ms_per_step']:.1f} ms; one thread "
        f"alone takes {alone['ms_per_step']:.1f}."
    )


# -- codec and sampler ------------------------------------------------------------------------------------------------


def codec(lines: list[Line]) -> str:
    """Seconds of work per second of sound, 30 s at once."""
    providers = list(dict.fromkeys(line["provider"] for line in _measured(lines, "codec")))
    rows = []
    for direction in ("decode", "encode"):
        row = [f"EnCodec {direction}, 30 s"]
        for provider in providers:
            every = _measured(lines, "codec", provider=provider, direction=direction, seconds=30.0)
            value = f"{median(line['seconds_per_second'] for line in every):.3f}"
            row.append(f"**{value}**" if provider == OURS else value)
        rows.append(row)
    first = [_measured(lines, "codec", provider=provider)[0] for provider in providers]
    return _table(["seconds per second of sound", *(_named(line) for line in first)], rows)


_FILTERS = {"top_k250": "top-k 250", "top_p0.9": "top-p 0.9", "none": "no filter"}
_SAMPLERS = {"audiocraft": "audiocraft's chain", "transformers": "transformers", "compiled": "torch.compile",
             "sample:cpu": "`sample()`", "draw:cpu": "inside a generation"}  # fmt: skip


def sampler(lines: list[Line]) -> str:
    """Microseconds a draw of 4 codebooks, and how many times audiocraft's chain of the same round."""
    shown = _measured(lines, "sampler", codebooks=4, dtype="float32")

    def of(name: str, kind: str, batch: int) -> list[Line]:
        return [line for line in shown if (line["provider"], line["filter"], line["batch"]) == (name, kind, batch)]

    rows = []
    for batch in (1, 64):
        for kind, filter_name in _FILTERS.items():
            row = [f"{batch} request{'s' if batch > 1 else ''}, {filter_name}"]
            for name in _SAMPLERS:
                every = of(name, kind, batch)
                took = f"{median(line['us']['p50'] for line in every):.0f}"
                times = median(line["times_faster_than_audiocraft"] for line in every)
                ours = ":" in name
                row.append(f"**{took}** ({times:.1f})" if ours else took)
            rows.append(row)
    noise = median(line["us"]["p50"] for line in of("noise:cpu", "top_k250", 1))
    after = (
        "Ours with `seed=`; without one, torch's own random numbers set the pace (that is what makes the tokens "
        f"audiocraft's): {noise:.0f} us at top-k 250, and with top-p as slow as audiocraft."
    )
    return _table(["us a draw", *_SAMPLERS.values()], rows) + "\n\n" + after


# -- whole pieces -----------------------------------------------------------------------------------------------------


def stream(lines: list[Line]) -> str:
    """First sound, silence, speed of streams; then what a change of windows costs."""
    rows = []
    for line in sorted(_measured(lines, "stream"), key=lambda line: (line["model"], line["provider"])):
        silent = line["audio_underrun_s"]
        ours = line["provider"] == OURS
        first, cold, holds = (f"{line[name] / 1000:.2g}" for name in ("ttfa_ms", "ttfa_cold_ms", "first_chunk_ms"))
        speed = _number(line["rtfx"])
        rows.append([
            f"{_size(line['model'])}: {_named(line)} {_SHORT.get(line['precision'], line['precision'])}",
            f"**{first}**" if ours else first, cold, holds,
            "never" if silent < 0.0005 else f"{_number(silent)} s of {line['seconds']:g}",
            f"**{speed}**" if ours else speed, f"{line['peak_mib'] / 1024:.2f} GiB",
        ])  # fmt: skip
    heads = ["stream of", "first sound after, s", "in a fresh process", "it holds, s", "a player is silent for"]
    return _table([*heads, "x real time", "memory"], rows) + "\n\n" + _windows(lines)


def _windows(lines: list[Line]) -> str:
    every = [line for line in lines if line["benchmark"] == "windows"]
    shadow, prefill = ([line for line in every if line["way"] == way] for way in ("shadow", "prefill"))
    ratios = [median(line["change"] / line["alone"] for line in way) for way in (shadow, prefill)]
    beside = 100 * (median(line["beside"] / line["alone"] for line in shadow) - 1)
    return (
        f"Where windows change, the next cache is filled beside this window's steps: with {shadow[0]['size']}'s sizes "
        f"in {shadow[0]['precision']} and windows of {shadow[0]['window']:g} s the longest step around a change takes "
        f"{ratios[0]:.1f} times a plain one ({ratios[1]:.0f} times with a prefill there), a step beside such a shadow "
        f"{beside:.0f} % longer."
    )


def throughput(lines: list[Line]) -> str:
    """Seconds of sound a second, and the ratios to a loop and to transformers."""
    rows = []
    for line in _measured(lines, "throughput"):
        short, long = line["durations"]
        ours = line["provider"] == OURS
        sound = _number(line["audio_per_second"])
        used = line.get("occupancy_percent")
        who = f"{_named(line)} {_SHORT.get(line['precision'], line['precision'])}"
        way = f"{who}: {line['way']}" + (f", {line['batch']} at once" if line["batch"] > 1 else "")
        rows.append([
            f"{_size(line['model'])}, {line['pieces']} pieces of {short:g} to {long:g} s",
            way,
            f"**{sound}**" if ours else sound, _times(line["times_generate"]), _times(line["times_transformers"]),
            "" if used is None else f"{used:.0f} %",
        ])  # fmt: skip
    heads = ["pieces", "way", "s of sound a second", "x the loop", "x transformers' best batch"]
    return _table([*heads, "slots in use while pieces wait"], rows)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# -- precision --------------------------------------------------------------------------------------------------------

_KEPT = {
    "float32": ("32 bits", "float32"),
    "bfloat16": ("16 bits", "bfloat16"),
    "int8": ("8 bits, a scale for every 128", "int8, a scale for every head and position"),
    "int4": ("4 bits, a scale for every 128; logits int8", "int8"),
}


def precision(lines: list[Line]) -> str:
    """What a precision costs: likelihood on held-out songs, KL, and the logits on random weights of small's sizes."""
    rows = []
    for line in _measured(lines, "quality", model="demo"):
        weights, cache = _KEPT[line["precision"]] if line["provider"] == OURS else ("", "")
        own = [other for other in _measured(lines, "quality", provider=line["provider"], precision=line["precision"])
               if other["model"].startswith("random:")]  # fmt: skip
        over = line["percent_over_float32"]
        rows.append([
            f"{_named(line)} {line['precision']}", weights, cache, f"{line['nats_per_token']:.5f}",
            "" if abs(over) < 5e-5 else f"{over:+.3f} %" if abs(over) < 1 else f"{over:+.1f} %",
            f"{line['kl_nats']:.1e}", " ".join(_percent(other["logits_error"]) for other in own),
        ])  # fmt: skip
    heads = ["precision", "weights", "keys and values", "nats per token", "against float32", "KL, nats"]
    return _table([*heads, "logits, random weights"], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share > 1e-5 else "under 0.001 %"
