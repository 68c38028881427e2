from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmom.data.atomic import put_back
from medmom.data.case import CaseFiles
from medmom.data.files import Volume, is_picture, read_json, stem, write_json, write_label
from medmom.errors import MedmomError
from medmom.inference.extras import Extras, Wanted
from medmom.inference.manifest import file_sha256
from medmom.inference.output_checks import (
    check_folder,
    check_inputs_are_safe,
    check_is_ours,
    check_kind_of_file,
    check_names_differ,
)
from medmom.inference.ranks import Ranks
from medmom.labels import Labels

LIST, RUN, STATISTICS = "cases.json", "run.json", ("statistics.json", "statistics.csv")

PART = re.compile(r"\.[0-9a-f]{16}(_\d+)?\.part")
"""Names of files that are being written."""

DAY_S = 86_400

MARKS, MARKS_OF_RUN = frozenset({"labels", "model"}), frozenset({"settings", "model", "cases"})
"""What is told in every JSON file of predict: in sidecars and lists, and in what a run tells of itself."""

FILE_SUFFIXES = (".nii", ".nii.gz", ".png")


@dataclass(frozen=True)
class Outputs:
    """Where the files of some cases go.

    Attributes:
        predictions: One path a case.
        listing: Path of the list of cases; None where the output is one file.
        extras: What each case gets beside label map and sidecar.
    """

    predictions: tuple[Path, ...]
    listing: Path | None
    extras: tuple[Extras, ...]

    def also(self, index: int) -> tuple[Path, ...]:
        """Gives what a case gets beside label map and sidecar."""
        return self.extras[index].paths

    def manifest(self, ranks: Ranks) -> Path | None:
        """Gives the path of what a process tells of its run; None where the output is one file."""
        if self.listing is None:
            return None
        return self.listing.with_name(RUN if ranks.world_size == 1 else f"{stem(RUN)}-{ranks.rank}.json")


def plan_outputs(
    cases: Sequence[CaseFiles],
    out: Path,
    *,
    wanted: Wanted | None = None,
    classes: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> Outputs:
    """Decides where predictions go, and refuses before any work what could not, or must not, be written.

    A folder gets beside the files of each case ``cases.json``, ``run.json`` (``run-0.json``, ``run-1.json``, ... of
    several processes), ``statistics.json`` and ``statistics.csv``.

    Args:
        cases: What is to be predicted.
        out: A file for one case (``.nii`` or ``.nii.gz``, ``.png`` for a picture), else a folder.
        wanted: What each case gets besides; None: nothing.
        classes: Names of the model's, by channel.
        ranks: The place of this process; None: it is alone.

    Returns:
        Paths; nothing is written yet, and no folder made unless there are several processes.

    Raises:
        MedmomError: ``out`` is a file for several cases, cannot be written, is the folder of an input, two outputs
            would have one name, or one would replace an input or anything else that predict did not write.
    """
    try:
        outputs, ranks = _plan(cases, out, wanted or Wanted(), classes), ranks or Ranks()
        owners = _owners(outputs, ranks)
        check_inputs_are_safe(owners, cases)
        for path, record in owners.items():
            check_is_ours(path, record, MARKS_OF_RUN if path == outputs.manifest(ranks) else MARKS)
        folder = out if outputs.listing is not None else out.parent
        if ranks.world_size > 1:
            # A process that takes the folder away again would take it from under another.
            folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError as error:
        raise MedmomError(f"{out}: cannot be written ({error.strerror}). Name another output.") from error
    return outputs


@contextmanager
def claimed(path: Path, about: Mapping[str, Any], *, also: Sequence[Path] = ()) -> Iterator[None]:
    """Marks the place of a prediction as one that a later run may replace, before any file of it is visible.

    Its sidecar is there from now on, without the checksum of a label map: until ``write_prediction`` adds that,
    nobody takes the case for done. Where the work fails, all files are as they were before: what is new is taken away,
    what was replaced put back. Where it ends, those go that an earlier prediction had beside it and this one has not.

    Args:
        path: Of the label map.
        about: What the sidecar tells; ``labels`` and ``model`` at least.
        also: Other files that will be written beside it.

    Raises:
        MedmomError: The place cannot be written.
    """
    sidecar = sidecar_path(path)
    before = _also(path)
    # The sidecar last: without it the others would look like somebody else's.
    with put_back((path, *before, *also, sidecar)):
        write_json(sidecar, {**about, "also": sorted({file.name for file in (*before, *also)})})
        yield
    for file in before:
        if file not in also:
            with suppress(OSError):
                file.unlink(missing_ok=True)


def write_prediction(
    path: Path, label: np.ndarray, labels: Labels, like: Volume, about: Mapping[str, Any], *, also: Sequence[Path] = ()
) -> dict[str, Any]:
    """Writes a label map and, beside it, the JSON file that says where it comes from; both or none.

    Args:
        path: Of the label map.
        label: Stored values, on the grid of ``like``.
        labels: Their names.
        like: The image.
        about: What the sidecar tells.
        also: Other files that were, or will be, written beside it.

    Returns:
        What the sidecar tells: ``about`` with ``prediction_sha256``, the names in ``also`` and, where it has
        ``seconds``, those of writing.

    Raises:
        MedmomError: The place cannot be written.
    """
    started = time.monotonic()
    with claimed(path, about, also=also):
        write_label(path, label, labels, like)
        told = {**about, "also": sorted(file.name for file in also), "prediction_sha256": file_sha256(path)}
        if "seconds" in told:
            told["seconds"] = {**told["seconds"], "write": round(time.monotonic() - started, 3)}
        write_json(sidecar_path(path), told)
    return told


def sweep(folder: Path) -> list[Path]:
    """Takes away what killed runs left half written: files of our temporary names that are older than a day.

    Returns:
        The files that are gone.
    """
    gone = []
    with suppress(OSError):
        for path in folder.iterdir():
            if PART.fullmatch(path.name) and path.is_file() and time.time() - path.stat().st_mtime > DAY_S:
                path.unlink()
                gone.append(path)
    return gone


def sidecar_path(prediction: Path) -> Path:
    """Gives the JSON file beside a label map: ``case.nii.gz`` has ``case.json``."""
    return prediction.with_name(f"{stem(prediction)}.json")


def _also(path: Path) -> list[Path]:
    """Files that an earlier prediction had beside it, as its sidecar says."""
    try:
        about = read_json(sidecar_path(path))
        names = [str(name) for name in about["also"]]
    except (MedmomError, ValueError, KeyError, TypeError, RecursionError):
        return []
    # A changed sidecar must not point at anything else.
    return [path.with_name(name) for name in names if name.startswith(f"{stem(path)}_") and Path(name).name == name]


def _plan(cases: Sequence[CaseFiles], out: Path, wanted: Wanted, classes: Sequence[str]) -> Outputs:
    is_file = out.name.lower().endswith(FILE_SUFFIXES) and not out.is_dir()
    if is_file and len(cases) > 1:
        raise MedmomError(f"{out}: one file for {len(cases)} images. Name a folder.")
    if is_file:
        check_kind_of_file(out, cases[0])
        predictions: tuple[Path, ...] = (out,)
    else:
        check_folder(out, cases)
        predictions = tuple(out / f"{case.name}{_suffix(case)}" for case in cases)
    extras = tuple(wanted.extras(path, classes) for path in predictions)
    outputs = Outputs(predictions, None if is_file else out / LIST, extras)
    named = zip(cases, predictions, strict=True)
    check_names_differ(
        (file, case)
        for index, (case, path) in enumerate(named)
        for file in (path, sidecar_path(path), *outputs.also(index))
    )
    return outputs


def _owners(outputs: Outputs, ranks: Ranks) -> dict[Path, Path]:
    """Gives for each file that will be written the JSON file that shows whether an earlier predict wrote it."""
    owners: dict[Path, Path] = {}
    for index, path in enumerate(outputs.predictions):
        sidecar = sidecar_path(path)
        owners |= dict.fromkeys((path, *outputs.also(index)), sidecar)
    manifest = outputs.manifest(ranks)
    if outputs.listing is not None and manifest is not None:
        for name in (LIST, *STATISTICS):
            owners[outputs.listing.with_name(name)] = outputs.listing
        owners[manifest] = manifest
    return owners


def _suffix(case: CaseFiles) -> str:
    """A picture's label map is a picture, without loss; a volume's keeps its place in space."""
    return ".png" if is_picture(case.images[0]) else ".nii.gz"


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
