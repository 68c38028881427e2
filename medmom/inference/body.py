"""Where in a CT the patient is, coarsely: windows of air need not run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from medmom.data.preparation import AXES, Preparation

COARSE = 4
"""Voxels along each edge of the cells on which the body is looked for."""

BODY_HU, FAT_HU, HIGHEST_AIR_HU = -300.0, -100.0, -250.0
"""What tells body from air, the darkest large tissue, and the clip above which air cannot be told from it."""

MARGIN_MM = 10.0
"""By how much the body is grown."""

SMALLEST_SHARE = 1e-3
"""Pieces that are smaller against the largest one, such as tubes, do not count."""


def body_mask(image: np.ndarray, preparation: Preparation, spacing: Sequence[float] | None = None) -> np.ndarray | None:
    """Gives a region that surely holds the body, for ``medmom.inference.stream.stream_logits``.

    Voxels above -300 HU count, or, where intensities are clipped above -500 HU, above the middle between the clip and
    fat. In each axial slice all that lies between two of them along one of its axes is added, so that lungs belong to
    the body even where the image cuts the chest open; then 10 mm all around. The table may be in it. Found on cells of
    4 x 4 x 4 voxels, of which the brightest voxel counts: in little memory, and rather too large than too small.

    Args:
        image: float32 (C, X, Y, Z), prepared.
        preparation: With which it was prepared.
        spacing: Voxel edges of the working grid in mm, where the preparation does not fix them.

    Returns:
        bool (X, Y, Z); None where no window can be spared or air cannot be told: no CT, clipped above -250 HU, no
        known spacing, no body, or no air.
    """
    threshold = _threshold(preparation)
    spacing = spacing or preparation.spacing
    if threshold is None or spacing is None:
        return None
    cells = _filled(_without_specks(_cells(image, threshold)), AXES[preparation.plane].index("S"))
    widths = [2 * math.ceil(MARGIN_MM / (COARSE * edge)) + 1 for edge in spacing]
    cells = ndimage.maximum_filter(cells, widths, mode="constant", cval=0)
    if cells.all() or not cells.any():
        return None
    for axis, size in enumerate(image.shape[1:]):
        cells = cells.repeat(COARSE, axis)[(slice(None),) * axis + (slice(size),)]
    return np.ascontiguousarray(cells)


def _threshold(preparation: Preparation) -> float | None:
    """The prepared intensity above which a voxel belongs to the body."""
    if preparation.intensity != "ct" or preparation.clip is None:
        return None
    if preparation.mean is None or preparation.std is None:
        return None
    low, high = preparation.clip
    if low > HIGHEST_AIR_HU or high <= 0:
        return None
    return (max(BODY_HU, (low + FAT_HU) / 2) - preparation.mean) / preparation.std


def _cells(image: np.ndarray, threshold: float) -> np.ndarray:
    """Whether a cell has a voxel above the threshold in any channel; in slabs, for the memory of one cell's edge."""
    slabs = []
    for start in range(0, image.shape[1], COARSE):
        slab = (image[:, start : start + COARSE] > threshold).any(axis=(0, 1))
        for axis, size in enumerate(slab.shape):
            slab = np.logical_or.reduceat(slab, np.arange(0, size, COARSE), axis=axis)
        slabs.append(slab)
    return np.stack(slabs)


def _without_specks(cells: np.ndarray) -> np.ndarray:
    pieces, _ = ndimage.label(cells, np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return np.asarray((sizes >= max(1, SMALLEST_SHARE * sizes.max()))[pieces])


def _filled(cells: np.ndarray, superior: int) -> np.ndarray:
    """With all that lies between two cells of the body along an axis of its axial slice."""
    between = cells.copy()
    for axis in {0, 1, 2} - {superior}:
        before = np.logical_or.accumulate(cells, axis)
        behind = np.flip(np.logical_or.accumulate(np.flip(cells, axis), axis), axis)
        between |= before & behind
    return between
