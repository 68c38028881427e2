from __future__ import annotations

import difflib
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

from medmom.errors import MedmomError


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
            prob=0.36,  # rotation or scale: 1 - (1 - 0.2)^2
            rotate_range=_rotation(patch),
            scale_range=[(-0.3, 0.4)] * 3,
            mode=("bilinear", "nearest"),
            padding_mode="border",
            cache_grid=True,
            spatial_size=tuple(patch),
        ),
        RandGaussianNoised(keys="image", prob=0.1, std=0.3),
        RandGaussianSmoothd(keys="image", prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
        RandScaleIntensityd(keys="image", prob=0.15, factors=0.25),
        RandScaleIntensityd(keys="image", prob=0.15, factors=(-0.35, 0.5)),
        RandSimulateLowResolutiond(keys="image", prob=0.125, zoom_range=(0.5, 1.0)),
        RandAdjustContrastd(keys="image", prob=0.1, gamma=(0.7, 1.5), retain_stats=True, invert_image=True),
        RandAdjustContrastd(keys="image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        *[RandFlipd(keys=("image", "label"), prob=0.5, spatial_axis=axis) for axis in mirror],
    ]


def _rotation(patch: Sequence[int]) -> list[float]:
    """Largest angle about each axis, in radians."""
    thin = min(range(3), key=lambda axis: patch[axis])
    if max(patch) / patch[thin] > 3:
        # Voxels of a flat patch are long: a rotation out of the plane would mix slices.
        return [math.pi if axis == thin else 0.0 for axis in range(3)]
    return [math.radians(30)] * 3


def monai_transforms(specifications: Sequence[Mapping[str, Any]]) -> list[Transform]:
    """Makes MONAI transforms from what a recipe writes under ``data.transforms``.

    Args:
        specifications: Each a table with ``class``, the name of a dictionary transform in ``monai.transforms``,
            and the class's arguments, ``keys`` (of ``image`` and ``label``) among them.

    Returns:
        The transforms, in the same order.

    Raises:
        MedmomError: There is no transform of that name (the nearest one is named), or it refuses its arguments.
    """
    return [_monai_transform(dict(specification)) for specification in specifications]


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
