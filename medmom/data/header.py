"""What a NIfTI header says, checked: nothing below this file meets a header that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from medmom.errors import MedmomError
from medmom.geometry import Geometry

MAX_VOXELS = 2**31
"""A file that announces more voxels (2048 x 1024 x 1024) is refused before memory is asked for."""

MAX_OFFSET = 2**26
"""Header extensions may take this many bytes before the voxels begin."""

MAX_ORIGIN = 1e6
"""The first voxel may lie this far from the origin of the world, in mm; a float32 affine is exact to 0.06 mm there."""

MAX_SHEAR_DEGREES = 1.0
"""Axes may deviate this far from right angles; beyond it, spacing and distances in mm mean little."""

FORM_CODES = range(6)

CONVERT = "Convert it to NIfTI (.nii.gz), for example with dcm2niix, ITK-SNAP or 3D Slicer."

DAMAGED = (HeaderDataError, ValueError, KeyError, OverflowError)

logger = logging.getLogger(__name__)
repairs = logging.getLogger(f"{__name__}.repairs")
repairs.propagate = False
repairs.addHandler(logging.NullHandler())


def parse_header(path: Path, block: bytes, *, single: bool) -> Any:
    """Turns the first 540 bytes of a file into a nibabel header.

    Args:
        path: The file they come from, for messages.
        block: The bytes; fewer where the file is shorter.
        single: Whether the name says that header and voxels share one file.

    Raises:
        MedmomError: The bytes are no NIfTI header, or one that cannot be used.
    """
    kind, size = _kind(path, block)
    if len(block) < size:
        raise MedmomError(f"{path}: the header ends after {len(block)} bytes. Copy the file again from its source.")
    if kind.is_single != single:
        held = "header and voxels together" if kind.is_single else "the header of a .hdr/.img pair only"
        raise MedmomError(f"{path}: the file holds {held}, which its suffix denies. Rename or convert it.")
    try:
        header = kind(block[:size], check=False)
        _check_fields(path, header)
        _fill_edges(header)
        header.check_fix(logger=repairs, error_level=40)
        damaged = not 0 <= header.get_data_offset() <= MAX_OFFSET
    except DAMAGED as error:
        raise MedmomError(f"{path}: the header is damaged ({_line(error)}). Copy the file again.") from error
    if damaged:
        raise MedmomError(f"{path}: the voxels begin at byte {header.get_data_offset()}. Copy the file again.")
    return header


def grid_and_channels(path: Path, header: Any) -> tuple[Geometry, int]:
    """Reads the grid, always with three axes, and the number of channels along the fourth.

    Raises:
        MedmomError: The shape is no image volume, or the affine cannot be trusted.
    """
    shape, num_channels = _shape(path, header)
    return _geometry(path, header, shape), num_channels


def voxel_type(path: Path, header: Any) -> np.dtype[Any]:
    """Gives the stored type of a voxel.

    Raises:
        MedmomError: A voxel is a colour, a complex number or of an unknown type.
    """
    try:
        dtype: np.dtype[Any] = np.dtype(header.get_data_dtype())
    except DAMAGED as error:
        raise MedmomError(f"{path}: unknown voxel type {int(header['datatype'])}. {CONVERT}") from error
    if dtype.kind not in "iuf":
        name = "colours (RGB)" if dtype.names else f"complex numbers ({dtype.name})"
        raise MedmomError(f"{path}: voxels are {name}, not one grey value each. Store one real number a voxel.")
    return dtype


def scaling(path: Path, header: Any) -> tuple[float, float]:
    """Gives slope and intercept from stored number to intensity; (1, 0) where the header asks for none.

    Raises:
        MedmomError: They are no numbers.
    """
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    # nibabel and the standard: 0, and here nan too, means that nothing is to be scaled.
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not np.isfinite((slope, inter)).all():
        raise MedmomError(f"{path}: scl_slope {slope:g} and scl_inter {inter:g}. Write finite ones into the header.")
    return slope, inter


def _kind(path: Path, block: bytes) -> tuple[Any, int]:
    """Finds the header class and its length in bytes."""
    if not block:
        raise MedmomError(f"{path}: the file is empty. Copy it again from its source.")
    if block[4:8] == b"n+2\0":
        return nib.Nifti2Header, 540
    if block[4:8] == b"ni2\0":
        return nib.nifti2.Nifti2PairHeader, 540
    if block[344:348] == b"n+1\0":
        return nib.Nifti1Header, 348
    if block[344:348] == b"ni1\0":
        return nib.nifti1.Nifti1PairHeader, 348
    if block[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
        raise MedmomError(f"{path}: an Analyze 7.5 header, which does not tell left from right. {CONVERT}")
    raise MedmomError(f"{path}: not a NIfTI file, it begins with {block[:8]!r}. {CONVERT}")


def _check_fields(path: Path, header: Any) -> None:
    """Refuses what nibabel would mend by a guess, such as a voxel edge of 0 mm set to 1 mm."""
    num_axes = header["dim"][0]
    if not 0 <= num_axes <= 7:
        fact = f"dim[0] is {int(num_axes.byteswap())} or {int(num_axes)}, by byte order"
        raise MedmomError(f"{path}: the header is damaged ({fact}). Copy the file again.")
    for name in ("qform_code", "sform_code"):
        if int(header[name]) not in FORM_CODES:
            raise MedmomError(f"{path}: {name} {int(header[name])} has no meaning. Write one from 0 to 5.")
    if 3000 <= int(header["intent_code"]) < 3100:
        raise MedmomError(f"{path}: CIFTI data (surfaces and parcels), not an image volume. Give the volume instead.")
    qform, sform, handedness = int(header["qform_code"]), int(header["sform_code"]), float(header["pixdim"][0])
    # The standard takes 0 for 1; of other numbers one reader looks at the sign and the next takes 1.
    if qform and handedness not in (-1, 0, 1):
        raise MedmomError(f"{path}: a qform whose pixdim[0] is {handedness:g}. Write 1, or -1 where it is mirrored.")
    edges = header["pixdim"][1 : min(int(num_axes), 3) + 1]
    if (qform or not sform) and not _are_edges(edges):
        sole = "and no sform" if not sform else "in the qform"
        raise MedmomError(f"{path}: voxel edges of {spell_edges(edges)} mm {sole}. Write the true edges (pixdim).")
    unit = {1: "metres", 3: "micrometres"}.get(int(header["xyzt_units"]) & 7)
    if unit:
        raise MedmomError(f"{path}: lengths are stored in {unit}. Store them in mm.")


def _are_edges(values: np.ndarray) -> bool:
    return bool((np.isfinite(values) & (values > 0)).all())


def _fill_edges(header: Any) -> None:
    """Takes voxel edges that mean nothing from the sform, which alone says where voxels lie there."""
    if int(header["sform_code"]) and not int(header["qform_code"]) and not _are_edges(header["pixdim"][1:4]):
        with np.errstate(all="ignore"):
            header["pixdim"][1:4] = np.linalg.norm(header.get_sform()[:3, :3], axis=0)


def _shape(path: Path, header: Any) -> tuple[tuple[int, ...], int]:
    """Splits the stored shape into three axes and channels."""
    shape = tuple(int(n) for n in header.get_data_shape())
    text = " x ".join(map(str, shape))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 2:
        shape = (*shape, 1)
    if not 3 <= len(shape) <= 4 or min(shape) < 1:
        raise MedmomError(f"{path}: shape {text} is no image volume. Give X x Y x Z or X x Y x Z x channels.")
    if sorted(shape[:3])[1] == 1:
        raise MedmomError(f"{path}: shape {text} is a line of values (surface data?), not an image. Give the volume.")
    if len(shape) == 4 and shape[0] == 1:
        raise MedmomError(f"{path}: shape {text} seems to have channels first. Store it as X x Y x Z x channels.")
    if int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        raise MedmomError(f"{path}: the header announces {text} voxels, more than {MAX_VOXELS}. Crop or resample it.")
    return shape[:3], shape[3] if len(shape) == 4 else 1


def _geometry(path: Path, header: Any, shape: tuple[int, ...]) -> Geometry:
    """Chooses the affine as nibabel does: sform, else qform, else voxel edges alone."""
    try:
        with np.errstate(all="ignore"):
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
            qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
        for given in (affine, qform, sform):
            if given is not None:
                _check_affine(path, given)
        if qform is None and sform is None:
            logger.warning("%s: no qform and no sform; axes are taken in nibabel's default order.", path)
        elif qform is not None and sform is not None:
            _check_agreement(path, header, Geometry(shape, qform), Geometry(shape, sform))
    except (*DAMAGED, np.linalg.LinAlgError) as error:
        raise MedmomError(f"{path}: the affine is damaged ({_line(error)}). Write a valid one.") from error
    return Geometry(shape, affine)


def _check_affine(path: Path, affine: np.ndarray) -> None:
    """Refuses an affine that is not finite, has absurd voxel edges, or axes that are not at right angles."""
    with np.errstate(all="ignore"):
        edges = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.abs(affine[:3, 3]) < MAX_ORIGIN).all():
        raise MedmomError(f"{path}: the first voxel lies at {spell_edges(affine[:3, 3])} mm. Write a valid affine.")
    if not ((edges > 1e-3) & (edges < 1e3)).all():
        raise MedmomError(f"{path}: voxel edges of {spell_edges(edges)} mm in the affine. Write a valid one.")
    cosines = np.abs(np.triu((affine[:3, :3] / edges).T @ (affine[:3, :3] / edges), 1))
    angle = float(np.degrees(np.arccos(min(cosines.max(), 1.0))))
    if angle < 90 - MAX_SHEAR_DEGREES:
        raise MedmomError(
            f"{path}: the axes of the grid meet at {angle:.1f} degrees, not at right angles (gantry tilt, or a "
            "registration written into the header). Resample it to a grid with right angles."
        )


def _check_agreement(path: Path, header: Any, qform: Geometry, sform: Geometry) -> None:
    """Refuses a qform and an sform that mirror each other, or disagree about one and the same space."""
    codes = int(header["qform_code"]), int(header["sform_code"])
    apart = float(np.linalg.norm(qform.corners() - sform.corners(), axis=1).max())
    mirrored = np.linalg.det(qform.affine[:3, :3]) * np.linalg.det(sform.affine[:3, :3]) < 0
    if mirrored or (codes[0] == codes[1] and apart > 0.5 * min(sform.spacing)):
        fact = "mirror each other" if mirrored else f"put a voxel {apart:.1f} mm apart"
        raise MedmomError(
            f"{path}: qform and sform (codes {codes[0]}, {codes[1]}) {fact}. Set the wrong one's code to 0."
        )


def spell_edges(values: Iterable[float]) -> str:
    """Writes voxel edges for a message, such as ``1 x 1 x 2.5``."""
    return " x ".join(f"{float(value):.4g}" for value in values)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
