from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import monai.transforms
from monai.transforms import (
    MapTransform,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandSimulateLowResolutiond,
    Transform,
)

from medmom.data.albumented import PREFIX, Albumented, albumentations_transform, load_albumentations
from medmom.errors import MedmomError

MOVED = 0.36
"""Probability of a rotation or a change of scale: each 0.2 in nnU-Net, 1 - (1 - 0.2)^2 together."""


def volume_transforms(patch: Sequence[int], *, mirror: Sequence[int] = (0, 1, 2)) -> list[Transform]:
    """Gives the random changes of a 3-D patch that nnU-Net trains with, as MONAI transforms.

    Rotation within 30 degrees (about the thin axis alone, and freely, where a patch is flat), scale 0.7 to 1.4,
    noise, blur, brightness, contrast, lost resolution, gamma (plain and inverted), mirroring.

    Args:
        patch: Voxels along each axis.
        mirror: Axes that may be flipped; leave out the left-right axis where classes have sides.

    Returns:
        Transforms of dictionaries with ``image`` (C, *patch) and ``label`` (1, *patch).

    Source:
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, supplementary note 4; probabilities as in nnU-Net v2.
    """
    return [
        RandAffined(
            keys=("image", "label"),
            prob=MOVED,
            rotate_range=_rotation(patch),
            scale_range=[(-0.3, 0.4)] * 3,
            mode=("bilinear", "nearest"),
            padding_mode="border",
            cache_grid=True,
            spatial_size=tuple(patch),
        ),
        *_intensity_transforms("trilinear"),
        *[RandFlipd(keys=("image", "label"), prob=0.5, spatial_axis=axis) for axis in mirror],
    ]


def slice_transforms(
    patch: Sequence[int], *, mirror: Sequence[int] = (0, 1), intensity: str = "zscore"
) -> list[Transform]:
    """Gives the random changes of a picture or of a slice: albumentations moves it, image and label together.

    Any rotation (within 15 degrees where a patch is longer than wide by half, as in nnU-Net), scale 0.7 to 1.4, shear
    within 8 degrees, mirroring; beyond the edge the image goes on with its last pixels, and so does the label.
    Pictures (``"unit"``) change in brightness, contrast, colour and gamma, and lose sharpness and resolution, by
    albumentations, which cuts them off at 0 and 1; other images change as the patches of ``volume_transforms``.

    Args:
        patch: Pixels along each axis: columns, rows.
        mirror: Axes that may be flipped, 0: left and right, 1: top and bottom; others are not looked at.
        intensity: Scale of the images, as in ``Preparation``; ``"unit"``: 0 to 1, and colours where
            there are three channels.

    Returns:
        Transforms of dictionaries with ``image`` (C, *patch) float32 and, where there is one, ``label``
        (1, *patch) uint8.

    Source:
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, supplementary note 4; probabilities as in nnU-Net v2.
    """
    library = load_albumentations()
    angle = 15 if max(patch) / min(patch) > 1.5 else 180
    affine = library.Affine(
        rotate=(-angle, angle),
        scale=(0.7, 1.4),
        shear=(-8, 8),
        keep_ratio=True,
        balanced_scale=True,  # as often smaller as larger
        border_mode=1,  # OpenCV's BORDER_REPLICATE
        p=MOVED,
    )
    flips = (library.HorizontalFlip(p=0.5), library.VerticalFlip(p=0.5))
    moves = [affine, *[flip for axis, flip in enumerate(flips) if axis in mirror]]
    if intensity == "unit":
        colours = library.ColorJitter(brightness=(1, 1), contrast=(1, 1), saturation=(0.8, 1.2), hue=0.03, p=0.3)
        return [Albumented([*moves, *_picture_transforms(library)]), Albumented([colours], num_channels=3)]
    return [Albumented(moves), *_intensity_transforms("bilinear")]


def _intensity_transforms(interpolation: str) -> list[Transform]:
    """Changes of grey values on any scale, in two or three dimensions."""
    return [
        RandGaussianNoised(keys="image", prob=0.1, std=0.3),
        RandGaussianSmoothd(keys="image", prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
        RandScaleIntensityd(keys="image", prob=0.15, factors=0.25),
        RandScaleIntensityd(keys="image", prob=0.15, factors=(-0.35, 0.5)),
        RandSimulateLowResolutiond(keys="image", prob=0.125, zoom_range=(0.5, 1.0), upsample_mode=interpolation),
        RandAdjustContrastd(keys="image", prob=0.1, gamma=(0.7, 1.5), retain_stats=True, invert_image=True),
        RandAdjustContrastd(keys="image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]


def _picture_transforms(library: Any) -> list[Any]:
    """Changes of pictures from 0 to 1: what cameras, light and compression do."""
    return [
        library.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.25, p=0.3),
        library.RandomGamma(gamma_limit=(70, 150), p=0.3),
        library.GaussianBlur(blur_limit=0, sigma_limit=(0.5, 1.0), p=0.2),
        # OpenCV's INTER_AREA and INTER_LINEAR
        library.Downscale(scale_range=(0.5, 1.0), interpolation_pair={"downscale": 3, "upscale": 1}, p=0.125),
        library.GaussNoise(std_range=(0.0, 0.08), p=0.1),
    ]


def _rotation(patch: Sequence[int]) -> list[float]:
    """Largest angle about each axis, in radians."""
    thin = min(range(3), key=lambda axis: patch[axis])
    if max(patch) / patch[thin] > 3:
        # Voxels of a flat patch are long: a rotation out of the plane would mix slices.
        return [math.pi if axis == thin else 0.0 for axis in range(3)]
    return [math.radians(30)] * 3


def monai_transforms(
    specifications: Sequence[Mapping[str, Any]], *, intensity: str = "zscore", shape: Sequence[int] | None = None
) -> list[Transform]:
    """Makes MONAI transforms from what a recipe writes under ``data.transforms``.

    Args:
        specifications: Each a table with ``class``, the name of a dictionary transform in ``monai.transforms``,
            and the class's arguments, ``keys`` (of ``image`` and ``label``) among them; or the name of a transform
            of albumentations, such as ``albumentations.Rotate``, and its arguments.
        intensity: Scale of the images, as in ``Preparation``; see ``albumentations_transform``.
        shape: Of an image, (C, *patch), on which those of albumentations are tried out; None: they are not.

    Returns:
        The transforms, in the same order; neighbours of albumentations in one ``Albumented``.

    Raises:
        MedmomError: There is no transform of that name (the nearest one is named), it refuses its arguments, or it
            does not suit the images.
    """
    transforms: list[Transform] = []
    for is_albumented, neighbours in itertools.groupby(specifications, _is_albumented):
        if is_albumented:
            moves = Albumented([albumentations_transform(each, intensity=intensity) for each in neighbours])
            if shape is not None:
                moves.try_out(shape)
            transforms.append(moves)
        else:
            transforms += [_monai_transform(dict(specification)) for specification in neighbours]
    return transforms


def _is_albumented(specification: Mapping[str, Any]) -> bool:
    return str(specification.get("class", "")).startswith(PREFIX)


def _monai_transform(arguments: dict[str, Any]) -> Transform:
    name = str(arguments.pop("class", ""))
    kind: Any = getattr(monai.transforms, name, None)
    if not _takes_dictionaries(kind):
        known = [each for each, found in vars(monai.transforms).items() if _takes_dictionaries(found)]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "write the name of a class in monai.transforms."
        raise MedmomError(f"data.transforms: no MONAI dictionary transform {name!r}; {hint}")
    try:
        transform = kind(**arguments)
    except (TypeError, ValueError) as error:
        raise MedmomError(f"data.transforms: {name}: {error}; see its page in MONAI's documentation.") from None
    strange = set(transform.keys) - {"image", "label"}
    if strange:
        raise MedmomError(f"data.transforms: {name}: keys {sorted(strange)}; a patch has image and label.")
    return transform


def _takes_dictionaries(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, MapTransform)
