"""Figures on texts unlike the task's, and the study that reports them."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from bench import study_calibration as study
from sparsebert import data, heads
from sparsebert.data import Examples, general_texts
from sparsebert.robustness import statistics
from sparsebert.robustness.drift import GENERAL, LONG, LONGER, MOST, OUTSIDE, drift, joined, unlike

LOADED = {split: data.load(data.get_task("mr"), split) for split in ("train", "test")}
MR = LOADED["test"]
TEN = Examples("t", "test", [f"text {i}" for i in range(10)], None, np.arange(10) % 2)
PAIRS = Examples("t", "test", TEN.texts, [f"other {i}" for i in range(10)], TEN.labels)


def test_joined_texts_are_long_enough_and_share_no_text():
    found = joined(TEN, 6)
    assert found.labels is None and found.texts_b is None and len(found) == 3  # three parts each; one is left over
    parts = [part for text in found.texts for part in text.replace(" text", "|text").split("|")]
    assert len(parts) == len(set(parts)) == 9 and set(parts) <= set(TEN.texts)
    assert joined(TEN, 6).texts == found.texts != joined(TEN, 6, seed=1).texts


def test_few_texts_are_joined_to_one_that_is_shorter():
    found = joined(TEN, 1000)
    assert len(found) == 1 and sorted(found.texts[0].split()[1::2]) == [str(i) for i in range(10)]


def test_both_sides_of_pairs_are_joined_in_one_order():
    found = joined(PAIRS, 6)
    assert [text.replace("text", "other") for text in found.texts] == found.texts_b


def test_texts_unlike_the_tasks_are_longer_or_never_calibrated_on():
    found = unlike(MR)
    assert tuple(found) == OUTSIDE and all(texts.labels is None for texts in found.values())
    assert len(found[LONGER]) == MOST and all(len(text.split()) >= LONG for text in found[LONGER].texts)
    assert set(found[GENERAL].texts) == set(general_texts(unseen=True))
    assert not set(found[GENERAL].texts) & set(general_texts())
    pairs = unlike(PAIRS)
    assert all(texts.texts_b is not None and len(texts.texts_b) == len(texts.texts) for texts in pairs.values())


def test_drift_is_the_divergence_of_the_predictions_and_how_many_are_the_same():
    dense, logits = np.log([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]), np.log([[0.75, 0.25], [0.9, 0.1], [0.6, 0.4]])
    found = drift(heads.SINGLE_LABEL, dense, logits)
    p, q = np.exp(dense), np.exp(logits)
    assert found["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert found["n"] == 3 and found["agreement"] == pytest.approx(2 / 3)
    assert found["kl_ci"][0] <= found["kl"] <= found["kl_ci"][1]
    same = drift(heads.SINGLE_LABEL, dense, dense)
    assert same | {"agreement_ci": None} == {
        "n": 3, "kl": 0.0, "kl_ci": (0.0, 0.0), "agreement": 1.0, "agreement_ci": None,
    }  # fmt: skip
    assert same["agreement_ci"] == pytest.approx(statistics.wilson(3, 3))


@pytest.mark.parametrize(("name", "same"), [("multi_label", 1 / 3), ("one_logit", 0.5)])
def test_drift_of_other_problems_has_their_agreement(name, same):
    dense = np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    logits = np.array([[2.0, -3.0], [1.0, -1.0], [1.0, 1.0]])
    if name == "one_logit":
        dense, logits = np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [3.0], [2.0]])
    assert drift(heads.PROBLEMS[name], dense, logits)["agreement"] == pytest.approx(same)


def cells(kls: dict[str, list[float]], points: dict[str, list[float]]) -> list[tuple[dict, dict]]:
    """One (inputs, figures) for every mixture and dense model, the same on two sets of reviews."""
    found = []
    for mixture, values in kls.items():
        for model, kl in enumerate(values):
            one = {"n": 400, "kl": kl, "agreement": 0.9, "dense": 0.8, "points": points[mixture][model]}
            figures = {"cpu_seconds": 60.0, "reviews: a": one, "reviews: b": one | {"kl": 4 * kl}}
            found.append(({"task": "mr", "method": "tier 1", "mixture": mixture, "dense": str(model)}, figures))
    return found


def test_the_study_pairs_mixtures_within_a_dense_model():
    kls = {study.OLD: [0.1, 0.2, 0.4], study.NEW: [0.025, 0.05, 0.1]}  # a quarter for every model
    points = {study.OLD: [-0.02, -0.04, -0.06], study.NEW: [-0.01, -0.03, -0.05]}
    rows = {(row["set"], row["calibrated on"]): row for row in study.summary(cells(kls, points))}
    new = rows["reviews: a", study.NEW]
    assert (new["ratio"], new["low"], new["high"]) == pytest.approx((0.25, 0.25, 0.25))
    assert new["gain"] == pytest.approx(1.0) and new["points"] == pytest.approx(-3.0) and new["models"] == 3
    assert rows["reviews: a", study.OLD]["gain"] is None and rows["reviews: a", study.OLD]["ratio"] == 1.0
    together = rows["reviews: all", study.NEW]
    assert (
        together["kl"] == pytest.approx(0.05 * 2) and together["n"] == 800 and together["ratio"] == pytest.approx(0.25)
    )


def test_the_study_has_no_interval_of_one_model():
    rows = study.summary(cells({study.OLD: [0.1], study.NEW: [0.05]}, {study.OLD: [0.0], study.NEW: [0.01]}))
    new = next(row for row in rows if row["calibrated on"] == study.NEW)
    assert new["ratio"] == pytest.approx(0.5) and new["low"] is None and new["gain high"] is None


def test_no_reported_text_is_in_a_mixture(monkeypatch, tmp_path):
    seen = general_texts()[0]
    known = [seen.upper(), LOADED["train"].texts[0]]
    with (tmp_path / "own.csv").open("w", newline="") as file:
        rows = [(f"review number {i}", i % 2) for i in range(50)] + [(text, 1) for text in known]
        csv.writer(file).writerows([("text", "label"), *rows])
    monkeypatch.setattr(study.data, "load", lambda task, split, **_: TEN if task.name != "mr" else LOADED[split])
    found = study.sets_to_report("mr", tmp_path)["reviews: own"]
    assert len(found) == 50 and all(text.startswith("review number") for text in found.texts)
