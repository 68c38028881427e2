from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Transform
from tiny_cases import CT, LABELS, prepare_case, stored_label, write_case

from medmom.data.augment import monai_transforms, volume_transforms
from medmom.data.cache import PreparedCase
from medmom.data.case import Case, read_case
from medmom.data.module import (
    CaseDataModule,
    PatchDataset,
    StepSampler,
    default_workers,
    patch_pipeline,
)
from medmom.data.preparation import Preparation, prepare
from medmom.data.transforms import PrepareCased, to_sample
from medmom.labels import IGNORE

PATCH = (8, 8, 8)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[PreparedCase]:
    folder = tmp_path_factory.mktemp("cases")
    return [prepare_case(folder, write_case(folder, f"case{'x' * k}")) for k in range(3)]


def module(cases: list[PreparedCase], *, steps: int = 4, workers: int = 0, augment: bool = True) -> CaseDataModule:
    return CaseDataModule(
        cases,
        cases[:2],
        patch=PATCH,
        batch_size=2,
        steps_per_epoch=steps,
        transforms=volume_transforms(PATCH) if augment else [],
        seed=3,
        workers=workers,
    )


def epoch(data: CaseDataModule, number: int) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return list(loader)


def dataset(cases: list[PreparedCase], *transforms: Transform, patch: tuple[int, ...] = PATCH) -> PatchDataset:
    return PatchDataset(cases, patch_pipeline(patch, transforms))


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one["case"] == other["case"]
        for key in ("image", "label", "annotated"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def test_a_training_batch_is_what_a_task_takes(cases: list[PreparedCase]) -> None:
    for batch in epoch(module(cases), 0):
        assert batch["image"].shape == batch["label"].shape == (2, 1, *PATCH)
        assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.uint8)
        assert type(batch["image"]) is type(batch["label"]) is torch.Tensor
        assert set(batch["label"].unique().tolist()) <= {0, 1, 2, IGNORE}
        assert batch["annotated"].tolist() == [[True] * 3] * 2
        assert len(batch["case"]) == 2


def test_a_validation_batch_is_one_whole_case(cases: list[PreparedCase]) -> None:
    batches = list(module(cases).val_dataloader())
    assert [batch["case"] for batch in batches] == [["case"], ["casex"]]
    for batch, prepared in zip(batches, cases, strict=False):
        case, _, _ = prepared.open()
        np.testing.assert_array_equal(batch["image"][0].numpy(), case.image)
        np.testing.assert_array_equal(batch["label"][0, 0].numpy(), case.label)
        assert batch["annotated"].tolist() == [[True] * 3]
        assert set(batch) == {"image", "label", "case", "annotated"}
        assert type(batch["image"]) is torch.Tensor


def test_patches_are_the_same_with_any_number_of_workers(cases: list[PreparedCase]) -> None:
    assert_same(epoch(module(cases, workers=0), 1), epoch(module(cases, workers=2), 1))


def test_another_epoch_gives_other_patches(cases: list[PreparedCase]) -> None:
    data = module(cases)
    first, second = epoch(data, 0), epoch(data, 1)
    assert not any(torch.equal(a["image"], b["image"]) for a in first for b in second)


def test_a_resumed_epoch_is_that_of_the_straight_run(cases: list[PreparedCase]) -> None:
    straight = module(cases)
    for number in range(3):
        last = epoch(straight, number)
    assert_same(epoch(module(cases), 2), last)


def test_a_patch_hangs_on_case_and_seed_alone(cases: list[PreparedCase]) -> None:
    items = [(0, 7), (1, 7), (2, 2**32 - 1), (0, 0)]
    forward, backward = (dataset(cases, *volume_transforms(PATCH)) for _ in range(2))
    first = [forward[item] for item in items]
    second = [backward[item] for item in reversed(items)][::-1]
    assert_same(first, second)
    assert not torch.equal(first[0]["image"], forward[(0, 8)]["image"])


def test_every_case_is_drawn_equally_often() -> None:
    counts = Counter(case for case, _ in StepSampler(7, 70, seed=0))
    assert counts == dict.fromkeys(range(7), 10)
    counts = Counter(case for case, _ in StepSampler(7, 73, seed=0))
    assert set(counts.values()) == {10, 11}


def test_more_cases_than_patches_are_drawn_once_at_most() -> None:
    cases = [case for case, _ in StepSampler(100, 10, seed=0)]
    assert len(set(cases)) == 10
    other = StepSampler(100, 10, seed=0)
    other.set_epoch(1)
    assert cases != [case for case, _ in other]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_an_epoch_among_them(world_size: int) -> None:
    num = 12 * world_size
    whole = list(StepSampler(5, num, seed=4))
    parts = [StepSampler(5, num, seed=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [len(list(part)) for part in parts] == [12] * world_size
    assert sorted(item for part in parts for item in part) == sorted(whole)


def test_the_sampler_is_a_function_of_seed_and_epoch() -> None:
    def items(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = StepSampler(5, 20, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert items(0, 1) == items(0, 1)
    # (0, 1) and (1, 0) would be one where seed and epoch were added up.
    for first, second in pairwise([items(0, 0), items(0, 1), items(1, 0), items(1, 1)]):
        assert first != second
    assert len({seed for _, seed in items(0, 0)}) == 20


def test_an_epoch_has_the_steps_asked_for(cases: list[PreparedCase]) -> None:
    assert len(module(cases, steps=5).train_dataloader()) == 5


class NumberedVoxels(Transform):
    """Replaces the image by the flat number of each voxel, so that a patch tells where it was cut."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        shape = data["image"].shape[1:]
        data["image"] = MetaTensor(torch.arange(float(np.prod(shape))).reshape(1, *shape))
        return data


def test_a_third_of_patches_is_centred_on_the_foreground(tmp_path: Path) -> None:
    label = np.zeros((30, 30, 30), np.uint8)
    label[8:20, 8:20, 8:20] = 1
    label[15, 15, 15:17] = 4
    prepared = prepare_case(tmp_path, write_case(tmp_path, "wide", label=label))
    opener, *others = patch_pipeline((5, 5, 5), []).transforms
    data = PatchDataset([prepared], Compose([opener, NumberedVoxels(), *others]))
    num = 300
    classes = Counter(int(data[(0, seed)]["label"][0, 2, 2, 2]) for seed in range(num))
    chance = 12**3 / 30**3  # of the other two thirds by mere chance
    assert (classes[1] + classes[2]) / num == pytest.approx(1 / 3 + 2 / 3 * chance, abs=0.08)
    # Two voxels of tumour draw as many patches as 1726 of liver; near none of them by chance.
    assert classes[2] / num == pytest.approx(1 / 6, abs=0.06)


def test_patches_are_cut_from_the_whole_image(tmp_path: Path) -> None:
    label = np.zeros((12, 12, 12), np.uint8)
    label[6, 6, 6] = 1
    prepared = prepare_case(tmp_path, write_case(tmp_path, "whole", label=label))
    opener, *others = patch_pipeline((4, 4, 4), []).transforms
    data = PatchDataset([prepared], Compose([opener, NumberedVoxels(), *others]))
    seen = set()
    for seed in range(150):
        patch = data[(0, seed)]
        numbers = patch["image"][0].long()
        seen |= set(numbers.reshape(-1).tolist())
        first = np.unravel_index(int(numbers[0, 0, 0]), (12, 12, 12))
        block = np.arange(12**3).reshape(12, 12, 12)[tuple(slice(k, k + 4) for k in first)]
        np.testing.assert_array_equal(numbers.numpy(), block)  # contiguous, in order, not padded
        assert torch.equal(patch["label"].bool(), patch["image"] == np.ravel_multi_index((6, 6, 6), (12, 12, 12)))
    assert len(seen) > 0.9 * 12**3


@pytest.mark.parametrize("patch", [(20, 8, 8), (20, 20, 20), (15, 13, 11)])
def test_an_image_smaller_than_the_patch_is_padded(patch: tuple[int, int, int], cases: list[PreparedCase]) -> None:
    case, _, _ = cases[0].open()
    data = dataset(cases, patch=patch)
    for seed in range(5):
        result = data[(0, seed)]
        assert result["image"].shape == result["label"].shape == (1, *patch)
        if all(n >= m for n, m in zip(patch, case.image.shape[1:], strict=True)):
            assert case.label is not None
            assert (result["label"] == 2).sum() == (case.label == 2).sum()
            assert result["image"].sum().item() == pytest.approx(case.image.sum(), rel=1e-4)


def test_image_and_label_stay_together_through_the_whole_pipeline(tmp_path: Path) -> None:
    label = stored_label()
    image = np.select([label == 1, label == 4, label == 9], [100.0, 200.0, 300.0]).astype(np.float32)
    prepared = prepare_case(tmp_path, write_case(tmp_path, "told", image=image, label=label))
    flips = [t for t in volume_transforms(PATCH) if type(t).__name__ == "RandFlipd"]
    for seed in range(20):
        patch = dataset([prepared], *flips)[(0, seed)]
        wanted = torch.where(patch["image"] > 2.5, float(IGNORE), patch["image"].round())
        assert torch.equal(patch["label"], wanted.to(torch.uint8))


def test_labels_stay_whole_numbers_under_augmentation(cases: list[PreparedCase]) -> None:
    data = dataset(cases, *volume_transforms(PATCH))
    for seed in range(20):
        label = data[(0, seed)]["label"]
        assert label.dtype == torch.uint8
        assert set(label.unique().tolist()) <= {0, 1, 2, IGNORE}


def test_a_transform_of_the_user_runs_inside(cases: list[PreparedCase]) -> None:
    (extra,) = monai_transforms([{"class": "ScaleIntensityRanged", "keys": ["image"], "a_min": 0, "a_max": 1}])
    extra.scaler.b_min, extra.scaler.b_max = 5.0, 7.0
    plain, changed = dataset(cases)[(0, 1)], dataset(cases, extra)[(0, 1)]
    torch.testing.assert_close(changed["image"], 2 * plain["image"] + 5)
    assert torch.equal(changed["label"], plain["label"])


def test_a_random_transform_of_the_user_hangs_on_the_seed_too(cases: list[PreparedCase]) -> None:
    specification = {"class": "RandBiasFieldd", "keys": ["image"], "prob": 1.0}
    data, again = (dataset(cases, *monai_transforms([specification])) for _ in range(2))
    data[(0, 1)]
    assert_same([data[(0, 5)]], [again[(0, 5)]])
    assert not torch.equal(data[(0, 5)]["image"], dataset(cases)[(0, 5)]["image"])


def test_a_transform_of_the_user_may_give_plain_arrays(cases: list[PreparedCase]) -> None:
    (extra,) = monai_transforms([{"class": "ToNumpyd", "keys": ["image", "label"]}])
    assert_same([dataset(cases, extra)[(0, 1)]], [dataset(cases)[(0, 1)]])


def test_prepared_arrays_stay_as_they_are(cases: list[PreparedCase]) -> None:
    epoch(module(cases), 0)
    list(module(cases).val_dataloader())
    assert all(prepared.entry.is_sound() for prepared in cases)


@pytest.mark.parametrize("preparation", [CT, Preparation((2.0, 1.5, 1.0), "zscore"), Preparation(None, "zscore")])
def test_preparation_as_a_transform_equals_prepare(preparation: Preparation, tmp_path: Path) -> None:
    cos, sin = np.cos(0.1), np.sin(0.1)
    affine = np.array([[0, -1.5, 0, 3], [1.2 * cos, 0, 2 * sin, -7], [-1.2 * sin, 0, 2 * cos, 11], [0, 0, 0, 1]])
    case = read_case(write_case(tmp_path, "turned", affine=affine), LABELS)
    wanted = prepare(case, preparation)
    result = PrepareCased(preparation)({**to_sample(case), "more": 3})
    assert isinstance(result["image"], MetaTensor)
    assert isinstance(result["label"], MetaTensor)
    np.testing.assert_array_equal(result["image"].numpy(), wanted.image)
    np.testing.assert_array_equal(result["label"][0].numpy(), wanted.label)
    for key in ("image", "label"):
        np.testing.assert_array_equal(result[key].affine.numpy(), wanted.geometry.affine)
    assert (result["case"], result["more"]) == ("turned", 3)


def test_preparation_as_a_transform_takes_an_image_alone(tmp_path: Path) -> None:
    case = read_case(write_case(tmp_path, "alone"), LABELS)
    image = MetaTensor(torch.from_numpy(case.image).to(torch.int16), affine=torch.eye(4))
    result = Compose([PrepareCased(CT)])({"image": image})
    assert set(result) == {"image"}
    whole = Case("alone", np.trunc(case.image), None, case.geometry, ())
    np.testing.assert_array_equal(result["image"].numpy(), prepare(whole, CT).image)


def test_the_cpu_loads_patches_itself() -> None:
    assert default_workers("cpu") == 0
    assert 1 <= default_workers("cuda") <= 12


def test_patch_of_two_edges_is_a_piece_of_one_slice(cases: list[PreparedCase]) -> None:
    data = dataset(cases, patch=(8, 6))
    sample = data[0, 5]
    assert sample["image"].shape == sample["label"].shape == (1, 8, 6)
    case, _, _ = cases[0].open()
    windows = np.lib.stride_tricks.sliding_window_view(case.image[0], (8, 6), axis=(0, 1))
    assert (windows == sample["image"][0].numpy()).all(axis=(-2, -1)).any()


def test_slices_of_the_foreground_are_drawn_more_often(cases: list[PreparedCase]) -> None:
    case, _, _ = cases[0].open()
    assert case.label is not None
    holds = np.isin(case.label, (1, 2)).any(axis=(0, 1)).mean()
    data = dataset(cases, patch=case.image.shape[1:3])
    drawn = np.mean([bool(np.isin(data[0, seed]["label"].numpy(), (1, 2)).any()) for seed in range(60)])
    # A third of the draws is centred on the foreground, the others fall where they may.
    assert drawn > holds + 0.5 * (1 - holds) / 3
