"""How nnU-Net v2 prepares images, by its plans, as a ``Preparation``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from medmom.data.preparation import Preparation
from medmom.errors import MedmomError

PLANES: dict[tuple[int, ...], Literal["axial", "coronal", "sagittal"]] = {
    (0, 1, 2): "axial",
    (1, 0, 2): "coronal",
    (2, 0, 1): "sagittal",
}
"""What slices count, by ``transpose_forward``: of the axes (z, y, x), the one that it names first."""

READERS: dict[str, Literal["patient", "stored"]] = {
    "SimpleITKIO": "stored",
    "NibabelIO": "stored",
    "NaturalImage2DIO": "stored",
    "SimpleITKIOWithReorient": "patient",
    "NibabelIOWithReorient": "patient",
}
"""Whose axes images have, by who reads them there; those that turn do so to right, anterior, superior."""

RESAMPLING, NO_RESAMPLING = "resample_data_or_seg_to_shape", "no_resampling_data_or_seg_to_shape"
"""Functions that bring images to the working grid, and logits back."""

LEAST_STD = 1e-8
"""What is divided by at least."""


def read_preparation(
    path: Path, plans: Mapping[str, Any], options: Mapping[str, Any], num_channels: int
) -> Preparation:
    """Reads how images are prepared.

    Args:
        path: Of the plans, for messages.
        plans: All of them.
        options: The configuration, inherited fields included.
        num_channels: Of an image.

    Returns:
        A preparation that is fitted, with the grid and the intensities that nnU-Net has; but for the cut to the box
        that is not 0, and for slices far apart, see ``medmom.nnunet.plans.Plan.notes``.

    Raises:
        MedmomError: It has no equal here; what it is is named.
        KeyError: A field is missing.
        TypeError: A field is of another type.
        ValueError: A field does not fit the others.
    """
    order, reader = plans["transpose_forward"], plans["image_reader_writer"]
    plane = PLANES.get(tuple(order))
    if plane is None:
        raise ValueError(f"transpose_forward is {order}")
    if reader not in READERS:
        raise MedmomError(f"{path}: images are read by {reader}; known are {', '.join(READERS)}. Predict with nnU-Net.")
    try:
        return Preparation(
            spacing=_spacing(path, options),
            plane=plane,
            axes=READERS[reader],
            exact="extent",
            **_intensity(path, plans, options, num_channels),
        )
    except MedmomError as error:
        raise error if str(path) in str(error) else MedmomError(f"{path}: {error}") from None


def _spacing(path: Path, options: Mapping[str, Any]) -> tuple[float, ...] | None:
    function = options.get("resampling_fn_data", RESAMPLING)
    order = options.get("resampling_fn_data_kwargs", {}).get("order", 3)
    if function == NO_RESAMPLING:
        return None
    if (function, order) != (RESAMPLING, 3):
        raise MedmomError(
            f"{path}: images are resampled by {function} of order {order}; here it is {RESAMPLING} of order 3. Predict "
            "with nnU-Net."
        )
    spacing = tuple(_number(edge) for edge in reversed(options["spacing"]))
    if len(spacing) != len(options["patch_size"]):
        raise ValueError(f"{len(spacing)} numbers of spacing, {len(options['patch_size'])} of patch_size")
    return spacing


def _intensity(path: Path, plans: Mapping[str, Any], options: Mapping[str, Any], num_channels: int) -> dict[str, Any]:
    schemes, masks = options["normalization_schemes"], options["use_mask_for_norm"]
    if len(schemes) != num_channels or len(masks) != num_channels:
        raise ValueError(
            f"{len(schemes)} normalization_schemes, {len(masks)} use_mask_for_norm, {num_channels} channels"
        )
    kinds = sorted(
        {f"{scheme}{' within a mask' if mask is True else ''}" for scheme, mask in zip(schemes, masks, strict=True)}
    )
    if len(kinds) > 1:
        raise MedmomError(
            f"{path}: channels are normalised in different ways ({', '.join(kinds)}); here all are in one. Predict "
            "with nnU-Net."
        )
    match schemes[0]:
        case "CTNormalization":
            return _ct(path, plans, num_channels)
        case "ZScoreNormalization":
            return {"intensity": "zscore", "within": "mask" if masks[0] is True else "box"}
        case "RGBTo01Normalization":
            return {"intensity": "unit"}
    raise MedmomError(
        f"{path}: intensities are normalised by {schemes[0]}, which has no equal here; known are CTNormalization, "
        "ZScoreNormalization and RGBTo01Normalization. Predict with nnU-Net."
    )


def _ct(path: Path, plans: Mapping[str, Any], num_channels: int) -> dict[str, Any]:
    older, newer = (f"foreground_intensity_properties_{end}" for end in ("by_modality", "per_channel"))
    table = plans[older if older in plans and newer not in plans else newer]
    keys = ("percentile_00_5", "percentile_99_5", "mean", "std")
    numbers = {tuple(_number(table[str(channel)][key]) for key in keys) for channel in range(num_channels)}
    if len(numbers) > 1:
        raise MedmomError(
            f"{path}: {num_channels} channels of CT have ranges of their own; here all have one. Predict with nnU-Net."
        )
    low, high, mean, std = numbers.pop()
    return {"intensity": "ct", "clip": (low, high), "mean": mean, "std": max(std, LEAST_STD)}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no finite number")
    return float(value)
