"""What a training writes beside its weights."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import tiny_recipe

from medmom.callbacks import AtomicCheckpoints, CurveFile, ValidationPicture
from medmom.data.cache import PreparedCase
from medmom.errors import MedmomError
from medmom.jobs.segmentation import SegmentationJob
from medmom.tasks.segmentation import SegmentationTask


def test_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    content = {"state_dict": {"w": torch.arange(3.0)}, "epoch": 4}
    AtomicCheckpoints().save_checkpoint(content, tmp_path / "deep" / "last.ckpt")
    read = AtomicCheckpoints().load_checkpoint(tmp_path / "deep" / "last.ckpt")
    assert read["epoch"] == 4
    assert torch.equal(read["state_dict"]["w"], torch.arange(3.0))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["last.ckpt"]


def test_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"epoch": 1}, path)

    def half(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medmom.callbacks.torch.save", half)
    with pytest.raises(MedmomError, match=r"last.ckpt: cannot be written \(No space left on device\); .*--resume"):
        AtomicCheckpoints().save_checkpoint({"epoch": 2}, path)
    assert AtomicCheckpoints().load_checkpoint(path) == {"epoch": 1}


class Code:
    pass


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "code"])
def test_damaged_checkpoint_is_refused_with_its_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"w": torch.zeros(1000)} if kind != "code" else {"w": Code()}, path)
    content = {"empty": b"", "text": b"hello", "truncated": path.read_bytes()[:-200], "code": path.read_bytes()}
    path.write_bytes(content[kind])
    with pytest.raises(MedmomError, match=r"last.ckpt: not a sound checkpoint; delete it"):
        AtomicCheckpoints().load_checkpoint(path)


def trainer(epoch: int, **metrics: float) -> Any:
    every = metrics.pop("every", 1)
    return SimpleNamespace(
        current_epoch=epoch,
        global_step=10 * (epoch + 1),
        callback_metrics={key: torch.tensor(value) for key, value in metrics.items()},
        check_val_every_n_epoch=every,
        max_epochs=6,
        is_global_zero=True,
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_curve_has_a_row_an_epoch_and_new_columns_when_they_come(tmp_path: Path) -> None:
    curve = CurveFile(tmp_path / "metrics.csv")
    curve.on_train_start(trainer(0), None)  # type: ignore[arg-type]
    curve.on_train_epoch_end(trainer(0, train_loss=2.0, every=2), None)  # type: ignore[arg-type]
    assert rows(curve.path) == [{"epoch": "0", "step": "10", "train_loss": "2"}]
    curve.on_train_epoch_end(trainer(1, train_loss=1.5, val_dice=0.25, every=2), None)  # type: ignore[arg-type]
    assert rows(curve.path)[0]["val_dice"] == ""
    assert rows(curve.path)[1] == {"epoch": "1", "step": "20", "train_loss": "1.5", "val_dice": "0.25"}


def test_curve_does_not_repeat_the_last_validation(tmp_path: Path) -> None:
    curve = CurveFile(tmp_path / "metrics.csv")
    # Lightning keeps a metric until a new value comes.
    for epoch in range(4):
        curve.on_train_epoch_end(trainer(epoch, train_loss=1.0, val_dice=0.5, every=2), None)  # type: ignore[arg-type]
    assert [row.get("val_dice") for row in rows(curve.path)] == ["", "0.5", "", "0.5"]


@pytest.mark.parametrize(("resumed_at", "kept"), [(0, []), (1, ["0"]), (3, ["0", "1", "2"])])
def test_resumed_curve_goes_on_where_the_checkpoint_stands(resumed_at: int, kept: list[str], tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = CurveFile(path)
    for epoch in range(3):
        first.on_train_epoch_end(trainer(epoch, train_loss=epoch), None)  # type: ignore[arg-type]
    second = CurveFile(path)
    second.on_train_start(trainer(resumed_at), None)  # type: ignore[arg-type]
    second.on_train_epoch_end(trainer(resumed_at, train_loss=9.0), None)  # type: ignore[arg-type]
    table = rows(path)
    assert [row["epoch"] for row in table] == [*kept, str(resumed_at)]
    assert table[-1]["train_loss"] == "9"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedCase, SegmentationTask]:
    folder = tmp_path_factory.mktemp("shown")
    job = SegmentationJob.start(tiny_recipe(folder), folder / "run", torch.device("cpu"), quiet=True)
    _, validation = job.prepared
    return validation[0], job.task(job.run.recipe.build()).eval()


def test_picture_is_drawn_every_few_validations_and_at_the_last(
    shown: tuple[PreparedCase, SegmentationTask], tmp_path: Path
) -> None:
    case, task = shown
    picture = ValidationPicture(case, task.labels, tmp_path / "pictures", every=2)
    for epoch in range(5):
        picture.on_validation_end(trainer(epoch), task)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["epoch_0002.png", "epoch_0004.png"]
    picture.on_validation_end(trainer(5), task)
    picture.on_validation_end(trainer(4, every=5), task)
    names = ["epoch_0002.png", "epoch_0004.png", "epoch_0005.png", "epoch_0006.png"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names
    assert (tmp_path / "pictures" / "epoch_0006.png").read_bytes().startswith(b"\x89PNG")
