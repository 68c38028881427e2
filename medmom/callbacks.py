from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from medmom.data.atomic import write_text
from medmom.data.cache import PreparedCase
from medmom.errors import MedmomError
from medmom.evaluation.overlay import cut_picture, cut_planes, draw_planes
from medmom.labels import IGNORE, Labels
from medmom.tasks.segmentation import SegmentationTask


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a killed run never leaves half a file.

    Reads with ``weights_only=True``: tensors and plain types, no code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint; the old one stands until the new one is complete.

        Raises:
            MedmomError: The place cannot be written.
        """
        draft = Path(f"{path}.draft")
        try:
            draft.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError as error:
            raise MedmomError(
                f"{path}: cannot be written ({error.strerror}); make room, then go on with --resume."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a checkpoint on to the CPU.

        Raises:
            MedmomError: The file is no checkpoint or is damaged.
        """
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch's reader raises many kinds on what is no checkpoint
            raise MedmomError(f"{path}: not a sound checkpoint; delete it to begin the run anew.") from error


class CurveFile(Callback):
    """Writes what is logged to ``metrics.csv``, one row an epoch, and goes on in it when a run is resumed.

    Lightning's own CSV logger deletes the file of an earlier start.

    Args:
        path: The CSV file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes over the rows of the epochs that are done."""
        if trainer.current_epoch and self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < trainer.current_epoch]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Adds the epoch's row."""
        metrics = {key: f"{float(value):.6g}" for key, value in sorted(trainer.callback_metrics.items())}
        if not _validated(trainer):
            metrics = {key: value for key, value in metrics.items() if not key.startswith("val_")}
        self._rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics})
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.path, text.getvalue())


class ValidationPicture(Callback):
    """Draws a validation case, prediction over reference, every few validations.

    Args:
        case: The case to draw.
        labels: Class names and colours.
        folder: Where the PNG files go, named by epoch.
        every: Validations between pictures; the last one is always drawn.
        is_picture: Whether the case lies on a page as it is; else it is a scan, of which planes are shown.
    """

    def __init__(
        self, case: PreparedCase, labels: Labels, folder: Path, *, every: int, is_picture: bool = False
    ) -> None:
        self.case, self.labels, self.folder, self.every, self.is_picture = case, labels, folder, every, is_picture

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draws, when it is time."""
        if not isinstance(pl_module, SegmentationTask) or not trainer.is_global_zero:
            return
        done, between = trainer.current_epoch + 1, trainer.check_val_every_n_epoch or 1
        if (done // between) % self.every and done + between <= (trainer.max_epochs or 0):
            return
        case, _, _ = self.case.open()
        if case.label is None:
            return
        image = torch.from_numpy(case.image)[None].to(pl_module.device)
        with torch.inference_mode():
            prediction = pl_module.segment(image)[0].cpu().numpy().astype("uint8")
        reference = np.where(case.label == IGNORE, 0, case.label)
        if self.is_picture:
            planes = [cut_picture(case.image, prediction, reference)]
        else:
            planes = cut_planes(case.image[0], prediction, reference, case.geometry.spacing)
        if not planes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"epoch_{trainer.current_epoch + 1:04d}.png"
        path.write_bytes(draw_planes(planes, self.labels))


def _validated(trainer: lightning.Trainer) -> bool:
    return (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
