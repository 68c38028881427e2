from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, RandAffined, RandFlipd, Transform

from medmom.data.albumented import Albumented
from medmom.data.augment import monai_transforms, slice_transforms, volume_transforms
from medmom.errors import MedmomError


def sample(shape: tuple[int, int, int] = (12, 12, 12)) -> dict[str, Any]:
    """An image that is its label: whatever moves one has to move the other."""
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[:, 2:6, 3:9, 1:7] = 1
    label[:, 7:10, 3:6, 4:9] = 2
    return {"image": MetaTensor(label.float()), "label": MetaTensor(label)}


def spatial(patch: tuple[int, ...], mirror: tuple[int, ...] = (0, 1, 2)) -> Compose:
    """Those of the transforms that move voxels."""
    return Compose([t for t in volume_transforms(patch, mirror=mirror) if isinstance(t, RandAffined | RandFlipd)])


def runs(transforms: Compose, num: int, **options: Any) -> list[dict[str, Any]]:
    results = []
    for seed in range(num):
        transforms.set_random_state(seed)
        results.append(transforms(sample(**options)))
    return results


def test_image_and_label_move_together() -> None:
    moved = 0
    for result in runs(spatial((12, 12, 12)), 30):
        image, label = result["image"].numpy(), result["label"].numpy()
        moved += not np.array_equal(label, sample()["label"].numpy())
        assert set(np.unique(label)) <= {0, 1, 2}
        # Linear against nearest: they differ at edges only, where the nearest of eight voxels weighs an eighth or more.
        assert np.abs(image - label).max() <= 2 * 7 / 8
        assert np.corrcoef(image.ravel(), label.ravel())[0, 1] > 0.9
    assert moved > 15


@pytest.mark.parametrize("mirror", [(), (0,), (1, 2), (0, 1, 2)])
def test_only_the_axes_named_are_mirrored(mirror: tuple[int, ...]) -> None:
    flips = Compose([t for t in volume_transforms((12, 12, 12), mirror=mirror) if isinstance(t, RandFlipd)])
    label = sample()["label"].numpy()[0]
    seen = set()
    for result in runs(flips, 40):
        found = [
            axes
            for axes in [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
            if np.array_equal(result["label"].numpy()[0], np.flip(label, axes))
        ]
        assert len(found) == 1
        assert np.array_equal(result["image"].numpy(), result["label"].numpy())
        seen.add(found[0])
    assert set().union(*seen) == set(mirror)
    assert len(seen) == 2 ** len(mirror)


def test_intensities_change_and_labels_stay_without_spatial_transforms() -> None:
    changes = [t for t in volume_transforms((12, 12, 12)) if not isinstance(t, RandAffined | RandFlipd)]
    results = runs(Compose(changes), 20)
    assert sum(not torch.equal(r["image"], sample()["image"]) for r in results) > 10
    for result in results:
        assert torch.equal(result["label"], sample()["label"])
        assert result["image"].isfinite().all()


def test_a_seed_gives_one_patch_whatever_came_before() -> None:
    transforms = Compose(volume_transforms((12, 12, 12)))
    first, *_ = runs(transforms, 5)
    again, *_ = runs(transforms, 1)
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["label"], again["label"])


def test_a_patch_keeps_its_shape_and_type() -> None:
    for result in runs(Compose(volume_transforms((12, 10, 8))), 10, shape=(12, 10, 8)):
        assert result["image"].shape == result["label"].shape == (1, 12, 10, 8)
        assert result["image"].dtype == torch.float32


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_a_flat_patch_is_not_turned_out_of_its_plane(thin: int) -> None:
    shape = [24, 24, 24]
    shape[thin] = 6
    affine = volume_transforms(shape)[0]
    assert isinstance(affine, RandAffined)
    affine.prob = 1.0
    # Every slice holds its own number; scaling may blend neighbours, but a slice stays one number throughout.
    ramp = torch.arange(6.0).reshape([6 if axis == thin else 1 for axis in range(3)]).expand(*shape)
    for seed in range(5):
        affine.set_random_state(seed)
        image = affine({"image": MetaTensor(ramp[None].clone()), "label": MetaTensor(ramp[None].clone())})["image"][0]
        across = tuple(axis for axis in range(3) if axis != thin)
        assert (image.amax(across) - image.amin(across)).max() < 1e-3


def picture(channels: int = 1, shape: tuple[int, int] = (48, 40), *, scale: float = 1, shift: float = 0) -> Any:
    """An image that is its label, in every channel, and a label of two classes."""
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[:, 8:30, 5:20] = 1
    label[:, 32:44, 22:36] = 2
    image = label.float().expand(channels, *shape) / 2 * scale + shift
    return {"image": MetaTensor(image.clone()), "label": MetaTensor(label), "case": "case"}


def draws(transforms: Sequence[Transform], num: int, data: Any) -> list[Any]:
    changes, results = Compose(transforms), []
    for seed in range(num):
        changes.set_random_state(seed)
        results.append(changes(data))
    return results


def moves(mirror: tuple[int, ...] = (0, 1)) -> list[Transform]:
    return slice_transforms((48, 40), mirror=mirror)[:1]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_slice_and_its_label_move_together(channels: int) -> None:
    moved = 0
    for result in draws(moves(), 40, picture(channels)):
        image, label = result["image"].numpy(), result["label"].numpy()
        assert image.shape == (channels, 48, 40)
        assert label.dtype == np.uint8
        assert set(np.unique(label)) <= {0, 1, 2}
        moved += not np.array_equal(label, picture()["label"].numpy())
        assert all(np.corrcoef(each.ravel(), label.ravel())[0, 1] > 0.9 for each in image)
    assert moved > 25


@pytest.mark.parametrize("mirror", [(), (0,), (1,), (0, 1), (0, 1, 2)])
def test_only_the_axes_named_of_a_slice_are_mirrored(mirror: tuple[int, ...]) -> None:
    (transform,) = moves(mirror)
    assert isinstance(transform, Albumented)
    label, seen = picture()["label"].numpy()[0], set()
    for result in draws([Albumented(transform.transforms[1:])], 40, picture()):
        found = [
            axes
            for axes in [(), (0,), (1,), (0, 1)]
            if np.array_equal(result["label"].numpy()[0], np.flip(label, axes))
        ]
        assert np.array_equal(result["image"].numpy() * 2, result["label"].numpy())
        seen.add(found[0])
    assert set().union(*seen) == set(mirror) - {2}
    assert len(seen) == 2 ** len(set(mirror) - {2})


@pytest.mark.parametrize("value", [2, 255])
def test_beyond_the_edge_a_slice_goes_on_as_it_ends(value: int) -> None:
    data = {"image": torch.full((1, 48, 40), -7.5), "label": torch.full((1, 48, 40), value, dtype=torch.uint8)}
    for result in draws(moves(), 20, data):
        # Weights of linear interpolation add up to 1 but for the rounding of OpenCV's.
        torch.testing.assert_close(result["image"], data["image"])
        assert torch.equal(result["label"], data["label"])


def test_rotation_is_free_but_in_a_long_patch() -> None:
    for patch, angle in (((48, 40), 180), ((96, 32), 15), ((32, 96), 15)):
        transform = slice_transforms(patch)[0]
        assert isinstance(transform, Albumented)
        assert transform.transforms[0].rotate == (-angle, angle)


def test_about_a_third_of_slices_are_turned_or_scaled() -> None:
    still = [torch.equal(r["label"], picture()["label"]) for r in draws(moves(()), 300, picture())]
    assert 0.28 < 1 - np.mean(still) < 0.44


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("intensity", ["ct", "zscore"])
def test_values_of_scans_are_never_cut_off_at_zero_and_one(intensity: str, channels: int) -> None:
    data = picture(channels, scale=8, shift=-3)
    for result in draws(slice_transforms((48, 40), intensity=intensity), 60, data):
        image = result["image"]
        assert image.isfinite().all()
        assert image.dtype == torch.float32
        # Brightness multiplies by 0.65 at least; blur and zoom smooth edges, but not the inside of a block.
        assert image.min() < -1
        assert image.max() > 2


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_stay_between_zero_and_one(channels: int) -> None:
    results = draws(slice_transforms((48, 40), intensity="unit"), 60, picture(channels))
    assert all(result["image"].isfinite().all() for result in results)
    assert min(float(result["image"].min()) for result in results) == 0
    assert max(float(result["image"].max()) for result in results) == 1
    grey = [bool((result["image"] == result["image"][:1]).all()) for result in results]
    assert all(grey) if channels == 1 else sum(grey) < 60


@pytest.mark.parametrize("intensity", ["unit", "zscore"])
def test_a_blank_slice_and_one_without_label_are_fed_too(intensity: str) -> None:
    data = {"image": torch.zeros(3, 16, 12), "case": "blank"}
    for result in draws(slice_transforms((16, 12), intensity=intensity), 60, data):
        assert set(result) == {"image", "case"}
        assert result["image"].shape == (3, 16, 12)
        assert result["image"].isfinite().all()


def test_intensities_of_slices_and_volumes_are_changed_alike() -> None:
    volumes = [type(t) for t in volume_transforms((12, 12, 12)) if not isinstance(t, RandAffined | RandFlipd)]
    assert [type(t) for t in slice_transforms((48, 40))[1:]] == volumes
    assert all(isinstance(t, Albumented) for t in slice_transforms((48, 40), intensity="unit"))


def test_neighbours_of_albumentations_become_one_transform() -> None:
    rotate = {"class": "albumentations.Rotate", "limit": 35, "p": 0.3}
    holes = {"num_holes_range": [10, 10], "hole_height_range": [32, 32], "hole_width_range": [32, 32], "p": 0.3}
    dropout = {"class": "albumentations.CoarseDropout", **holes}
    noise = {"class": "RandGaussianNoised", "keys": ["image"]}
    specifications = [rotate, dropout, noise, noise, {"class": "albumentations.VerticalFlip"}]
    made = monai_transforms(specifications, intensity="unit", shape=(3, 64, 64))
    assert [type(t).__name__ for t in made] == ["Albumented"] + 2 * ["RandGaussianNoised"] + ["Albumented"]
    first, last = made[0], made[-1]
    assert isinstance(first, Albumented)
    assert isinstance(last, Albumented)
    assert [type(t).__name__ for t in first.transforms] == ["Rotate", "CoarseDropout"]
    assert (first.transforms[0].limit, first.transforms[0].p) == ((-35, 35), 0.3)
    assert [type(t).__name__ for t in last.transforms] == ["VerticalFlip"]
    assert rotate == {"class": "albumentations.Rotate", "limit": 35, "p": 0.3}


def test_what_does_not_fit_the_patch_is_said_before_training() -> None:
    crop = {"class": "albumentations.RandomCrop", "height": 8, "width": 8}
    monai_transforms([crop])
    with pytest.raises(MedmomError, match=r"albumentations\.RandomCrop: makes shape"):
        monai_transforms([crop], shape=(1, 16, 16))
    with pytest.raises(MedmomError, match=r"albumentations\.GaussNoise: is made for pictures"):
        monai_transforms([{"class": "albumentations.GaussNoise"}])


def test_a_transform_of_monai_is_made_by_name() -> None:
    first, second = monai_transforms(
        [{"class": "RandBiasFieldd", "keys": ["image"], "prob": 0.5}, {"class": "RandGibbsNoised", "keys": ["image"]}]
    )
    assert (type(first).__name__, type(second).__name__) == ("RandBiasFieldd", "RandGibbsNoised")
    assert isinstance(first, MapTransform)
    assert first.keys == ("image",)


def test_a_recipe_is_left_as_it_was() -> None:
    specification = {"class": "RandBiasFieldd", "keys": ["image"]}
    monai_transforms([specification])
    assert specification == {"class": "RandBiasFieldd", "keys": ["image"]}


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ({"class": "RandBiasFeildd", "keys": ["image"]}, r"'RandBiasFeildd'; did you mean RandBiasFieldd\?"),
        ({"class": "RandGaussianNoise"}, r"'RandGaussianNoise'; did you mean RandGaussianNoised\?"),
        ({"class": "qqqqqq"}, "'qqqqqq'; write the name of a class in monai.transforms"),
        ({"class": "np"}, "no MONAI dictionary transform 'np'"),
        ({"keys": ["image"]}, "no MONAI dictionary transform ''"),
        ({"class": "RandBiasFieldd"}, "RandBiasFieldd: .*missing .*'keys'"),
        ({"class": "RandBiasFieldd", "keys": ["image"], "degre": 2}, "RandBiasFieldd: .*unexpected .*'degre'"),
        ({"class": "RandBiasFieldd", "keys": ["img"]}, r"RandBiasFieldd: keys \['img'\]; a patch has image and label"),
    ],
)
def test_a_transform_that_cannot_be_made_is_refused(specification: dict[str, Any], message: str) -> None:
    with pytest.raises(MedmomError, match=f"^data.transforms: .*{message}"):
        monai_transforms([specification])
