"""Opening PNG, JPEG and TIFF files with checks, and decoding their pixels upright."""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from medmom.data.promises import check_chunks, check_promise, check_scans
from medmom.errors import MedmomError

MAX_PIXELS = 2**27
"""A picture that announces more pixels (16384 x 8192) is refused before memory is asked for."""

FORMATS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"\xff\xd8\xff", JpegImageFile),
    *((magic, TiffImageFile) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)

MODES = ("1", "L", "La", "LA", "P", "PA", "RGB", "RGBa", "RGBA", "RGBX", "I;16", "I;16L", "I;16B", "I", "F")

# Of what a decoder says of damaged bytes, which it may quote.
MAX_FACT = 120

# What the decoders raise on damaged bytes; they have no class of their own.
DAMAGED = (
    *(SyntaxError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(struct.error, zlib.error, RuntimeError, MemoryError),
)

ORIENTATION_TAG, DEPTH_TAG = 274, 258

# By EXIF orientation; axes are rows, columns, channels.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}


# Pillow logs an error and raises it too.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class OpenPicture:
    """A picture whose header was read and checked.

    Attributes:
        path: The file.
        file: Pillow's reader.
        bits: Of a channel as stored; Pillow's mode says 8 of 16-bit colours too.
    """

    path: Path
    file: ImageFile
    bits: int

    @property
    def orientation(self) -> int:
        """What EXIF says, 1 to 8, of pixels as Pillow decodes them; it turns a TIFF itself."""
        return 1 if isinstance(self.file, TiffImageFile) else _orientation(self.file)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows of the upright picture."""
        columns, rows = self.file.size
        return (rows, columns) if self.orientation >= 5 else (columns, rows)


@contextmanager
def opened_picture(path: Path) -> Iterator[OpenPicture]:
    """Opens a picture, checks what its header says, and turns what decoding it raises into a line on the file.

    Pillow's own search among all its formats is not used: it would try dozens of decoders on unknown bytes.

    Raises:
        MedmomError: The file is missing, empty, of another format, too large, or of a kind that is not read.
    """
    stream = _open(path)
    # Remarks of the decoder on metadata help nobody here.
    with stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            start = stream.read(32)
            kind = next((kind for magic, kind in FORMATS if start.startswith(magic)), None)
            if kind is None:
                fact = f"not a PNG, JPEG or TIFF file, it begins with {start[:8]!r}" if start else "the file is empty"
                raise MedmomError(f"{path}: {fact}. Copy it again from its source, or convert it to PNG.")
            size = path.stat().st_size
            if kind is PngImageFile:
                check_chunks(stream, size)
            stream.seek(0)
            file = kind(stream, str(path))
            _check_header(path, file)
            check_promise(file, start, size)
            if isinstance(file, JpegImageFile):
                check_scans(file, path.read_bytes())
            yield OpenPicture(path, file, _bits(file, start))
        except DAMAGED as error:
            fact = " ".join(str(error).split())[:MAX_FACT] or type(error).__name__
            raise MedmomError(
                f"{path}: the picture is cut short or damaged ({fact}). Copy it again from its source."
            ) from error


def picture_pixels(picture: OpenPicture) -> np.ndarray:
    """Decodes the pixels as they are seen, upright and without alpha.

    Args:
        picture: Opened, not of mode I or F.

    Returns:
        ``uint8`` or ``uint16``, shape (rows, columns, 1 or 3).

    Raises:
        MedmomError: A pixel is transparent, or 16-bit colours cannot be decoded.
    """
    picture.file.load()
    pixels = upright(picture, np.atleast_3d(np.asarray(_as_seen(picture))))
    if picture.bits == 16 and pixels.dtype == np.uint8:
        pixels = _deep_pixels(picture, pixels)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.shape[2] in (2, 4):
        hidden = float((pixels[..., -1] < np.iinfo(pixels.dtype).max).mean())
        if hidden:
            raise MedmomError(
                f"{picture.path}: {100 * hidden:.3g} % of the pixels are transparent, they show what lies behind. "
                "Save it without alpha, on the background that is meant."
            )
        pixels = pixels[..., :-1]
    return pixels


def upright(picture: OpenPicture, pixels: np.ndarray) -> np.ndarray:
    """Turns pixels that Pillow decoded (rows, columns, ...) as EXIF says."""
    return TURNS[picture.orientation](pixels)


def _open(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise MedmomError(f"{path}: a folder, not a picture. Give a file.")
        return path.open("rb")
    except FileNotFoundError as error:
        raise MedmomError(f"{path}: no such file. Check the path.") from error
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check path, permissions and disk.") from error


def _check_header(path: Path, picture: ImageFile) -> None:
    columns, rows = picture.size
    if columns * rows > MAX_PIXELS:
        raise MedmomError(f"{path}: {columns} x {rows} pixels, more than {MAX_PIXELS}. Crop it or save it smaller.")
    if min(columns, rows) < 2:
        raise MedmomError(f"{path}: {columns} x {rows} pixels, not a picture. Give the true picture.")
    if picture.mode == "CMYK":
        raise MedmomError(
            f"{path}: CMYK colours, meant for printing and often stored inverted. Convert it to RGB and look at it."
        )
    if picture.mode not in MODES:
        raise MedmomError(f"{path}: pixels of the kind {picture.mode}. Save it as grey or RGB.")
    pages = getattr(picture, "n_frames", 1)
    if pages > 1:
        raise MedmomError(
            f"{path}: {pages} pages or frames in one file. Save each as a file of its own, or a stack as NIfTI."
        )


def _bits(file: ImageFile, start: bytes) -> int:
    if isinstance(file, TiffImageFile):
        return int(max(file.tag_v2.get(DEPTH_TAG, (1,))))
    return start[24] if isinstance(file, PngImageFile) else 8


def _orientation(file: ImageFile) -> int:
    try:
        found = file.getexif().get(ORIENTATION_TAG, 1)
    except DAMAGED:
        # Viewers pass over EXIF that they cannot read.
        return 1
    return found if found in TURNS else 1


def _as_seen(picture: OpenPicture) -> Any:
    """Palette and bits become grey or colours, transparent colours an alpha channel."""
    file = picture.file
    mode, has_key = file.mode, file.has_transparency_data and picture.bits < 16
    if mode.startswith("I;16"):
        return file
    if mode in ("1", "La", "RGBX"):
        return file.convert({"1": "L", "La": "LA", "RGBX": "RGB"}[mode])
    if mode in ("PA", "RGBa") or (mode in ("P", "RGB") and has_key):
        return file.convert("RGBA")
    if mode == "L" and has_key:
        return file.convert("LA")
    return file.convert("RGB") if mode == "P" else file


def _deep_pixels(picture: OpenPicture, shallow: np.ndarray) -> np.ndarray:
    """Decodes 16-bit colours by OpenCV, for Pillow cuts them to 8 bits.

    Args:
        picture: Decoded before; OpenCV makes do with half a file.
        shallow: The same pixels upright at 8 bits, shape (rows, columns, channels).
    """
    import cv2  # noqa: PLC0415 - slow to load, and few pictures need it

    # What it remarks on stderr, the line that refuses the file says.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    found = cv2.imdecode(np.fromfile(picture.path, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is not None and found.dtype == np.uint16 and found.ndim == 3:
        order = {2: [2, 3], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[shallow.shape[2]]
        # OpenCV turns a TIFF as EXIF says and not a PNG: what agrees with Pillow counts.
        for turn in (TURNS[1], TURNS[picture.orientation]):
            deep = turn(found[..., order] if max(order) < found.shape[2] else found)
            if deep.shape == shallow.shape and not (deep >> 8 ^ shallow).any():
                return np.ascontiguousarray(deep)
    raise MedmomError(f"{picture.path}: 16-bit colours stored in an uncommon way. Save it as PNG.")
