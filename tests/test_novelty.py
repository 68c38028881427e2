from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medmom.data.casefiles import CaseFiles
from medmom.data.class_images import read_class_case
from medmom.data.class_survey import survey_classes
from medmom.errors import MedmomError
from medmom.inference.novelty import Novelty, _shrunk_covariance, fit_novelty, look, pooled_features, summarise
from medmom.models import MomentumResNet, SliceClassifier, cls2d_xs

USUAL = np.array([0.0, 2.0, 80.0, 240.0, 255.0, 0.1], np.float32)


def tiny_classifier(
    out_channels: int = 3, kind: type = MomentumResNet, *, in_channels: int = 1, **options: object
) -> MomentumResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plan = {"channels": (4, 6), "blocks": (1, 3), "kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}
        return kind(in_channels, out_channels, **plan, **options).eval()


def fitted(num: int = 400, width: int = 8, *, classes: int = 2, seed: int = 0) -> tuple[Novelty, np.ndarray]:
    """Classes of which the k-th lies 20 along axis k, with deviations 1, 2, ..., width."""
    rng = np.random.default_rng(seed)
    known = np.arange(num) % classes
    features = rng.normal(size=(num, width)) * np.arange(1, width + 1) + 20 * np.eye(width)[known]
    summaries = USUAL + rng.normal(size=(num, 6)) * [0, 0.5, 5, 3, 0, 0.01]
    half = num // 2
    novelty = fit_novelty(
        features[:half], summaries[:half], np.eye(classes)[known[:half]], validation_features=features[half:]
    )
    return novelty, features[half:]


def test_distance_is_that_to_the_closest_class_in_deviations() -> None:
    novelty, _ = fitted(200_000)
    far = np.zeros((2, 8))
    far[0, :2], far[1, :2] = (20 + 5, 0), (0, 20 + 5 * 2)
    np.testing.assert_allclose(novelty.distance(far), 5, rtol=0.02)


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


@pytest.mark.parametrize("rows", [np.zeros((4, 3)), np.ones((1, 3)) * 0])
def test_features_that_never_change_have_finite_distances(rows: np.ndarray) -> None:
    summaries = np.tile(USUAL, (len(rows), 1))
    novelty = fit_novelty(rows, summaries, np.ones((len(rows), 1)), validation_features=rows)
    assert np.isfinite(novelty.distance(rows + 1)).all()
    assert novelty.flag(rows[0], USUAL) == ""


def test_one_in_a_hundred_validation_images_is_flagged() -> None:
    novelty, validation = fitted(4000)
    flags = [novelty.flag(features, USUAL) for features in validation]
    assert sum(map(bool, flags)) == 20


def test_more_features_than_images_still_tell_strangers() -> None:
    novelty, validation = fitted(60, 100)
    assert np.mean(novelty.distance(validation + 60) > novelty.threshold) > 0.9


def test_strangers_are_flagged_with_distance_and_threshold() -> None:
    novelty, validation = fitted()
    assert novelty.flag(validation[0], USUAL) == ""
    assert novelty.flag(validation[0] + 100, USUAL).startswith("unlike the training images (distance ")
    assert novelty.flag(np.full(8, np.nan), USUAL) != ""


@pytest.mark.parametrize(("place", "value"), [(0, 200), (2, -400), (4, 3000), (5, 0.9)])
def test_other_intensities_are_flagged(place: int, value: float) -> None:
    novelty, validation = fitted()
    summary = USUAL.copy()
    summary[place] = value
    assert novelty.flag(validation[0], summary).startswith("intensities unlike the training images (")
    assert f"{value:.3g}" in novelty.flag(validation[0], summary)


def test_blank_image_is_flagged_as_such() -> None:
    novelty, validation = fitted()
    assert novelty.flag(validation[0], np.array([7, 8, 9, 10, 255, 0.1])) == "blank image"


def test_images_of_several_classes_have_one_mean() -> None:
    rng = np.random.default_rng(0)
    features, summaries = rng.normal(size=(50, 4)), np.tile(USUAL, (50, 1))
    targets = rng.integers(0, 2, size=(50, 3))
    assert fit_novelty(features, summaries, targets, validation_features=features).means.shape == (1, 4)
    single = fit_novelty(features, summaries, np.eye(3)[[0, 2] * 25], validation_features=features)
    assert single.means.shape == (2, 4), "a class without images has no mean"


def test_diverged_network_is_refused() -> None:
    features = np.full((4, 3), np.nan)
    with pytest.raises(MedmomError, match="features are not finite; train again"):
        fit_novelty(features, np.tile(USUAL, (4, 1)), np.ones((4, 1)), validation_features=features)


def test_parts_give_the_same_novelty_again() -> None:
    novelty, validation = fitted()
    again = Novelty.from_parts(novelty.as_dict(), novelty.tensors())
    assert (again.threshold, again.ranges, again.contrast) == (novelty.threshold, novelty.ranges, novelty.contrast)
    np.testing.assert_array_equal(again.distance(validation), novelty.distance(validation))
    with pytest.raises(ValueError, match="novelty of"):
        Novelty.from_parts({**novelty.as_dict(), "ranges": []}, novelty.tensors())


def test_features_are_what_the_linear_layer_reads() -> None:
    network = tiny_classifier()
    image = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = look(network, image)
    assert found.slices is None
    torch.testing.assert_close(network.head.linear(found.features).detach(), found.logits)
    torch.testing.assert_close(found.logits, network(image).detach())
    torch.testing.assert_close(pooled_features(network, image), found.features)
    assert not network.head.linear._forward_pre_hooks


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_features_of_a_volume_are_those_of_all_its_slices(pooling: str) -> None:
    network = tiny_classifier(kind=SliceClassifier, pooling=pooling)
    image = torch.rand(2, 1, 16, 16, 5, generator=torch.Generator().manual_seed(0))
    found = look(network, image)
    assert found.slices is not None
    assert found.features.shape == (2, 6)
    assert found.slices.shape == (2, 5, 3)
    torch.testing.assert_close(network.head.linear(found.features).detach(), found.logits)
    torch.testing.assert_close(found.slices, network.slice_logits(image).detach())


def test_summary_is_that_of_the_survey(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(3, 250, (20, 31), dtype=np.uint8)).save(path)
    case = CaseFiles("a", (path,), None, "a")
    surveyed = survey_classes([case], tmp_path / "cache", quiet=True)["a"].summary
    np.testing.assert_array_equal(summarise(read_class_case(case).image), surveyed)


@pytest.mark.slow
def test_chest_radiographs_are_no_ct(shared_data: Path) -> None:
    folder = shared_data / "classify-mednist" / "public"
    images = {name: _images(folder / name) for name in ("AbdomenCT", "ChestCT", "HeadCT", "CXR")}
    known = [name for name in images if name.endswith("CT")]
    # Neighbours are slices of one scan: the last fifth of the numbering validates.
    parts = {name: (found[: len(found) * 4 // 5], found[len(found) * 4 // 5 :]) for name, found in images.items()}
    training = torch.cat([parts[name][0] for name in known])
    targets = torch.arange(3).repeat_interleave(len(training) // 3)
    torch.manual_seed(0)
    network = cls2d_xs(1, 3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(60):
        chosen = torch.randint(len(training), (32,))
        loss = torch.nn.functional.cross_entropy(network(training[chosen]), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    features = {name: pooled_features(network, torch.cat([parts[name][1]])).numpy() for name in images}
    summaries = np.stack([summarise(255 * image.numpy()) for image in training])
    held_out = {name: (found[::2], found[1::2]) for name, found in features.items()}
    novelty = fit_novelty(
        pooled_features(network, training).numpy(),
        summaries,
        np.eye(3)[targets],
        validation_features=np.concatenate([held_out[name][0] for name in known]),
    )
    false_alarms = np.mean(novelty.distance(np.concatenate([held_out[name][1] for name in known])) > novelty.threshold)
    found = np.mean(novelty.distance(features["CXR"]) > novelty.threshold)
    assert false_alarms < 0.1
    assert found > 0.5


def _images(folder: Path) -> torch.Tensor:
    pictures = [np.asarray(Image.open(path), np.float32).T / 255 for path in sorted(folder.glob("*.jpeg"))[::3]]
    return torch.from_numpy(np.stack(pictures))[:, None]
