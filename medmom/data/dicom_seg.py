"""Label maps as DICOM Segmentation, in place on the series they were made from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmom import __version__
from medmom.data.atomic import atomic_file
from medmom.data.dicom_source import Source, read_source, share_plane, turn_to_slices
from medmom.data.foreign import import_reader
from medmom.data.snomed import PRIVATE_SCHEME, Code, Property, coded, dicom_text
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import IGNORE, Labels

SERIES_NUMBER = 1000

METHOD = Code("123110", "DCM", "Artificial Intelligence")


def write_dicom_seg(
    path: Path, label: np.ndarray, labels: Labels, geometry: Geometry, series: Sequence[Path], *, model: str
) -> None:
    """Writes a label map as one DICOM Segmentation (BINARY, one bit a voxel) that refers to a series.

    Every frame lies on the slice that it belongs to, found by its position. Classes that were found become segments,
    numbered from 1 in the order of ``labels``, with their codes (see ``medmom.data.snomed``), colours and names;
    voxels to be ignored belong to none. Where nothing was found every class becomes a segment with one empty frame,
    on the first file's slice: a Segmentation needs a segment and a frame, and the file says what was looked for.
    The series and instance get fresh identifiers, so that no two files are byte for byte the same.

    The file holds patient data as its source does: patient and study are copied from the series, as the standard
    asks. What the series leaves out stays empty; where it has no frame of reference, a fresh one is made up and the
    frames are tied to the slices by reference alone.

    Args:
        path: The file to write, whole or not at all.
        label: Stored values, shape (X, Y, Z), on ``geometry``.
        labels: Names, values and colours of the classes.
        geometry: The series' grid, its axes in any order and direction.
        series: The files of the slices in any order, or one multi-frame file.
        model: Checksum of the model; its start becomes the serial number of the device.

    Raises:
        MedmomError: highdicom is not installed, a file of the series cannot be read or does not say where it lies,
            the files are not one series, the label map lies on another grid, or the place cannot be written.
        ValueError: ``label`` has another shape than ``geometry``, or a value that is not in the table.

    Source:
        DICOM PS3.3 A.51, Segmentation IOD, and C.8.20.
    """
    library = import_reader("highdicom", path, "a DICOM Segmentation")
    if not series:
        raise MedmomError(f"{path}: a DICOM Segmentation lies on a DICOM series, and there is none. Write NIfTI.")
    if label.shape != geometry.shape:
        raise ValueError(f"a label map of shape {label.shape} does not lie on a grid of shape {geometry.shape}")
    with warnings.catch_warnings():
        # They quote values of the header, a patient's name among them.
        warnings.simplefilter("ignore")
        source = read_source(series)
        try:
            turned, places = turn_to_slices(label, geometry, source)
        except ValueError as error:
            raise MedmomError(
                f"{path}: the label map does not lie on the slices of {series[0]} ({error}). "
                "Give the series that the image was made from, with all its slices."
            ) from error
        frames, found = _numbered(turned, places, labels)
        try:
            content = _segmentation(library, frames, found, labels, source, model=model)
            with atomic_file(path) as stream:
                content.save_as(stream, enforce_file_format=True)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            # The library's own words may hold what the series says about the patient.
            raise MedmomError(
                f"{series[0]}: no DICOM Segmentation can be made of this series ({type(error).__name__} from its "
                "header). Check the series with a DICOM validator, or write NIfTI."
            ) from None


def _numbered(turned: np.ndarray, places: np.ndarray, labels: Labels) -> tuple[np.ndarray, list[str]]:
    """Gives the numbers of the segments, uint8 of shape (slices, rows, columns), and their names by number from 1."""
    frames = np.empty(turned.shape, dtype=np.uint8)
    counts = np.zeros(IGNORE + 1, dtype=np.int64)
    # Slice by slice: the table's lookup makes 8-byte copies of what it gets.
    for frame, place in zip(frames, places, strict=True):
        frame[...] = labels.to_channels(turned[place])
        counts += np.bincount(frame.ravel(), minlength=IGNORE + 1)
    found = [channel for channel in range(1, labels.num_channels) if counts[channel]]
    numbers = np.zeros(IGNORE + 1, dtype=np.uint8)
    numbers[found] = np.arange(1, len(found) + 1)
    for frame in frames:
        frame[...] = numbers[frame]
    return frames, [labels.names[channel] for channel in found]


def _segmentation(
    hd: Any, frames: np.ndarray, found: Sequence[str], labels: Labels, source: Source, *, model: str
) -> Any:
    share_plane(source)
    names, positions = list(found), None
    if not names:
        # highdicom would write an empty frame for every class and slice.
        names, frames = list(labels.foreground), frames[:1]
        positions = [hd.PlanePositionSequence("PATIENT", source.planes[0, :3, 3])]
    codes = [coded(name) for name in names]
    return hd.seg.Segmentation(
        source_images=source.headers,
        pixel_array=frames,
        plane_positions=positions,
        segmentation_type="BINARY",
        segment_descriptions=[
            _segment(hd, number, name, code, labels)
            for number, (name, code) in enumerate(zip(names, codes, strict=True), 1)
        ],
        series_instance_uid=hd.UID(),
        sop_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER,
        instance_number=1,
        series_description="medmom segmentation",
        content_label="SEGMENTATION",
        content_description="Segmentation by a network, not reviewed",
        manufacturer="medmom",
        manufacturer_model_name="medmom",
        software_versions=__version__,
        device_serial_number=dicom_text(model[:16]),
        coding_schemes=_own_scheme(hd) if any(code.type.scheme == PRIVATE_SCHEME for code in codes) else None,
        # Class names may be in any script; text of the source is written anew in it.
        specific_character_set="ISO_IR 192",
    )


def _segment(hd: Any, number: int, name: str, code: Property, labels: Labels) -> Any:
    family = hd.sr.CodedConcept(*METHOD)
    segment = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=dicom_text(name),
        segmented_property_category=hd.sr.CodedConcept(*code.category),
        segmented_property_type=hd.sr.CodedConcept(*code.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence("medmom", family, __version__),
        anatomic_regions=None if code.region is None else [hd.sr.CodedConcept(*code.region)],
        display_color=hd.color.CIELabColor.from_rgb(*labels.colour(name)),
    )
    if code.modifiers:
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = _concepts(hd, code.modifiers)
    if code.region_modifiers:
        segment.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = _concepts(hd, code.region_modifiers)
    return segment


def _concepts(hd: Any, codes: Sequence[Code]) -> list[Any]:
    return [hd.sr.CodedConcept(*code) for code in codes]


def _own_scheme(hd: Any) -> list[Any]:
    return [hd.coding_schemes.CodingSchemeIdentificationItem(PRIVATE_SCHEME, name="Class names of medmom models")]
