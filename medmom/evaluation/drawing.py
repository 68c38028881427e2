from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, Normal, Stroke, withStroke
from scipy import ndimage

from medmom.labels import Labels

NEAR_MM = 10.0
WIDTH_INCHES, MAX_HEIGHT_INCHES, GAP_INCHES, DPI = 11.0, 5.4, 0.12, 150
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


def draw_planes(planes: Sequence[Plane], labels: Labels) -> bytes:
    """Draws planes side by side at one scale: prediction filled, reference outlined.

    Returns:
        A PNG.
    """
    window = _window([plane for plane in planes if plane.image.ndim == 2])
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
        _draw_plane(axes, plane, labels, window)
        left += across + GAP_INCHES
    if planes[0].letters:
        _draw_scale_bar(figure.axes[0], planes[0].size)
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
    for channel, name in enumerate(labels.foreground, start=1):
        colour = tuple(part / 255 for part in labels.colour(name))
        found, wanted = ((array == channel).astype(np.float32) for array in (plane.prediction, plane.reference))
        if found.any():
            axes.contourf(found, levels=[0.5, 1.5], colors=[colour], alpha=0.42, origin="upper", extent=extent)
            if in_colours:
                axes.contour(found, levels=[0.5], colors=["black"], linewidths=1, origin="upper", extent=extent)
        if wanted.any():
            outline = axes.contour(wanted, levels=[0.5], colors=[colour], linewidths=1.5, origin="upper", extent=extent)
            # Tissue in colours hides class colours: red on red.
            width, ink, strength = (4.0, "white", 1.0) if in_colours else (3.2, "black", 0.55)
            outline.set_path_effects([Stroke(linewidth=width, foreground=ink, alpha=strength), Normal()])
    if plane.letters:
        _write_directions(axes, plane)


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


def _write(axes: Axes, place: tuple[float, float], text: str, size: float, **options: Any) -> None:
    written = axes.text(*place, text, transform=axes.transAxes, color="white", fontsize=size, **options)
    written.set_path_effects(HALO)
