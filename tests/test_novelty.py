from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medmom.data.casefiles import CaseFiles
from medmom.data.class_images import read_class_case
from medmom.data.class_survey import summarise, survey_classes
from medmom.inference.appearance import appearance
from medmom.inference.novelty import Novelty, _shrunk_covariance, fit_novelty, look
from medmom.models import MomentumResNet, SliceClassifier

SPAN = (0.0, 1.0)
USUAL = np.array([0.0, 2.0, 80.0, 240.0, 255.0, 0.1], np.float32)


def tiny_classifier(
    out_channels: int = 3, kind: type = MomentumResNet, *, in_channels: int = 1, **options: object
) -> MomentumResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plan = {"channels": (4, 6), "blocks": (1, 3), "kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}
        return kind(in_channels, out_channels, **plan, **options).eval()


def fitted(num: int = 400, width: int = 8, *, classes: int = 2, seed: int = 0) -> tuple[Novelty, np.ndarray]:
    """Classes of which the k-th lies 20 along axis k, with deviations 1, 2, ..., width, times k + 1."""
    rng = np.random.default_rng(seed)
    known = np.arange(num) % classes
    looks = rng.normal(size=(num, width)) * np.arange(1, width + 1) * (known[:, None] + 1) + 20 * np.eye(width)[known]
    summaries = USUAL + rng.normal(size=(num, 6)) * [0, 0.5, 5, 3, 0, 0.01]
    half, targets = num // 2, np.eye(classes)[known]
    validation = (looks[half:], targets[half:])
    return fit_novelty(looks[:half], targets[:half], summaries[:half], validation=validation, span=SPAN), looks[half:]


def test_distance_is_that_to_the_closest_class_in_deviations_of_the_class() -> None:
    novelty, _ = fitted(200_000)
    far = np.zeros((2, 8))
    far[0, :2], far[1, :2] = (20 + 5 * 1, 0), (0, 20 + 5 * 2 * 2)
    found = novelty.distance(far) * novelty.thresholds
    np.testing.assert_allclose(found, 5, rtol=0.02)
    # Both classes have one distribution but for its scale.
    np.testing.assert_allclose(*novelty.thresholds, rtol=0.02)


def test_covariance_is_shrunk_as_the_formula_says() -> None:
    rows = np.random.default_rng(0).normal(size=(12, 5)) * [1, 2, 3, 4, 5]
    rows -= rows.mean(axis=0)
    empirical = sum(np.outer(row, row) for row in rows) / 12
    scale = np.trace(empirical) / 5
    spread = np.square(empirical - scale * np.eye(5)).sum()
    noise = sum(np.square(np.outer(row, row) - empirical).sum() for row in rows) / 12**2
    share = min(1, noise / spread)
    assert 0.05 < share < 1
    np.testing.assert_allclose(_shrunk_covariance(rows), (1 - share) * empirical + share * scale * np.eye(5))


@pytest.mark.parametrize("rows", [np.zeros((24, 3)), np.zeros((1, 3))])
def test_looks_that_never_change_have_finite_distances(rows: np.ndarray) -> None:
    targets = np.ones((len(rows), 1))
    novelty = fit_novelty(rows, targets, np.tile(USUAL, (len(rows), 1)), validation=(rows, targets), span=SPAN)
    assert np.isfinite(novelty.distance(rows + 1)).all()
    assert (novelty.distance(rows) <= 1).all()


def test_one_in_a_hundred_validation_images_is_beyond_the_usual() -> None:
    novelty, validation = fitted(8000, classes=1)
    assert np.sum(novelty.distance(validation) > 1) == 40


def test_more_numbers_than_images_still_tell_strangers() -> None:
    novelty, validation = fitted(60, 100)
    assert np.mean(novelty.distance(validation + 150) > 1) > 0.9


def test_class_of_few_images_borrows_from_the_others() -> None:
    rng = np.random.default_rng(0)
    looks, targets = rng.normal(size=(103, 4)), np.eye(2)[[0] * 100 + [1] * 3]
    novelty = fit_novelty(looks, targets, np.tile(USUAL, (103, 1)), validation=(looks, targets), span=SPAN)
    # The three spoil the common covariance little, and have no threshold of their own.
    assert novelty.thresholds[1] == novelty.thresholds[0]
    np.testing.assert_allclose(np.linalg.norm(novelty.whitening[1], axis=1), 1, rtol=0.4)


def picture(seed: int = 0, size: tuple[int, ...] = (1, 24, 20)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, size).astype(np.float32)


def of_pictures(classes: int = 1) -> Novelty:
    looks = np.stack([appearance(picture(seed), SPAN) for seed in range(60)])
    targets = np.eye(classes)[np.arange(60) % classes]
    summaries = np.tile(USUAL, (60, 1))
    return fit_novelty(looks[:40], targets[:40], summaries[:40], validation=(looks[40:], targets[40:]), span=SPAN)


def test_strangers_are_flagged_with_their_distance() -> None:
    novelty = of_pictures()
    assert novelty.flag(picture(80), USUAL) == ""
    assert novelty.flag(picture(80) ** 3, USUAL).startswith("unlike the training images (")
    assert novelty.flag(np.repeat(picture(80)[:, ::2], 2, axis=1), USUAL).endswith(" times as far from them as usual)")


@pytest.mark.parametrize(("place", "value"), [(0, 200), (2, -400), (4, 3000), (5, 0.9)])
def test_other_intensities_are_flagged(place: int, value: float) -> None:
    summary = USUAL.copy()
    summary[place] = value
    found = of_pictures().flag(picture(80), summary)
    assert found.startswith("intensities unlike the training images (")
    assert f"{value:.3g}" in found


def test_blank_image_is_flagged_as_such() -> None:
    assert of_pictures().flag(picture(), np.array([7, 8, 9, 10, 255, 0.1])) == "blank image"


def test_images_of_several_classes_have_one_mean() -> None:
    rng = np.random.default_rng(0)
    looks, summaries = rng.normal(size=(50, 4)), np.tile(USUAL, (50, 1))
    targets = rng.integers(0, 2, size=(50, 3))
    several = fit_novelty(looks, targets, summaries, validation=(looks, targets), span=SPAN)
    assert several.means.shape == (1, 4)
    single = np.eye(3)[[0, 2] * 25]
    assert fit_novelty(looks, single, summaries, validation=(looks, single), span=SPAN).means.shape == (2, 4), (
        "a class without images has no mean"
    )


def test_parts_give_the_same_novelty_again() -> None:
    novelty = of_pictures(2)
    again = Novelty.from_parts(novelty.as_dict(), novelty.tensors())
    assert (again.span, again.ranges, again.contrast) == (novelty.span, novelty.ranges, novelty.contrast)
    assert again.flag(picture(3) ** 2, USUAL) == novelty.flag(picture(3) ** 2, USUAL) != ""
    with pytest.raises(ValueError, match="novelty of"):
        Novelty.from_parts({**novelty.as_dict(), "ranges": []}, novelty.tensors())


def test_logits_are_those_of_the_network() -> None:
    network = tiny_classifier()
    image = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = look(network, image)
    assert found.slices is None
    torch.testing.assert_close(found.logits, network(image).detach())


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_logits_of_a_volume_come_with_those_of_its_slices(pooling: str) -> None:
    network = tiny_classifier(kind=SliceClassifier, pooling=pooling)
    image = torch.rand(2, 1, 16, 16, 5, generator=torch.Generator().manual_seed(0))
    found = look(network, image)
    assert found.slices is not None
    assert found.slices.shape == (2, 5, 3)
    torch.testing.assert_close(found.logits, network(image).detach())
    torch.testing.assert_close(found.slices, network.slice_logits(image).detach())


def test_summary_is_that_of_the_survey(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(3, 250, (20, 31), dtype=np.uint8)).save(path)
    case = CaseFiles("a", (path,), None, "a")
    surveyed = survey_classes([case], tmp_path / "cache", quiet=True)["a"].summary
    np.testing.assert_array_equal(summarise(read_class_case(case).image), surveyed)


@pytest.mark.parametrize("known", [("AbdomenCT", "ChestCT", "HeadCT"), ("ChestCT", "HeadCT", "Hand")])
def test_real_images_of_another_kind_are_flagged(known: tuple[str, ...], shared_data: Path) -> None:
    folder = shared_data / "classify-mednist" / "public"
    looks = {path.name: _looks(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    # Neighbours are slices of one scan: training, thresholds and false alarms come from parts of the numbering.
    parts = {name: np.split(found, [len(found) * 3 // 5, len(found) * 4 // 5]) for name, found in looks.items()}
    training, validation, test = (np.concatenate([parts[name][part] for name in known]) for part in range(3))
    targets, wanted = (np.eye(3)[np.arange(len(part)) * 3 // len(part)] for part in (training, validation))
    summaries = np.tile(USUAL, (len(training), 1))
    novelty = fit_novelty(training, targets, summaries, validation=(validation, wanted), span=SPAN)
    assert np.mean(novelty.distance(test) > 1) < 0.05
    for name in looks.keys() - set(known):
        assert np.mean(novelty.distance(looks[name]) > 1) > 0.8, name


def _looks(folder: Path) -> np.ndarray:
    pictures = [np.asarray(Image.open(path), np.float32).T[None] / 255 for path in sorted(folder.glob("*.jpeg"))]
    return np.stack([appearance(picture, SPAN) for picture in pictures])
