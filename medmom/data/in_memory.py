"""Images that lie in memory already, taken in by the same door as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medmom.data.files import Volume, check_contrast
from medmom.data.header import grid_and_channels, parse_header
from medmom.errors import MedmomError
from medmom.geometry import Geometry

NAME = Path("image")
"""Stands in messages for an image without a file."""


def volume_in_memory(image: Any, affine: np.ndarray | None = None) -> Volume:
    """Takes an image from memory, with the checks that ``read_image`` makes on a file.

    Args:
        image: A nibabel image, whose scale factors count; or an array of intensities, shape (X, Y, Z), or
            (C, X, Y, Z) with the channels first. Neither is changed.
        affine: Of an array: shape (4, 4), voxel indices to mm, RAS+.

    Returns:
        The volume, float32, as read from a file of the same content.

    Raises:
        MedmomError: The image is of another kind or shape, an affine is missing or cannot be used, or a voxel is
            not finite.
    """
    if isinstance(image, nib.spatialimages.SpatialImage):
        if affine is not None:
            raise MedmomError("an affine is given besides a nibabel image, which has its own. Give one of the two.")
        return _from_nibabel(image)
    if affine is None:
        raise MedmomError("an array has no place in space. Give its affine too, shape (4, 4), in mm.")
    array, matrix = np.asarray(image), np.asarray(affine)
    if array.ndim not in (3, 4) or array.dtype.kind not in "iuf":
        raise MedmomError(
            f"an array of shape {array.shape} and type {array.dtype} is no image. Give numbers of shape (X, Y, Z), or "
            "(C, X, Y, Z) with channels first."
        )
    if matrix.shape != (4, 4) or matrix.dtype.kind not in "iuf":
        raise MedmomError(f"an affine of shape {matrix.shape} and type {matrix.dtype}. Give numbers of shape (4, 4).")
    # What has no inverse is refused here: a header cannot be made of it.
    Geometry(array.shape[-3:], matrix)
    stored = array if array.ndim == 3 else np.moveaxis(array, 0, -1)
    # Nibabel refuses integers of 64 bits, which need not be stored here.
    header = nib.Nifti1Image(np.broadcast_to(np.float32(0), stored.shape), matrix.astype(np.float64)).header
    return _volume(NAME, stored, header)


def _from_nibabel(image: Any) -> Volume:
    path = Path(image.get_filename() or NAME)
    if not isinstance(image, nib.Nifti1Pair):
        image = nib.Nifti1Image.from_image(image)
    if image.header.get_data_dtype().kind not in "iuf":
        raise MedmomError(f"{path}: voxels of type {image.header.get_data_dtype()}. Store one real number a voxel.")
    header = image.header.copy()
    header.set_data_shape(image.shape)
    return _volume(path, np.asanyarray(image.dataobj), header)


def _volume(path: Path, stored: np.ndarray, header: Any) -> Volume:
    """The volume of scaled voxels (X, Y, Z) or (X, Y, Z, C) under a header of their shape."""
    block = header.structarr.tobytes()
    header = parse_header(path, block, single=bytes(header["magic"]).startswith(b"n+"))
    geometry, num_channels = grid_and_channels(path, header)
    channels = np.moveaxis(stored.reshape((*geometry.shape, num_channels)), -1, 0)
    with np.errstate(over="ignore"):
        array = channels.astype(np.float32)
    if not np.isfinite((array.min(), array.max())).all():
        raise MedmomError(f"{path}: a voxel is NaN, infinite or beyond 32-bit range. Replace it.")
    volume = Volume(path, array, geometry, header)
    check_contrast(volume)
    return volume
