from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from medmom.data.atomic import atomic_file, write_text
from medmom.errors import MedmomError
from medmom.evaluation.curves import INK
from medmom.evaluation.drawing import png
from medmom.models.factorise import count_dense
from medmom.models.low_rank import LowRankLayer
from medmom.optim.groups import list_layers

TABLE, PICTURE = "ranks.csv", "pictures/ranks.png"

WIDTH_INCHES, ROW_INCHES, CURVE_INCHES, AROUND_INCHES, DPI = 11.0, 0.19, 1.5, 1.3, 150


class RankMonitor(Callback):
    """Logs the ranks of a network's low-rank layers, and keeps them as a table and a picture.

    At the end of every training epoch, truncated, the trainer's loggers get ``rank/<layer>``; they, and
    ``trainer.callback_metrics``, from which metrics.csv is written, get

    - ``rank/mean``: over the layers.
    - ``compression``: parameters of the network, factors as far as they are in use, over those that it had if all of
      its layers were dense.

    ``ranks.csv`` has a row an epoch and a column a layer; a run that is resumed goes on in it. ``pictures/ranks.png``
    shows the same as shares of each layer's highest rank, from input to output, above the course of the compression.

    Args:
        folder: Of the run.
        every: Validations between pictures; the last one is always drawn.

    Raises:
        MedmomError: ``every`` is below 1.
    """

    def __init__(self, folder: Path, *, every: int = 1) -> None:
        if every < 1:
            raise MedmomError(f"rank monitor: every is {every}; give 1 or more.")
        self.folder, self.every = folder, every
        self._rows: list[dict[str, int]] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes over the rows of the epochs that are done."""
        path = self.folder / TABLE
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                rows = [{name: int(text) for name, text in row.items()} for row in csv.DictReader(file)]
            self._rows = [row for row in rows if row["epoch"] < trainer.current_epoch]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Logs the epoch's ranks, adds its row, and draws when it is time."""
        # The task does so after the callbacks, and nothing before it in an epoch without validation.
        for optimizer in trainer.optimizers:
            getattr(optimizer, "eval", lambda: None)()
        network: Any = pl_module.network
        layers = _in_order(network)
        ranks = {name: layer.rank for name, layer in layers.items()}
        self._rows.append({"epoch": trainer.current_epoch, **ranks})
        compression = _compressions(network, layers, np.array([list(ranks.values())]))
        means = {"rank/mean": float(np.mean(list(ranks.values()))), "compression": float(compression[-1])}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in means.items()})
        for logger in trainer.loggers:
            logger.log_metrics({**{f"rank/{name}": rank for name, rank in ranks.items()}, **means}, trainer.global_step)
        if trainer.is_global_zero:
            self._write_table()
            if self._is_time(trainer):
                self._draw(network, layers)

    def _write_table(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self._rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.folder / TABLE, text.getvalue())

    def _is_time(self, trainer: lightning.Trainer) -> bool:
        done, between = trainer.current_epoch + 1, trainer.check_val_every_n_epoch or 1
        return done % (self.every * between) == 0 or done == trainer.max_epochs

    def _draw(self, network: nn.Module, layers: Mapping[str, LowRankLayer]) -> None:
        table = np.array([[row[name] for name in layers] for row in self._rows])
        highest = np.array([int(layer.ranks[2]) for layer in layers.values()])
        picture = draw_ranks(list(layers), table, highest, _compressions(network, layers, table))
        with atomic_file(self.folder / PICTURE) as stream:
            stream.write(picture)


def draw_ranks(names: Sequence[str], ranks: np.ndarray, highest: np.ndarray, compression: np.ndarray) -> bytes:
    """Draws ranks by layer and epoch as colours, and the compression below.

    Args:
        names: Of the layers, from input to output.
        ranks: After each epoch, shape (epochs, layers).
        highest: What they may be, shape (layers,).
        compression: Parameters over those of the dense network, shape (epochs,).

    Returns:
        A PNG; the ranks of the last epoch stand in it as numbers.
    """
    height = ROW_INCHES * len(names) + CURVE_INCHES + AROUND_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[ROW_INCHES * len(names), CURVE_INCHES])
    num_epochs = len(ranks)
    extent = (0.5, num_epochs + 0.5, len(names) - 0.5, -0.5)
    image = above.imshow((ranks / highest).T, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    above.set_yticks(range(len(names)), names)
    numbers = above.secondary_yaxis("right")
    numbers.set_yticks(range(len(names)), [f"{r} of {most}" for r, most in zip(ranks[-1], highest, strict=True)])
    numbers.tick_params(colors=INK["light"][0], labelsize=7.5, length=0)
    numbers.spines["right"].set_visible(False)
    inch = 1 / (ROW_INCHES * len(names))
    bar = figure.colorbar(image, cax=above.inset_axes((0.75, 1 + 0.08 * inch, 0.25, 0.08 * inch)), location="top")
    bar.ax.tick_params(colors=INK["light"][0], labelsize=7.5, length=0)
    _style(above, f"Rank as a share of the highest; in numbers after epoch {num_epochs}")
    epochs = np.arange(1, num_epochs + 1)
    below.plot(epochs, compression, color=INK["light"][2], linewidth=1.8, marker="o", markersize=2.5)
    below.set_ylim(0, max(1.0, 1.05 * float(compression.max())))
    below.grid(color=INK["light"][1], linewidth=0.8)
    below.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    below.set_xlabel("epoch", fontsize=9.5, color=INK["light"][0])
    _style(below, f"Parameters as a share of the dense network's: {compression[-1]:.1%}")
    return png(figure)


def _style(axes: Axes, title: str) -> None:
    text, grid, _ = INK["light"]
    axes.set_title(title, loc="left", y=1.0, fontsize=10.5, color=text, fontweight="bold")
    axes.tick_params(colors=text, labelsize=7.5, length=0)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(grid)


def _in_order(network: nn.Module) -> dict[str, LowRankLayer]:
    """Low-rank layers by name, from input to output."""
    parts = [name for layer in list_layers(network) for name in layer]

    def place(name: str) -> int:
        return next(n for n, part in enumerate([*parts, name]) if f"{name}.".startswith(f"{part}."))

    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LowRankLayer)}
    return {name: layers[name] for name in sorted(layers, key=place)}


def _compressions(network: nn.Module, layers: Mapping[str, LowRankLayer], ranks: np.ndarray) -> np.ndarray:
    """Parameters over those of the dense network, for ranks of shape (epochs, layers)."""
    sizes = [layer.sizes for layer in layers.values()]
    dense = count_dense(network)
    beside = dense - sum(each.rows * each.columns for each in sizes)
    used = [sum(each._replace(rank=int(r)).num_parameters for each, r in zip(sizes, row, strict=True)) for row in ranks]
    return (beside + np.array(used)) / dense
