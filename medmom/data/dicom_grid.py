"""From slices to a grid: sorted by where they lie, and refused where they make no regular volume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medmom.data.dicom_headers import FileHeader, Frame
from medmom.data.foreign import checked_grid
from medmom.data.header import spell_edges
from medmom.errors import MedmomError
from medmom.geometry import Geometry

SHARE, LEAST_MM, MOST_SHARE = 0.01, 0.05, 0.25
"""A gap may differ by this share of the usual one, or by so many mm if that is more, but never by the last share."""

MAX_COSINE = 2e-3
"""Cosines may differ so much from slice to slice: a tenth of a degree."""

EXPORT = "Export the whole series again, as slices of one volume."


class Plane(NamedTuple):
    """A plane of a series: the file it lies in, and its number there."""

    file: FileHeader
    number: int

    @property
    def frame(self) -> Frame:
        """Where it lies, and how its values are scaled."""
        return self.file.frames[self.number]


def grid_of(path: Path, files: Sequence[FileHeader]) -> tuple[list[Plane], Geometry, Any]:
    """Puts the planes of a series in order and computes their grid from the position of each.

    The first axis runs along the rows of pixels, the second along the columns, the third to where rows x columns
    points: so the axes are right-handed in LPS+, and planes ascend along the third. Its step is the way from the
    first plane to the last, divided evenly.

    A gap between planes may differ from the usual one by 1 % or 0.05 mm, whichever is more, and a plane may lie as
    far beside the line of the others. dicom2nifti lets gaps differ by 5 % and 0.1 mm together; ITK's series reader
    warns from a thousandth of the gap on, and goes on with the gap of the first two slices. Of what lies beyond, no
    regular grid tells the truth: it is refused here.

    Args:
        path: The series as it was given, for messages.
        files: Its files.

    Returns:
        The planes in the order of the third axis, the grid, and a NIfTI header for it.

    Raises:
        MedmomError: The pixels are no grey values; tags of the geometry are missing; planes differ in size, spacing or
            direction, are missing, share a place, lie unevenly, or at an angle to their line (gantry tilt).
    """
    planes = [Plane(file, number) for file in files for number in range(len(file.frames))]
    _check_pixels(path, files)
    _check_tags(path, planes)
    _check_alike(path, planes)
    first = planes[0].frame
    assert first.orientation is not None and first.spacing is not None
    row, column = (np.array(part) / np.linalg.norm(part) for part in (first.orientation[:3], first.orientation[3:]))
    normal = np.cross(row, column)
    places = np.array([plane.frame.position for plane in planes])
    order = np.argsort(places @ normal, kind="stable")
    planes, places = [planes[k] for k in order], places[order]
    step = normal * (planes[0].file.thickness or 0.0)
    if len(planes) > 1:
        _check_gaps(path, places @ normal, places)
        step = (places[-1] - places[0]) / (len(places) - 1)
        _check_line(path, places, step)
    lps = np.eye(4)
    lps[:3, :3] = np.stack([row * first.spacing[1], column * first.spacing[0], step], axis=1)
    lps[:3, 3] = places[0]
    geometry, header = checked_grid(path, (planes[0].file.columns, planes[0].file.rows, len(planes)), lps)
    return planes, geometry, header


def _check_pixels(path: Path, files: Sequence[FileHeader]) -> None:
    for file in files:
        if file.kind not in ("image", "localiser"):
            raise MedmomError(f"{path}: a DICOM {file.kind}, not an image. Give the series of images.")
        if file.colours:
            raise MedmomError(f"{path}: the pixels {file.colours}. Give the grey values of the scan itself.")
        if file.bits not in (8, 16, 32):
            raise MedmomError(f"{path}: pixels of {file.bits} bits. Export them with 8 or 16 bits.")


def _check_tags(path: Path, planes: Sequence[Plane]) -> None:
    """Refuses planes whose headers do not say where they lie."""
    for name, tag in (
        ("position", "ImagePositionPatient"),
        ("orientation", "ImageOrientationPatient"),
        ("spacing", "PixelSpacing"),
    ):
        lacking = sum(getattr(plane.frame, name) is None for plane in planes)
        if lacking:
            raise MedmomError(f"{path}: {lacking} of {len(planes)} slices have no {tag} that can be read. {EXPORT}")
    if len(planes) == 1 and planes[0].file.thickness is None:
        raise MedmomError(f"{path}: a single slice without SliceThickness. Give the whole series.")
    for plane in planes:
        edges = np.linalg.norm(np.reshape(plane.frame.orientation or (), (2, 3)), axis=1)
        if not (np.abs(edges - 1) < 0.01).all():
            raise MedmomError(f"{path}: directions of length {spell_edges(edges)} in ImageOrientationPatient. {EXPORT}")
        if not np.isfinite((plane.frame.slope, plane.frame.intercept)).all() or plane.frame.slope == 0:
            raise MedmomError(
                f"{path}: RescaleSlope {plane.frame.slope:g} and RescaleIntercept {plane.frame.intercept:g}. {EXPORT}"
            )


def _check_alike(path: Path, planes: Sequence[Plane]) -> None:
    """Refuses planes that differ in direction, size or spacing."""
    orientations = np.array([plane.frame.orientation for plane in planes])
    is_other = np.abs(orientations - orientations[0]).max(axis=1) > MAX_COSINE
    if is_other.any():
        raise MedmomError(
            f"{path}: slices of mixed orientation, {int(is_other.sum())} of {len(planes)} run otherwise than the "
            "first. Give the slices of one volume, without localisers."
        )
    sizes = sorted({(plane.file.columns, plane.file.rows) for plane in planes})
    if len(sizes) > 1:
        text = " and ".join(f"{columns} x {rows}" for columns, rows in sizes[:2])
        raise MedmomError(f"{path}: slices of several sizes, such as {text} pixels. Give the slices of one volume.")
    spacings = np.array([plane.frame.spacing for plane in planes])
    if not np.allclose(spacings, spacings[0], rtol=1e-3, atol=0):
        other = spacings[int(np.abs(spacings - spacings[0]).max(axis=1).argmax())]
        raise MedmomError(
            f"{path}: slices of several pixel spacings, such as {spell_edges(spacings[0])} and {spell_edges(other)} "
            "mm. Give the slices of one volume."
        )


def _check_gaps(path: Path, heights: np.ndarray, places: np.ndarray) -> None:
    """Refuses planes in one place, missing planes and uneven gaps; heights ascend along the normal."""
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    same = gaps <= max(SHARE * usual, 1e-4)
    if same.any():
        raise MedmomError(
            f"{path}: {int(same.sum())} of {len(heights)} slices lie where another does, such as at "
            f"{_spell(places[int(same.argmax())])} mm: several times, echoes or copies in one series. Give one volume."
        )
    allowed = tolerance(usual)
    odd = np.abs(gaps - usual) > allowed
    if not odd.any():
        return
    counts = np.rint(gaps / usual).astype(int)
    if (counts[odd] >= 2).all() and (np.abs(gaps - counts * usual)[odd] <= allowed * counts[odd]).all():
        after, missing = np.flatnonzero(odd), int((counts[odd] - 1).sum())
        named = ", ".join(_spell(places[k]) for k in after[:3]) + (" and others" if len(after) > 3 else "")
        raise MedmomError(
            f"{path}: {missing} missing of {len(heights) + missing} slices, behind {named} mm "
            f"({gaps[after[0]]:.4g} mm to the next, where {usual:.4g} mm are usual). Copy the whole series."
        )
    raise MedmomError(
        f"{path}: irregular gaps between slices, {gaps.min():.4g} to {gaps.max():.4g} mm, where {usual:.4g} mm are "
        f"usual and {allowed:.2g} mm off is allowed. Resample the series to even slices, or export it anew."
    )


def _check_line(path: Path, places: np.ndarray, step: np.ndarray) -> None:
    off = np.linalg.norm(places - places[0] - np.arange(len(places))[:, None] * step, axis=1)
    # Gaps that are each within bounds may add up along the way.
    if off.max() > max(tolerance(float(np.linalg.norm(step))), 0.5 * LEAST_MM) * 2:
        raise MedmomError(
            f"{path}: a slice lies {off.max():.3g} mm beside the line of the others. Resample the series to a regular "
            "grid, or export it anew."
        )


def tolerance(gap: float) -> float:
    """How far a gap between slices may differ from the usual one, both in mm."""
    return min(max(SHARE * gap, LEAST_MM), MOST_SHARE * gap)


def _spell(place: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.5g}" for value in place) + ")"
