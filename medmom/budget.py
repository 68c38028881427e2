from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from medmom.errors import MedmomError

WARM_UP, MEASURED = 5, 16
"""Steps before the clock counts (allocation, kernels being chosen), and steps that it measures."""

VALIDATION_SHARE = 0.2
"""Share of the time that validations may take: with less, a run of minutes has too few points for a curve."""

MOST_EPOCHS, SHORTEST_EPOCH_S = 50, 6.0
"""Each epoch costs checkpoints and a validation, which are not worth it more often."""

WARM_UP_SHARE = 0.2
"""Share of the steps over which the learning rate may rise at most, however few fit into the time."""

SPARE = 0.94
"""Share of the time that is planned with; the rest absorbs a machine that slows down a little."""


@dataclass(frozen=True)
class Pace:
    """How fast this machine is.

    Attributes:
        step_s: Seconds of one optimizer step, loading included.
        validation_s: Seconds of one pass over the validation cases.
    """

    step_s: float
    validation_s: float


def measure_pace(
    task: lightning.LightningModule, data: lightning.LightningDataModule, voxels: Sequence[int], **trainer_options: Any
) -> Pace:
    """Trains a copy of the task for some steps and validates a few cases.

    Args:
        task: Stays as it is.
        data: Where batches come from.
        voxels: Size of each validation case, to weigh the measured ones.
        trainer_options: Device, precision and accumulation of the run to come.

    Returns:
        The pace.
    """
    clock = _Clock()
    num_cases = min(2, len(voxels))
    accumulate = trainer_options.get("accumulate_grad_batches", 1)
    trainer = lightning.Trainer(
        max_epochs=1,
        limit_train_batches=(WARM_UP + MEASURED) * accumulate,
        limit_val_batches=num_cases,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
        **trainer_options,
    )
    trainer.fit(copy.deepcopy(task), data)
    # Of an epoch that is too short for a warm-up everything counts, from its start.
    measured = clock.times[WARM_UP * accumulate :] if len(clock.times) > WARM_UP * accumulate + 1 else clock.times
    step_s = (measured[-1] - measured[0]) / (len(measured) - 1) * accumulate
    validation_s = clock.validation_s * sum(voxels) / max(1, sum(voxels[:num_cases]))
    return Pace(step_s, validation_s)


def epochs_in(seconds: float, pace: Pace, *, epochs: int, steps_per_epoch: int) -> tuple[int, int]:
    """Plans epochs and steps per epoch so that training with a validation an epoch takes ``seconds``.

    Args:
        seconds: Time left.
        pace: Measured.
        epochs: Epochs of the whole recipe, which are never exceeded.
        steps_per_epoch: Steps in an epoch of the whole recipe; epochs may become longer, but fewer.

    Returns:
        Epochs and steps per epoch, together at most the steps of the whole recipe.

    Raises:
        MedmomError: The time does not allow a single step and a validation.
    """
    usable = SPARE * seconds
    total = epochs * steps_per_epoch
    shortest = max(SHORTEST_EPOCH_S, pace.validation_s / VALIDATION_SHARE, pace.step_s + pace.validation_s)
    count = int(min(MOST_EPOCHS, epochs, max(1, usable / shortest)))
    steps = int((usable / count - pace.validation_s) / pace.step_s)
    if steps < 1:
        raise MedmomError(
            f"training.max_minutes: {max(0.0, seconds) / 60:.1f} minutes are left, a step takes {pace.step_s:.1f} s "
            f"and a validation {pace.validation_s:.0f} s; allow more time."
        )
    return count, min(steps, total // count)


class _Clock(Callback):
    """Notes when training starts, when each batch ends, and how long a validation lasts."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.validation_s = 0.0

    def on_train_start(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.monotonic())

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.monotonic())

    def on_validation_start(self, *args: Any, **kwargs: Any) -> None:
        self.validation_s -= time.monotonic()

    def on_validation_end(self, *args: Any, **kwargs: Any) -> None:
        self.validation_s += time.monotonic()
