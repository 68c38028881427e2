"""Pictures (PNG, JPEG, TIFF) as images on one scale, whatever their depth and colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL.TiffImagePlugin import TiffImageFile

from medmom.data.pixels import OpenPicture, opened_picture, picture_pixels
from medmom.errors import MedmomError
from medmom.geometry import Geometry

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

PHOTOMETRIC_TAG = 262


def is_picture(path: str | Path) -> bool:
    """Whether a file name is one of a picture. Upper case counts too."""
    return Path(path).suffix.lower() in SUFFIXES


def read_picture(path: Path) -> tuple[np.ndarray, int]:
    """Reads a picture as float32 channels from 0 to 255, upright.

    PNG, JPEG and TIFF of 8 and 16 bits a channel, whichever of their suffixes the name has; the bytes count.

    What could be read either way is decided so:
        * 16 bits are divided by 257, so that black is 0 and white 255; other depths are spread alike.
        * A palette becomes its colours, three channels; grey stays one channel.
        * EXIF orientation is applied: the first axis points right, the second down, as viewers show it.
        * Alpha is dropped where every pixel is opaque. Else refused: what a viewer shows there is its background,
          and what is stored there may be anything.
        * Resolution (dpi) is not read, it mostly tells of printing: a pixel has edges of 1. Colour profiles are not
          applied.
        * CMYK, often stored inverted without saying so, and every other colour space: refused. 32 bits and floats:
          refused, they have no known scale. Several pages or frames: refused.
        * One row or column of pixels: refused.

    Args:
        path: The file.

    Returns:
        The image, shape (C, X, Y, 1), C 1 or 3, and the bits of a channel as stored.

    Raises:
        MedmomError: The file is missing, damaged, no such picture, or has more than 2^27 pixels.
    """
    with opened_picture(path) as picture:
        _check_scale(picture)
        pixels = picture_pixels(picture)
    scale = np.float32((2**picture.bits - 1) / 255 if pixels.dtype == np.uint16 else 1)
    return np.ascontiguousarray(pixels.transpose(2, 1, 0))[..., None] / scale, picture.bits


def picture_geometry(path: Path) -> Geometry:
    """Reads the upright size alone, as the grid (columns, rows, 1) with pixels of edge 1.

    Raises:
        MedmomError: As ``read_picture``, as far as the header shows it.
    """
    with opened_picture(path) as picture:
        columns, rows = picture.size
    return Geometry((columns, rows, 1), np.eye(4))


def picture_channels(path: Path) -> int:
    """Gives the channels that ``read_picture`` would: 3 for colours and palettes, else 1; reads the header alone.

    Raises:
        MedmomError: As ``read_picture``, as far as the header shows it.
    """
    with opened_picture(path) as picture:
        return 3 if picture.file.mode.startswith(("RGB", "P")) else 1


def _check_scale(picture: OpenPicture) -> None:
    file = picture.file
    if file.mode in ("I", "F"):
        raise MedmomError(
            f"{picture.path}: signed or 32-bit pixels, whose scale is not known. Save 8 or 16 bits a channel, or NIfTI."
        )
    # Pillow turns such values round at 8 bits, and not at 16.
    if isinstance(file, TiffImageFile) and file.mode.startswith("I;16") and file.tag_v2.get(PHOTOMETRIC_TAG) == 0:
        raise MedmomError(f"{picture.path}: 16-bit grey values with 0 as white. Save it with 0 as black.")
