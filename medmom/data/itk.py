"""NRRD and MetaImage files through SimpleITK."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medmom.data.foreign import as_channels, checked_grid, import_reader
from medmom.data.itk_header import META, NRRD, read_text_header
from medmom.data.voxels import whole_numbers
from medmom.errors import MedmomError
from medmom.geometry import Geometry

logger = logging.getLogger(__name__)

SUFFIXES = (*NRRD, *META)


class ItkFile(NamedTuple):
    """A file whose header was read and checked; the voxels are still on disk.

    Attributes:
        path: The file.
        geometry: The grid.
        header: A NIfTI header for it.
        num_channels: Numbers of a voxel, or volumes along the fourth axis.
        reader: SimpleITK's.
    """

    path: Path
    geometry: Geometry
    header: Any
    num_channels: int
    reader: Any


def is_itk(path: str | Path) -> bool:
    """Whether a file name is one of NRRD (``.nrrd``, ``.nhdr``) or MetaImage (``.mha``, ``.mhd``)."""
    return Path(path).suffix.lower() in SUFFIXES


def open_itk(path: Path) -> ItkFile:
    """Reads and checks a header; what NIfTI files are refused for, these are too.

    Numbers of a voxel are channels, and so are volumes along a fourth axis. An NRRD file that does not say how it lies
    in the patient is read along left, posterior, superior, with a warning; a flat image as one slice.

    Raises:
        MedmomError: As ``open_nifti`` and ``read_text_header``; or the optional reader is not installed.
    """
    kind = "an NRRD file" if path.suffix.lower() in NRRD else "a MetaImage file"
    library = import_reader("SimpleITK", path, kind)
    text = read_text_header(path)
    reader = library.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() in NRRD else "MetaImageIO")
    try:
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
    except (RuntimeError, ValueError, TypeError) as error:
        raise MedmomError(
            f"{path}: {kind} with a damaged header, or axes that are no grid. Save it again, for example in 3D Slicer."
        ) from error
    shape, channels = _shape(path, reader)
    geometry, header = checked_grid(path, shape, _affine(path, reader), channels)
    if not text.has_space:
        logger.warning("%s: no space; axes are taken as left, posterior, superior.", path)
    return ItkFile(path, geometry, header, channels, reader)


def read_itk(file: ItkFile, *, compact: bool = False) -> np.ndarray:
    """Reads the channels of an image, shape (C, X, Y, Z).

    Args:
        file: Opened.
        compact: As of ``read_images``.

    Raises:
        MedmomError: The file is damaged, or a voxel is no real and finite number.
    """
    return as_channels(file.path, _voxels(file), compact=compact)


def read_itk_label(file: ItkFile) -> np.ndarray:
    """Reads a label map as integers, shape (X, Y, Z).

    Raises:
        MedmomError: The file is damaged, there are several channels, or a value is not a whole number.
    """
    if file.num_channels > 1:
        raise MedmomError(
            f"{file.path}: a label map with {file.num_channels} channels. Store one volume of class numbers."
        )
    raw = _voxels(file)[0]
    return np.ascontiguousarray(raw) if raw.dtype.kind in "iu" else whole_numbers(file.path, raw)


def itk_files(path: Path) -> list[Path]:
    """Gives the files of an image: the header, and the voxels' where they lie beside it.

    Raises:
        MedmomError: As ``read_text_header``.
    """
    voxels = read_text_header(path).voxel_path
    return [path] if voxels == path else [path, voxels]


def _voxels(file: ItkFile) -> np.ndarray:
    """Reads the voxels as they are stored, shape (C, X, Y, Z)."""
    library = import_reader("SimpleITK", file.path, "an image")
    try:
        image = file.reader.Execute()
        raw = library.GetArrayFromImage(image)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise MedmomError(f"{file.path}: the voxels cannot be read. Copy the file again from its source.") from error
    if raw.dtype.kind not in "iuf":
        raise MedmomError(f"{file.path}: voxels are {raw.dtype.name}, not real numbers. Store one real number a voxel.")
    if image.GetNumberOfComponentsPerPixel() == 1:
        raw = raw[..., None]
    x, y, z = file.geometry.shape
    # SimpleITK's arrays run volumes, Z, Y, X, numbers; of volumes and numbers one is 1.
    return np.asarray(raw.reshape(-1, z, y, x, raw.shape[-1]).transpose(0, 4, 3, 2, 1).reshape(-1, x, y, z))


def _shape(path: Path, reader: Any) -> tuple[tuple[int, ...], int]:
    size, numbers = [int(n) for n in reader.GetSize()], int(reader.GetNumberOfComponents())
    while len(size) > 3 and size[-1] == 1:
        size.pop()
    size += [1] * (3 - len(size))
    if len(size) > 4 or (len(size) == 4 and numbers > 1):
        text = " x ".join(map(str, (*size, numbers)))
        raise MedmomError(f"{path}: shape {text} is no image volume. Give X x Y x Z, or one axis of channels more.")
    return tuple(size[:3]), numbers * (size[3] if len(size) == 4 else 1)


def _affine(path: Path, reader: Any) -> np.ndarray:
    """Gives the affine of the first three axes, LPS+, in mm."""
    axes = int(reader.GetDimension())
    direction = np.reshape(reader.GetDirection(), (axes, axes))
    used = min(axes, 3)
    if axes > 3 and (np.abs(direction[:3, 3:]).max() > 1e-6 or np.abs(direction[3:, :3]).max() > 1e-6):
        raise MedmomError(f"{path}: space and channels are turned into each other. Save each volume as a file.")
    lps = np.eye(4)
    lps[:used, :used] = direction[:used, :used] * np.array(reader.GetSpacing()[:used])
    lps[:used, 3] = reader.GetOrigin()[:used]
    return lps
