from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medmom.data.atomic import atomic_file
from medmom.data.casefiles import CaseFiles
from medmom.errors import MedmomError
from medmom.inference.class_inputs import class_validation_cases, find_class_inputs
from medmom.inference.class_outputs import ClassOutcome, ClassOutputs, plan_class_outputs, write_classes
from medmom.inference.class_predictor import ClassInput, ClassPredictor
from medmom.inference.faults import fault_of
from medmom.inference.inputs import asks_for_validation
from medmom.package import software_versions

BATCH, BATCH_VOXELS = 32, 2**21
"""Most images, and most voxels, that run through the network at once."""


def predict_classes(
    model: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    device: str = "auto",
    fold: str | None = None,
    quiet: bool = False,
    explain: bool = False,
) -> list[ClassOutcome]:
    """Classifies images: one table with the probability of every class, and a JSON file beside it that says what it is.

    The model is loaded once. With several cases one that fails does not stop the others; the JSON file lists all that
    were asked for. A single case that fails is raised, and nothing is written. What an earlier predict wrote is
    replaced; no other file is.

    Args:
        model: A run folder or model package.
        inputs: Files, folders and globs (see ``find_class_inputs``).
        out: The table, such as ``classes.csv``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.
        fold: ``"validation"``: the cases that the run was validated on, instead of ``inputs``.
        quiet: No progress bar.
        explain: Whether to draw for each case where the network saw its class, into ``<table>_explain``.

    Returns:
        One outcome a case, in order.

    Raises:
        MedmomError: Model, device, inputs or output cannot be used, or the only case fails.
    """
    predictor = ClassPredictor(model, device=device)
    is_validation = asks_for_validation(inputs, fold)
    num_channels = len(predictor.package.channels)
    cases = class_validation_cases(model) if is_validation else find_class_inputs(inputs, num_channels)
    outputs = plan_class_outputs(cases, Path(out), explain=explain)
    outcomes: dict[str, ClassOutcome] = {}
    try:
        with tqdm(total=len(cases), desc="predict", unit="case", disable=quiet or len(cases) == 1) as bar:
            for outcome in _outcomes(predictor, cases, outputs if explain else None):
                outcomes[outcome.case.name] = outcome
                bar.update()
    finally:
        # Also when the run is cut short: the list says what there is.
        listed = [
            outcomes.get(case.name, ClassOutcome(case, error=f"{case.images[0]}: not reached.")) for case in cases
        ]
        if outcomes:
            write_classes(outputs, listed, predictor.classes, _about(model, predictor, fold))
    return listed


def _outcomes(
    predictor: ClassPredictor, cases: Sequence[CaseFiles], outputs: ClassOutputs | None
) -> Iterator[ClassOutcome]:
    """Outcomes as they come: images of one shape wait for each other, others do not."""
    waiting: list[ClassInput] = []
    for case in cases:
        try:
            given = predictor.read(case)
        except (MedmomError, OSError, MemoryError) as error:
            yield _told(case, error, is_only=len(cases) == 1)
            continue
        if waiting and not _fits(waiting, given):
            yield from _classified(predictor, waiting, outputs, is_only=len(cases) == 1)
            waiting = []
        waiting.append(given)
    if waiting:
        yield from _classified(predictor, waiting, outputs, is_only=len(cases) == 1)


def _fits(waiting: Sequence[ClassInput], given: ClassInput) -> bool:
    voxels = (len(waiting) + 1) * given.image[0].size
    return len(waiting) < BATCH and voxels <= BATCH_VOXELS and given.image.shape == waiting[0].image.shape


def _classified(
    predictor: ClassPredictor, inputs: Sequence[ClassInput], outputs: ClassOutputs | None, *, is_only: bool
) -> Iterator[ClassOutcome]:
    for given, outcome in zip(inputs, predictor.classify(inputs), strict=True):
        try:
            if outcome.error is not None:
                raise MedmomError(outcome.error)
            if outputs is not None:
                with atomic_file(outputs.picture(given.files)) as stream:
                    stream.write(predictor.picture(given, outcome))
        except (MedmomError, OSError) as error:
            yield _told(given.files, error, is_only=is_only)
        else:
            yield outcome


def _told(case: CaseFiles, error: Exception, *, is_only: bool) -> ClassOutcome:
    fault = fault_of(case, error)
    if is_only:
        raise fault from error
    return ClassOutcome(case, error=str(fault))


def _about(model: str | Path, predictor: ClassPredictor, fold: str | None) -> dict[str, Any]:
    package = predictor.package
    return {
        "model": {
            "path": str(Path(model).resolve()),
            "network": type(package.network).__name__,
            "checksum": package.checksum,
        },
        "temperature": package.temperature,
        "fold": fold,
        "versions": software_versions(),
    }
