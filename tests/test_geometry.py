from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage

from medmom.errors import MedmomError
from medmom.geometry import Geometry, resample, resample_slabs
from medmom.interpolation import BLOCK, THICKNESS

ORIENTATIONS = [
    "".join(code) for order in itertools.permutations(["RL", "AP", "SI"]) for code in itertools.product(*order)
]


def oblique(seed: int, shape: tuple[int, ...] | None = None, finest: float = 0.6, coarsest: float = 4.0) -> Geometry:
    """A random rotated, anisotropic grid."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * rng.uniform(finest, coarsest, size=3)
    affine[:3, 3] = rng.normal(scale=100, size=3)
    return Geometry(shape or tuple(rng.integers(4, 12, size=3)), affine)


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_reorientation_equals_nibabel_voxel_for_voxel(orientation: str) -> None:
    rng = np.random.default_rng(0)
    source = oblique(1, (4, 5, 6))
    image = rng.normal(size=(2, *source.shape)).astype(np.float32)
    target = source.reoriented(orientation)
    start = nib.orientations.io_orientation(source.affine)
    transform = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(orientation))
    expected = np.stack([nib.orientations.apply_orientation(channel, transform) for channel in image])
    turned = resample(image, source, target, order=3)
    np.testing.assert_array_equal(turned, expected)
    assert target.orientation == orientation
    np.testing.assert_array_equal(resample(turned, target, source, order=3), image)


@pytest.mark.parametrize("seed", range(5))
def test_reorientation_keeps_every_voxel_in_its_place(seed: int) -> None:
    source = oblique(seed)
    target = source.reoriented("PIL")
    assert sorted(map(tuple, source.corners().round(6))) == sorted(map(tuple, target.corners().round(6)))


def test_new_spacing_is_exact_and_keeps_the_centre() -> None:
    source = oblique(3, (20, 31, 12))
    target = source.with_spacing((1.5, 2.0, 2.5))
    np.testing.assert_allclose(target.spacing, (1.5, 2.0, 2.5), rtol=1e-12)
    np.testing.assert_allclose(target.corners().mean(axis=0), source.corners().mean(axis=0), atol=1e-9)
    extent = np.array(source.shape) * source.spacing
    assert (np.abs(np.array(target.shape) * target.spacing - extent) <= np.array([1.5, 2.0, 2.5]) / 2 + 1e-9).all()


def test_linear_and_cubic_equal_scipy() -> None:
    rng = np.random.default_rng(2)
    source = oblique(4, (12, 9, 14))
    target = source.reoriented("SAR").with_spacing((0.9, 1.7, 2.3))
    image = rng.normal(size=(1, *source.shape)).astype(np.float32)
    matrix = np.linalg.inv(source.affine) @ target.affine
    index = np.array(np.meshgrid(*map(np.arange, target.shape), indexing="ij")).reshape(3, -1)
    position = matrix[:3, :3] @ index + matrix[:3, 3:]
    for order in (1, 3):
        expected = scipy.ndimage.map_coordinates(image[0].astype(np.float64), position, order=order, mode="nearest")
        expected = np.clip(expected, image.min(), image.max()).reshape(target.shape)
        np.testing.assert_allclose(resample(image, source, target, order=order)[0], expected, atol=5e-6)


def test_slabs_equal_the_whole() -> None:
    rng = np.random.default_rng(5)
    source = oblique(6, (10, 8, 9))
    target = source.reoriented("IPR").with_spacing((1.1, 0.7, 1.9))
    image = rng.normal(size=(3, *source.shape)).astype(np.float32)
    whole = resample(image, source, target, order=1)
    slabs = list(resample_slabs(image, source, target, thickness=4))
    assert len(slabs) > 1
    np.testing.assert_allclose(np.concatenate([slab for _, slab in slabs], axis=-1), whole, atol=1e-5)
    assert [place.start for place, _ in slabs][1] == 4


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SRA", "PIL"])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_bits_depend_neither_on_type_nor_on_memory_order(order: int, orientation: str) -> None:
    source = oblique(7, (37, 41, 35))
    target = source.reoriented(orientation)
    target = target.with_spacing(np.array(target.spacing) * (1.3, 0.45, 0.9))
    assert max(target.shape) > BLOCK > THICKNESS
    image = np.random.default_rng(8).integers(-1024, 3000, size=(2, *source.shape)).astype(np.int16)
    expected = resample(image.astype(np.float32), source, target, order=order)
    twice = np.repeat(image, 2, axis=3)[..., ::2]
    stored = np.asfortranarray(image.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)
    for twin in (image, stored, twice, stored.astype(np.int32), image.astype(">i2"), np.asfortranarray(image, "f4")):
        np.testing.assert_array_equal(resample(twin, source, target, order=order), expected, strict=True)


def test_change_comes_before_the_interpolation() -> None:
    source = oblique(9, (20, 18, 40))
    target = source.reoriented("RAS").with_spacing((0.9, 2.1, 1.4))
    image = np.random.default_rng(0).normal(size=(3, *source.shape)).astype(np.float32)
    before = image.copy()

    def change(slab: np.ndarray) -> np.ndarray:
        assert slab.dtype == np.float32
        assert slab.shape[1] <= THICKNESS
        slab *= slab
        return slab[:2]

    changed = resample(image, source, target, order=3, change=change)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(changed, resample(np.square(image[:2]), source, target, order=3), strict=True)
    assert changed.flags.c_contiguous
    low, high = np.square(image[:2]).min(axis=(1, 2, 3)), np.square(image[:2]).max(axis=(1, 2, 3))
    assert (changed.min(axis=(1, 2, 3)) >= low).all()
    assert (changed.max(axis=(1, 2, 3)) <= high).all()
    assert (changed.min(axis=(1, 2, 3)) == low).any(), "the cubic spline of this noise leaves its range"


def test_change_without_interpolation_gives_float32() -> None:
    source = oblique(10, (5, 4, 33))
    image = np.random.default_rng(0).integers(0, 99, size=(1, *source.shape)).astype(np.int16)
    half = resample(image, source, source.reoriented("SPL"), order=3, change=lambda slab: slab / np.float32(2))
    np.testing.assert_array_equal(half, resample(image, source, source.reoriented("SPL"), order=3) / np.float32(2))
    assert half.dtype == np.float32


def test_long_axes_equal_scipy() -> None:
    source = Geometry((150, 7, 90), np.diag([1.0, 1.0, 1.0, 1.0]))
    target = source.with_spacing((0.6, 1.0, 1.7))
    image = np.random.default_rng(3).normal(size=(1, *source.shape)).astype(np.float32)
    matrix = np.linalg.inv(source.affine) @ target.affine
    lines = [matrix[k, k] * np.arange(n) + matrix[k, 3] for k, n in enumerate(target.shape)]
    position = np.meshgrid(*lines, indexing="ij")
    expected = scipy.ndimage.map_coordinates(image[0].astype(np.float64), position, order=3, mode="nearest")
    expected = np.clip(expected, image.min(), image.max())
    np.testing.assert_allclose(resample(image, source, target, order=3)[0], expected, atol=5e-6)


def test_one_voxel_thick_axes_are_resampled() -> None:
    source = Geometry((1, 5, 2), np.diag([3.0, 1.0, 2.0, 1.0]))
    image = np.arange(10, dtype=np.float32).reshape(1, 1, 5, 2)
    target = source.with_spacing((1.0, 1.0, 1.0))
    assert target.shape == (3, 5, 4)
    for order in (0, 1, 3):
        result = resample(image, source, target, order=order)
        np.testing.assert_allclose(result[:, 0], result[:, 2])


def test_other_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not share their axes"):
        resample(np.zeros((1, 4, 4, 4)), oblique(1, (4, 4, 4)), oblique(2, (4, 4, 4)), order=1)


def test_image_of_another_shape_is_refused() -> None:
    grid = oblique(1, (4, 4, 4))
    with pytest.raises(ValueError, match="does not lie on a grid"):
        resample(np.zeros((1, 4, 4, 5)), grid, grid, order=1)


@pytest.mark.parametrize("affine", [np.diag([1, 0, 1, 1]), np.diag([1, np.nan, 1, 1]), np.ones((4, 4))])
def test_singular_affine_is_refused(affine: np.ndarray) -> None:
    with pytest.raises(MedmomError, match="has no inverse"):
        Geometry((3, 3, 3), affine)


def test_grids_are_compared_at_their_corners() -> None:
    grid = oblique(1, (200, 200, 200))
    tilted = grid.affine.copy()
    tilted[:3, 0] *= 1 + 1e-4
    assert grid.is_close(Geometry(grid.shape, grid.affine + 1e-7))
    assert not grid.is_close(Geometry(grid.shape, tilted))
    assert not grid.is_close(Geometry((200, 200, 199), grid.affine))


def test_diagonal_is_the_longest_distance_in_the_grid() -> None:
    assert Geometry((4, 5, 1), np.diag([1.0, 1.0, 9.0, 1.0])).diagonal == pytest.approx(5.0)
