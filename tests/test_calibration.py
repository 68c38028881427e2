from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from medmom.evaluation.calibration import (
    BINS,
    binned_claims,
    calibration_error,
    cross_fitted_probabilities,
    fit_temperature,
    probabilities,
    reliability,
)


def drawn(num: int, num_classes: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits too sharp (or flat) by a known factor: the references are drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (num, num_classes))
    chances = probabilities(logits, temperature, is_multilabel=False).cumsum(axis=1)
    picked = (rng.random((num, 1)) > chances[:, :-1]).sum(axis=1)
    return logits, np.eye(num_classes)[picked]


def loss(logits: np.ndarray, targets: np.ndarray, temperature: float, *, is_multilabel: bool) -> float:
    """Negative log-likelihood as torch has it."""
    scaled, true = torch.from_numpy(logits / temperature), torch.from_numpy(targets)
    if is_multilabel:
        return float(torch.nn.functional.binary_cross_entropy_with_logits(scaled, true))
    return float(torch.nn.functional.cross_entropy(scaled, true))


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_that_the_references_were_drawn_with_is_found(true: float) -> None:
    logits, targets = drawn(20_000, 5, true)
    assert fit_temperature(logits, targets, is_multilabel=False) == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("is_multilabel", [False, True])
def test_no_other_temperature_has_a_smaller_loss(is_multilabel: bool) -> None:
    logits, targets = drawn(300, 4, 2.0)
    if is_multilabel:
        targets = (np.random.default_rng(1).random(logits.shape) < expit(logits / 2)).astype(float)
    found = fit_temperature(logits, targets, is_multilabel=is_multilabel)
    least = loss(logits, targets, found, is_multilabel=is_multilabel)
    others = np.geomspace(0.05, 20, 400)
    assert least <= min(loss(logits, targets, t, is_multilabel=is_multilabel) for t in others) + 1e-9


def test_a_network_that_is_always_right_keeps_its_probabilities() -> None:
    logits = np.array([[3.0, 0, 0], [0, 1, 0.5]])
    assert fit_temperature(logits, np.eye(3)[[0, 1]], is_multilabel=False) == 1.0
    assert fit_temperature(logits - 0.7, (logits > 0.7).astype(float), is_multilabel=True) == 1.0
    assert fit_temperature(np.zeros((0, 3)), np.zeros((0, 3)), is_multilabel=False) == 1.0


def test_a_network_that_is_always_wrong_gets_the_largest_temperature() -> None:
    assert fit_temperature(np.array([[5.0, 0]] * 4), np.array([[0.0, 1]] * 4), is_multilabel=False) > 19.9


@pytest.mark.parametrize("is_multilabel", [False, True])
def test_huge_logits_do_not_overflow(is_multilabel: bool) -> None:
    found = probabilities(np.array([[1e5, -1e5], [-3e38, 0]]), 0.05, is_multilabel=is_multilabel)
    np.testing.assert_array_equal(found, [[1, 0], [0, 0.5 if is_multilabel else 1]])


def test_cross_fitting_scales_each_half_by_the_other_and_parts_no_patient() -> None:
    logits, targets = drawn(400, 3, 2.5)
    groups = [f"p{k // 4}" for k in range(400)]
    found, (first, second) = cross_fitted_probabilities(logits, targets, groups, is_multilabel=False)
    assert first != second
    by_first = np.isclose(found, probabilities(logits, first, is_multilabel=False)).all(axis=1)
    by_second = np.isclose(found, probabilities(logits, second, is_multilabel=False)).all(axis=1)
    assert (by_first ^ by_second).all()
    assert len({group for group, is_first in zip(groups, by_first, strict=True) if is_first}) == 50
    assert by_first.sum() == 200
    # The first half's temperature comes from the second half alone.
    assert first == fit_temperature(logits[by_second], targets[by_second], is_multilabel=False)
    assert second == fit_temperature(logits[by_first], targets[by_first], is_multilabel=False)


@pytest.mark.parametrize("sizes", [[1, 1], [1, 99], [99, 1], [5, 5, 90]])
def test_both_halves_have_a_patient_however_unequal_they_are(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = drawn(sum(sizes), 3, 2.5)
    groups = np.repeat([f"p{k}" for k in range(len(sizes))], sizes).tolist()
    fitted: list[int] = []
    monkeypatch.setattr(
        "medmom.evaluation.calibration.fit_temperature", lambda half, *_, **__: fitted.append(len(half)) or 1.0
    )
    for seed in range(8):
        cross_fitted_probabilities(logits, targets, groups, is_multilabel=False, seed=seed)
        first, second = fitted[-2:]
        assert first + second == sum(sizes)
        assert min(first, second) > 0


def test_a_single_patient_has_no_halves() -> None:
    logits, targets = drawn(4, 3, 2.5)
    with pytest.raises(ValueError, match="single patient"):
        cross_fitted_probabilities(logits, targets, ["p"] * 4, is_multilabel=False)


def test_reliability_counts_by_hand() -> None:
    given = np.array([[0.9, 0.1], [0.85, 0.15], [0.25, 0.75], [1.0, 0.0]])
    targets = np.array([[1, 0], [0, 1], [0, 1], [1, 0]])
    rows = reliability(given, targets, is_multilabel=False, bins=10)
    found = {round(row["low"], 6): (row["num"], row["confidence"], row["observed"]) for row in rows if row["num"]}
    # A bin holds its lower edge, the last one both.
    assert found == {0.8: (1, 0.85, 0.0), 0.7: (1, 0.75, 1.0), 0.9: (2, pytest.approx(0.95), 1.0)}
    assert all(row["confidence"] is None and row["observed"] is None for row in rows if not row["num"])
    assert calibration_error(rows) == pytest.approx((0.85 + 0.25 + 2 * 0.05) / 4)
    place, claimed, true = binned_claims(given, targets, is_multilabel=True, bins=10)
    assert place.tolist() == [[9, 1], [8, 1], [2, 7], [9, 0]]
    np.testing.assert_array_equal(claimed, given)
    np.testing.assert_array_equal(true, targets)


def test_no_case_has_no_calibration_error() -> None:
    assert np.isnan(calibration_error(reliability(np.zeros((0, 3)), np.zeros((0, 3)), is_multilabel=False)))


@pytest.mark.parametrize("seed", range(3))
def test_calibration_errors_are_those_of_torchmetrics(seed: int) -> None:
    logits, targets = drawn(500, 4, 2.0, seed)
    given = probabilities(logits, 1.0, is_multilabel=False)
    ours = calibration_error(reliability(given, targets, is_multilabel=False))
    theirs = multiclass_calibration_error(torch.from_numpy(given), torch.from_numpy(targets).argmax(1), 4, BINS)
    assert ours == pytest.approx(float(theirs), abs=1e-6)
    given = expit(logits)
    ours = calibration_error(reliability(given, targets, is_multilabel=True))
    theirs = binary_calibration_error(torch.from_numpy(given).ravel(), torch.from_numpy(targets).long().ravel(), BINS)
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_scaling_lowers_the_calibration_error_of_an_overconfident_network() -> None:
    logits, targets = drawn(3000, 5, 3.0)
    groups = [str(k) for k in range(len(logits))]
    before = probabilities(logits, 1.0, is_multilabel=False)
    after, _ = cross_fitted_probabilities(logits, targets, groups, is_multilabel=False)
    errors = [calibration_error(reliability(p, targets, is_multilabel=False)) for p in (before, after)]
    assert errors[0] > 0.2
    assert errors[1] < 0.05
