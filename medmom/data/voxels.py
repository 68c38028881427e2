"""Stored numbers turned into intensities and into class numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medmom.data.nifti import NiftiFile, read_voxels
from medmom.errors import MedmomError

# Slices converted together: few enough for little memory, enough to fill the cache lines written to.
SLAB = 16

# Rounding of a stored scale factor stays far below, a blended label far above.
WHOLE_TOLERANCE = 1e-4


def intensities(file: NiftiFile) -> np.ndarray:
    """Reads float32 channels, shape (C, X, Y, Z), with the scale factors applied.

    Raises:
        MedmomError: The file is damaged, or a voxel is not finite.
    """
    raw, slope, inter = read_voxels(file)
    array = np.empty((file.num_channels, *file.geometry.shape), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for channel in range(file.num_channels):
            for start in range(0, raw.shape[2], SLAB):
                part = raw[:, :, start : start + SLAB, channel]
                scaled = part if (slope, inter) == (1.0, 0.0) else part.astype(np.float64) * slope + inter
                array[channel, :, :, start : start + SLAB] = scaled
    # Both carry nan and infinity out without an array of flags.
    if not np.isfinite((array.min(), array.max())).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise MedmomError(
            f"{file.path}: {count} voxels are NaN, infinite or beyond 32-bit range. Replace them and save again."
        )
    return array


def class_numbers(file: NiftiFile) -> np.ndarray:
    """Reads a label map as integers, shape (X, Y, Z).

    Raises:
        MedmomError: The file is damaged, there are several volumes, or a value is not a whole number.
    """
    if file.num_channels > 1:
        raise MedmomError(
            f"{file.path}: a label map with {file.num_channels} volumes. Store one volume of class numbers."
        )
    raw, slope, inter = read_voxels(file)
    if raw.dtype.kind in "iu" and (slope, inter) == (1.0, 0.0):
        return raw[..., 0].astype(raw.dtype.newbyteorder("="), order="C")
    return whole_numbers(file.path, raw[..., 0], slope, inter)


def whole_numbers(path: Path, raw: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> np.ndarray:
    """Rounds scaled or float values to the smallest integer type that holds them.

    Raises:
        MedmomError: A value is not a whole number, or beyond 32 bits.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = raw.astype(np.float64, order="C") * slope + inter
        whole = np.rint(values)
        wrong = ~(np.abs(values - whole) <= WHOLE_TOLERANCE)
    if wrong.any():
        first = float(values[wrong][0])
        raise MedmomError(
            f"{path}: {int(wrong.sum())} label values are not whole numbers, such as {first:.6g}. "
            "Export labels without interpolation (nearest neighbour)."
        )
    low, high = int(whole.min()), int(whole.max())
    if low < -(2**31) or high >= 2**32:
        raise MedmomError(f"{path}: label values from {low} to {high}. Number the classes from 0 on.")
    return whole.astype(np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high)))
