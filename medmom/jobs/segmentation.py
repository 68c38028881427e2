from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from medmom.callbacks import ValidationPicture
from medmom.data.cache import CaseCache, PreparedCase
from medmom.data.case import find_cases
from medmom.data.module import CaseDataModule
from medmom.data.preparation import fit_preparation, working_channels
from medmom.errors import MedmomError
from medmom.inference.windows import sliding_window
from medmom.jobs.base import (
    Job,
    batch_options,
    check_model,
    chosen,
    participants,
    random_changes,
    schedule_of,
    settle,
    split_by_recipe,
    without_places,
)
from medmom.labels import Labels
from medmom.network import plan_memory
from medmom.optim.groups import freeze
from medmom.optimizer import make_optimizer
from medmom.package import save_package
from medmom.recipe import Recipe
from medmom.recipe_file import RecipeFile
from medmom.run import Run
from medmom.sheet import Drawn
from medmom.tasks.segmentation import SegmentationTask

logger = logging.getLogger(__name__)

Prepared = tuple[list[PreparedCase], list[PreparedCase]]
"""Training and validation cases on the working grid."""


class SegmentationJob(Job):
    """Trains on labelled scans and pictures to give every voxel a class."""

    @classmethod
    def start(cls, recipe: RecipeFile, out: Path, device: torch.device, *, quiet: bool) -> Self:
        """Finds, surveys and splits the cases, and completes the recipe's preparation and memory."""
        found = find_cases(Path(str(recipe.get("data.folder"))), group=recipe.get("data.group"))
        for note in found.notes:
            logger.info(note)
        built = recipe.build()
        channels = _channels(built, found.channels)
        check_model(built, found.labels.num_channels)
        random_changes(built, len(channels))
        memory = plan_memory(built, len(channels), found.labels.num_channels, device)
        takes_part = participants(found.cases, built.data)
        cases = [case for case in takes_part if case.label is not None]
        if len(cases) < len(takes_part):
            logger.info("%d cases without a label are left out.", len(takes_part) - len(cases))
        surveys = CaseCache(built.data.cache, found.labels, quiet=quiet).survey(cases)
        split = split_by_recipe(cases, {name: survey.stratum for name, survey in surveys.items()}, built.data)
        preparation = fit_preparation(built.preparation, [surveys[name].foreground for name in split.train])
        settle(recipe, found.folder, preparation, memory)
        job = cls(Run(out, recipe, found.labels, channels, *chosen(cases, split)), quiet=quiet)
        # What is wrong with the cases is said before a run is written that could never go on.
        job.prepared  # noqa: B018
        return job

    @property
    def labels(self) -> Labels:
        """Class names and values."""
        assert isinstance(self.run.table, Labels)
        return self.run.table

    @cached_property
    def prepared(self) -> Prepared:
        """Cases on the working grid, checked once: the cache's checksums cost minutes on a large data set."""
        recipe = self.run.recipe.build()
        cache = CaseCache(recipe.data.cache, self.labels, quiet=self.quiet)
        prepared = cache.prepare([*self.run.train, *self.run.validation], recipe.preparation)
        training, validation = prepared[: len(self.run.train)], prepared[len(self.run.train) :]
        for case in prepared:
            self._check_channels(case)
        seen = {case.fingerprint: case.name for case in training}
        for case in validation:
            if case.fingerprint in seen:
                raise MedmomError(
                    f"case {case.name} (validation) holds the same image as {seen[case.fingerprint]} (training); "
                    "give both one patient in cases.csv, or take one out."
                )
        return training, validation

    def _check_channels(self, case: PreparedCase) -> None:
        found, names = len(case.open()[0].image), self.run.channels
        if found != len(names):
            mend = "set preparation.colour to grey or rgb" if self.shows_pictures() else "mend the case or dataset.json"
            raise MedmomError(
                f"case {case.name}: {found} image channels, the data set has {len(names)} ({', '.join(names)}); {mend}."
            )

    def task(self, recipe: Recipe) -> SegmentationTask:
        """Network, loss and optimizer."""
        network = self.network(recipe)
        optimizer = make_optimizer(recipe, network)
        freeze(network, recipe.training.frozen)
        # Channels last is a layout in memory alone; a step on a CPU takes a fifth less time.
        layout = torch.channels_last if len(recipe.data.patch) == 2 else torch.channels_last_3d
        return SegmentationTask(
            network.to(memory_format=layout),  # type: ignore[call-overload]
            loss=recipe.loss,
            labels=self.labels,
            inferer=sliding_window(recipe.data.patch),
            optimizer=optimizer,
            schedule=schedule_of(recipe.training),
            seed=recipe.training.seed,
        )

    def data(self, recipe: Recipe, device: torch.device) -> CaseDataModule:
        """Random patches, and whole cases."""
        return CaseDataModule(*self.prepared, **batch_options(recipe, len(self.run.channels), device))

    def validation_voxels(self) -> Sequence[int]:
        """Voxels of each validation case on the working grid."""
        return [case.open()[0].image[0].size for case in self.prepared[1]]

    def monitor(self) -> str:
        """Mean Dice over cases, then classes."""
        return "val_dice"

    def pictures(self, recipe: Recipe) -> list[Callback]:
        """A validation case, prediction over reference."""
        every, is_picture = recipe.training.picture_every, self.shows_pictures()
        shown, folder = self.prepared[1][0], self.run.folder / "pictures"
        return [ValidationPicture(shown, self.labels, folder, every=every, is_picture=is_picture)]

    def samples(self, recipe: Recipe, case: int, draws: Sequence[int]) -> list[Drawn]:
        """Random patches of one case."""
        patches = self.data(recipe, torch.device("cpu")).patches
        found = [patches[case, seed] for seed in draws]
        return [(sample["case"], sample["image"].numpy(), sample["label"].numpy()) for sample in found]

    def save(self, recipe: Recipe, network: nn.Module, device: torch.device) -> None:
        """Writes the model package into the run folder."""
        save_package(
            self.run.folder / "model",
            network,
            labels=self.labels,
            preparation=recipe.preparation,
            patch=recipe.data.patch,
            channels=self.run.channels,
            recipe=without_places(self.run.recipe, recipe.data.folder),
        )


def _channels(recipe: Recipe, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names the channels that the network sees: those of the data, or what ``preparation.colour`` makes of them."""
    count = working_channels(recipe.preparation, len(names))
    return names if count == len(names) else {1: ("grey",), 3: ("R", "G", "B")}[count]
