"""The cleanup of a model's label maps: chosen on the run's validation cases, kept in its package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmom.cleanup import Cleanup
from medmom.data.files import read_json, stem, write_json
from medmom.errors import MedmomError
from medmom.evaluation.choose_cleanup import Choice, choose_cleanup
from medmom.evaluation.matching import Matching, match
from medmom.package import Package, is_classifier, load_package
from medmom.package_files import DESCRIPTION, WEIGHTS, read_description, read_weights, with_field, write_files

CHOICE = "cleanup.json"
"""Name of the file with all that was tried, beside the predictions."""


def choose(run: Path, predictions: Path | None = None, *, quiet: bool = False) -> Choice:
    """Chooses the cleanup of a model's label maps on its validation cases, and writes it into the package.

    ``choose_cleanup`` says how. The package keeps its weights to the byte and gets another checksum; where nothing is
    chosen it has no cleanup afterwards. All that was tried goes into ``cleanup.json`` beside the predictions.

    Args:
        run: Run folder, or the model package.
        predictions: What ``medmom predict RUN --fold validation`` wrote; None: ``validation`` in the run folder.
        quiet: No progress bar.

    Returns:
        The choice; ``format_choice`` makes a table of it.

    Raises:
        MedmomError: There is no sound package, it classifies images, the predictions are not there, were made by
            another model or with a cleanup, or are of cases that the model was trained on; or a file cannot be read
            or written.
    """
    package = _segmenter(run)
    folder = package.folder.absolute().parent / "validation" if predictions is None else predictions
    matching = _matched(run, folder, package)
    choice = choose_cleanup(matching, progress=not quiet)
    write_json(folder / CHOICE, {**choice.as_dict(), "model": {"checksum": package.raw_checksum}})
    if (choice.cleanup or None) != package.cleanup:
        _rewrite(package, choice.cleanup)
    return choice


def take_out(run: Path) -> bool:
    """Takes the cleanup out of a model's package, which becomes what it was before, to the byte.

    Args:
        run: Run folder, or the model package.

    Returns:
        Whether there was one.

    Raises:
        MedmomError: There is no sound package, it classifies images, or cannot be written.
    """
    package = _segmenter(run)
    if package.cleanup is not None:
        _rewrite(package, None)
    return package.cleanup is not None


def _segmenter(run: Path) -> Package:
    if is_classifier(run):
        raise MedmomError(f"{run}: the model classifies whole images; a cleanup is for label maps. Name another run.")
    return load_package(run)


def _rewrite(package: Package, cleanup: Cleanup | None) -> None:
    """Writes the package anew with another cleanup, or none; its weights stay, byte for byte."""
    description = read_description(package.folder / DESCRIPTION)
    content = read_weights(package.folder / WEIGHTS, description.get("weights_sha256"))
    told = with_field(description, "cleanup", cleanup.as_dict() if cleanup else None)
    write_files(package.folder, told, content)


def _matched(run: Path, folder: Path, package: Package) -> Matching:
    """The predictions with their references, if they may choose for this package."""
    again = f"Run medmom predict {run} --fold validation --out {folder}"
    if not (folder / "cases.json").is_file():
        raise MedmomError(f"{folder}: no cases.json of predictions is there. {again}.")
    matching = match(folder, None, None)
    _check_maker(folder / "cases.json", read_json(folder / "cases.json"), package, run, again)
    for case in matching.cases:
        if case.name == stem(CHOICE):
            raise MedmomError(f"{folder / CHOICE}: belongs to the case {case.name}. Rename the case and predict again.")
        if case.prediction is not None:
            sidecar = case.prediction.with_name(f"{stem(case.prediction)}.json")
            _check_maker(sidecar, read_json(sidecar), package, run, again)
    if matching.prediction_labels != package.labels:
        raise MedmomError(f"{folder / 'cases.json'}: has other classes than the model. {again}.")
    _check_unseen(folder, matching, package)
    return matching


def _check_maker(path: Path, told: Any, package: Package, run: Path, again: str) -> None:
    """Demands that a file names this very model, and no cleanup."""
    told = told if isinstance(told, Mapping) else {}
    model, settings = told.get("model"), told.get("settings")
    checksum = model.get("checksum") if isinstance(model, Mapping) else None
    if checksum not in (package.raw_checksum, package.checksum):
        raise MedmomError(f"{path}: these predictions were made by another model than {package.folder}. {again}.")
    # Without a word on it a package with a cleanup applies it.
    settings = settings if isinstance(settings, Mapping) else {}
    cleanup = settings.get("cleanup", checksum != package.raw_checksum)
    if any(cleanup.values()) if isinstance(cleanup, Mapping) else cleanup:
        raise MedmomError(
            f"{path}: these predictions were made with the cleanup of the model, and cannot choose one. "
            f"Run medmom postprocess {run} --none, then {again[4:]}."
        )


def _check_unseen(folder: Path, matching: Matching, package: Package) -> None:
    """Refuses cases that the model was trained on: they would choose what suits a memory."""
    split = package.folder.absolute().parent / "split.json"
    if not split.is_file():
        return
    try:
        seen = {Path(path).resolve() for case in read_json(split)["train"] for path in case["images"]}
    except (KeyError, TypeError) as error:
        raise MedmomError(f"{split}: not as medmom train writes it ({error!r}). Restore it.") from error
    for case in matching.cases:
        if case.image is not None and case.image.resolve() in seen:
            raise MedmomError(
                f"{folder}: the model was trained on the case {case.name}. Give predictions of its validation cases."
            )
