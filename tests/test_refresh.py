"""Batch norm's statistics at the weights that are validated and saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from line_task import HINTS, NumberTask, TwoPoint, loader, trainer
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from medmom.errors import MedmomError
from medmom.tasks import base
from medmom.tasks.refresh import BATCHES, fresh_batches, has_statistics, refresh_statistics

pytestmark = pytest.mark.filterwarnings(*HINTS)
NUMBERS = torch.linspace(-1, 2, 12)


def norm_network(*, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(dropout)]
        return nn.Sequential(*parts, nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Linear(4, 1))


def statistics(network: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in network.buffers()]


def averages(network: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    """What the statistics are to be, by torch's own function, on a copy."""
    twin = copy.deepcopy(network).train()
    with torch.no_grad():
        update_bn(inputs, twin)
    return statistics(twin)


def test_statistics_are_those_of_torch_update_bn() -> None:
    network = norm_network().double()
    inputs = [torch.randn(5, 1, generator=torch.Generator().manual_seed(seed)).double() for seed in range(7)]
    expected = averages(network, inputs)
    refresh_statistics(network, inputs)
    torch.testing.assert_close(statistics(network), expected, rtol=0, atol=0)
    assert [layer.momentum for layer in network if isinstance(layer, nn.BatchNorm1d)] == [0.1, 0.3]


def test_statistics_are_the_plain_average_over_the_batches() -> None:
    network = norm_network().double()
    inputs = [torch.randn(4, 1, generator=torch.Generator().manual_seed(seed)).double() * seed for seed in range(5)]
    refresh_statistics(network, inputs)
    seen = [network[0](each).detach() for each in inputs]
    mean, variance, count = statistics(network[1])
    torch.testing.assert_close(mean, torch.stack([each.mean(0) for each in seen]).mean(0))
    torch.testing.assert_close(variance, torch.stack([each.var(0) for each in seen]).mean(0))
    assert count == 5


class Remembers(nn.Module):
    """Makes a table at its first input, as positional encodings do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.table = nn.BatchNorm1d(1), torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.table):
            self.table = torch.ones(1)
        return self.norm(x) * self.table


def test_what_the_network_made_can_be_trained_with_after_inference_mode() -> None:
    network = Remembers()
    with torch.inference_mode():
        refresh_statistics(network, [NUMBERS[:, None]])
    network(NUMBERS[:, None]).sum().backward()
    assert network.norm.weight.grad is not None


def test_no_gradients_are_kept() -> None:
    network = norm_network()
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    seen: list[bool] = []
    refresh_statistics(network, [NUMBERS[:, None]] * 2)
    assert seen == [False, False]


def never() -> Iterator[Tensor]:
    raise AssertionError("an input was taken")
    yield


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4)),
        nn.BatchNorm1d(1, track_running_stats=False),
        nn.InstanceNorm1d(1),
        norm_network().eval(),
    ],
    ids=["no batch norm", "not tracked", "instance norm", "evaluation"],
)
def test_without_statistics_that_move_no_input_is_taken(network: nn.Module) -> None:
    assert not has_statistics(network)
    refresh_statistics(network, never())


def test_frozen_layer_keeps_its_statistics() -> None:
    network = norm_network()
    network[1].eval()
    before = statistics(network[1])
    refresh_statistics(network, [NUMBERS[:, None]])
    torch.testing.assert_close(statistics(network[1]), before, rtol=0, atol=0)
    assert not torch.equal(statistics(network[5])[0], torch.zeros(4))


class Partly(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        used: Tensor = self.used(x)
        return used


def test_layer_that_no_batch_reaches_keeps_its_statistics() -> None:
    network = Partly()
    network.idle(NUMBERS[:, None])
    before = statistics(network.idle)
    refresh_statistics(network, [NUMBERS[:, None]])
    torch.testing.assert_close(statistics(network.idle), before, rtol=0, atol=0)
    assert statistics(network.used)[0] == pytest.approx(NUMBERS.mean().item())


def test_no_inputs_change_nothing() -> None:
    network = norm_network()
    network(NUMBERS[:, None])
    before = statistics(network)
    refresh_statistics(network, [])
    torch.testing.assert_close(statistics(network), before, rtol=0, atol=0)


class Counting(Dataset[Tensor]):
    """Counts what is read of it, and draws a random number each time."""

    def __init__(self, size: int = 12) -> None:
        self.size, self.read = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        self.read += 1
        return torch.tensor([float(index)]) + 0.1 * torch.rand(1)


def whole(batches: Iterable[Tensor]) -> list[list[int]]:
    return [batch.long().flatten().tolist() for batch in batches]


def test_fresh_batches_are_those_of_the_loader_and_no_more_are_read() -> None:
    dataset = Counting()
    assert whole(fresh_batches(DataLoader(dataset, batch_size=4), 2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dataset.read == 8
    assert len(list(fresh_batches(DataLoader(dataset, batch_size=5), 50))) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_fresh_batches_leave_an_iteration_that_is_going_on_alone(workers: int) -> None:
    options: dict[str, Any] = {"batch_size": 2, "num_workers": workers, "persistent_workers": workers > 0}

    def numbers(look_aside: bool) -> list[list[int]]:
        generator = torch.Generator().manual_seed(5)
        made = DataLoader(Counting(), shuffle=True, generator=generator, **options)
        seen = []
        for _ in range(2):
            for number, batch in enumerate(made):
                seen.append(batch)
                if look_aside and number == 1:
                    assert len(list(fresh_batches(made, 3))) == 3
        return whole(seen)

    assert numbers(look_aside=True) == numbers(look_aside=False)


def test_the_sampler_is_copied_without_its_dataset() -> None:
    class Heavy(Counting):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("the dataset was copied")

    dataset = Heavy()
    made = DataLoader(dataset, batch_size=3, sampler=RandomSampler(dataset))
    assert len(list(fresh_batches(made, 2))) == 2


def test_a_loader_that_makes_no_batches_gives_its_samples() -> None:
    assert whole(fresh_batches(DataLoader(Counting(), batch_size=None), 3)) == [[0], [1], [2]]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(NUMBERS)


@pytest.mark.parametrize("source", [DataLoader(Stream(), batch_size=2), [NUMBERS[:2], NUMBERS[2:4], NUMBERS[4:6]]])
def test_what_has_no_indices_is_iterated_from_its_start(source: Any) -> None:
    batches = list(fresh_batches(source, 2))
    torch.testing.assert_close(batches, [NUMBERS[:2], NUMBERS[2:4]])


class NormTask(NumberTask):
    """Fits a curve with a network that has batch norm."""

    def network_input(self, batch: list[Tensor]) -> Tensor:
        return batch[0]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        return self.remember_loss(((self.network(x) - x**2) ** 2).mean())


class Pages(Callback):
    """Keeps the network and its optimizer's mode at each validation and each checkpoint."""

    def __init__(self) -> None:
        self.validated: list[nn.Module] = []
        self.saved: list[dict[str, Any]] = []

    def on_validation_batch_start(self, trainer: Any, task: Any, *_: Any) -> None:
        assert not task.network.training
        if trainer.num_training_batches and not trainer.sanity_checking:
            self.validated.append(copy.deepcopy(task.network))

    def on_save_checkpoint(self, trainer: Any, task: Any, checkpoint: Any) -> None:
        self.saved.append(copy.deepcopy(checkpoint["state_dict"]))


def run(
    folder: Path,
    *,
    epochs: int = 2,
    optimizer: Any = TwoPoint,
    validate: bool = True,
    dropout: float = 0.0,
    data: DataLoader[Any] | None = None,
    ckpt: Path | None = None,
    **options: Any,
) -> tuple[NormTask, Pages]:
    task, pages = NormTask(norm_network(dropout=dropout), optimizer=optimizer), Pages()
    keeper = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    made = trainer(folder, pages, keeper, max_epochs=epochs, **options)
    torch.manual_seed(1)
    made.fit(
        task,
        loader(NUMBERS, batch_size=4) if data is None else data,
        loader(NUMBERS, batch_size=12) if validate else None,
        ckpt_path=None if ckpt is None else str(ckpt),
        weights_only=True,
    )
    return task, pages


def batches_of(numbers: Tensor) -> list[Tensor]:
    return list(numbers.reshape(-1, 1).split(4))


def test_validation_and_checkpoint_have_the_statistics_of_their_weights(tmp_path: Path) -> None:
    task, pages = run(tmp_path)
    assert len(pages.validated) == len(pages.saved) == 2
    for network, saved in zip(pages.validated, pages.saved, strict=True):
        torch.testing.assert_close(statistics(network), averages(network, batches_of(NUMBERS)))
        for name, value in network.state_dict().items():
            assert torch.equal(saved[f"network.{name}"], value)
    assert all(layer.momentum == expected for layer, expected in ((task.network[1], 0.1), (task.network[5], 0.3)))


def test_without_validation_the_checkpoint_has_them_too(tmp_path: Path) -> None:
    task, pages = run(tmp_path, validate=False)
    expected = averages(task.network, batches_of(NUMBERS))
    torch.testing.assert_close(statistics(task.network), expected)
    assert torch.equal(pages.saved[-1]["network.1.running_var"], task.network[1].running_var)


def test_statistics_of_each_validation_within_an_epoch_are_estimated(tmp_path: Path) -> None:
    _, pages = run(tmp_path, epochs=1, val_check_interval=1)
    assert len(pages.validated) == 3
    for network in pages.validated:
        torch.testing.assert_close(statistics(network), averages(network, batches_of(NUMBERS)))


def test_they_are_estimated_once_where_the_weights_have_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(made: Any, num_batches: int) -> Iterator[Any]:
        asked.append(num_batches)
        return fresh_batches(made, num_batches)

    monkeypatch.setattr(base, "fresh_batches", counted)
    run(tmp_path, epochs=3)
    # At the validation, not again at the end of the epoch; no more than an epoch has.
    assert asked == [3, 3, 3]
    run(tmp_path / "long", epochs=1, data=loader(torch.linspace(-1, 1, 4 * 60), batch_size=4))
    assert asked[3:] == [BATCHES]


def test_a_one_point_optimizer_keeps_its_running_statistics(tmp_path: Path) -> None:
    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    task, _ = run(tmp_path, optimizer=optimizer)
    assert task.network[1].num_batches_tracked == 2 * len(batches_of(NUMBERS))


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_as_without_an_estimate(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(folder: str) -> list[Tensor]:
        torch.manual_seed(2)
        # Batches, their noise and the dropout all come from the global random numbers.
        data = DataLoader(Counting(), 3, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        task, _ = run(
            tmp_path / folder, epochs=2, dropout=0.5, val_check_interval=2, data=Listed(data),
            optimizer=lambda parameters: TwoPoint(parameters, lr=0.02),
        )  # fmt: skip
        assert task.network[1].num_batches_tracked == (4 if folder == "with" else 8)
        return [p.detach() for p in task.network.parameters()]

    refreshed = weights("with")
    monkeypatch.setattr(base, "has_statistics", lambda network: False)
    plain = weights("without")
    torch.testing.assert_close(refreshed, plain, rtol=0, atol=0)


def Listed(data: DataLoader[Tensor]) -> DataLoader[Any]:  # noqa: N802
    data.collate_fn = lambda samples: [torch.stack(samples)]
    return data


def test_resumed_run_has_the_statistics_and_weights_of_the_straight_one(tmp_path: Path) -> None:
    straight, _ = run(tmp_path / "a", epochs=4, dropout=0.3)
    run(tmp_path / "b", epochs=2, dropout=0.3)
    resumed, _ = run(tmp_path / "b", epochs=4, dropout=0.3, ckpt=tmp_path / "b" / "last.ckpt")
    for name, value in straight.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name


def test_checkpoint_between_two_steps_is_refused(tmp_path: Path) -> None:
    task = NormTask(norm_network(), optimizer=TwoPoint)
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    with pytest.raises(MedmomError, match=r"TwoPoint stands at its training point .* end of an epoch"):
        trainer(tmp_path, keeper, max_epochs=1).fit(task, loader(NUMBERS, batch_size=4))


class OnePoint(TwoPoint):
    """Could have two points, and says that it has one."""

    def train(self) -> bool:
        super().train()
        return False


def test_optimizer_that_says_it_has_one_point_is_saved_between_steps_and_renews_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(base, "refresh_statistics")
    task = NormTask(norm_network(), optimizer=OnePoint)
    trainer(tmp_path, ModelCheckpoint(tmp_path, every_n_train_steps=1), max_epochs=1).fit(
        task, loader(NUMBERS, batch_size=4)
    )
    assert list(tmp_path.glob("*.ckpt"))


class Diary(Callback):
    """Writes down what a process ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, task: Any) -> None:
        state = {name: value.tolist() for name, value in task.network.state_dict().items()}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(state))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_processes_share_the_statistics_of_all_their_batches(tmp_path: Path) -> None:
    task = NormTask(norm_network(), optimizer=TwoPoint)
    made = trainer(tmp_path, Diary(tmp_path), max_epochs=1, devices=2, strategy="ddp_spawn")
    data = DataLoader(TensorDataset(NUMBERS.reshape(-1, 1)), batch_size=2)
    made.fit(task, data)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    network = norm_network()
    network.load_state_dict({name: torch.tensor(value) for name, value in first.items()})
    # Lightning deals the cases out one by one, in a random order of the epoch's number; their order within a process
    # makes no difference to the average of the means.
    assert network[1].num_batches_tracked == 6
    seen = network[0](NUMBERS[:, None]).detach()
    torch.testing.assert_close(network[1].running_mean, seen.mean(0), rtol=1e-5, atol=1e-6)
