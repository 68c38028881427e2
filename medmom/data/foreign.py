"""What the readers of other formats share: grids in LPS+, checked as NIfTI's are, and voxels as channels."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medmom.data.header import DAMAGED, grid_and_channels
from medmom.data.voxels import checked_finite, compact_type
from medmom.errors import MedmomError
from medmom.geometry import Geometry

EXTRA = "pip install 'medmom[dicom]'"

TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From DICOM's and ITK's world (LPS+) to NIfTI's (RAS+), and back."""

UNITS_MM, SCANNER = 2, 1


def import_reader(name: str, path: Path, kind: str) -> Any:
    """Imports an optional library, and keeps it from talking to the user past us.

    Args:
        name: ``"SimpleITK"`` or ``"pydicom"``.
        path: The file to be read, for the message.
        kind: What the file is, such as ``"a DICOM file"``.

    Raises:
        MedmomError: It is not installed.
    """
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        raise MedmomError(
            f"{path}: {kind}, which is read through {name}. Install the optional readers: {EXTRA}."
        ) from error
    if name == "SimpleITK":
        library.ProcessObject.SetGlobalWarningDisplay(False)
    else:
        # Its remarks on odd values quote them, and they may be a patient's.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return library


def checked_grid(path: Path, shape: tuple[int, ...], lps: np.ndarray, channels: int = 1) -> tuple[Geometry, Any]:
    """Makes grid and header of an image, with all checks that a NIfTI file meets.

    Args:
        path: For messages.
        shape: Voxels along the three axes.
        lps: Voxel-to-world affine (4, 4) in mm, LPS+.
        channels: Number of image channels.

    Returns:
        The grid, its affine RAS+ in double precision, and a NIfTI-1 header with it as sform, code 1, in mm.

    Raises:
        MedmomError: The shape is no image volume, or the affine is absurd or not at right angles.
    """
    affine, header = TO_RAS @ lps, nib.Nifti1Header()
    try:
        header.set_data_shape(shape if channels == 1 else (*shape, channels))
        with np.errstate(all="ignore"):
            header.set_sform(affine, code=SCANNER)
            header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    except DAMAGED as error:
        raise MedmomError(f"{path}: shape {' x '.join(map(str, shape))} is too large. Crop it.") from error
    header["xyzt_units"] = UNITS_MM
    grid_and_channels(path, header)
    header.set_data_shape(shape)
    return Geometry(shape, affine), header


def as_channels(path: Path, raw: np.ndarray, *, compact: bool) -> np.ndarray:
    """Gives voxels as float32, or as the integers they are where ``compact`` and few bytes hold them.

    Args:
        path: For messages.
        raw: Shape (C, X, Y, Z), any real type.
        compact: As of ``read_images``.

    Raises:
        MedmomError: A voxel is not finite as float32.
    """
    if compact and raw.dtype.kind in "iu":
        kind = compact_type(raw.dtype, int(raw.min()), int(raw.max()))
        if kind is not None:
            return raw.astype(kind, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        array = raw.astype(np.float32, order="K" if compact else "C", copy=False)
    return checked_finite(path, array)
