"""The seam between optimizers and Lightning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from medmom.errors import MedmomError
from medmom.optim import HeavyBall, MoMo
from medmom.optim.schedules import polynomial
from medmom.tasks.base import BaseTask

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*exists and is not empty",
    "ignore:.*log_every_n_steps",
    "ignore:You defined a .validation_step. but have no",
    "ignore:isinstance.*LeafSpec",
)


class Recorder(torch.optim.SGD):
    """Remembers what its closure returned."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, lr=0.0)
        self.losses: list[float] = []
        self.rates: list[float] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        assert loss is not None
        self.losses.append(float(loss))
        self.rates.append(self.param_groups[0]["lr"])
        return loss


class TwoPoint(torch.optim.Optimizer):
    """Schedule-free SGD in a few lines: gradients at y, the weights that count are the average x."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "mode": "train", "step": 0})

    def _move(self, mode: str) -> None:
        for group in self.param_groups:
            if group["mode"] != mode:
                weight = 1 - 1 / group["beta"] if mode == "eval" else 1 - group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight)
                group["mode"] = mode

    def train(self) -> None:
        self._move("train")

    def eval(self) -> None:
        self._move("eval")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            assert group["mode"] == "train"
            group["step"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.data.lerp_(z, 1 / group["step"])
                p.data.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["step"]) - 1))
                z.sub_(p.grad, alpha=group["lr"])
        return loss


class NumberTask(BaseTask):
    """Its loss is the batch's number, plus what the weight makes of it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        return self.remember_loss(x.mean() + 0 * self.network(x).sum())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass


class LineTask(NumberTask):
    """Fits a line."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        return self.remember_loss(((self.network(x) - 3 * x - 1) ** 2).mean())


def loader(numbers: Tensor, batch_size: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(numbers.reshape(-1, 1).float()), batch_size=batch_size)


def line() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(1, 1)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **options}
    return lightning.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), num_sanity_val_steps=0,
        **{"accelerator": "cpu", "devices": 1, **quiet, **options},
    )  # fmt: skip


def fit(
    folder: Path, optimizer: Callable[..., Any], *callbacks: Callback, kind: type[BaseTask] = NumberTask,
    numbers: Tensor | None = None, schedule: Callable[[int], float] | None = None, **options: Any,
) -> BaseTask:  # fmt: skip
    task = kind(line(), optimizer=optimizer, schedule=schedule)
    numbers = torch.arange(1, 9) if numbers is None else numbers
    trainer(folder, *callbacks, max_epochs=1, **options).fit(task, loader(numbers))
    return task


def recorded(task: BaseTask) -> Recorder:
    optimizer = task.trainer.optimizers[0]
    assert isinstance(optimizer, Recorder)
    return optimizer


def test_closure_returns_the_loss_of_the_batch(tmp_path: Path) -> None:
    assert recorded(fit(tmp_path, Recorder)).losses == [1, 2, 3, 4, 5, 6, 7, 8]


def test_closure_returns_the_mean_of_the_micro_batches(tmp_path: Path) -> None:
    assert recorded(fit(tmp_path, Recorder, accumulate_grad_batches=4)).losses == [2.5, 6.5]


def test_a_shorter_last_step_has_the_mean_of_what_it_saw(tmp_path: Path) -> None:
    task = fit(tmp_path, Recorder, numbers=torch.arange(1, 7), accumulate_grad_batches=4)
    assert recorded(task).losses == [2.5, 5.5]


def test_a_line_search_sees_each_point_and_not_their_mean(tmp_path: Path) -> None:
    seen: list[float] = []

    class Searcher(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
            assert closure is not None
            weight = self.param_groups[0]["params"][0]
            for _ in range(3):
                seen.append(float(closure()))
                weight.data += 1.0
            return seen[-1]

    task = fit(tmp_path, partial(Searcher, lr=0.0), kind=LineTask, numbers=torch.ones(1))
    network = line()
    expected = []
    for k in range(3):
        expected.append((network.weight.item() + k + network.bias.item() - 4) ** 2)
    assert seen == pytest.approx(expected, rel=1e-5)
    assert task._micro_losses == []


def test_schedule_goes_on_once_an_optimizer_step(tmp_path: Path) -> None:
    def schedule(step: int) -> float:
        return float(step + 1)

    def optimizer(params: Iterable[nn.Parameter]) -> Recorder:
        made = Recorder(params)
        made.param_groups[0]["lr"] = 0.5
        return made

    task = fit(tmp_path, optimizer, schedule=schedule, accumulate_grad_batches=4)
    assert recorded(task).rates == [0.5, 1.0]
    assert task.trainer.optimizers[0].param_groups[0]["lr"] == 1.5


def test_momo_under_accumulation_steps_as_on_the_whole_batch(tmp_path: Path) -> None:
    numbers = torch.linspace(-2, 3, 8)
    whole, parts = (
        kind(line(), optimizer=partial(MoMo, lr=0.3)) for kind in (LineTask, LineTask)
    )  # fmt: skip
    trainer(tmp_path, max_epochs=3).fit(whole, loader(numbers, batch_size=4))
    trainer(tmp_path, max_epochs=3, accumulate_grad_batches=4).fit(parts, loader(numbers))
    for ours, theirs in zip(parts.network.parameters(), whole.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(whole.network.weight, line().weight)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_momo_in_fp16_is_refused_with_the_precisions_that_work(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU Lightning itself replaces fp16, so the precision is put in its place.
    monkeypatch.setattr(lightning.Trainer, "precision", precision)
    with pytest.raises(MedmomError, match=f"MoMo needs the loss.*{precision}.*bf16-mixed or 32-true"):
        fit(tmp_path, MoMo)


def test_momo_trains_in_bf16(tmp_path: Path) -> None:
    task = fit(tmp_path, MoMo, kind=LineTask, precision="bf16-mixed")
    assert not torch.equal(task.network.weight, line().weight)


@pytest.mark.gpu
def test_momo_in_fp16_is_refused_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    task = LineTask(line(), optimizer=MoMo)
    made = lightning.Trainer(
        accelerator="gpu", devices=1, precision="16-mixed", default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(MedmomError, match="bf16-mixed or 32-true"):
        made.fit(task, loader(torch.arange(4)))


TORCH_RULES = sorted(
    name
    for name in dir(torch.optim)
    # SparseAdam wants sparse gradients, Muon matrices.
    if isinstance(kind := getattr(torch.optim, name), type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam", "Muon")
)


@pytest.mark.parametrize("name", TORCH_RULES)
def test_any_torch_optimizer_trains(name: str, tmp_path: Path) -> None:
    task = fit(
        tmp_path,
        partial(getattr(torch.optim, name), lr=0.05),
        kind=LineTask,
        schedule=polynomial(8),
        gradient_clip_val=1.0,
    )
    assert not torch.equal(task.network.weight, line().weight)
    assert task.network.weight.isfinite().all()


class ModeWatch(Callback):
    """Notes the mode of a two-point optimizer at each place that counts."""

    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {"batch": set(), "validation": set(), "checkpoint": set()}

    def _note(self, place: str, made: lightning.Trainer) -> None:
        self.seen[place].add(made.optimizers[0].param_groups[0]["mode"])

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self._note("batch", trainer)

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        self._note("validation", trainer)

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        self._note("checkpoint", trainer)


def two_point_run(
    folder: Path, epochs: int, *, planned: int | None = None, ckpt: Path | None = None, validate: bool = True
) -> tuple[LineTask, ModeWatch]:
    watch = ModeWatch()
    task = LineTask(line(), optimizer=TwoPoint, schedule=polynomial(8 * (planned or epochs)))
    keeper = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    numbers = torch.linspace(-1, 1, 8)
    made = trainer(folder, watch, keeper, max_epochs=epochs)
    validation = loader(numbers) if validate else None
    made.fit(task, loader(numbers), validation, ckpt_path=None if ckpt is None else str(ckpt), weights_only=True)
    return task, watch


def test_two_point_optimizer_trains_at_one_point_and_is_judged_and_saved_at_the_other(tmp_path: Path) -> None:
    _, watch = two_point_run(tmp_path, 3)
    assert watch.seen == {"batch": {"train"}, "validation": {"eval"}, "checkpoint": {"eval"}}


def test_two_point_optimizer_without_validation_is_saved_where_its_weights_count(tmp_path: Path) -> None:
    task, watch = two_point_run(tmp_path, 3, validate=False)
    assert watch.seen["checkpoint"] == {"eval"}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    # The network that is packaged at the end is the one that was saved.
    assert torch.equal(saved["network.weight"], task.network.weight)
    state = task.trainer.optimizers[0].state[task.network.weight]
    assert not torch.equal(state["z"], task.network.weight)


@pytest.mark.parametrize("validate", [True, False])
def test_resumed_two_point_run_equals_the_straight_one(tmp_path: Path, validate: bool) -> None:
    straight, _ = two_point_run(tmp_path / "a", 4, validate=validate)
    two_point_run(tmp_path / "b", 2, planned=4, validate=validate)
    resumed, watch = two_point_run(tmp_path / "b", 4, ckpt=tmp_path / "b" / "last.ckpt", validate=validate)
    assert watch.seen["batch"] == {"train"}
    assert torch.equal(resumed.network.weight, straight.network.weight)
    assert torch.equal(resumed.network.bias, straight.network.bias)


def test_every_epoch_draws_from_its_own_seed(tmp_path: Path) -> None:
    class Draws(NumberTask):
        drawn: list[float]

        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            self.drawn = [*getattr(self, "drawn", []), torch.rand(()).item()]

    tasks = []
    for waste in (0, 5):
        task = Draws(line(), optimizer=Recorder, seed=3)
        torch.rand(waste)
        trainer(tmp_path, max_epochs=2).fit(task, loader(torch.arange(2)))
        tasks.append(task.drawn)
    assert tasks[0] == tasks[1]
    assert tasks[0][0] != tasks[0][1]


class Diary(Callback):
    """Writes down what a process saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, task: Any) -> None:
        losses = getattr(trainer.optimizers[0], "losses", [])
        weights = [p.detach().tolist() for p in task.network.parameters()]
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps([losses, weights]))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["Recorder", "MoMo"])
@pytest.mark.filterwarnings("default")
def test_every_process_sees_the_mean_loss_and_ends_at_the_same_weights(rule: str, tmp_path: Path) -> None:
    kind, optimizer = {"Recorder": (NumberTask, Recorder), "MoMo": (LineTask, partial(MoMo, lr=0.3))}[rule]
    task = kind(line(), optimizer=optimizer)
    made = trainer(tmp_path, Diary(tmp_path), max_epochs=1, devices=2, strategy="ddp_spawn")
    # Lightning deals the numbers out to the two, each of its own.
    made.fit(task, DataLoader(TensorDataset(torch.arange(1.0, 9.0).reshape(-1, 1)), batch_size=1))
    (first, weights), (second, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    if rule == "Recorder":
        assert first == second
        assert sum(first) == sum(range(1, 9)) / 2
    else:
        assert weights != [p.tolist() for p in line().parameters()]
    assert weights == others


def test_heavy_ball_runs_through_the_seam_as_alone(tmp_path: Path) -> None:
    numbers = torch.linspace(-1, 1, 8)
    task = fit(tmp_path, partial(HeavyBall, lr=0.05), kind=LineTask, numbers=numbers)
    network = line()
    optimizer = HeavyBall(network.parameters(), lr=0.05)
    for number in numbers:
        optimizer.zero_grad()
        ((network(number.reshape(1, 1)) - 3 * number - 1) ** 2).mean().backward()
        optimizer.step()
    assert torch.equal(task.network.weight, network.weight)
