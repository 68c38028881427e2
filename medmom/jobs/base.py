from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from monai.transforms import Transform
from torch import nn

from medmom.data.augment import monai_transforms, slice_transforms, volume_transforms
from medmom.data.casefiles import CaseFiles
from medmom.data.files import is_picture
from medmom.data.folds import Split, leave_out, named_split, split_cases
from medmom.data.module import default_workers
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.network import build_network, plan_memory
from medmom.optim import schedules
from medmom.optimizer import make_optimizer
from medmom.recipe import DataRecipe, Recipe, TrainingRecipe
from medmom.recipe_file import RecipeFile
from medmom.run import SPLIT_SEED, Run
from medmom.sheet import Drawn
from medmom.tasks.base import BaseTask, Schedule
from medmom.transfer import initialise_from


class Job(ABC):
    """What a training has to know of segmenting, or of classifying; all else is the same for both.

    Args:
        run: What it is made of.
        quiet: Whether to leave out progress bars.
    """

    def __init__(self, run: Run, *, quiet: bool) -> None:
        self.run, self.quiet = run, quiet

    @classmethod
    @abstractmethod
    def start(cls, recipe: RecipeFile, out: Path, device: torch.device, *, quiet: bool) -> Self:
        """Finds, surveys and splits the cases, and completes the recipe's preparation and memory."""

    @abstractmethod
    def task(self, recipe: Recipe) -> BaseTask:
        """Network, loss and optimizer."""

    @abstractmethod
    def data(self, recipe: Recipe, device: torch.device) -> lightning.LightningDataModule:
        """Where batches come from."""

    @abstractmethod
    def validation_voxels(self) -> Sequence[int]:
        """Size of each validation case, in the order in which they are validated."""

    @abstractmethod
    def monitor(self) -> str:
        """Name of the validation score by which the best weights are chosen; higher is better."""

    @abstractmethod
    def pictures(self, recipe: Recipe) -> list[Callback]:
        """What draws while it trains."""

    @abstractmethod
    def samples(self, recipe: Recipe, case: int, draws: Sequence[int]) -> list[Drawn]:
        """Gives training samples of one case, by its place among the training cases, one for each seed."""

    @abstractmethod
    def save(self, recipe: Recipe, network: nn.Module, device: torch.device) -> None:
        """Writes the model package into the run folder."""

    def shows_pictures(self) -> bool:
        """Whether the cases are pictures rather than scans, and lie on a page as they are."""
        return all(is_picture(path) for case in self.run.train[:1] for path in case.images)

    def plan(self, recipe: Recipe, device: torch.device) -> str:
        """Gives the memory to train with, and tells what every one would take, see ``plan_memory``."""
        return plan_memory(recipe, len(self.run.channels), self.run.table.num_channels, device)

    def network(self, recipe: Recipe) -> nn.Module:
        """The recipe's network for the run's channels and classes."""
        return build_network(recipe, len(self.run.channels), self.run.table.num_channels)


def check_model(recipe: Recipe, num_classes: int) -> None:
    """Makes network, optimizer and schedule once, so that what does not fit is said before the images are read.

    Raises:
        MedmomError: Something does not fit.
    """
    with torch.device("meta"):
        network = build_network(recipe, 1, num_classes)
    make_optimizer(recipe, network)(network.parameters())
    if recipe.model.init_from is not None:
        initialise_from(network, recipe.model.init_from)
    if recipe.training.max_minutes is None:
        schedule_of(recipe.training)
    divisor: Any = network.divisor
    patch = recipe.data.patch[: len(divisor)]
    wrong = [n for n, d in zip(patch, divisor, strict=True) if n % d]
    if wrong:
        legal = [-(-n // d) * d for n, d in zip(patch, divisor, strict=True)]
        raise MedmomError(f"data.patch {list(recipe.data.patch)}: the network halves it; the next size is {legal}.")


def settle(recipe: RecipeFile, folder: Path, preparation: Preparation, memory: str) -> None:
    """Writes into a recipe what it left open; a run that is resumed elsewhere goes on with the same.

    Args:
        recipe: Of the run, changed in place.
        folder: Where the data lies.
        preparation: Fitted.
        memory: What ``auto`` has become on this device.
    """
    built = recipe.build()
    if built.model.memory == "auto":
        recipe.set("model.memory", memory)
    for key, value in asdict(preparation).items():
        recipe.set(f"preparation.{key}", value)
    recipe.set("data.folder", str(folder.resolve()))
    recipe.set("data.cache", str(built.data.cache.resolve()))


def chosen(cases: Sequence[CaseFiles], split: Split) -> tuple[tuple[CaseFiles, ...], tuple[CaseFiles, ...]]:
    """Gives the training and the validation cases of a split."""
    by_name = {case.name: case for case in cases}
    return tuple(by_name[name] for name in split.train), tuple(by_name[name] for name in split.validation)


def batch_options(recipe: Recipe, num_channels: int, device: torch.device) -> dict[str, Any]:
    """Gives the arguments that the data modules of both jobs share, see ``CaseDataModule``."""
    data, training = recipe.data, recipe.training
    return {
        "patch": data.patch,
        "batch_size": data.batch_size,
        "steps_per_epoch": training.steps_per_epoch * training.accumulate,
        "transforms": random_changes(recipe, num_channels),
        "seed": training.seed,
        "workers": default_workers(device.type) if data.workers is None else data.workers,
    }


def random_changes(recipe: Recipe, num_channels: int) -> list[Transform]:
    """Gives what training samples are changed by at random: our own changes, and those that the recipe lists.

    Args:
        recipe: Which, and of what.
        num_channels: Of an image as the network sees it.

    Raises:
        MedmomError: A listed transform is not known, or does not suit the images.
    """
    data, intensity = recipe.data, recipe.preparation.intensity
    # The slices of a volume are changed as channels of one picture.
    shape = (num_channels * (data.slices or 1), *data.patch)
    listed = monai_transforms(data.transforms, intensity=intensity, shape=shape)
    if not data.augment:
        return listed
    if len(data.patch) == 3:
        return [*volume_transforms(data.patch, mirror=data.mirror), *listed]
    mirror = [axis for axis in data.mirror if axis < 2]
    return [*slice_transforms(data.patch, mirror=mirror, intensity=intensity), *listed]


def schedule_of(settings: TrainingRecipe) -> Schedule | None:
    """Gives the course of the learning rate; None where it is constant.

    Raises:
        MedmomError: The warm-up does not fit into the training.
    """
    if settings.schedule == "constant":
        return None
    total = settings.epochs * settings.steps_per_epoch
    try:
        schedule: Schedule = getattr(schedules, settings.schedule)(total, warmup_steps=settings.warmup_steps)
    except ValueError as error:
        raise MedmomError(f"training.warmup_steps {settings.warmup_steps}: {error}") from None
    return schedule


def participants(cases: Sequence[CaseFiles], data: DataRecipe) -> list[CaseFiles]:
    """Gives the cases that the recipe does not leave out; a fold named ``test`` takes no part either."""
    return [case for case in leave_out(cases, data.leave_out) if (case.fold or "").lower() != "test"]


def split_by_recipe(cases: Sequence[CaseFiles], strata: dict[str, str], data: DataRecipe) -> Split:
    """Splits cases as the recipe says: by the names of the validation cases, or into folds."""
    if data.validation:
        return named_split(cases, data.validation)
    return split_cases(cases, strata, fold=data.fold, folds=data.folds, seed=SPLIT_SEED)


def without_places(recipe: RecipeFile, folder: Path | None) -> dict[str, Any]:
    """Gives a recipe as plain types for a package: where the data lay is nobody's business who gets the model."""
    description = recipe.as_dict()
    name = None if folder is None else folder.name
    description["data"] = {**description["data"], "folder": name, "cache": None}
    start = description["model"].get("init_from")
    description["model"] = {**description["model"], "init_from": None if start is None else Path(start).name}
    return description
