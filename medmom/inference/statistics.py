"""What is measured of each structure of a label map: volume, intensities, place, and whether the scan cuts it off."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmom.data.files import Volume, write_json, write_text
from medmom.inference.labelled import LabelledVoxels, counted
from medmom.labels import Labels

JSON_FILE, CSV_FILE = "statistics.json", "statistics.csv"

SIDES = {"R": "right", "L": "left", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}
OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
PICTURE_SIDES = (("left", "right"), ("top", "bottom"), ("", ""))

QUANTILES = {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
INTENSITIES = ("mean", "std", "min", *QUANTILES, "max")

MAX_BINS = 1 << 23
"""Largest table of intensities by class; beyond it values are gathered and sorted."""

MAX_GATHERED = 1 << 24
"""Values gathered at once, unless a single class has more."""

CHUNK = 1 << 20
"""Values summed at once."""


def label_statistics(
    label: np.ndarray, image: Volume, labels: Labels, *, confidence: Mapping[str, float] | None = None
) -> dict[str, dict[str, Any]]:
    """Measures each foreground class of a label map.

    For each class:
        * ``voxels``: their number.
        * ``volume_ml``: voxels times the determinant of the affine; None for a picture, which has ``area_pixels``.
        * ``centre_mm``: mean of the voxel centres in world coordinates (RAS+); None for a picture, which has
          ``centre_pixels``, counted to the right and down.
        * ``touches_border``, ``borders``: whether a voxel lies in the first or last plane of an axis with more than
          one voxel, so that the structure may be cut off, and at which sides (``superior``, ``left``, ...; the
          closest ones where the grid is oblique; ``left``, ``right``, ``top``, ``bottom`` of a picture).
        * ``mean_confidence``: what ``confidence`` says.
        * ``intensity``: for each channel, in the image's own units: ``mean``, ``std`` (of all voxels, not of a
          sample), ``min``, ``p05``, ``p25``, ``median``, ``p75``, ``p95``, ``max``. Quantiles are exact: linear
          between the two nearest voxels. Images of 16-bit integers are counted in a table; of others up to 16
          million values (or one class, if that has more) are held at once.

    Of an absent class ``voxels`` is 0 and all else None.

    Args:
        label: Stored values, shape (X, Y, Z).
        image: The image on the same grid, its array (C, X, Y, Z) of any real type.
        labels: The classes; voxels with the ignore value are of none.
        confidence: Mean probability by class name; nan and missing names become None.

    Returns:
        Plain types by class name, in the order of the table.

    Raises:
        ValueError: ``label`` has another shape than the grid, or a value that ``labels`` does not name.
    """
    if label.shape != image.geometry.shape:
        raise ValueError(f"a label map {label.shape} does not lie on a grid {image.geometry.shape}")
    voxels = LabelledVoxels(label, labels)
    profiles = voxels.profiles()
    intensity = [_intensities(voxels, channel, profiles[0].sum(axis=1)) for channel in image.array]
    found = {}
    for channel, name in enumerate(labels.foreground, start=1):
        rows = [profile[channel] for profile in profiles]
        place = _place(rows, image) if rows[0].any() else _nowhere(image)
        sure = None if confidence is None else confidence.get(name)
        place["mean_confidence"] = None if sure is None or not rows[0].any() or math.isnan(sure) else float(sure)
        place["intensity"] = [by_class[channel] for by_class in intensity] if rows[0].any() else None
        found[name] = place
    return found


def write_statistics(folder: str | Path, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Writes ``statistics.json`` and ``statistics.csv``, each whole or not at all.

    The JSON file holds what ``label_statistics`` gave. The CSV file has one row a case and class and columns for
    all of it, empty where there is no value; of several channels ``mean_0``, ``mean_1`` and so on.

    Args:
        folder: Where; made if missing.
        rows: What ``label_statistics`` gave, by case.

    Raises:
        MedmomError: The place cannot be written.
    """
    folder = Path(folder)
    write_json(folder / JSON_FILE, rows)
    found = [statistics for classes in rows.values() for statistics in classes.values()]
    num_channels = max((len(statistics["intensity"] or ()) for statistics in found), default=1) or 1
    has_pictures = any("area_pixels" in statistics for statistics in found)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _columns(num_channels, has_pictures=has_pictures), restval="", lineterminator="\n")
    writer.writeheader()
    for case, classes in rows.items():
        for name, statistics in classes.items():
            writer.writerow({"case": case, "class": name} | _cells(statistics, num_channels))
    write_text(folder / CSV_FILE, stream.getvalue())


def _place(rows: Sequence[np.ndarray], image: Volume) -> dict[str, Any]:
    """Size, centre and borders of a class from its voxels in each plane."""
    geometry, voxels = image.geometry, int(rows[0].sum())
    centre = np.array([np.arange(len(row)) @ row / voxels for row in rows])
    borders = [
        side
        for row, sides in zip(rows, _sides(image), strict=True)
        for side, count in zip(sides, (row[0], row[-1]), strict=True)
        if len(row) > 1 and count
    ]
    volume = voxels * abs(float(np.linalg.det(geometry.affine[:3, :3]))) / 1000
    world = geometry.affine[:3, :3] @ centre + geometry.affine[:3, 3]
    sized: dict[str, Any] = {"voxels": voxels, "volume_ml": volume, "centre_mm": world.tolist()}
    if image.is_picture:
        sized |= {"volume_ml": None, "area_pixels": voxels, "centre_mm": None, "centre_pixels": centre[:2].tolist()}
    return {**sized, "touches_border": bool(borders), "borders": borders}


def _nowhere(image: Volume) -> dict[str, Any]:
    names = ("area_pixels", "centre_pixels") if image.is_picture else ()
    return {"voxels": 0} | dict.fromkeys(("volume_ml", "centre_mm", *names, "touches_border", "borders"))


def _sides(image: Volume) -> Sequence[tuple[str, str]]:
    """What lies at the start and at the end of each axis."""
    if image.is_picture:
        return PICTURE_SIDES
    return [(SIDES[OPPOSITE[letter]], SIDES[letter]) for letter in image.geometry.orientation]


def _intensities(voxels: LabelledVoxels, channel: np.ndarray, counts: np.ndarray) -> dict[int, dict[str, float]]:
    """Intensities of every class that is there, by its channel index."""
    if channel.dtype.kind in "iu":
        low, high = int(channel.min()), int(channel.max())
        if len(counts) * (high - low + 1) <= MAX_BINS:
            return _tabulated(voxels, channel, low, high - low + 1)
    return _gathered(voxels, channel, counts)


def _tabulated(voxels: LabelledVoxels, channel: np.ndarray, low: int, num_values: int) -> dict[int, dict[str, float]]:
    """Counts how often each class has each value."""
    table = np.zeros((voxels.num_classes, num_values), dtype=np.int64)
    for place, index, classes in voxels.slabs():
        values = voxels.values(channel, place, index).astype(np.intp) - low
        table += counted(classes * num_values + values, table.shape)
    found = {}
    for each in np.flatnonzero(table.any(axis=1)).tolist():
        present = np.flatnonzero(table[each])
        found[each] = _described(present + low, table[each, present])
    return found


def _gathered(voxels: LabelledVoxels, channel: np.ndarray, counts: np.ndarray) -> dict[int, dict[str, float]]:
    """Gathers the values of a few classes at a time."""
    found = {}
    for group in _groups(counts):
        wanted = np.zeros(len(counts), dtype=bool)
        wanted[group] = True
        values = {each: np.empty(counts[each], dtype=channel.dtype) for each in group}
        filled = dict.fromkeys(group, 0)
        for place, index, classes in voxels.slabs(wanted):
            part = voxels.values(channel, place, index)[np.argsort(classes, kind="stable")]
            start = 0
            for each, count in zip(*np.unique(classes, return_counts=True), strict=True):
                values[each][filled[each] : filled[each] + count] = part[start : start + count]
                filled[each], start = filled[each] + count, start + count
        for each in group:
            gathered = values.pop(each)
            gathered.sort()
            found[each] = _described(gathered)
    return found


def _groups(counts: np.ndarray) -> Iterator[list[int]]:
    group: list[int] = []
    for each in np.flatnonzero(counts).tolist():
        if group and counts[group].sum() + counts[each] > MAX_GATHERED:
            yield group
            group = []
        group.append(each)
    if group:
        yield group


def _described(values: np.ndarray, counts: np.ndarray | None = None) -> dict[str, float]:
    """Describes values in rising order, each there ``counts`` times (None: once)."""
    ends = None if counts is None else np.cumsum(counts)
    size = len(values) if ends is None else int(ends[-1])

    def ranked(rank: int) -> float:
        return float(values[rank if ends is None else np.searchsorted(ends, rank, side="right")])

    def quantile(share: float) -> float:
        low = math.floor(share * (size - 1))
        part = share * (size - 1) - low
        return ranked(low) if part == 0 else ranked(low) + part * (ranked(low + 1) - ranked(low))

    mean = _total(values, counts, 0.0, 1) / size
    std = math.sqrt(_total(values, counts, mean, 2) / size)
    quantiles = {name: quantile(share) for name, share in QUANTILES.items()}
    return {"mean": mean, "std": std, "min": ranked(0), **quantiles, "max": ranked(size - 1)}


def _total(values: np.ndarray, counts: np.ndarray | None, centre: float, power: int) -> float:
    """Sums powers of the distance from ``centre`` in float64, without a float64 copy of all values."""
    total = 0.0
    for start in range(0, len(values), CHUNK):
        part = (values[start : start + CHUNK].astype(np.float64) - centre) ** power
        total += float(part.sum() if counts is None else part @ counts[start : start + CHUNK])
    return total


def _columns(num_channels: int, *, has_pictures: bool) -> list[str]:
    sizes = ["voxels", "volume_ml", *(["area_pixels"] if has_pictures else [])]
    intensities = [_numbered(name, k, num_channels) for k in range(num_channels) for name in INTENSITIES]
    centre = [f"centre_{axis}_mm" for axis in "xyz"] + (["centre_x_pixels", "centre_y_pixels"] if has_pictures else [])
    return ["case", "class", *sizes, *intensities, "touches_border", "borders", "mean_confidence", *centre]


def _numbered(name: str, channel: int, num_channels: int) -> str:
    return name if num_channels == 1 else f"{name}_{channel}"


def _cells(statistics: Mapping[str, Any], num_channels: int) -> dict[str, str]:
    """The row of a class, as text; what has no value has no cell."""
    cells = {name: statistics.get(name) for name in ("voxels", "volume_ml", "area_pixels", "mean_confidence")}
    for k, described in enumerate(statistics["intensity"] or ()):
        cells |= {_numbered(name, k, num_channels): described[name] for name in INTENSITIES}
    for unit in ("mm", "pixels"):
        for axis, value in zip("xyz", statistics.get(f"centre_{unit}") or (), strict=False):
            cells[f"centre_{axis}_{unit}"] = value
    written = {
        name: str(value) if isinstance(value, int) else f"{value:.9g}"
        for name, value in cells.items()
        if value is not None
    }
    if statistics["touches_border"] is not None:
        written |= {
            "touches_border": str(statistics["touches_border"]).lower(),
            "borders": ";".join(statistics["borders"]),
        }
    return written
