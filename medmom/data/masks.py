"""Label maps as pictures: which class a grey value or palette index means, and PNG files of them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from medmom.data.pixels import OpenPicture, opened_picture, picture_pixels, upright
from medmom.data.voxels import whole_numbers
from medmom.errors import MedmomError
from medmom.labels import Labels

WHITES = (255, 65535)
"""White at 8 and at 16 bits, which a mask of one class has for that class."""

IGNORED_COLOUR = (128, 128, 128)


def read_mask(path: Path) -> np.ndarray:
    """Reads the stored values of a mask picture as integers of shape (X, Y, 1), upright as its image.

    A palette gives its indices, grey its values as stored (0 to 3 at 2 bits), one bit 0 and 1; colours whose three
    channels are equal count as grey, and a palette's colours do not count.

    Raises:
        MedmomError: As ``read_picture`` but for the kind of pixels; or the mask has true colours, or a value that is
            not a whole number.
    """
    with opened_picture(path) as picture:
        values = _values(picture)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(values.T)[..., None]


def named_values(path: Path, stored: np.ndarray, labels: Labels) -> np.ndarray:
    """Turns black and white (0 and 255; at 16 bits 65535) into background and the one foreground class.

    Values that ``labels`` names stay what they are, and so do other values, which nobody can guess.

    Args:
        path: Of the mask, for messages.
        stored: What ``read_mask`` gives.
        labels: The classes that the mask may hold.

    Returns:
        Stored values of ``labels``, or ``stored`` itself.

    Raises:
        MedmomError: White would have to be one of several classes; or there are greys between black and white, as
            JPEG and resizing leave them.
    """
    present = {int(value) for value in np.unique(stored)}
    known = {*labels.values, *([] if labels.ignore is None else [labels.ignore])}
    unknown = present - known
    white = next((value for value in WHITES if unknown and value in unknown and present <= {0, value}), None)
    if white is not None:
        if len(labels.foreground) > 1:
            raise MedmomError(
                f"{path}: the mask is black and white (0 and {white}), the classes are {', '.join(labels.foreground)}. "
                "Save class numbers instead of white."
            )
        return np.where(stored == white, labels.values[1], 0).astype(labels.dtype)
    greys = unknown - set(WHITES)
    if greys and max(present) > WHITES[0] // 2 and len(labels.foreground) == 1:
        edges = np.isin(stored, list(greys))
        raise MedmomError(
            f"{path}: {int(edges.sum())} pixels are neither black nor white, such as {int(stored[edges][0])} (saved "
            "as JPEG, or resized?). Threshold the mask at 127 and save it as PNG."
        )
    return stored


def write_mask(stream: BinaryIO, path: Path, stored: np.ndarray, labels: Labels) -> None:
    """Writes a label map as PNG: an index a pixel in the colours of ``labels``, beyond 255 as 16-bit grey.

    Args:
        stream: An open binary file.
        path: Its name, for messages.
        stored: Stored values, shape (X, Y, 1), of the type ``labels.dtype``.
        labels: The table they come from.

    Raises:
        MedmomError: ``labels`` has values below 0 or beyond 65535.
    """
    if labels.dtype not in (np.uint8, np.uint16):
        raise MedmomError(
            f"{path}: class values from {min(labels.values)} to {max(labels.values)} do not fit a PNG, which has 0 to "
            "65535. Number the classes from 0 on in dataset.json."
        )
    picture = Image.fromarray(np.ascontiguousarray(stored[..., 0].T))
    if labels.dtype == np.uint8:
        # All 256 colours, so that an index takes a byte: some readers know no shorter ones.
        picture.putpalette(_palette(labels))
    picture.save(stream, format="PNG")


def _values(picture: OpenPicture) -> np.ndarray:
    """Values as stored, upright, shape (rows, columns)."""
    mode = picture.file.mode
    if mode in ("P", "1", "L", "I", "F") or mode.startswith("I;16"):
        picture.file.load()
        values = upright(picture, np.asarray(picture.file))
        if mode == "L" and picture.bits < 8:
            # Pillow spreads them over 0 to 255.
            values = values // (255 // (2**picture.bits - 1))
        if mode == "F":
            values = whole_numbers(picture.path, values)
        return values.astype(np.uint8) if mode == "1" else values
    pixels = picture_pixels(picture)
    differ = int((pixels != pixels[..., :1]).any(axis=2).sum())
    if differ:
        raise MedmomError(
            f"{picture.path}: the mask has colours ({differ} pixels are not grey), and no file names their classes. "
            "Save class numbers, as grey values or palette indices in a PNG."
        )
    return np.asarray(pixels[..., 0])


def _palette(labels: Labels) -> list[int]:
    colours = {value: labels.colour(name) for name, value in zip(labels.names, labels.values, strict=True)}
    if labels.ignore is not None:
        colours[labels.ignore] = IGNORED_COLOUR
    return [part for value in range(256) for part in colours.get(value, (0, 0, 0))]
