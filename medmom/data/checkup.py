"""One case looked at before training: its numbers and its faults."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from medmom.data.casefiles import CaseFiles, CaseFolder
from medmom.data.files import Volume, check_same_grid, read_images, read_label
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import Labels

PERCENTILES = (0.5, 50.0, 99.5)
INTENSITY_SAMPLE = 1_000_000
FOREGROUND_SAMPLE = 10_000

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Row:
    """One readable image.

    Attributes:
        case: Name of the case.
        group: Its group.
        geometry: Its grid.
        intensities: For each channel lowest value, 0.5 percentile, median, 99.5 percentile, highest value; the
            percentiles of large images are those of a million voxels.
        volumes: Volume in ml of each annotated class, of a picture its share of the pixels; None without a readable
            label map.
        foreground: Intensities of some labelled voxels in the first channel, shape (n,).
        bits: Bits of a channel in the file of a picture; None for a volume.
    """

    case: str
    group: str
    geometry: Geometry
    intensities: tuple[tuple[float, ...], ...]
    volumes: Mapping[str, float] | None
    foreground: np.ndarray
    bits: int | None = None


def check_case(
    case: CaseFiles, listed: CaseFolder, first: dict[bytes, Path], *, needs_label: bool
) -> tuple[Row | None, list[str]]:
    """Reads image and label map of a case once.

    Args:
        case: Its files.
        listed: The folder it belongs to.
        first: Remembers the file of each image seen so far, by content; is added to.
        needs_label: Whether a missing label map is a fault.

    Returns:
        The row, None where the image cannot be read, and a line for each fault.
    """
    faults: list[str] = []
    image, label = _try(lambda: read_images(case.images), faults), None
    if case.label:
        path = case.label
        label = _try(lambda: read_label(path, listed.labels), faults)
    elif needs_label:
        faults.append(f"{case.images[0]}: no label map of this case. Add it, or take the image out.")
    if image:
        faults += _image_faults(image, listed.channels, first)
    counts: dict[int, int] = {}
    if label:
        counts = count_values(label.array)
        faults += _label_faults(label, counts, case, listed.labels)
    if image and label:
        _try(lambda: check_same_grid(image, label), faults)
    if image is None:
        return None, faults
    volumes = None
    if label:
        unit = label.array.size if image.is_picture else 1 / _voxel_ml(image.geometry)
        volumes = {name: counts.get(listed.labels.value(name), 0) / unit for name in _annotated(case, listed.labels)}
    foreground = _foreground(image, label, volumes, listed.labels)
    intensities = tuple(_intensities(channel) for channel in image.array)
    return Row(case.name, case.group, image.geometry, intensities, volumes, foreground, image.bits), faults


def _try(action: Callable[[], T], faults: list[str]) -> T | None:
    try:
        return action()
    except MedmomError as error:
        faults.append(str(error))
        return None


def _image_faults(image: Volume, channels: Sequence[str], first: dict[bytes, Path]) -> list[str]:
    faults = []
    if image.is_picture and len(image.array) != len(channels):
        fact, mend = ("grey", "rgb") if len(image.array) == 1 else ("in colour", "grey")
        faults.append(
            f"{image.path}: the picture is {fact}, but the channels are {', '.join(channels)}. Set preparation.colour "
            f"to {mend}, or convert it."
        )
    elif len(image.array) != len(channels):
        faults.append(
            f"{image.path}: {len(image.array)} channels, but dataset.json names {len(channels)}: "
            f"{', '.join(channels)}. Correct channel_names or the image."
        )
    digest = hashlib.blake2b(repr(image.array.shape).encode(), digest_size=16)
    digest.update(image.array.data)
    twin = first.setdefault(digest.digest(), image.path)
    if twin != image.path:
        faults.append(f"{image.path}: the same image as {twin}. Keep one of the two.")
    return faults


def _label_faults(label: Volume, counts: Mapping[int, int], case: CaseFiles, labels: Labels) -> list[str]:
    known = {*labels.values, labels.ignore}
    unknown = sorted(value for value in counts if value not in known)
    faults = []
    if unknown:
        shown = ", ".join(f"{value} ({counts[value]} voxels)" for value in unknown[:5]) + (
            ", ..." if unknown[5:] else ""
        )
        faults.append(
            f"{label.path}: label value {shown} is not among {', '.join(map(str, labels.values))} of dataset.json. "
            "Add the class or correct the label map."
        )
    annotated = _annotated(case, labels)
    if not any(counts.get(labels.value(name)) for name in annotated):
        names = ", ".join(annotated) or "none is"
        faults.append(
            f"{label.path}: no voxel of any annotated class ({names}). Correct the label map or leave the case out."
        )
    return faults


def count_values(array: np.ndarray) -> dict[int, int]:
    """Counts how often each value occurs in an integer array, slice by slice to save memory."""
    low, high = int(array.min()), int(array.max())
    if high - low >= 1 << 16:
        values, counts = np.unique(array, return_counts=True)
        return {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    total = np.zeros(high - low + 1, dtype=np.int64)
    for part in array:
        total += np.bincount(part.ravel().astype(np.int64) - low, minlength=len(total))
    return {low + int(value): int(total[value]) for value in np.flatnonzero(total)}


def _voxel_ml(geometry: Geometry) -> float:
    return abs(float(np.linalg.det(geometry.affine[:3, :3]))) / 1000


def _annotated(case: CaseFiles, labels: Labels) -> tuple[str, ...]:
    return labels.foreground if case.annotated is None else case.annotated


def _foreground(image: Volume, label: Volume | None, volumes: Mapping[str, float] | None, labels: Labels) -> np.ndarray:
    """Draws intensities of annotated voxels from the first channel; none where the shapes differ."""
    if label is None or volumes is None or label.array.shape != image.geometry.shape:
        return np.zeros(0, dtype=np.float32)
    inside = image.array[0][np.isin(label.array, [labels.value(name) for name in volumes])]
    if len(inside) <= FOREGROUND_SAMPLE:
        return np.asarray(inside)
    return np.asarray(np.random.default_rng(0).choice(inside, FOREGROUND_SAMPLE, replace=False))


def _intensities(channel: np.ndarray) -> tuple[float, ...]:
    values = channel.ravel()
    if values.size > INTENSITY_SAMPLE:
        values = values[np.random.default_rng(0).integers(values.size, size=INTENSITY_SAMPLE)]
    low, median, high = np.percentile(values, PERCENTILES)
    return (float(channel.min()), float(low), float(median), float(high), float(channel.max()))
