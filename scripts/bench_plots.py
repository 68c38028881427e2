"""Plots of the benchmarks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

COLOURS = {
    "plain": "#222222",
    "checkpoint": "#b07aa1",
    "reversible": "#1f77b4",
    "hybrid": "#17a2a2",
    "exact": "#2ca02c",
    "exact, gate 7/8": "#98c379",
    "exact, gate 1": "#2ca02c",
    "momentumnet": "#d62728",
    "memcnn": "#ff7f0e",
    "revtorch": "#bc8f00",
}
MARKS = dict(zip(COLOURS, "osDpdv^PXh", strict=True))
"""Of curves by name; those without are not drawn."""


class Panel(NamedTuple):
    """One set of curves.

    Attributes:
        title: What is shown.
        curves: By name, values by depth; a depth that did not run is absent.
        is_log: Whether the axis of values is logarithmic; that of depth always is.
    """

    title: str
    curves: Mapping[str, Mapping[int, float]]
    is_log: bool = True


def plot_curves(panels: Sequence[Panel], dashed: Sequence[str], path: Path) -> None:
    """Values against depth, side by side.

    Args:
        panels: From left to right.
        dashed: Names of curves that are drawn so.
        path: Of the image.
    """
    figure = Figure(figsize=(5 * len(panels), 5), layout="constrained")
    lines: dict[str, Any] = {}
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        drawn = [name for name in panel.curves if name in COLOURS]
        for name in drawn:
            points, dash = panel.curves[name], "--" if name in dashed else "-"
            # Curves may coincide: the later one is thinner and has a smaller mark.
            width = 1.2 + 2.4 * (1 - drawn.index(name) / len(drawn))
            style = {"color": COLOURS[name], "linewidth": width, "markersize": 3 + 2 * width, "marker": MARKS[name]}
            (line,) = axis.plot(list(points), list(points.values()), dash, **style)
            lines[name] = line
        depths = sorted({depth for points in panel.curves.values() for depth in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(depths, labels=[str(depth) for depth in depths])
        axis.set_yscale("log" if panel.is_log else "linear")
        axis.set(title=panel.title, xlabel="blocks a stage")
        axis.grid(alpha=0.3)
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=120)


def plot_times(times: Mapping[str, Sequence[float]], path: Path) -> None:
    """Every time in ms by name, with their medians."""
    figure, axis = _rows(len(times))
    for row, by_round in enumerate(times.values()):
        axis.plot(by_round, [row] * len(by_round), "o", alpha=0.5, color="#1f77b4")
        axis.plot(np.median(by_round), row, "|", markersize=22, color="#222222")
    axis.set_yticks(range(len(times)), labels=list(times))
    axis.set(xlabel="time of a step, ms", xlim=(0, None), ylim=(len(times) - 0.5, -0.5))
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_bars(sizes: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Peak, and before it what is kept, in MiB by name."""
    figure, axis = _rows(len(sizes))
    for column, (label, colour) in enumerate({"peak": "#9ecae1", "kept": "#1f77b4"}.items()):
        axis.barh(list(sizes), [size[column] for size in sizes.values()], color=colour, label=label)
    axis.invert_yaxis()
    axis.set(xlabel="MiB beside weights and image")
    axis.legend()
    figure.savefig(path, dpi=120)


def _rows(count: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 0.6 * count + 1.4), layout="constrained")
    return figure, figure.subplots()
