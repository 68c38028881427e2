from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, RandAffined, RandFlipd

from medmom.data.augment import monai_transforms, volume_transforms
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
