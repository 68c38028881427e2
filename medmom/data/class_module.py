"""Batches of whole images and the classes that they are of."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from monai.transforms import Compose, MapTransform, Transform
from monai.utils import convert_to_tensor
from torch.utils.data import DataLoader, Dataset

from medmom.classes import Classes
from medmom.data.casefiles import CaseFiles
from medmom.data.class_images import ClassImage, choose_slices, fit_to_patch, prepare_images
from medmom.data.class_targets import class_weights, multi_hot
from medmom.data.module import StepSampler
from medmom.data.preparation import Preparation

__all__ = ["BalancedSampler", "ClassDataModule", "ClassDataset", "class_weights", "fit_to_patch", "multi_hot"]

Sample = dict[str, Any]
"""``image``, ``target`` (K,) and ``case``."""


class ClassDataset(Dataset[Sample]):
    """Images cut to the patch; a training sample is a pure function of (case, seed), as a patch is.

    Args:
        images: Which.
        classes: What they are told apart by.
        patch: Two edges for pictures and slices, three for volumes.
        slices: How many slices of each volume are looked at; None: images are pictures, or the patch has three edges.
        transforms: Random MONAI transforms of ``image``; None: nothing is drawn, samples are for validation.
    """

    def __init__(
        self,
        images: Sequence[ClassImage],
        classes: Classes,
        *,
        patch: Sequence[int],
        slices: int | None,
        transforms: Sequence[Transform] | None,
    ) -> None:
        self.images = list(images)
        self.targets = torch.from_numpy(multi_hot([image.files for image in images], classes))
        self.patch, self.slices = tuple(patch), slices
        self.changes = None if transforms is None else Compose([_without_label(each) for each in transforms])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, int]) -> Sample:
        """Gives one image: for training that of (index, seed), for validation that of the index."""
        index, seed = item if isinstance(item, tuple) else (item, None)
        rng = None if seed is None else np.random.default_rng(seed)
        array = self.images[index].open()
        if self.slices is not None:
            array = array[..., choose_slices(array.shape[-1], self.slices, rng)]
        elif len(self.patch) == 2:
            # A thick slice may have become several equal ones.
            array = array[..., array.shape[-1] // 2]
        image = torch.from_numpy(fit_to_patch(array, self.patch, rng))
        if self.changes is not None and seed is not None:
            image = self._changed(image, seed)
        return {"image": image, "target": self.targets[index], "case": self.images[index].files.name}

    def _changed(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        assert self.changes is not None
        self.changes.set_random_state(seed)
        # As channels of one picture, the slices of a volume are turned and scaled alike.
        channels, slices = len(image), image.shape[-1]
        flat = image if self.slices is None else image.movedim(-1, 1).flatten(0, 1)
        result = self.changes({"image": flat})["image"]
        changed: torch.Tensor = convert_to_tensor(result, dtype=torch.float32, track_meta=False)
        if self.slices is not None:
            changed = changed.unflatten(0, (channels, slices)).movedim(1, -1)
        return changed.contiguous()


class BalancedSampler(StepSampler):
    """Cases and seeds of one epoch in which every class is drawn equally often; arguments as ``StepSampler``.

    Args:
        members: Indices of the cases of each class; a case of several classes is drawn for each of them.
    """

    def __init__(
        self, members: Sequence[np.ndarray], num_samples: int, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        num_cases = len(np.unique(np.concatenate(members)))
        super().__init__(num_cases, num_samples, seed=seed, rank=rank, world_size=world_size)
        self.members = list(members)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Gives (case index, seed) of each sample."""
        rng = np.random.default_rng([self.seed, self.epoch])
        kinds = _rounds(rng, np.arange(len(self.members)), self.num_samples)
        cases = np.zeros(self.num_samples, dtype=np.int64)
        for kind, members in enumerate(self.members):
            places = np.flatnonzero(kinds == kind)
            cases[places] = _rounds(rng, members, len(places))
        seeds = rng.integers(2**32, size=self.num_samples)
        for k in range(self.rank, self.num_samples, self.world_size):
            yield int(cases[k]), int(seeds[k])


class ClassDataModule(lightning.LightningDataModule):
    """Feeds classified images to a Lightning module: changed at random to train on, as they are to validate on.

    A batch is ``{"image": (B, C, *spatial), "target": (B, K), "case": [...]}``, float32, the target 1 for each class
    that the image is of, else 0. ``spatial`` is (px, py) for pictures, (px, py, S) for S slices of volumes and
    (x, y, z) for volumes. Images smaller or larger than the patch are cut and filled up: at random places in
    training, about the centre in validation.

    Args:
        train: Cases to train on.
        validation: Cases to validate on, in the order in which they come.
        classes: What they are told apart by.
        preparation: How images are brought to the working grid; fitted.
        patch: Two edges for pictures and slices, three for volumes.
        batch_size: Images in a batch of one process.
        steps_per_epoch: Batches in an epoch.
        transforms: Random MONAI transforms of ``image``; those that want a label too do without it. The slices of a
            volume are given to them as channels of one picture, so all are turned and scaled alike.
        seed: Seed of the run.
        workers: Processes that make batches; 0: the training process itself.
        slices: Slices of each volume for a 2-D network; None for pictures and for 3-D networks.
        balance: ``"sampling"``: every class is drawn equally often; else every image is.
        cache: Folder for prepared volumes and unpacked images.
        quiet: Whether to leave out progress bars.

    Raises:
        MedmomError: A volume cannot be read, or the cache cannot be written.
    """

    def __init__(
        self,
        train: Sequence[CaseFiles],
        validation: Sequence[CaseFiles],
        *,
        classes: Classes,
        preparation: Preparation,
        patch: Sequence[int],
        batch_size: int,
        steps_per_epoch: int,
        transforms: Sequence[Transform],
        seed: int,
        workers: int,
        slices: int | None = None,
        balance: Literal["none", "weights", "sampling"] = "none",
        cache: Path,
        quiet: bool = True,
    ) -> None:
        super().__init__()
        self.batch_size, self.steps_per_epoch, self.seed, self.workers = batch_size, steps_per_epoch, seed, workers
        self.balance = balance
        images, others = (prepare_images(cases, preparation, cache, quiet=quiet) for cases in (train, validation))
        self.patches = ClassDataset(images, classes, patch=patch, slices=slices, transforms=transforms)
        self.whole = ClassDataset(others, classes, patch=patch, slices=slices, transforms=None)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Random samples, the epoch's number decides which."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        num_samples = self.steps_per_epoch * self.batch_size * world_size
        options = {"seed": self.seed, "rank": rank, "world_size": world_size}
        if self.balance == "sampling":
            sampler: StepSampler = BalancedSampler(_members(self.patches.targets.numpy()), num_samples, **options)
        else:
            sampler = StepSampler(len(self.patches), num_samples, **options)
        return DataLoader(self.patches, self.batch_size, sampler=sampler, **self._options())

    def val_dataloader(self) -> DataLoader[Sample]:
        """The validation images in their order, in batches; one by one where volumes have fewer slices than wanted."""
        slices = self.whole.slices
        # All images of one file have one shape.
        different = {image.items or image.files.name: image for image in self.whole.images}
        deep = slices is None or all(image.open().shape[-1] >= slices for image in different.values())
        return DataLoader(self.whole, self.batch_size if deep else 1, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": _one_thread,
        }


def _rounds(rng: np.random.Generator, values: np.ndarray, count: int) -> np.ndarray:
    """Draws values without putting back, again and again."""
    rounds = -(-count // len(values))
    return np.concatenate([rng.permutation(values) for _ in range(rounds)] or [values])[:count]


def _members(targets: np.ndarray) -> list[np.ndarray]:
    """Lists the cases of each class, and those of none as one more."""
    kinds = [*targets.T, 1 - targets.max(axis=1)]
    return [found for found in (np.flatnonzero(kind) for kind in kinds) if len(found)]


def _without_label(transform: Transform) -> Transform:
    """Lets a transform of image and label change an image alone."""
    if not isinstance(transform, MapTransform):
        return transform
    changed = copy.deepcopy(transform)
    changed.allow_missing_keys = True
    return changed


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
