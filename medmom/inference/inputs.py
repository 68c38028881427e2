from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from medmom.data.case import CaseFiles
from medmom.data.files import (
    find_series,
    is_image,
    is_picture,
    is_series,
    picture_channels,
    read_json,
    series_name,
    series_paths,
    stem,
    volumes_of_study,
)
from medmom.errors import MedmomError
from medmom.inference.table_inputs import cases_of_table, is_case_table
from medmom.package import package_folder

CHANNEL_FILE = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
"""Stem of nnU-Net's channel files: ``case_0000``, ``case_0001``."""

MAX_DEPTH = 3
"""A study's DICOM series may lie so many folders below it."""

Channels = dict[int, Path]
SeriesPaths = dict[Path, dict[str, Path]]


def find_inputs(inputs: Sequence[str | Path], num_channels: int) -> list[CaseFiles]:
    """Turns files, folders, globs and CSV files into cases, in the order given; a file given twice counts once.

    A folder stands for the images that lie directly in it; where there are none, for the DICOM series in the folders
    below it, three deep. A DICOM series is one case, however many of its files are given, and has the name of its
    folder; where several lie there, with the series number, and where folders share a name, with that of the folder
    above. A multi-frame file that is given itself has its own name. nnU-Net's channel files (``case_0000.nii.gz``,
    ``case_0001.nii.gz``) are one case named ``case``: always where the model takes several channels; where it takes
    one, only if every file is named so and every case has the same channels (``patient_0001`` to ``patient_0100``
    are a hundred cases). A channel file that is missing is named when the case is read. Pictures are one case together
    only where they are grey and as many as the model's channels, from 0000 on; one picture with all channels that is
    named ``case_0000`` is ``case`` where all are named so.

    A CSV file stands for the cases in its rows (see ``cases_of_table``), which come last; what lies in a row is not
    taken again for being given as a file.

    Args:
        inputs: Paths and globs. A path that does not exist is a case that cannot be read.
        num_channels: Image channels that the model takes.

    Returns:
        Cases, at least one; without label, unless a CSV file names it.

    Raises:
        MedmomError: Nothing is given, a folder has no image, a glob matches nothing, a CSV file is not of the form, or
            two cases have one name.
    """
    if not inputs:
        raise MedmomError("no input is given. Name image files, folders, globs or a CSV file, or --fold validation.")
    files: dict[Path, Path] = {}
    known_series: SeriesPaths = {}
    for given in inputs:
        try:
            # The folder alone is resolved: two links to one file are two cases, with names of their own.
            for found in _expand(str(given)):
                path = _series_path(found, known_series)
                files.setdefault(_place(path), path)
        except OSError as error:
            raise MedmomError(f"{given}: cannot be read ({error.strerror}). Check path and permissions.") from error
    listed = [case for path in files.values() if is_case_table(path) for case in cases_of_table(path)]
    listed = [_with_series(case, known_series) for case in listed]
    known = {_place(image) for case in listed for image in case.images}
    plain = [path for place, path in files.items() if not is_case_table(path) and place not in known]
    cases = [*_cases(plain, num_channels), *listed]
    _check_names(cases)
    return cases


def asks_for_validation(inputs: Sequence[str | Path], fold: str | None) -> bool:
    """Whether the validation cases of a run are asked for, rather than inputs.

    Raises:
        MedmomError: The fold is unknown, or inputs are given besides it.
    """
    if fold is None:
        return False
    if fold != "validation":
        raise MedmomError(f"fold {fold}: unknown. Give validation.")
    if inputs:
        raise MedmomError(f"{inputs[0]}: an input besides --fold. Give one of the two.")
    return True


def validation_cases(model: str | Path) -> list[CaseFiles]:
    """Gives the cases of the fold that a run was validated on, from its ``split.json``.

    Args:
        model: The run folder, or the package in it.

    Raises:
        MedmomError: There is no ``split.json``, or no validation case in it.
    """
    package = package_folder(model)
    run = Path(model) if package is None else package.resolve().parent
    path = run / "split.json"
    if not path.is_file():
        raise MedmomError(f"{path}: there is no such file. --fold needs the run folder of medmom train as model.")
    split = read_json(path)
    try:
        cases = [_validation_case(entry) for entry in split["validation"]]
    except (KeyError, TypeError) as error:
        raise MedmomError(
            f"{path}: not as medmom train writes it ({error!r}). Restore it, or name the inputs."
        ) from error
    if not cases:
        raise MedmomError(f"{path}: lists no validation case. Name the inputs instead of --fold.")
    _check_names(cases)
    return cases


def _place(path: Path) -> Path:
    return path.parent.resolve() / path.name


def _expand(given: str) -> list[Path]:
    """Files of one input, each as it was written."""
    path = Path(given)
    if path.is_dir():
        return _images(path)
    if path.exists() or path.is_symlink() or not glob.has_magic(given):
        return [path]
    found = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 - a Path would change what the pattern says
    if not found:
        raise MedmomError(f"{given}: no file matches. Check the pattern.")
    return [file for match in found for file in _expand(match)]


def _images(folder: Path) -> list[Path]:
    # Broken links stay in the list: what a folder shows must not vanish without a word.
    entries = sorted(folder.iterdir())
    shown = [path for path in entries if _is_shown(path) and not path.is_dir()]
    images = [path for path in shown if not is_series(path)]
    images += _series_in(folder) if len(images) < len(shown) else []
    images = images or volumes_of_study(folder, _series_below(folder, MAX_DEPTH))
    if images:
        return images
    below = [path for path in entries if path.is_dir() and any(map(_is_shown, path.iterdir()))]
    hint = f"Give {below[0]}." if below else "Give another folder; convert other formats first."
    raise MedmomError(f"{folder}: there is no DICOM series, no NIfTI image and no picture in this folder. {hint}")


def _is_shown(path: Path) -> bool:
    return is_image(path) and not path.name.startswith(".")


def _series_in(folder: Path) -> list[Path]:
    """The series of a folder; the folder itself where they cannot be told, so that reading it names the reason."""
    try:
        return find_series(folder)
    except MedmomError:
        return [folder]


def _series_below(folder: Path, depth: int) -> list[Path]:
    found: list[Path] = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        with suppress(PermissionError):
            if any(path.is_file() and _is_shown(path) and is_series(path) for path in inner.iterdir()):
                found += _series_in(inner)
            if depth > 1:
                found += _series_below(inner, depth - 1)
    return found


def _series_path(path: Path, known: SeriesPaths) -> Path:
    """The path that a file's series goes by; of all else the path itself."""
    if path.is_dir() or not is_series(path):
        return path
    if path.parent not in known:
        known[path.parent] = {}
        # Reading the case will name what is wrong.
        with suppress(MedmomError):
            known[path.parent] = series_paths(path.parent)
    return known[path.parent].get(path.name, path)


def _with_series(case: CaseFiles, known: SeriesPaths) -> CaseFiles:
    """A case of a table, its series by the paths and names that they would have if given as files."""
    images = tuple(_series_path(path, known) for path in case.images)
    if not is_series(images[0]) or case.name != stem(case.images[0]):
        return replace(case, images=images)
    name = _series_name(images[0])
    return replace(case, images=images, name=name, group=name if case.group == case.name else case.group)


def _series_name(path: Path) -> str:
    try:
        return series_name(path)
    except MedmomError:
        return stem(path)


def _series_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Names of series; where several have one name, that of the folder above comes first."""
    names = {path: _series_name(path) for path in paths}
    for level in range(MAX_DEPTH):
        counts = Counter(names.values())
        for path, name in names.items():
            folder = (path if path.is_dir() else path.parent).resolve()
            if counts[name] > 1 and len(folder.parents) > level and folder.parents[level].name:
                names[path] = f"{folder.parents[level].name}_{name}"
    return names


def _cases(files: Sequence[Path], num_channels: int) -> Iterator[CaseFiles]:
    series = _series_names([path for path in files if is_series(path)])
    groups = _named_by_channel([path for path in files if path not in series], num_channels)
    for path in files:
        if path in series:
            yield CaseFiles(series[path], (path,), None, series[path])
            continue
        key = _channel_key(path)
        group = None if key is None else groups.get(key[:2])
        if key is None or group is None:
            yield CaseFiles(stem(path), (path,), None, stem(path))
        elif path == next(iter(group.values())):
            name = key[1]
            images = (path,) if is_picture(path) and len(group) == 1 else _channel_files(name, group, num_channels)
            yield CaseFiles(name, images, None, name)


def _named_by_channel(files: Sequence[Path], num_channels: int) -> dict[tuple[Path, str], Channels]:
    """Files whose names end in the number of a channel, rather than of a case, by case."""
    groups = _channel_groups(files)
    shared = {tuple(sorted(group)) for group in groups.values()}
    every = sum(map(len, groups.values())) == len(files) and len(shared) == 1
    numbers, has_pictures = next(iter(shared), ()), any(map(is_picture, files))
    if every and numbers == (0,) and (num_channels == 1 or all(map(is_picture, files))):
        return groups
    if num_channels > 1:
        # One file without brothers may hold all channels itself.
        return {key: group for key, group in groups.items() if _is_joined(group, num_channels)}
    in_order = numbers == tuple(range(len(numbers))) and len(groups) > 1
    return groups if every and in_order and not has_pictures else {}


def _is_joined(group: Channels, num_channels: int) -> bool:
    """Whether files with channel numbers are channels of one case; pictures might be frames of a film."""
    if not is_picture(next(iter(group.values()))):
        return 0 in group and len(group) > 1
    return sorted(group) == list(range(num_channels)) and not any(map(_has_colours, group.values()))


def _has_colours(picture: Path) -> bool:
    try:
        return picture_channels(picture) > 1
    except MedmomError:
        # Reading the case will name what is wrong.
        return False


def _channel_groups(files: Sequence[Path]) -> dict[tuple[Path, str], Channels]:
    groups: dict[tuple[Path, str], Channels] = {}
    for path in files:
        key = _channel_key(path)
        if key is not None:
            folder, name, channel = key
            other = groups.setdefault((folder, name), {}).setdefault(channel, path)
            if other != path:
                raise _same_name(stem(path), other, path)
    return groups


def _channel_key(path: Path) -> tuple[Path, str, int] | None:
    match = CHANNEL_FILE.fullmatch(stem(path))
    return (path.parent, match["case"], int(match["channel"])) if match else None


def _channel_files(name: str, group: Channels, num_channels: int) -> tuple[Path, ...]:
    """Channel files in order; one that is missing keeps its place, so that reading names it."""
    first = group[0]
    ending = first.name[len(stem(first)) :]
    count = max(num_channels, max(group) + 1)
    return tuple(group.get(k, first.with_name(f"{name}_{k:04d}{ending}")) for k in range(count))


def _validation_case(entry: Mapping[str, Any]) -> CaseFiles:
    annotated = entry.get("annotated")
    label = entry.get("label")
    return CaseFiles(
        name=str(entry["name"]),
        images=tuple(Path(path) for path in entry["images"]),
        label=None if label is None else Path(label),
        group=str(entry.get("group") or entry["name"]),
        annotated=None if annotated is None else tuple(map(str, annotated)),
    )


def _check_names(cases: Sequence[CaseFiles]) -> None:
    seen: dict[str, CaseFiles] = {}
    for case in cases:
        other = seen.setdefault(case.name, case)
        if other is not case:
            raise _same_name(case.name, other.images[0], case.images[0])


def _same_name(name: str, first: Path, second: Path) -> MedmomError:
    return MedmomError(
        f"{second}: {first} has the same name {name}, and so would its prediction. Rename one, or predict them apart."
    )
