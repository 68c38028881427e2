from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import AbstractPathEffect, Normal, Stroke, withStroke
from scipy import ndimage

from medmom.labels import Labels

NEAR_MM = 10.0
WIDTH_INCHES, MAX_HEIGHT_INCHES, GAP_INCHES, DPI = 11.0, 5.4, 0.12, 150
LINE_INCHES, LETTER_INCHES = 0.2, 0.09
BACKGROUND = "#0b0d11"
HALO: list[AbstractPathEffect] = [withStroke(linewidth=2.5, foreground="black")]


@dataclass(frozen=True, eq=False)
class Plane:
    """One slice as it is shown: rows from the top, columns from the left.

    Attributes:
        name: Of the plane; empty for a picture.
        letters: Directions at the left, right, top and bottom edge; empty for a picture.
        image: Grey values, shape (rows, columns), or colours from 0 to 1, shape (rows, columns, 3).
        prediction: Channel indices of the same shape.
        reference: Channel indices of the same shape.
        size: Width and height in mm; in pixels for a picture.
    """

    name: str
    letters: str
    image: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray
    size: tuple[float, float]


def draw_planes(planes: Sequence[Plane], labels: Labels, *, legend: Sequence[tuple[str, str]] = ()) -> bytes:
    """Draws planes side by side at one scale: prediction filled, reference outlined.

    Args:
        planes: From left to right.
        labels: Gives the colours.
        legend: What is written below: class name and text each; an empty name has no colour.

    Returns:
        A PNG.
    """
    window = _window([plane for plane in planes if plane.image.ndim == 2])
    widths, heights = zip(*(plane.size for plane in planes), strict=True)
    gaps = GAP_INCHES * (len(planes) - 1)
    inches_per_mm = min((WIDTH_INCHES - gaps) / sum(widths), MAX_HEIGHT_INCHES / max(heights))
    columns = _legend_columns([text for _, text in legend])
    below = LINE_INCHES * (math.ceil(len(legend) / columns) + 1) if legend else 0.0
    height = inches_per_mm * max(heights) + below
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, facecolor=BACKGROUND)
    left = (WIDTH_INCHES - gaps - inches_per_mm * sum(widths)) / 2
    for plane in planes:
        across, down = (inches_per_mm * edge for edge in plane.size)
        bottom = (height + below - down) / 2
        axes = figure.add_axes((left / WIDTH_INCHES, bottom / height, across / WIDTH_INCHES, down / height))
        _draw_plane(axes, plane, labels, window)
        left += across + GAP_INCHES
    if planes[0].letters:
        _draw_scale_bar(figure.axes[0], planes[0].size)
    if legend:
        _draw_legend(figure, legend, labels, columns)
    return png(figure)


def png(figure: Figure) -> bytes:
    """Renders a figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor=figure.get_facecolor())
    return stream.getvalue()


def _window(planes: Sequence[Plane]) -> tuple[float, float]:
    """Grey values from black to white: the range in and near the structures, so that bone or air does not set it."""
    if not planes:
        return 0.0, 1.0
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
    in_colours = plane.image.ndim == 3
    found, wanted = ndimage.find_objects(plane.prediction), ndimage.find_objects(plane.reference)
    for channel, name in enumerate(labels.foreground, start=1):
        colour = tuple(part / 255 for part in labels.colour(name))
        filled = _cropped(plane.prediction, found, channel, plane.size)
        outlined = _cropped(plane.reference, wanted, channel, plane.size)
        if filled is not None:
            mask, place = filled
            axes.contourf(mask, levels=[0.5, 1.5], colors=[colour], alpha=0.42, origin="upper", extent=place)
            if in_colours:
                axes.contour(mask, levels=[0.5], colors=["black"], linewidths=1, origin="upper", extent=place)
        if outlined is not None:
            mask, place = outlined
            outline = axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.5, origin="upper", extent=place)
            # Tissue in colours hides class colours: red on red.
            width, ink, strength = (4.0, "white", 1.0) if in_colours else (3.2, "black", 0.55)
            outline.set_path_effects([Stroke(linewidth=width, foreground=ink, alpha=strength), Normal()])
    if plane.letters:
        _write_directions(axes, plane)


def _cropped(
    channels: np.ndarray, boxes: Sequence[tuple[slice, ...] | None], channel: int, size: tuple[float, float]
) -> tuple[np.ndarray, tuple[float, float, float, float]] | None:
    """The mask of a class with a margin of one pixel, and its extent on the plane; None where the class is not.

    A contour keeps several arrays of its mask's size: of many classes on a large plane, hundreds of MiB.
    """
    box = boxes[channel - 1] if channel <= len(boxes) else None
    if box is None:
        return None
    rows, columns = (slice(max(place.start - 1, 0), place.stop + 1) for place in box)
    mask = (channels[rows, columns] == channel).astype(np.float32)
    across, down = size[0] / channels.shape[1], size[1] / channels.shape[0]
    left, top = columns.start * across, size[1] - rows.start * down
    return mask, (left, left + mask.shape[1] * across, top - mask.shape[0] * down, top)


def _write_directions(axes: Axes, plane: Plane) -> None:
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


def _legend_columns(texts: Sequence[str]) -> int:
    """Gives the columns into which texts fit side by side."""
    widest = LETTER_INCHES * max(map(len, texts), default=0) + 0.6
    return max(1, min(len(texts), int(WIDTH_INCHES / widest)))


def _draw_legend(figure: Figure, legend: Sequence[tuple[str, str]], labels: Labels, columns: int) -> None:
    colours = [tuple(part / 255 for part in labels.colour(name)) if name else BACKGROUND for name, _ in legend]
    figure.legend(
        [Patch(color=colour) for colour in colours],
        # matplotlib before 3.10 hides what begins with an underscore; dollar signs enclose a formula.
        [" " + text.replace("$", r"\$") for _, text in legend],
        loc="lower center",
        ncols=columns,
        frameon=False,
        labelcolor="white",
        fontsize=9,
        handlelength=1.2,
    )


def _write(axes: Axes, place: tuple[float, float], text: str, size: float, **options: Any) -> None:
    written = axes.text(*place, text, transform=axes.transAxes, color="white", fontsize=size, **options)
    written.set_path_effects(HALO)
