"""Classifiers, scores and tables of prompt adherence, on numbers whose statistics are known and on synthetic pieces."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from musicgen_fast.evaluation import Adherence, Analyser, Score, cross_validated_ceiling, markdown_table, measure, score
from musicgen_fast.evaluation.classifier import Classifier, cross_validated, fit

from .evaluation_signals import RATE, piece

BPM = {"slow": 75.0, "medium": 125.0, "fast": 187.5}
CHOICES = {
    "tempo": tuple(BPM),
    "mode": ("major", "minor"),
    "drums": ("off", "on"),
    "brightness": ("dark", "bright"),
    "density": ("sparse", "dense"),
    "loudness": ("soft", "loud"),
}


@pytest.fixture(scope="module")
def labelled():
    """72 pieces of 6 s and their labels: (waveforms, features, labels)."""
    rng = random.Random(0)
    rows, clips = [], []
    for seed in range(72):
        row = {name: rng.choice(values) for name, values in CHOICES.items()}
        rows.append(row)
        clips.append(
            piece(
                BPM[row["tempo"]],
                rng.randrange(12),
                row["mode"],
                drums=row["drums"] == "on",
                bright=row["brightness"] == "bright",
                dense=row["density"] == "dense",
                gain=(0.05 if row["loudness"] == "soft" else 0.2) * 2 ** rng.uniform(-0.3, 0.3),
                seed=seed,
            )
        )
    return clips, measure(clips, RATE), rows


@pytest.fixture(scope="module")
def analyser(labelled):
    _, measured, rows = labelled
    return Analyser.fitted_on_features(measured[:48], rows[:48], RATE)


# -- the classifier ----------------------------------------------------------------------------------------------------


def cloud(count, seed, gap=2.0):
    rng = np.random.default_rng(seed)
    labels = ["a" if i % 2 else "b" for i in range(count)]
    rows = [{"x": rng.normal() + (gap if c == "a" else 0.0), "y": 5 * rng.normal(), "same": 1.0} for c in labels]
    return rows, labels


def test_the_fit_is_a_minimum_of_its_loss():
    rows, labels = cloud(60, 0)
    model = fit(rows, labels, ("x", "y"), penalty=0.7)
    x = (np.array([[r["x"], r["y"]] for r in rows]) - model.mean) / model.scale
    error = model.probabilities(rows) - np.array([[c == name for name in model.classes] for c in labels])
    assert np.abs(x.T @ error + 0.7 * model.weight).max() < 1e-6
    assert np.abs(error.sum(0) + 1e-6 * model.bias).max() < 1e-6


def test_accuracy_reaches_what_two_gaussians_allow():
    """Two unit Gaussians 2 apart: the best rule is right in Phi(1) = 84.1 % of cases."""
    rows, labels = cloud(400, 1)
    test, wanted = cloud(4000, 2)
    hits = np.mean([p == w for p, w in zip(fit(rows, labels, ("x", "y")).predict(test), wanted, strict=True)])
    assert hits == pytest.approx(0.841, abs=0.02)


def test_probabilities_are_calibrated():
    rows, labels = cloud(2000, 3)
    test, wanted = cloud(4000, 4)
    first = fit(rows, labels, ("x",)).probabilities(test)[:, 0]
    for low in (0.1, 0.4, 0.7):
        inside = (first >= low) & (first < low + 0.2)
        share = np.mean([wanted[i] == "a" for i in np.flatnonzero(inside)])
        assert share == pytest.approx(float(first[inside].mean()), abs=0.06)


def test_cross_validation_does_not_see_what_it_judges():
    """Labels by coin flips: a fit that sees its clips learns them from 30 random numbers, one that does not cannot."""
    rng = np.random.default_rng(0)
    names = tuple(f"f{i}" for i in range(30))
    rows = [{n: float(rng.normal()) for n in names} for _ in range(60)]
    labels = [str(rng.integers(2)) for _ in rows]
    seen = np.mean([p == w for p, w in zip(fit(rows, labels, names).predict(rows), labels, strict=True)])
    unseen = np.mean([p == w for p, w in zip(cross_validated(rows, labels, names), labels, strict=True)])
    assert seen > 0.9 and unseen < 0.7


def test_separable_and_constant_features_stay_finite():
    rows, labels = cloud(40, 5, gap=1000.0)
    model = fit(rows, labels, ("x", "same"))
    assert np.isfinite(model.weight).all() and model.predict(rows) == labels


def test_wrong_fits_are_named():
    rows, labels = cloud(10, 0)
    for arguments, message in (
        ((rows, labels[:9], ("x",)), "10 clips, but 9"),
        ((rows, ["a"] * 10, ("x",)), "two classes"),
        ((rows, labels, ("x", "z")), "lack the features"),
        ((rows, labels, ()), "at least one feature"),
        (([{"x": math.nan}] * 10, labels, ("x",)), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(*arguments)
    with pytest.raises(ValueError, match="folds"):
        cross_validated(rows, labels, ("x",), folds=1)


# -- analysers ---------------------------------------------------------------------------------------------------------


def test_held_out_pieces_are_judged_rightly(labelled, analyser):
    _, measured, rows = labelled
    found = score(analyser.labels(measured[48:]), rows[48:])
    assert list(found) == list(CHOICES)
    for name, result in found.items():
        assert result.n == 24 and result.accuracy >= (0.8 if name == "density" else 0.9), name
    ceiling = cross_validated_ceiling(measured, rows)
    assert all(result.n == 72 and result.z > 4 for result in ceiling.values())


def test_clips_that_ignore_their_prompts_are_at_chance(labelled, analyser):
    clips, _, rows = labelled
    shuffled = random.Random(1).sample(rows[48:], 24)
    ignoring = Adherence.of(analyser, clips[48:], shuffled).scores
    assert max(abs(result.z) for result in ignoring.values()) < 3


def test_json_round_trip(tmp_path, labelled, analyser):
    path = tmp_path / "analyser.json"
    analyser.save(path)
    again = Analyser.load(path)
    assert again.sample_rate == RATE and again.candidates == tuple(BPM.values())
    assert again.labels(labelled[1]) == analyser.labels(labelled[1])
    for name, classifier in analyser.classifiers.items():
        difference = again.classifiers[name].probabilities(labelled[1]) - classifier.probabilities(labelled[1])
        assert np.abs(difference).max() < 1e-5
    again.save(tmp_path / "second.json")
    assert path.read_text() == (tmp_path / "second.json").read_text()
    assert path.stat().st_size < 20_000  # bytes


def test_fitting_waveforms_is_fitting_their_features(labelled, analyser):
    clips, measured, rows = labelled
    direct = Analyser.fitted(clips[:12], rows[:12], RATE)
    assert direct.labels(measured) == Analyser.fitted_on_features(measured[:12], rows[:12], RATE).labels(measured)


def test_other_files_are_refused(tmp_path, analyser):
    path = tmp_path / "analyser.json"
    for content in ("[]", "{}", "no json", '{"format": 99}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a saved analyser"):
            Analyser.load(path)
    analyser.save(path)
    content = json.loads(path.read_text())
    content["classifiers"]["mode"]["bias"].append(0.0)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="bias"):
        Analyser.load(path)
    with pytest.raises(ValueError, match="saved classifier"):
        Classifier.from_json({"classes": ["a", "b"]})


def test_unknown_attributes_are_read_from_everything(labelled):
    _, measured, rows = labelled
    renamed = [{"percussion": row["drums"]} for row in rows]
    model = Analyser.fitted_on_features(measured[:48], renamed[:48], RATE)
    assert len(model.classifiers["percussion"].features) == len(measured[0])
    assert score(model.labels(measured[48:]), renamed[48:])["percussion"].accuracy > 0.9


# -- scores and tables -------------------------------------------------------------------------------------------------


def test_score_by_hand():
    found = Score(n=64, hits=48, chance=0.5)
    assert found.accuracy == 0.75 and found.z == pytest.approx(0.25 / math.sqrt(0.25 / 64))
    assert found.standard_error == pytest.approx(math.sqrt((50 / 68) * (18 / 68) / 68))
    assert 0 < Score(32, 32, 0.5).standard_error < 0.06
    assert math.isnan(Score(4, 4, 1.0).z)


def test_chance_is_the_best_blind_guess():
    wanted = [{"mode": "major"}] * 6 + [{"mode": "minor"}] * 2 + [{"drums": "on"}]
    found = score([{"mode": "major", "drums": "off"}] * 9, wanted)
    assert found["mode"] == Score(8, 6, 0.75) and found["mode"].z == 0
    assert found["drums"] == Score(1, 0, 1.0)
    with pytest.raises(ValueError, match="1 verdicts for 2"):
        score([{}], [{}, {}])


def test_table():
    columns = {"cfg 1": {"mode": Score(100, 50, 0.5)}, "cfg 3": {"mode": Score(100, 70, 0.5)}}
    expected = [
        "| attribute | n | chance | ceiling | cfg 1 | cfg 1 z | cfg 3 | cfg 3 z |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| mode | 100 | 50 | 90 ± 3 | 50 ± 5 | +0.0 | 70 ± 5 | +4.0 |",
    ]
    assert markdown_table(columns, {"mode": Score(100, 90, 0.5)}).splitlines() == expected
    assert "| - |" in markdown_table(columns)
    with pytest.raises(ValueError, match="columns"):
        markdown_table({})
