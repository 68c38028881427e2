from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_cohen_kappa,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
    multilabel_exact_match,
    multilabel_f1_score,
    multilabel_precision,
    multilabel_recall,
)

from medmom.evaluation.calibration import BINS
from medmom.evaluation.class_bootstrap import DRAWS, SEED, draw_scores, interval
from medmom.evaluation.class_counts import CLASS_SCORES, Answers
from medmom.evaluation.class_metrics import confusion, definitions, measure, roc

HAND = Answers(
    probabilities=np.array(
        [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.2, 0.1, 0.7]]
    ),
    targets=np.eye(3)[[0, 0, 0, 1, 1, 2]],
    is_multilabel=False,
)


def random_answers(seed: int, *, is_multilabel: bool, num: int = 40, num_failed: int = 0) -> Answers:
    rng = np.random.default_rng(seed)
    targets = (rng.random((num, 3)) < 0.4) if is_multilabel else np.eye(3)[rng.integers(3, size=num)]
    logits = rng.normal(0, 1, (num, 3)) + 1.5 * targets
    # Few different values, so that there are ties.
    given = np.round(1 / (1 + np.exp(-logits)), 1)
    if not is_multilabel:
        given = np.round(logits - logits.min() + 0.1, 0) + 0.1
        given /= given.sum(axis=1, keepdims=True)
    given[rng.permutation(num)[:num_failed]] = np.nan
    return Answers(given, targets.astype(float), is_multilabel)


def naive(answers: Answers, picked: np.ndarray) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Scores of cases, listed with repeats, from their definitions, case by case and pair by pair."""
    given, targets, decided = (table[picked] for table in (answers.probabilities, answers.targets, answers.decisions))
    kept = ~np.isnan(given).any(axis=1)
    by_class: dict[str, list[float]] = {name: [] for name in (*CLASS_SCORES, "balanced_accuracy")}
    for k in range(targets.shape[1]):
        hits = sum(1 for d, t in zip(decided[:, k], targets[:, k], strict=True) if d and t)
        claims, references = decided[:, k].sum(), targets[:, k].sum()
        nan = float("nan")
        recall = hits / references if references else nan
        by_class["recall"].append(recall)
        by_class["precision"].append((hits / claims if claims else 0.0) if references else nan)
        by_class["f1"].append(2 * hits / (claims + references) if references else nan)
        rejected = sum(1 for d, t, a in zip(decided[:, k], targets[:, k], kept, strict=True) if a and not d and not t)
        others = len(targets) - references
        specificity = rejected / others if others else nan
        by_class["balanced_accuracy"].append((recall + specificity) / 2 if answers.is_multilabel else recall)
        scores, true = given[kept, k], targets[kept, k] > 0
        pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(scores[true], scores[~true])]
        by_class["auroc"].append(float(np.mean(pairs)) if pairs else nan)
        area, before = 0.0, 0.0
        for threshold in sorted(set(scores), reverse=True):
            above = scores >= threshold
            step = (above & true).sum() / max(true.sum(), 1)
            area, before = area + (step - before) * (above & true).sum() / above.sum(), step
        by_class["auprc"].append(area if pairs else nan)
    right = [a and (d == t).all() for d, t, a in zip(decided, targets, kept, strict=True)]
    overall = {"accuracy": float(np.mean(right))}
    if not answers.is_multilabel:
        chance = sum(decided[:, k].mean() * targets[:, k].mean() for k in range(targets.shape[1]))
        overall["kappa"] = (overall["accuracy"] - chance) / (1 - chance)
    squares = ((given[kept] - targets[kept]) ** 2).sum(axis=1)
    overall["brier"] = float(np.mean(squares)) / (targets.shape[1] if answers.is_multilabel else 1)
    claimed = given[kept].ravel() if answers.is_multilabel else given[kept].max(axis=1)
    came_true = targets[kept].ravel() if answers.is_multilabel else (decided * targets)[kept].sum(axis=1)
    place = np.minimum(np.floor(claimed * BINS + 1e-9), BINS - 1)
    overall["ece"] = sum(abs((claimed - came_true)[place == k].sum()) for k in range(BINS)) / len(claimed)
    return by_class, overall


def test_scores_by_hand() -> None:
    by_class, overall = measure(HAND)
    np.testing.assert_allclose(by_class["recall"], [2 / 3, 1 / 2, 1])
    np.testing.assert_allclose(by_class["precision"], [2 / 3, 1 / 2, 1])
    np.testing.assert_allclose(by_class["f1"], [2 / 3, 1 / 2, 1])
    # Class 0: positives 0.7, 0.5, 0.3 against 0.1, 0.6, 0.2. Class 1: 0.8, 0.2 against 0.2, 0.3, 0.6, 0.1.
    np.testing.assert_allclose(by_class["auroc"], [(3 + 2 + 2) / 9, (4 + 1.5) / 8, 1], atol=1e-6)
    np.testing.assert_allclose(by_class["auprc"], [(1 + 2 / 3 + 3 / 4) / 3, (1 + 2 / 5) / 2, 1], atol=1e-6)
    assert overall["accuracy"] == pytest.approx(4 / 6)
    assert overall["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert overall["kappa"] == pytest.approx((4 / 6 - 14 / 36) / (1 - 14 / 36))
    squares = [0.14, 0.38, 0.86, 0.06, 1.04, 0.14]
    assert overall["brier"] == pytest.approx(sum(squares) / 6)
    assert confusion(HAND).tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("seed", range(3))
def test_counted_scores_are_those_of_torchmetrics(seed: int) -> None:
    answers = random_answers(seed, is_multilabel=False)
    by_class, overall = measure(answers)
    given, true = (torch.from_numpy(table).argmax(1) for table in (answers.decisions, answers.targets))
    for name, score in (
        ("precision", multiclass_precision),
        ("recall", multiclass_recall),
        ("f1", multiclass_f1_score),
    ):
        np.testing.assert_allclose(by_class[name], score(given, true, 3, average=None), atol=1e-6)
        assert overall[name] == pytest.approx(float(score(given, true, 3, average="macro")), abs=1e-6)
    assert overall["accuracy"] == pytest.approx(float(multiclass_accuracy(given, true, 3, average="micro")), abs=1e-6)
    assert overall["balanced_accuracy"] == pytest.approx(float(multiclass_accuracy(given, true, 3)), abs=1e-6)
    assert overall["kappa"] == pytest.approx(float(multiclass_cohen_kappa(given, true, 3)), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_counted_multilabel_scores_are_those_of_torchmetrics(seed: int) -> None:
    answers = random_answers(seed, is_multilabel=True)
    by_class, overall = measure(answers)
    pair = (torch.from_numpy(answers.decisions).long(), torch.from_numpy(answers.targets).long())
    for name, score in (
        ("precision", multilabel_precision),
        ("recall", multilabel_recall),
        ("f1", multilabel_f1_score),
    ):
        np.testing.assert_allclose(by_class[name], score(*pair, 3, average=None), atol=1e-6)
    assert overall["accuracy"] == pytest.approx(float(multilabel_exact_match(*pair, 3)), abs=1e-6)
    assert "kappa" not in overall


@pytest.mark.parametrize("num_failed", [0, 5])
@pytest.mark.parametrize("is_multilabel", [False, True])
def test_scores_are_those_of_a_naive_twin(is_multilabel: bool, num_failed: int) -> None:
    answers = random_answers(5, is_multilabel=is_multilabel, num_failed=num_failed)
    by_class, overall = measure(answers)
    twin, twin_overall = naive(answers, np.arange(40))
    for name, values in twin.items():
        np.testing.assert_allclose(by_class[name], values, atol=1e-6, err_msg=name)
        assert overall[name] == pytest.approx(np.nanmean(values), abs=1e-6)
    for name, value in twin_overall.items():
        assert overall[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("is_multilabel", [False, True])
def test_each_draw_is_scored_as_a_naive_twin_scores_its_cases(is_multilabel: bool) -> None:
    answers = random_answers(7, is_multilabel=is_multilabel, num_failed=4)
    group = np.arange(40) // 3
    points, _ = measure(answers)
    drawn, drawn_overall = draw_scores(answers, [f"{k:02d}" for k in group], points)
    rng = np.random.default_rng(SEED)
    for draw in range(5):
        patients = rng.integers(14, size=14)
        picked = np.concatenate([np.flatnonzero(group == patient) for patient in patients])
        by_class, overall = naive(answers, picked)
        for name, values in by_class.items():
            filled = np.where(np.isnan(values), points[name], values)
            np.testing.assert_allclose(drawn[name][draw], filled, atol=1e-9, err_msg=name)
            assert drawn_overall[name][draw] == pytest.approx(filled.mean(), abs=1e-9)
        for name, value in overall.items():
            assert drawn_overall[name][draw] == pytest.approx(value, abs=1e-9), name
    assert drawn["auroc"].shape == (DRAWS, 3)


def test_a_draw_without_a_class_keeps_that_classs_score_over_all_cases() -> None:
    answers = random_answers(7, is_multilabel=False)
    rare = np.eye(3)[[2, *([0, 1] * 20)][:40]]
    answers = Answers(answers.probabilities, rare, is_multilabel=False)
    points, _ = measure(answers)
    drawn, overall = draw_scores(answers, [f"{k:02d}" for k in range(40)], points)
    rng = np.random.default_rng(SEED)
    is_missed = np.array([0 not in rng.integers(40, size=40) for _ in range(DRAWS)])
    assert 300 < is_missed.sum() < 450
    for name in CLASS_SCORES:
        np.testing.assert_array_equal(drawn[name][is_missed, 2], points[name][2])
        np.testing.assert_allclose(overall[name], drawn[name].mean(axis=1))


def test_draws_do_not_depend_on_how_many_are_scored_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = random_answers(7, is_multilabel=False)
    points, _ = measure(answers)
    whole = draw_scores(answers, [str(k) for k in range(40)], points)
    monkeypatch.setattr("medmom.evaluation.class_bootstrap.CHUNK", 40 * 7)
    parts = draw_scores(answers, [str(k) for k in range(40)], points)
    for one, other in zip(whole, parts, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-12)


@pytest.mark.parametrize("is_multilabel", [False, True])
def test_a_class_without_a_reference_has_no_score_and_no_part_in_means(is_multilabel: bool) -> None:
    answers = random_answers(3, is_multilabel=is_multilabel)
    wider = Answers(
        np.column_stack([answers.probabilities, np.full(40, 0.0)]),
        np.column_stack([answers.targets, np.zeros(40)]),
        is_multilabel,
    )
    (by_class, overall), (narrow, narrow_overall) = measure(wider), measure(answers)
    for name in CLASS_SCORES:
        assert np.isnan(by_class[name][3])
        np.testing.assert_array_equal(by_class[name][:3], narrow[name])
        assert overall[name] == narrow_overall[name]
    assert overall["balanced_accuracy"] == narrow_overall["balanced_accuracy"]
    assert roc(wider)[3] is None
    drawn, drawn_overall = draw_scores(wider, [str(k) for k in range(40)], by_class)
    assert np.isnan(drawn["auroc"][:, 3]).all()
    assert not np.isnan(drawn_overall["auroc"]).any()


def test_a_class_that_is_never_given_has_precision_0() -> None:
    by_class, _ = measure(Answers(np.array([[0.9, 0.1], [0.8, 0.2]]), np.eye(2), is_multilabel=False))
    assert [by_class[name][1] for name in ("precision", "recall", "f1")] == [0, 0, 0]


def test_equal_probabilities_everywhere_are_chance() -> None:
    by_class, overall = measure(Answers(np.full((6, 2), 0.5), np.eye(2)[[0, 1] * 3], is_multilabel=False))
    np.testing.assert_allclose(by_class["auroc"], 0.5)
    assert overall["kappa"] == pytest.approx(0)


def test_one_half_is_a_yes_in_multilabel() -> None:
    answers = Answers(np.array([[0.5], [0.4999]]), np.array([[1.0], [1.0]]), is_multilabel=True)
    assert answers.decisions.tolist() == [[1], [0]]
    assert confusion(answers).tolist() == [[[0, 0], [1, 1]]]


def test_a_failed_case_is_a_miss_and_no_claim() -> None:
    whole, overall = measure(HAND)
    failed = Answers(
        np.vstack([HAND.probabilities, np.full(3, np.nan)]), np.vstack([HAND.targets, np.eye(3)[0]]), False
    )
    by_class, less = measure(failed)
    assert less["accuracy"] == pytest.approx(4 / 7)
    assert by_class["recall"][0] == pytest.approx(2 / 4)
    assert by_class["precision"][0] == whole["precision"][0]
    assert less["kappa"] < overall["kappa"]
    assert [less[name] for name in ("auroc", "auprc", "brier", "ece")] == [
        overall[name] for name in ("auroc", "auprc", "brier", "ece")
    ]


@pytest.mark.parametrize("is_multilabel", [False, True])
def test_where_every_case_failed_accuracy_is_0_and_the_rest_is_nothing(is_multilabel: bool) -> None:
    answers = Answers(np.full((4, 2), np.nan), np.eye(2)[[0, 1, 0, 1]], is_multilabel)
    by_class, overall = measure(answers)
    assert overall["accuracy"] == overall["recall"] == 0
    assert np.isnan([overall[name] for name in ("auroc", "auprc", "brier", "ece")]).all()
    draws = draw_scores(answers, list("abcd"), by_class)[1]
    assert interval(float(overall["brier"]), draws["brier"], num_groups=4)["value"] is None


def test_a_curve_is_thinned_evenly_and_keeps_its_ends() -> None:
    rng = np.random.default_rng(0)
    true = rng.random(5000) < 0.3
    given = 1 / (1 + np.exp(-rng.normal(true, 1)))
    curve = roc(Answers(np.column_stack([1 - given, given]), np.eye(2)[true.astype(int)], is_multilabel=False))[1]
    assert curve is not None
    assert len(curve) <= 200
    assert curve[0] == [0, 0]
    assert curve[-1] == [1, 1]
    points = np.array(curve)
    assert (np.diff(points, axis=0) >= 0).all()
    assert np.diff(points.sum(axis=1)).max() < 0.03
    area = np.trapezoid(points[:, 1], points[:, 0])
    by_class, _ = measure(Answers(np.column_stack([1 - given, given]), np.eye(2)[true.astype(int)], False))
    assert area == pytest.approx(by_class["auroc"][1], abs=2e-3)


def test_intervals_hold_95_percent_and_need_two_patients() -> None:
    draws = np.arange(1001.0)
    assert interval(500.0, draws, num_groups=2) == {"value": 500.0, "low": 25.0, "high": 975.0}
    assert interval(500.0, draws, num_groups=1) == {"value": 500.0, "low": None, "high": None}
    assert interval(float("nan"), draws, num_groups=5) == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("is_multilabel", [False, True])
def test_every_score_is_defined(is_multilabel: bool) -> None:
    _, overall = measure(random_answers(0, is_multilabel=is_multilabel))
    assert set(overall) <= set(definitions(is_multilabel=is_multilabel))


def test_whoever_reports_or_scores_segmentations_does_not_wait_for_torch() -> None:
    code = (
        "import sys; import medmom.evaluation.class_scores, medmom.evaluation.report, medmom.evaluation.scores;"
        "print([name for name in ('torch', 'torchmetrics', 'monai', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
