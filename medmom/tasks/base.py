from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from medmom.errors import MedmomError
from medmom.tasks.refresh import BATCHES, fresh_batches, has_statistics, refresh_statistics

logger = logging.getLogger(__name__)

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Schedule = Callable[[int], float]


class BaseTask(lightning.LightningModule):
    """Network, loss and optimizer, and the one seam between optimizers and Lightning.

    The seam knows no optimizer by name. It keeps four promises:

    - An optimizer with two points (``train()`` and ``eval()``, such as schedule-free ones) trains at the one and
      is validated and saved at the other; a checkpoint between two steps is refused. One whose ``train()`` answers
      False has a single point.
    - With such an optimizer, running statistics of batch norm are estimated anew at the point that is validated and
      saved, from training batches; this changes neither batches nor random numbers of the training that follows.
    - A closure returns the loss of the whole step, the mean over micro-batches and processes. Lightning alone
      would hand on the last micro-batch's loss divided by their number, and each process its own.
    - A rule that needs the loss (``needs_loss``) is given the same mean, unscaled, as ``step(loss=...)`` where a
      gradient scaler stands between (precision 16-mixed), which hands no closure on.

    Args:
        network: Maps a batch of images to logits.
        optimizer: Makes the optimizer from the network's parameters.
        schedule: Factor of the learning rate at each step; None keeps it.
        seed: Seed of the run.
    """

    def __init__(
        self, network: nn.Module, *, optimizer: OptimizerFactory, schedule: Schedule | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.network, self.seed = network, seed
        self._make_optimizer, self._schedule = optimizer, schedule
        self._micro_losses: list[Tensor] = []
        # Whether the weights have moved since they were last brought to the point that is saved.
        self._is_between = False

    def network_input(self, batch: Any) -> Any:
        """Gives what the network is given of a batch; a task whose batches are other says so here."""
        return batch["image"]

    def configure_optimizers(self) -> Any:
        """Makes the optimizer and, with a schedule, its step-wise learning rate."""
        optimizer = self._make_optimizer(self.network.parameters())
        if getattr(optimizer, "needs_loss", False) and self.trainer.gradient_clip_val:
            logger.warning(
                "%s: clipped gradients do not belong to the loss it is given, and its step is bounded anyway; "
                "set training.gradient_clip to null.",
                type(optimizer).__name__,
            )
        if self._schedule is None:
            return {"optimizer": optimizer}
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def remember_loss(self, loss: Tensor) -> Tensor:
        """Keeps a micro-batch's loss for the step it belongs to; ``training_step`` returns what this returns."""
        self._micro_losses.append(loss.detach())
        return loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Takes one step; its closure returns the mean loss over micro-batches and processes."""
        earlier = len(self._micro_losses)
        loss = self._loss_to_fill(optimizer)

        def closure() -> Tensor | None:
            # A line search calls more than once: the last micro-batch is computed anew, not once more.
            del self._micro_losses[earlier:]
            if optimizer_closure is not None:
                optimizer_closure()
            found = self._loss_of_the_step()
            if loss is not None and found is not None:
                loss.copy_(found)
            return found

        optimizer.step(closure=closure, **({} if loss is None else {"loss": loss}))
        self._micro_losses.clear()

    def _loss_to_fill(self, optimizer: Any) -> Tensor | None:
        """Where the closure is to put the loss: a scaler runs it before the step and drops what it returns."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        is_wanted = scaler is not None and getattr(optimizer, "needs_loss", False)
        return torch.full((), torch.nan, device=self.device) if is_wanted else None

    def _loss_of_the_step(self) -> Tensor | None:
        if not self._micro_losses:
            return None
        loss = torch.stack(self._micro_losses).float().mean()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(loss, op=torch.distributed.ReduceOp.SUM)
            loss /= torch.distributed.get_world_size()
        return loss

    def on_train_epoch_start(self) -> None:
        """Ties every random draw of the epoch to (seed, epoch), so that a resumed run draws the same."""
        torch.manual_seed(self.seed + self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Puts a two-point optimizer where gradients are taken, and logs the learning rate of the step to come."""
        if batch_idx == 0:
            # Once more: a loader's iteration begins before the epoch in a resumed run, after its start in others, and
            # draws a number. Apart from every epoch's own seed, so that data and network do not draw alike.
            torch.manual_seed(2**32 + self.seed + self.current_epoch)
        self._is_between = self._switch("train")
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=False, on_epoch=True, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Puts a two-point optimizer at the weights that count, which are the ones saved."""
        self._settle()

    def on_validation_model_eval(self) -> None:
        """Puts a two-point optimizer at the weights that count, while layers still know how they train."""
        self._settle()
        super().on_validation_model_eval()

    def on_test_model_eval(self) -> None:
        """Puts a two-point optimizer at the weights that count."""
        self._settle()
        super().on_test_model_eval()

    def on_predict_model_eval(self) -> None:
        """Puts a two-point optimizer at the weights that count."""
        self._settle()
        super().on_predict_model_eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to save the training point of a two-point optimizer.

        Raises:
            MedmomError: The checkpoint is written between two training steps.
        """
        if self._is_between:
            name = type(self.trainer.optimizers[0]).__name__
            raise MedmomError(
                f"{name} stands at its training point between two steps, and a checkpoint would hold that; save at "
                "the end of an epoch or after a validation."
            )

    def _settle(self) -> None:
        """Brings a two-point optimizer to the weights that count, and batch norm to the statistics they have."""
        if self._switch("eval") and self._is_between:
            self._refresh()
        self._is_between = False

    def _refresh(self) -> None:
        if not has_statistics(self.network):
            return
        strategy, precision = self.trainer.strategy, self.trainer.precision_plugin
        num_batches = int(min(BATCHES, self.trainer.num_training_batches))
        with isolate_rng(), precision.forward_context():
            torch.manual_seed(self.seed + self.current_epoch)
            batches = fresh_batches(self.trainer.train_dataloader, num_batches)
            moved = (strategy.batch_to_device(precision.convert_input(batch)) for batch in batches)
            refresh_statistics(self.network, (self.network_input(batch) for batch in moved))

    def _switch(self, mode: str) -> bool:
        """Switches two-point optimizers; gives whether there is one: none that says False has two points."""
        if self._trainer is None or not self.trainer.optimizers:
            return False
        switches = [getattr(optimizer, mode, None) for optimizer in self.trainer.optimizers]
        answers = [switch() for switch in switches if callable(switch)]
        return any(answer is not False for answer in answers)
