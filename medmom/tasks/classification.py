from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributions import Beta
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    multiclass_f1_score,
    multiclass_recall,
)
from torchmetrics.utilities.distributed import gather_all_tensors

from medmom.classes import Classes
from medmom.errors import MedmomError
from medmom.tasks.base import BaseTask, OptimizerFactory, Schedule
from medmom.tasks.class_losses import ClassificationLoss


class Validation(NamedTuple):
    """What a validation saw, on the CPU.

    Attributes:
        logits: Of each case, float32 (N, K).
        target: 0 or 1, float32 (N, K).
        cases: Names of the cases, in the same order.
    """

    logits: Tensor
    target: Tensor
    cases: tuple[str, ...]


class ClassificationTask(BaseTask):
    """Trains a network that tells what a whole image is.

    A batch is ``{"image": (B, C, *spatial), "target": (B, K), "case": [name]}``. Logs ``train_loss`` and ``lr``; after
    a validation ``val_loss`` and what ``score_logits`` gives, to choose a checkpoint by. What is reported is scored
    from written files instead.

    Args:
        network: From images to logits (B, K). Its head is taken to read means over space.
        loss: Maps (logits, target) to a scalar, such as ``ClassificationLoss``, which is told what the classes are.
        classes: Class names by channel.
        optimizer: Makes the optimizer from the network's parameters.
        schedule: Factor of the learning rate at each step.
        seed: Seed of the run.
        mixup: How evenly two images are mixed in training, see ``mix_images``; 0: not at all.
        weights: By class, how much it counts in the loss; None: all the same.

    Attributes:
        monitor: Name of the score to choose a checkpoint by, the higher the better; it is never nan.
        last_validation: What the last validation saw, from all processes; None before the first.

    Raises:
        MedmomError: The last normalisation of the network is an instance normalisation, the loss is none for whole
            images or takes no weights, or weights and classes do not match.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: nn.Module,
        classes: Classes,
        optimizer: OptimizerFactory,
        schedule: Schedule | None = None,
        seed: int = 0,
        mixup: float = 0.0,
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__(network, optimizer=optimizer, schedule=schedule, seed=seed)
        _check_last_norm(network)
        _tell(loss, classes, weights)
        self.loss, self.classes, self.mixup = loss, classes, mixup
        self.monitor = "val_auroc" if classes.is_multilabel else "val_balanced_accuracy"
        self.last_validation: Validation | None = None
        self._seen: list[tuple[Tensor, Tensor, list[str]]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Gives the loss of one batch."""
        image, target = batch["image"], batch["target"]
        if self.mixup:
            image, target = mix_images(image, target, self.mixup)
        loss: Tensor = self.loss(self.network(image), target)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(image))
        return self.remember_loss(loss)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keeps the logits of one batch."""
        logits = self.network(batch["image"])
        self._seen.append((logits.detach().float(), batch["target"].float(), list(batch["case"])))

    def on_validation_epoch_end(self) -> None:
        """Logs loss and scores of all cases together."""
        logits = torch.cat([logits for logits, _, _ in self._seen])
        target = torch.cat([target for _, target, _ in self._seen])
        cases = [name for _, _, names in self._seen for name in names]
        self._seen.clear()
        if distributed.is_available() and distributed.is_initialized():
            logits, target, cases = _of_all_processes(logits, target, cases)
        self.log("val_loss", self.loss(logits, target), sync_dist=True)
        self.last_validation = Validation(logits.cpu(), target.cpu(), tuple(cases))
        logits, target = self.last_validation.logits, self.last_validation.target
        for name, value in score_logits(logits, target, is_multilabel=self.classes.is_multilabel).items():
            self.log(f"val_{name}", value, prog_bar=f"val_{name}" == self.monitor, sync_dist=True)


def mix_images(image: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixes each image of a batch with another one of it, and their targets alike: ``m a + (1 - m) b``.

    The share ``m``, one for the whole batch, is drawn from Beta(alpha, alpha), and partners from all images of the
    batch, both by torch's generator of the CPU.

    Args:
        image: Shape (B, C, *spatial).
        target: Shape (B, K).
        alpha: Above 0; small: one of the two nearly alone; 1: every share alike.

    Returns:
        Images and targets of the same shapes; the given ones stay as they are.

    Source:
        Zhang et al. 2018, arXiv:1710.09412; one share a batch and partners from it, as in its section 2.
    """
    share = Beta(alpha, alpha).sample().item()  # type: ignore[no-untyped-call]
    partners = torch.randperm(len(image)).to(image.device)
    return tuple(share * part + (1 - share) * part[partners] for part in (image, target))  # type: ignore[return-value]


def score_logits(logits: Tensor, target: Tensor, *, is_multilabel: bool) -> dict[str, float]:
    """Scores of images by their logits; means over classes leave out those that cannot be scored.

    Args:
        logits: Shape (N, K); one that is nan counts as 0.
        target: 0 or 1, shape (N, K).
        is_multilabel: Whether an image may be of any number of classes.

    Returns:
        Of exactly one class an image ``accuracy``; ``balanced_accuracy`` and ``f1``, means over the classes that
        images are of; ``auroc`` of one class against the rest, mean over classes with both outcomes, absent where none
        has. Of any number ``auroc``, 0.5 where no class has both outcomes; ``auprc``, mean over the same classes,
        absent where there are none; ``f1`` at probability 0.5, mean over classes that images are of, absent likewise.
    """
    logits, truth = logits.double().nan_to_num(), target.long()
    present = [k for k, column in enumerate(truth.T) if column.any()]
    columns = [k for k in present if not truth[:, k].all()]
    # In double precision: probabilities that round to 1 would be ties.
    probabilities = logits.sigmoid() if is_multilabel else logits.softmax(dim=1)
    auroc = [binary_auroc(probabilities[:, k], truth[:, k]) for k in columns]
    if is_multilabel:
        auprc = [binary_average_precision(probabilities[:, k], truth[:, k]) for k in columns]
        f1 = [binary_f1_score(probabilities[:, k], truth[:, k]) for k in present]
        found = {"auroc": auroc or [torch.tensor(0.5)], "auprc": auprc, "f1": f1}
    else:
        classes, num_classes = truth.argmax(dim=1), logits.shape[1]
        recall, f1 = (
            list(score(logits, classes, num_classes, average="none")[present])
            for score in (multiclass_recall, multiclass_f1_score)
        )
        accuracy = (logits.argmax(dim=1) == classes).double().mean()
        found = {"accuracy": [accuracy], "balanced_accuracy": recall, "f1": f1, "auroc": auroc}
    return {name: float(torch.stack(values).mean()) for name, values in found.items() if values}


def _check_last_norm(network: nn.Module) -> None:
    """Refuses a network whose head would read the same from every image."""
    last = None
    for name, part in network.named_modules():
        if isinstance(part, _NormBase | nn.GroupNorm):
            last = name, part
    if last is None:
        return
    is_by_channel = isinstance(last[1], nn.GroupNorm) and last[1].num_groups == last[1].num_channels
    if is_by_channel or isinstance(last[1], _InstanceNorm):
        raise MedmomError(
            f"{type(network).__name__}: its last normalisation, {last[0]}, is one of each channel of each image, which "
            "gives it the same mean in every image, and means are what a classifier reads; take group normalisation "
            "with several channels a group, or batch normalisation."
        )


def _tell(loss: nn.Module, classes: Classes, weights: Tensor | Sequence[float] | None) -> None:
    """Lets the loss know of classes and weights, or refuses one that takes something else."""
    name = type(loss).__name__
    parameters = inspect.signature(loss.forward).parameters.values()
    if sum(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters) != 2:
        raise MedmomError(f"loss {name}: no loss of whole images; take medmom.tasks.class_losses.ClassificationLoss.")
    if weights is not None and len(weights) != classes.num_channels:
        raise MedmomError(f"{len(weights)} class weights for {classes.num_channels} classes; give one for each.")
    if isinstance(loss, ClassificationLoss):
        loss.is_multilabel = classes.is_multilabel
        loss.set_weights(weights)
    elif weights is not None:
        raise MedmomError(
            f"loss {name} takes no class weights; set data.balance to none or sampling, or take ClassificationLoss."
        )


def _of_all_processes(logits: Tensor, target: Tensor, cases: list[str]) -> tuple[Tensor, Tensor, list[str]]:
    """Joins what the processes saw; a case that fills up the last batch of one counts once."""
    # Names travel as text in a tensor: gathering objects would pickle them.
    texts = [name.encode() for name in cases]
    width = max(len(text) for text in texts)
    letters = torch.tensor([list(text.ljust(width, b"\0")) for text in texts], dtype=torch.uint8, device=logits.device)
    rows = [row for part in gather_all_tensors(letters) for row in part.tolist()]
    place = {bytes(row).rstrip(b"\0").decode(): number for number, row in enumerate(rows)}
    logits, target = (
        torch.cat(gather_all_tensors(part.contiguous()))[list(place.values())] for part in (logits, target)
    )
    return logits, target, list(place)
