"""What is known of every classified image before training: its content, its grey values, its twins."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medmom.data.atomic import atomic_file
from medmom.data.casefiles import CaseFiles
from medmom.data.class_images import each, identity, read_class_case, unpack_all
from medmom.data.class_items import open_items
from medmom.data.folds import Split
from medmom.errors import MedmomError

logger = logging.getLogger(__name__)

LAYOUT = 1
"""Number of the layout of the survey file; raise it when what is stored changes."""

NUM_VALUES = {"picture": 16, "volume": 1000}
"""Grey values remembered of each image."""

AIR = -500.0
"""Hounsfield units below which there is no body."""

BATCH = 4096
"""Images between which nothing is waited for; a file of results is written at least every 16 of them."""


@dataclass(frozen=True, eq=False)
class ClassSurvey:
    """What is known of an image before it is prepared.

    Attributes:
        fingerprint: Checksum of the decoded voxels and their shape: images that have the same are the same.
        shape: Channels, and voxels along the axes from left to right, to the front and to the top; (C, X, Y, Z).
        summary: Lowest value, 1, 50 and 99 percentile, highest value, and the share of voxels that have the lowest
            value, float32, shape (6,).
        values: Some grey values of the first channel, drawn at random, float32; those of the body where any lies above
            -500, which is the border to air in a CT.
        path: The file, the first of several.
    """

    fingerprint: str
    shape: tuple[int, int, int, int]
    summary: np.ndarray
    values: np.ndarray
    path: Path = Path()

    @property
    def num_channels(self) -> int:
        """Number of channels as they are in the file."""
        return self.shape[0]


def survey_classes(cases: Sequence[CaseFiles], cache_folder: Path, *, quiet: bool) -> dict[str, ClassSurvey]:
    """Reads every image once, and remembers what was found in one file for the whole data folder.

    Args:
        cases: Which.
        cache_folder: Where the file lies.
        quiet: Whether to leave out the progress bar.

    Returns:
        By case name.

    Raises:
        MedmomError: An image cannot be read, or the cache cannot be written. What was read until then is remembered.
    """
    if not cases:
        return {}
    keys = [_key(case) for case in cases]
    path = cache_folder / "class-surveys" / f"{_folder_key(cases)}.npz"
    known = _load(path)
    todo = [(key, case) for key, case in zip(keys, cases, strict=True) if key not in known]
    items = unpack_all([case for _, case in todo], cache_folder)
    fresh = 0
    try:
        for start in range(0, len(todo), BATCH):
            part = todo[start : start + BATCH]
            share = f" {start}-{start + len(part)} of {len(todo)}" if len(todo) > BATCH else ""
            found = each(
                [case for _, case in part],
                lambda case: _survey(case, items.get(case.name)),
                f"Reading{share}",
                quiet=quiet,
            )
            known |= zip([key for key, _ in part], found, strict=True)
            fresh += len(part)
            if fresh >= 16 * BATCH:
                _store(path, known, keys)
                fresh = 0
    finally:
        if fresh:
            _store(path, known, keys)
    return {case.name: replace(known[key], path=case.images[0]) for key, case in zip(keys, cases, strict=True)}


def check_duplicates(surveys: Mapping[str, ClassSurvey], split: Split, cases: Sequence[CaseFiles]) -> tuple[str, ...]:
    """Demands that no image is trained on and validated on, under two names.

    Args:
        surveys: By case name.
        split: Who trains and who validates.
        cases: All cases of the split.

    Returns:
        Lines on images that occur more than once elsewhere, and on those whose classes differ.

    Raises:
        MedmomError: The same image is on both sides.
    """
    training, validation = set(split.train), set(split.validation)
    twins: dict[str, list[CaseFiles]] = defaultdict(list)
    for case in cases:
        if case.name in training or case.name in validation:
            twins[surveys[case.name].fingerprint].append(case)
    several = [found for found in twins.values() if len(found) > 1]
    crossing = [found for found in several if {case.name in training for case in found} == {True, False}]
    if crossing:
        seen = next(case for case in crossing[0] if case.name in training)
        again = next(case for case in crossing[0] if case.name in validation)
        raise MedmomError(
            f"{_spelt(again)} (validation) holds the same image as {_spelt(seen)} (training), one of {len(crossing)} "
            "such pairs. Give both one patient, or leave one out with --data.leave_out."
        )
    notes = []
    if several:
        notes.append(f"{len(several)} images occur more than once, such as {_pair(several[0])}")
    differing = [found for found in several if len({case.classes for case in found}) > 1]
    if differing:
        notes.append(f"{len(differing)} images are listed under different classes, such as {_pair(differing[0])}")
    return tuple(notes)


def _spelt(case: CaseFiles) -> str:
    return str(case.images[0]) if case.item is None else f"{case.images[0]} item {case.item}"


def _pair(found: Sequence[CaseFiles]) -> str:
    other = next((case for case in found if case.classes != found[0].classes), found[1])
    return f"{_spelt(found[0])} and {_spelt(other)}"


def summarise(image: np.ndarray) -> np.ndarray:
    """Six numbers of an image's intensities as they are in the file, see ``ClassSurvey.summary``; float32, (6,)."""
    low = image.min()
    share = np.count_nonzero(image == low) / image.size
    return np.array([low, *np.percentile(image, (1, 50, 99)), image.max(), share], np.float32)


def _survey(case: CaseFiles, items: Path | None) -> ClassSurvey:
    arrays = None if items is None else open_items(items)
    read = read_class_case(case, arrays)
    image = read.image
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    grey = image[0].reshape(-1)
    grey = grey[grey > AIR] if (grey > AIR).any() else grey
    count = NUM_VALUES["picture" if image.shape[-1] == 1 else "volume"]
    places = np.random.default_rng(0).integers(len(grey), size=count)
    lengths = read.geometry.reoriented("RAS").shape
    shape = (len(image), lengths[0], lengths[1], lengths[2])
    return ClassSurvey(digest.hexdigest(), shape, summarise(image), grey[np.sort(places)])


def _key(case: CaseFiles) -> bytes:
    return hashlib.blake2b(json.dumps(identity(case)).encode(), digest_size=16).digest()


def _folder_key(cases: Sequence[CaseFiles]) -> str:
    """Names the folder, or the file, that all images lie in."""
    parents = {
        str(case.images[0].absolute() if case.item is not None else case.images[0].absolute().parent) for case in cases
    }
    common = os.path.commonpath(sorted(parents)) if len({os.path.splitdrive(path)[0] for path in parents}) == 1 else ""
    return hashlib.sha256(common.encode()).hexdigest()[:24]


def _load(path: Path) -> dict[bytes, ClassSurvey]:
    """Reads what an earlier survey remembered; nothing where there is none, or it is damaged."""
    try:
        # numpy would leave a file that it opened itself open where it is damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if int(file["layout"]) != LAYOUT:
                return {}
            keys, prints, shapes, summaries, values, ends = (
                file[name] for name in ("keys", "fingerprints", "shapes", "summaries", "values", "ends")
            )
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s: %s; the images are read again", path, error)
        return {}
    # One long text cut by plain slices: a hundred thousand small arrays would take seconds.
    key, digest, places = keys.tobytes(), prints.tobytes().hex(), [0, *ends.tolist()]
    sizes: list[tuple[int, int, int, int]] = [tuple(shape) for shape in shapes.tolist()]
    return {
        key[16 * k : 16 * k + 16]: ClassSurvey(
            digest[64 * k : 64 * k + 64], sizes[k], summaries[k], values[places[k] : places[k + 1]]
        )
        for k in range(len(sizes))
    }


def _store(path: Path, known: Mapping[bytes, ClassSurvey], wanted: Sequence[bytes]) -> None:
    """Writes the surveys asked for, and as many others of the folder at most."""
    asked = set(wanted)
    kept = [key for key in dict.fromkeys(wanted) if key in known]
    kept += [key for key in known if key not in asked][: len(asked)]
    surveys = [known[key] for key in kept]
    with atomic_file(path) as stream:
        np.savez(
            stream,
            layout=np.array(LAYOUT),
            keys=_bytes(kept),
            fingerprints=_bytes([bytes.fromhex(survey.fingerprint) for survey in surveys]),
            shapes=np.array([survey.shape for survey in surveys], np.int64),
            summaries=np.array([survey.summary for survey in surveys], np.float32),
            values=np.concatenate([survey.values for survey in surveys]),
            ends=np.cumsum([len(survey.values) for survey in surveys]),
        )


def _bytes(rows: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
