from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import lightning
import numpy as np
import torch
from monai.data import Dataset, list_data_collate
from monai.transforms import Compose, RandCropByPosNegLabeld, ResizeWithPadOrCropd, SqueezeDimd, Transform
from monai.utils import convert_to_tensor
from torch.utils.data import DataLoader, Sampler

from medmom.data.cache import PreparedCase
from medmom.data.transforms import Sample, to_sample

FOREGROUND_SHARE = 1 / 3
"""Share of patches that are centred on a foreground voxel, as in nnU-Net."""


class OpenPrepared(Transform):
    """Maps a prepared case into memory and hands on where to centre patches."""

    def __call__(self, prepared: PreparedCase) -> Sample:
        """Gives ``image``, ``label``, ``case``, ``annotated``, and the flat indices ``foreground`` and ``anywhere``."""
        case, foreground, anywhere = prepared.open()
        return {**to_sample(case), "foreground": foreground, "anywhere": anywhere}


class PatchDataset(Dataset):
    """Random patches, each a pure function of (case, seed): no state of a worker or of an earlier patch enters.

    So training is the same with any number of workers, and a resumed run sees what the straight one saw.
    """

    def __getitem__(self, item: tuple[int, int]) -> Sample:  # type: ignore[override]
        """Gives the patch that belongs to the case's index and the seed."""
        index, seed = item
        self.transform.set_random_state(seed)
        patch = self.transform(self.data[index])
        (patch,) = patch if isinstance(patch, list) else [patch]
        # Plain tensors from here on: the network needs no affine, and tensors travel between processes faster.
        image = convert_to_tensor(patch["image"], dtype=torch.float32, track_meta=False)
        # MONAI's resampling leaves labels as floats.
        label = convert_to_tensor(patch["label"], dtype=torch.uint8, track_meta=False)
        return {"case": patch["case"], "annotated": patch["annotated"], "image": image, "label": label}


class StepSampler(Sampler[tuple[int, int]]):
    """Cases and seeds of one epoch, a function of (seed, epoch, rank) alone.

    Args:
        num_cases: Number of training cases; each is drawn equally often.
        num_samples: Patches of one epoch, all processes together.
        seed: Seed of the run.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, num_cases: int, num_samples: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_cases, self.num_samples, self.seed = num_cases, num_samples, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before an epoch, a resumed one too."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of patches of this process in one epoch."""
        return len(range(self.rank, self.num_samples, self.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Gives (case index, seed) of each patch."""
        rng = np.random.default_rng([self.seed, self.epoch])
        rounds = -(-self.num_samples // self.num_cases)
        cases = np.concatenate([rng.permutation(self.num_cases) for _ in range(rounds)])[: self.num_samples]
        seeds = rng.integers(2**32, size=self.num_samples)
        for k in range(self.rank, self.num_samples, self.world_size):
            yield int(cases[k]), int(seeds[k])


class CaseDataModule(lightning.LightningDataModule):
    """Feeds prepared cases to a Lightning module: random patches to train on, whole cases to validate on.

    A training batch is ``{"image": (B, C, *patch), "label": (B, 1, *patch), "annotated": (B, K), "case": [...]}``;
    a validation batch is one whole case in the same form.

    Args:
        train: Prepared cases to draw patches from.
        validation: Prepared cases to validate on.
        patch: Voxels of a patch along each axis, two or three.
        batch_size: Patches in a batch of one process.
        steps_per_epoch: Optimizer steps in an epoch.
        transforms: Random MONAI transforms of a patch.
        seed: Seed of the run.
        workers: Processes that make patches; 0: the training process itself.
    """

    def __init__(
        self,
        train: Sequence[PreparedCase],
        validation: Sequence[PreparedCase],
        *,
        patch: Sequence[int],
        batch_size: int,
        steps_per_epoch: int,
        transforms: Sequence[Transform],
        seed: int,
        workers: int,
    ) -> None:
        super().__init__()
        self.batch_size, self.steps_per_epoch, self.seed, self.workers = batch_size, steps_per_epoch, seed, workers
        self.patches = PatchDataset(list(train), patch_pipeline(patch, transforms))
        self.whole = Dataset(list(validation), Compose([OpenPrepared()]))

    def train_dataloader(self) -> DataLoader[Sample]:
        """Random patches, the epoch's number decides which."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = StepSampler(
            len(self.patches.data),
            self.steps_per_epoch * self.batch_size * world_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        return DataLoader(
            self.patches,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=list_data_collate,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_one_thread,
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """Whole cases of the validation fold, one a batch."""
        return DataLoader(self.whole, batch_size=1, collate_fn=_single)


def patch_pipeline(patch: Sequence[int], transforms: Sequence[Transform]) -> Compose:
    """Gives the MONAI pipeline from a ``PreparedCase`` to a patch: open, crop, pad, change at random.

    A patch of two edges is cut out of one slice, along the third axis, and loses that axis before it is changed.
    """
    keys = ("image", "label")
    box = (*patch, 1) if len(patch) == 2 else tuple(patch)
    flatten = [SqueezeDimd(keys=keys, dim=-1)] if len(patch) == 2 else []
    crop = RandCropByPosNegLabeld(
        keys=keys,
        label_key="label",
        spatial_size=box,
        pos=FOREGROUND_SHARE,
        neg=1 - FOREGROUND_SHARE,
        fg_indices_key="foreground",
        bg_indices_key="anywhere",
        allow_smaller=True,
    )
    pad = ResizeWithPadOrCropd(keys=keys, spatial_size=box)
    return Compose([OpenPrepared(), crop, pad, *flatten, *transforms])


def default_workers(device: str) -> int:
    """Number of loading processes: none on the CPU, where the network needs the cores itself."""
    return 0 if device == "cpu" else min(12, max(1, (os.cpu_count() or 1) - 1))


def _single(batch: list[Sample]) -> Sample:
    sample = {key: value for key, value in batch[0].items() if key not in ("foreground", "anywhere")}
    tensors = {key: sample[key].as_tensor()[None] for key in ("image", "label")}
    return {"case": [sample["case"]], "annotated": sample["annotated"][None], **tensors}


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
