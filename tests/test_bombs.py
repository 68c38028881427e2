"""Small files that promise, or unpack to, far more than they are: refused or read in little memory and time."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from tiny_pictures import chunk

from medmom.data.files import read_images

MIB = 2**20

# A process of its own: what decoders in C take is seen in its resident memory alone.
READ = """
import json, resource, sys, time
import numpy, cv2, PIL.Image
from medmom.data.files import read_images
from medmom.errors import MedmomError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for path in sys.argv[1:]:
    before, started = peak(), time.monotonic()
    try:
        told = str(read_images([path], compact=True).array.shape)
    except MedmomError as error:
        told = str(error)
    print(json.dumps([path, told, peak() - before, time.monotonic() - started]))
"""


def nifti(shape: tuple[int, ...], *, size: int, dtype: str = "u1", tail: bytes = b"") -> bytes:
    """A packed file whose header has this shape, and ``size`` bytes of voxels that count up, then ``tail``."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.dtype(dtype))
    header.set_sform(np.eye(4), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    voxels = np.arange(size).astype("u1").tobytes()
    return gzip.compress(header.binaryblock + bytes(4) + voxels + tail, 1)


def png(columns: int, rows: int, *parts: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(parts) + chunk(b"IEND", b"")


def jpeg(columns: int, rows: int, *, scans: int = 1) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    frame, scan = content.index(b"\xff\xc2"), content.index(b"\xff\xda")
    size = struct.pack(">HH", rows, columns)
    return content[: frame + 5] + size + content[frame + 9 : scan] + content[scan:-2] * scans + content[-2:]


def tiff(columns: int, rows: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "TIFF")
    content = stream.getvalue()
    (start,) = struct.unpack("<I", content[4:8])
    for place in range(start + 2, start + 26, 12):
        (tag,) = struct.unpack("<H", content[place : place + 2])
        if tag in (256, 257):
            entry = struct.pack("<HHII", tag, 4, 1, columns if tag == 256 else rows)
            content = content[:place] + entry + content[place + 12 :]
    return content


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "cube.nii.gz": (lambda: nifti((32000, 32000, 32000), size=32 * MIB), "the header announces 32000 x 32000 x 32000"),
    "promise.nii.gz": (lambda: nifti((1000, 1000, 1000), size=64, dtype="f8"), "ends before the 8000000000 bytes"),
    "long.nii.gz": (lambda: nifti((20, 16, 10), size=3200, tail=bytes(32 * MIB)), "(1, 20, 16, 10)"),
    "twice.nii.gz": (lambda: gzip.compress(gzip.compress(bytes(32 * MIB), 1)), "not a NIfTI file"),
    "promise.png": (lambda: png(16384, 8192, chunk(b"IDAT", zlib.compress(bytes(1000)))), "bytes of pixels promised"),
    "chunk.png": (lambda: png(8, 8, struct.pack(">I4s", 2**31 - 1, b"IDAT")), "a chunk up to byte"),
    "text.png": (lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(32 * MIB)))), "damaged"),
    "size.jpg": (lambda: jpeg(16384, 8192), "bytes for 134217728 pixels"),
    "scans.jpg": (lambda: jpeg(2048, 2048, scans=200), "scans over 4194304 pixels"),
    "size.tif": (lambda: tiff(8192, 8192), "bytes of pixels promised"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int, float]]:
    folder = tmp_path_factory.mktemp("bombs")
    for name, (content, _) in BOMBS.items():
        (folder / name).write_bytes(content())
    command = [sys.executable, "-c", READ, *(str(folder / name) for name in BOMBS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {Path(path).name: (told, peak, seconds) for path, told, peak, seconds in rows}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_takes_little_memory_and_time(name: str, results: dict[str, tuple[str, int, float]]) -> None:
    told, peak, seconds = results[name]
    assert BOMBS[name][1] in told
    assert "\n" not in told
    assert peak < 32 * MIB
    assert seconds < 5


def test_stream_is_not_unpacked_beyond_the_voxels(tmp_path: Path) -> None:

    content = bytearray(nifti((20, 16, 10), size=3200, tail=bytes(MIB)))
    content[-8:-4] = b"\0\0\0\0"
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert read_images([tmp_path / "a.nii.gz"], compact=True).array.shape == (1, 20, 16, 10)
