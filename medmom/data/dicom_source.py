"""The DICOM series that a label map refers to: its headers, and where its slices lie on the label map's grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medmom.data.dicom_headers import DAMAGED, Frame, read_header
from medmom.data.foreign import TO_RAS, import_reader
from medmom.errors import MedmomError
from medmom.geometry import Geometry

# How far the corner of a slice may lie from the voxel it belongs to: some rounding in any case, and what the reader
# of series lets pass, but never so far that the neighbour is as near.
NEAR_VOXELS, NEAR_MM, FAR_VOXELS = 0.1, 0.12, 0.45

# What a file that refers to a series has to hold, empty or not, and anonymised series often do not.
REQUIRED = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
ONE = ("SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns", "FrameOfReferenceUID")


class Source(NamedTuple):
    """A series whose headers were read.

    Attributes:
        files: In the order given.
        headers: pydicom's dataset of each, without pixels.
        planes: Where each slice lies, in the order of the files, or of the frames of the only file: shape
            (slices, 4, 4), from column, row, 0 and 1 to the world (mm, LPS+).
    """

    files: tuple[Path, ...]
    headers: tuple[Any, ...]
    planes: np.ndarray


def read_source(series: Sequence[Path]) -> Source:
    """Reads the headers of a series, all but the pixels, and fills in what another file about it has to hold.

    Tags of patient and study that are missing are empty; a date or sex that DICOM does not know is emptied. Without a
    frame of reference all get one that is made up.

    Args:
        series: The files of the slices, or one multi-frame file.

    Raises:
        MedmomError: A file cannot be read, does not say which image it is or where it lies, or they are not one series.
    """
    generate_uid = import_reader("pydicom", series[0], "a DICOM file").uid.generate_uid
    planes = [_plane(path, frame) for path in series for frame in read_header(path).frames]
    headers = [_read(path) for path in series]
    for header in headers:
        for keyword in ("SOPClassUID", "SOPInstanceUID"):
            if not header.get(keyword):
                setattr(header, keyword, header.file_meta.get(f"MediaStorage{keyword}"))
    first = headers[0]
    _complete(first)
    if not first.get("FrameOfReferenceUID"):
        made_up = generate_uid(prefix=None)
        for header in headers:
            header.FrameOfReferenceUID = header.get("FrameOfReferenceUID") or made_up
    for path, header in zip(series, headers, strict=True):
        for keyword in (*ONE, "SOPInstanceUID"):
            if not header.get(keyword):
                raise MedmomError(f"{path}: the header has no {keyword}. Export the series again, or write NIfTI.")
            if keyword in ONE and header[keyword].value != first[keyword].value:
                raise MedmomError(f"{path}: another {keyword} than {series[0].name}. Give the files of one series.")
    return Source(tuple(series), tuple(headers), np.array(planes))


def turn_to_slices(array: np.ndarray, geometry: Geometry, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Turns an array to the slices of a series by permuting and flipping axes alone.

    Args:
        array: Shape (X, Y, Z), on ``geometry``.
        geometry: The grid of the slices, its axes in any order and direction.
        source: The series.

    Returns:
        A view of shape (slices, rows, columns), and the place on its first axis of each plane of ``source``.

    Raises:
        ValueError: The slices do not lie on the grid.
    """
    rows, columns = int(source.headers[0].Rows), int(source.headers[0].Columns)
    voxels = np.linalg.inv(geometry.affine) @ TO_RAS @ source.planes
    column_axis, row_axis = (int(np.abs(voxels[0, :3, step]).argmax()) for step in (0, 1))
    axes = (3 - column_axis - row_axis, row_axis, column_axis)
    shape = (len(source.planes), rows, columns)
    if column_axis == row_axis or tuple(array.shape[axis] for axis in axes) != shape:
        raise ValueError(f"{_times(array.shape)} voxels, and {shape[0]} slices of {rows} x {columns} pixels")
    corners = voxels @ np.array([[0, columns - 1, 0], [0, 0, rows - 1], [0, 0, 0], [1, 1, 1]])
    places = np.rint(corners[:, axes[0], 0]).astype(int)
    upside_down, mirrored = bool(voxels[0, row_axis, 1] < 0), bool(voxels[0, column_axis, 0] < 0)
    wanted = np.zeros((len(places), 3, 3))
    wanted[:, axes[0]] = places[:, None]
    wanted[:, row_axis] = (rows - 1) * np.array([upside_down, upside_down, not upside_down])
    wanted[:, column_axis] = (columns - 1) * np.array([mirrored, not mirrored, mirrored])
    off = np.abs(corners[:, :3] - wanted).max(axis=(0, 2))
    if (off > np.clip(NEAR_MM / np.array(geometry.spacing), NEAR_VOXELS, FAR_VOXELS)).any():
        raise ValueError(f"slices up to {off.max():.3g} voxels beside the grid")
    if sorted(places) != list(range(len(places))):
        raise ValueError(f"slices at the places {places.min() + 1} to {places.max() + 1} of {len(places)}")
    turned = array.transpose(axes)
    return turned[:, :: -1 if upside_down else 1, :: -1 if mirrored else 1], places


def share_plane(source: Source) -> None:
    """Gives all slices the orientation of the first, to the bit, and a multi-frame file one for all its frames.

    For slices that lie on one grid: highdicom takes the last digit that differs for another orientation. Slices
    without a thickness are as thick as they lie apart; how far that is, their positions say and no tag.
    """
    first = source.headers[0]
    if not is_multiframe(first):
        for header in source.headers:
            header.ImageOrientationPatient = first.ImageOrientationPatient
        first.pop("SpacingBetweenSlices", None)
        if not first.get("SliceThickness") and len(source.planes) > 1:
            apart = np.ptp(source.planes[:, :3, 3], axis=0) / (len(source.planes) - 1)
            first.SliceThickness = f"{np.linalg.norm(apart):.6g}"
        return
    shared, frame = first.SharedFunctionalGroupsSequence[0], first.PerFrameFunctionalGroupsSequence[0]
    for keyword in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if keyword not in shared:
            setattr(shared, keyword, getattr(frame, keyword))


def is_multiframe(header: Any) -> bool:
    """Whether a header describes each of its frames."""
    return "PerFrameFunctionalGroupsSequence" in header


def _read(path: Path) -> Any:
    pydicom = import_reader("pydicom", path, "a DICOM file")
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check path, permissions and disk.") from error
    except (*DAMAGED, pydicom.errors.InvalidDicomError) as error:
        raise MedmomError(
            f"{path}: the DICOM header is damaged ({type(error).__name__}). Copy the file again."
        ) from None


def _complete(header: Any) -> None:
    """Empties what DICOM does not allow in a header of patient and study, and adds what is missing, empty."""
    valuerep = import_reader("pydicom.valuerep", Path(), "a DICOM file")
    for keyword in REQUIRED:
        if header.get(keyword) is None:
            setattr(header, keyword, "")
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = ""
    kinds: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(("PatientBirthDate", "StudyDate"), valuerep.DA),
        "StudyTime": valuerep.TM,
    }
    for keyword, kind in kinds.items():
        try:
            kind(header[keyword].value)
        except (ValueError, TypeError):
            setattr(header, keyword, "")


def _plane(path: Path, frame: Frame) -> np.ndarray:
    if frame.position is None or frame.orientation is None or frame.spacing is None:
        raise MedmomError(f"{path}: a slice does not say where it lies. Export the series again.")
    row, column = (np.array(part) / np.linalg.norm(part) for part in (frame.orientation[:3], frame.orientation[3:]))
    plane = np.zeros((4, 4))
    plane[:3, 0], plane[:3, 1], plane[:3, 3] = row * frame.spacing[1], column * frame.spacing[0], frame.position
    plane[3, 3] = 1
    return plane


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
