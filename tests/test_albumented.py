from __future__ import annotations

import multiprocessing
import pickle
import random
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from torch.utils.data import DataLoader

from medmom.data.albumented import Albumented, albumentations_transform, load_albumentations
from medmom.data.augment import slice_transforms
from medmom.data.module import PatchDataset
from medmom.errors import MedmomError

library = load_albumentations()
MOVING = sorted(
    name
    for name, kind in vars(library).items()
    if isinstance(kind, type) and issubclass(kind, library.DualTransform) and not issubclass(kind, library.Transform3D)
    if kind is not library.DualTransform
)
# What they must be told, where they have no defaults that suit a patch of 40 x 32.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AtLeastOneBBoxRandomCrop": {"height": 32, "width": 40},
    "CenterCrop": {"height": 32, "width": 40},
    "Crop": {"x_max": 40, "y_max": 32},
    "CropAndPad": {"px": [-2, 2]},
    "CropNonEmptyMaskIfExists": {"height": 32, "width": 40},
    "LongestMaxSize": {"max_size": 40},
    "PadIfNeeded": {"min_height": 16, "min_width": 16},
    "RandomCrop": {"height": 32, "width": 40},
    "RandomResizedCrop": {"size": [32, 40]},
    "RandomSizedCrop": {"min_max_height": [16, 24], "size": [32, 40]},
    "Resize": {"height": 32, "width": 40},
    "SmallestMaxSize": {"max_size": 32},
}
# Made for boxes, further images or three channels; or they change the size; or a recipe cannot write their arguments.
UNSUITABLE = {
    "BBoxSafeRandomCrop",
    "ConstrainedCoarseDropout",
    "D4",
    "GridElasticDeform",
    "Lambda",
    "Mosaic",
    "OverlayElements",
    "RandomCropFromBorders",
    "RandomCropNearBBox",
    "RandomRotate90",
    "RandomScale",
    "RandomSizedBBoxSafeCrop",
    "SquareSymmetry",
    "Transpose",
}


def sample(channels: int = 1, shape: tuple[int, int] = (40, 32), *, low: float = 0, high: float = 1) -> dict[str, Any]:
    """Smooth noise from ``low`` to ``high``, and a label of two blocks and a corner to be ignored."""
    noise = torch.rand(1, channels, 6, 5, generator=torch.Generator().manual_seed(channels))
    image = torch.nn.functional.interpolate(noise, size=shape, mode="bilinear")[0]
    image = (image - image.min()) / (image.max() - image.min()) * (high - low) + low
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[:, 4:20, 6:14] = 1
    label[:, 22:36, 16:28] = 2
    label[:, :3, :3] = 255
    return {"case": "case", "annotated": torch.ones(3, dtype=torch.bool), "image": image, "label": label}


def made(name: str, *, intensity: str = "unit", **arguments: Any) -> Any:
    return albumentations_transform({"class": f"albumentations.{name}", **arguments}, intensity=intensity)


def run(transform: Any, seed: int, data: dict[str, Any]) -> dict[str, Any]:
    transform.set_random_state(seed)
    return dict(transform(data))


class Seeds(torch.utils.data.Sampler[tuple[int, int]]):
    def __iter__(self) -> Any:
        return iter([(k % 3, 100 + k) for k in range(12)])

    def __len__(self) -> int:
        return 12


def batches(workers: int, context: str | None = None) -> list[dict[str, Any]]:
    data = [sample(3) for _ in range(3)]
    pictures = PatchDataset(data, Compose(slice_transforms((40, 32), intensity="unit")))
    options: Any = {"multiprocessing_context": context} if workers else {}
    return list(DataLoader(pictures, batch_size=4, sampler=Seeds(), num_workers=workers, **options))


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_with_any_number_of_forked_workers(workers: int) -> None:
    assert_same(batches(0), batches(workers, "fork"))


@pytest.mark.slow
def test_batches_are_the_same_with_spawned_workers() -> None:
    assert "spawn" in multiprocessing.get_all_start_methods()
    assert_same(batches(0), batches(2, "spawn"))


def test_seeds_differ() -> None:
    changes = Compose(slice_transforms((40, 32), intensity="unit"))
    images = {run(changes, seed, sample(3))["image"].numpy().tobytes() for seed in range(20)}
    assert len(images) > 15


def test_a_seed_gives_one_result_whatever_came_before_and_after_pickling() -> None:
    changes = Compose(slice_transforms((40, 32), intensity="unit"))
    first = run(changes, 3, sample(3))
    for seed in range(8):
        run(changes, seed, sample(1))
    assert_same([first], [run(changes, 3, sample(3))])
    assert_same([first], [run(pickle.loads(pickle.dumps(changes)), 3, sample(3))])


@pytest.mark.parametrize("intensity", ["unit", "zscore"])
def test_global_generators_are_left_alone(intensity: str) -> None:
    def states() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002

    before = states()
    changes = Compose(slice_transforms((40, 32), intensity=intensity))
    images = []
    for seed in range(30):
        random.seed(seed)
        torch.manual_seed(seed)
        images.append(run(changes, 5, sample(3))["image"].numpy().tobytes())
    random.setstate(before[0])
    torch.set_rng_state(torch.tensor(before[2], dtype=torch.uint8))
    assert len(set(images)) == 1
    for seed in range(30):
        run(changes, seed, sample(3))
    assert states() == before


def test_transforms_of_one_probability_are_drawn_apart() -> None:
    flips = Albumented([library.HorizontalFlip(p=0.5), library.VerticalFlip(p=0.5)])
    image = sample()["image"]
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(200):
        result = run(flips, seed, sample())["image"]
        seen.update(axes for axes in [(), (1,), (2,), (1, 2)] if torch.equal(result, image.flip(axes)))
    assert set(seen) == {(), (1,), (2,), (1, 2)}
    assert min(seen.values()) > 30


def test_a_horizontal_flip_reverses_the_columns() -> None:
    result = run(Albumented([made("HorizontalFlip", p=1)]), 0, sample(3))
    assert torch.equal(result["image"], sample(3)["image"].flip(1))
    assert torch.equal(result["label"], sample()["label"].flip(1))


@pytest.mark.parametrize("data", [sample(3), {k: v for k, v in sample(3).items() if k != "label"}])
def test_samples_with_and_without_label_keep_form_and_source(data: dict[str, Any]) -> None:
    data["image"] = MetaTensor(data["image"])
    before = data["image"].clone()
    result = run(Albumented([made("InvertImg", p=1), made("CoarseDropout", p=1)]), 0, data)
    assert torch.equal(data["image"], before)
    assert set(result) == set(data)
    assert type(result["image"]) is torch.Tensor
    assert (result["image"].shape, result["image"].dtype) == (before.shape, torch.float32)
    assert result["image"].is_contiguous()
    assert result["case"] == "case"


@pytest.mark.parametrize("name", sorted(set(MOVING) - UNSUITABLE))
def test_what_moves_pixels_never_cuts_off_their_values(name: str) -> None:
    for channels in (1, 3, 5):
        data = sample(channels, low=-3, high=5)
        moves = Albumented([made(name, intensity="zscore", p=1, **ARGUMENTS.get(name, {}))])
        values = torch.stack([run(moves, seed, data)["image"] for seed in range(4)])
        assert values.isfinite().all()
        assert values.min() < -1.5
        assert values.max() > 3


def test_a_picture_that_noise_left_below_zero_does_not_become_nan() -> None:
    result = run(Albumented([made("RandomGamma", p=1)]), 0, sample(3, low=-0.1, high=1.1))["image"]
    assert result.isfinite().all()
    assert (result.min(), result.max()) == (0, 1)


def test_albumentations_is_imported_only_where_it_is_used_and_never_asks_for_updates() -> None:
    code = (
        "import os, sys, socket\n"
        "import medmom.data.augment, medmom.inference.predict\n"
        "from medmom.data.albumented import load_albumentations\n"
        "assert 'albumentations' not in sys.modules\n"
        "def refuse(*args): raise AssertionError('asked the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "load_albumentations()\n"
        "assert 'albumentations' in sys.modules and os.environ['NO_ALBUMENTATIONS_UPDATE'] == '1'\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "update" not in done.stderr.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"class": "Rotat"},
            r"no transform 'albumentations\.Rotat' of pictures; did you mean albumentations\.Rotate\?",
        ),
        ({"class": "Normalize"}, "no transform 'albumentations.Normalize'"),
        ({"class": "CoarseDropout3D"}, "did you mean albumentations.CoarseDropout"),
        ({"class": "Compose"}, "no transform 'albumentations.Compose'"),
        ({"class": ""}, r"no transform 'albumentations\.' of pictures; see"),
        ({"class": "CoarseDropout", "max_holes": 10}, "CoarseDropout: no argument max_holes; it has num_holes_range,"),
        ({"class": "HorizontalFlip", "keys": ["image"]}, "HorizontalFlip: no argument keys; it has p"),
        ({"class": "Rotate", "limit": "x"}, "Rotate: limit 'x': Input should be a valid"),
        ({"class": "Rotate", "p": 3}, "Rotate: p 3: Input should be less than or equal to 1; see"),
        ({"class": "RandomCrop"}, "RandomCrop: height: Field required"),
        ({"class": "CropAndPad"}, "CropAndPad: arguments: Both px and percent"),
        ({"class": "Lambda"}, "Lambda: .*unexpected keyword"),
        ({"class": "RandomCropNearBBox"}, "RandomCropNearBBox: needs cropping_bbox; a patch has image and label"),
    ],
)
def test_a_transform_that_cannot_be_made_is_refused(arguments: dict[str, Any], message: str) -> None:
    arguments["class"] = f"albumentations.{arguments['class']}"
    with pytest.raises(MedmomError, match=f"^data.transforms: [^\n]*{message}[^\n]*$"):
        albumentations_transform(arguments, intensity="unit")


@pytest.mark.parametrize("name", ["GaussianBlur", "ColorJitter", "RandomGamma", "GaussNoise", "Downscale"])
@pytest.mark.parametrize("intensity", ["zscore", "ct"])
def test_what_is_made_for_pictures_is_refused_for_other_scales(name: str, intensity: str) -> None:
    with pytest.raises(MedmomError, match=rf"{name}: is made for pictures .* preparation.intensity is {intensity}; "):
        made(name, intensity=intensity)


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "message"),
    [
        ("RandomCrop", {"height": 8, "width": 8}, (3, 40, 32), r"makes shape \(3, 8, 8\), float32, of shape \(3, 40,"),
        (
            "RandomCrop",
            {"height": 99, "width": 99},
            (3, 40, 32),
            r"cannot change an image of shape \(3, 40, 32\) \(Crop",
        ),
        ("Transpose", {}, (3, 40, 32), r"makes shape \(3, 32, 40\)"),
        ("ColorJitter", {}, (5, 40, 32), "cannot change an image .* take it out"),
        ("CoarseDropout", {"hole_height_range": [50, 60]}, (1, 40, 32), "cannot change an image"),
        ("BBoxSafeRandomCrop", {}, (1, 40, 32), r"cannot change an image .*\('bboxes'\)"),
        ("ConstrainedCoarseDropout", {}, (1, 40, 32), "cannot change an image .*Neither valid mask"),
        ("ToGray", {}, (1, 40, 32), "cannot change an image"),
        ("GaussNoise", {}, (3, 9, 0), "cannot change an image"),
    ],
)
def test_what_does_not_fit_the_patch_is_said_when_tried_out(
    name: str, arguments: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(MedmomError, match=f"^data.transforms: albumentations.{name}: {message}[^\n]*$"):
        Albumented([made(name, p=0.01, **arguments)]).try_out(shape)


def test_a_patch_of_three_axes_is_refused() -> None:
    with pytest.raises(MedmomError, match=r"not patches of 3 axes; give data\.patch two edges"):
        Albumented([made("Rotate")]).try_out((1, 8, 8, 8))


@pytest.mark.parametrize("channels", [2, 4, 5, 16, 131])
def test_any_number_of_channels_moves_alike(channels: int) -> None:
    moves = slice_transforms((40, 32))[0]
    for seed in range(6):
        one = run(moves, seed, sample())
        data = {**sample(), "image": sample()["image"].expand(channels, 40, 32)}
        many = run(moves, seed, data)
        assert many["image"].shape == (channels, 40, 32)
        # For some numbers of channels OpenCV rounds the weights of its interpolation.
        torch.testing.assert_close(many["image"], one["image"].expand(channels, 40, 32), rtol=0, atol=0.02)
        assert torch.equal(many["label"], one["label"])


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 18])
def test_pictures_of_any_number_of_channels_are_changed(channels: int) -> None:
    changes = Compose(slice_transforms((40, 32), intensity="unit"))
    images = [run(changes, seed, sample(channels))["image"] for seed in range(30)]
    assert all(image.shape == (channels, 40, 32) and image.isfinite().all() for image in images)
    assert sum(torch.equal(image, sample(channels)["image"]) for image in images) < 10


def test_after_noise_all_channels_still_move_with_the_label() -> None:
    label = sample()["label"].clamp(max=1)
    data = {"image": label.float().expand(6, 40, 32), "label": label}
    noise, elastic = made("PixelDropout", p=1, per_channel=True), made("ElasticTransform", p=1, alpha=200, sigma=8)
    changes = Albumented([noise, elastic, made("Rotate", p=1)])
    for seed in range(4):
        result = run(changes, seed, data)
        for image in result["image"]:
            assert ((image > 0.5) == (result["label"][0] > 0)).float().mean() > 0.95


def test_images_of_another_number_of_channels_are_left_alone() -> None:
    invert = Albumented([made("InvertImg", p=1)], num_channels=3)
    assert torch.equal(run(invert, 0, sample(1))["image"], sample(1)["image"])
    assert torch.equal(run(invert, 0, sample(3))["image"], 1 - sample(3)["image"])


def test_trying_out_leaves_what_fits_alone() -> None:
    moves = Albumented([made("Rotate", limit=35, p=0.3), made("ColorJitter")])
    moves.try_out((3, 40, 32))
    assert_same([run(moves, 4, sample(3))], [run(Albumented(moves.transforms), 4, sample(3))])
