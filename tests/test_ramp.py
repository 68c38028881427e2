"""The gate rises from 0 to its target while a network trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from medmom.errors import MedmomError
from medmom.models import MomentumStage, MomentumUNet
from medmom.ramp import GateRamp, ramp_gate
from medmom.tasks.base import BaseTask

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*exists and is not empty",
    "ignore:.*log_every_n_steps",
    "ignore:You defined a .validation_step. but have no",
    "ignore:isinstance.*LeafSpec",
)


@pytest.mark.parametrize("target", [0.1, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(("hold", "end"), [(0.05, 0.25), (0.0, 0.3), (0.1, 1.0)])
def test_gate_is_zero_then_a_line_then_the_target(target: float, hold: float, end: float) -> None:
    gates = [ramp_gate(step, 1000, target, hold=hold, end=end) for step in range(1001)]
    first, last = round(1000 * hold), round(1000 * end)
    assert not any(gates[: first + 1])
    assert set(gates[last:]) == {target}
    assert gates[(first + last) // 2] == pytest.approx(target / 2)
    rises = [after - before for before, after in zip(gates[first:last], gates[first + 1 : last + 1], strict=True)]
    assert rises == pytest.approx([target / (last - first)] * (last - first))


class Watched(MomentumStage):
    """Remembers the gate and the memory of every pass, and whether it trained."""

    def __init__(self, **options: Any) -> None:
        blocks = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        for block in blocks:
            nn.init.constant_(block.weight, 0.5)
        super().__init__(blocks, **options)
        self.passes: list[tuple[float, str, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append((self.gate, self.memory, self.training))
        return super().forward(x)

    def seen(self, *, training: bool = True) -> list[float]:
        return [gate for gate, _, is_training in self.passes if is_training == training]


class Task(BaseTask):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.remember_loss((self.network(batch[0]) ** 2).mean())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.network(batch[0])


def task(network: nn.Module) -> Task:
    return Task(network, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01))


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **options}
    return lightning.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), num_sanity_val_steps=0,
        **{"accelerator": "cpu", "devices": 1, **quiet, **options},
    )  # fmt: skip


def numbers(count: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(count, 1)), batch_size=1)


def gates(steps: int, total: int, target: float = 0.8) -> list[float]:
    return [ramp_gate(step, total, target) for step in range(steps)]


def test_every_step_has_the_gate_of_its_number(tmp_path: Path) -> None:
    network = Watched(gate=0.9)
    trainer(tmp_path, GateRamp(0.8), max_epochs=4).fit(task(network), numbers(10), numbers(1))
    assert network.seen() == gates(40, 40)
    assert network.seen()[:3] == [0, 0, 0]
    assert network.seen()[3] == pytest.approx(0.1)
    assert network.seen()[10:] == [0.8] * 30
    # Validation sees the gate that a checkpoint of these weights has.
    assert network.seen(training=False) == [ramp_gate(step, 40, 0.8) for step in (10, 20, 30, 40)]
    assert network.gate == 0.8


def test_gate_is_zero_before_the_first_step(tmp_path: Path) -> None:
    network = Watched(gate=0.9)
    GateRamp(0.8).setup(trainer(tmp_path), task(network), "fit")
    assert network.gate == 0


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    network = Watched()
    trainer(tmp_path, GateRamp(0.8), max_epochs=2, accumulate_grad_batches=2).fit(task(network), numbers(20))
    assert network.seen() == [gate for gate in gates(20, 20) for _ in range(2)]


def test_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    straight, stopped, resumed = Watched(), Watched(), Watched()
    trainer(tmp_path, GateRamp(0.8, end=0.9), max_epochs=4).fit(task(straight), numbers(3))

    class Stop(Callback):
        def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            if trainer.current_epoch == 2:
                raise KeyError("stop")

    def last() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True, enable_version_counter=False)

    with pytest.raises(KeyError, match="stop"):
        trainer(tmp_path, GateRamp(0.8, end=0.9), Stop(), last(), max_epochs=4).fit(task(stopped), numbers(3))
    trainer(tmp_path, GateRamp(0.8, end=0.9), last(), max_epochs=4).fit(
        task(resumed), numbers(3), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True
    )
    assert len(resumed.seen()) == 6
    assert stopped.seen() + resumed.seen() == straight.seen()
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)


def test_memory_changes_when_the_ramp_is_done(tmp_path: Path) -> None:
    network = Watched(memory="checkpoint")
    trainer(tmp_path, GateRamp(0.8, then="reversible"), max_epochs=1).fit(task(network), numbers(20))
    assert [memory for _, memory, _ in network.passes] == ["checkpoint"] * 5 + ["reversible"] * 15


def tiny_network(**options: Any) -> MomentumUNet:
    return MomentumUNet(
        1, 2, channels=[4, 6], blocks=[1, 3], kernels=[[3, 3]] * 2, strides=[[1, 1], [2, 2]],
        deep_supervision=False, **options,
    )  # fmt: skip


def test_network_is_rebuilt_with_the_last_gate_and_memory(tmp_path: Path) -> None:
    network = tiny_network()
    images = DataLoader(TensorDataset(torch.randn(8, 1, 4, 4)), batch_size=1)
    trainer(tmp_path, GateRamp(0.8, then="hybrid"), max_epochs=1).fit(task(network), images)
    again = MomentumUNet(**json.loads(json.dumps(network.arguments)))
    assert (again.gate, again.memory) == (0.8, "hybrid")
    stages = [part for part in network.modules() if isinstance(part, MomentumStage)]
    assert {stage.gate for stage in stages} == {0.8}


@pytest.mark.parametrize(("hold", "end"), [(0.3, 0.2), (0.2, 0.2), (-0.1, 0.2), (0.1, 1.1), (float("nan"), 0.5)])
def test_shares_out_of_order_are_refused(hold: float, end: float) -> None:
    with pytest.raises(MedmomError, match=f"from {hold} to {end} of the run: give shares with 0 <= hold < end <= 1"):
        GateRamp(0.8, hold=hold, end=end)


@pytest.mark.parametrize("target", [0, -0.5, 1.5, float("nan")])
def test_target_that_is_no_gate_is_refused(target: float) -> None:
    with pytest.raises(MedmomError, match=f"gate ramp to {target}: give a target above 0 and at most 1"):
        GateRamp(target)


@pytest.mark.parametrize(
    ("network", "ramp", "message"),
    [
        (
            {"memory": "reversible"},
            {},
            "memory reversible cannot run .* train the ramp with memory plain or checkpoint",
        ),
        ({"memory": "exact", "gate": 0.5}, {}, "memory exact cannot run backwards at gate 0"),
        ({"gating": "block"}, {}, "gating block learns the gate; take gating fixed, or no ramp"),
        ({"coupling": "ema"}, {"target": 1.0}, "gate ramp to 1: gate 1 with coupling ema"),
        ({}, {"target": 0.1, "then": "reversible"}, "gate ramp to 0.1: .* smallest legal gate is"),
        ({}, {"then": "exact"}, "gate ramp to 0.8: memory exact needs a gate of"),
        ({}, {"then": "none"}, "gate ramp to 0.8: memory is 'none'; it is one of plain"),
    ],
)
def test_what_would_fail_later_is_refused_before_the_first_step(
    network: dict[str, Any], ramp: dict[str, Any], message: str, tmp_path: Path
) -> None:
    watched = Watched(**network)
    with pytest.raises(MedmomError, match=message):
        trainer(tmp_path, GateRamp(**{"target": 0.8, **ramp}), max_epochs=1).fit(task(watched), numbers(4))
    assert watched.passes == []


@pytest.mark.parametrize(("precision", "is_refused"), [("32-true", False), ("bf16-mixed", True)])
def test_low_precision_needs_the_larger_gate_before_the_first_step(
    precision: Any, is_refused: bool, tmp_path: Path
) -> None:
    # Two blocks at 0.3 lose 3.5 bits: within the budget of fp32, beyond that of bf16.
    fit = trainer(tmp_path, GateRamp(0.3, then="reversible"), max_epochs=1, precision=precision).fit
    if is_refused:
        with pytest.raises(MedmomError, match=r"gate ramp to 0.3: .* in low precision; the smallest legal gate is"):
            fit(task(Watched()), numbers(4))
    else:
        fit(task(Watched()), numbers(4))


def test_network_without_momentum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="Linear has no momentum stage; take the ramp out"):
        trainer(tmp_path, GateRamp(0.8), max_epochs=1).fit(task(nn.Linear(1, 1)), numbers(4))


class Endless(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Any:
        while True:
            yield [torch.ones(1)]


def test_run_without_an_end_is_refused(tmp_path: Path) -> None:
    endless = DataLoader(Endless(), batch_size=1)
    for options in ({"max_epochs": 1}, {"max_epochs": -1}):
        with pytest.raises(MedmomError, match="the run has no known end; give it a number of epochs or steps"):
            trainer(tmp_path, GateRamp(0.8), **options).fit(task(Watched()), endless)
