"""Working grids and intensities as nnU-Net has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from medmom.data.case import Case
from medmom.data.intensities import nonzero_box, nonzero_mask
from medmom.data.preparation import Preparation, prepare, working_geometry
from medmom.errors import MedmomError
from medmom.geometry import Geometry

# Stored axes point to the patient's front, right and feet.
TURNED = Geometry((5, 7, 9), np.array([[0, -1.0, 0, 3], [2.0, 0, 0, -7], [0, 0, -3.0, 5], [0, 0, 0, 1]]))
ORDERS = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}


def case_of(image: np.ndarray, geometry: Geometry | None = None) -> Case:
    return Case("case", image, None, geometry or Geometry(image.shape[1:], np.eye(4)), (True,))


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(50, 20, size=shape).astype(np.float32)


@pytest.mark.parametrize("plane", list(ORDERS))
def test_stored_axes_are_neither_turned_nor_flipped(plane: Any) -> None:
    preparation = Preparation(None, "unit", plane=plane, axes="stored")
    image = noise((1, *TURNED.shape))
    working = prepare(case_of(image, TURNED), preparation)
    np.testing.assert_array_equal(working.image[0], (image[0] / np.float32(255)).transpose(ORDERS[plane]))
    assert working.geometry.spacing == tuple(TURNED.spacing[axis] for axis in ORDERS[plane])
    # Each voxel stays where it was in the patient.
    index = np.array([2, 3, 4])
    own = TURNED.affine[:3, :3] @ index + TURNED.affine[:3, 3]
    found = working.geometry.affine[:3, :3] @ index[list(ORDERS[plane])] + working.geometry.affine[:3, 3]
    np.testing.assert_allclose(found, own)


def test_two_numbers_of_spacing_leave_the_slices_alone() -> None:
    geometry = working_geometry(Preparation((1.0, 0.5), "unit", axes="stored"), TURNED)
    assert geometry.spacing == pytest.approx((1.0, 0.5, 3.0))
    assert geometry.shape == (10, 14, 9)


def test_extent_keeps_the_outer_edges_and_spacing_the_spacing() -> None:
    geometry = Geometry((10, 10, 10), np.eye(4))
    exact = working_geometry(Preparation((0.6, 1.0, 3.0), "unit"), geometry)
    kept = working_geometry(Preparation((0.6, 1.0, 3.0), "unit", exact="extent"), geometry)
    assert exact.shape == kept.shape == (17, 10, 3)
    assert exact.spacing == pytest.approx((0.6, 1.0, 3.0))
    assert [n * edge for n, edge in zip(kept.shape, kept.spacing, strict=True)] == pytest.approx([10, 10, 10])
    far = working_geometry(Preparation((100.0, 1.0, 1.0), "unit", exact="extent"), geometry)
    assert far.shape == (1, 10, 10)


def bordered(shape: tuple[int, ...] = (2, 12, 11, 10)) -> np.ndarray:
    """Noise in a box with a hole, zeros around and in it."""
    image = np.zeros(shape, dtype=np.float32)
    image[:, 2:9, 1:8, 3:7] = noise((shape[0], 7, 7, 4))
    image[:, 5, 4, 5] = 0
    # A corner of the box that is outside.
    image[:, 2:4, 1:3, 3:5] = 0
    return image


def test_box_and_mask_are_those_of_all_channels_together() -> None:
    image = bordered()
    image[1, 10, 3, 3] = 7
    assert nonzero_box(image) == (slice(2, 11), slice(1, 8), slice(3, 7))
    mask = nonzero_mask(image)
    assert mask[5, 4, 5]
    assert mask[10, 3, 3]
    assert not mask[2, 1, 3]
    np.testing.assert_array_equal(mask, ndimage.binary_fill_holes((image != 0).any(axis=0)))


@pytest.mark.parametrize("kind", ["f4", "i2"])
def test_zscore_within_a_box_takes_its_numbers_and_scales_everything(kind: str) -> None:
    image = bordered().astype(kind)
    box = image[:, 2:9, 1:8, 3:7].astype(np.float64)
    mean, std = box.mean(axis=(1, 2, 3), keepdims=True), box.std(axis=(1, 2, 3), keepdims=True)
    found = prepare(case_of(image), Preparation(None, "zscore", within="box")).image
    np.testing.assert_allclose(found, (image - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["f4", "i2"])
def test_zscore_within_a_mask_leaves_all_else_at_zero(kind: str) -> None:
    image = bordered((2, 12, 11, 40)).astype(kind)
    mask = ndimage.binary_fill_holes((image != 0).any(axis=0))
    expected = np.zeros(image.shape)
    for channel, values in enumerate(image.astype(np.float64)):
        expected[channel][mask] = (values[mask] - values[mask].mean()) / values[mask].std()
    found = prepare(case_of(image), Preparation(None, "zscore", within="mask")).image
    assert found.shape == image.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert expected[0, 5, 4, 5] != 0


def test_mask_leaves_the_case_and_its_number_of_channels_alone_on_another_grid() -> None:
    image = bordered()
    before = image.copy()
    working = prepare(case_of(image), Preparation((0.5, 1.0, 2.0), "zscore", within="mask"))
    assert working.image.shape == (2, 24, 11, 5)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("within", ["box", "mask"])
@pytest.mark.parametrize("value", [0, 7])
def test_constant_image_becomes_zero(within: Any, value: int) -> None:
    image = np.full((1, 4, 5, 6), value, dtype=np.int16)
    assert not prepare(case_of(image), Preparation(None, "zscore", within=within)).image.any()


@pytest.mark.parametrize("changes", [{"intensity": "unit"}, {"intensity": "zscore", "colour": "grey"}])
def test_a_region_without_zscore_is_refused(changes: Any) -> None:
    with pytest.raises(MedmomError, match=r"preparation\.within mask"):
        Preparation(None, within="mask", **changes)
