"""Networks that tell what an image is, trained: by every option, by heart, for others, and on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from class_networks import tiny_2d, tiny_3d, tiny_slices
from lightning.pytorch.callbacks import ModelCheckpoint
from line_task import HINTS, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medmom.classes import Classes
from medmom.tasks.class_losses import ClassificationLoss
from medmom.tasks.classification import ClassificationTask

pytestmark = pytest.mark.filterwarnings(*HINTS)


def balls(num_volumes: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise with a bright ball, small or large: volumes (N, 1, 16, 16, 16) and which, (N,)."""
    generator, edge = torch.Generator().manual_seed(seed), 16
    image = 0.3 * torch.randn(num_volumes, 1, edge, edge, edge, generator=generator)
    which = torch.arange(num_volumes) % 2
    axes = torch.stack(torch.meshgrid(*[torch.arange(edge)] * 3, indexing="ij"))
    for number, size in enumerate(which.tolist()):
        centre = torch.randint(6, edge - 6, (3, 1, 1, 1), generator=generator)
        image[number, 0] += 2.0 * ((axes - centre).square().sum(dim=0) <= (5 if size else 3) ** 2)
    return image, which


class Volumes(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, image: Tensor, which: Tensor) -> None:
        self.image, self.which = image, which

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, number: int) -> dict[str, Any]:
        target = nn.functional.one_hot(self.which[number], 2).float()
        return {"image": self.image[number], "target": target, "case": f"volume_{number}"}


def fit(
    folder: Path, network: nn.Module, training: Volumes, validation: Volumes, *callbacks: Any, epochs: int,
    resume: Path | None = None, mixup: float = 0.0,
) -> ClassificationTask:  # fmt: skip
    task = ClassificationTask(
        network,
        loss=ClassificationLoss(),
        classes=Classes(("small", "large")),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        mixup=mixup,
    )
    loaders = (DataLoader(data, batch_size=4) for data in (training, validation))
    made = trainer(folder, *callbacks, max_epochs=epochs, check_val_every_n_epoch=epochs if resume is None else 1)
    made.fit(task, *loaders, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return task


@pytest.mark.parametrize("make", [tiny_3d, tiny_slices])
def test_a_few_phantoms_are_learned_by_heart(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    data = Volumes(*balls(8))
    task = fit(tmp_path, make(), data, data, epochs=15)
    assert task.trainer.callback_metrics["val_balanced_accuracy"] == 1
    assert task.trainer.callback_metrics["val_loss"] < 0.35


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_3d, tiny_slices])
def test_phantoms_teach_what_holds_for_others_and_shuffled_ones_nothing(
    make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    image, which = balls(32)
    others = Volumes(*balls(64, seed=1))
    true = fit(tmp_path, make(), Volumes(image, which), others, epochs=20)
    assert true.trainer.callback_metrics["val_auroc"] > 0.9
    # Half of each class gets the other's name, so that no sign of the truth is left by chance.
    false = fit(tmp_path, make(), Volumes(image, which[torch.arange(32) // 2]), others, epochs=20)
    assert false.trainer.callback_metrics["val_balanced_accuracy"] == pytest.approx(0.5, abs=0.2)


def test_a_resumed_run_with_mixing_equals_a_straight_one(tmp_path: Path) -> None:
    data = Volumes(*balls(6))
    networks = []
    for name, epochs in (("straight", 3), ("stopped", 2)):
        keep = ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        networks.append(fit(tmp_path, tiny_3d(dropout=0.2), data, data, keep, epochs=epochs, mixup=0.4).network)
    last = tmp_path / "stopped" / "epoch=1.ckpt"
    resumed = fit(tmp_path, tiny_3d(dropout=0.2), data, data, keep, epochs=3, mixup=0.4, resume=last).network
    straight, stopped = (list(network.parameters()) for network in networks)
    assert all(torch.equal(*pair) for pair in zip(resumed.parameters(), straight, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(stopped, straight, strict=True))


OPTIONS: list[dict[str, Any]] = [
    {"gate": 0.0},
    {"gate": 0.5},
    {"coupling": "ema"},
    {"gating": "block"},
    {"gating": "channel"},
    {"velocity": "learned"},
    {"velocity": "carry"},
    {"block": "preact"},
    {"norm": "batch"},
    {"memory": "checkpoint"},
    {"memory": "reversible"},
    {"memory": "hybrid"},
    {"memory": "exact", "gate": 0.875},
    {"memory": "hybrid", "gating": "channel", "velocity": "carry", "block": "preact", "coupling": "ema"},
]


@pytest.mark.parametrize("make", [tiny_2d, tiny_3d, tiny_slices, partial(tiny_slices, pooling="mean")])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains(make: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    network = make(3, **options)
    task = ClassificationTask(
        network,
        loss=ClassificationLoss(),
        classes=Classes(("liver", "lung", "colon")),
        optimizer=torch.optim.SGD,
        mixup=0.4,
        weights=[1, 2, 3],
    )
    task.log = lambda *values, **options: None  # type: ignore[method-assign]
    shape = (8, 8) if make is tiny_2d else (8, 8, 8)
    image = torch.randn(4, 1, *shape, generator=torch.Generator().manual_seed(0))
    sample = {"image": image, "target": torch.eye(3)[[0, 1, 2, 0]], "case": list("abcd")}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    # Two steps: what begins at 0 holds back the gradients of what lies before it.
    for _ in range(2):
        optimizer.zero_grad()
        task.training_step(sample, 0).backward()
        optimizer.step()
    for key, parameter in network.named_parameters():
        assert parameter.isfinite().all(), key
        assert parameter.grad is not None and parameter.grad.any(), key
