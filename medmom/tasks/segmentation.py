from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from medmom.labels import IGNORE, Labels
from medmom.tasks.base import BaseTask, OptimizerFactory, Schedule

Inferer = Callable[[Tensor, nn.Module], Tensor]


class SegmentationTask(BaseTask):
    """Trains a network that gives every voxel a class.

    A batch is ``{"image": (B, C, *spatial), "label": (B, 1, *spatial), "annotated": (B, K), "case": [name]}``.
    Logs ``train_loss`` and ``lr``; after a validation ``val_dice`` (mean over cases, then classes, on the working
    grid, to choose a checkpoint by) and ``val_dice_<class>``. What is reported is scored from written files instead.

    Args:
        network: In training mode it may give a list of logits, full resolution first; else logits (B, K, *spatial).
        loss: Maps (outputs, label, annotated) to a scalar.
        labels: Class names by channel.
        inferer: Runs a whole case through the network.
        optimizer: Makes the optimizer from the network's parameters.
        schedule: Factor of the learning rate at each step.
        seed: Seed of the run.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: nn.Module,
        labels: Labels,
        inferer: Inferer,
        optimizer: OptimizerFactory,
        schedule: Schedule | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(network, optimizer=optimizer, schedule=schedule, seed=seed)
        self.loss, self.labels, self.inferer = loss, labels, inferer
        self._dice: list[Tensor] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Gives the loss of one batch of patches."""
        loss: Tensor = self.loss(self.network(batch["image"]), batch["label"], batch["annotated"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch["image"]))
        return self.remember_loss(loss)

    def segment(self, image: Tensor) -> Tensor:
        """Gives the channel indices (B, *spatial) of whole images (B, C, *spatial)."""
        return self.inferer(image, self.network).argmax(dim=1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Scores one whole case on the working grid."""
        prediction = self.segment(batch["image"])
        self._dice.append(dice_by_class(prediction, batch["label"][:, 0], batch["annotated"]))

    def on_validation_epoch_end(self) -> None:
        """Logs Dice, the mean over cases of each class, and the mean over classes."""
        by_class = torch.cat(self._dice).nanmean(dim=0)
        self._dice.clear()
        for name, value in zip(self.labels.foreground, by_class, strict=True):
            if not value.isnan():
                self.log(f"val_dice_{name}", value, sync_dist=True)
        mean = by_class.nanmean()
        self.log("val_dice", torch.where(mean.isnan(), 0.0, mean), prog_bar=True, sync_dist=True)


def dice_by_class(prediction: Tensor, reference: Tensor, annotated: Tensor) -> Tensor:
    """Dice of each foreground class in each case.

    Args:
        prediction: Channel indices (B, *spatial).
        reference: Channel indices (B, *spatial); 255 where a voxel does not count.
        annotated: Bool (B, K).

    Returns:
        Shape (B, K - 1); nan where a class is not annotated, or in neither map.
    """
    counts = reference != IGNORE
    axes = tuple(range(1, prediction.ndim))
    rows = []
    for channel in range(1, annotated.shape[1]):
        found, wanted = (prediction == channel) & counts, (reference == channel) & counts
        both, total = (found & wanted).sum(axes), found.sum(axes) + wanted.sum(axes)
        rows.append(torch.where(annotated[:, channel] & (total > 0), 2 * both / total, torch.nan))
    return torch.stack(rows, dim=1)
