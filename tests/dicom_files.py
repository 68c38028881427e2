"""Synthetic DICOM series for the tests of several rooms; nobody is shown in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

PATIENT = "SECRET^NOBODY"
PATIENT_ID = "SECRET-4711"
"""Must appear in no message, log or file that medmom writes."""

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def affine_of(orientation: str, spacing: tuple[float, float, float] = (1.0, 1.5, 2.0), tilt: float = 0.0) -> np.ndarray:
    """An affine (RAS+, mm) whose axes run along ``orientation``, turned by ``tilt`` degrees about a skew axis."""
    axes = nib.orientations.axcodes2ornt(orientation)
    matrix = np.zeros((3, 3))
    for column, (axis, sign) in enumerate(axes):
        matrix[int(axis), column] = sign
    skew = np.array([1.0, 2.0, 3.0]) / np.sqrt(14.0)
    cross = np.array([[0, -skew[2], skew[1]], [skew[2], 0, -skew[0]], [-skew[1], skew[0], 0]])
    angle = np.radians(tilt)
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    affine = np.eye(4)
    affine[:3, :3] = turn @ matrix @ np.diag(spacing)
    affine[:3, 3] = (-31.25, 12.5, -140.75)
    return affine


def example_voxels(shape: tuple[int, int, int] = (10, 12, 6), seed: int = 0) -> np.ndarray:
    """Voxels (X, Y, Z), int16, of which no two slices are alike."""
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)


def write_series(
    folder: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    *,
    modality: str = "CT",
    number: int = 1,
    slope: float = 1.0,
    intercept: float = 0.0,
    start: int = 0,
    study: str | None = None,
    change: Callable[[int, Dataset], None] | None = None,
) -> list[Path]:
    """Writes a series of single slices.

    Args:
        folder: Where; it is made.
        voxels: Stored values, shape (X, Y, Z), int16 or uint16; an intensity is ``slope * stored + intercept``.
        affine: Voxel-to-world, RAS+, mm, of any orientation; each slice is a plane of the first two axes.
        modality: ``"CT"`` or ``"MR"``.
        number: Of the series.
        slope: Written to each slice, where it or ``intercept`` asks for a change.
        intercept: As ``slope``.
        start: Number of the first file's name.
        study: UID of the study; None: a new one.
        change: Called with the number of a slice and its dataset before it is written.

    Returns:
        The files in the order of the third axis. Their names run the other way, and so do their instance numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = (study or generate_uid(), generate_uid(), generate_uid())
    lps, count, files = TO_LPS @ affine, voxels.shape[2], []
    for k in range(count):
        item = _common(*shared, modality=modality, number=number)
        item.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
        item.InstanceNumber = count - k
        item.ImageOrientationPatient = orientation_of(lps)
        item.PixelSpacing = [float(e) for e in np.linalg.norm(lps[:3, :2], axis=0)[::-1]]
        item.SliceThickness = float(np.linalg.norm(lps[:3, 2]))
        item.ImagePositionPatient = position_of(lps, k)
        if modality == "CT" or (slope, intercept) != (1.0, 0.0):
            item.RescaleSlope, item.RescaleIntercept = slope, intercept
        set_pixels(item, voxels[..., k])
        if change is not None:
            change(k, item)
        files.append(folder / f"slice{start + count - k:03d}.dcm")
        save(item, files[-1])
    return files


def write_multiframe(
    path: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    *,
    slopes: tuple[float, ...] = (),
    order: tuple[int, ...] = (),
    change: Callable[[Dataset], None] | None = None,
) -> Path:
    """Writes an Enhanced MR file of as many frames as ``voxels`` (X, Y, Z) has slices.

    Args:
        path: The file.
        voxels: As in ``write_series``.
        affine: As in ``write_series``.
        slopes: Rescale slope of each slice; empty: none is written.
        order: Slices in the order of the frames; empty: as they are.
        change: Called with the dataset before it is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lps = TO_LPS @ affine
    order = order or tuple(range(voxels.shape[2]))
    item = _common(generate_uid(), generate_uid(), generate_uid(), modality="MR", number=1)
    item.SOPClassUID = EnhancedMRImageStorage
    item.InstanceNumber = 1
    measures, plane, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [float(e) for e in np.linalg.norm(lps[:3, :2], axis=0)[::-1]]
    measures.SliceThickness = float(np.linalg.norm(lps[:3, 2]))
    plane.ImageOrientationPatient = orientation_of(lps)
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([plane])
    item.SharedFunctionalGroupsSequence = Sequence([shared])
    item.PerFrameFunctionalGroupsSequence = Sequence([_frame(lps, k, slopes) for k in order])
    set_pixels(item, np.concatenate([voxels[..., k] for k in order], axis=1))
    item.NumberOfFrames, item.Rows = len(order), voxels.shape[1]
    if change is not None:
        change(item)
    save(item, path)
    return path


def set_pixels(item: Dataset, plane: np.ndarray) -> None:
    """Puts a slice (X, Y) of whole numbers of 8 or 16 bits into a dataset."""
    item.Columns, item.Rows = plane.shape
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated = item.BitsStored = 8 * plane.itemsize
    item.HighBit = item.BitsStored - 1
    item.PixelRepresentation = int(plane.dtype.kind == "i")
    item.PixelData = np.ascontiguousarray(plane.T).tobytes()
    item["PixelData"].VR = "OB" if plane.itemsize == 1 else "OW"


def save(item: Dataset, path: Path) -> None:
    """Writes a dataset as a DICOM file."""
    item.file_meta.MediaStorageSOPClassUID = item.SOPClassUID
    item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID
    item.save_as(path, enforce_file_format=True)


def orientation_of(lps: np.ndarray) -> list[float]:
    """ImageOrientationPatient of an affine in LPS+."""
    unit = lps[:3, :2] / np.linalg.norm(lps[:3, :2], axis=0)
    return [round(float(value), 10) for value in unit.T.ravel()]


def position_of(lps: np.ndarray, k: int) -> list[float]:
    """ImagePositionPatient of slice ``k`` of an affine in LPS+."""
    return [round(float(value), 8) for value in lps[:3, 3] + k * lps[:3, 2]]


def _frame(lps: np.ndarray, k: int, slopes: tuple[float, ...]) -> Dataset:
    frame, place = Dataset(), Dataset()
    place.ImagePositionPatient = position_of(lps, k)
    frame.PlanePositionSequence = Sequence([place])
    if slopes:
        transform = Dataset()
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = slopes[k], 0.0, "US"
        frame.PixelValueTransformationSequence = Sequence([transform])
    return frame


def _common(study: str, series: str, frame: str, *, modality: str, number: int) -> Dataset:
    item = Dataset()
    item.file_meta = FileMetaDataset()
    item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item.PatientName, item.PatientID, item.PatientBirthDate, item.PatientSex = PATIENT, PATIENT_ID, "19000101", "O"
    item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID = study, series, frame
    item.SOPInstanceUID = generate_uid()
    item.StudyDate, item.StudyTime, item.StudyID, item.AccessionNumber = "20200101", "120000", "1", ""
    item.SeriesDate, item.SeriesTime, item.ContentDate, item.ContentTime = "20200101", "120000", "20200101", "120000"
    item.ReferringPhysicianName, item.Manufacturer, item.ManufacturerModelName = "", "medmom tests", "none"
    item.DeviceSerialNumber, item.SoftwareVersions, item.PositionReferenceIndicator = "0", "0", ""
    item.Modality, item.SeriesNumber = modality, number
    item.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    return item
