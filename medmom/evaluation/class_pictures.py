"""Pictures of the report on classified images: matrices, curves, and the images themselves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from medmom.data.class_items import read_item
from medmom.data.files import Volume, read_images
from medmom.evaluation.curves import DPI, INK, Theme
from medmom.evaluation.overlay import png

# Six colours that the colour-blind tell apart (Okabe and Ito 2008), each solid and dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", (0, (4, 1.5)))
MAX_COLOURED = len(COLOURS) * len(DASHES)
SIDE_INCHES = 5.4
THUMBNAIL = 320
PAPER: Mapping[Theme, str] = {"light": "#ffffff", "dark": "#161b23"}
BEFORE = "#D55E00"


def draw_confusion(scores: Mapping[str, Any], theme: Theme) -> bytes:
    """Draws the confusion matrix of single-label scores: counts, coloured by their share of the row.

    Cases that could not be predicted have a column of their own, where there are any.
    """
    names = list(scores["classes"])
    counts = np.array(scores["confusion"])
    columns = list(names)
    failed = np.array([row["num_failed"] for row in scores["classes_scores"].values()])
    if failed.any():
        counts, columns = np.column_stack([counts, failed]), [*names, "not predicted"]
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = float(np.clip(7.0 / len(names), 0.26, 0.8))
    size = float(np.clip(cell * 20, 5.5, 9.5))
    figure, axes, side = _matrix_axes([_short(name) for name in names], [_short(name) for name in columns], cell, size)
    ink, _, accent = INK[theme]
    colours = LinearSegmentedColormap.from_list("share", [PAPER[theme], accent])
    picture = axes.imshow(share, cmap=colours, vmin=0, vmax=1, aspect="auto")
    _write_counts(axes, counts, share, theme, size=float(np.clip(cell * 15, 5.2, 10)))
    _style(axes, "Predicted class", "Reference class", theme)
    axes.grid(visible=False)
    bar = figure.colorbar(picture, cax=side)
    bar.set_label("share of the reference class", fontsize=9, color=ink)
    side.tick_params(colors=ink, labelsize=8, length=0)
    bar.outline.set_visible(False)
    return png(figure)


def draw_reliability(found: Mapping[str, Any], theme: Theme, *, is_multilabel: bool) -> bytes:
    """Draws how often claims came true, before and after temperature scaling; larger marks stand for more.

    Args:
        found: ``reliability`` of the scores, with ``after``, and with ``before`` or None.
        theme: The page on which the picture lies.
        is_multilabel: Whether the claims are all probabilities, else the top one of each image.
    """
    ink, _, accent = INK[theme]
    figure = Figure(figsize=(SIDE_INCHES, SIDE_INCHES), dpi=DPI, layout="constrained", facecolor="none")
    axes, below = figure.subplots(2, 1, height_ratios=(3.4, 1), sharex=True)
    axes.plot([0, 1], [0, 1], color=ink, linewidth=1, linestyle=":", label="perfect")
    series = (("before", BEFORE, "s", (0, (4, 1.5))), ("after", accent, "o", "solid"))
    for name, colour, marker, dash in series:
        if found[name] is None:
            continue
        rows = [row for row in found[name]["bins"] if row["num"]]
        places, values = zip(*((row["confidence"], row["observed"]) for row in rows), strict=True)
        label = f"{name} scaling, error {found[name]['ece']:.3f}"
        num = np.array([row["num"] for row in rows])
        axes.plot(places, values, color=colour, linestyle=dash, linewidth=1.2, label=label)
        # A bin of three images says little: its mark is small.
        axes.scatter(places, values, s=6 + 60 * np.sqrt(num / num.max()), color=colour, marker=marker, linewidths=0)
        edges = [row["low"] for row in found[name]["bins"]] + [1.0]
        below.stairs([row["num"] for row in found[name]["bins"]], edges, color=colour, linestyle=dash, linewidth=1.4)
    unit = "probabilities" if is_multilabel else "images"
    _style(axes, "", "Share that was true" if is_multilabel else "Share that was right", theme)
    _style(below, "Probability given" if is_multilabel else "Probability of the top class", f"Number of {unit}", theme)
    axes.set_ylim(-0.03, 1.03)
    below.set_xlim(-0.02, 1.02)
    below.set_ylim(bottom=0)
    axes.legend(loc="upper left", fontsize=8.5, labelcolor=ink, frameon=False)
    return png(figure)


def draw_roc(scores: Mapping[str, Any], theme: Theme) -> bytes | None:
    """Draws the ROC curve of each class; of more than twelve, those of least area coloured and the others grey.

    Returns:
        A PNG, or None where no class has a curve.
    """
    curves = {name: curve for name, curve in scores["roc"].items() if curve}
    if not curves:
        return None
    ink, grid, _ = INK[theme]
    areas = {name: scores["classes_scores"][name]["auroc"]["value"] for name in curves}
    coloured = list(curves)
    if len(curves) > MAX_COLOURED:
        coloured = sorted(curves, key=lambda name: (areas[name], name))[:MAX_COLOURED]
    figure = Figure(figsize=(SIDE_INCHES, SIDE_INCHES), dpi=DPI, layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=ink, linewidth=1, linestyle=":")
    for name in [name for name in curves if name not in coloured]:
        axes.plot(*zip(*curves[name], strict=True), color="#888888", linewidth=0.7, alpha=0.6)
    for k, name in enumerate(coloured):
        colour, dash = COLOURS[k % len(COLOURS)], DASHES[k // len(COLOURS)]
        label = f"{_short(name)}  {areas[name]:.3f}"
        axes.plot(*zip(*curves[name], strict=True), color=colour, linestyle=dash, linewidth=1.7, label=label)
    _style(axes, "False positive rate", "True positive rate", theme)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    legend = axes.legend(loc="lower right", fontsize=7.5, labelcolor=ink, title="Class and AUROC", title_fontsize=8)
    legend.get_title().set_color(ink)
    legend.get_frame().set(facecolor=PAPER[theme], edgecolor=grid, alpha=0.9)
    return png(figure)


def thumbnail(paths: Sequence[Path], item: int | None = None) -> bytes:
    """A small picture of an image: of a volume the middle axial slice, as radiologists look at it.

    Args:
        paths: The files of the image's channels. One channel is shown grey, from its 1st to its 99th percentile; three
            of a picture as colours; of any other number the first.
        item: Place of the image in a file of many.

    Returns:
        A PNG of at most 320 pixels an edge.

    Raises:
        MedmomError: The image cannot be read.
    """
    volume = read_images(paths) if item is None else read_item(paths[0], item)
    plane, spacing = _middle(volume)
    scale = THUMBNAIL / max(plane.shape[1] * spacing[0], plane.shape[0] * spacing[1])
    size = [max(1, round(scale * edge * mm)) for edge, mm in zip(plane.shape[1::-1], spacing, strict=True)]
    stream = io.BytesIO()
    Image.fromarray(_shown(plane)).resize((size[0], size[1]), Image.Resampling.BICUBIC).save(stream, format="PNG")
    return stream.getvalue()


def _middle(volume: Volume) -> tuple[np.ndarray, tuple[float, float]]:
    """The middle slice, rows from the top, shape (rows, columns, channels), and the edges of its pixels."""
    if volume.header is None:
        array, spacing = volume.array, volume.geometry.spacing
        plane = array[..., array.shape[3] // 2].transpose(2, 1, 0)
    else:
        turn = nib.orientations.io_orientation(volume.geometry.affine)
        array = np.stack([nib.orientations.apply_orientation(channel, turn) for channel in volume.array])
        spacing = volume.geometry.reoriented("RAS").spacing
        plane = array[:, ::-1, ::-1, array.shape[3] // 2].transpose(2, 1, 0)
    is_colour = volume.header is None and plane.shape[2] == 3
    return plane if is_colour else plane[..., :1], (spacing[0], spacing[1])


def _shown(plane: np.ndarray) -> np.ndarray:
    if plane.shape[2] == 3:
        return np.asarray(np.clip(np.rint(plane), 0, 255), np.uint8)
    grey = plane[..., 0]
    low, high = np.percentile(grey, [1, 99])
    if low == high:
        low, high = grey.min(), grey.max()
    return np.asarray(np.rint(255 * np.clip((grey - low) / (high - low or 1), 0, 1)), np.uint8)


def _matrix_axes(rows: Sequence[str], columns: Sequence[str], cell: float, size: float) -> tuple[Figure, Axes, Axes]:
    """A figure with room for a matrix of cells of so many inches, its names of ``size`` points, and a colour bar.

    The places are computed: matplotlib's own layout takes many seconds for fifty names, and cuts some off.
    """
    letter = 0.62 * size / 72
    left, below = 0.45 + letter * max(map(len, rows)), 0.5 + 0.75 * letter * max(map(len, columns))
    # Slanted names of the first columns end to the left of the matrix.
    left = max(left, 0.75 * letter * len(columns[0]))
    wide, high = cell * len(columns), cell * len(rows)
    width, height = left + wide + 0.95, below + high + 0.15
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="none")
    axes = figure.add_axes((left / width, below / height, wide / width, high / height))
    side = figure.add_axes(((left + wide + 0.15) / width, below / height, 0.14 / width, high / height))
    axes.set_xticks(range(len(columns)), list(columns), rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=size)
    return figure, axes, side


def _write_counts(axes: Axes, counts: np.ndarray, share: np.ndarray, theme: Theme, *, size: float) -> None:
    """Writes the counts into the cells; of a large matrix, those above 0."""
    for (row, column), count in np.ndenumerate(counts):
        if count or len(counts) <= 12:
            is_strong = share[row, column] > 0.55
            colour = PAPER[theme] if is_strong else INK[theme][0]
            axes.text(column, row, f"{count:d}", ha="center", va="center", fontsize=size, color=colour)


def _short(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:28]}…"


def _style(axes: Axes, across: str, up: str, theme: Theme) -> None:
    ink, grid, _ = INK[theme]
    axes.set_xlabel(across, fontsize=9.5, color=ink)
    axes.set_ylabel(up, fontsize=9.5, color=ink)
    axes.tick_params(colors=ink, length=0)
    axes.grid(color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_color(grid)
