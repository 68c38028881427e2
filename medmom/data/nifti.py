"""Opening NIfTI files and taking their voxels out, whatever the suffix says about compression."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from xml.etree import ElementTree

import nibabel as nib
import numpy as np

from medmom.data.header import CONVERT, grid_and_channels, parse_header, scaling, voxel_type
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import Labels

SINGLE_SUFFIXES = (".nii.gz", ".nii")
HEADER_SUFFIXES = (".hdr.gz", ".hdr")
VOXEL_SUFFIXES = (".img.gz", ".img")

GZIP_MAGIC = b"\x1f\x8b"
# No byte of a deflate stream unpacks to more than 1032 bytes (zlib's technical notes).
GZIP_RATIO = 1032
CHUNK = 1 << 24

ORIENTATION_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
LABEL_INTENT = 1002
# Caret's own code is 30, but TotalSegmentator writes 0 and reads through nibabel, which cannot unpack 30.
LABEL_TABLE_CODE = 0

OTHER_FORMATS = (
    (128, b"DICM", "a DICOM file"),
    (0, b"NRRD", "an NRRD file"),
    (0, b"ObjectType", "a MetaImage file"),
    (0, b"mrtrix image", "an MRtrix file"),
    (0, b"\x89HDF", "an HDF5 or MINC file"),
    (0, b"CDF", "a MINC file"),
    (0, b"\x89PNG", "a PNG file"),
    (0, b"\xff\xd8\xff", "a JPEG file"),
)


@dataclass(frozen=True, eq=False)
class NiftiFile:
    """A NIfTI file whose header was read and checked; the voxels are still on disk.

    Attributes:
        path: The file that was asked for.
        voxel_path: The file that holds the voxels: the same, or the ``.img`` of a pair.
        header: nibabel's header, without its extensions.
        geometry: The grid.
        num_channels: Number of volumes along the fourth axis; 1 without one.
    """

    path: Path
    voxel_path: Path
    header: Any
    geometry: Geometry
    num_channels: int


def suffix(path: Path) -> str:
    """Gives the NIfTI suffix of a file name in lower case, ``".nii.gz"`` as one; empty when there is none."""
    name = path.name.lower()
    return next((s for s in SINGLE_SUFFIXES + HEADER_SUFFIXES + VOXEL_SUFFIXES if name.endswith(s)), "")


def open_nifti(path: Path) -> NiftiFile:
    """Reads and checks a header; opens either half of a ``.hdr``/``.img`` pair.

    Raises:
        MedmomError: There is no such file, it is not NIfTI, or its header cannot be used.
    """
    with _readable(path):
        if path.is_dir():
            raise MedmomError(f"{path}: a folder, not an image file. Give an image file.")
        if not path.is_file():
            raise MedmomError(f"{path}: no such file. Check the path.")
        header_path, voxel_path = _pair(path)
    with _opened(header_path) as stream:
        block = stream.read(540)
    header = parse_header(path, block, single=header_path == voxel_path)
    geometry, num_channels = grid_and_channels(path, header)
    return NiftiFile(path, voxel_path, header, geometry, num_channels)


def read_voxels(file: NiftiFile) -> tuple[np.ndarray, float, float]:
    """Reads the voxels as they are stored.

    Returns:
        Array of shape (X, Y, Z, C) in the stored type, and slope and intercept, not yet applied.

    Raises:
        MedmomError: The file ends early or is damaged, or its voxels are not real numbers.
    """
    dtype, (slope, inter) = voxel_type(file.path, file.header), scaling(file.path, file.header)
    shape = (*file.geometry.shape, file.num_channels)
    size, offset = int(np.prod(shape)) * dtype.itemsize, int(file.header.get_data_offset())
    with _opened(file.voxel_path) as stream:
        ratio = GZIP_RATIO if isinstance(stream, gzip.GzipFile) else 1
        # A small file that announces gigabytes is turned away before they are asked for.
        data, found = np.empty(0, dtype=np.uint8), 0
        if file.voxel_path.stat().st_size * ratio >= offset + size:
            data = np.empty(size, dtype=np.uint8)
            found = _fill(data, stream, offset)
    if found < size:
        raise MedmomError(
            f"{file.voxel_path}: the file ends before the {size} bytes of voxels that its header announces. "
            "Copy it again from its source."
        )
    return data.view(dtype).reshape(shape, order="F"), slope, inter


def write_label_voxels(stream: BinaryIO, stored: np.ndarray, labels: Labels, like: Any, *, compress: bool) -> None:
    """Writes a label map as one NIfTI file with the orientation, voxel edges and units of a header.

    Args:
        stream: An open binary file.
        stored: Stored values, shape (X, Y, Z), of the type to write.
        labels: Class names and colours for the label table in the header extension.
        like: nibabel's header of the image.
        compress: Whether to write gzip, at level 1.
    """
    header = label_header(like, stored.shape, stored.dtype)
    header.extensions.append(nib.nifti1.Nifti1Extension(LABEL_TABLE_CODE, _label_table(labels)))
    if not compress:
        _write_volume(stream, header, stored)
        return
    with gzip.GzipFile(filename="", fileobj=stream, mode="wb", compresslevel=1, mtime=0) as packed:
        _write_volume(cast(BinaryIO, packed), header, stored)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading and unpacks it where its first bytes say gzip."""
    with _readable(path), path.open("rb") as raw:
        packed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        raw.seek(0)
        if packed:
            with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                yield cast(BinaryIO, stream)
        else:
            yield raw


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the disk or the decompression raises into a line on the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MedmomError(
            f"{path}: the compressed data are cut short or damaged ({error}). Copy the file again from its source."
        ) from error
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check path, permissions and disk.") from error


def _fill(data: np.ndarray, stream: BinaryIO, offset: int) -> int:
    """Fills ``data`` from byte ``offset`` on; returns how many bytes there were."""
    stream.seek(offset)
    found = 0
    while found < len(data):
        chunk = stream.read(min(CHUNK, len(data) - found))
        if not chunk:
            return found
        data[found : found + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
        found += len(chunk)
    # gzip compares its checksum only once it meets the end.
    stream.read(1)
    return found


def _pair(path: Path) -> tuple[Path, Path]:
    """Finds the file of the header and the file of the voxels."""
    ending = suffix(path)
    if not ending:
        raise MedmomError(
            f"{path}: {_format_name(path)}; medmom reads NIfTI (.nii, .nii.gz, .hdr with .img), PNG, JPEG and TIFF. "
            f"{CONVERT}"
        )
    if ending in SINGLE_SUFFIXES:
        return path, path
    is_header = ending in HEADER_SUFFIXES
    wanted, base = VOXEL_SUFFIXES if is_header else HEADER_SUFFIXES, path.name[: -len(ending)]
    for other in sorted(path.parent.iterdir()):
        if suffix(other) in wanted and other.name[: -len(suffix(other))] == base:
            return (path, other) if is_header else (other, path)
    raise MedmomError(f"{path}: no {wanted[-1]} file of this name lies beside it. Put both files of the pair together.")


def _format_name(path: Path) -> str:
    """Says what a file without NIfTI suffix is, by its first bytes."""
    with _opened(path) as stream:
        start = stream.read(132)
    names = (name for position, magic, name in OTHER_FORMATS if start[position:].startswith(magic))
    return next(names, "not a NIfTI file by its name")


def label_header(old: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Makes the header of a label map, see ``grid_header``."""
    header = grid_header(old, shape, dtype)
    header["intent_code"] = LABEL_INTENT
    return header


def grid_header(old: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Makes a header of the same NIfTI version, grid, codes and units, and nothing else of the input's."""
    header = nib.Nifti2Header() if isinstance(old, nib.Nifti2Header) else nib.Nifti1Header()
    header.set_data_shape(shape[:2] if int(old["dim"][0]) == 2 else shape)
    header.set_data_dtype(dtype)
    header["pixdim"][:4] = old["pixdim"][:4]
    for name in ORIENTATION_FIELDS:
        # Where its code is 0 a form says nothing, and may hold anything.
        header[name] = np.nan_to_num(old[name], posinf=0, neginf=0)
    header["xyzt_units"] = int(old["xyzt_units"]) & 7
    header.set_slope_inter(1, 0)
    return header


def _label_table(labels: Labels) -> bytes:
    """Gives names, values and colours as the XML that Caret defined for NIfTI label maps."""
    root = ElementTree.Element("CaretExtension")
    information = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(information, "LabelTable")
    for name, value in zip(labels.names, labels.values, strict=True):
        red, green, blue = (f"{part / 255:.6g}" for part in labels.colour(name))
        alpha = "0" if value == 0 else "1"
        row = ElementTree.SubElement(table, "Label", Key=str(value), Red=red, Green=green, Blue=blue, Alpha=alpha)
        row.text = name
    ElementTree.SubElement(information, "VolumeType").text = "Label"
    return cast(bytes, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _write_volume(stream: BinaryIO, header: Any, array: np.ndarray) -> None:
    header.write_to(stream)
    stream.write(np.ascontiguousarray(array.T).data)
