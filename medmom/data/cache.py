from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from monai.transforms import Compose
from tqdm import tqdm

from medmom.data.atomic import cache_draft, take_place
from medmom.data.case import Case, CaseFiles, read_case
from medmom.data.files import content_files
from medmom.data.preparation import Preparation
from medmom.data.transforms import PrepareCased, ReadCased, to_case
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import IGNORE, Labels

logger = logging.getLogger(__name__)

T = TypeVar("T")

LAYOUT = 2
"""Number of the layout of an entry; raise it when what is stored changes."""

NUM_LOCATIONS = 10_000
"""Voxels remembered of each case for patch sampling and for intensity statistics."""


@dataclass(frozen=True)
class Survey:
    """What is known of a labelled case before it is prepared.

    Attributes:
        counts: Number of voxels of each channel, on the case's own grid.
        foreground: Intensities of at most 10 000 foreground voxels, drawn at random, of the image's first channel.
    """

    counts: tuple[int, ...]
    foreground: np.ndarray

    @property
    def stratum(self) -> str:
        """Which classes the case holds; folds are balanced by it."""
        return ",".join(str(channel) for channel, count in enumerate(self.counts) if count and channel)


@dataclass(frozen=True)
class PreparedCase:
    """A case on the working grid, on disk.

    Attributes:
        name: Name of the case.
        entry: Where its arrays lie.
    """

    name: str
    entry: Entry

    @property
    def fingerprint(self) -> str:
        """Checksum of the prepared image: two cases that have the same are the same scan."""
        return str(self.entry.checksums()["image"])

    def open(self) -> tuple[Case, np.ndarray, np.ndarray]:
        """Maps the arrays into memory; what is not touched is not read.

        Returns:
            The case; flat indices of foreground voxels, in which every class present has an equal share (those of
            all voxels where there is no foreground); flat indices of voxels drawn evenly from all that count.
        """
        # Opened anew each time: a mapping holds a file descriptor, and a thousand cases would use them up.
        arrays = self.entry.load()
        geometry = Geometry(arrays["image"].shape[1:], np.array(arrays["affine"]))
        annotated = tuple(bool(flag) for flag in arrays["annotated"])
        case = Case(self.name, arrays["image"], arrays["label"], geometry, annotated)
        anywhere = np.asarray(arrays["anywhere"])
        return case, np.asarray(arrays["foreground"]) if arrays["foreground"].size else anywhere, anywhere


class CaseCache:
    """Surveys and prepared cases on disk, each with a checksum, each rebuilt when it is corrupt or stale.

    An entry's folder is named by a hash of all that it depends on: the source files (path, size, time of
    change), the labels, the preparation and the layout. Another preparation or a touched file is another entry;
    an entry whose arrays do not match their checksums is made anew. Arrays are plain ``.npy`` files that are
    mapped into memory, so that a patch costs no more than its own voxels.
    """

    def __init__(self, folder: Path, labels: Labels, *, quiet: bool = False) -> None:
        self.folder = folder
        self.labels = labels
        self.quiet = quiet

    def survey(self, cases: Sequence[CaseFiles]) -> dict[str, Survey]:
        """Counts classes and samples foreground intensities of labelled cases, by case name."""
        return dict(zip((c.name for c in cases), self._each(cases, self._survey, "Surveying"), strict=True))

    def prepare(self, cases: Sequence[CaseFiles], preparation: Preparation) -> list[PreparedCase]:
        """Gives cases on the working grid, in the order asked for; builds what is not there yet."""
        return self._each(cases, lambda files: self._prepared(files, preparation), "Preparing")

    def _each(self, cases: Sequence[CaseFiles], work: Callable[[CaseFiles], T], what: str) -> list[T]:
        # Threads, not processes: an exception arrives whole, and nobody dies unseen. Two: a large CT takes gigabytes.
        with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
            results = pool.map(work, cases)
            return list(tqdm(results, desc=what, total=len(cases), unit="case", disable=self.quiet, leave=False))

    def _survey(self, files: CaseFiles) -> Survey:
        entry = Entry.of(self.folder / "surveys", files, self.labels)
        if not entry.is_sound():
            entry.write(_survey_arrays(read_case(files, self.labels), self.labels.num_channels))
        arrays = entry.load()
        return Survey(tuple(int(n) for n in arrays["counts"]), np.array(arrays["foreground"]))

    def _prepared(self, files: CaseFiles, preparation: Preparation) -> PreparedCase:
        entry = Entry.of(self.folder / "cases", files, self.labels, asdict(preparation))
        if not entry.is_sound():
            entry.write(_case_arrays(self._prepare_anew(files, preparation)))
        return PreparedCase(files.name, entry)

    def _prepare_anew(self, files: CaseFiles, preparation: Preparation) -> Case:
        pipeline = Compose([ReadCased(self.labels), PrepareCased(preparation)])
        try:
            return to_case(pipeline(files))
        except RuntimeError as error:
            # Compose says which transform failed and keeps what it said itself as the cause.
            if isinstance(error.__cause__, MedmomError):
                raise error.__cause__ from None
            raise


@dataclass(frozen=True)
class Entry:
    """One folder of arrays with their checksums.

    Attributes:
        folder: Where the arrays lie; named by a hash of all that they depend on.
    """

    folder: Path

    @classmethod
    def of(cls, folder: Path, files: CaseFiles, labels: Labels, *settings: dict[str, Any]) -> Self:
        """Names the entry of a case by its files, labels and settings."""
        paths = [*files.images, *([files.label] if files.label else [])]
        sources = [_identity(half) for path in paths for half in content_files(path)]
        key = json.dumps([LAYOUT, sources, files.annotated, labels.as_dict(), *settings], sort_keys=True)
        return cls(folder / hashlib.sha256(key.encode()).hexdigest()[:24])

    def is_sound(self) -> bool:
        """Whether the entry is there and every array matches its checksum."""
        try:
            known = self.checksums()
            if known and all(_checksum(self.folder / f"{name}.npy") == value for name, value in known.items()):
                return True
            logger.warning("%s: an array does not match its checksum; the entry is rebuilt", self.folder)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s: %s; the entry is rebuilt", self.folder, error)
        return False

    def checksums(self) -> dict[str, str]:
        """Gives the checksum of every array, as they were when the entry was written."""
        return dict(json.loads((self.folder / "index.json").read_text(encoding="utf-8")))

    def load(self) -> dict[str, np.ndarray]:
        """Maps every array into memory, copy-on-write."""
        return {
            name: np.load(self.folder / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in self.checksums()
        }

    def write(self, arrays: dict[str, np.ndarray]) -> None:
        """Stores the arrays; the folder appears at once or not at all.

        Raises:
            MedmomError: The folder cannot be written.
        """
        with cache_draft(self.folder) as draft:
            for name, array in arrays.items():
                np.save(draft / f"{name}.npy", array, allow_pickle=False)
            checksums = {name: _checksum(draft / f"{name}.npy") for name in arrays}
            (draft / "index.json").write_text(json.dumps(checksums), encoding="utf-8")
            # Another run may have built the same entry meanwhile, and read from it already: leave it alone.
            if not take_place(draft, self.folder) and not self.is_sound():
                with cache_draft(self.folder) as aside, suppress(FileNotFoundError):
                    self.folder.rename(aside / "damaged")
                take_place(draft, self.folder)


def _identity(path: Path) -> list[str | int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise MedmomError(f"{path}: {error.strerror}; put the file back where it was.") from None
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _survey_arrays(case: Case, num_channels: int) -> dict[str, np.ndarray]:
    label = _labelled(case)
    counts = np.bincount(label[label != IGNORE], minlength=num_channels)
    places = np.flatnonzero((label != IGNORE) & (label != 0))
    places = _draw(places, NUM_LOCATIONS, np.random.default_rng(0))
    return {"counts": counts, "foreground": case.image[0].reshape(-1)[places]}


def _case_arrays(case: Case) -> dict[str, np.ndarray]:
    label = _labelled(case).reshape(-1)
    if (label == IGNORE).all():
        raise MedmomError(f"case {case.name}: every voxel of its label is to be ignored; annotate it, or take it out.")
    rng = np.random.default_rng(0)
    present = [k for k in np.unique(label) if k not in (0, IGNORE)]
    per_class = [_draw(np.flatnonzero(label == k), NUM_LOCATIONS // len(present), rng) for k in present]
    # A rare class has fewer voxels than its share: repeat them, so that the classes stay equally likely.
    most = max((len(places) for places in per_class), default=0)
    foreground = [np.resize(places, most) for places in per_class]
    return {
        "image": case.image,
        "label": _labelled(case),
        "affine": case.geometry.affine,
        "annotated": np.array(case.annotated, dtype=bool),
        "foreground": np.concatenate([np.zeros(0, np.int64), *foreground]),
        "anywhere": _draw(np.flatnonzero(label != IGNORE), NUM_LOCATIONS, rng),
    }


def _labelled(case: Case) -> np.ndarray:
    if case.label is None:
        raise MedmomError(f"case {case.name} has no label; training needs one. Add it, or take the image out.")
    return case.label


def _draw(places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return places if len(places) <= count else np.sort(rng.choice(places, count, replace=False))
