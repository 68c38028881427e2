"""What speaks against an output, before any work is done."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

from medmom.data.casefiles import CaseFiles
from medmom.data.files import is_picture, read_json
from medmom.errors import MedmomError

OTHER_SUFFIXES = (
    *(".hdr", ".img", ".gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".dcm", ".json"),
    *(".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"),
    *(".csv", ".tsv", ".txt", ".xlsx", ".npz", ".npy", ".html", ".pdf", ".yaml", ".zip"),
)
"""Names that say an output file is meant, of a kind that is not written."""

MAX_NAME = 255
"""Bytes of a name that disks take."""

RESERVED = re.compile(r"cases|run(-\d+)?|statistics")
"""Names of cases whose sidecars would be other files of the folder."""


def check_names_differ(owners: Iterable[tuple[Path, CaseFiles]]) -> None:
    """Refuses two cases that would write one file, such as the preview of ``a`` and the label map of ``a_preview``.

    Refuses names that no disk takes, too.

    Args:
        owners: Every file, with the case that it belongs to.

    Raises:
        MedmomError: A file belongs to two cases, or its name is too long.
    """
    seen: dict[Path, CaseFiles] = {}
    for file, case in owners:
        if len(os.fsencode(file.name)) > MAX_NAME:
            raise MedmomError(
                f"{file}: File name too long, {len(os.fsencode(file.name))} bytes; disks take {MAX_NAME}. Shorten the "
                f"name of {case.images[0]}."
            )
        other = seen.setdefault(file, case)
        if other is not case:
            raise MedmomError(
                f"{case.images[0]}: its {file.name} would replace that of the case {other.name}. Rename one, or "
                "predict them apart."
            )


def check_kind_of_file(out: Path, case: CaseFiles) -> None:
    """Refuses a NIfTI file for a picture, and the other way round."""
    if is_picture(out) != is_picture(case.images[0]):
        wanted, kind = (".png", "a picture") if is_picture(case.images[0]) else (".nii.gz or .nii", "a NIfTI image")
        raise MedmomError(
            f"{out}: label maps are written as {wanted} for {kind} such as {case.images[0].name}. Name such a file."
        )


def check_folder(out: Path, cases: Sequence[CaseFiles]) -> None:
    """Refuses what is a file or looks like one, the folder of an input, and cases that no file can be named after."""
    if not out.is_dir() and out.suffix.lower() in OTHER_SUFFIXES:
        raise MedmomError(
            f"{out}: label maps are written as .nii.gz or .nii, of pictures as .png. Name such a file, or a folder."
        )
    if out.exists() and not out.is_dir():
        raise MedmomError(f"{out}: this is a file. Name a folder, or a .nii.gz (picture: .png) file for one image.")
    for case in cases:
        if Path(case.name).name != case.name or RESERVED.fullmatch(case.name):
            raise MedmomError(f"{case.images[0]}: a prediction cannot be named {case.name!r}. Rename the case.")
        # A Path would raise on names that the disk refuses.
        folders = [path if os.path.isdir(path) else path.parent for path in case.images]  # noqa: PTH112
        if out.is_dir() and any(folder.is_dir() and out.samefile(folder) for folder in folders):
            raise MedmomError(
                f"{out}: the folder of the input {case.images[0].name}; predictions have the names of their images. "
                "Name another folder."
            )


def check_inputs_are_safe(owners: Mapping[Path, Path], cases: Sequence[CaseFiles]) -> None:
    """Refuses to replace an input, by whatever name.

    Args:
        owners: As ``check_is_ours`` takes them, one by one.
        cases: Their images and label maps must stay.

    Raises:
        MedmomError: An output is an input.
    """
    inputs = {_identity(path): path for case in cases for path in (*case.images, case.label) if path and path.exists()}
    for path in {**owners, **dict.fromkeys(owners.values())}:
        # By device and number, so that links to an input are found too.
        if path.exists() and _identity(path) in inputs:
            raise MedmomError(f"{path}: the output would replace the input {inputs[_identity(path)]}. Name another.")


def check_is_ours(path: Path, record: Path, keys: Set[str]) -> None:
    """Refuses to replace a file that no earlier predict wrote, such as a reference or a list of another tool.

    Args:
        path: What would be written.
        record: The JSON file that shows who wrote ``path``; may be ``path`` itself.
        keys: What predict always tells there.

    Raises:
        MedmomError: Either file is there, and ``record`` does not tell that.
    """
    if not _is_there(path) and not _is_there(record):
        return
    try:
        about = read_json(record)
    except (MedmomError, ValueError, RecursionError):
        about = None
    if not (isinstance(about, dict) and keys <= about.keys()):
        found = path if _is_there(path) else record
        raise MedmomError(f"{found}: exists and was not written by medmom predict. Move it, or name another output.")


def _is_there(path: Path) -> bool:
    """Whether there is anything of this name; a link to nothing may lead to a disk that is not there today."""
    return path.is_symlink() or path.exists()


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino
