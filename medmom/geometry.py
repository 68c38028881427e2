from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from medmom.errors import MedmomError
from medmom.interpolation import along, axis_weights, float_slabs

# How far, in source voxels over the whole grid, a target axis may leave its source axis and still count
# as the same: far above the rounding of an affine stored as float32, far below a voxel.
AXIS_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Geometry:
    """A grid in space without its voxels: shape and voxel-to-world affine (mm, RAS+).

    Attributes:
        shape: Number of voxels along each of the three axes.
        affine: Shape (4, 4), float64; maps voxel indices (centres) to world coordinates in mm.
    """

    shape: tuple[int, ...]
    affine: np.ndarray

    def __post_init__(self) -> None:
        """Makes the affine float64 and refuses one that cannot be inverted."""
        affine = np.array(self.affine, dtype=np.float64)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        edges = np.linalg.norm(affine[:3, :3], axis=0)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or edges.min() <= 0:
            raise MedmomError(f"affine {affine.tolist()} has no inverse; write a valid affine into the header.")
        if abs(np.linalg.det(affine[:3, :3] / edges)) < 1e-6:
            raise MedmomError(f"affine {affine.tolist()} has no inverse; write a valid affine into the header.")

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel edges in mm, in the order of the axes."""
        return tuple(float(edge) for edge in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def orientation(self) -> str:
        """Closest anatomical direction of each axis, such as ``"RAS"``."""
        return "".join(nib.orientations.aff2axcodes(self.affine))

    @property
    def diagonal(self) -> float:
        """Length of the image's diagonal in mm, between the centres of its outermost voxels."""
        return float(np.linalg.norm(self.affine[:3, :3] @ (np.array(self.shape) - 1.0)))

    def corners(self) -> np.ndarray:
        """World coordinates of the eight outermost voxel centres, shape (8, 3), in mm."""
        index = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij")).reshape(3, -1)
        return np.asarray((self.affine[:3, :3] @ index + self.affine[:3, 3:]).T)

    def is_close(self, other: Geometry, tolerance: float = 1e-2) -> bool:
        """Tells whether both grids have one shape and no voxel lies further apart than ``tolerance`` mm."""
        return self.shape == other.shape and bool(np.abs(self.corners() - other.corners()).max() <= tolerance)

    def reoriented(self, orientation: str = "RAS") -> Geometry:
        """Gives the same voxels with the axes permuted and flipped to the closest ``orientation``."""
        start = nib.orientations.io_orientation(self.affine)
        transform = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(orientation))
        shape = [0, 0, 0]
        for source_axis, target_axis in enumerate(transform[:, 0].astype(int)):
            shape[target_axis] = self.shape[source_axis]
        return Geometry(tuple(shape), self.affine @ nib.orientations.inv_ornt_aff(transform, self.shape))

    def with_spacing(self, spacing: Sequence[float]) -> Geometry:
        """Gives a grid with the same axes and the same centre whose voxels have edges ``spacing`` (mm).

        The spacing is met exactly; the extent is met to half a voxel. An axis has one voxel at least.
        """
        old, new = np.array(self.spacing), np.array(spacing, dtype=np.float64)
        if np.allclose(old, new, rtol=1e-5, atol=0):
            return self
        shape = np.maximum(1, np.round(np.array(self.shape) * old / new)).astype(int)
        return self._rescaled(shape, new / old)

    def with_shape(self, shape: Sequence[int]) -> Geometry:
        """Gives a grid with the same axes, centre and extent, outer edges of voxels included, of another shape."""
        if tuple(shape) == self.shape:
            return self
        return self._rescaled(np.array(shape), np.array(self.shape) / np.array(shape))

    def _rescaled(self, shape: np.ndarray, factors: np.ndarray) -> Geometry:
        """Gives a grid about the same centre whose voxel edges are ``factors`` times as long."""
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] * factors
        centre = self.affine[:3, :3] @ ((np.array(self.shape) - 1) / 2) + self.affine[:3, 3]
        affine[:3, 3] = centre - affine[:3, :3] @ ((shape - 1) / 2)
        return Geometry(tuple(shape), affine)


def shared_axes(source: Geometry, target: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds which axis of a grid each axis of another one runs along.

    Returns:
        The source axis of each target axis; the linear part (3, 3) and the offset (3,) of the map from target voxels
        to source voxels.

    Raises:
        ValueError: The target's axes are not the source's, permuted, flipped and scaled.
    """
    matrix = np.linalg.inv(source.affine) @ target.affine
    linear, offset = matrix[:3, :3], matrix[:3, 3]
    axes = np.abs(linear).argmax(axis=0)
    drift = np.abs(linear) * np.array(target.shape)
    drift[axes, np.arange(3)] = 0
    if sorted(axes) != [0, 1, 2] or drift.max() > AXIS_TOLERANCE:
        raise ValueError("the grids do not share their axes; resample between a case and its working grid only")
    return axes, linear, offset


def _aligned(
    image: np.ndarray, source: Geometry, target: Geometry, order: int
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Turns ``image`` to the target's axes by permuting and flipping, and gives each axis's weights.

    Raises:
        ValueError: The target's axes are not the source's, permuted, flipped and scaled.
    """
    axes, linear, offset = shared_axes(source, target)
    image = image.transpose(0, *(1 + axes))
    weights = []
    for axis, source_axis in enumerate(axes):
        count, scale, start = image.shape[1 + axis], linear[source_axis, axis], offset[source_axis]
        if scale < 0:
            image = np.flip(image, 1 + axis)
            scale, start = -scale, count - 1 - start
        weights.append(axis_weights(count, target.shape[axis], float(scale), float(start), order))
    return image, weights


def resample(
    image: np.ndarray,
    source: Geometry,
    target: Geometry,
    *,
    order: int,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Brings an image from one grid to another that shares its axes, as one matrix product an axis.

    Where the grids differ by order and direction of the axes alone, the voxels are copied, not computed.
    Outside the source the nearest border voxel counts. Products run in float32, slab by slab along the source axis
    that becomes the target's last, so that no float copy of the whole image is made; the last axis follows at once.
    The bits of the result depend neither on the type of ``image``, as long as float32 holds its values, nor on its
    memory order.

    Args:
        image: Shape (C, *source.shape), any type and memory order.
        source: Grid of ``image``.
        target: Grid wanted; its axes are the source's, permuted, flipped and scaled.
        order: 0 nearest, 1 linear, 3 interpolating cubic B-spline, kept within each channel's range.
        change: What is done to the voxels first. It gets float32 slabs (C, ...) whose other axes come in any order,
            may write to them, and gives slabs of the same voxels, of as many channels as it likes.

    Returns:
        A new array, shape (C, *target.shape); float32, or the image's own type where voxels are copied unchanged.

    Raises:
        ValueError: The grids do not share their axes, or ``image`` does not fit ``source``.
    """
    _check_fit(image, source)
    turned, weights = _aligned(image, source, target, order)
    if change is None and all(w is None for w in weights):
        return turned.copy()
    result, lowest, highest = _two_axes(turned, weights, change)
    if weights[2] is not None:
        result = along(result, weights[2], 3)
    if order > 1:
        for channel, low, high in zip(result, lowest, highest, strict=True):
            np.clip(channel, low, high, out=channel)
    return result


def _two_axes(
    turned: np.ndarray, weights: Sequence[np.ndarray | None], change: Callable[[np.ndarray], np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resamples the first two axes slab by slab.

    Returns:
        The image, its last axis as it was, and the lowest and the highest value of each channel before.
    """
    result, lows, highs = np.empty(0, dtype=np.float32), [], []
    for place, slab in float_slabs(turned):
        part = slab if change is None else change(slab)
        lows.append(part.min(axis=(1, 2, 3)))
        highs.append(part.max(axis=(1, 2, 3)))
        for axis, matrix in ((3, weights[0]), (2, weights[1])):
            if matrix is not None:
                part = along(part, matrix, axis)
        if place.start == 0:
            result = np.empty((len(part), part.shape[3], part.shape[2], turned.shape[3]), dtype=np.float32)
        result[..., place] = part.transpose(0, 3, 2, 1)
    return result, np.min(lows, axis=0), np.max(highs, axis=0)


def resample_slabs(
    image: np.ndarray, source: Geometry, target: Geometry, *, thickness: int = 16
) -> Iterator[tuple[slice, np.ndarray]]:
    """Linear ``resample`` in slabs along the target's last axis, so that the whole never exists at once.

    Args:
        image: Shape (C, *source.shape).
        source: Grid of ``image``.
        target: Grid wanted; its axes are the source's, permuted, flipped and scaled.
        thickness: Voxels of the last axis in one slab.

    Yields:
        The slab's place on the last axis, and its voxels (C, *target.shape[:2], at most ``thickness``), float32.

    Raises:
        ValueError: The grids do not share their axes, or ``image`` does not fit ``source``.
    """
    _check_fit(image, source)
    turned, weights = _aligned(image, source, target, order=1)
    for start in range(0, target.shape[2], thickness):
        place = slice(start, min(start + thickness, target.shape[2]))
        if weights[2] is None:
            slab = np.ascontiguousarray(turned[..., place], dtype=np.float32)
        else:
            rows = weights[2][place]
            used = np.flatnonzero(rows.any(axis=0))
            needed = slice(used[0], used[-1] + 1)
            slab = along(np.ascontiguousarray(turned[..., needed], dtype=np.float32), rows[:, needed], 3)
        for axis in (0, 1):
            matrix = weights[axis]
            if matrix is not None:
                slab = along(slab, matrix, 1 + axis)
        yield place, slab


def _check_fit(image: np.ndarray, source: Geometry) -> None:
    if image.shape[1:] != source.shape:
        raise ValueError(f"an image of shape {image.shape} does not lie on a grid of shape {source.shape}")
