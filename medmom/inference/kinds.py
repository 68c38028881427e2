"""Whether an image is of the kind and of the size that a model was made for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from medmom.data.header import spell_edges
from medmom.data.preparation import Preparation, working_geometry
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.models.sizes import times

MAX_VOXELS, MAX_GROWTH = 2**31, 1000
"""Of a working grid at most, and times the voxels of the image: a header may say any spacing."""


def check_kind(
    path: Path, image: np.ndarray, preparation: Preparation, *, is_picture: bool, takes_volumes: bool
) -> None:
    """Refuses a picture where the model takes volumes, and values beyond a picture's scale where it takes pictures.

    Args:
        path: Of the image, for messages.
        image: As it is in the file.
        preparation: The model's.
        is_picture: Whether the file is a picture.
        takes_volumes: Whether the model sees more than one slice at a time.

    Raises:
        MedmomError: The image is of another kind.
    """
    if is_picture and (takes_volumes or preparation.intensity == "ct"):
        raise MedmomError(f"{path}: a picture, the model was made for volumes. Give a NIfTI image.")
    low, high = float(image.min()), float(image.max())
    if not is_picture and preparation.intensity == "unit" and (low < 0 or high > 255):
        raise MedmomError(
            f"{path}: values from {low:g} to {high:g}, the model was made for pictures, from 0 to 255. Give a picture, "
            "or a model for volumes."
        )


def check_working_grid(path: Path, preparation: Preparation, geometry: Geometry) -> None:
    """Refuses an image whose working grid would be much larger than anybody means.

    Args:
        path: Of the image, for messages.
        preparation: The model's.
        geometry: Of the image.

    Raises:
        MedmomError: The working grid has more than 2^31 voxels, or more than 1000 for each of the image.
    """
    own, shape = geometry.shape, working_geometry(preparation, geometry).shape
    if math.prod(shape) > min(MAX_VOXELS, MAX_GROWTH * math.prod(own)):
        raise MedmomError(
            f"{path}: {times(own)} voxels of {spell_edges(geometry.spacing)} mm would be {times(shape)} voxels at the "
            f"model's spacing {preparation.spacing} mm. Crop the image, and check the spacing in its header."
        )
