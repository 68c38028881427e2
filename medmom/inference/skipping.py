"""Which predictions need not be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmom.data.casefiles import CaseFiles
from medmom.data.files import content_files, is_series, read_json
from medmom.errors import MedmomError
from medmom.inference.manifest import file_sha256, input_hashes
from medmom.inference.outputs import sidecar_path


def is_done(
    case: CaseFiles, prediction: Path, *, checksum: str, settings: Mapping[str, Any], also: Sequence[Path] = ()
) -> bool:
    """Whether a prediction is there that the same work would give again.

    Its sidecar names the same inputs by their content, wherever they lay then, the same model by its checksum and
    the same settings; the file has the sha256 that the sidecar says. What cannot be read or differs is not done.

    Args:
        case: What is to be predicted.
        prediction: The label map.
        checksum: Of the model package.
        settings: All that can change a label; plain types.
        also: Other files asked for beside it; they must have been written with this very prediction.
    """
    about = read_sidecar(prediction)
    if about is None or not _is_of(about, checksum, settings):
        return False
    try:
        if not {path.name for path in also} <= set(about.get("also", ())) or not all(path.is_file() for path in also):
            return False
        if file_sha256(prediction) != about.get("prediction_sha256"):
            return False
        known = [entry["sha256"] for entry in about["inputs"]]
        return bool(known) and known == [entry["sha256"] for entry in input_hashes(case.images)]
    except (MedmomError, OSError, KeyError, TypeError):
        return False


def is_standing(case: CaseFiles, prediction: Path, *, checksum: str, settings: Mapping[str, Any]) -> bool:
    """Whether a prediction is complete and of this case, model and settings, as far as can be told in no time.

    Nothing is read but the sidecar: inputs count as the same where they lie where they lay and did not change after
    the prediction was written.

    Args:
        case: As ``is_done``.
        prediction: As ``is_done``.
        checksum: As ``is_done``.
        settings: As ``is_done``.
    """
    about = read_sidecar(prediction)
    if about is None or not _is_of(about, checksum, settings) or not about.get("prediction_sha256"):
        return False
    if about.get("image") != [str(path.absolute()) for path in case.images]:
        return False
    try:
        written = sidecar_path(prediction).stat().st_mtime_ns
        return prediction.is_file() and all(
            part.stat().st_mtime_ns <= written for path in case.images for part in _parts(path)
        )
    except (OSError, MedmomError):
        return False


def read_sidecar(prediction: Path) -> dict[str, Any] | None:
    """Gives what the JSON file beside a prediction says; None where it is missing, damaged or something else."""
    try:
        about = read_json(sidecar_path(prediction))
    except (MedmomError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) and isinstance(about.get("model"), dict) else None


def _parts(path: Path) -> list[Path]:
    """What shows by its time that an image changed; of a series its folder too, for slices that came or went."""
    if not is_series(path):
        return content_files(path)
    folder = path if path.is_dir() else path.parent
    return [folder, *folder.iterdir()]


def _is_of(about: Mapping[str, Any], checksum: str, settings: Mapping[str, Any]) -> bool:
    # As JSON gives them back: tuples become lists, numbers as keys become text.
    return bool(
        about["model"].get("checksum") == checksum and about.get("settings") == json.loads(json.dumps(settings))
    )
