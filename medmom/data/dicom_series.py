"""The DICOM series that lie in a folder, and which of them are images to segment."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from medmom.data.dicom_headers import SUFFIXES, FileHeader, has_mark, read_header
from medmom.errors import MedmomError

logger = logging.getLogger(__name__)

# What lists the files of a disc, and none of them.
DIRECTORY = "DICOMDIR"


@dataclass(frozen=True)
class Series:
    """A series as it lies in its folder.

    Attributes:
        files: By name.
    """

    files: tuple[FileHeader, ...]

    @property
    def is_multiframe(self) -> bool:
        """Whether it is one file of several planes."""
        return len(self.files[0].frames) > 1

    @property
    def is_volume(self) -> bool:
        """Whether it is an image of more than one plane, and no localiser."""
        return self.files[0].kind == "image" and sum(len(file.frames) for file in self.files) > 1

    @property
    def kind(self) -> str:
        """What it is, in words."""
        kind = self.files[0].kind
        return kind if kind != "image" or self.is_volume else "single image"


def is_dicom(path: str | Path) -> bool:
    """Whether a file is one of DICOM: by its suffix (``.dcm``, ``.dicom``, ``.ima``), or by the mark at byte 128."""
    path = Path(path)
    return path.name != DIRECTORY and (path.suffix.lower() in SUFFIXES or has_mark(path))


def find_series(folder: str | Path) -> list[Path]:
    """Finds the DICOM series that lie directly in a folder, one path each.

    Where a volume lies in it, whatever is none is left out, and told in one line by kind and number: segmentations,
    reports, contours, localisers, single images.

    Args:
        folder: The folder.

    Returns:
        The folder itself where it holds one series alone, else the first file of each series by name; nothing where it
        holds no DICOM file.

    Raises:
        MedmomError: A DICOM file is damaged, or the optional reader is not installed.
    """
    folder = Path(folder)
    every = _all_series(folder)
    chosen = _volumes(every)
    _tell_left_out(folder, [series for series in every if series not in chosen])
    return [folder] if len(chosen) == 1 else [series.files[0].path for series in chosen]


def volumes_of_study(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Leaves out series that are no volumes, where others of a study are, and tells it as ``find_series`` does.

    Args:
        folder: Of the study, for the line.
        paths: What ``find_series`` gave for the folders in it; one that cannot be read stays.
    """
    others: dict[Path, Series] = {}
    for path in paths:
        # Reading the case will name what is wrong.
        with suppress(MedmomError):
            if not (series := series_at(path)).is_volume:
                others[path] = series
    if len(others) == len(paths):
        return list(paths)
    _tell_left_out(folder, list(others.values()))
    return [path for path in paths if path not in others]


def series_paths(folder: str | Path) -> dict[str, Path]:
    """Gives, for the name of each DICOM file in a folder, the path that its series goes by.

    A multi-frame file goes by itself, a series that is alone in its folder by the folder, any other by its first file.

    Raises:
        MedmomError: As ``find_series``.
    """
    folder = Path(folder)
    every = _all_series(folder)
    chosen = _volumes(every)
    paths: dict[str, Path] = {}
    for series in every:
        first = series.files[0].path
        path = folder if chosen == [series] and not series.is_multiframe else folder / first.name
        paths |= {file.path.name: path for file in series.files}
    return paths


def series_at(path: str | Path) -> Series:
    """Gives the series that a path stands for: a folder's only one, or the one that a file belongs to.

    Raises:
        MedmomError: There is none or several, or a file beside it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise MedmomError(f"{path}: no such file. Check the path.")
        every = _all_series(path.parent)
        found = next((series for series in every if any(file.path.name == path.name for file in series.files)), None)
        # A hidden file is in no listing.
        return found or Series((read_header(path),))
    chosen = _volumes(_all_series(path))
    if not chosen:
        raise MedmomError(f"{path}: a folder, and no DICOM series lies in it. Give an image file, or such a folder.")
    if len(chosen) > 1:
        raise MedmomError(
            f"{path}: {len(chosen)} DICOM series lie in this folder. Give a file of the one that is meant, such as "
            f"{chosen[0].files[0].path.name}."
        )
    return chosen[0]


def series_name(path: str | Path) -> str:
    """Gives the name of a series' case: its folder's; of a multi-frame file its own, where the file is given.

    Where several volumes lie in the folder, the series number follows, and where two have one number, their place.
    """
    path = Path(path)
    if path.is_dir():
        return _own_name(path)
    series, chosen = series_at(path), _volumes(_all_series(path.parent))
    if series.is_multiframe:
        return path.stem if path.suffix.lower() in SUFFIXES else path.name
    folder = _own_name(path.parent)
    if len(chosen) < 2 or series not in chosen:
        return folder
    number = _plain(series.files[0].number)
    twins = [other for other in chosen if _plain(other.files[0].number) == number and not other.is_multiframe]
    return f"{folder}_{number}" if len(twins) == 1 else f"{folder}_{number}-{twins.index(series) + 1}"


def _tell_left_out(folder: Path, left: Sequence[Series]) -> None:
    counts = sorted(Counter(series.kind for series in left).items())
    if counts:
        logger.info("%s: left out, no volumes: %s.", folder, ", ".join(f"{count} {kind}" for kind, count in counts))


def _own_name(folder: Path) -> str:
    """The name of a folder as it was given, a link's too; the true one of such as ``..``."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def _plain(number: str) -> str:
    return re.sub(r"\W", "", number, flags=re.ASCII) or "0"


def _volumes(every: Sequence[Series]) -> list[Series]:
    """What is to be segmented: volumes, where there are any; else single images, else localisers, else the rest."""
    for chosen in (
        [series for series in every if series.is_volume],
        [series for series in every if series.files[0].kind == "image"],
        [series for series in every if series.files[0].frames],
    ):
        if chosen:
            return chosen
    return list(every)


def _all_series(folder: Path) -> list[Series]:
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
        stamps = [(path.name, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in files]
    except OSError as error:
        raise MedmomError(f"{folder}: cannot be listed ({error.strerror}). Check its permissions.") from error
    return list(_grouped(folder, tuple(stamps)))


@lru_cache(maxsize=8)
def _grouped(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> tuple[Series, ...]:
    """Reads the headers of a folder once, as long as no file changes."""
    groups: dict[tuple[str, ...], list[FileHeader]] = {}
    paths = [path for path in (folder / name for name, _, _ in stamps) if is_dicom(path)]
    # A suffix alone makes no series; beside true files it shows one that is damaged.
    for path in paths if any(map(has_mark, paths)) else []:
        file = read_header(path)
        own = (path.name,) if len(file.frames) > 1 else ()
        groups.setdefault((file.series, file.kind, *own), []).append(file)
    return tuple(Series(tuple(files)) for files in groups.values())
