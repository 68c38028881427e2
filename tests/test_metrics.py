from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from medmom.evaluation.metrics import METRICS, definitions, missed_scores, score_classes, score_masks
from medmom.labels import IGNORE

SPACING = (0.7, 1.3, 2.1)
DIAGONAL = 99.0


def random_masks(seed: int, shape: tuple[int, ...] = (7, 6, 5)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.random(shape) < 0.3 + 0.4 * (seed % 2)
    return reference ^ (rng.random(shape) < 0.1), reference


def naive_surface(mask: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    points = []
    for voxel in itertools.product(*map(range, mask.shape)):
        if not mask[voxel]:
            continue
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            other = list(voxel)
            other[axis] += step
            beyond = not 0 <= other[axis] < mask.shape[axis]
            if beyond or not (mask[tuple(other)] or hidden[tuple(other)]):
                points.append(voxel)
                break
    return np.array(points, dtype=float).reshape(-1, mask.ndim)


def naive_scores(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], tolerance: float, hidden: np.ndarray
) -> dict[str, float]:
    """The definitions, spelt out voxel by voxel."""
    found, wanted = prediction & ~hidden, reference & ~hidden
    both, either = (found & wanted).sum(), (found | wanted).sum()
    one, other = (naive_surface(mask, hidden) * spacing for mask in (found, wanted))
    apart = np.sqrt(((one[:, None] - other[None]) ** 2).sum(-1))
    there, back = apart.min(1), apart.min(0)
    return {
        "dice": 2 * both / (found.sum() + wanted.sum()),
        "iou": both / either,
        "recall": both / wanted.sum(),
        "precision": both / found.sum(),
        "hd95_mm": max(np.percentile(there, 95), np.percentile(back, 95)),
        "nsd": ((there <= tolerance).sum() + (back <= tolerance).sum()) / (len(there) + len(back)),
    }


@pytest.mark.parametrize("seed", range(6))
def test_scores_equal_their_definition_voxel_by_voxel(seed: int) -> None:
    prediction, reference = random_masks(seed)
    hidden = np.zeros_like(reference)
    scores = score_masks(prediction, reference, SPACING, DIAGONAL, 1.5)
    assert scores == pytest.approx(naive_scores(prediction, reference, SPACING, 1.5, hidden), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_ignored_voxels_count_in_no_score_and_make_no_surface(seed: int) -> None:
    prediction, reference = random_masks(seed)
    hidden = np.random.default_rng(seed + 100).random(reference.shape) < 0.2
    scores = score_masks(prediction, reference, SPACING, DIAGONAL, 1.5, ignored=hidden)
    assert scores == pytest.approx(naive_scores(prediction, reference, SPACING, 1.5, hidden), rel=1e-12)
    inside_out = score_masks(prediction ^ hidden, reference ^ hidden, SPACING, DIAGONAL, 1.5, ignored=hidden)
    assert inside_out == scores


def test_a_two_dimensional_mask_scores_as_one_slice_of_a_volume() -> None:
    prediction, reference = random_masks(1, (9, 8))
    hidden = np.zeros_like(reference)
    flat = score_masks(prediction, reference, SPACING[:2], DIAGONAL, 1.0)
    slice_of_volume = score_masks(prediction[..., None], reference[..., None], SPACING, DIAGONAL, 1.0)
    assert flat == slice_of_volume
    assert flat == pytest.approx(naive_scores(prediction, reference, SPACING[:2], 1.0, hidden), rel=1e-12)


def test_equal_masks_score_perfectly() -> None:
    _, mask = random_masks(3)
    perfect = dict.fromkeys(METRICS, 1.0) | {"hd95_mm": 0.0}
    assert score_masks(mask, mask, SPACING, DIAGONAL, 0.0) == perfect


def test_one_shared_voxel_scores_perfectly() -> None:
    mask = np.ones((1, 1, 1), bool)
    assert score_masks(mask, mask, SPACING, 0.0, 2.0) == dict.fromkeys(METRICS, 1.0) | {"hd95_mm": 0.0}


def test_both_masks_empty_give_no_score() -> None:
    empty = np.zeros((4, 4, 4), bool)
    assert score_masks(empty, empty, SPACING, DIAGONAL, 2.0) == dict.fromkeys(METRICS)


@pytest.mark.parametrize("missed", [True, False])
def test_one_empty_mask_scores_zero_and_the_diagonal(missed: bool) -> None:
    empty, mask = np.zeros((7, 6, 5), bool), random_masks(0)[1]
    pair = (empty, mask) if missed else (mask, empty)
    assert score_masks(*pair, SPACING, DIAGONAL, 2.0) == missed_scores(DIAGONAL)


@pytest.mark.parametrize("seed", range(5))
def test_missing_a_structure_never_beats_finding_some_of_it(seed: int) -> None:
    prediction, reference = random_masks(seed)
    corner = np.zeros_like(reference)
    corner[0, 0, 0] = True
    diagonal = float(np.linalg.norm((np.array(reference.shape) - 1) * SPACING))
    worst = missed_scores(diagonal)
    for guess in (prediction, corner, ~reference):
        scores = score_masks(guess, reference, SPACING, diagonal, 1.0)
        for name in METRICS:
            sign = -1 if name == "hd95_mm" else 1
            assert sign * scores[name] >= sign * worst[name]  # type: ignore[operator]


def test_distances_follow_the_spacing_of_each_axis() -> None:
    one, other = np.zeros((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
    one[1, 4, 4] = other[6, 4, 4] = True
    assert score_masks(one, other, (0.5, 1.0, 2.0), DIAGONAL, 2.4)["hd95_mm"] == pytest.approx(2.5)
    turned = score_masks(one.transpose(2, 1, 0), other.transpose(2, 1, 0), (0.5, 1.0, 2.0), DIAGONAL, 2.4)
    assert turned["hd95_mm"] == pytest.approx(10.0)


def test_a_distance_is_never_worse_than_a_miss() -> None:
    one, other = np.zeros((9, 3, 3), bool), np.zeros((9, 3, 3), bool)
    one[0, 0, 0] = other[8, 2, 2] = True
    assert score_masks(one, other, (1, 1, 1), 5.0, 2.0)["hd95_mm"] == 5.0


def test_the_tolerance_takes_in_distances_rounded_by_a_float32_affine() -> None:
    one, other = np.zeros((9, 3, 3), bool), np.zeros((9, 3, 3), bool)
    one[1, 1, 1] = other[7, 1, 1] = True
    spacing = float(np.float32(1 / 3))
    assert 6 * spacing > 2.0
    assert score_masks(one, other, (spacing, 1, 1), DIAGONAL, 2.0)["nsd"] == 1.0
    assert score_masks(one, other, (spacing, 1, 1), DIAGONAL, 1.99)["nsd"] == 0.0


def test_scores_do_not_depend_on_where_the_structure_lies() -> None:
    prediction, reference = random_masks(2)
    wide = [np.pad(mask, 6) for mask in (prediction, reference)]
    assert score_masks(*wide, SPACING, DIAGONAL, 1.0) == score_masks(prediction, reference, SPACING, DIAGONAL, 1.0)


def test_a_reference_whose_surface_is_hidden_has_no_surface_scores() -> None:
    reference = np.zeros((7, 7, 7), bool)
    reference[3, 3, 3] = True
    hidden = np.zeros_like(reference)
    hidden[2:5, 2:5, 2:5] = ~reference[2:5, 2:5, 2:5]
    scores = score_masks(reference, reference, SPACING, DIAGONAL, 1.0, ignored=hidden)
    assert (scores["dice"], scores["hd95_mm"], scores["nsd"]) == (1.0, None, None)
    missed = score_masks(np.zeros_like(reference), reference, SPACING, DIAGONAL, 1.0, ignored=hidden)
    assert missed == missed_scores(DIAGONAL)


def test_classes_of_label_maps_score_as_their_masks() -> None:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 4, (8, 7, 6)).astype(np.uint8)
    prediction = np.where(rng.random(reference.shape) < 0.2, 3, reference).astype(np.uint8)
    reference[rng.random(reference.shape) < 0.1] = IGNORE
    scores = score_classes(prediction, reference, (1, 3, 5), SPACING, diagonal=DIAGONAL, tolerance=1.0)
    for channel in (1, 3, 5):
        alone = score_masks(
            prediction == channel, reference == channel, SPACING, DIAGONAL, 1.0, ignored=reference == IGNORE
        )
        assert scores[channel] == alone
    assert scores[5] == dict.fromkeys(METRICS)


def test_overlap_and_distances_equal_monai() -> None:
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    prediction, reference = (np.pad(mask, 1) for mask in random_masks(4, (12, 11, 10)))
    pair = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (prediction, reference)]
    ours = score_masks(prediction, reference, SPACING, DIAGONAL, 1.4)
    kwargs = {"include_background": True, "spacing": SPACING}
    theirs = {
        "dice": compute_dice(*pair).item(),
        "hd95_mm": compute_hausdorff_distance(*pair, percentile=95, **kwargs).item(),
        "nsd": compute_surface_dice(*pair, [1.4], **kwargs).item(),
    }
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5)


def test_unequal_shapes_and_negative_tolerances_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        score_masks(np.ones((3, 3, 3)), np.ones((3, 3, 4)), SPACING, DIAGONAL, 1.0)
    with pytest.raises(ValueError, match="tolerance is -1"):
        score_masks(np.ones((3, 3, 3)), np.ones((3, 3, 3)), SPACING, DIAGONAL, -1.0)


def test_every_score_has_a_definition_that_names_the_tolerance() -> None:
    assert set(METRICS) <= set(definitions(1.0))
    assert "within 1.5 mm" in definitions(1.5)["nsd"]


def test_an_organ_sized_pair_takes_two_seconds_at_most() -> None:
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (160, 140, 90)], indexing="ij"))
    reference, prediction = ((grid**2).sum(0) < radius for radius in (0.8, 0.7))
    start = time.process_time()
    score_masks(prediction, reference, (0.8, 0.8, 1.5), DIAGONAL, 2.0)
    assert time.process_time() - start < 2
