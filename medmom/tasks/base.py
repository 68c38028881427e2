from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from medmom.errors import MedmomError

logger = logging.getLogger(__name__)

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Schedule = Callable[[int], float]


class BaseTask(lightning.LightningModule):
    """Network, loss and optimizer, and the one seam between optimizers and Lightning.

    The seam knows no optimizer by name. It keeps three promises:

    - An optimizer with two points (``train()`` and ``eval()``, such as schedule-free ones) trains at the one and
      is validated and saved at the other.
    - A closure returns the loss of the whole step, the mean over micro-batches and processes. Lightning alone
      would hand on the last micro-batch's loss divided by their number, and each process its own.
    - A rule that needs the loss (``needs_loss``) is refused where Lightning cannot hand it on.

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

    def configure_optimizers(self) -> Any:
        """Makes the optimizer and, with a schedule, its step-wise learning rate.

        Raises:
            MedmomError: The rule needs the loss, and the precision is fp16, where Lightning does not hand it on.
        """
        optimizer = self._make_optimizer(self.network.parameters())
        if getattr(optimizer, "needs_loss", False) and str(self.trainer.precision).startswith("16"):
            raise MedmomError(
                f"{type(optimizer).__name__} needs the loss, which training.precision {self.trainer.precision} "
                "does not hand on; choose bf16-mixed or 32-true."
            )
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

        def closure() -> Tensor | None:
            # A line search calls more than once: the last micro-batch is computed anew, not once more.
            del self._micro_losses[earlier:]
            if optimizer_closure is not None:
                optimizer_closure()
            return self._loss_of_the_step()

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self._micro_losses.clear()

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
        self._switch("train")
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=False, on_epoch=True, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Puts a two-point optimizer at the weights that count, which are the ones saved."""
        self._switch("eval")

    def on_validation_start(self) -> None:
        """Puts a two-point optimizer at the weights that count."""
        self._switch("eval")

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def _switch(self, mode: str) -> None:
        if self._trainer is None or not self.trainer.optimizers:
            return
        for optimizer in self.trainer.optimizers:
            switch = getattr(optimizer, mode, None)
            if callable(switch):
                switch()
