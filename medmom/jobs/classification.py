from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from medmom.classes import Classes
from medmom.data.casefiles import CaseFiles
from medmom.data.class_inspect import holds_classes
from medmom.data.class_layouts import find_class_cases, split_class_cases, with_cases
from medmom.data.class_module import ClassDataModule
from medmom.data.class_split import with_blocks
from medmom.data.class_survey import ClassSurvey, check_duplicates, survey_classes
from medmom.data.class_targets import check_images, class_weights
from medmom.data.folds import named_split
from medmom.data.preparation import fit_preparation
from medmom.errors import MedmomError
from medmom.evaluation.calibration import fit_temperature
from medmom.inference.appearance import SPANS, appearance
from medmom.inference.novelty import fit_novelty, look
from medmom.jobs.base import (
    Job,
    batch_options,
    check_model,
    chosen,
    participants,
    random_changes,
    schedule_of,
    settle,
    without_places,
)
from medmom.network import plan_memory
from medmom.optim.groups import freeze
from medmom.optimizer import make_optimizer
from medmom.package import save_package
from medmom.recipe import Recipe
from medmom.recipe_file import RecipeFile
from medmom.run import SPLIT_SEED, Run
from medmom.sheet import Drawn
from medmom.tasks.classification import ClassificationTask

logger = logging.getLogger(__name__)

MOST_REMEMBERED = 2000
"""Training images from which it is learnt what training images look like."""


class ClassificationJob(Job):
    """Trains on images of known classes to tell the class of a whole image."""

    @classmethod
    def start(cls, recipe: RecipeFile, out: Path, device: torch.device, *, quiet: bool) -> Self:
        """Finds, surveys and splits the cases, and completes the recipe's preparation and memory."""
        source = Path(str(recipe.get("data.folder")))
        built = recipe.build()
        if not holds_classes(source):
            raise MedmomError(
                f"{source}: images and label maps, and {built.model.preset} classifies whole images. Give a folder a "
                "class or a CSV file, or choose a network that segments."
            )
        found = find_class_cases(source, group=recipe.get("data.group"))
        found = with_cases(found, participants(found.cases, built.data))
        for note in found.notes:
            logger.info(note)
        check_model(built, found.classes.num_channels)
        data = built.data
        if data.validation:
            split = named_split(found.cases, data.validation)
        else:
            split = split_class_cases(found, fold=data.fold, folds=data.folds, seed=SPLIT_SEED, blocks=data.blocks)
        surveys = survey_classes(found.cases, data.cache, quiet=quiet)
        for note in check_duplicates(surveys, split, found.cases):
            logger.info(note)
        preparation = fit_preparation(built.preparation, [surveys[name].values for name in split.train])
        channels = _channels(built, surveys, found.cases)
        random_changes(built, len(channels))
        memory = plan_memory(built, len(channels), found.classes.num_channels, device)
        settle(recipe, source, preparation, memory)
        # Blocks stay together in what is scored, too.
        grouped = found if data.blocks is None else with_blocks(found, data.blocks)
        return cls(Run(out, recipe, found.classes, channels, *chosen(grouped.cases, split)), quiet=quiet)

    @property
    def classes(self) -> Classes:
        """Names of the classes."""
        assert isinstance(self.run.table, Classes)
        return self.run.table

    @cached_property
    def surveys(self) -> dict[str, ClassSurvey]:
        """Checksums and intensities of all cases."""
        recipe = self.run.recipe.build()
        return survey_classes([*self.run.train, *self.run.validation], recipe.data.cache, quiet=self.quiet)

    def task(self, recipe: Recipe) -> ClassificationTask:
        """Network, loss and optimizer."""
        network = self.network(recipe)
        optimizer = make_optimizer(recipe, network)
        freeze(network, recipe.training.frozen)
        is_volume = len(recipe.data.patch) == 3
        return ClassificationTask(
            network.to(memory_format=torch.channels_last_3d if is_volume else torch.channels_last),  # type: ignore[call-overload]
            loss=recipe.loss,
            classes=self.classes,
            optimizer=optimizer,
            schedule=schedule_of(recipe.training),
            seed=recipe.training.seed,
            mixup=recipe.training.mixup,
            weights=class_weights(self.run.train, self.classes) if recipe.data.balance == "weights" else None,
        )

    def data(self, recipe: Recipe, device: torch.device) -> ClassDataModule:
        """Images to train on, changed at random, and to validate on."""
        return self._data(recipe, self.run.train, self.run.validation, device)

    def _data(
        self, recipe: Recipe, train: Sequence[CaseFiles], validation: Sequence[CaseFiles], device: torch.device
    ) -> ClassDataModule:
        data = recipe.data
        return ClassDataModule(
            train,
            validation,
            classes=self.classes,
            preparation=recipe.preparation,
            slices=data.slices,
            balance=data.balance,
            cache=data.cache,
            **batch_options(recipe, len(self.run.channels), device),
        )

    def validation_voxels(self) -> Sequence[int]:
        """One for each validation batch: they are about equally large."""
        recipe = self.run.recipe.build()
        return [1] * -(-len(self.run.validation) // recipe.data.batch_size)

    def monitor(self) -> str:
        """Balanced accuracy, or where images may be of several classes the area under the curve."""
        return "val_auroc" if self.classes.is_multilabel else "val_balanced_accuracy"

    def pictures(self, recipe: Recipe) -> list[Callback]:
        """Nothing is drawn while it trains."""
        return []

    def samples(self, recipe: Recipe, case: int, draws: Sequence[int]) -> list[Drawn]:
        """One training image, changed at random again and again."""
        patches = self.data(recipe, torch.device("cpu")).patches
        shown = self.run.train[case]
        title = f"{shown.name} ({', '.join(shown.classes or ())})"
        return [(title, patches[case, seed]["image"].numpy(), None) for seed in draws]

    def save(self, recipe: Recipe, network: nn.Module, device: torch.device) -> None:
        """Writes the model package: with the temperature that fits the validation cases, and what is usual."""
        network = network.to(device).eval()
        rng = np.random.default_rng(0)
        places = np.sort(rng.permutation(len(self.run.train))[:MOST_REMEMBERED])
        remembered = [self.run.train[k] for k in places]
        span = SPANS[recipe.preparation.intensity]
        looks, targets, _ = self._seen(recipe, None, remembered, device)
        others, wanted, logits = self._seen(recipe, network, self.run.validation, device)
        if not np.isfinite(logits).all():
            raise MedmomError(f"{self.run.folder}: the network's output is not finite. Train with a smaller lr.")
        temperature = fit_temperature(logits, wanted, is_multilabel=self.classes.is_multilabel)
        summaries = np.stack([self.surveys[case.name].summary for case in remembered])
        logger.info("Temperature %.2f fits the validation cases.", temperature)
        save_package(
            self.run.folder / "model",
            network.cpu(),
            classes=self.classes,
            preparation=recipe.preparation,
            patch=recipe.data.patch,
            channels=self.run.channels,
            recipe=without_places(self.run.recipe, recipe.data.folder),
            temperature=temperature,
            novelty=fit_novelty(looks, targets, summaries, validation=(others, wanted), span=span),
            slices=recipe.data.slices,
        )

    def _seen(
        self, recipe: Recipe, network: nn.Module | None, cases: Sequence[CaseFiles], device: torch.device
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Appearance, targets and logits of cases as they are, without random changes; without a network no logits."""
        span = SPANS[recipe.preparation.intensity]
        parts: list[tuple[Any, Any, Any]] = []
        for batch in self._data(recipe, (), cases, device).val_dataloader():
            looks = np.stack([appearance(image, span) for image in batch["image"].numpy()])
            logits = looks[:, :0] if network is None else look(network, batch["image"].to(device)).logits.numpy()
            parts.append((looks, batch["target"].numpy(), logits))
        looks, targets, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
        return looks, targets, logits


def _channels(recipe: Recipe, surveys: Mapping[str, ClassSurvey], cases: Sequence[CaseFiles]) -> tuple[str, ...]:
    """Names of the image channels, the same for all cases."""
    data = recipe.data
    count = check_images(surveys, cases, recipe.preparation, patch=data.patch, slices=data.slices)
    return {1: ("image",), 3: ("red", "green", "blue")}.get(count, tuple(f"channel {k}" for k in range(count)))
