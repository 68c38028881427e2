"""A picture of a prediction, to see at a glance whether it went well."""

from __future__ import annotations

import nibabel as nib
import numpy as np

from medmom.data.files import Volume
from medmom.evaluation.overlay import Plane, cut_picture, cut_planes, draw_planes
from medmom.inference.labelled import LabelledVoxels
from medmom.labels import IGNORE, Labels

MAX_NAMED = 12
"""Classes that the legend names; the rest is counted."""

MAX_LETTERS = 40
"""Of a name in the legend."""


def preview(label: np.ndarray, image: Volume, labels: Labels) -> bytes:
    """Draws a prediction over its image in three planes, with a legend of names and volumes.

    Each plane lies where the classes together have most of their area, each class weighing the same; through the
    middle of the image where there is no prediction. It is cut to the structures in it and what surrounds them.
    Radiological convention: the patient's right is on the left. Of several channels the first is shown. A picture is
    shown whole, in its colours. The legend names the 12 largest classes.

    Args:
        label: Stored values, shape (X, Y, Z).
        image: The image on the same grid, its array (C, X, Y, Z) of any real type.
        labels: Names and colours of the classes.

    Returns:
        A PNG: axial, coronal and sagittal plane; of a single slice or a picture, that alone.

    Raises:
        ValueError: ``label`` has another shape than the grid, or a value that ``labels`` does not name.
    """
    if label.shape != image.geometry.shape:
        raise ValueError(f"a label map {label.shape} does not lie on a grid {image.geometry.shape}")
    turn = None if image.is_picture else nib.orientations.io_orientation(image.geometry.affine)
    # Turning gives a view: nothing but the planes is copied.
    turned = label if turn is None else nib.orientations.apply_orientation(label, turn)
    profiles = LabelledVoxels(turned, labels).profiles()
    legend = _legend(profiles[0].sum(axis=1), image, labels)
    if turn is None:
        return draw_planes([_picture(image, turned, labels)], labels, legend=legend)
    grey = nib.orientations.apply_orientation(image.array[0], turn)
    spacing = image.geometry.reoriented("RAS").spacing
    planes = []
    for axis in (2, 1, 0):
        middle = _middle(profiles[axis])
        place = tuple(slice(middle, middle + 1) if a == axis else slice(None) for a in range(3))
        found = _channels(turned[place], labels)
        planes += cut_planes(np.asarray(grey[place], dtype=np.float32), found, np.zeros_like(found), spacing)
    return draw_planes(planes, labels, legend=legend)


def _picture(image: Volume, label: np.ndarray, labels: Labels) -> Plane:
    found = _channels(label, labels)
    return cut_picture(np.asarray(image.array, dtype=np.float32), found, np.zeros_like(found))


def _channels(label: np.ndarray, labels: Labels) -> np.ndarray:
    channels = labels.to_channels(label)
    channels[channels == IGNORE] = 0
    return channels


def _middle(profile: np.ndarray) -> int:
    """The plane with most area, each class (K, planes) weighing the same."""
    found = profile[profile.any(axis=1)]
    if not len(found):
        return int(profile.shape[1]) // 2
    areas: np.ndarray = (found / found.max(axis=1, keepdims=True)).sum(axis=0)
    return int(areas.argmax())


def _legend(counts: np.ndarray, image: Volume, labels: Labels) -> list[tuple[str, str]]:
    """Names and sizes of the largest classes, in the order of the table."""
    present = [int(channel) for channel in np.argsort(-counts, kind="stable") if counts[channel]]
    if not present:
        return [("", "nothing found")]
    edge = abs(float(np.linalg.det(image.geometry.affine[:3, :3]))) / 1000
    shown = []
    for channel in sorted(present[:MAX_NAMED]):
        name, count = labels.names[channel], int(counts[channel])
        size = f"{count} pixels" if image.is_picture else f"{_digits(count * edge)} ml"
        short = name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…"
        shown.append((name, f"{short}  {size}"))
    rest = len(present) - len(shown)
    return [*shown, *([("", f"and {rest} more")] if rest else [])]


def _digits(volume: float) -> str:
    """Three digits at least, and no fraction beyond them."""
    return f"{volume:.3g}" if volume < 100 else f"{volume:.0f}"
