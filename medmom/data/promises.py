"""What the header of a picture promises, held against the bytes of its file before memory is asked for."""

from __future__ import annotations

import math
import struct
from typing import Any, BinaryIO

from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

# Bytes that a byte of the file unpacks to at most, by TIFF's number of the method: plain, LZW (a code of 12 bits
# stands for 4096 bytes at most), deflate (as zlib's technical notes have it) and PackBits.
RATIOS = {1: 1, 5: 4096, 8: 1032, 32946: 1032, 32773: 64}
PNG_RATIO = 1032
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}

# A block of 8 x 8 pixels takes a bit at least, and fine sampling of colours alone would halve that.
JPEG_PIXELS = 1024
# Progressive JPEG has ten or so; more than these go over so many pixels at most, counted again for each.
COMMON_SCANS, MAX_SCANNED = 32, 2**28

DEPTHS, METHOD, SAMPLES = 258, 259, 277
PLACES, SIZES = (273, 324), (279, 325)


def check_promise(file: ImageFile, start: bytes, size: int) -> None:
    """Refuses a picture whose bytes cannot hold the pixels that its header promises.

    Args:
        file: Pillow's reader, whose header was read.
        start: The first 32 bytes.
        size: Bytes of the whole file.

    Raises:
        ValueError: The file ends before its pixels do or cannot unpack to as many, or has two headers that differ.
    """
    if isinstance(file, PngImageFile):
        _check_png(file, start, size)
    elif isinstance(file, JpegImageFile) and math.prod(file.size) > size * JPEG_PIXELS:
        raise ValueError(f"{size} bytes for {math.prod(file.size)} pixels")
    elif isinstance(file, TiffImageFile):
        _check_tiff(file, size)


def check_scans(file: JpegImageFile, content: bytes) -> None:
    """Refuses a JPEG that would be decoded for minutes, scan after scan.

    Args:
        file: Pillow's reader.
        content: The whole file.

    Raises:
        ValueError: There are too many scans for as many pixels.
    """
    # Within packed pixels this mark cannot occur; a thumbnail has one or a few.
    num_scans = content.count(b"\xff\xda")
    if num_scans > COMMON_SCANS and num_scans * math.prod(file.size) > MAX_SCANNED:
        raise ValueError(f"{num_scans} scans over {math.prod(file.size)} pixels")


def check_chunks(stream: BinaryIO, size: int) -> None:
    """Refuses a PNG whose parts are longer than it: decoders ask for a part's memory before they look for its bytes.

    Args:
        stream: The open file; left somewhere within.
        size: Bytes of the whole file.

    Raises:
        ValueError: A chunk ends beyond the file.
    """
    place, kind = 8, b""
    while kind != b"IEND":
        stream.seek(place)
        length, kind = struct.unpack(">I4s", stream.read(8))
        place += 12 + length
        if place > size:
            raise ValueError(f"a chunk up to byte {place} in a file of {size}")


def _check_png(file: PngImageFile, start: bytes, size: int) -> None:
    # Pillow takes a header wherever it stands, and the last of several.
    columns, rows, bits, colours = struct.unpack(">IIBB", start[16:26])
    kind: Any = file.tile[0].args if file.tile else ""
    if start[12:16] != b"IHDR" or (columns, rows) != file.size or (bits == 16) != ("16" in str(kind)):
        raise ValueError("its first header is not its only one")
    _check_room(rows * math.ceil(columns * bits * PNG_SAMPLES[colours] / 8), size * PNG_RATIO)


def _check_tiff(file: TiffImageFile, size: int) -> None:
    tags = file.tag_v2
    places, sizes = (next((tags[tag] for tag in pair if tag in tags), ()) for pair in (PLACES, SIZES))
    end = max((place + count for place, count in zip(places, sizes, strict=False)), default=0)
    if end > size:
        raise ValueError(f"pixels up to byte {end} in a file of {size}")
    method, columns, rows = tags.get(METHOD, 1), *file.size
    if method in RATIOS:
        depths = tags.get(DEPTHS, (1,))
        bits = sum(depths) if len(depths) > 1 else depths[0] * tags.get(SAMPLES, 1)
        _check_room(rows * math.ceil(columns * bits / 8), sum(sizes or (size,)) * RATIOS[method])


def _check_room(wanted: int, held: int) -> None:
    if wanted > held:
        raise ValueError(f"{wanted} bytes of pixels promised, {held} there at most")
