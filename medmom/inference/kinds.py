"""Whether an image is of the kind that a model was made for: a picture or a volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medmom.data.preparation import Preparation
from medmom.errors import MedmomError


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
