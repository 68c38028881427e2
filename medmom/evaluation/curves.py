from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medmom.data.table import read_table
from medmom.evaluation.overlay import png

Theme = Literal["light", "dark"]
Series = tuple[np.ndarray, np.ndarray]
Colour = tuple[int, int, int]

WIDTH_INCHES, HEIGHT_INCHES, DPI = 11.0, 3.0, 150
# Text, lines of the grid, and the curve that matters most.
INK: Mapping[Theme, tuple[str, str, str]] = {
    "light": ("#4a5566", "#e4e8ee", "#1f5fbf"),
    "dark": ("#a3afbf", "#2c3441", "#7db0ff"),
}
# Validation scores of classification, with colours that hold on light and dark.
CLASS_SCORES = {
    "val_balanced_accuracy": "balanced accuracy",
    "val_accuracy": "accuracy",
    "val_f1": "macro F1",
    "val_auroc": "macro AUROC",
    "val_auprc": "macro AUPRC",
}
CLASS_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


@dataclass(frozen=True, eq=False)
class Curves:
    """What a training run logged: each series is steps and values of equal length.

    Attributes:
        loss: Training loss, or None.
        dice: Mean validation Dice, or None.
        class_dice: Validation Dice by class.
        lr: Learning rate, or None.
        scores: Validation scores of classification, by the name they are shown by.
    """

    loss: Series | None
    dice: Series | None
    class_dice: Mapping[str, Series]
    lr: Series | None
    scores: Mapping[str, Series] = field(default_factory=dict)


def read_curves(path: Path) -> Curves:
    """Reads the ``metrics.csv`` of a run: sparse rows with ``step``, ``train_loss``, ``val_dice`` and more.

    Raises:
        MedmomError: The file is no CSV file.
    """
    table = read_table(path)
    series: dict[str, Series] = {}
    for name in table.columns:
        pairs = [(row.get("step", ""), row[name]) for row in table.rows]
        points = [(float(step), float(value)) for step, value in pairs if _is_number(step) and _is_number(value)]
        if points:
            # A resumed run may log a step again, after later ones.
            steps, values = np.array(sorted(points, key=lambda point: point[0])).T
            series[name] = (steps, values)
    prefix = "val_dice_"
    return Curves(
        loss=_first(series, ["train_loss", "train_loss_step", "train_loss_epoch"]),
        dice=series.get("val_dice"),
        class_dice={name.removeprefix(prefix): series[name] for name in series if name.startswith(prefix)},
        lr=_first(series, ["lr", *sorted(name for name in series if name.startswith("lr"))]),
        scores={title: series[name] for name, title in CLASS_SCORES.items() if name in series},
    )


def draw_curves(curves: Curves, colours: Mapping[str, Colour], theme: Theme) -> bytes | None:
    """Draws loss, validation scores and learning rate side by side.

    Args:
        curves: What was logged.
        colours: Of the classes.
        theme: The page on which the picture lies; its background is transparent.

    Returns:
        A PNG, or None where nothing was logged.
    """
    panels = [
        (title, draw)
        for title, draw, there in (
            ("Training loss", _draw_loss, curves.loss),
            ("Dice in validation", _draw_dice, curves.dice or curves.class_dice),
            ("Scores in validation", _draw_scores, curves.scores),
            ("Learning rate", _draw_lr, curves.lr),
        )
        if there
    ]
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, layout="constrained", facecolor="none")
    for axes, (title, draw) in zip(figure.subplots(1, max(3, len(panels)))[: len(panels)], panels, strict=True):
        draw(axes, curves, colours, theme)
        _style(axes, title, theme)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    return png(figure)


def _first(series: Mapping[str, Series], names: Sequence[str]) -> Series | None:
    return next((series[name] for name in names if name in series), None)


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _draw_loss(axes: Axes, curves: Curves, colours: Mapping[str, Colour], theme: Theme) -> None:
    assert curves.loss is not None
    steps, values = curves.loss
    accent = INK[theme][2]
    window = max(1, len(values) // 40)
    axes.plot(steps, values, color=accent, linewidth=0.8, alpha=0.35 if window > 1 else 1)
    if window > 1:
        kernel = np.ones(window)
        weight = np.convolve(np.ones_like(values), kernel, mode="same")
        axes.plot(steps, np.convolve(values, kernel, mode="same") / weight, color=accent, linewidth=1.8)


def _draw_dice(axes: Axes, curves: Curves, colours: Mapping[str, Colour], theme: Theme) -> None:
    for name, (steps, values) in curves.class_dice.items():
        colour = [part / 255 for part in colours.get(name, (136, 136, 136))]
        axes.plot(steps, values, color=colour, linewidth=1.2, marker="o", markersize=2.5)
    if curves.dice is not None:
        axes.plot(*curves.dice, color=INK[theme][2], linewidth=2.2, marker="o", markersize=3.5)
    axes.set_ylim(top=1.0)


def _draw_scores(axes: Axes, curves: Curves, colours: Mapping[str, Colour], theme: Theme) -> None:
    for colour, title in zip(CLASS_COLOURS, CLASS_SCORES.values(), strict=True):
        if title in curves.scores:
            axes.plot(*curves.scores[title], color=colour, linewidth=1.6, marker="o", markersize=2.5, label=title)
    axes.set_ylim(top=1.02)
    axes.legend(fontsize=8, labelcolor=INK[theme][0], frameon=False)


def _draw_lr(axes: Axes, curves: Curves, colours: Mapping[str, Colour], theme: Theme) -> None:
    assert curves.lr is not None
    axes.plot(*curves.lr, color=INK[theme][2], linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _style(axes: Axes, title: str, theme: Theme) -> None:
    text, grid, _ = INK[theme]
    axes.set_title(title, loc="left", fontsize=10.5, color=text, fontweight="bold")
    axes.set_xlabel("step", fontsize=9.5, color=text)
    axes.tick_params(colors=text, labelsize=9, length=0)
    axes.grid(color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.margins(x=0.02)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(grid)
