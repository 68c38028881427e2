"""Image files in and out: the only place that knows a file format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medmom.data.atomic import atomic_file, read_json, write_json, write_text
from medmom.data.dicom import read_series, series_files, series_geometry
from medmom.data.dicom_series import find_series, is_dicom, series_name, series_paths, volumes_of_study
from medmom.data.header import spell_edges
from medmom.data.itk import is_itk, itk_files, open_itk, read_itk, read_itk_label
from medmom.data.masks import named_values, read_mask, write_mask
from medmom.data.nifti import (
    HEADER_SUFFIXES,
    SINGLE_SUFFIXES,
    VOXEL_SUFFIXES,
    open_nifti,
    suffix,
    write_label_voxels,
)
from medmom.data.pictures import is_picture, picture_channels, picture_geometry, read_picture
from medmom.data.voxels import class_numbers, compact_intensities, intensities, whole_numbers
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import Labels

__all__ = [
    "Volume",
    "atomic_file",
    "check_contrast",
    "check_same_grid",
    "content_files",
    "find_series",
    "is_image",
    "is_picture",
    "is_series",
    "picture_channels",
    "read_geometry",
    "read_image",
    "read_images",
    "read_json",
    "read_label",
    "series_name",
    "series_paths",
    "stem",
    "volumes_of_study",
    "write_json",
    "write_label",
    "write_text",
]


@dataclass(frozen=True, eq=False)
class Volume:
    """One image or label map in memory, with its grid.

    Attributes:
        path: The file it was read from.
        array: An image: float32, or integers where it was read compact, shape (C, X, Y, Z). A label map: integers,
            shape (X, Y, Z).
        geometry: The grid.
        header: nibabel's header, for the codes and units of a result on the same grid; None for a picture. Of a file
            that is not NIfTI it is made from the grid.
        bits: Bits of a channel in the file of a picture image; None for all else.
        series: Of a DICOM series the file of each slice of the third axis; of a multi-frame file that file alone;
            empty for all else.
    """

    path: Path
    array: np.ndarray
    geometry: Geometry
    header: Any
    bits: int | None = None
    series: tuple[Path, ...] = ()

    @property
    def is_picture(self) -> bool:
        """Whether it was read from a picture: one slice, pixels of edge 1, the second axis points down."""
        return self.header is None


def is_image(path: str | Path) -> bool:
    """Whether a file is one of an image: by its name, upper case too; a DICOM file without a suffix by its mark.

    A pair counts once, by its ``.hdr``. A folder is none; the series in it are for ``find_series``.
    """
    path = Path(path)
    return suffix(path) in SINGLE_SUFFIXES + HEADER_SUFFIXES or is_picture(path) or is_itk(path) or is_dicom(path)


def is_series(path: str | Path) -> bool:
    """Whether a path is read as DICOM series: a folder, or a DICOM file that no suffix says is something else."""
    path = Path(path)
    is_other = bool(suffix(path)) or is_picture(path) or is_itk(path)
    try:
        return path.is_dir() or (not is_other and path.is_file() and is_dicom(path))
    except OSError:
        # A name that the disk refuses: opening the file will say so.
        return False


def stem(path: str | Path) -> str:
    """Gives the file name without its image suffix: ``case.v1.nii.gz`` is ``case.v1``; of a folder the whole name."""
    path = Path(path)
    if suffix(path):
        return path.name[: -len(suffix(path))]
    try:
        return path.name if path.is_dir() else path.stem
    except OSError:
        return path.stem


def content_files(path: str | Path) -> list[Path]:
    """Gives all files whose bytes make an image, by name.

    Both halves of a NIfTI pair, header and voxels of a detached NRRD or MetaImage file, every file of a DICOM series;
    for all else the file itself, whether it is there or not.

    Raises:
        MedmomError: The parts cannot be told, for a header is damaged or the optional reader is not installed.
    """
    path = Path(path)
    if is_itk(path):
        return itk_files(path)
    if is_series(path):
        return series_files(path)
    pair = (*HEADER_SUFFIXES, *VOXEL_SUFFIXES)
    if suffix(path) not in pair or not path.parent.is_dir():
        return [path]
    halves = [other for other in path.parent.iterdir() if suffix(other) in pair and stem(other) == stem(path)]
    return sorted(halves) or [path]


def read_geometry(path: str | Path) -> Geometry:
    """Reads the grid alone, from the header, with the checks of ``read_image`` on it."""
    path = Path(path)
    if is_picture(path):
        return picture_geometry(path)
    if is_itk(path):
        return open_itk(path).geometry
    return series_geometry(path) if is_series(path) else open_nifti(path).geometry


def read_image(path: str | Path) -> Volume:
    """Reads an image as float32 channels, with its scale factors applied.

    A picture (PNG, JPEG, TIFF) is one slice, upright, on the scale from 0 to 255; ``read_picture`` has the rest.

    NIfTI-1 and NIfTI-2, single files and pairs, either byte order, any integer or float type. Volumes
    along the fourth axis are channels; trailing axes of length 1 are dropped.

    NRRD and MetaImage, attached or with the voxels in a file beside the header, raw or compressed (``open_itk``).
    DICOM (``read_series``): a folder or any file of it stands for the whole series, a multi-frame file for itself. Both
    need the extra ``medmom[dicom]``.

    What could be read either way is decided so:
        * The bytes, not the name, say whether a file is compressed: a plain file named ``.nii.gz`` and a
          compressed one named ``.nii`` are read, and compressed pairs too.
        * Neither qform nor sform set: read, with the affine that nibabel gives it, and a warning.
        * qform and sform disagree: refused where they mirror each other, or claim the same space (equal
          codes) and put a voxel more than half an edge apart; otherwise the sform counts.
        * Shear of more than one degree, gantry tilt included: refused.
        * A voxel edge of 0 mm that the affine depends on: refused.
        * One slice, and two axes only: read, as one slice (X, Y, 1). Four axes of which the first has one
          voxel: refused, the channels seem to come first.
        * A constant image: refused, it shows nothing; one blank channel among others is read.
        * Analyze 7.5: refused, it does not tell left from right. MGZ, AFNI, MINC, PAR/REC and every
          other format: refused.
        * Lengths in metres or micrometres: refused.
        * DICOM slices at irregular gaps, missing, in one place, of mixed orientation: refused (``grid_of``). Two
          slices, and one: read.

    Args:
        path: The file; for a pair, either half; for a DICOM series its folder or any file of it.

    Returns:
        The volume, array of shape (C, X, Y, Z).

    Raises:
        MedmomError: The file is missing, damaged or no image volume, or a voxel is not finite.
    """
    volume = _read_channels(Path(path))
    check_contrast(volume)
    return volume


def read_images(paths: Sequence[str | Path], *, compact: bool = False) -> Volume:
    """Reads one case whose channels may lie in several files; the header is that of the first.

    Args:
        paths: One file or several, each of one channel or more.
        compact: Keep the integers of a volume as they are stored, see ``compact_intensities``: the array is then
            ``int8``, ``uint8``, ``int16``, ``uint16``, ``int32`` or float32, of the same values and of any memory
            order. A picture is float32 all the same.

    Returns:
        The volume, array of shape (C, X, Y, Z).

    Raises:
        MedmomError: As ``read_image``; or a file lies on another grid than the first.
    """
    volumes = [_read_channels(Path(path), compact=compact) for path in paths]
    for other in volumes[1:]:
        check_same_grid(volumes[0], other)
    array = volumes[0].array if len(volumes) == 1 else _together([volume.array for volume in volumes])
    volume = replace(volumes[0], array=array)
    check_contrast(volume)
    return volume


def read_label(path: str | Path, labels: Labels | None = None) -> Volume:
    """Reads a label map as integers of shape (X, Y, Z); a float file is fine where its values are whole.

    A picture gives palette indices or grey values (see ``read_mask``), upright as its image.

    Args:
        path: The file.
        labels: The classes it may hold, so that a black and white picture (0 and 255) is read as background and the
            one class; None: every value as stored. Values that it does not name are left to ``Labels.to_channels``.

    Raises:
        MedmomError: As ``read_image`` (a constant map is fine); or there are several volumes, a value that is not a
            whole number, colours, or greys between black and white.
    """
    path = Path(path)
    if is_picture(path):
        stored = read_mask(path)
        stored = stored if labels is None else named_values(path, stored, labels)
        return Volume(path, stored, _pixel_grid(stored), None)
    if is_itk(path):
        itk = open_itk(path)
        return Volume(path, read_itk_label(itk), itk.geometry, itk.header)
    if is_series(path):
        read = read_series(path, compact=True)
        return Volume(path, whole_numbers(path, read.array[0]), read.geometry, read.header, series=read.files)
    file = open_nifti(path)
    return Volume(path, class_numbers(file), file.geometry, file.header)


def check_same_grid(first: Volume, second: Volume) -> None:
    """Demands one grid of two volumes, to a twentieth of the smallest voxel edge.

    Raises:
        MedmomError: The shapes differ, or a voxel lies elsewhere.
    """
    ours, theirs = first.geometry, second.geometry
    if theirs.is_close(ours, tolerance=0.05 * min(ours.spacing)):
        return
    if first.is_picture and second.is_picture:
        raise _other_size(first, second)
    if ours.shape != theirs.shape:
        fact = f"shape {' x '.join(map(str, theirs.shape))} instead of {' x '.join(map(str, ours.shape))}"
    elif not np.allclose(ours.spacing, theirs.spacing, rtol=1e-3):
        fact = f"spacing {spell_edges(theirs.spacing)} mm instead of {spell_edges(ours.spacing)} mm"
    else:
        apart = np.linalg.norm(ours.corners() - theirs.corners(), axis=1).max()
        fact = f"same shape, but voxels up to {apart:.3g} mm away"
    raise MedmomError(f"{second.path}: another grid than {first.path} ({fact}). Export both on one grid.")


def write_label(path: str | Path, label: np.ndarray, labels: Labels, like: Volume) -> None:
    """Writes a label map on the grid of ``like``, or leaves the disk as it was.

    NIfTI: affine, qform and sform with their codes, voxel edges and units are those of ``like``, and so is the
    number of axes of a flat image. The type is the smallest integer type for ``labels``; the class names
    stand in a header extension, as the label table that TotalSegmentator writes and reads.

    A picture's is a PNG of its size in indexed colours, the index being the stored value. Like the picture in memory
    it is upright: where EXIF turns the picture, the PNG has the size of what viewers show, without EXIF.

    Args:
        path: ``.nii.gz`` (compressed at level 1) or ``.nii``, ``.png`` where ``like`` is a picture; missing folders
            are made.
        label: Stored values, shape (X, Y, Z).
        labels: The table they come from.
        like: The image that was segmented.

    Raises:
        MedmomError: ``path`` is the image itself, has another suffix, or cannot be written.
        ValueError: ``label`` has another shape, or values beyond the type.
    """
    path = Path(path)
    if like.is_picture and path.suffix.lower() != ".png":
        raise MedmomError(f"{path}: the label map of a picture is written as .png. Give the output such a name.")
    if not like.is_picture and suffix(path) not in SINGLE_SUFFIXES:
        raise MedmomError(f"{path}: label maps are written as .nii.gz or .nii. Give the output such a name.")
    if _is_same_file(path, like.path):
        raise MedmomError(f"{path}: the output would replace its own input. Give another output.")
    # Of the right type already it is not copied: of a whole body that would be another half GiB.
    stored = label.astype(labels.dtype, copy=False)
    is_same = stored is label or np.array_equal(stored, label)
    if label.shape != like.geometry.shape or not is_same:
        raise ValueError(f"a label map {label.shape} {label.dtype} for {like.geometry.shape} {labels.dtype}")
    with atomic_file(path) as stream:
        if like.is_picture:
            write_mask(stream, path, stored, labels)
        else:
            write_label_voxels(stream, stored, labels, like.header, compress=suffix(path) != ".nii")


def _read_channels(path: Path, *, compact: bool = False) -> Volume:
    """Reads channels; a constant image is for the caller to refuse."""
    if is_picture(path):
        array, bits = read_picture(path)
        return Volume(path, array, _pixel_grid(array), None, bits)
    if is_itk(path):
        itk = open_itk(path)
        return Volume(path, read_itk(itk, compact=compact), itk.geometry, itk.header)
    if is_series(path):
        read = read_series(path, compact=compact)
        return Volume(path, read.array, read.geometry, read.header, series=read.files)
    file = open_nifti(path)
    array = compact_intensities(file) if compact else intensities(file)
    return Volume(path, array, file.geometry, file.header)


def _together(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Joins the channels of several files; integers beside float32 become float32, whatever their size."""
    floats = any(array.dtype == np.float32 for array in arrays)
    return np.concatenate(arrays, dtype=np.float32 if floats else np.result_type(*arrays))


def _pixel_grid(array: np.ndarray) -> Geometry:
    return Geometry(array.shape[-3:], np.eye(4))


def check_contrast(volume: Volume) -> None:
    """Demands that an image shows anything.

    Raises:
        MedmomError: Every voxel has one value.
    """
    if volume.array.min() == volume.array.max():
        value, unit = float(volume.array.flat[0]), "pixel" if volume.is_picture else "voxel"
        raise MedmomError(f"{volume.path}: every {unit} is {value:g}, the image shows nothing. Give the true image.")


def _other_size(first: Volume, second: Volume) -> MedmomError:
    """Two pictures lie on one grid if they have one size."""
    (one, other) = ("x".join(map(str, volume.geometry.shape[:2])) for volume in (first, second))
    turned = first.geometry.shape[:2] == second.geometry.shape[1::-1]
    mend = "Turn one: pictures are read as EXIF turns them." if turned else "Save both at one size."
    return MedmomError(f"{second.path}: {other} pixels, but {first.path} has {one}. {mend}")


def _is_same_file(first: Path, second: Path) -> bool:
    """Whether both names lead to one file; links count, a file that is not there does not."""
    try:
        return first.samefile(second)
    except OSError:
        return False
