"""Interpolation along one axis, as a product with a banded matrix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import scipy.linalg

THICKNESS = 16
"""Voxels of the last axis in one slab. Fixed: products of other shapes differ in their last bit."""

# Rows of a matrix multiplied together: enough for a fast product, few enough to leave most zeros out.
BLOCK = 64

# The weights of a spline fall by 0.27 a voxel and never end; smaller ones are lost in float32.
NEGLIGIBLE = 2.0**-30

# Voxels from the border after which a spline has forgotten what lies there (0.27 to this power is 1e-9).
SETTLED = 16


def _linear_weights(position: np.ndarray, count: int) -> np.ndarray:
    """Weights (targets, sources) of linear interpolation at ``position``, the border value outside."""
    position = np.clip(position, 0, count - 1)
    low = np.minimum(np.floor(position).astype(int), max(count - 2, 0))
    weights = np.zeros((len(position), count))
    rows = np.arange(len(position))
    weights[rows, low] = 1 - (position - low)
    if count > 1:
        weights[rows, low + 1] = position - low
    return weights


def _cubic_weights(position: np.ndarray, count: int) -> np.ndarray:
    """Weights (targets, sources) of the interpolating cubic B-spline of the voxels, outside of the border's value.

    The coefficients c of the spline solve (c[i-1] + 4 c[i] + c[i+1]) / 6 = f[i]; the weights are
    the basis at ``position`` times the inverse of that matrix.
    """
    size = count + 4 * SETTLED
    position = np.clip(position, -SETTLED, count - 1 + SETTLED) + 2 * SETTLED
    base = np.floor(position).astype(int)
    t = position - base
    basis = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    weights = np.zeros((len(position), size))
    np.put_along_axis(weights, base[:, None] + np.arange(-1, 3), basis, axis=1)
    # weights @ inverse(A) = solve(A.T, weights.T).T, and A is its own transpose.
    bands = np.repeat([[1 / 6], [4 / 6], [1 / 6]], size, axis=1)
    weights = scipy.linalg.solve_banded((1, 1), bands, weights.T).T
    inner = np.array(weights[:, 2 * SETTLED : -2 * SETTLED], order="C")
    inner[:, 0] += weights[:, : 2 * SETTLED].sum(axis=1)
    inner[:, -1] += weights[:, -2 * SETTLED :].sum(axis=1)
    return inner


def _nearest_weights(position: np.ndarray, count: int) -> np.ndarray:
    """Weights (targets, sources) that pick the nearest voxel."""
    weights = np.zeros((len(position), count))
    weights[np.arange(len(position)), np.clip(np.floor(position + 0.5).astype(int), 0, count - 1)] = 1
    return weights


@lru_cache(maxsize=64)
def axis_weights(source_count: int, target_count: int, scale: float, offset: float, order: int) -> np.ndarray | None:
    """Interpolation matrix of one axis; outside the source the border's value goes on.

    Args:
        source_count: Voxels of the source.
        target_count: Voxels of the target.
        scale: Source voxels from one target voxel to the next.
        offset: Where the first target voxel lies, in source voxels.
        order: 0 nearest, 1 linear, 3 interpolating cubic B-spline.

    Returns:
        Shape (targets, sources), float32, not to be written to; None where the axis is taken as it is.

    Source:
        Unser 1999, doi:10.1109/79.799930, interpolating cubic B-splines.
    """
    position = scale * np.arange(target_count) + offset
    if source_count == target_count and np.abs(position - np.arange(target_count)).max() < 1e-4:
        return None
    rule = {0: _nearest_weights, 1: _linear_weights, 3: _cubic_weights}[order]
    weights = rule(position, source_count).astype(np.float32)
    weights[np.abs(weights) < NEGLIGIBLE] = 0
    weights.flags.writeable = False
    return weights


def along(image: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Multiplies one axis of an array with a banded matrix; what lies beyond the band is not looked at.

    Args:
        image: float32, any shape, contiguous.
        weights: Shape (targets, sources), float32, no row all zero; sources is the length of ``axis``.
        axis: Counted from 0.

    Returns:
        A new array of the same axes, ``axis`` of length targets. Its bits depend on the shapes and values alone.
    """
    before, after = image.shape[:axis], image.shape[axis + 1 :]
    result = np.empty((*before, len(weights), *after), dtype=np.float32)
    if not after:
        flat, out = image.reshape(-1, image.shape[axis]), result.reshape(-1, len(weights))
        for rows, columns in _bands(weights):
            np.matmul(flat[:, columns], weights[rows, columns].T, out=out[:, rows])
        return result
    num_planes, width = int(np.prod(before)), int(np.prod(after))
    planes, products = image.reshape(num_planes, -1, width), result.reshape(num_planes, -1, width)
    for rows, columns in _bands(weights):
        np.matmul(weights[rows, columns], planes[:, columns], out=products[:, rows])
    return result


def float_slabs(image: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Copies an image as float32, slab by slab along its last axis.

    Args:
        image: Shape (C, X, Y, Z), any type and memory order.

    Yields:
        The slab's place on the last axis, and a new array of it with its axes turned round,
        shape (C, at most ``THICKNESS``, Y, X), contiguous: the order in which NIfTI files store their voxels.
    """
    for start in range(0, image.shape[-1], THICKNESS):
        place = slice(start, min(start + THICKNESS, image.shape[-1]))
        yield place, np.array(image[..., place].transpose(0, 3, 2, 1), dtype=np.float32, order="C")


def _bands(weights: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows, and the columns from the first to the last that is not zero in them."""
    for start in range(0, len(weights), BLOCK):
        rows = slice(start, min(start + BLOCK, len(weights)))
        used = np.flatnonzero(weights[rows].any(axis=0))
        yield rows, slice(int(used[0]), int(used[-1]) + 1)
