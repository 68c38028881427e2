from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmom.data.case import CaseFiles
from medmom.data.files import Volume, is_picture, read_json, stem, write_json, write_label
from medmom.errors import MedmomError
from medmom.labels import Labels

LIST = "cases.json"

FILE_SUFFIXES = (".nii", ".nii.gz", ".png")

OTHER_SUFFIXES = (
    *(".hdr", ".img", ".gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".dcm", ".json"),
    *(".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"),
    *(".csv", ".tsv", ".txt", ".xlsx", ".npz", ".npy", ".html", ".pdf", ".yaml", ".zip"),
)
"""Names that say an output file is meant, of a kind that is not written."""


@dataclass(frozen=True)
class Outputs:
    """Where the label maps of some cases go.

    Attributes:
        predictions: One path a case.
        listing: Path of the list of cases; None where the output is one file.
    """

    predictions: tuple[Path, ...]
    listing: Path | None


def plan_outputs(cases: Sequence[CaseFiles], out: Path) -> Outputs:
    """Decides where predictions go, and refuses before any work what could not, or must not, be written.

    Args:
        cases: What is to be predicted.
        out: A file for one case (``.nii`` or ``.nii.gz``, ``.png`` for a picture), else a folder.

    Returns:
        Paths; nothing is written yet, and no folder made.

    Raises:
        MedmomError: ``out`` is a file for several cases, cannot be written, is the folder of an input, or an
            output would replace an input or anything else that predict did not write.
    """
    try:
        return _plan(cases, out)
    except OSError as error:
        raise MedmomError(f"{out}: cannot be written ({error.strerror}). Name another output.") from error


def write_prediction(path: Path, label: np.ndarray, labels: Labels, like: Volume, about: dict[str, Any]) -> None:
    """Writes a label map and, beside it, the JSON file that says where it comes from; both or none.

    Args:
        path: Of the label map.
        label: Stored values, on the grid of ``like``.
        labels: Their names.
        like: The image.
        about: What the sidecar tells.

    Raises:
        MedmomError: The place cannot be written.
    """
    sidecar = sidecar_path(path)
    is_new = not sidecar.exists()
    # The sidecar comes first: it marks the label map as one that a later run may replace.
    write_json(sidecar, about)
    try:
        write_label(path, label, labels, like)
    except MedmomError:
        if is_new:
            sidecar.unlink(missing_ok=True)
        raise


def sidecar_path(prediction: Path) -> Path:
    """Gives the JSON file beside a label map: ``case.nii.gz`` has ``case.json``."""
    return prediction.with_name(f"{stem(prediction)}.json")


def _plan(cases: Sequence[CaseFiles], out: Path) -> Outputs:
    is_file = out.name.lower().endswith(FILE_SUFFIXES) and not out.is_dir()
    if is_file and len(cases) > 1:
        raise MedmomError(f"{out}: one file for {len(cases)} images. Name a folder.")
    if is_file:
        _check_kind(out, cases[0])
        outputs = Outputs((out,), None)
    else:
        _check_folder(out, cases)
        outputs = Outputs(tuple(out / f"{case.name}{_suffix(case)}" for case in cases), out / LIST)
    _check_inputs_are_safe(outputs, cases)
    for path in outputs.predictions:
        _check_is_ours(path, sidecar_path(path))
    if outputs.listing is not None:
        _check_is_ours(outputs.listing, outputs.listing)
    check_writable(out.parent if is_file else out)
    return outputs


def _suffix(case: CaseFiles) -> str:
    """A picture's label map is a picture, without loss; a volume's keeps its place in space."""
    return ".png" if is_picture(case.images[0]) else ".nii.gz"


def _check_kind(out: Path, case: CaseFiles) -> None:
    if is_picture(out) != is_picture(case.images[0]):
        wanted, kind = (".png", "a picture") if is_picture(case.images[0]) else (".nii.gz or .nii", "a NIfTI image")
        raise MedmomError(
            f"{out}: label maps are written as {wanted} for {kind} such as {case.images[0].name}. Name such a file."
        )


def _check_folder(out: Path, cases: Sequence[CaseFiles]) -> None:
    if not out.is_dir() and out.suffix.lower() in OTHER_SUFFIXES:
        raise MedmomError(
            f"{out}: label maps are written as .nii.gz or .nii, of pictures as .png. Name such a file, or a folder."
        )
    if out.exists() and not out.is_dir():
        raise MedmomError(f"{out}: this is a file. Name a folder, or a .nii.gz (picture: .png) file for one image.")
    for case in cases:
        if Path(case.name).name != case.name or case.name == stem(LIST):
            raise MedmomError(f"{case.images[0]}: a prediction cannot be named {case.name!r}. Rename the case.")
        if out.is_dir() and any(path.parent.is_dir() and out.samefile(path.parent) for path in case.images):
            raise MedmomError(
                f"{out}: the folder of the input {case.images[0].name}; predictions have the names of their images. "
                "Name another folder."
            )


def _check_inputs_are_safe(outputs: Outputs, cases: Sequence[CaseFiles]) -> None:
    inputs = {_identity(path): path for case in cases for path in (*case.images, case.label) if path and path.exists()}
    planned = [path for prediction in outputs.predictions for path in (prediction, sidecar_path(prediction))]
    for path in planned:
        # By device and number, so that links to an input are found too.
        if path.exists() and _identity(path) in inputs:
            raise MedmomError(f"{path}: the output would replace the input {inputs[_identity(path)]}. Name another.")


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _check_is_ours(path: Path, record: Path) -> None:
    """Refuses to replace a file that no earlier predict wrote, such as a reference or a list of another tool."""
    if not path.exists() and not record.exists():
        return
    try:
        about = read_json(record)
    except MedmomError:
        about = None
    if not (isinstance(about, dict) and {"labels", "model"} <= about.keys()):
        found = path if path.exists() else record
        raise MedmomError(f"{found}: exists and was not written by medmom predict. Move it, or name another output.")


def check_writable(folder: Path) -> None:
    """Makes the folder and a file in it, and takes both away again; OSError where that cannot be."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()
