"""`musicgen-fast bench plot`: the right numbers reach the right plots, and the files are what a README can show."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musicgen_fast.bench import plot_data
from musicgen_fast.bench.plot_data import PLOTS, Bar, Curve, Picture, pictures
from musicgen_fast.bench.result_lines import machine_name, read_lines
from musicgen_fast.cli import main
from musicgen_fast.cli_bench import plot as command

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU = {
    "cpu": "Intel(R) Xeon(R) Processor avx2 avx512f amx_int8",
    "cores": 2,
    "gpu": None,
    "date": "2026-11-23T01:00:00",
}
GPU = CPU | {"gpu": "NVIDIA H100 80GB HBM3"}
OURS = "musicgen_fast"


def line(benchmark: str, provider: str = OURS, precision: str = "int8", **more: Any) -> dict[str, Any]:
    head = {"benchmark": benchmark, "provider": provider, "precision": precision, "model": "random:small", "threads": 2}
    return head | {"machine": CPU} | more


def latency(provider: str, precision: str, first: int, ms: float, **more: Any) -> dict[str, Any]:
    given = {"ms_per_step": ms, "ms_per_round": [ms], "positions": [first, first + 100], "floor_ms": ms / 2}
    return line("latency", provider, precision, **{"peak_mib": 1000, **given, **more})


def only(lines: list[dict[str, Any]], plot: str) -> Picture:
    (picture,) = pictures(lines, [plot])
    return picture


CURVE = [{"position": 10.0, "ms": 4.0, "floor_ms": 3.0}, {"position": 90.0, "ms": 6.0, "floor_ms": 5.0}]
QUALITY = [
    line("quality", OURS, "float32", percent_over_float32=0.0, kl_nats=0.0),
    line("quality", OURS, "int4", percent_over_float32=6.6, kl_nats=0.08),
    line("quality", "transformers", "bfloat16", percent_over_float32=-0.02, kl_nats=None),
]
STREAM = [
    line("stream", ttfa_cold_ms=800.0, ttfa_ms=500.0, first_chunk_ms=20.0),
    line("stream", "transformers", ttfa_ms=4000.0),
]
RATES = [line("throughput", way="render", batch=b, durations=[1.0, 4.0], audio_per_second=float(b)) for b in (8, 4)]
SAMPLER = [
    line("sampler", who, codebooks=4, batch=batch, filter="top_k250", dtype="float32", round=r, us={"p50": us + r})
    for who, us in (("draw:cpu", 10.0), ("noise:cpu", 5.0), ("audiocraft", 300.0))
    for batch in (1, 16)
    for r in (0, 1, 2)
]
STEPS = [
    latency(OURS, "int8", 0, 10.0), latency(OURS, "int8", 100, 14.0), latency("transformers", "float32", 0, 60.0),
    latency("transformers", "float32", 100, 60.0), latency("transformers", "bfloat16", 0, 30.0),
    latency("transformers", "bfloat16", 100, 42.0),
]  # fmt: skip
ALL = [*STEPS, *QUALITY, *STREAM, *RATES, *SAMPLER]


# -- which numbers ----------------------------------------------------------------------------------------------------


def test_the_curve_of_a_cpu_line() -> None:
    lines = [line("cpu", section="step", ms_per_step=5.0, positions=CURVE, requests=1)]
    lines += [line("cpu", "openvino", section="step", ms_per_step=5.0, positions=CURVE, requests=1)]
    others = [{"section": "threads"}, {"section": "step", "busy_core": True}, {"section": "step", "requests": 8}]
    lines += [line("cpu", precision="int4", ms_per_step=5.0, positions=CURVE, **other) for other in others]
    points, floor = ((10.0, 4.0), (90.0, 6.0)), ((10.0, 3.0), (90.0, 5.0))
    assert only(lines, "step").content == (Curve(OURS, "int8", points, floor), Curve("openvino", "int8", points))


def test_latency_lines_of_several_starts_are_one_curve() -> None:
    ours, *peers = only(STEPS, "step").content
    assert ours == Curve(OURS, "int8", ((50.0, 10.0), (150.0, 14.0)), ((50.0, 5.0), (150.0, 7.0)))
    assert [(c.provider, c.precision) for c in peers] == [("transformers", "float32"), ("transformers", "bfloat16")]
    assert not pictures(STEPS[:1], ["step"]), "one point is no curve"


def test_peers_are_sorted_and_held_against_the_best_transformers() -> None:
    ours, best, other = only(STEPS, "peers").content
    assert (ours, best) == (Bar(OURS, "int8", (12.0, 3.0)), Bar("transformers", "bfloat16", (36.0, 1.0)))
    assert other == Bar("transformers", "float32", (60.0, 0.6)) and only(STEPS, "peers").note == "positions 50 to 150"


def test_ratios_are_taken_within_a_round() -> None:
    lines = [latency(OURS, "int8", 0, 10.0, ms_per_round=[5.0, 10.0, 20.0])]
    lines += [latency("transformers", "float32", 0, 30.0, ms_per_round=[20.0, 30.0, 60.0])]
    assert only(lines, "peers").content[0] == Bar(OURS, "int8", (10.0, 3.0))


def test_averages_are_of_positions_that_all_have() -> None:
    found = only([*STEPS, latency(OURS, "int8", 900, 500.0, peak_mib=9999)], "peers")
    assert found.content[0] == Bar(OURS, "int8", (12.0, 3.0))
    assert only([*STEPS, latency(OURS, "int8", 900, 500.0, peak_mib=9999)], "memory").content[0].values == (1000.0,)


def test_the_latest_line_wins_and_kinds_are_not_mixed() -> None:
    later = CPU | {"date": "2026-11-24T00:00:00"}
    again = [latency(OURS, "int8", first, 7.0, machine=later, peak_mib=900) for first in (0, 100)]
    for lines in ([*STEPS, *again], [*again, *STEPS]):
        assert only(lines, "peers").content[0] == Bar(OURS, "int8", (7.0, pytest.approx(36 / 7)))
        assert only(lines, "peers").date == "2026-11-24"
    older = line("cpu", "audiocraft", section="step", ms_per_step=5.0, positions=CURVE, peak_mib=1)
    assert only([older, *again], "memory").content == (Bar(OURS, "int8", (900.0,)),)


def test_memory_of_the_older_step_lines() -> None:
    old = {"ms_per_step": {"p50": 3.0}, "size": "small", "model": None}
    found = only([line("step", **old, round=r, peak_mib=peak) for r, peak in ((0, 20), (1, 25), (2, 10))], "memory")
    assert found.content == (Bar(OURS, "int8", (25.0,)),) and found.scene.what == "random:small"


def test_throughput_from_both_formats() -> None:
    old = [("generate, one by one", 1.0), ("render, batch 8", 3.5), ("render, batch 16", 4.1)]
    lines = [line("render", way=way, audio_per_second=rate, durations=[1.0, 4.0], threads=None) for way, rate in old]
    curve = Curve(OURS, "int8", ((1, 1.0), (8, 3.5), (16, 4.1)), way="render, 1 to 4 s", panel="random:small")
    assert only(lines, "throughput").content == (curve,)
    lone = line("throughput", "audiocraft", way="generate, one by one", batch=1, audio_per_second=0.1)
    found = only([*lines, *RATES, lone], "throughput").content
    assert [(c.provider, c.points) for c in found] == [(OURS, ((4, 4.0), (8, 8.0))), ("audiocraft", ((1, 0.1),))]
    batch = line("cpu", section="batch", requests=8, audio_per_second={"30 s": 2.5, "10 s": 9.0})
    (curve,) = only([batch], "throughput").content
    assert curve.points == ((8, 2.5),) and curve.way == "decoder only, 30 s"


def test_sampler_medians_over_rounds_and_four_codebooks() -> None:
    found = only([*SAMPLER, *(row | {"codebooks": 8} for row in SAMPLER)], "sampler").content
    assert [(b.provider, b.panel, b.group, b.values) for b in found] == [
        ("draw:cpu", "top_k250", 1, (11.0,)), ("draw:cpu", "top_k250", 16, (11.0,)),
        ("audiocraft", "top_k250", 1, (301.0,)), ("audiocraft", "top_k250", 16, (301.0,)),
    ]  # fmt: skip


def test_quality_and_stream_rows() -> None:
    assert [bar.values for bar in only(QUALITY, "quality").content] == [(0.0, 0.0), (6.6, 0.08), (-0.02, None)]
    assert [bar.values for bar in only(STREAM, "stream").content] == [(800.0, 500.0, 20.0), (None, 4000.0, None)]
    newer = line("quality", percent_over_float32=1.0, data="other", machine=CPU | {"date": "2027"})
    assert only([*QUALITY, newer], "quality").content == (Bar(OURS, "int8", (1.0, None)),), "other data: not mixed"


def test_absent_lines_are_ignored() -> None:
    nulls = dict.fromkeys(("ms_per_step", "floor_ms", "percent_over_float32", "kl_nats", "ttfa_ms", "us"))
    gone = [
        line(kind, "fast_musicgen", **nulls, absent="not installed", audio_per_second=None, machine=GPU)
        for kind in ("latency", "cpu", "step", "throughput", "quality", "stream", "sampler")
    ]
    assert pictures([*ALL, *gone]) == pictures(ALL) and pictures(gone) == []
    silent = [{name: value for name, value in each.items() if name != "absent"} for each in gone]
    assert pictures([*ALL, *silent]) == pictures(ALL), "nulls alone are enough"


def test_machines_are_not_mixed() -> None:
    there = [row | {"machine": GPU, "threads": 9} for row in STEPS]
    assert [p.name for p in pictures([*STEPS, *there], ["peers"])] == [
        "peers-h100-80gb-hbm3",
        "peers-intel-xeon-amx-2-cores",
    ]
    one = [row | {"threads": 1} for row in STEPS]
    assert [p.name for p in pictures([*STEPS, *one], ["peers"])] == ["peers-1-threads", "peers-2-threads"]
    both = pictures([*STEPS, *one, *there], ["peers"])
    assert len({p.name for p in both}) == 3 and all(len(p.content) == 3 for p in both)


def test_short_names_of_machines() -> None:
    assert machine_name(CPU) == "Intel Xeon (AMX), 2 cores" and machine_name(GPU) == "H100 80GB HBM3"
    assert machine_name({"cpu": "AMD EPYC 7763 64-Core Processor avx2", "cores": 8}) == "AMD EPYC 7763 (AVX2), 8 cores"
    assert machine_name({"cpu": "arm"}) == "arm" and machine_name({}) == "unknown machine"


# -- what is drawn ----------------------------------------------------------------------------------------------------


def written(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every plot in both themes, by the command."""
    out = tmp_path_factory.mktemp("plots")
    assert main(["bench", "plot", written(out / "lines", ALL), "-o", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", PLOTS)
def test_files_are_what_a_page_needs(name: str, folder: Path) -> None:
    from PIL import Image

    for theme, back, ink in (("light", (255,) * 3, (31, 35, 40)), ("dark", (13, 17, 23), (230, 237, 243))):
        path = folder / f"{name}-{theme}.png"
        assert path.stat().st_size < 80_000
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width == 1200 and 300 < image.height < 2400 and not image.info
            rgb = image.convert("RGB")
        corners = [rgb.getpixel((x, y)) for x in (0, 1199) for y in (0, rgb.height - 1)]
        assert corners == [back] * 4
        colours = {colour: count for count, colour in rgb.getcolors(1 << 24) or []}
        assert colours[back] > 0.5 * rgb.width * rgb.height and ink in colours
        edge = [rgb.getpixel((x, y)) for x in (1, 1198) for y in range(rgb.height)]
        assert set(edge) == {back}, "nothing is cut off at the sides"


def test_ours_bears_the_accent_and_more_bars_need_more_room(folder: Path) -> None:
    from PIL import Image

    with Image.open(folder / "peers-dark.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert (0x58, 0xA6, 0xFF) in colours
    with Image.open(folder / "memory-light.png") as few, Image.open(folder / "sampler-light.png") as many:
        assert few.height < many.height


def test_the_same_lines_give_the_same_bytes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "plot", str(folder / "lines"), "-o", str(tmp_path), "--only", "step,quality", "--theme", "dark"]
    assert main(argv) == 0
    paths = [tmp_path / "step-dark.png", tmp_path / "quality-dark.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in paths)


def test_a_users_matplotlib_settings_change_nothing_and_stay(folder: Path, tmp_path: Path) -> None:
    import matplotlib

    argv = ["bench", "plot", str(folder / "lines"), "-o", str(tmp_path), "--only", "peers", "--theme", "light"]
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "red"}):
        assert main(argv) == 0
        assert matplotlib.rcParams["font.size"] == 30.0
    assert (tmp_path / "peers-light.png").read_bytes() == (folder / "peers-light.png").read_bytes()


def test_scale_and_long_names(tmp_path: Path) -> None:
    from PIL import Image

    long = [row | {"machine": CPU | {"cpu": "A processor " + "with a name " * 20}} for row in STREAM]
    argv = ["bench", "plot", written(tmp_path / "lines", long), "-o", str(tmp_path), "--scale", "1", "--theme", "light"]
    assert main(argv) == 0
    with Image.open(tmp_path / "stream-light.png") as image:
        assert image.width == 600
        rgb = image.convert("RGB")
    assert {rgb.getpixel((x, y)) for x in (1, 598) for y in range(rgb.height)} == {(255, 255, 255)}


# Linear RGB as the colour-blind see it: Machado, Oliveira and Fernandes 2009, severity 1.
EYES = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of linear RGB."""
    xyz = np.array([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]]) @ rgb.clip(0, 1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read_and_told_apart(theme: str) -> None:
    from musicgen_fast.bench.plot_style import THEMES

    chosen = THEMES[theme]
    for colour in (chosen.text, chosen.faint, chosen.other, *chosen.hues.values()):
        low, high = sorted(float(linear(c) @ (0.2126, 0.7152, 0.0722)) for c in (colour, chosen.back))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{colour} is no text on {chosen.back}"
    for name, eye in EYES.items():
        for one, other in combinations(chosen.hues.values(), 2):
            apart = np.linalg.norm(lab(np.array(eye) @ linear(one)) - lab(np.array(eye) @ linear(other)))
            assert apart >= 12, f"{name}: {one} and {other}"


def test_labels_keep_apart_and_inside() -> None:
    from musicgen_fast.bench.plot_style import spread

    assert spread([50.0, 10.0], 5, 0, 100) == [50.0, 10.0]
    assert spread([50.0, 51.0, 10.0], 5, 0, 100) == [48.0, 53.0, 10.0]
    assert spread([1.0, 0.0], 10, 0, 100) == [10.0, 0.0] and spread([100.0, 99.0], 10, 0, 100) == [100.0, 90.0]


# -- committed results, mistakes --------------------------------------------------------------------------------------


def test_committed_results_hold_these_plots() -> None:
    """The figures of README.md are in these files."""
    found = {p.name: p for p in pictures(read_lines(sorted(RESULTS.glob("*-cpu-2core-*.jsonl"))))}
    assert {"step", "peers", "throughput", "memory", "sampler"} <= {p.plot for p in found.values()}
    decoder = read_lines(sorted(RESULTS.glob("*-cpu-2core-decoder.jsonl"))[-1:])
    steps = [row for row in decoder if row["section"] == "step"]
    assert len(only(decoder, "step").content) == len(only(decoder, "memory").content) == len(steps) > 8
    told = {(b.provider, b.precision): b.values for b in only(decoder, "peers").content}
    for row in steps:
        ms, times = told[row["provider"], row["precision"]]
        assert (ms, times) == (pytest.approx(row["ms_per_step"]), pytest.approx(row["times"]["transformers"]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "step,speed"], "got 'speed'"), (["--theme", "pink"], "got 'pink'"),
        (["--scale", "0"], "--scale"), (["--scale", "two"], "--scale"), ([], "FILE"),
    ],
)  # fmt: skip
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "plot", *argv])
    assert message in capsys.readouterr().err


def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, out = written(tmp_path / "lines", STREAM), str(tmp_path / "out")
    assert main(["bench", "plot", lines, "-o", out, "--only", "step,quality"]) == 1
    assert "nothing to draw for step, quality" in capsys.readouterr().err and not Path(out).exists()
    assert main(["bench", "plot", lines, "-o", out, "--only", "step,stream", "--theme", "dark"]) == 0
    said = capsys.readouterr()
    assert "nothing to draw for step\n" in said.err and said.out.count(".png") == 1
    (tmp_path / "bad").write_text('{"benchmark": "cpu"}\nno json\n')
    assert main(["bench", "plot", str(tmp_path / "bad"), "-o", out]) == 1
    assert "bad, line 2: this is no JSON" in capsys.readouterr().err
    assert main(["bench", "plot", str(tmp_path / "none"), "-o", out]) == 1
    assert "none: No such file" in capsys.readouterr().err


def in_python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """The command in a process where importing matplotlib fails and looks as if it were not there."""
    block = "import sys; sys.path.insert(0, sys.argv.pop()); sys.modules['matplotlib'] = None\n"
    return subprocess.run(
        [sys.executable, "-c", block + code, *argv, str(ROOT)], capture_output=True, text=True, timeout=60
    )


def test_without_matplotlib(tmp_path: Path) -> None:
    code = "from musicgen_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    done = in_python(code, "bench", "plot", written(tmp_path / "lines", STREAM), "-o", str(tmp_path / "out"))
    assert done.returncode == 1 and "pip install musicgen-fast[plot]" in done.stderr and done.stdout == ""


def test_help_needs_neither_torch_nor_matplotlib() -> None:
    code = "from musicgen_fast.cli import main\ntry: main(['bench', 'plot', '-h'])\n"
    done = in_python(code + "finally: print('torch' in sys.modules)")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr
    assert all(f"  {name} " in done.stdout for name in PLOTS)


def test_drawing_needs_no_torch(tmp_path: Path) -> None:
    argv = ["bench", "plot", written(tmp_path / "lines", STREAM), "-o", str(tmp_path), "--theme", "dark"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from musicgen_fast.cli import main\n"
    code += f"code = main({argv!r}); print(code, 'torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["0 False False"], done.stderr


def test_the_names_of_the_options_are_the_real_ones() -> None:
    from musicgen_fast.bench.plot import _DRAW
    from musicgen_fast.bench.plot_style import THEMES

    assert command.PLOTS == PLOTS == tuple(plot_data._PICK) and set(PLOTS) == set(_DRAW)
    assert command.THEMES == tuple(THEMES)
