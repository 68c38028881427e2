from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest

from medmom.data.case import Case
from medmom.data.preparation import (
    Preparation,
    fit_preparation,
    prepare,
    resample_label,
    restore,
    working_geometry,
)
from medmom.errors import MedmomError
from medmom.geometry import Geometry, resample

ZSCORE = Preparation((1.0, 1.0, 1.0), "zscore")


def oblique_grid(seed: int, shape: tuple[int, ...] = (11, 9, 12)) -> Geometry:
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * rng.uniform(0.6, 3, size=3)
    affine[:3, 3] = rng.normal(scale=50, size=3)
    return Geometry(shape, affine)


def case_of(image: np.ndarray, geometry: Geometry, label: np.ndarray | None = None) -> Case:
    return Case("case", image.astype(np.float32), label, geometry, (True,))


def blobs(shape: tuple[int, ...], num_classes: int, seed: int) -> np.ndarray:
    """A label map in which every class has a compact region and meets several others."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, shape, size=(2 * num_classes, 3))
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    nearest = np.linalg.norm(index[..., None, :] - seeds, axis=-1).argmin(axis=-1)
    return (nearest % num_classes).astype(np.uint8)


# Intensities


def test_ct_is_clipped_and_standardised_by_the_numbers_of_the_foreground() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(60, 40, size=5000), rng.normal(120, 30, size=7000)]
    fitted = fit_preparation(Preparation(None, "ct"), parts)
    together = np.concatenate(parts)
    low, high = np.percentile(together, [0.5, 99.5])
    clipped = np.clip(together, low, high)
    assert fitted.clip == pytest.approx((low, high))
    assert fitted.mean == pytest.approx(clipped.mean())
    assert fitted.std == pytest.approx(clipped.std())
    geometry = Geometry((4, 3, 2), np.eye(4))
    image = rng.uniform(-1000, 2000, size=(1, 4, 3, 2)).astype(np.float32)
    expected = (np.clip(image, low, high) - clipped.mean()) / clipped.std()
    np.testing.assert_allclose(prepare(case_of(image, geometry), fitted).image, expected, rtol=1e-5, atol=1e-5)


def test_numbers_of_the_recipe_are_kept() -> None:
    given = Preparation((1, 1, 3), "ct", clip=(-160, 240), std=50.0)
    fitted = fit_preparation(given, [np.array([0.0, 100.0, 900.0])])
    assert fitted == dataclasses.replace(given, mean=pytest.approx((0 + 100 + 240) / 3))

    def unread() -> None:
        raise AssertionError("a fitted preparation reads no image")

    full = dataclasses.replace(given, mean=0.0)
    assert fit_preparation(full, (unread() for _ in range(1))) is full  # type: ignore[misc]
    assert fit_preparation(ZSCORE, (unread() for _ in range(1))) is ZSCORE  # type: ignore[misc]


@pytest.mark.parametrize(
    ("foreground", "message"), [([], "no labelled foreground"), ([np.full(9, 7.0)], "one intensity only .7.")]
)
def test_foreground_that_cannot_be_fitted_is_named(foreground: list[np.ndarray], message: str) -> None:
    with pytest.raises(MedmomError, match=message):
        fit_preparation(Preparation(None, "ct"), foreground)


def test_ct_that_is_not_fitted_is_a_mistake_of_the_program() -> None:
    with pytest.raises(ValueError, match="not fitted"):
        prepare(case_of(np.zeros((1, 2, 2, 2)), Geometry((2, 2, 2), np.eye(4))), Preparation(None, "ct"))


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-7, -1.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_mri_is_standardised_at_any_scale(scale: float, offset: float) -> None:
    rng = np.random.default_rng(1)
    geometry = oblique_grid(1)
    image = rng.gamma(2.0, 100.0, size=(2, *geometry.shape))
    plain = prepare(case_of(image, geometry), ZSCORE).image
    scaled = prepare(case_of((image + offset) * scale, geometry), ZSCORE).image
    np.testing.assert_allclose(scaled, plain * np.sign(scale), atol=2e-3 if offset else 1e-4)


def test_every_mri_channel_is_standardised_by_itself() -> None:
    rng = np.random.default_rng(2)
    geometry = Geometry((20, 18, 16), np.eye(4))
    image = rng.normal([[[[5.0]]], [[[3e7]]]], [[[[2.0]]], [[[1e6]]]], size=(2, *geometry.shape))
    result = prepare(case_of(image, geometry), ZSCORE).image
    np.testing.assert_allclose(result.mean(axis=(1, 2, 3), dtype=np.float64), 0, atol=1e-4)
    np.testing.assert_allclose(result.std(axis=(1, 2, 3), dtype=np.float64), 1, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, -1e30, 3e-38])
def test_constant_mri_becomes_zero(value: float) -> None:
    geometry = oblique_grid(3)
    result = prepare(case_of(np.full((1, *geometry.shape), value), geometry), ZSCORE).image
    np.testing.assert_array_equal(result, 0)


CLIPPED = Preparation((1.0, 1.3, 2.0), "ct", (-100, 900), 50.0, 330.0)


@pytest.mark.parametrize(
    "preparation",
    [
        CLIPPED,
        ZSCORE,
        Preparation(None, "zscore", plane="sagittal"),
        Preparation(None, "unit", size=(20, 17)),
        Preparation(None, "zscore", colour="grey", size=(30, 31)),
        Preparation((2, 2, 1), "unit", colour="grey"),
        dataclasses.replace(CLIPPED, plane="coronal"),
    ],
    ids=str,
)
@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SAR"])
def test_preparing_stored_integers_gives_the_bits_of_float32(preparation: Preparation, orientation: str) -> None:
    affine = np.diag([1.0, 0.8, 1.2, 1])
    geometry = Geometry((33, 20, 35), affine).reoriented(orientation)
    image = np.random.default_rng(5).integers(-1024, 3000, size=(3, *geometry.shape)).astype(np.int16)
    stored = np.asfortranarray(image.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)
    expected = prepare(case_of(image, geometry), preparation).image
    for twin in (image, stored, stored.astype(np.float32), image.astype(np.int32)):
        prepared = prepare(Case("case", twin, None, geometry, ()), preparation).image
        np.testing.assert_array_equal(prepared, expected, strict=True)
        assert prepared.flags.c_contiguous


@pytest.mark.parametrize("colour", ["own", "grey"])
def test_mri_has_the_mean_and_deviation_of_double_precision(colour: Any) -> None:
    geometry = Geometry((21, 18, 50), np.eye(4))
    image = np.random.default_rng(2).normal(4e4, 3, size=(3, *geometry.shape)).astype(np.float32)
    result = prepare(case_of(image, geometry), Preparation(None, "zscore", colour=colour)).image
    if colour == "grey":
        shares = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None, None]
        image = np.sum(shares * image, axis=0, keepdims=True, dtype=np.float32)
    double = image.astype(np.float64)
    axes = (1, 2, 3)
    expected = (double - double.mean(axis=axes, keepdims=True)) / double.std(axis=axes, keepdims=True)
    # Grey is rounded to float32, 0.004 here, in whatever order the colours are added.
    np.testing.assert_allclose(result, expected, atol=5e-3 if colour == "grey" else 1e-6)


@pytest.mark.parametrize("intensity", ["ct", "zscore", "unit"])
def test_whole_scan_never_exists_as_float(intensity: Any) -> None:
    own = Geometry((128, 128, 256), np.diag([-1.0, -1, 1, 1]))
    stored = np.random.default_rng(0).integers(-1000, 1000, size=(256, 128, 128), dtype=np.int16).T[None]
    preparation = Preparation((2, 2, 2), intensity, (-900, 900), 0.0, 300.0)
    working = working_geometry(preparation, own)
    prepare(Case("", stored[..., :8], None, Geometry((128, 128, 8), own.affine), ()), preparation)
    tracemalloc.start()
    try:
        prepare(Case("", stored, None, own, ()), preparation)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    result = 4 * np.prod(working.shape)
    half_way = 4 * np.prod((*working.shape[:2], 256))
    slab = 4 * np.prod((128, 128, 16))
    assert peak < 1.2 * (result + half_way) + 2 * slab < 2 * stored.nbytes


@pytest.mark.parametrize("preparation", [ZSCORE, Preparation((1, 1, 1), "ct", (-100, 200), 50.0, 30.0)])
def test_preparing_leaves_the_case_as_it_was(preparation: Preparation) -> None:
    rng = np.random.default_rng(4)
    for geometry in (oblique_grid(4), Geometry((5, 5, 5), np.eye(4))):
        image = rng.normal(50, 100, size=(1, *geometry.shape)).astype(np.float32)
        label = rng.integers(0, 3, size=geometry.shape).astype(np.uint8)
        before = image.copy(), label.copy()
        case = case_of(image, geometry, label)
        prepared = prepare(case, preparation)
        np.testing.assert_array_equal(image, before[0])
        np.testing.assert_array_equal(label, before[1])
        assert prepared.image.dtype == np.float32
        assert prepared.label is not None
        assert prepared.label.dtype == np.uint8
        assert prepared.geometry.shape == prepared.image.shape[1:] == prepared.label.shape
        assert (prepared.name, prepared.annotated) == (case.name, case.annotated)


# Grids


def test_working_grid_has_the_spacing_of_the_recipe_in_ras_order() -> None:
    grid = Geometry((40, 30, 20), np.diag([1.0, 2.0, 3.0, 1.0])).reoriented("SPL")
    working = working_geometry(Preparation((1.5, 1.0, 4.0), "zscore"), grid)
    assert working.orientation == "RAS"
    np.testing.assert_allclose(working.spacing, (1.5, 1.0, 4.0))
    assert working.shape == (27, 60, 15)
    own = working_geometry(Preparation(None, "zscore"), grid)
    assert (own.orientation, own.shape) == ("RAS", (40, 30, 20))
    np.testing.assert_allclose(own.spacing, (1, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing": (1,)}, "give two or three voxel edges"),
        ({"spacing": (1, 0, 1)}, "each above 0"),
        ({"clip": (5, 5)}, "lower bound first"),
        ({"std": 0.0}, "above 0"),
    ],
)
def test_impossible_numbers_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(MedmomError, match=message):
        Preparation(**{"spacing": None, "intensity": "ct", **arguments})  # type: ignore[arg-type]


# Label maps


def naive_largest(scores: np.ndarray, source: Geometry, target: Geometry, indices: np.ndarray) -> np.ndarray:
    """Every score interpolated to the whole target, voxel by voxel, in double precision, then the argmax."""
    matrix = np.linalg.inv(source.affine) @ target.affine
    index = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), axis=-1)
    position = np.clip(index @ matrix[:3, :3].T + matrix[:3, 3], 0, np.array(source.shape) - 1)
    low = np.minimum(np.floor(position).astype(int), np.maximum(np.array(source.shape) - 2, 0))
    share = position - low
    result = np.zeros((len(scores), *target.shape))
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(np.array(corner) == 1, share, 1 - share).prod(axis=-1)
        place = np.minimum(low + corner, np.array(source.shape) - 1)
        result += weight * scores[:, place[..., 0], place[..., 1], place[..., 2]]
    # Sums of the same numbers in another order differ in the last bits; what is a tie must stay one.
    return indices[result.round(5).argmax(axis=0)]


@pytest.mark.parametrize("num_classes", range(2, 14))
def test_resampled_label_equals_the_naive_twin(num_classes: int) -> None:
    source = oblique_grid(num_classes)
    label = blobs(source.shape, num_classes, seed=num_classes)
    if num_classes % 2:
        label[:2] = 255
    target = working_geometry(Preparation((1.3, 0.8, 1.9), "zscore"), source)
    present = np.unique(label)
    one_hot = np.stack([label == k for k in present]).astype(np.float64)
    expected = naive_largest(one_hot, source, target, present)
    result = resample_label(label, source, target)
    assert (result == expected).mean() > 0.999
    assert set(np.unique(result)) <= set(present)
    assert result.dtype == np.uint8


def test_label_on_its_own_grid_is_copied() -> None:
    source = oblique_grid(1)
    label = blobs(source.shape, 5, seed=1)
    turned = source.reoriented("PIL")
    np.testing.assert_array_equal(resample_label(resample_label(label, source, turned), turned, source), label)
    copied = resample_label(label, source, source)
    np.testing.assert_array_equal(copied, label)
    assert not np.shares_memory(copied, label)


@pytest.mark.parametrize("only", [0, 3, 255])
def test_label_of_one_class_stays_so(only: int) -> None:
    source = oblique_grid(2)
    label = np.full(source.shape, only, dtype=np.uint8)
    assert np.unique(resample_label(label, source, source.with_spacing((0.7, 0.9, 1.1)))) == [only]


# The way back


@pytest.mark.parametrize("num_classes", range(2, 14))
def test_restore_equals_resampling_all_logits_then_argmax(num_classes: int) -> None:
    own = oblique_grid(20 + num_classes, (19, 8, 21))
    working = working_geometry(Preparation((1.1, 1.4, 0.9), "zscore"), own)
    logits = np.random.default_rng(num_classes).normal(size=(num_classes, *working.shape)).astype(np.float32)
    whole = resample(logits, working, own, order=1).argmax(axis=0)
    result = restore(logits, working, own)
    assert result.shape == own.shape
    assert result.dtype == np.uint8
    assert (result == whole).mean() > 0.9999
    naive = naive_largest(logits.astype(np.float64), working, own, np.arange(num_classes))
    assert (result == naive).mean() > 0.999


def test_restore_on_the_working_grid_is_the_argmax() -> None:
    grid = oblique_grid(7).reoriented("RAS")
    logits = np.random.default_rng(7).normal(size=(5, *grid.shape)).astype(np.float32)
    np.testing.assert_array_equal(restore(logits, grid, grid), logits.argmax(axis=0))


def test_tie_goes_to_the_smaller_index() -> None:
    grid = Geometry((3, 4, 5), np.eye(4))
    logits = np.zeros((4, *grid.shape), dtype=np.float32)
    logits[2:] = 1
    np.testing.assert_array_equal(restore(logits, grid, grid), 2)


def test_logits_of_all_classes_never_exist_on_the_own_grid() -> None:
    own = Geometry((64, 64, 96), np.eye(4))
    working = own.with_spacing((3, 3, 3))
    logits = np.random.default_rng(0).normal(size=(13, *working.shape)).astype(np.float32)
    restore(logits, working, own)
    tracemalloc.start()
    try:
        restore(logits, working, own)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 4 * np.prod(own.shape)


# A size instead of a spacing, other planes, pictures


@pytest.mark.parametrize("size, shape", [((5, 7), (5, 7, 12)), ((5, 7, 3), (5, 7, 3)), ((11, 9), (11, 9, 12))])
def test_working_grid_of_a_size_keeps_centre_and_extent(size: tuple[int, ...], shape: tuple[int, ...]) -> None:
    own = Geometry((11, 9, 12), np.diag([1.0, 2.0, 3.0, 1.0]))
    grid = working_geometry(Preparation(None, "zscore", size=size), own)
    assert grid.shape == shape
    np.testing.assert_allclose(np.multiply(grid.spacing, grid.shape), np.multiply(own.spacing, own.shape))
    np.testing.assert_allclose(grid.corners().mean(axis=0), own.corners().mean(axis=0))


def test_volume_of_a_size_is_put_together_again_on_its_own_grid() -> None:
    own = oblique_grid(3)
    grid = working_geometry(Preparation(None, "zscore", size=(20, 16)), own)
    label = blobs(own.shape, 3, seed=1)
    scores = np.stack([label == k for k in range(3)]).astype(np.float32)
    back = restore(resample(scores, own, grid, order=1), grid, own)
    assert back.shape == own.shape
    assert (back == label).mean() > 0.9


@pytest.mark.parametrize("plane, axis", [("axial", 2), ("coronal", 1), ("sagittal", 0)])
def test_third_axis_counts_the_slices_of_the_plane(plane: Any, axis: int) -> None:
    own = Geometry((11, 9, 12), np.diag([-1.0, 2.0, -3.0, 1.0]))
    grid = working_geometry(Preparation(None, "zscore", plane=plane), own)
    direction = grid.affine[:3, 2]
    assert np.flatnonzero(direction).tolist() == [axis]
    assert direction[axis] > 0
    image = np.random.default_rng(0).normal(size=(1, *own.shape))
    prepared = prepare(case_of(image, own), Preparation(None, "unit", plane=plane))
    # The same voxel, found by where it lies.
    index = np.rint(np.linalg.solve(grid.affine, own.affine @ [3, 4, 5, 1])[:3]).astype(int)
    np.testing.assert_allclose(prepared.image[0][tuple(index)] * 255, image[0, 3, 4, 5], rtol=1e-6)


@pytest.mark.parametrize("colour, found, expected", [("grey", 3, 1), ("rgb", 1, 3), ("own", 3, 3), ("rgb", 4, 4)])
def test_pictures_get_the_channels_of_the_recipe(colour: Any, found: int, expected: int) -> None:
    geometry = Geometry((4, 3, 1), np.eye(4))
    image = np.random.default_rng(0).uniform(0, 255, size=(found, 4, 3, 1))
    prepared = prepare(case_of(image, geometry), Preparation(None, "unit", colour=colour)).image
    assert prepared.shape == (expected, 4, 3, 1)
    assert 0 <= prepared.min() <= prepared.max() <= 1
    if (colour, found) == ("grey", 3):
        np.testing.assert_allclose(prepared[0] * 255, 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2], rtol=1e-5)
    if (colour, found) == ("rgb", 1):
        assert all(np.array_equal(channel, prepared[0]) for channel in prepared)


def test_size_and_spacing_exclude_each_other() -> None:
    with pytest.raises(MedmomError, match="one follows from the other"):
        Preparation((1.0, 1.0, 1.0), "zscore", size=(32, 32))
