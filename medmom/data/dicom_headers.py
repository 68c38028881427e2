"""The header of one DICOM file: the few tags that tell where its pixels lie, and none that tell of a patient."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmom.data.foreign import import_reader
from medmom.data.header import CONVERT
from medmom.errors import MedmomError

MARK_PLACE, MARK = 128, b"DICM"

SUFFIXES = (".dcm", ".dicom", ".ima")

TAGS = (
    *("SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "Modality", "ImageType", "NumberOfFrames"),
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("SliceThickness", "SpacingBetweenSlices", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
"""All that is ever read of a header; names, numbers and dates of patients are not among them."""

DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
RLE = "1.2.840.10008.1.2.5"

# A constant image of 2048 x 2048 still fits in a file with a header.
MOST_PER_BYTE = 2**16
# Two bytes of a run stand for 128.
MOST_PER_BYTE_RLE = 64

KINDS = {
    "SEG": "segmentation (SEG)",
    "SR": "structured report (SR)",
    "RTSTRUCT": "set of contours (RTSTRUCT)",
    "RTDOSE": "dose (RTDOSE)",
    "RTPLAN": "plan (RTPLAN)",
    "PR": "presentation state (PR)",
    "KO": "key object selection (KO)",
    "REG": "registration (REG)",
}

# What pydicom raises on damaged bytes; it has no class of its own for most.
DAMAGED = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, AssertionError),
    *(struct.error, RuntimeError, MemoryError),
)


@dataclass(frozen=True)
class Frame:
    """One plane of pixels.

    Attributes:
        position: Centre of the first pixel, LPS+, in mm; None where the header lacks it, as for the next two.
        orientation: Directions of a row and of a column, six cosines.
        spacing: Between rows and between columns, in mm.
        slope: From stored value to intensity.
        intercept: As ``slope``.
    """

    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float
    intercept: float


@dataclass(frozen=True)
class FileHeader:
    """What is known of one file.

    Attributes:
        path: The file.
        series: UID of its series; empty where the header has none.
        number: Of the series, as text; empty without one.
        kind: ``"image"``, ``"localiser"`` or what else it is, in words.
        columns: Of pixels.
        rows: Of pixels.
        colours: Why its pixels are not one grey value each, of which more is brighter, in words; else empty.
        bits: Allocated for a pixel.
        syntax: UID of the transfer syntax.
        thickness: Distance between slices, else their thickness, in mm; None where the header has neither.
        frames: The planes, in the order of the file.
    """

    path: Path
    series: str
    number: str
    kind: str
    columns: int
    rows: int
    colours: str
    bits: int
    syntax: str
    thickness: float | None
    frames: tuple[Frame, ...]


def has_mark(path: Path) -> bool:
    """Whether a file has the mark of DICOM at byte 128; no for what cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(MARK_PLACE + len(MARK))[MARK_PLACE:] == MARK
    except (OSError, ValueError):
        return False


def read_header(path: Path) -> FileHeader:
    """Reads the header of a file; pixels stay on disk.

    Raises:
        MedmomError: The file cannot be read, is no DICOM file or damaged, or announces more pixels than it can hold.
    """
    pydicom = import_reader("pydicom", path, "a DICOM file")
    try:
        if not has_mark(path):
            path.open("rb").close()
            raise MedmomError(f"{path}: not a DICOM file, without DICM at byte 128. Copy it again, or take it away.")
        # Remarks of the reader on odd values help nobody here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            syntax = str(pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID", ""))
            if syntax == DEFLATED:
                raise MedmomError(f"{path}: a deflated DICOM file. Convert it to an uncompressed transfer syntax.")
            found = _header(path, pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS)), syntax)
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check path, permissions and disk.") from error
    except (*DAMAGED, pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException) as error:
        # The error's own words may quote a value.
        raise MedmomError(
            f"{path}: a DICOM file with a damaged header ({type(error).__name__}). Copy it again. {CONVERT}"
        ) from None
    _check_promise(found)
    return found


def _header(path: Path, item: Any, syntax: str) -> FileHeader:
    columns, rows = int(item.get("Columns") or 0), int(item.get("Rows") or 0)
    # Where names were taken out, the class may be gone too; where a file was cut short, so are the pixels' tags.
    named = item.get("SOPClassUID")
    if not columns * rows and (named is None or "Image Storage" in str(getattr(named, "name", ""))):
        raise MedmomError(f"{path}: a DICOM file without the size of its pixels (Rows, Columns). {CONVERT}")
    kind = _kind(item) if columns > 0 and rows > 0 else KINDS.get(str(item.get("Modality")), "object without pixels")
    return FileHeader(
        path=path,
        series=str(item.get("SeriesInstanceUID") or ""),
        number=str(item.get("SeriesNumber") or ""),
        kind=kind,
        columns=columns,
        rows=rows,
        colours=_colours(item),
        bits=int(item.get("BitsAllocated") or 0),
        syntax=syntax,
        thickness=_thickness(item),
        frames=_frames(path, item) if kind in ("image", "localiser") else (),
    )


def _kind(item: Any) -> str:
    modality = str(item.get("Modality"))
    if modality in KINDS:
        return KINDS[modality]
    words = item.get("ImageType") or ()
    words = (words,) if isinstance(words, str) else words
    return "localiser" if any("LOCALIZER" in str(word).upper() for word in words) else "image"


def _colours(item: Any) -> str:
    samples, meaning = int(item.get("SamplesPerPixel") or 1), str(item.get("PhotometricInterpretation") or "")
    if samples != 1 or not meaning.startswith("MONOCHROME"):
        return f"are colours ({meaning or samples})"
    return "" if meaning == "MONOCHROME2" else f"are brighter the lower they are ({meaning})"


def _thickness(item: Any) -> float | None:
    places = [item]
    for group in list(item.get("SharedFunctionalGroupsSequence") or ())[:1]:
        places += list(group.get("PixelMeasuresSequence") or ())[:1]
    found = (_number(place.get(name)) for name in ("SpacingBetweenSlices", "SliceThickness") for place in places)
    return next((number for number in found if number), None)


def _frames(path: Path, item: Any) -> tuple[Frame, ...]:
    """The planes of a file: one of its own, or as many as it has groups of tags."""
    count = int(item.get("NumberOfFrames") or 1)
    if not 1 <= count <= path.stat().st_size:
        raise ValueError("a frame takes a byte at least")
    shared = list(item.get("SharedFunctionalGroupsSequence") or ())[:1]
    each = list(item.get("PerFrameFunctionalGroupsSequence") or ())
    if not each:
        return (_frame((item,)),) * count
    if len(each) != count:
        raise ValueError("as many groups of tags as frames are needed")
    return tuple(_frame((group, *shared), item) for group in each)


def _frame(groups: Sequence[Any], item: Any = None) -> Frame:
    """Reads a plane from its groups of tags, of which the first that has one counts; else from the file's own."""

    def find(sequence: str, keyword: str) -> Any:
        for group in groups:
            inner = next(iter(group.get(sequence) or ()), None) if item is not None else group
            if inner is not None and inner.get(keyword) is not None:
                return inner.get(keyword)
        # Not by the standard, but files are scaled so, and GDCM takes it.
        return item.get(keyword) if item is not None and keyword.startswith("Rescale") else None

    slope, intercept = (find("PixelValueTransformationSequence", f"Rescale{k}") for k in ("Slope", "Intercept"))
    return Frame(
        position=_numbers(find("PlanePositionSequence", "ImagePositionPatient"), 3),
        orientation=_numbers(find("PlaneOrientationSequence", "ImageOrientationPatient"), 6),
        spacing=_numbers(find("PixelMeasuresSequence", "PixelSpacing"), 2),
        slope=1.0 if slope in (None, "") else float(slope),
        intercept=0.0 if intercept in (None, "") else float(intercept),
    )


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """So many finite numbers; None for anything else."""
    if value is None or isinstance(value, str) or not hasattr(value, "__len__") or len(value) != count:
        return None
    numbers = tuple(float(part) for part in value)
    return numbers if all(map(math.isfinite, numbers)) else None


def _number(value: Any) -> float | None:
    number = None if value in (None, "") else abs(float(value))
    return number if number is not None and math.isfinite(number) and number > 0 else None


def _check_promise(found: FileHeader) -> None:
    """Turns a file away that announces more than it can hold, before memory is asked for."""
    most = 1 if found.syntax in NATIVE else MOST_PER_BYTE_RLE if found.syntax == RLE else MOST_PER_BYTE
    promised = found.columns * found.rows * len(found.frames) * max(found.bits // 8, 1)
    if promised > most * found.path.stat().st_size:
        raise MedmomError(
            f"{found.path}: the file ends before the {promised} bytes of pixels that its header announces. "
            "Copy it again from its source."
        )
