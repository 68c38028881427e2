"""Which images are to be classified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medmom.data.casefiles import CaseFiles
from medmom.data.class_layouts import find_class_cases
from medmom.data.files import is_image, read_json
from medmom.errors import MedmomError
from medmom.inference.inputs import find_inputs, validation_cases
from medmom.package import package_folder


def find_class_inputs(inputs: Sequence[str | Path], num_channels: int) -> list[CaseFiles]:
    """Turns files, folders and globs into cases, as ``find_inputs`` does, and knows two more kinds of input.

    A folder without an image stands for those in the folders directly in it, such as one for each class; where two
    of them hold the same name, the folder's name stands before it (``liver-0001``). An ``.npz`` file stands for all
    the images in it, which come last. What the images are of is known of ``.npz`` files alone.

    Args:
        inputs: Paths and globs.
        num_channels: Image channels that the model takes.

    Returns:
        Cases, at least one, each with a name of its own.

    Raises:
        MedmomError: As ``find_inputs``.
    """
    plain: list[str | Path] = []
    cases: list[CaseFiles] = []
    packed: list[CaseFiles] = []
    for given in inputs:
        below = _folders_below(Path(given))
        if Path(given).suffix.lower() == ".npz" and Path(given).is_file():
            packed += find_class_cases(given).cases
        elif below:
            cases += _in_folders(below, num_channels)
        else:
            plain.append(given)
    if plain or not inputs:
        cases = find_inputs(plain, num_channels) + cases
    cases += packed
    _check_names(cases)
    return cases


def class_validation_cases(model: str | Path) -> list[CaseFiles]:
    """Gives the cases that a run was validated on, with their classes, as ``validation_cases`` does.

    Raises:
        MedmomError: As ``validation_cases``.
    """
    cases = validation_cases(model)
    package = package_folder(model)
    run = Path(model) if package is None else package.resolve().parent
    entries = {str(entry["name"]): entry for entry in read_json(run / "split.json")["validation"]}
    known = []
    for case in cases:
        classes, item = (entries[case.name].get(key) for key in ("classes", "item"))
        known.append(replace(case, classes=None if classes is None else tuple(map(str, classes)), item=item))
    return known


def _folders_below(folder: Path) -> list[Path]:
    """Folders with images directly in a folder that has none itself."""
    try:
        if not folder.is_dir() or _has_image(folder):
            return []
        return [path for path in sorted(folder.iterdir()) if path.is_dir() and _is_seen(path) and _has_image(path)]
    except OSError as error:
        raise MedmomError(f"{folder}: cannot be read ({error.strerror}). Check path and permissions.") from error


def _has_image(folder: Path) -> bool:
    return any(is_image(path) and _is_seen(path) and not path.is_dir() for path in folder.iterdir())


def _is_seen(path: Path) -> bool:
    return not path.name.startswith(".")


def _in_folders(folders: Sequence[Path], num_channels: int) -> list[CaseFiles]:
    found = [(folder.name, case) for folder in folders for case in find_inputs([folder], num_channels)]
    if len({case.name for _, case in found}) == len(found):
        return [case for _, case in found]
    names = [f"{folder}-{case.name}" for folder, case in found]
    return [replace(case, name=name, group=name) for name, (_, case) in zip(names, found, strict=True)]


def _check_names(cases: Sequence[CaseFiles]) -> None:
    seen: dict[str, CaseFiles] = {}
    for case in cases:
        other = seen.setdefault(case.name, case)
        if other is not case:
            raise MedmomError(
                f"{case.images[0]}: {other.images[0]} has the same name {case.name}, and so would its row. "
                "Rename one, or predict them apart."
            )
