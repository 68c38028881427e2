"""Pictures of a few pixels on disk in every kind that people have, for the tests of several rooms."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from medmom.data.files import read_image, read_label
from medmom.errors import MedmomError
from medmom.labels import Labels

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]
DEEP = RNG.integers(0, 2**16, (5, 7, 3), dtype=np.uint16)
ONE = Labels(("background", "polyp"), (0, 1))


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    picture = Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(path, **options)
    return path


def save_deep(path: Path, pixels: np.ndarray) -> Path:
    """Writes 16-bit colours by OpenCV, whose order is blue, green, red."""
    path.write_bytes(cv2.imencode(path.suffix, pixels[..., [2, 1, 0, 3][: pixels.shape[2]]])[1].tobytes())
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def save_png(
    path: Path,
    rows: list[bytes],
    columns: int,
    *,
    bits: int,
    kind: int = 0,
    num_rows: int | None = None,
    extra: bytes = b"",
) -> Path:
    """Writes a PNG from packed rows; kind 0 is grey, 2 colours, 3 a palette."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, num_rows or len(rows), bits, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + extra + body + chunk(b"IEND", b""))
    return path


def save_tiff(path: Path, pixels: np.ndarray, *, orientation: int = 1, photometric: int = 2) -> Path:
    """Writes an uncompressed 16-bit TIFF."""
    rows, columns, num = pixels.shape
    data = pixels.astype("<u2").tobytes()
    place = 8 + len(data)
    tags = [(256, 4, 1, columns), (257, 4, 1, rows), (258, 3, num, 16), (259, 3, 1, 1), (262, 3, 1, photometric)]
    tags += [(273, 4, 1, 8), (274, 3, 1, orientation), (277, 3, 1, num), (278, 4, 1, rows), (279, 4, 1, len(data))]
    if num > 2:
        tags[2] = (258, 3, num, place + 2 + 12 * len(tags) + 4)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    depths = struct.pack("<I", 0) + struct.pack("<H", 16) * num
    path.write_bytes(b"II*\0" + struct.pack("<I", place) + data + struct.pack("<H", len(tags)) + entries + depths)
    return path


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What EXIF's eight orientations ask for, in numpy's words."""
    return {
        1: pixels,
        2: np.fliplr(pixels),
        3: np.rot90(pixels, 2),
        4: np.flipud(pixels),
        5: np.swapaxes(pixels, 0, 1),
        6: np.rot90(pixels, -1),
        7: np.swapaxes(np.rot90(pixels, 2), 0, 1),
        8: np.rot90(pixels),
    }[orientation]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def refusal(path: Path, *, label: bool = False) -> str:
    """What follows the path in the line that refuses a file."""
    with pytest.raises(MedmomError) as caught:
        read_label(path, ONE) if label else read_image(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text.removeprefix(str(path))
