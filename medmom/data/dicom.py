"""DICOM series and multi-frame files as volumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medmom.data.dicom_grid import Plane, grid_of
from medmom.data.dicom_headers import FileHeader
from medmom.data.dicom_series import series_at
from medmom.data.foreign import as_channels, import_reader
from medmom.data.voxels import compact_type
from medmom.errors import MedmomError
from medmom.geometry import Geometry


class DicomVolume(NamedTuple):
    """A series that was read.

    Attributes:
        array: Intensities, shape (1, X, Y, Z).
        geometry: The grid.
        header: A NIfTI header for it.
        files: The file of each plane of the third axis; of a multi-frame file that file alone.
    """

    array: np.ndarray
    geometry: Geometry
    header: Any
    files: tuple[Path, ...]


def read_series(path: Path, *, compact: bool = False) -> DicomVolume:
    """Reads the series that a path stands for, plane by plane in the order of their positions.

    Rescale slope and intercept count plane by plane. Stored as integers, and shifted by whole numbers at most, they
    stay integers where ``compact``.

    Args:
        path: A folder with one series, or any file of a series.
        compact: As of ``read_images``.

    Raises:
        MedmomError: As ``series_at`` and ``grid_of``; or pixels are damaged, or compressed in an unknown way.
    """
    series = series_at(path)
    planes, geometry, header = grid_of(path, series.files)
    array = _stacked(path, planes, geometry.shape, compact=compact)
    channels = as_channels(path, array.transpose(2, 1, 0)[None], compact=compact)
    paths = [plane.file.path for plane in planes]
    return DicomVolume(channels, geometry, header, tuple(paths[:1] if series.is_multiframe else paths))


def series_geometry(path: Path) -> Geometry:
    """Gives the grid of a series from its headers.

    Raises:
        MedmomError: As ``series_at`` and ``grid_of``.
    """
    return grid_of(path, series_at(path).files)[1]


def series_files(path: Path) -> list[Path]:
    """Gives the files of a series, by name.

    Raises:
        MedmomError: As ``series_at``.
    """
    return [file.path for file in series_at(path).files]


def _stacked(path: Path, planes: Sequence[Plane], shape: tuple[int, ...], *, compact: bool) -> np.ndarray:
    """Fills an array (Z, Y, X) plane by plane; integers widen where a plane needs it."""
    whole = compact and all(plane.frame.slope == 1 and plane.frame.intercept.is_integer() for plane in planes)
    stored = np.dtype(f"u{planes[0].file.bits // 8}")
    array, kind = np.empty(0, dtype=np.float32), np.dtype(np.float32)
    # Every type holds 0.
    low, high = 0, 0
    for place, pixels in _pixels(path, planes):
        # Whatever the header says, what GDCM gives as floats stays so.
        whole = whole and pixels.dtype.kind in "iu"
        if not whole:
            kind = np.dtype(np.float32)
        else:
            low, high = min(low, int(pixels.min())), max(high, int(pixels.max()))
            kind = compact_type(stored, low, high) or np.dtype(np.float32)
        if not array.size:
            array = np.empty(shape[::-1], dtype=kind)
        elif array.dtype != kind:
            array = array.astype(kind)
        array[place] = pixels
    return array


def _pixels(path: Path, planes: Sequence[Plane]) -> Iterator[tuple[int, np.ndarray]]:
    """Decodes each file once; gives the place of each plane on the third axis and its intensities (Y, X)."""
    places: dict[Path, list[tuple[int, Plane]]] = {}
    for place, plane in enumerate(planes):
        places.setdefault(plane.file.path, []).append((place, plane))
    for inside in places.values():
        file = inside[0][1].file
        frames = _decoded(path, file)
        for place, plane in inside:
            yield place, _scaled(frames[plane.number], plane, file)


def _scaled(pixels: np.ndarray, plane: Plane, file: FileHeader) -> np.ndarray:
    """Gives each plane its own scale: GDCM gives all planes of a file that of the first."""
    given, own = file.frames[0], plane.frame
    if (given.slope, given.intercept) == (own.slope, own.intercept):
        return pixels
    stored = np.rint((pixels.astype(np.float64) - given.intercept) / given.slope)
    return np.asarray(stored * own.slope + own.intercept)


def _decoded(path: Path, file: FileHeader) -> np.ndarray:
    """Decodes a file through SimpleITK's GDCM: intensities, shape (frames, Y, X)."""
    library = import_reader("SimpleITK", path, "a DICOM file")
    reader = library.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.SetFileName(str(file.path))
        pixels = library.GetArrayFromImage(reader.Execute())
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise MedmomError(
            f"{file.path}: the pixels cannot be decoded (transfer syntax {_syntax(file)}). Copy the file again, or "
            "export the series uncompressed."
        ) from error
    wanted = (len(file.frames), file.rows, file.columns)
    if pixels.size != np.prod(wanted) or pixels.dtype.kind not in "iuf":
        raise MedmomError(
            f"{file.path}: pixels of shape {pixels.shape[::-1]}, where the header says {wanted[::-1]}. Copy it again."
        )
    return np.asarray(pixels.reshape(wanted))


def _syntax(file: FileHeader) -> str:
    known = import_reader("pydicom", file.path, "a DICOM file").uid.UID_dictionary
    return str(known[file.syntax][0]) if file.syntax in known else "unknown"
