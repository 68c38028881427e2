from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from medmom.data.atomic import atomic_file
from medmom.errors import MedmomError
from medmom.evaluation.drawing import BACKGROUND, png
from medmom.labels import IGNORE, Labels

CELL_INCHES, CAPTION_INCHES, TITLE_INCHES, DPI = 2.2, 0.34, 0.42, 110
LARGEST_INCHES = 60.0

Drawn = tuple[str, np.ndarray, np.ndarray | None]
"""Case name, image (C, X, Y) or (C, X, Y, Z), and label (1, ...) or without the first axis, or None."""


def write_sheet(
    samples: Sequence[Drawn],
    path: Path,
    *,
    title: str,
    labels: Labels | None = None,
    intensity: str = "zscore",
    is_scan: bool = False,
) -> None:
    """Draws what a network is fed as one PNG: a row a case, its samples side by side, labels outlined.

    Pictures of three channels from 0 to 1 keep their colours, other images show their first channel in grey, each
    from its own 1st to its 99th percentile. A volume shows its axial, coronal and sagittal slice, each where most is
    labelled, else the central one.

    Args:
        samples: Case name, image, label; neighbours of one name make a row. Labels hold channel indices.
        path: The PNG; written whole or not at all.
        title: The line above.
        labels: Gives the colours; None: no label is outlined.
        intensity: Scale of the images, as in ``Preparation``; ``"unit"`` is shown as it is, 0 black and 1 white.
        is_scan: Whether X points to the patient's right and Y to the front, as in slices of scans: right is then drawn
            to the left and front to the top. Pictures begin in the upper left corner. Volumes are scans.

    Raises:
        MedmomError: There is nothing to draw or too much, or the place cannot be written or is no PNG.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise MedmomError(f"{path}: a sheet is a PNG picture; name it {path.with_suffix('.png').name}.")
    rows = [list(row) for _, row in itertools.groupby(samples, key=lambda sample: sample[0])]
    columns = max((len(row) for row in rows), default=0)
    width, height = columns * CELL_INCHES, TITLE_INCHES + len(rows) * (CELL_INCHES + CAPTION_INCHES)
    if not rows or max(width, height) > LARGEST_INCHES:
        raise MedmomError(f"{path}: {len(rows)} rows of {columns} samples make no sheet; draw 1 to 20 of each.")
    figure = Figure(figsize=(max(width, 2 * CELL_INCHES), height), dpi=DPI, facecolor=BACKGROUND)
    figure.text(0.01, 1 - TITLE_INCHES / 2 / height, title, color="white", fontsize=10, va="center", parse_math=False)
    for r, row in enumerate(rows):
        for c, (name, image, label) in enumerate(row):
            bottom = height - TITLE_INCHES - (r + 1) * (CELL_INCHES + CAPTION_INCHES)
            cell = (c * CELL_INCHES, bottom + CAPTION_INCHES, CELL_INCHES, CELL_INCHES)
            planes = _planes(np.asarray(image), _plain(label), is_scan=is_scan)
            _draw_cell(figure, cell, list(planes), labels, intensity)
            _write_caption(figure, cell, _caption(name, np.asarray(image)))
    with atomic_file(path) as stream:
        stream.write(png(figure))


def _plain(label: np.ndarray | None) -> np.ndarray | None:
    """Channel indices on the axes of the image, without an axis of channels; nothing outlined where ignored."""
    if label is None:
        return None
    label = np.asarray(label)
    return np.where(label == IGNORE, 0, label)


def _planes(
    image: np.ndarray, label: np.ndarray | None, *, is_scan: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Cuts the slices shown: (rows, columns, C) of the image and (rows, columns) of the label."""
    num_axes = image.ndim - 1
    if label is not None and label.ndim == image.ndim:
        label = label[0]
    if num_axes == 2:
        yield _turned(image, is_scan), None if label is None else _turned(label[None], is_scan)[..., 0]
        return
    for axis in (2, 1, 0):
        place = _place(label, axis, image.shape[axis + 1])
        cut = None if label is None else _turned(label.take(place, axis)[None], True)[..., 0]
        yield _turned(image.take(place, axis + 1), True), cut


def _place(label: np.ndarray | None, axis: int, size: int) -> int:
    area = np.zeros(0) if label is None else (label > 0).sum(axis=tuple(a for a in range(3) if a != axis))
    return int(area.argmax()) if area.any() else size // 2


def _turned(plane: np.ndarray, is_scan: bool) -> np.ndarray:
    """Rows downwards and columns to the right of (C, X, Y): for scans right, front and head come first."""
    plane = plane[:, ::-1, ::-1] if is_scan else plane
    return np.ascontiguousarray(plane.transpose(2, 1, 0))


def _draw_cell(
    figure: Figure,
    cell: tuple[float, float, float, float],
    planes: Sequence[tuple[np.ndarray, np.ndarray | None]],
    labels: Labels | None,
    intensity: str,
) -> None:
    """Draws one slice over the whole cell, or three in its quarters."""
    left, bottom, width, height = cell
    gap, side = 0.03 * width, 0.94 * width
    if len(planes) > 1:
        side = side / 2 - gap / 2
    window = _window([plane for plane, _ in planes], intensity)
    for k, (plane, label) in enumerate(planes):
        down, across = divmod(k, 2)
        corner = (left + gap + across * (side + gap), bottom + height - gap - side - down * (side + gap))
        axes = _axes(figure, (*corner, side, side))
        colour = intensity == "unit" and plane.shape[-1] == 3
        shown = plane.clip(0, 1) if colour else plane[..., 0]
        axes.imshow(shown, cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest")
        axes.autoscale(False)
        if label is not None and labels is not None:
            # Polyps are as red as the colour of a first class.
            _outline(axes, label, labels, halo="white" if colour else "black")


def _axes(figure: Figure, place: tuple[float, float, float, float]) -> Axes:
    """Axes without a frame at a place in inches."""
    width, height = figure.get_size_inches()
    left, bottom, across, down = place
    axes = figure.add_axes((left / width, bottom / height, across / width, down / height))
    axes.set_axis_off()
    return axes


def _window(planes: Sequence[np.ndarray], intensity: str) -> tuple[float, float]:
    if intensity == "unit":
        return 0.0, 1.0
    values = np.concatenate([plane[..., 0].ravel() for plane in planes])
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [1, 99]) if values.size else (0.0, 0.0)
    return float(low), float(max(high, low + 1e-6))


def _outline(axes: Axes, label: np.ndarray, labels: Labels, *, halo: str) -> None:
    for channel, name in enumerate(labels.foreground, start=1):
        mask = label == channel
        if min(mask.shape) < 2 or not mask.any():
            continue
        colour = tuple(part / 255 for part in labels.colour(name))
        # A frame of background closes outlines at the edge of the patch.
        columns, rows = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
        outline = axes.contour(columns, rows, np.pad(mask, 1).astype(float), levels=[0.5], colors=[colour])
        outline.set(linewidth=1.1, path_effects=[Stroke(linewidth=2.4, foreground=halo, alpha=0.6), Normal()])


def _caption(name: str, image: np.ndarray) -> str:
    size = " x ".join(str(edge) for edge in image.shape[1:])
    channels = f", {len(image)} channels" if len(image) > 1 else ""
    finite = image[np.isfinite(image)]
    low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
    # A rounding error below nothing is no news.
    low, high = (0.0 if abs(value) < 1e-6 * (high - low) else value for value in (low, high))
    strange = "" if finite.size == image.size else ", not all finite"
    return f"{name}\n{size}{channels}, {low:.3g} to {high:.3g}{strange}"


def _write_caption(figure: Figure, cell: tuple[float, float, float, float], caption: str) -> None:
    width, height = figure.get_size_inches()
    name, numbers = caption.split("\n")
    # About 30 letters fit below a sample.
    shown = name if len(name) <= 30 else f"{name[:13]}...{name[-14:]}"
    place = ((cell[0] + 0.03 * cell[2]) / width, cell[1] / height)
    figure.text(*place, f"{shown}\n{numbers}", color="white", fontsize=6.5, va="top", parse_math=False)
