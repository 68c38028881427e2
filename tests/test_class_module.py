from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import MapTransform, RandFlipd, RandGaussianNoised, RandScaleIntensityd, Transform
from tiny_classes import picture_case, write_class_folders, write_items, write_picture, write_volume

from medmom.classes import Classes
from medmom.data.augment import slice_transforms, volume_transforms
from medmom.data.casefiles import CaseFiles
from medmom.data.class_images import choose_slices, fit_to_patch, prepare_images, read_class_case
from medmom.data.class_layouts import find_class_cases
from medmom.data.class_module import BalancedSampler, ClassDataModule
from medmom.data.class_targets import class_weights, multi_hot
from medmom.data.files import read_image
from medmom.data.preparation import Preparation, prepare
from medmom.errors import MedmomError

UNIT = Preparation(None, "unit")
SIZED = Preparation(None, "unit", size=(10, 10))
ZSCORE = Preparation(None, "zscore")
CLASSES = Classes(("cat", "dog"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[CaseFiles]:
    folder = write_class_folders(tmp_path_factory.mktemp("pictures"), {"cat": 5, "dog": 3})
    return list(find_class_cases(folder).cases)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[CaseFiles]:
    folder = tmp_path_factory.mktemp("volumes")
    paths = [write_volume(folder / f"v{k}.nii.gz", seed=k, shape=(9, 8, 5 + k)) for k in range(4)]
    return [picture_case(path, CLASSES.names[k % 2]) for k, path in enumerate(paths)]


def module(
    cases: Sequence[CaseFiles],
    cache: Path,
    *,
    preparation: Preparation = SIZED,
    patch: tuple[int, ...] = (8, 8),
    transforms: Sequence[Transform] = (),
    workers: int = 0,
    **options: Any,
) -> ClassDataModule:
    return ClassDataModule(
        cases,
        cases[:3],
        **{"classes": CLASSES, "batch_size": 2, "steps_per_epoch": 3, "seed": 3, **options},
        preparation=preparation,
        patch=patch,
        transforms=transforms,
        workers=workers,
        cache=cache,
    )


def epoch(data: ClassDataModule, number: int = 0) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return list(loader)


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one["case"] == other["case"]
        for key in ("image", "target"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def test_a_batch_is_what_a_task_takes(pictures: list[CaseFiles], tmp_path: Path) -> None:
    data = module(pictures, tmp_path, transforms=slice_transforms((8, 8), intensity="unit"))
    batches = epoch(data)
    assert len(batches) == 3
    known = {case.name: case.classes for case in pictures}
    for batch in batches:
        assert set(batch) == {"image", "target", "case"}
        assert type(batch["image"]) is torch.Tensor
        assert batch["image"].shape == (2, 1, 8, 8)
        assert batch["image"].dtype == batch["target"].dtype == torch.float32
        for name, target in zip(batch["case"], batch["target"], strict=True):
            assert known[name] == (CLASSES.names[int(target.argmax())],)
            assert target.sum() == 1


def test_validation_keeps_order_and_changes_nothing(pictures: list[CaseFiles], tmp_path: Path) -> None:
    data = module(pictures, tmp_path, preparation=UNIT, patch=(8, 6), transforms=[RandFlipd(keys="image", prob=1)])
    batches = list(data.val_dataloader())
    assert [batch["case"] for batch in batches] == [["cat-0", "cat-1"], ["cat-2"]]
    for case, image in zip(pictures, torch.cat([batch["image"] for batch in batches]), strict=False):
        np.testing.assert_array_equal(image.numpy(), read_image(case.images[0]).array[..., 0] / np.float32(255))


def test_images_are_prepared_as_for_inference(
    pictures: list[CaseFiles], volumes: list[CaseFiles], tmp_path: Path
) -> None:
    for cases, preparation in ((pictures, SIZED), (volumes, Preparation((1.5, 1.0, 2.0), "zscore"))):
        for image in prepare_images(cases, preparation, tmp_path, quiet=True):
            np.testing.assert_array_equal(image.open(), prepare(read_class_case(image.files), preparation).image)


def test_volumes_are_prepared_once(volumes: list[CaseFiles], tmp_path: Path) -> None:
    images = prepare_images(volumes, ZSCORE, tmp_path, quiet=True)
    assert all(image.entry is not None and image.entry.is_sound() for image in images)
    changed = [path.stat().st_mtime_ns for path in sorted((tmp_path / "images").iterdir())]
    prepare_images(volumes, ZSCORE, tmp_path, quiet=True)
    assert changed == [path.stat().st_mtime_ns for path in sorted((tmp_path / "images").iterdir())]
    assert len(changed) == len(volumes)


@pytest.mark.parametrize("kind", ["pictures", "slices", "volumes", "items"])
def test_batches_are_the_same_with_any_number_of_workers(
    kind: str, pictures: list[CaseFiles], volumes: list[CaseFiles], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"transforms": slice_transforms((8, 8), intensity="unit")}
    cases = pictures
    if kind == "items":
        listed = find_class_cases(write_items(tmp_path / "x.npz"))
        cases, options["classes"] = list(listed.cases), listed.classes
    elif kind == "slices":
        cases = volumes
        options = {"transforms": slice_transforms((8, 8)), "slices": 3, "preparation": ZSCORE}
    elif kind == "volumes":
        cases = volumes
        options = {"transforms": volume_transforms((8, 8, 8)), "patch": (8, 8, 8), "preparation": ZSCORE}
    alone = module(cases, tmp_path / "cache", **options)
    for workers in (1, 2):
        helped = module(cases, tmp_path / "cache", workers=workers, **options)
        assert_same(epoch(alone, 1), epoch(helped, 1))
        assert_same(list(alone.val_dataloader()), list(helped.val_dataloader()))


def test_a_sample_hangs_on_case_and_seed_alone(pictures: list[CaseFiles], tmp_path: Path) -> None:
    options = {"transforms": slice_transforms((8, 8), intensity="unit"), "preparation": UNIT}
    one, other = (module(pictures, tmp_path, **options).patches for _ in range(2))
    items = [(0, 7), (1, 7), (2, 2**32 - 1), (0, 0)]
    first = [one[item] for item in items]
    assert_same(first, [other[item] for item in reversed(items)][::-1])
    assert not torch.equal(first[0]["image"], first[3]["image"])


def test_another_epoch_gives_other_samples_and_a_resumed_one_the_same(
    pictures: list[CaseFiles], tmp_path: Path
) -> None:
    data = module(pictures, tmp_path, transforms=[RandGaussianNoised(keys="image", prob=1)])
    first, second = epoch(data, 0), epoch(data, 1)
    assert not any(torch.equal(a["image"], b["image"]) for a in first for b in second)
    again = module(pictures, tmp_path, transforms=[RandGaussianNoised(keys="image", prob=1)])
    assert_same(epoch(again, 1), second)


def test_the_transforms_given_stay_as_they_are(pictures: list[CaseFiles], tmp_path: Path) -> None:
    given = RandFlipd(keys=("image", "label"), prob=1, spatial_axis=0)
    epoch(module(pictures, tmp_path, transforms=[given]))
    assert not given.allow_missing_keys


# Slices.


class Remember(MapTransform):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(keys=("image",))
        self.seen: list[torch.Tensor] = []

    def __deepcopy__(self, memo: object) -> Remember:
        return self

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(data["image"])
        return data


def test_slices_of_a_volume_are_channels_to_the_transforms(tmp_path: Path) -> None:
    case = picture_case(write_volume(tmp_path / "a.nii", shape=(8, 8, 9)), "cat")
    spy = Remember()
    data = module([case], tmp_path, preparation=ZSCORE, transforms=[spy], slices=4, patch=(8, 8))
    image = data.patches[0, 5]["image"]
    assert image.shape == (1, 8, 8, 4)
    (seen,) = spy.seen
    assert seen.shape == (4, 8, 8)
    for k in range(4):
        torch.testing.assert_close(seen[k], image[0, ..., k], rtol=0, atol=0)


def test_all_slices_are_turned_alike(tmp_path: Path) -> None:
    case = picture_case(write_volume(tmp_path / "a.nii", shape=(8, 8, 3)), "cat")
    flip = RandFlipd(keys="image", prob=0.5, spatial_axis=0)
    bright = RandScaleIntensityd(keys="image", prob=1, factors=0.5)
    plain, changed = (
        module([case], tmp_path, preparation=ZSCORE, transforms=changes, slices=3).patches
        for changes in ([], [flip, bright])
    )
    turned = set()
    for seed in range(12):
        ratios = set()
        for k in range(3):
            one, other = plain[0, seed]["image"][0, ..., k], changed[0, seed]["image"][0, ..., k]
            ratio = other / one
            is_flipped = not torch.allclose(ratio, ratio[0, 0])
            ratios.add((is_flipped, round(float((other.flip(0) if is_flipped else other)[0, 0] / one[0, 0]), 4)))
        assert len(ratios) == 1
        turned |= {is_flipped for is_flipped, _ in ratios}
    assert turned == {True, False}


def test_channels_and_slices_are_not_mixed_up(tmp_path: Path) -> None:
    paths = tuple(write_volume(tmp_path / f"{k}.nii", seed=k, shape=(6, 5, 7)) for k in range(2))
    case = CaseFiles("two", paths, None, "two", classes=("cat",))
    (image,) = prepare_images([case], ZSCORE, tmp_path, quiet=True)
    data = module([case], tmp_path, preparation=ZSCORE, slices=7, patch=(6, 5), transforms=[Remember()])
    np.testing.assert_array_equal(data.patches[0, 1]["image"].shape, (2, 6, 5, 7))
    (batch,) = module([case], tmp_path, preparation=ZSCORE, slices=7, patch=(6, 5)).val_dataloader()
    np.testing.assert_array_equal(batch["image"][0].numpy(), image.open())


def test_validation_takes_slices_evenly(volumes: list[CaseFiles], tmp_path: Path) -> None:
    data = module(volumes, tmp_path, preparation=ZSCORE, slices=3, patch=(9, 8))
    batches = list(data.val_dataloader())
    assert [batch["image"].shape for batch in batches] == [(2, 1, 9, 8, 3), (1, 1, 9, 8, 3)]
    image = prepare_images(volumes[:1], ZSCORE, tmp_path, quiet=True)[0].open()
    np.testing.assert_array_equal(batches[0]["image"][0].numpy(), image[..., [0, 2, 4]])


def test_volumes_with_fewer_slices_are_validated_one_by_one(volumes: list[CaseFiles], tmp_path: Path) -> None:
    data = module(volumes, tmp_path, preparation=ZSCORE, slices=6)
    assert [tuple(batch["image"].shape) for batch in data.val_dataloader()] == [
        (1, 1, 8, 8, 5),
        (1, 1, 8, 8, 6),
        (1, 1, 8, 8, 6),
    ]
    assert all(batch["image"].shape == (2, 1, 8, 8, 6) for batch in epoch(data))


def test_slices_are_chosen_in_order() -> None:
    assert choose_slices(10, 5).tolist() == [1, 3, 5, 7, 9]
    assert choose_slices(9, 1).tolist() == [4]
    assert choose_slices(4, 6).tolist() == [0, 1, 2, 3]
    seen: Counter[int] = Counter()
    for seed in range(400):
        places = choose_slices(30, 3, np.random.default_rng(seed))
        assert len(places) == 3
        assert all(10 * k <= place < 10 * k + 10 for k, place in enumerate(places))
        seen.update(places.tolist())
    assert set(seen) == set(range(30))
    assert seen[14] + seen[15] > 2 * (seen[10] + seen[19])
    short = choose_slices(2, 5, np.random.default_rng(0))
    assert len(short) == 5
    assert (np.diff(short) >= 0).all()


# Cutting and filling up.


def test_an_image_is_cut_and_filled_about_its_centre() -> None:
    image = np.arange(1, 21, dtype=np.float32).reshape(1, 5, 4)
    np.testing.assert_array_equal(fit_to_patch(image, (3, 4)), image[:, 1:4])
    filled = fit_to_patch(image, (3, 7))
    assert filled.shape == (1, 3, 7)
    np.testing.assert_array_equal(filled[:, :, 1:5], image[:, 1:4])
    assert (filled[:, :, [0, 5, 6]] == 1).all()


def test_filling_is_the_lowest_value_of_each_channel() -> None:
    image = np.stack([np.arange(4.0).reshape(2, 2), -np.arange(4.0).reshape(2, 2)]).astype(np.float32)
    filled = fit_to_patch(image, (4, 4))
    assert (filled[:, 0, 0] == [0, -3]).all()
    assert filled.dtype == np.float32


def test_axes_beyond_the_patch_stay() -> None:
    image = np.random.default_rng(0).normal(size=(1, 6, 3, 7)).astype(np.float32)
    np.testing.assert_array_equal(fit_to_patch(image, (4, 3)), image[:, 1:5])


def test_training_cuts_everywhere_and_keeps_what_fits() -> None:
    image = np.arange(1, 41, dtype=np.float32).reshape(1, 8, 5)
    firsts = set()
    for seed in range(80):
        patch = fit_to_patch(image, (4, 6), np.random.default_rng(seed))
        assert patch.shape == (1, 4, 6)
        inside = patch[0][:, (patch[0] > 1).any(axis=0)]
        assert inside.shape[1] == 5
        firsts.add((float(inside[0, -1]), bool((patch[0, :, 0] == 1).all())))
    assert len(firsts) == 10


def test_a_patch_never_shares_memory_with_the_image() -> None:
    image = np.zeros((1, 4, 4), np.float32)
    fit_to_patch(image, (4, 4))[:] = 1
    assert image.max() == 0


# Classes.


def test_balanced_sampling_draws_every_class_equally_often(pictures: list[CaseFiles], tmp_path: Path) -> None:
    data = module(pictures[:6], tmp_path, balance="sampling", steps_per_epoch=30)
    drawn = Counter(name for batch in epoch(data) for name in batch["case"])
    assert drawn["dog-0"] == 30
    assert sorted(drawn[f"cat-{k}"] for k in range(5)) == [6] * 5
    plain = Counter(
        name for batch in epoch(module(pictures[:6], tmp_path, steps_per_epoch=30)) for name in batch["case"]
    )
    assert set(plain.values()) == {10}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_a_balanced_epoch(world_size: int) -> None:
    members = [np.array([0, 1, 2, 3]), np.array([4])]
    whole = list(BalancedSampler(members, 12, seed=4))
    parts = [BalancedSampler(members, 12, seed=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(item for part in parts for item in part) == sorted(whole)
    other = BalancedSampler(members, 12, seed=4)
    other.set_epoch(1)
    assert list(other) != whole == list(BalancedSampler(members, 12, seed=4))


def test_images_of_no_class_are_drawn_too(pictures: list[CaseFiles], tmp_path: Path) -> None:
    cases = [
        CaseFiles(c.name, c.images, None, c.group, classes=c.classes if k % 2 else ()) for k, c in enumerate(pictures)
    ]
    data = module(
        cases, tmp_path, classes=Classes(("cat", "dog"), is_multilabel=True), balance="sampling", steps_per_epoch=9
    )
    targets = torch.cat([batch["target"] for batch in epoch(data)])
    assert Counter(tuple(target.tolist()) for target in targets) == {(1.0, 0.0): 6, (0.0, 1.0): 6, (0.0, 0.0): 6}


def test_targets_are_one_for_each_class() -> None:
    kinds = [("a",), ("c", "a"), ()]
    cases = [CaseFiles(str(k), (), None, "", classes=kind) for k, kind in enumerate(kinds)]
    targets = multi_hot(cases, Classes(("a", "b", "c"), is_multilabel=True))
    assert targets.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert targets.dtype == np.float32


def test_weights_are_inverse_frequencies_of_mean_one(pictures: list[CaseFiles]) -> None:
    weights = class_weights(pictures, CLASSES)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([8 / 10, 8 / 6])
    assert (5 * weights[0] + 3 * weights[1]) / 8 == pytest.approx(1)


def test_a_class_without_images_has_no_weight(pictures: list[CaseFiles]) -> None:
    with pytest.raises(MedmomError, match="class owl has no training image"):
        class_weights(pictures, Classes(("cat", "dog", "owl")))


def test_colour_pictures_have_three_channels(tmp_path: Path) -> None:
    cases = [picture_case(write_picture(tmp_path / f"{k}.png", colour=True, seed=k), "cat") for k in range(3)]
    assert epoch(module(cases, tmp_path))[0]["image"].shape == (2, 3, 8, 8)


def test_a_thick_slice_is_a_picture(tmp_path: Path) -> None:
    case = picture_case(write_volume(tmp_path / "a.nii", shape=(8, 8, 1)), "cat")
    (batch,) = module([case], tmp_path, preparation=Preparation((1.0, 1.0, 0.25), "zscore")).val_dataloader()
    image = prepare(read_class_case(case), ZSCORE).image
    np.testing.assert_allclose(batch["image"][0].numpy(), image[..., 0], atol=1e-5)


def test_samples_travel_to_a_fresh_process(volumes: list[CaseFiles], tmp_path: Path) -> None:
    listed = find_class_cases(write_items(tmp_path / "x.npz"))
    flip = [RandFlipd(keys="image", prob=0.5)]
    packed = module(listed.cases, tmp_path, classes=listed.classes, transforms=flip).patches
    deep = module(volumes, tmp_path, preparation=ZSCORE, slices=3, transforms=flip).patches
    for patches in (packed, deep):
        raw = pickle.dumps(patches)
        # Images stay on disk: what is sent are their places.
        assert len(raw) < 30_000
        assert_same([patches[1, 5]], [pickle.loads(raw)[1, 5]])
