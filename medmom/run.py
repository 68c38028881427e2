from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmom.classes import Classes
from medmom.data.atomic import read_json, write_json, write_text
from medmom.data.casefiles import CaseFiles
from medmom.errors import MedmomError
from medmom.labels import Labels
from medmom.recipe_file import RecipeFile

SPLIT_SEED = 0
"""The same for every training seed: runs that differ by seed alone are compared on the same cases."""


@dataclass(frozen=True)
class Run:
    """A run folder and all that a run is made of: what ``--resume`` finds again.

    Attributes:
        folder: Holds recipe.yaml, split.json, metrics.csv, last.ckpt, best.ckpt, pictures/, tensorboard/, model/.
        recipe: Complete: nothing in it is left to be measured.
        table: Class names and values of voxels, or the classes of whole images.
        channels: Names of the image channels.
        train: Training cases.
        validation: Validation cases.
    """

    folder: Path
    recipe: RecipeFile
    table: Labels | Classes
    channels: tuple[str, ...]
    train: tuple[CaseFiles, ...]
    validation: tuple[CaseFiles, ...]


def next_run(name: str) -> Path:
    """Gives a folder under ``runs`` that is not there yet, such as ``runs/liver-003``."""
    taken = [int(path.name[-3:]) for path in Path("runs").glob(f"{name}-[0-9][0-9][0-9]")]
    return Path("runs") / f"{name}-{max(taken, default=0) + 1:03d}"


def claim_folder(out: Path) -> None:
    """Makes a folder for a run, or takes an empty one.

    Raises:
        MedmomError: The folder holds something, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MedmomError(f"{out}: already there; name a new folder, or go on with `medmom train --resume {out}`.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").touch()
        (out / ".probe").unlink()
    except OSError as error:
        raise MedmomError(f"{out}: cannot be written ({error.strerror}); name another folder with --out.") from None


def write_run(run: Run) -> None:
    """Writes split.json and recipe.yaml, which together are all that ``read_run`` needs."""
    write_json(
        run.folder / "split.json",
        {
            "folder": run.recipe.get("data.folder"),
            "fold": run.recipe.get("data.fold"),
            "folds": run.recipe.get("data.folds"),
            "seed": SPLIT_SEED,
            "labels" if isinstance(run.table, Labels) else "classes": run.table.as_dict(),
            "channels": list(run.channels),
            "train": [_as_dict(case) for case in run.train],
            "validation": [_as_dict(case) for case in run.validation],
        },
    )
    # Last: a folder with a recipe can be resumed.
    write_text(run.folder / "recipe.yaml", run.recipe.text())


def read_run(folder: Path) -> Run:
    """Reads what ``write_run`` wrote.

    Raises:
        MedmomError: A file is missing or damaged, or a scan is no longer there.
    """
    if not (folder / "recipe.yaml").is_file() or not (folder / "split.json").is_file():
        raise MedmomError(f"{folder}: no recipe.yaml and split.json; name the folder of a run that was started.")
    path = folder / "split.json"
    split = read_json(path)
    try:
        run = Run(
            folder,
            RecipeFile(folder / "recipe.yaml"),
            Labels.from_dict(split["labels"]) if "labels" in split else Classes.from_dict(split["classes"]),
            tuple(split["channels"]),
            tuple(_from_dict(case) for case in split["train"]),
            tuple(_from_dict(case) for case in split["validation"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MedmomError(f"{path}: not as medmom train wrote it ({error!r}); start a new run.") from None
    files = [path for case in (*run.train, *run.validation) for path in (*case.images, case.label) if path is not None]
    gone = next((path for path in files if not path.is_file()), None)
    if gone is not None:
        raise MedmomError(f"{gone}: no longer there, and {folder} trains on it; put it back, or start a new run.")
    return run


def _as_dict(case: CaseFiles) -> dict[str, Any]:
    optional = {"classes": None if case.classes is None else list(case.classes), "fold": case.fold, "item": case.item}
    return {
        **{name: value for name, value in optional.items() if value is not None},
        "name": case.name,
        "images": [str(path.resolve()) for path in case.images],
        "label": None if case.label is None else str(case.label.resolve()),
        "group": case.group,
        "annotated": None if case.annotated is None else list(case.annotated),
    }


def _from_dict(data: dict[str, Any]) -> CaseFiles:
    return CaseFiles(
        data["name"],
        tuple(Path(path) for path in data["images"]),
        None if data["label"] is None else Path(data["label"]),
        data["group"],
        None if data["annotated"] is None else tuple(data["annotated"]),
        None if data.get("classes") is None else tuple(data["classes"]),
        data.get("fold"),
        data.get("item"),
    )
