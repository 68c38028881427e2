"""Text headers of NRRD and MetaImage files, checked before a library opens them."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from medmom.data.header import CONVERT
from medmom.errors import MedmomError

NRRD, META = (".nrrd", ".nhdr"), (".mha", ".mhd")

MAX_HEADER = 2**20
CHUNK = 2**20

# Wrong for no file in use, and never too large: block types are refused.
TYPE_SIZES = (("64", 8), ("long", 8), ("double", 8), ("32", 4), ("16", 2), ("short", 2), ("8", 1), ("char", 1))
META_SIZES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}

ENCODINGS = {"raw": False, "gz": True, "gzip": True}

SPACES = tuple(
    name
    for words, letters in (
        ("left-posterior-superior", "lps"),
        ("right-anterior-superior", "ras"),
        ("left-anterior-superior", "las"),
    )
    for name in (words, letters)
)

MIXED_KINDS = ("color", "matrix", "complex", "quaternion")


@dataclass(frozen=True)
class TextHeader:
    """What a header says of the voxels.

    Attributes:
        voxel_path: The file that holds them: the same, or one beside it.
        offset: Byte at which they begin there.
        size: Their number of bytes, unpacked.
        is_packed: Whether they are compressed.
        has_space: Whether the header says how the axes lie in the patient.
        packed_size: Number of bytes before unpacking, where the format wants it told; else None.
    """

    voxel_path: Path
    offset: int
    size: int
    is_packed: bool
    has_space: bool
    packed_size: int | None = None


def read_text_header(path: Path) -> TextHeader:
    """Reads a header, finds its voxels and checks that all are there.

    A detached file of voxels must lie beside the header. Compressed voxels are unpacked once without being kept, for
    not every library compares checksums.

    Raises:
        MedmomError: The file cannot be read or is damaged, is of a kind that is not read, or holds fewer or more bytes
            of voxels than its header announces.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(MAX_HEADER)
        found = _nrrd(path, start) if path.suffix.lower() in NRRD else _meta(path, start)
        _check_voxels(path, found)
    except FileNotFoundError as error:
        raise MedmomError(f"{path}: no such file. Check the path.") from error
    except (OSError, ValueError) as error:
        fact = getattr(error, "strerror", None) or error
        raise MedmomError(f"{path}: cannot be read ({fact}). Check path, permissions and disk.") from error
    return found


def _nrrd(path: Path, start: bytes) -> TextHeader:
    if not start.startswith(b"NRRD"):
        raise _foreign(path, start, "an NRRD")
    text, blank, _ = start.replace(b"\r\n", b"\n").partition(b"\n\n")
    lines = [line for line in text.decode("latin-1").split("\n")[1:] if not line.startswith("#")]
    fields = _fields(path, [line.split(": ", 1) for line in lines if ": " in line and ":=" not in line])
    name = fields.get("data file", fields.get("datafile"))
    space, kinds = fields.get("space", "").lower(), fields.get("kinds", "").lower()
    if not blank and name is None:
        raise MedmomError(f"{path}: an NRRD file whose header has no end. {CONVERT}")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ENCODINGS:
        raise MedmomError(f"{path}: voxels in the encoding {encoding or 'unknown'}. Save it as raw or gzip.")
    if space and space not in SPACES:
        raise MedmomError(f"{path}: the space {space}. Save it in left-posterior-superior.")
    if any(word in kinds for word in MIXED_KINDS):
        raise MedmomError(f"{path}: voxels are colours or matrices ({kinds}). Store one real number a voxel.")
    if any(int(fields.get(skip, "0") or 0) for skip in ("line skip", "lineskip")):
        raise MedmomError(
            f"{path}: lines before the voxels are to be skipped. Save it again, for example in 3D Slicer."
        )
    skip = _numbers(path, fields.get("byte skip", fields.get("byteskip", "0")))[0]
    if skip and (ENCODINGS[encoding] or name is None):
        raise MedmomError(
            f"{path}: bytes before the voxels are to be skipped. Save it again, for example in 3D Slicer."
        )
    kind = fields.get("type", "").lower()
    each = next((size for word, size in TYPE_SIZES if word in kind), 4 if "int" in kind or kind == "float" else 0)
    size = _product(path, fields.get("sizes", "")) * each
    ends = re.search(rb"\r?\n\r?\n", start)
    offset = 0 if name is not None else ends.end() if ends else len(start)
    return TextHeader(_beside(path, name), offset + max(skip, 0), size, ENCODINGS[encoding], bool(space))


def _meta(path: Path, start: bytes) -> TextHeader:
    last = re.search(rb"^\s*ElementDataFile\s*=\s*([^\r\n]*)\r?\n?", start, re.MULTILINE)
    if b"=" not in start[:64] or b"\0" in start[:64]:
        raise _foreign(path, start, "a MetaImage")
    if last is None:
        raise MedmomError(f"{path}: a MetaImage file whose header names no ElementDataFile. {CONVERT}")
    lines = start[: last.start()].decode("latin-1").splitlines()
    fields = _fields(path, [line.split("=", 1) for line in lines if "=" in line])
    name = last[1].decode("utf-8", errors="surrogateescape").strip()
    if fields.get("binarydata", "true").lower() != "true":
        raise MedmomError(f"{path}: voxels are stored as text. Save it as binary data.")
    kind = fields.get("elementtype", "").upper().removeprefix("MET_")
    each = META_SIZES.get(kind.replace("UCHAR", "CHAR").removeprefix("U"), 0)
    size = _product(path, fields.get("dimsize", "")) * _product(path, fields.get("elementnumberofchannels", "1")) * each
    is_local, is_packed = name.upper() == "LOCAL", fields.get("compresseddata", "false").lower() == "true"
    return TextHeader(
        voxel_path=_beside(path, None if is_local else name),
        offset=last.end() if is_local else max(_numbers(path, fields.get("headersize", "0"))[0], 0),
        size=size,
        is_packed=is_packed,
        has_space=True,
        # Where it is wrong, ITK says nothing and gives whatever lay in memory.
        packed_size=_numbers(path, fields.get("compresseddatasize", "0"))[0] if is_packed else None,
    )


def _fields(path: Path, pairs: list[list[str]]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, value in pairs:
        key = name.strip().lower()
        if key in fields:
            raise MedmomError(f"{path}: the header says twice what {key} is. Save the file again.")
        fields[key] = value.strip()
    return fields


def _numbers(path: Path, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split()] or [0]
    except ValueError as error:
        raise MedmomError(f"{path}: the header is damaged ({text[:40]!r}). Copy the file again.") from error


def _product(path: Path, text: str) -> int:
    product = 1
    for number in _numbers(path, text):
        if number < 1:
            raise MedmomError(f"{path}: shape {' x '.join(text.split()) or 'unknown'} is no image. Give the image.")
        product *= number
    return product


def _beside(path: Path, name: str | None) -> Path:
    """The file with the voxels; no name leads out of the header's folder."""
    if name is None:
        return path
    if name.upper().startswith("LIST") or "%" in name:
        raise MedmomError(f"{path}: voxels in several files. Save them in one.")
    if not name or name in (".", "..") or re.search(r"[/\\\x00]", name):
        raise MedmomError(f"{path}: the voxels' file {name!r} does not lie beside it. Put both in one folder.")
    if not (path.parent / name).is_file():
        raise MedmomError(f"{path}: no file {name} lies beside it. Put both files in one folder.")
    return path.parent / name


def _check_voxels(path: Path, found: TextHeader) -> None:
    if not found.size:
        raise MedmomError(f"{path}: voxels of an unknown type. {CONVERT}")
    packed = 0
    with found.voxel_path.open("rb") as stream:
        stream.seek(found.offset)
        if found.is_packed:
            held, packed = _unpacked_size(found.voxel_path, stream, found.size)
        else:
            held = min(found.voxel_path.stat().st_size - found.offset, found.size)
    if held != found.size:
        fact = "ends before" if held < found.size else "goes on after"
        raise MedmomError(
            f"{found.voxel_path}: the file {fact} the {found.size} bytes of voxels that its header announces. "
            "Copy it again from its source."
        )
    if found.packed_size not in (None, packed):
        raise MedmomError(
            f"{path}: {packed} bytes of compressed voxels, where CompressedDataSize is {found.packed_size}. "
            "Save the file again."
        )


def _unpacked_size(path: Path, stream: BinaryIO, most: int) -> tuple[int, int]:
    """Counts unpacked bytes, not far beyond ``most``, and packed ones; compares checksums of zlib and gzip."""
    unpacker, held, read = zlib.decompressobj(47), 0, 0
    try:
        while held <= most and not unpacker.eof:
            packed = unpacker.unconsumed_tail
            if not packed:
                packed = stream.read(CHUNK)
                read += len(packed)
            held += len(unpacker.decompress(packed, CHUNK) if packed else unpacker.flush())
            if not packed and not unpacker.eof:
                return min(held, most - 1), read
    except zlib.error as error:
        raise MedmomError(
            f"{path}: the compressed data are damaged ({error}). Copy the file again from its source."
        ) from error
    return held, read - len(unpacker.unused_data)


def _foreign(path: Path, start: bytes, kind: str) -> MedmomError:
    fact = f"not {kind} file, it begins with {start[:8]!r}" if start else "the file is empty"
    return MedmomError(f"{path}: {fact}. Copy it again from its source.")
