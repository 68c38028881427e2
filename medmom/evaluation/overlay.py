from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from medmom.data.files import Volume, check_same_grid, read_image, read_label
from medmom.errors import MedmomError
from medmom.evaluation.drawing import Plane, draw_planes, png
from medmom.labels import Labels

__all__ = ["Plane", "Shown", "cut_picture", "cut_planes", "draw_planes", "png", "read_planes"]

MARGIN_MM = 20.0

# Name, the axis looked along (RAS), and the letters at the left, right, top and bottom edge.
PLANES = (("axial", 2, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 0, "APSI"))


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
    A picture is shown whole, upright and in its colours.

    Args:
        image: The scan.
        prediction: Label map, stored values; those of no shown class count as background.
        reference: Label map, the same.
        shown: The classes.

    Returns:
        Axial, coronal and sagittal plane; of a single slice or a picture, that alone.

    Raises:
        MedmomError: A file cannot be read, lies on another grid, or has no plane.
    """
    scan = read_image(image)
    found, wanted = read_label(prediction, shown.labels), read_label(reference, shown.reference_labels)
    check_same_grid(scan, found)
    check_same_grid(scan, wanted)
    predicted = _channels(found.array, shown.labels, shown)
    drawn = _channels(wanted.array, shown.reference_labels, shown)
    if scan.is_picture:
        return [cut_picture(scan.array, predicted, drawn)]
    grey, predicted, drawn = _to_ras(scan, scan.array[0]), _to_ras(found, predicted), _to_ras(wanted, drawn)
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


def cut_picture(image: np.ndarray, prediction: np.ndarray, reference: np.ndarray) -> Plane:
    """Gives the one plane of a picture: whole, as it is seen, from its darkest to its brightest value.

    Args:
        image: Grey values or red, green and blue on any scale, shape (C, X, Y, 1); of other channels the first.
        prediction: Channel indices, shape (X, Y, 1).
        reference: Channel indices of the same shape.
    """
    shown = image if len(image) == 3 else np.repeat(image[:1], 3, axis=0)
    low, high = float(shown.min()), float(shown.max())
    colours = (shown[..., 0].transpose(2, 1, 0) - low) / ((high - low) or 1.0)
    columns, rows = image.shape[1:3]
    return Plane("", "", colours, prediction[..., 0].T, reference[..., 0].T, (float(columns), float(rows)))


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
