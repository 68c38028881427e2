"""Pictures as damage and malice make them: each follows from a seed and a number, and can be made again from both."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from fuzzing import Mutant, Rng, cut, extend, flip, one, replace_all
from PIL import Image
from tiny_pictures import chunk

SIZES = ((9, 7), (16, 16), (21, 5), (8, 33))
COUNTS = (0, 1, 2, 3, 7, 8, 255, 256, 4096, 16384, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
PNG_HEAD = 8
TIFF_TAGS = (256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 282, 284, 317, 320, 322, 323, 324, 325, 338, 339)


def picture_mutant(seed: int, number: int) -> Mutant:
    """A small PNG, JPEG or TIFF of any kind, with up to three faults."""
    rng = np.random.default_rng([seed, number])
    suffix = one(rng, (".png", ".jpg", ".tif"))
    content, kind = sound_picture(rng, suffix)
    how = [kind]
    for _ in range(rng.integers(0, 4)):
        change = one(rng, (*BYTES, *FORMATS[suffix], *FORMATS[suffix]))
        try:
            content = change(content, rng)
        except (struct.error, LookupError, ValueError, zlib.error, StopIteration):
            # What is damaged already has no parts to be found.
            continue
        how.append(change.__name__)
    # Bytes and not the name say the format.
    name = f"frame{suffix if rng.random() < 0.9 else one(rng, ('.png', '.jpeg', '.TIFF'))}"
    return Mutant({name: content}, name, ", ".join(how))


def sound_picture(rng: Rng, suffix: str) -> tuple[bytes, str]:
    """Gives the bytes of a picture and the kind it is of."""
    columns, rows = one(rng, SIZES)
    pixels = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    if suffix != ".jpg" and rng.random() < 0.2:
        deep = rng.integers(0, 2**16, (rows, columns, one(rng, (1, 3))), dtype=np.uint16)
        return cv2.imencode(suffix, deep)[1].tobytes(), f"16 bits {suffix}"
    mode = one(rng, ("L", "RGB") if suffix == ".jpg" else ("1", "L", "LA", "P", "RGB", "RGBA"))
    options: dict[str, Any] = {}
    if rng.random() < 0.4:
        exif = Image.Exif()
        exif[274] = int(rng.integers(0, 10))
        exif[270] = "a picture"
        options["exif"] = exif.tobytes()
    if suffix == ".png" and mode == "P" and rng.random() < 0.3:
        options["transparency"] = int(rng.integers(0, 256))
    if suffix == ".jpg":
        options["progressive"] = bool(rng.random() < 0.4)
    if suffix == ".tif":
        packed = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", *(["jpeg"] if mode in ("L", "RGB") else []))
        options["compression"] = one(rng, ("group4", "raw") if mode == "1" else packed)
        options["tiffinfo"] = {278: int(one(rng, (8, 16, 64)))}
    stream = io.BytesIO()
    kind = {".png": "PNG", ".jpg": "JPEG", ".tif": "TIFF"}[suffix]
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue(), f"{mode} {options.get('compression', suffix)}"


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], PNG_HEAD
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        found.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += 12 + size
    return found


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def set_png_head(content: bytes, rng: Rng) -> bytes:
    """Other columns, rows, bits, colours or interlacing, under a checksum that holds."""
    chunks = _chunks(content)
    head = list(struct.unpack(">IIBBBBB", chunks[0][1]))
    place = rng.integers(7)
    head[place] = one(rng, COUNTS) if place < 2 else int(one(rng, (0, 1, 2, 3, 4, 6, 8, 16, 255)))
    return _png([(chunks[0][0], struct.pack(">IIBBBBB", *head)), *chunks[1:]])


def flip_png_chunk(content: bytes, rng: Rng) -> bytes:
    """Bytes of a chunk become others, under a checksum that holds: a palette, EXIF, packed rows."""
    chunks = _chunks(content)
    place = rng.integers(len(chunks))
    kind, data = chunks[place]
    chunks[place] = kind, one(rng, (flip(data, rng), data[: rng.integers(len(data) + 1)], data + rng.bytes(9)))
    return _png(chunks)


def lie_of_png_size(content: bytes, rng: Rng) -> bytes:
    """A chunk whose length is another."""
    place = PNG_HEAD
    for _ in range(rng.integers(3)):
        place += 12 + struct.unpack(">I", content[place : place + 4])[0]
    return content[:place] + struct.pack(">I", one(rng, COUNTS)) + content[place + 4 :]


def add_png_chunk(content: bytes, rng: Rng) -> bytes:
    """A chunk that does not belong there, or is nonsense, or unpacks to a hundred MiB."""
    chunks, data = _chunks(content), rng.bytes(int(rng.integers(20)))
    kind = one(rng, (b"PLTE", b"tRNS", b"eXIf", b"gAMA", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"IHDR", b"IEND"))
    if kind in (b"iCCP", b"zTXt") and rng.random() < 0.7:
        data = b"name\0\0" + zlib.compress(bytes(2**20), 9) * int(one(rng, (1, 100)))
    chunks.insert(int(rng.integers(len(chunks) + 1)), (kind, data))
    return _png(chunks)


def repack_png(content: bytes, rng: Rng) -> bytes:
    """Rows that are fewer or a hundred times as many as the header says."""
    chunks = _chunks(content)
    rows = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    rows = one(rng, (rows[: rng.integers(len(rows))], rows * 100, bytes(10**6), b""))
    kept = [part for part in chunks if part[0] not in (b"IDAT", b"IEND")]
    return _png([*kept, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def set_tiff_entry(content: bytes, rng: Rng) -> bytes:
    """Another tag, type, count or value in the directory: strips that lie elsewhere, or are as long as they like."""
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack(f"{order}I", content[4:8])
    (count,) = struct.unpack(f"{order}H", content[start : start + 2])
    place = start + 2 + 12 * int(rng.integers(max(count, 1)))
    tag, kind, num, value = struct.unpack(f"{order}HHII", content[place : place + 12])
    part = rng.integers(5)
    if part == 0:
        tag = one(rng, TIFF_TAGS)
    elif part == 1:
        kind = int(rng.integers(0, 19))
    elif part == 2:
        num = one(rng, COUNTS)
    else:
        value = one(rng, (*COUNTS, start, len(content), len(content) - 1, 5, 6, 32773, 34676, 50000))
    return content[:place] + struct.pack(f"{order}HHII", tag, kind, num, value) + content[place + 12 :]


def chain_tiff(content: bytes, rng: Rng) -> bytes:
    """Directories that follow each other in a circle, or lie beyond the file."""
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack(f"{order}I", content[4:8])
    (count,) = struct.unpack(f"{order}H", content[start : start + 2])
    place = start + 2 + 12 * count
    following = one(rng, (start, place, 8, 2**31, len(content)))
    return content[:place] + struct.pack(f"{order}I", following) + content[place + 4 :]


def set_jpeg_segment(content: bytes, rng: Rng) -> bytes:
    """Bytes of a segment become others: sizes, sampling, tables, EXIF."""
    marks = [k for k in range(2, len(content) - 4) if content[k] == 0xFF and content[k + 1] in JPEG_MARKS]
    place = one(rng, marks)
    changed = bytearray(content)
    (size,) = struct.unpack(">H", content[place + 2 : place + 4])
    for _ in range(rng.integers(1, 4)):
        spot = place + 2 + int(rng.integers(size))
        changed[spot] = one(rng, (0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF, int(rng.integers(256))))
    return bytes(changed)


def repeat_jpeg_scan(content: bytes, rng: Rng) -> bytes:
    """Scans that come again a thousand times."""
    place = content.index(b"\xff\xda")
    count = int(one(rng, (2, 100, 1000))) if len(content) < 2000 else 2
    return content[:place] + (content[place:-2]) * count + content[-2:]


def huge_jpeg(content: bytes, rng: Rng) -> bytes:
    """A frame of the largest size, or about, in a few bytes."""
    place = next(k for k in range(len(content)) if content[k] == 0xFF and content[k + 1] in (0xC0, 0xC2))
    edges = struct.pack(">HH", *(one(rng, (1, 0, 8192, 11000, 16384, 65535)) for _ in range(2)))
    return content[: place + 5] + edges + content[place + 9 :]


JPEG_MARKS = (0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE)
BYTES: tuple[Callable[[bytes, Rng], bytes], ...] = (flip, flip, cut, extend, replace_all)
FORMATS: dict[str, tuple[Callable[[bytes, Rng], bytes], ...]] = {
    ".png": (set_png_head, flip_png_chunk, lie_of_png_size, add_png_chunk, repack_png),
    ".tif": (set_tiff_entry, set_tiff_entry, set_tiff_entry, chain_tiff),
    ".jpg": (set_jpeg_segment, set_jpeg_segment, repeat_jpeg_scan, huge_jpeg),
}
