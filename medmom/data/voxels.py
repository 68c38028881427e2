"""Stored numbers turned into intensities and into class numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from medmom.data.nifti import NiftiFile, read_voxels
from medmom.errors import MedmomError

# Slices converted together: few enough for little memory, enough to fill the cache lines written to.
SLAB = 16

COMPACT = tuple(np.dtype(name) for name in ("uint8", "int8", "uint16", "int16", "int32"))

# Rounding of a stored scale factor stays far below, a blended label far above.
WHOLE_TOLERANCE = 1e-4


def intensities(file: NiftiFile) -> np.ndarray:
    """Reads float32 channels, shape (C, X, Y, Z), with the scale factors applied.

    Raises:
        MedmomError: The file is damaged, or a voxel is not finite.
    """
    raw, slope, inter = _channels(file)
    return _scaled(file.path, np.empty(raw.shape, dtype=np.float32), raw, slope, inter)


def compact_intensities(file: NiftiFile) -> np.ndarray:
    """Reads channels, shape (C, X, Y, Z), with the scale factors applied, in little memory.

    Integers stay integers where scaling only shifts them by a whole number within 32 bits: one and two bytes a voxel
    in place, more as few as hold the values. All else becomes float32. The memory order is that of the file.

    Returns:
        ``int8``, ``uint8``, ``int16``, ``uint16``, ``int32`` or ``float32``; as float32 the values of ``intensities``.

    Raises:
        MedmomError: The file is damaged, or a voxel is not finite.
    """
    raw, slope, inter = _channels(file)
    if not raw.dtype.isnative:
        raw = raw.byteswap(inplace=True).view(raw.dtype.newbyteorder("="))
    if raw.dtype.kind in "iu" and slope == 1 and inter.is_integer() and abs(inter) <= 2**31:
        low, high = int(raw.min()) + int(inter), int(raw.max()) + int(inter)
        kind = compact_type(raw.dtype, low, high)
        if kind is not None:
            return _shifted(raw, int(inter), kind)
    if raw.dtype == np.float32 and (slope, inter) == (1.0, 0.0):
        return checked_finite(file.path, raw)
    return _scaled(file.path, _like_stored(raw, np.float32), raw, slope, inter)


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


def checked_finite(path: Path, array: np.ndarray) -> np.ndarray:
    """Gives float32 voxels as they are.

    Raises:
        MedmomError: A voxel is not finite.
    """
    # Both carry nan and infinity out without an array of flags.
    if not np.isfinite((array.min(), array.max())).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise MedmomError(
            f"{path}: {count} voxels are NaN, infinite or beyond 32-bit range. Replace them and save again."
        )
    return array


def compact_type(stored: np.dtype[Any], low: int, high: int) -> np.dtype[Any] | None:
    """Gives the type to hold values from ``low`` to ``high``: where a small one's bytes suffice, it keeps them.

    Else the smallest; None beyond 32 bits.
    """
    fitting = [kind for kind in COMPACT if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max]
    if stored.itemsize <= 2:
        fitting.sort(key=lambda kind: (kind.itemsize != stored.itemsize, kind != stored))
    return fitting[0] if fitting else None


def _channels(file: NiftiFile) -> tuple[np.ndarray, float, float]:
    """Gives the stored voxels with channels first, shape (C, X, Y, Z), without a copy; slope; intercept."""
    raw, slope, inter = read_voxels(file)
    return raw.transpose(3, 0, 1, 2), slope, inter


def _like_stored(raw: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """An empty array of the same shape and memory order: the first spatial axis runs fastest, channels slowest."""
    channels, x, y, z = raw.shape
    return np.empty((channels, z, y, x), dtype=dtype).transpose(0, 3, 2, 1)


def _scaled(path: Path, array: np.ndarray, raw: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Fills a float32 array with scaled values, slab by slab, and checks them."""
    with np.errstate(over="ignore", invalid="ignore"):
        for channel, stored in zip(array, raw, strict=True):
            for start in range(0, raw.shape[3], SLAB):
                part = stored[..., start : start + SLAB]
                scaled = part if (slope, inter) == (1.0, 0.0) else part.astype(np.float64) * slope + inter
                channel[..., start : start + SLAB] = scaled
    return checked_finite(path, array)


def _shifted(raw: np.ndarray, shift: int, kind: np.dtype[Any]) -> np.ndarray:
    """Adds a whole number, in place where the bytes of a voxel stay as many."""
    if kind.itemsize == raw.dtype.itemsize:
        array = raw.view(kind)
        if shift:
            # Integers wrap around, and what comes out lies within the type.
            array += np.array(shift).astype(kind)
        return array
    array = _like_stored(raw, kind)
    for start in range(0, raw.shape[3], SLAB):
        array[..., start : start + SLAB] = raw[..., start : start + SLAB].astype(np.int64) + shift
    return array
