"""`musicgen-fast bench quality`: figures by hand, every precision and transformers on tiny models, wrong decoders."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from examples.demo_model.tokens import encode_songs
from musicgen_fast import MusicGen, native
from musicgen_fast.bench import quality, quality_clips, quality_lines
from musicgen_fast.bench.quality import QualityJob, cell_sums, jobs_for, measure, summary
from musicgen_fast.bench.quality_clips import Clip, load_clips, own_samples, read_manifest, recorded, save_clips
from musicgen_fast.bench.quality_lines import METRICS, lines, over, table
from musicgen_fast.cli import main
from musicgen_fast.cli_bench import quality as cli_quality
from musicgen_fast.config import PatternConfig
from musicgen_fast.evaluation import negative_log_likelihood
from musicgen_fast.pattern import build_pattern

from .checkpoint_writers import tiny, write_transformers

ROOT = Path(__file__).resolve().parent.parent
NEEDS_NATIVE = pytest.mark.skipif(not native.available(), reason=f"needs the C++ extension: {native.why_not()}")


class Case:
    """A tiny model in a folder, clips of two lengths (one of them without a text), and where they lie."""

    def __init__(self, folder: Path, kind: str):
        self.model = str(write_transformers(folder / "model", tiny(kind)))
        self.loaded: Any = MusicGen.get_pretrained(self.model, "cpu")
        short = own_samples(self.loaded, 1, 0.2)[0]
        self.clips = [*own_samples(self.loaded, 3, 0.5), short, Clip(short.tokens.roll(1, 1))]
        self.path = str(folder / "clips.pt")
        save_clips(self.path, self.clips)

    def job(self, provider: str = quality.OURS, precision: str = "float32") -> QualityJob:
        return QualityJob(provider, self.model, precision, clips=self.path)

    def expected(self) -> Any:
        """The likelihood by `evaluation`, length by length."""
        found = None
        for clips in (self.clips[:3], self.clips[3:]):
            tokens = torch.stack([clip.tokens for clip in clips])
            part = negative_log_likelihood(self.loaded.lm, tokens, [clip.text for clip in clips])
            found = part if found is None else found + part
        return found


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("quality"), "text")


@pytest.fixture(scope="module")
def exact(case: Case) -> dict[str, Any]:
    return measure(case.job())


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [7, 6])
def test_sums_are_over_the_cells_that_hold_a_frame(columns):
    pattern = build_pattern(PatternConfig(delays=(1, 2)), 2, 5)  # steps 0 and 1 hold no frame, nor does 7 of book 0
    assert pattern.num_steps == 8
    torch.manual_seed(0)
    codes = torch.randint(0, 6, (1, 2, 5))
    found, exact = torch.randn(2, columns, 2, 6)
    sums = cell_sums(found, exact, pattern.build(codes, 6)[0], pattern)
    for k in range(2):
        wanted = torch.zeros(6, dtype=torch.float64)
        for t in range(5):
            column = t + 1 + k + (columns - 7)  # the logits of column j predict step j + 1
            q, p = found[column, k].double(), exact[column, k].double()
            lq, lp, token = q - q.logsumexp(0), p - p.logsumexp(0), codes[0, k, t]
            wanted[0] -= lq[token]
            wanted[1] -= lp[token]
            wanted[2] += sum(lp[v].exp() * (lp[v] - lq[v]) for v in range(6))
            wanted[3] += p.argmax() == q.argmax()
            wanted[4] += ((p - q) ** 2).sum()
            wanted[5] += (p**2).sum()
        torch.testing.assert_close(sums[k], wanted)


def test_the_summary_by_hand():
    sums = torch.zeros(3, 2, 6, dtype=torch.float64)
    sums[..., 0] = torch.tensor([[22.0, 30], [21, 31], [26, 30]])
    sums[..., 1] = torch.tensor([[20.0, 30], [21, 31], [20, 30]])
    sums[..., 2], sums[..., 3], sums[..., 4], sums[..., 5] = 1.0, 5.0, 0.09, 1.0
    found = summary(sums, torch.tensor([10, 10, 10]))
    assert found["clips"] == 3 and found["frames"] == 30
    assert found["nats_per_codebook"] == pytest.approx([69 / 30, 91 / 30])
    assert found["nats_per_token"] == pytest.approx(160 / 60)
    assert found["percent_over_float32"] == pytest.approx(100 * 8 / 152)
    differences = torch.tensor([0.1, 0.0, 0.3]).double()
    assert found["difference_standard_error"] == pytest.approx(float(differences.std()) / math.sqrt(3), rel=1e-6)
    assert (found["kl_nats"], found["same_argmax"]) == pytest.approx((0.1, 0.5))
    assert found["logits_error"] == pytest.approx(0.3)
    assert summary(sums[:1], torch.tensor([10]))["difference_standard_error"] is None


def test_float32_is_the_reference_and_its_likelihood_that_of_evaluation(case, exact):
    assert set(exact) == set(METRICS) and (exact["clips"], exact["frames"]) == (5, 95)
    assert 0 <= exact["kl_nats"] < 1e-9 and exact["same_argmax"] == 1 and exact["logits_error"] < 1e-5
    assert abs(exact["percent_over_float32"]) < 1e-4 and exact["difference_standard_error"] < 1e-6
    expected = case.expected()
    assert exact["nats_per_token"] == pytest.approx(expected.mean, rel=1e-6)
    assert exact["nats_per_codebook"] == pytest.approx(expected.per_codebook.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    "precision", ["bfloat16", "float16", *(pytest.param(p, marks=NEEDS_NATIVE) for p in ("int8", "int4"))]
)
def test_every_precision_costs_something(case, exact, precision):
    found = measure(case.job(precision=precision))
    low, high = {"bfloat16": (1e-3, 0.02), "float16": (1e-4, 0.01), "int8": (1e-3, 0.025), "int4": (0.03, 0.4)}[
        precision
    ]
    assert low < found["logits_error"] < high
    assert exact["kl_nats"] < found["kl_nats"] < high**2 and 0.5 < found["same_argmax"] <= 1
    assert found["nats_per_token"] != exact["nats_per_token"]
    percent = 100 * (found["nats_per_token"] / exact["nats_per_token"] - 1)
    assert found["percent_over_float32"] == pytest.approx(percent, abs=1e-4)
    assert found["nats_per_token"] == pytest.approx(sum(found["nats_per_codebook"]) / 4)


@NEEDS_NATIVE
def test_own_samples_are_of_the_models_own_law(case, tmp_path):
    """Then the difference in nats is the KL divergence, within its error; guidance or top-k would bend it."""
    clips = own_samples(case.loaded, 24, 2.0)
    save_clips(tmp_path / "clips.pt", clips)
    found = measure(QualityJob(quality.OURS, case.model, "int4", clips=str(tmp_path / "clips.pt")))
    exact = found["nats_per_token"] / (1 + found["percent_over_float32"] / 100)
    difference = found["nats_per_token"] - exact
    assert found["kl_nats"] > 3 * found["difference_standard_error"], "else this would show nothing"
    assert abs(difference - found["kl_nats"]) < 3 * found["difference_standard_error"]
    assert len({clip.tokens.numpy().tobytes() for clip in clips}) == 24
    again = own_samples(case.loaded, 2, 2.0)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(clips[:2], again, strict=True))


@pytest.mark.parametrize("wrong", ["norm", "cache"])
def test_a_wrong_decoder_is_seen(case, exact, monkeypatch, wrong):
    """A norm that is 2 % off; a cache that loses what it was told before position 8."""
    monkeypatch.setenv("MUSICGEN_FAST_DECODER", "torch")
    real = MusicGen.get_pretrained

    def broken(*args: Any, **options: Any) -> Any:
        made = real(*args, **options)
        if wrong == "norm":
            made.lm.transformer.layers[1].norm1.weight.data += 0.02
            return made
        step = made.lm.decoder.step

        def forgetful(state: Any) -> None:
            if state.column == 8:
                state.kv.clear()
            step(state)

        made.lm.decoder.step = forgetful
        return made

    monkeypatch.setattr(MusicGen, "get_pretrained", broken)
    found = measure(case.job())
    assert found["logits_error"] > 1e-3 and found["kl_nats"] > 1e-6
    assert found["nats_per_token"] != pytest.approx(exact["nats_per_token"], rel=1e-7)


def test_clips_that_do_not_fit_together_go_one_by_one(case, exact, monkeypatch):
    assert list(quality._groups(case.clips, case.loaded.lm.config)) == [[0, 1, 2], [3, 4]]
    monkeypatch.setattr(quality, "_CELLS", 2 * 29 * 4 * 64)  # two clips of 0.5 s: 25 frames and 4 columns more
    assert list(quality._groups(case.clips, case.loaded.lm.config)) == [[0, 1], [2], [3, 4]]
    assert measure(case.job())["nats_per_token"] == pytest.approx(exact["nats_per_token"], rel=1e-6)


@pytest.mark.parametrize("kind", ["stereo", "melody"])
def test_other_kinds_of_models(kind, tmp_path):
    other = Case(tmp_path, kind)
    found = measure(other.job())
    assert found["kl_nats"] < 1e-9 and found["nats_per_token"] == pytest.approx(other.expected().mean, rel=1e-6)
    assert measure(other.job("transformers")) == {"absent": "transformers is compared on mono text models only"}


def test_transformers_in_float32_is_ours(case, exact):
    found = measure(case.job("transformers"))
    assert found["nats_per_token"] == pytest.approx(exact["nats_per_token"], rel=1e-6)
    assert found["logits_error"] < 1e-4 and found["kl_nats"] < 1e-9 and found["same_argmax"] == 1


def test_transformers_in_bfloat16_is_worse(case):
    found = measure(case.job("transformers", "bfloat16"))
    assert 1e-3 < found["logits_error"] < 0.05 and found["kl_nats"] > 1e-7


def test_what_is_not_there_is_absent_and_says_why(case, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert "needs the C++ extension" in measure(case.job(precision="int8"))["absent"]
    monkeypatch.setattr(quality, "why_absent", lambda name: "transformers is not installed")
    assert measure(case.job("transformers")) == {"absent": "transformers is not installed"}
    ((_, answer),) = quality.run([case.job("transformers")], case.clips, lambda _: None)
    assert answer == {"absent": "transformers is not installed"}


# -- clips ------------------------------------------------------------------------------------------------------------


def test_clips_survive_the_file(case):
    for before, after in zip(case.clips, load_clips(case.path), strict=True):
        assert torch.equal(before.tokens, after.tokens) and (before.text, before.ids) == (after.text, after.ids)
        assert (before.states is None) == (after.states is None) == (before.text is None)
        assert before.states is None or torch.equal(before.states, after.states)


@pytest.mark.parametrize("seconds", [0.01, 31.0])
def test_own_samples_have_a_frame_and_fit_the_window(case, seconds):
    with pytest.raises(ValueError, match="between one frame and 30 s"):
        own_samples(case.loaded, 1, seconds)


def sound(path: Path, seconds: float, rate: int = 32000) -> torch.Tensor:
    wav = 0.3 * torch.randn(round(seconds * rate), generator=torch.Generator().manual_seed(1))
    soundfile.write(path, wav.numpy(), rate, subtype="FLOAT")
    return wav


def test_recordings_go_through_the_codec(case, tmp_path):
    wav = sound(tmp_path / "a.wav", 1.0)
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "caption": "slow", "id": 7}\n\n{"Audio": "a.wav"}\n')
    rows = read_manifest(tmp_path / "m.jsonl")
    assert [row.text for row in rows] == ["slow", None]
    whole, nameless = recorded(case.loaded, rows)
    expected = case.loaded.compression_model.encode(wav[None, None])[0][0]
    assert torch.equal(whole.tokens, expected) and torch.equal(nameless.tokens, expected)
    assert whole.ids and whole.states is not None and nameless.states is None
    (part, _) = recorded(case.loaded, rows, 0.4)
    assert torch.equal(part.tokens, case.loaded.compression_model.encode(wav[None, None, :28800])[0][0, :, :20])


def test_a_recording_needs_a_frame(case, tmp_path):
    sound(tmp_path / "a.wav", 0.019)
    with pytest.raises(ValueError, match="a.wav: there is less than one frame"):
        recorded(case.loaded, [quality_clips.Recorded(tmp_path / "a.wav", None)])


@pytest.mark.parametrize("name,separator", [("m.csv", ","), ("m.tsv", "\t")])
def test_manifests_as_tables(tmp_path, name, separator):
    sound(tmp_path / "a.wav", 0.1)
    (tmp_path / name).write_text(f'prompt{separator}audio\n"slow, soft"{separator}a.wav\n{separator}a.wav\n')
    rows = read_manifest(tmp_path / name)
    assert [(row.text, row.audio) for row in rows] == [("slow, soft", tmp_path / "a.wav"), (None, tmp_path / "a.wav")]


@pytest.mark.parametrize(
    "content,message",
    [
        ('{"prompt": "slow"}', "line 1: it has no field 'audio'"),
        ('\n{"audio": "gone.wav"}', "line 2: there is no file 'gone.wav'"),
        ("slow", "line 1: this is no JSON"),
        ("[1]", "line 1: a line is an object"),
        ("\n", "holds no line"),
    ],
)
def test_mistakes_in_a_manifest(tmp_path, content, message):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "m.jsonl")


def test_held_out_songs_are_those_of_the_token_sets(tmp_path):
    """Through the files, the codec hears what it heard when the training's held-out set was made."""
    script = ROOT / "examples" / "demo_model" / "held_out.py"
    argv = [sys.executable, str(script), "--count", "2", "--seconds", "0.6", "-o", str(tmp_path / "held")]
    done = subprocess.run(
        argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    model = MusicGen.get_pretrained("demo", "cpu")
    rows = read_manifest(done.stdout.strip())
    found = torch.stack([clip.tokens for clip in recorded(model, rows, 0.6)])
    assert torch.equal(found, encode_songs(model.compression_model, [-1, -2], 30))
    assert all(row.text for row in rows)


# -- what is said -----------------------------------------------------------------------------------------------------


def answers() -> quality.Answers:
    figures = dict.fromkeys(METRICS, 0.5) | {"clips": 3, "frames": 60, "nats_per_codebook": [0.5, 0.5]}
    return [
        (QualityJob("musicgen_fast", "demo", "float32"), {**figures, "percent_over_float32": -1e-9}),
        (QualityJob("musicgen_fast", "demo", "int8"), {**figures, "percent_over_float32": 0.4}),
        (QualityJob("musicgen_fast", "demo", "int4"), {**figures, "percent_over_float32": 6.6}),
        (QualityJob("transformers", "demo", "bfloat16"), {**figures, "percent_over_float32": 2.0}),
        (QualityJob("musicgen_fast", "demo", "float16"), {"absent": "does not run on this"}),
    ]


def test_lines_and_table():
    said = lines(answers(), "songs.jsonl", {"cpu": "a"})
    head = {"benchmark", "provider", "precision", "model", "device", "threads", "data", "machine"}
    assert all(set(line) - {"absent"} == head | set(METRICS) for line in said)
    assert "clips_file" not in said[0] and said[0]["clips"] == 3 and said[0]["data"] == "songs.jsonl"
    assert said[4]["absent"] == "does not run on this" and said[4]["nats_per_token"] is None
    text = table(said)
    assert "| musicgen_fast | float32 | 0.50000 | +0.000 +- 100.000 % | 0.5 | 50 % | 50.00 % |" in text
    assert "| musicgen_fast | float16 | absent: does not run on this |" in text
    assert text.endswith("3 clips, 60 frames: songs.jsonl")


def test_what_costs_too_much():
    said = lines(answers(), "own samples", {})
    assert over(said, 0.5) == []
    assert over(said, 0.4) == []
    (sentence,) = over(said, 0.3)
    assert sentence == "int8 costs +0.400 % nats over float32, more than 0.3 %"
    said[0]["percent_over_float32"] = math.nan
    assert "float32 costs" in over(said, 0.5)[0]


def test_jobs(monkeypatch):
    monkeypatch.setattr(quality, "why_absent", lambda name: "")
    jobs = jobs_for(QualityJob("", "demo"), ["float32", "int8", "float16", "int8"], None)
    assert [(job.provider, job.precision) for job in jobs] == [
        ("musicgen_fast", "float32"), ("musicgen_fast", "int8"), ("musicgen_fast", "float16"),
        ("transformers", "float32"),
    ]  # fmt: skip
    on_gpu = jobs_for(QualityJob("", "demo", device="cuda"), ["float16", "int8"], ["transformers"])
    assert [(job.provider, job.precision) for job in on_gpu] == [("transformers", "float16")]
    monkeypatch.setattr(quality, "why_absent", lambda name: "gone" if name == "transformers" else "")
    assert {job.provider for job in jobs_for(QualityJob(""), ["float32"], None)} == {"musicgen_fast"}


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_line_names_what_there_is():
    assert cli_quality.PROVIDERS == quality.PROVIDERS


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--providers", "audiocraft"], "expected some of musicgen_fast,transformers"),
        (["--precision", "int3"], "got 'int3'"),
        (["--count", "0"], "at least 1"),
        (["--duration", "-1"], "above 0"),
        (["--fail-over", "few"], "expected a number of percent"),
    ],
)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "quality", *argv])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--clips", "nowhere.jsonl"], "nowhere.jsonl"),
        (["-m", "random:huge"], "unknown size 'huge'"),
        (["--duration", "11"], "10 s, the model's window"),
        (["--providers", "transformers", "--precision", "int8"], "none of these precisions"),
    ],
)
def test_what_cannot_be_measured(argv, message, capsys):
    threads = torch.get_num_threads()
    assert main(["bench", "quality", "-d", "cpu", "--threads", str(threads), *argv]) == 1
    assert message in capsys.readouterr().err


def run_with(monkeypatch: pytest.MonkeyPatch, case: Case, found: list[dict[str, Any]], *argv: str) -> int:
    """The exit code of the command where the processes answer `found`."""
    monkeypatch.setattr(quality, "in_own_process", lambda job, task, module: found.pop(0))
    threads = str(torch.get_num_threads())
    start = ["bench", "quality", "-q", "-m", case.model, "-d", "cpu", "--threads", threads, "--count", "1"]
    return main([*start, "--duration", "0.1", "--providers", "musicgen_fast", *argv])


def test_exit_codes(case, monkeypatch, capsys):
    exact, rough = ({**answers()[i][1]} for i in (0, 1))
    for limit, code in (("0.5%", 0), ("0.3", 1)):
        argv = ["--precision", "float32,int8", "--fail-over", limit]
        assert run_with(monkeypatch, case, [exact, rough], *argv) == code
        assert ("int8 costs +0.400 %" in capsys.readouterr().err) == bool(code)
    assert run_with(monkeypatch, case, [{"absent": "no such thing here"}], "--precision", "int4") == 0
    assert "absent: no such thing here" in capsys.readouterr().out
    assert run_with(monkeypatch, case, [{"absent": "failed: MemoryError"}], "--precision", "int8") == 1
    assert "could not be measured in int8: failed: MemoryError" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys; from musicgen_fast.cli import main\ntry: main(['bench', 'quality', '-h'])\n"
    done = subprocess.run([sys.executable, "-c", code + "finally: print('torch' in sys.modules)"], text=True,
                          capture_output=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False" and "--fail-over" in done.stdout


def test_the_command_prints_a_line_each(case, tmp_path):
    """From a folder that is not the checkout, on recordings, with ours and transformers in processes of their own."""
    sound(tmp_path / "a.wav", 0.3)
    (tmp_path / "m.csv").write_text("audio,prompt\na.wav,slow piano\na.wav,fast drums\n")
    argv = f"bench quality -m {case.model} -d cpu --threads 1 --precision float32 --clips m.csv --json - --fail-over 1"
    done = subprocess.run(
        [sys.executable, "-m", "musicgen_fast", *argv.split()], env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads(line) for line in done.stdout.splitlines())
    assert (ours["provider"], theirs["provider"]) == ("musicgen_fast", "transformers")
    assert (ours["clips"], ours["frames"], ours["data"], ours["threads"]) == (2, 30, "m.csv", 1)
    assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], rel=1e-5) and "machine" in ours
    assert quality_lines.over([ours], 0.01) == []
