"""The way from a trained residual network to a momentum network: its gate rises while it trains."""

from __future__ import annotations

from math import isfinite
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch import nn

from medmom.errors import MedmomError
from medmom.models.gates import LOW_PRECISION_BITS, check_reversible
from medmom.models.momentum import MomentumStage


def ramp_gate(step: int, total: int, target: float, *, hold: float = 0.05, end: float = 0.25) -> float:
    """Gate after a number of steps: 0, then a straight line, then the target.

    Args:
        step: Optimizer steps taken.
        total: Optimizer steps of the whole run.
        target: The last gate.
        hold: Share of the run with gate 0.
        end: Share of the run after which the gate is the target, above ``hold``.

    Returns:
        A gate in [0, target].
    """
    progress = (step / total - hold) / (end - hold)
    return target * min(1.0, max(0.0, progress))


class GateRamp(Callback):
    """Leads every momentum stage from gate 0 to a target, for weights that were trained at gate 0.

    Such weights are a trained residual network's, see ``medmom.models.convert.from_host``. The gate is that of
    ``ramp_gate`` at the number of steps taken, and of nothing else: a resumed run goes on where it was, validation
    and checkpoints see the gate that belongs to their weights, and at the end the network has the target.

    Args:
        target: The last gate, above 0.
        hold: Share of the run's optimizer steps with gate 0.
        end: Share of the run after which the gate is the target, above ``hold`` and at most 1.
        then: What the network keeps for its backward pass once the ramp is done, such as ``"reversible"``; None
            changes nothing. During the ramp stages keep all activations or checkpoint them: what runs backwards
            needs a gate that is not 0.

    Raises:
        MedmomError: The shares are not in order or the target is no gate above 0. At the start of a training: the
            network has no momentum stage or learns its gates, a stage runs backwards during the ramp, the target
            suits neither the coupling nor ``then``, or the run has no known end.

    Source:
        Sander et al. 2021, arXiv 2102.07870: a ResNet trained at gate 0 loses up to 2.5 points of accuracy on
        CIFAR-10 when it is evaluated at another gate, and 20 epochs of refitting bring it back to within 0.4 points
        (read off a figure). They change the gate at once; to raise it slowly, and the shares, are ours.
    """

    def __init__(self, target: float, *, hold: float = 0.05, end: float = 0.25, then: str | None = None) -> None:
        if not 0 <= hold < end <= 1:
            raise MedmomError(f"gate ramp from {hold} to {end} of the run: give shares with 0 <= hold < end <= 1.")
        if not 0 < target <= 1:
            raise MedmomError(f"gate ramp to {target}: give a target above 0 and at most 1.")
        self.target, self.hold, self.end, self.then = float(target), hold, end, then
        self._total = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuses what would fail at the end of the ramp."""
        if stage == "fit":
            network = _network(pl_module)
            _check_stages(network)
            if self.then is not None and not hasattr(network, "memory"):
                raise MedmomError(f"gate ramp: {type(network).__name__} has no memory to change; leave out then.")
            is_low = not str(trainer.precision).startswith(("32", "64"))
            try:
                self._rehearse(network, is_low=is_low)
            except ValueError as error:
                raise MedmomError(f"gate ramp to {self.target:g}: {error}") from None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Sets the gate of the first step, or that of the step at which the run was stopped."""
        total = trainer.estimated_stepping_batches
        if not isfinite(total) or total < 1:
            raise MedmomError("gate ramp: the run has no known end; give it a number of epochs or steps.")
        self._total = int(total)
        self._set(trainer.global_step, _network(pl_module))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Sets the gate of the next step."""
        self._set(trainer.global_step, _network(pl_module))

    def _set(self, step: int, network: Any) -> None:
        gate = ramp_gate(step, self._total, self.target, hold=self.hold, end=self.end)
        _set_gate(network, gate)
        if self.then is not None and gate == self.target and network.memory != self.then:
            network.memory = self.then

    def _rehearse(self, network: Any, *, is_low: bool) -> None:
        """Goes to the end of the ramp and back to its start."""
        _set_gate(network, self.target)
        if self.then is not None:
            before = network.memory
            network.memory = self.then
            for stage in _stages(network):
                if is_low and stage.memory == "reversible":
                    check_reversible(self.target, len(stage.blocks), LOW_PRECISION_BITS)
            network.memory = before
        _set_gate(network, 0.0)


def _network(module: nn.Module) -> Any:
    network = getattr(module, "network", module)
    return getattr(network, "_orig_mod", network)


def _stages(network: nn.Module) -> list[MomentumStage]:
    return [part for part in network.modules() if isinstance(part, MomentumStage)]


def _check_stages(network: nn.Module) -> None:
    stages = _stages(network)
    if not stages:
        raise MedmomError(f"gate ramp: {type(network).__name__} has no momentum stage; take the ramp out.")
    for stage in stages:
        if stage.gating != "fixed":
            raise MedmomError(f"gate ramp: gating {stage.gating} learns the gate; take gating fixed, or no ramp.")
        if stage.memory not in ("plain", "checkpoint"):
            raise MedmomError(
                f"gate ramp: memory {stage.memory} cannot run backwards at gate 0; train the ramp with memory plain or "
                "checkpoint."
            )


def _set_gate(network: Any, gate: float) -> None:
    # A whole network writes the gate into its arguments too, and so into its package.
    owners = [network] if isinstance(getattr(type(network), "gate", None), property) else _stages(network)
    for owner in owners:
        owner.gate = gate
