"""The batches of a run are those of its seed: the number of processes that make them does not matter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_road import road_recipe, write_class_pictures, write_class_volumes, write_pictures, write_volumes

from medmom.network import job_of
from medmom.recipe_file import RecipeFile
from medmom.train import JOBS

ALBUMENTED = {"transforms": [{"class": "albumentations.Rotate", "limit": 35, "p": 0.7}]}
VOLUMES = {"intensity": "zscore", "colour": "own"}

ROADS: dict[str, tuple[Any, bool, dict[str, dict[str, Any]]]] = {
    "pictures": (write_pictures, False, {"preparation": {"colour": "rgb"}}),
    "pictures by z-score": (write_pictures, False, {"preparation": {"colour": "grey", "intensity": "zscore"}}),
    "pictures by albumentations": (write_pictures, False, {"preparation": {"colour": "rgb"}, "data": ALBUMENTED}),
    "slices": (write_volumes, False, {"preparation": VOLUMES}),
    "classes": (write_class_pictures, True, {"data": {"balance": "sampling"}}),
    "classes by albumentations": (write_class_pictures, True, {"data": {"balance": "sampling", **ALBUMENTED}}),
    "classes of volumes": (
        write_class_volumes,
        True,
        {"data": {"balance": "sampling", "slices": 3}, "preparation": VOLUMES},
    ),
}

Batch = dict[str, Any]


def batches(folder: Path, name: str, *, workers: int, context: str | None = None, seed: int = 0) -> list[Batch]:
    """The batches of the first two epochs."""
    make, classes, sections = ROADS[name]
    if not (folder / "data").exists():
        make(folder / "data")
    changes = {**sections, "data": {**sections.get("data", {}), "workers": workers}, "training": {"seed": seed}}
    recipe = RecipeFile(road_recipe(folder / "tiny.yaml", folder / "data", classes=classes, **changes))
    # What lies in the process must not matter.
    random.seed(workers)
    np.random.seed(workers)  # noqa: NPY002
    torch.manual_seed(workers)
    device = torch.device("cpu")
    job = JOBS[job_of(recipe.build())].start(recipe, folder / "run", device, quiet=True)
    loader = job.data(recipe.build(), device).train_dataloader()
    if context is not None:
        loader.multiprocessing_context = context
    found = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        found += list(loader)
    return found


def check_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert one["case"] == other["case"]
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[key].dtype
                assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("name", ROADS)
def test_batches_do_not_depend_on_the_number_of_workers(name: str, tmp_path: Path) -> None:
    alone = batches(tmp_path, name, workers=0)
    check_same(alone, batches(tmp_path, name, workers=2))
    # They are random all the same: from batch to batch, and from seed to seed.
    images = [batch["image"] for batch in alone]
    assert not torch.equal(images[0], images[1])
    others = batches(tmp_path, name, workers=0, seed=1)
    assert not torch.equal(images[0], others[0]["image"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ROADS)
def test_batches_do_not_depend_on_how_workers_start(name: str, tmp_path: Path) -> None:
    alone = batches(tmp_path, name, workers=0)
    check_same(alone, batches(tmp_path, name, workers=1))
    check_same(alone, batches(tmp_path, name, workers=2, context="spawn"))


@pytest.mark.parametrize("name", ["classes", "classes of volumes"])
def test_balanced_batches_hold_every_class_equally_often(name: str, tmp_path: Path) -> None:
    found = torch.cat([batch["target"] for batch in batches(tmp_path, name, workers=0)])
    assert found.sum(dim=0).tolist() == [len(found) / 2] * 2


@pytest.mark.parametrize("name", ["pictures", "slices"])
def test_labels_are_changed_as_their_images_are(name: str, tmp_path: Path) -> None:
    for batch in batches(tmp_path, name, workers=0):
        image, label = batch["image"][:, :1], batch["label"]
        # Channel 1 is the bright disc, 2 the dark one.
        means = [float(image[label == channel].mean()) for channel in (1, 0, 2)]
        assert means[0] > means[1] > means[2]
