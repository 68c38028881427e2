"""What is logged, written and drawn of the ranks of a network."""

from __future__ import annotations

import copy
import io
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from line_task import HINTS, LineTask, loader, trainer
from PIL import Image
from tiny_run import rows
from torch import nn

from medmom.callbacks import CurveFile
from medmom.errors import MedmomError
from medmom.evaluation.report import write_report
from medmom.models import MomentumUNet, to_dense, to_low_rank
from medmom.models.factorise import compact, list_ranks
from medmom.optim import LowRankAdam
from medmom.rank_monitor import RankMonitor, draw_ranks

pytestmark = pytest.mark.filterwarnings(*HINTS)


class Book(Logger):
    """Keeps what it is given of ranks."""

    name = "book"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "compression" in metrics and "epoch" not in metrics:
            self.pages.append((step, metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = nn.Sequential(
            nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 12), nn.Linear(12, 1)
        )
    return to_low_rank(dense, 0.4, gradients="tangent", room=2)


def fit(folder: Path, **options: Any) -> tuple[LineTask, Book]:
    rule = partial(LowRankAdam, lr=0.02, tolerance=0.4, local_steps=100)
    task, book = LineTask(network(), optimizer=rule), Book()
    made = trainer(folder, RankMonitor(folder), CurveFile(folder / "metrics.csv"), logger=book, **options)
    made.fit(task, loader(torch.linspace(-1, 1, 3)), loader(torch.zeros(1)), weights_only=True)
    return task, book


def standing_at(epoch: int, **changes: Any) -> Any:
    """What the monitor asks a trainer of five epochs."""
    told = {"current_epoch": epoch, "max_epochs": 5, "check_val_every_n_epoch": 1, "global_step": epoch, **changes}
    return SimpleNamespace(**told, optimizers=[], loggers=[], callback_metrics={}, is_global_zero=True)


def test_ranks_are_logged_by_layer_and_their_mean_in_the_metrics(tmp_path: Path) -> None:
    task, book = fit(tmp_path, max_epochs=2)
    ranks = {name: sizes.rank for name, sizes in list_ranks(task.network).items()}
    (first, _), (step, page) = book.pages
    assert (first, step) == (3, 6)
    assert {name: page[f"rank/{name}"] for name in ("2", "4")} == ranks
    assert page["rank/mean"] == sum(ranks.values()) / 2
    (*_, row) = rows(tmp_path / "metrics.csv")
    assert {"rank/mean", "compression"} == {name for name in row if name.startswith(("rank", "compression"))}
    assert float(row["compression"]) == pytest.approx(page["compression"], rel=1e-5)
    assert [row["epoch"] for row in rows(tmp_path / "ranks.csv")] == ["0", "1"]
    assert rows(tmp_path / "ranks.csv")[-1] == {"epoch": "1", **{name: str(rank) for name, rank in ranks.items()}}


def test_compression_counts_factors_as_far_as_they_are_in_use(tmp_path: Path) -> None:
    task, book = fit(tmp_path, max_epochs=1)
    kept, dense = (
        sum(p.numel() for p in change(copy.deepcopy(task.network)).parameters() if p.is_floating_point())
        for change in (compact, to_dense)
    )
    assert book.pages[0][1]["compression"] == pytest.approx(kept / dense)


def test_ranks_are_truncated_ones_also_where_nothing_is_validated(tmp_path: Path) -> None:
    _, book = fit(tmp_path, max_epochs=1, check_val_every_n_epoch=2)
    # In the middle of a cycle the bases are twice as wide as the highest rank, 6 and 5.
    assert book.pages[0][1]["rank/2"] <= 6 and book.pages[0][1]["rank/4"] <= 5


def test_resumed_run_goes_on_behind_the_epochs_that_are_done(tmp_path: Path) -> None:
    module: Any = SimpleNamespace(network=network())
    # The last epoch was written, and its checkpoint was not.
    (tmp_path / "ranks.csv").write_text("epoch,2,4\n0,6,5\n1,4,3\n2,99,99\n")
    monitor = RankMonitor(tmp_path, every=9)
    monitor.on_train_start(standing_at(2), module)
    monitor.on_train_epoch_end(standing_at(2), module)
    assert (tmp_path / "ranks.csv").read_text() == "epoch,2,4\n0,6,5\n1,4,3\n2,6,5\n"


def test_new_run_does_not_go_on_in_an_old_table(tmp_path: Path) -> None:
    (tmp_path / "ranks.csv").write_text("epoch,2,4\n0,99,99\n")
    fit(tmp_path, max_epochs=1)
    assert len(rows(tmp_path / "ranks.csv")) == 1


@pytest.mark.parametrize(("every", "between", "expected"), [(2, 1, [2, 4, 5]), (1, 2, [2, 4, 5]), (9, 1, [5])])
def test_pictures_come_as_often_as_asked_and_at_the_end(
    every: int, between: int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draw(names: Any, ranks: np.ndarray, *_: Any) -> bytes:
        drawn.append(len(ranks))
        return b"PNG"

    monkeypatch.setattr("medmom.rank_monitor.draw_ranks", draw)
    monitor, module = RankMonitor(tmp_path, every=every), SimpleNamespace(network=network())
    for epoch in range(5):
        monitor.on_train_epoch_end(standing_at(epoch, check_val_every_n_epoch=between), module)  # type: ignore[arg-type]
    assert drawn == expected
    assert (tmp_path / "pictures" / "ranks.png").read_bytes() == b"PNG"


def test_layers_stand_from_input_to_output(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"kernels": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 2]]}
    unet = to_low_rank(MomentumUNet(1, 3, channels=(8, 8, 16), blocks=(1, 2, 2), **plan), 0.25)
    RankMonitor(tmp_path, every=2).on_train_epoch_end(standing_at(0), SimpleNamespace(network=unet))  # type: ignore[arg-type]
    names = list(rows(tmp_path / "ranks.csv")[0])
    stages = [".".join(name.split(".")[:3]) for name in names[1:]]
    assert list(dict.fromkeys(stages)) == [
        "encoder.stages.0", "encoder.stages.1", "encoder.stages.2", "decoder.stages.1", "decoder.stages.0"
    ]  # fmt: skip


def test_many_layers_and_epochs_fit_into_the_picture() -> None:
    names = [f"encoder.stages.3.momentum.blocks.{k}.conv1" for k in range(26)]
    ranks = np.linspace(np.full(26, 64), np.full(26, 2), 200).astype(int)
    with Image.open(io.BytesIO(draw_ranks(names, ranks, np.full(26, 64), np.linspace(0.5, 0.1, 200)))) as image:
        assert image.width == 1650 and 1000 < image.height < 1300
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # From the lightest colour of the scale, on the left, to the darkest.
    bright, dark = ((abs(pixels - colour).sum(-1) < 24) for colour in ([253, 231, 37], [70, 8, 92]))
    columns = [np.flatnonzero(mask[300:700].any(axis=0)) for mask in (bright, dark)]
    assert columns[0].max() < columns[1].min()
    # 200 epochs have 4 pixels each, or more.
    assert columns[1].max() - columns[0].min() > 800


def test_report_of_a_run_shows_the_picture_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "run" / "pictures").mkdir(parents=True)
    (tmp_path / "run" / "metrics.csv").write_text("epoch,step,train_loss\n0,2,1.0\n")

    def told() -> str:
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    write_report(tmp_path / "run", tmp_path / "report.html")
    assert "<h2>Ranks</h2>" not in told()
    (tmp_path / "run" / "pictures" / "ranks.png").write_bytes(b"a picture")
    write_report(tmp_path / "run", tmp_path / "report.html")
    assert "<h2>Ranks</h2>" in told() and "data:image/png;base64,YSBwaWN0dXJl" in told()


def test_number_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="rank monitor: every is 0; give 1 or more"):
        RankMonitor(tmp_path, every=0)
