from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, Normal, Stroke, withStroke
from scipy import ndimage

from medmom.data.files import Volume, check_same_grid, read_image, read_label
from medmom.errors import MedmomError
from medmom.labels import Labels

MARGIN_MM = 20.0
NEAR_MM = 10.0
WIDTH_INCHES, MAX_HEIGHT_INCHES, GAP_INCHES, DPI = 11.0, 5.4, 0.12, 150
BACKGROUND = "#0b0d11"
HALO: list[AbstractPathEffect] = [withStroke(linewidth=2.5, foreground="black")]

# Name, the axis looked along (RAS), and the letters at the left, right, top and bottom edge.
PLANES = (("axial", 2, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 0, "APSI"))


@dataclass(frozen=True, eq=False)
class Plane:
    """One slice as it is shown: rows from the top, columns from the left.

    Attributes:
        name: Of the plane.
        letters: Directions at the left, right, top and bottom edge.
        image: Grey values, shape (rows, columns).
        prediction: Channel indices of the same shape.
        reference: Channel indices of the same shape.
        size: Width and height in mm.
    """

    name: str
    letters: str
    image: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray
    size: tuple[float, float]


@dataclass(frozen=True)
class Shown:
    """What of a label map is shown, and how it is stored.

    Attributes:
        labels: Table by which predictions are stored; gives channels and colours.
        reference_labels: Table by which references are stored.
        classes: Names of the classes to show; others are not looked at in this case.
    """

    labels: Labels
    reference_labels: Labels
    classes: tuple[str, ...]


def read_planes(image: Path, prediction: Path, reference: Path, shown: Shown) -> list[Plane]:
    """Cuts the three planes of a case that show most of its structures, in radiological convention.

    Each plane lies where the classes together have most of their area, each class weighing the same,
    and is cut to the structures and what surrounds them. Of several channels the first is shown.

    Args:
        image: The scan.
        prediction: Label map, stored values; those of no shown class count as background.
        reference: Label map, the same.
        shown: The classes.

    Returns:
        Axial, coronal and sagittal plane; of a single slice, that slice.

    Raises:
        MedmomError: A file cannot be read, lies on another grid, or has no plane.
    """
    scan, found, wanted = read_image(image), read_label(prediction), read_label(reference)
    check_same_grid(scan, found)
    check_same_grid(scan, wanted)
    grey = _to_ras(scan, scan.array[0])
    predicted = _to_ras(found, _channels(found.array, shown.labels, shown))
    drawn = _to_ras(wanted, _channels(wanted.array, shown.reference_labels, shown))
    planes = cut_planes(grey, predicted, drawn, scan.geometry.reoriented("RAS").spacing)
    if not planes:
        raise MedmomError(
            f"{image}: has no plane to show, its shape is {grey.shape}. Leave the case without a picture."
        )
    return planes


def cut_planes(
    image: np.ndarray, prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> list[Plane]:
    """Cuts the planes of arrays in RAS axis order, as ``read_planes`` does.

    Args:
        image: Grey values, shape (X, Y, Z).
        prediction: Channel indices of the same shape.
        reference: Channel indices of the same shape.
        spacing: Voxel edges in mm.

    Returns:
        Planes of more than one row and column; none where there is no such plane.
    """
    box = _shown_box((prediction > 0) | (reference > 0), spacing)
    centre = _centre(prediction, reference)
    planes = []
    for name, axis, letters in PLANES:
        place = tuple(centre[axis] if a == axis else box[a] for a in range(3))
        image_cut, found_cut, wanted_cut = (_turned(array[place]) for array in (image, prediction, reference))
        across, down = (spacing[a] for a in range(3) if a != axis)
        rows, columns = image_cut.shape
        if min(rows, columns) > 1:
            planes.append(Plane(name, letters, image_cut, found_cut, wanted_cut, (columns * across, rows * down)))
    return planes


def draw_planes(planes: Sequence[Plane], labels: Labels) -> bytes:
    """Draws planes side by side at one scale: prediction filled, reference outlined.

    Returns:
        A PNG.
    """
    low, high = _window(planes)
    widths, heights = zip(*(plane.size for plane in planes), strict=True)
    gaps = GAP_INCHES * (len(planes) - 1)
    inches_per_mm = min((WIDTH_INCHES - gaps) / sum(widths), MAX_HEIGHT_INCHES / max(heights))
    height = inches_per_mm * max(heights)
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, facecolor=BACKGROUND)
    left = (WIDTH_INCHES - gaps - inches_per_mm * sum(widths)) / 2
    for plane in planes:
        across, down = (inches_per_mm * edge for edge in plane.size)
        bottom = (height - down) / 2
        axes = figure.add_axes((left / WIDTH_INCHES, bottom / height, across / WIDTH_INCHES, down / height))
        _draw_plane(axes, plane, labels, (low, high))
        left += across + GAP_INCHES
    _draw_scale_bar(figure.axes[0], planes[0].size)
    return png(figure)


def png(figure: Figure) -> bytes:
    """Renders a figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor=figure.get_facecolor())
    return stream.getvalue()


def _to_ras(volume: Volume, array: np.ndarray) -> np.ndarray:
    turn = nib.orientations.io_orientation(volume.geometry.affine)
    return np.asarray(nib.orientations.apply_orientation(array, turn))


def _channels(stored: np.ndarray, table: Labels, shown: Shown) -> np.ndarray:
    channels = np.zeros(stored.shape, np.uint8)
    for name in shown.classes:
        if name in table.foreground:
            channels[stored == table.value(name)] = shown.labels.channel(name)
    return channels


def _shown_box(mask: np.ndarray, spacing: Sequence[float]) -> list[slice]:
    """The structures and their surroundings; the whole volume where there is no structure."""
    found = ndimage.find_objects(mask.view(np.uint8), 1)[0]
    if found is None:
        return [slice(None)] * 3
    box = []
    for place, edge, size in zip(found, spacing, mask.shape, strict=True):
        margin = round(max(MARGIN_MM / edge, 0.25 * (place.stop - place.start)))
        box.append(slice(max(place.start - margin, 0), min(place.stop + margin, size)))
    return box


def _centre(predicted: np.ndarray, drawn: np.ndarray) -> list[int]:
    """Index along each axis of the slice with most area, each class and each label map weighing the same."""
    profiles = [np.zeros(size) for size in drawn.shape]
    for array in (predicted, drawn):
        boxes = enumerate(ndimage.find_objects(array), start=1)
        for channel, box in [(channel, box) for channel, box in boxes if box is not None]:
            mask = array[box] == channel
            for axis, profile in enumerate(profiles):
                area = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
                profile[box[axis]] += area / area.max()
    return [int(profile.argmax()) if profile.any() else profile.size // 2 for profile in profiles]


def _turned(plane: np.ndarray) -> np.ndarray:
    """Rows downwards and columns to the right: right, anterior and superior come first."""
    return np.ascontiguousarray(plane[::-1, ::-1].T)


def _window(planes: Sequence[Plane]) -> tuple[float, float]:
    """Grey values from black to white: the range in and near the structures, so that bone or air does not set it."""
    near = []
    for plane in planes:
        sampling = (plane.size[1] / plane.image.shape[0], plane.size[0] / plane.image.shape[1])
        mask = (plane.prediction > 0) | (plane.reference > 0)
        if mask.any():
            near.append(plane.image[ndimage.distance_transform_edt(~mask, sampling=sampling) <= NEAR_MM])
    values = np.concatenate(near or [plane.image.ravel() for plane in planes])
    low, high = (float(value) for value in np.percentile(values, [2, 98]))
    room = 0.15 * (high - low) or 1.0
    return low - room, high + room


def _draw_plane(axes: Axes, plane: Plane, labels: Labels, window: tuple[float, float]) -> None:
    extent = (0.0, plane.size[0], 0.0, plane.size[1])
    axes.imshow(
        plane.image, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, aspect="auto", interpolation="bicubic"
    )
    axes.set_axis_off()
    for channel, name in enumerate(labels.foreground, start=1):
        colour = tuple(part / 255 for part in labels.colour(name))
        found, wanted = ((array == channel).astype(np.float32) for array in (plane.prediction, plane.reference))
        if found.any():
            axes.contourf(found, levels=[0.5, 1.5], colors=[colour], alpha=0.42, origin="upper", extent=extent)
        if wanted.any():
            outline = axes.contour(wanted, levels=[0.5], colors=[colour], linewidths=1.5, origin="upper", extent=extent)
            outline.set_path_effects([Stroke(linewidth=3.2, foreground="black", alpha=0.55), Normal()])
    for letter, (x, y), (across, down) in zip(
        plane.letters,
        ((0.015, 0.5), (0.985, 0.5), (0.5, 0.985), (0.5, 0.015)),
        (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom")),
        strict=True,
    ):
        _write(axes, (x, y), letter, 11, ha=across, va=down, fontweight="bold")
    _write(axes, (0.015, 0.985), plane.name, 9, ha="left", va="top")


def _draw_scale_bar(axes: Axes, size: tuple[float, float]) -> None:
    """A bar of a round length at the lower right, about a quarter of the plane wide."""
    lengths = [length for length in (1, 2, 5, 10, 20, 50, 100) if length <= 0.3 * size[0]]
    if not lengths:
        return
    end, low = 0.96 * size[0], 0.04 * size[1]
    (bar,) = axes.plot([end - lengths[-1], end], [low, low], color="white", linewidth=2, solid_capstyle="butt")
    bar.set_path_effects(HALO)
    _write(axes, (1 - 0.04 - lengths[-1] / 2 / size[0], 0.05), f"{lengths[-1]} mm", 8, ha="center", va="bottom")


def _write(axes: Axes, place: tuple[float, float], text: str, size: float, **options: Any) -> None:
    written = axes.text(*place, text, transform=axes.transAxes, color="white", fontsize=size, **options)
    written.set_path_effects(HALO)
