"""What is computed from an image's intensities before they are scaled, slab by slab."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage

from medmom.interpolation import float_slabs

LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in grey, as in ITU-R BT.601."""


def grey(slab: np.ndarray) -> np.ndarray:
    """Gives one channel of grey, shape (1, ...), for the three of red, green and blue."""
    red, green, blue = (np.float32(share) * channel for share, channel in zip(LUMA, slab, strict=True))
    return np.asarray(red + green + blue)[None]


def parted(slab: np.ndarray, has_mask: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Gives the channels of a slab, and its last one by itself where that is a mask."""
    return (slab[:-1], slab[-1:]) if has_mask else (slab, None)


def statistics(image: np.ndarray, to_grey: bool, *, has_mask: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Gives mean and standard deviation (of the population) of each channel.

    Args:
        image: Shape (C, X, Y, Z), any type.
        to_grey: Whether its three channels are taken as one of grey.
        has_mask: Whether the last channel is no channel, but 1 where voxels count and 0 where they do not.

    Returns:
        Both float64, shape (C, 1, 1, 1); the deviation of a constant channel is 1. Where no voxel counts, any mean.
    """
    num_voxels = max(1, np.count_nonzero(image[-1])) if has_mask else math.prod(image.shape[1:])

    def mean(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        parts = (parted(grey(slab) if to_grey else slab, has_mask) for _, slab in float_slabs(image))
        values = (function(slab) if mask is None else function(slab) * mask for slab, mask in parts)
        sums = [part.sum(axis=(1, 2, 3), keepdims=True, dtype=np.float64) for part in values]
        return np.asarray(np.sum(sums, axis=0) / num_voxels)

    # Sums of float32 squares overflow for large and vanish for tiny intensities: reduce in float64. Sums about one
    # voxel are 0 for a constant channel, which becomes 0 and not NaN or noise.
    first = np.unravel_index(int(image[-1].argmax()), image.shape[1:]) if has_mask else (0, 0, 0)
    _, voxel = next(float_slabs(image[(slice(None), *(slice(start, start + 1) for start in first))]))
    pivot = parted(grey(voxel) if to_grey else voxel, has_mask)[0].astype(np.float64)
    means = pivot + mean(lambda slab: slab - pivot)
    deviations = np.sqrt(mean(lambda slab: np.square(slab - means)))
    return means, np.where(deviations == 0, 1.0, deviations)


def nonzero_mask(image: np.ndarray) -> np.ndarray:
    """Gives where any channel is not 0, the holes between filled: where a patient is, if all else was set to 0.

    Args:
        image: Shape (C, X, Y, Z).

    Returns:
        bool (X, Y, Z); all False for an image of zeros.

    Source:
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, cropping to the nonzero region; version 2 of nnU-Net.
    """
    found = np.zeros(image.shape[1:], dtype=bool)
    for channel in image:
        found |= channel != 0
    return np.asarray(ndimage.binary_fill_holes(found))


def nonzero_box(image: np.ndarray) -> tuple[slice, ...]:
    """Gives the smallest box with all voxels that are not 0 in every channel.

    Args:
        image: Shape (C, X, Y, Z).

    Returns:
        A slice of each of X, Y and Z; the whole image where all of it is 0.

    Source:
        As ``nonzero_mask``.
    """
    found: list[Any] = [np.zeros(size, dtype=bool) for size in image.shape[1:]]
    for number in range(image.shape[3]):
        plane = (image[..., number] != 0).any(axis=0)
        found[0] |= plane.any(axis=1)
        found[1] |= plane.any(axis=0)
        found[2][number] = plane.any()
    if not found[0].any():
        return (slice(None),) * 3
    return tuple(slice(int(places.argmax()), len(places) - int(places[::-1].argmax())) for places in found)
