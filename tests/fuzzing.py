"""Files as damage and malice make them: each follows from a seed and a number, and can be made again from both."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

Rng = np.random.Generator
Header = Any
"""A structured array of one element: the fields of a header as nibabel names them."""

DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "c8", "V3")
SHAPES = ((12, 10, 8), (9, 8, 7), (6, 5, 4, 2), (7, 6, 5, 1), (10, 9, 1), (8, 7), (6, 5, 4, 1, 1))
WHOLE = (0, -1, 1, 2, 3, 4, 7, 8, 127, 255, -(2**15), 2**15 - 1, 2**31 - 1, -(2**31), 2**62, -(2**63))
REAL = (0.0, -0.0, -1.0, 1.0, 0.5, 1e-45, 1e-38, 1e-6, 353.0, 1e5, 1e9, 1e30, 3.4e38, np.nan, np.inf, -np.inf)
COUNTS = (0, 1, 2, 3, 5, 12, 27307, 32000, 32767, -1, -2, -32768)
OFFSETS = (0, 1, 16, 100, 300, 348, 351, 352, 352.5, 353, 356, 368, 540, 544, 560, 1000, 4096, 2**26, 1e9, -1, -352)
FORMS = ("srow_x", "srow_y", "srow_z")
TURNS = ("quatern_b", "quatern_c", "quatern_d")


class Mutant(NamedTuple):
    """Files to be written into one folder, which of them to open, and what was done."""

    files: dict[str, bytes]
    name: str
    how: str


@dataclass(frozen=True)
class Parts:
    """A NIfTI file in parts, before it is packed."""

    header: Header
    extension: bytes
    voxels: bytes
    is_single: bool
    is_packed: bool

    def with_fields(self, **fields: Any) -> Parts:
        header = self.header.copy()
        with np.errstate(all="ignore"):
            for name, value in fields.items():
                header[name] = np.array(value).astype(header.dtype[name].base)
        return replace(self, header=header)


def write_mutant(mutant: Mutant, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in mutant.files.items():
        (folder / name).write_bytes(content)
    return folder / mutant.name


def nifti_mutant(seed: int, number: int) -> Mutant:
    """A small NIfTI file, or a pair, of any version, byte order and type, with up to three faults."""
    rng = np.random.default_rng([seed, number])
    parts, how = sound_nifti(rng), []
    for _ in range(rng.integers(0, 4)):
        change = one(rng, CHANGES)
        parts = change(parts, rng)
        how.append(change.__name__)
    head = parts.header.tobytes() + parts.extension
    body = {"scan.nii": head + parts.voxels} if parts.is_single else {"scan.hdr": head, "scan.img": parts.voxels}
    spoilt = one(rng, list(body)) if rng.random() < 0.4 else None
    files = {}
    for name, content in body.items():
        packed = gzip.compress(content, 1, mtime=0) if parts.is_packed else content
        if name == spoilt:
            spoil = one(rng, PACKED if parts.is_packed else PLAIN)
            packed = spoil(packed, rng)
            how.append(spoil.__name__)
        # Bytes and not the name say what is packed.
        files[f"{name}.gz" if parts.is_packed != (rng.random() < 0.05) else name] = packed
    return Mutant(files, one(rng, list(files)), ", ".join(how) or "sound")


def sound_nifti(rng: Rng) -> Parts:
    shape, order = one(rng, SHAPES), one(rng, "<>")
    kind = one(rng, (nib.Nifti1Header, nib.Nifti2Header, nib.nifti1.Nifti1PairHeader, nib.nifti2.Nifti2PairHeader))
    dtype = np.dtype(one(rng, DTYPES if rng.random() < 0.2 else DTYPES[:10]))
    header = kind(endianness=order)
    header.set_data_shape(shape)
    header.set_data_dtype(np.dtype([(c, "u1") for c in "RGB"]) if dtype.kind == "V" else dtype)
    affine = np.diag([*rng.choice([0.5, 1, 1.5, 2], 3), 1.0]) @ np.eye(4)[[*rng.permutation(3), 3]]
    affine[:3, :3] *= rng.choice([-1, 1], 3)
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    codes = rng.integers(0, 5, 2)
    header.set_qform(affine, int(codes[0]))
    header.set_sform(affine, int(codes[1]))
    header.set_xyzt_units(one(rng, ("mm", "mm", "unknown")))
    is_single, extension = header.is_single, b"\0\0\0\0"
    if is_single and rng.random() < 0.3:
        extension = struct.pack(f"{order}4Bii", 1, 0, 0, 0, 32, 6) + b"a comment".ljust(24, b"\0")
    if rng.random() < 0.2:
        header.set_slope_inter(float(one(rng, (1, 2, 0.1, -1))), float(one(rng, (0, -1024, 0.5, 7))))
    header["vox_offset"] = header.sizeof_hdr + len(extension) if is_single else 0
    header["magic"] = header.single_magic if is_single else header.pair_magic
    values = rng.integers(0, 100, (int(np.prod(shape)), dtype.itemsize if dtype.kind == "V" else 1))
    voxels = values.astype("u1" if dtype.kind == "V" else dtype.newbyteorder(order)).tobytes()
    return Parts(header.structarr.copy(), extension, voxels, is_single, bool(rng.random() < 0.6))


def one(rng: Rng, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def flip_header(parts: Parts, rng: Rng) -> Parts:
    """Bytes of the header become others."""
    content = flip(parts.header.tobytes(), rng)
    return replace(parts, header=np.frombuffer(content, dtype=parts.header.dtype).reshape(()).copy())


def set_any(parts: Parts, rng: Rng) -> Parts:
    """A field, whichever, gets an extreme value."""
    name = one(rng, parts.header.dtype.names)
    base, shape = parts.header.dtype[name].base, parts.header[name].shape
    if base.kind == "S":
        return parts.with_fields(**{name: rng.bytes(base.itemsize)})
    value = np.broadcast_to(np.array(one(rng, WHOLE if base.kind in "iu" else REAL)), shape)
    if shape and rng.random() < 0.7:
        value = np.where(np.arange(shape[0]) == rng.integers(shape[0]), value, parts.header[name])
    return parts.with_fields(**{name: value})


def set_dim(parts: Parts, rng: Rng) -> Parts:
    """Counts that are negative, or whose product overflows."""
    dim = parts.header["dim"].astype(np.int64)
    for place in rng.integers(0, 6, rng.integers(1, 4)):
        dim[place] = one(rng, COUNTS if rng.random() < 0.8 else WHOLE)
    return parts.with_fields(dim=dim)


def set_offset(parts: Parts, rng: Rng) -> Parts:
    return parts.with_fields(vox_offset=one(rng, (*OFFSETS, *REAL)))


def set_type(parts: Parts, rng: Rng) -> Parts:
    """Type and bits that disagree."""
    code = one(rng, (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -1, 3))
    bits = one(rng, (0, 1, 8, 16, 32, 64, 128, -8))
    return parts.with_fields(datatype=code, **({"bitpix": bits} if rng.random() < 0.5 else {}))


def set_sform(parts: Parts, rng: Rng) -> Parts:
    """An affine that is absurd, singular, sheared, mirrored or far away; a few are sound."""
    rows = np.array([parts.header[name] for name in FORMS], dtype=np.float64)
    factor = one(rng, (0, 1e-30, 1e-4, 0.0011, 20, 999, 1e4, 1e30, np.nan, np.inf, -1))
    with np.errstate(all="ignore"):
        changed = [rows * factor, rows + rng.normal(size=rows.shape), rows[[0, 0, 2]], rows * [-1, 1, 1, 1]]
        changed += [np.where(rng.random(rows.shape) < 0.1, factor, rows), rows + np.array([0, 0, 0, factor])]
        rows = one(rng, changed)
    return parts.with_fields(**dict(zip(FORMS, rows, strict=True)), sform_code=rng.integers(0, 4))


def set_quaternion(parts: Parts, rng: Rng) -> Parts:
    """Rotations that are none, edges that are none, codes that mean nothing."""
    values = {name: one(rng, (*REAL, 0.1, -0.7, 2.0)) for name in TURNS if rng.random() < 0.5}
    pixdim = parts.header["pixdim"].astype(np.float64)
    if rng.random() < 0.6:
        pixdim[rng.integers(0, 4)] = one(rng, (*REAL, -2.0, 3.0))
    codes = {name: one(rng, (0, 0, 1, 2, 5, 6, -1, 261)) for name in ("qform_code", "sform_code")}
    return parts.with_fields(**values, pixdim=pixdim, **codes)


def set_scale(parts: Parts, rng: Rng) -> Parts:
    return parts.with_fields(scl_slope=one(rng, REAL), scl_inter=one(rng, (*REAL, -1024.0, 2.0**31, 2.0**63)))


def set_extension(parts: Parts, rng: Rng) -> Parts:
    """Extensions whose sizes lie."""
    size = one(rng, (0, 1, 8, 15, 17, 32, 1000, 2**31 - 1, -1, -(2**31)))
    extension = b"\1\0\0\0" + struct.pack("<ii", size, one(rng, (0, 4, 6, 30, -1))) + rng.bytes(24)
    offset = parts.header.dtype.itemsize + len(extension)
    true = {"vox_offset": offset} if parts.is_single and rng.random() < 0.8 else {}
    return replace(parts.with_fields(**true), extension=extension)


def flip_voxels(parts: Parts, rng: Rng) -> Parts:
    return replace(parts, voxels=flip(parts.voxels, rng))


def fill_voxels(parts: Parts, rng: Rng) -> Parts:
    """Voxels that are all one, random bits, or as large as they can be."""
    size, ones = len(parts.voxels), one(rng, (b"\xff", b"\x7f", b"\0", b"\xf0\x7f", b"\x7f\xf0", b"\xff\xff\x7f\x7f"))
    fill = (ones * size)[:size]
    half = fill[: size // 2] + parts.voxels[size // 2 :]
    return replace(parts, voxels=one(rng, (rng.bytes(size), fill, half)))


def resize_voxels(parts: Parts, rng: Rng) -> Parts:
    """Voxels that end early or are followed by others; a hundred times as many at most."""
    size = len(parts.voxels)
    return replace(parts, voxels=one(rng, (parts.voxels[: rng.integers(size)], parts.voxels + bytes(100 * size))))


def flip(content: bytes, rng: Rng) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(0, max(len(content), 1), rng.integers(1, 5)):
        if changed:
            changed[place] = rng.integers(256)
    return bytes(changed)


def cut(content: bytes, rng: Rng) -> bytes:
    size: int = one(rng, (0, 1, 2, 10, 347, 348, 350, len(content) - 1, int(rng.integers(len(content) + 1))))
    return content[:size]


def extend(content: bytes, rng: Rng) -> bytes:
    tail: bytes = one(rng, (b"\0", bytes(1000), rng.bytes(50), content, gzip.compress(b"more"), b"\x1f\x8b"))
    return content + tail


def replace_all(content: bytes, rng: Rng) -> bytes:
    return rng.bytes(one(rng, (1, 10, 352, 1000)))


def pack_twice(content: bytes, rng: Rng) -> bytes:
    return gzip.compress(gzip.compress(content) if rng.random() < 0.5 else content)


def spoil_trailer(content: bytes, rng: Rng) -> bytes:
    """Another checksum or length at the end of the stream."""
    place = len(content) - one(rng, (8, 4))
    return content[:place] + rng.bytes(4) + content[place + 4 :]


def spoil_start(content: bytes, rng: Rng) -> bytes:
    """Another method, other flags or a name without end in the head of the stream."""
    place = one(rng, (2, 3, 3, 4, 8, 9))
    return content[:place] + rng.bytes(1) + content[place + 1 :]


def end_early(content: bytes, rng: Rng) -> bytes:
    """A stream that is whole but holds a part alone, with a true trailer or without one."""
    whole = zlib.decompress(content, 31)
    part = gzip.compress(whole[: rng.integers(len(whole) + 1)])
    return part if rng.random() < 0.5 else part[:-8]


CHANGES: tuple[Callable[[Parts, Rng], Parts], ...] = (
    *(flip_header, set_any, set_any, set_dim, set_offset, set_type, set_sform, set_sform, set_quaternion),
    *(set_quaternion, set_scale, set_extension, flip_voxels, fill_voxels, resize_voxels),
)
PLAIN: tuple[Callable[[bytes, Rng], bytes], ...] = (flip, cut, extend, replace_all)
PACKED = (*PLAIN, pack_twice, spoil_trailer, spoil_start, end_early)
