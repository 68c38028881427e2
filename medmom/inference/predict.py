"""Segments files: many inputs, one load of the model, and every file whole or not there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from medmom.data.atomic import atomic_file
from medmom.data.case import CaseFiles
from medmom.data.dicom_seg import write_dicom_seg
from medmom.data.files import Volume, stem
from medmom.errors import MedmomError
from medmom.inference.entropy_file import EntropyFile
from medmom.inference.extras import Wanted, source_slices
from medmom.inference.faults import fault_of
from medmom.inference.footprint import peak
from medmom.inference.inputs import asks_for_validation, find_inputs, validation_cases
from medmom.inference.manifest import device_in_words, input_hashes
from medmom.inference.outputs import Outputs, claimed, plan_outputs, sweep, write_prediction
from medmom.inference.predictor import Given, Prediction, Predictor, Settings
from medmom.inference.preview import preview
from medmom.inference.probability_files import ProbabilityFiles, SlabFiles
from medmom.inference.ranks import deal, device_of, find_ranks, stopped_in_order
from medmom.inference.run_log import Gathered, RunLog
from medmom.inference.skipping import is_done, read_sidecar
from medmom.package import software_versions

logger = logging.getLogger(__name__)

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        case: Its name and files.
        prediction: The label map, or None where there is none.
        error: Why there is none: one line that names the file, the fact and the mend; else None.
        skipped: Whether the label map was there before and still holds.
    """

    case: CaseFiles
    prediction: Path | None
    error: str | None
    skipped: bool = False


class Predicted(NamedTuple):
    """What became of a run.

    Attributes:
        outcomes: One for each case of this process, in order.
        gathered: What is known of the cases of all processes.
    """

    outcomes: list[Outcome]
    gathered: Gathered


def predict(
    model: str | Path | Sequence[str | Path],
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    device: str = "auto",
    fold: str | None = None,
    quiet: bool = False,
    settings: Settings | None = None,
    wanted: Wanted | None = None,
) -> Predicted:
    """Segments image files: a label map for each on its own grid, and a JSON file beside it that says what it is.

    The model is loaded once; while a case is computed the next is read and the last is written. With several cases
    one that fails does not stop the others; ``cases.json`` in the output folder lists all that were asked for, and
    ``run.json`` tells of the run. A single case that fails is raised, and nothing is written. What an earlier predict
    wrote is replaced; no other file is. Under ``torchrun`` or ``srun`` each process does its share of the cases.

    Args:
        model: A run folder or model package; several are an ensemble (see ``Predictor``).
        inputs: Files, folders, globs and CSV files (see ``find_inputs``).
        out: A ``.nii.gz`` or ``.nii`` file (``.png`` of a picture) for one case, else a folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.
        fold: ``"validation"``: the cases that the run was validated on, instead of ``inputs``.
        quiet: No progress bar.
        settings: How the model is run.
        wanted: What is written besides, and what is left as it is.

    Returns:
        What became of the cases.

    Raises:
        MedmomError: Model, device, inputs or output cannot be used, or the only case fails.
    """
    ranks, wanted = find_ranks(), wanted or Wanted()
    models = [model] if isinstance(model, str | Path) else list(model)
    predictor = Predictor(models, device=device_of(device, ranks), settings=settings)
    cases = _cases(models, inputs, fold, len(predictor.package.channels))
    if wanted.reference is not None and len(cases) > 1:
        raise MedmomError(f"{wanted.reference}: one reference series for {len(cases)} images. Predict them apart.")
    outputs = plan_outputs(cases, Path(out), wanted=wanted, classes=predictor.labels.names, ranks=ranks)
    is_only = len(cases) == 1 and ranks.world_size == 1
    road = _Road(predictor, cases, outputs, wanted, _about(models, predictor), is_only=is_only)
    sweep(outputs.predictions[0].parent)
    outcomes: list[Outcome] = []
    log = RunLog(outputs, cases, road.about, settings=road.settings, device=road.device, ranks=ranks)
    with stopped_in_order(), log:
        for outcome, told in _walked(road, deal(cases, ranks), quiet=quiet):
            outcomes.append(outcome)
            log.add(outcome.case, outcome.prediction, about=told, error=outcome.error, skipped=outcome.skipped)
    return Predicted(outcomes, log.gathered)


def _walked(road: _Road, mine: Sequence[int], *, quiet: bool) -> Iterator[Told]:
    """Goes the road with each case of this process."""
    # Of a budget there is one case at a time: two would have to share it.
    settings = road.predictor.settings
    at_once = len(mine) > 1 and settings.max_ram is None and settings.max_vram is None
    steps = _overlapped(mine, road.read, partial(road.segment, quiet=quiet), road.write, at_once=at_once)
    yield from tqdm(steps, desc="predict", unit="case", total=len(mine), disable=quiet or road.is_only)


@dataclass(frozen=True, eq=False)
class _Read:
    given: Given
    inputs: list[dict[str, str]]
    series: tuple[Path, ...]
    """Files of the DICOM series that a DICOM-SEG will refer to."""


@dataclass(frozen=True, eq=False)
class _Segmented:
    prediction: Prediction
    read: _Read
    claim: ExitStack
    """Puts back what was there before, where the case fails."""
    begun: ExitStack
    """Files of this case that were begun, and appear or vanish at its end."""


Told = tuple[Outcome, dict[str, Any] | None]
"""What became of a case, and what its sidecar tells."""


class _Road:
    """The steps of a case; each gives what the next one takes, or the outcome where the case ends early."""

    def __init__(
        self,
        predictor: Predictor,
        cases: Sequence[CaseFiles],
        outputs: Outputs,
        wanted: Wanted,
        about: dict[str, Any],
        *,
        is_only: bool,
    ) -> None:
        self.predictor, self.cases, self.outputs, self.wanted = predictor, cases, outputs, wanted
        self.about, self.is_only = about, is_only
        self.settings = predictor.choices()
        self.device = device_in_words(predictor.device)

    def read(self, index: int) -> _Read | Told:
        """Reads and prepares a case, unless its label map is there."""
        case, path = self.cases[index], self.outputs.predictions[index]
        try:
            if self.wanted.skip_existing:
                checksum, also = self.predictor.checksum, self.outputs.also(index)
                if is_done(case, path, checksum=checksum, settings=self.settings, also=also):
                    return Outcome(case, path, None, skipped=True), read_sidecar(path)
            given = self.predictor.read(case.images)
            return _Read(given, input_hashes(case.images), source_slices(given.image, self.wanted))
        except (MedmomError, OSError, MemoryError) as error:
            return self._failed(case, error)

    def segment(self, index: int, case: _Read | Told, *, quiet: bool) -> _Segmented | Told:
        """Runs the network; probabilities and entropy are written as they come."""
        if not isinstance(case, _Read):
            return case
        try:
            with ExitStack() as claim, ExitStack() as begun:
                files = self._slab_files(index, case.given.image)
                if files:
                    path, also = self.outputs.predictions[index], self.outputs.also(index)
                    claim.enter_context(claimed(path, self._sidecar(self.cases[index]), also=also))
                sinks = {kind: begun.enter_context(file).write for kind, file in files.items()}
                prediction = self.predictor.segment(case.given, quiet=quiet, **sinks)
                return _Segmented(prediction, case, claim.pop_all(), begun.pop_all())
        except (MedmomError, OSError) as error:
            return self._failed(self.cases[index], error)

    def write(self, index: int, case: _Segmented | Told) -> Told:
        """Writes what was found."""
        if not isinstance(case, _Segmented):
            return case
        files, path, also = self.cases[index], self.outputs.predictions[index], self.outputs.also(index)
        found, extras = case.prediction, self.outputs.extras[index]
        try:
            # Whatever fails from here on, the files that were begun go with it.
            with case.claim, case.begun:
                about = self._sidecar(files) | {
                    "inputs": case.read.inputs,
                    "seconds": dict(found.seconds),
                    "peak_ram_mib": round(peak() / 2**20),
                    "statistics": found.statistics,
                }
                with claimed(path, about, also=also):
                    if extras.preview is not None:
                        with atomic_file(extras.preview) as stream:
                            stream.write(preview(found.label, found.image, found.labels))
                    if extras.dicom_seg is not None:
                        write_dicom_seg(
                            extras.dicom_seg,
                            found.label,
                            found.labels,
                            found.image.geometry,
                            case.read.series,
                            model=self.predictor.checksum,
                        )
                    # They get their names now: the sidecar of the label map, the last of all, vouches for them.
                    case.begun.close()
                    told = write_prediction(path, found.label, found.labels, found.image, about, also=also)
        except (MedmomError, OSError, MemoryError) as error:
            return self._failed(files, error)
        return Outcome(files, path, None), told

    def _slab_files(self, index: int, image: Volume) -> dict[str, SlabFiles]:
        """Files that are written while the network runs, by what they take."""
        path, kind, files = self.outputs.predictions[index], self.wanted.probabilities, dict[str, SlabFiles]()
        place = (path.parent, stem(path))
        if kind is not None:
            files["probabilities"] = ProbabilityFiles(*place, self.predictor.labels, image, kind=kind)
        if self.wanted.entropy:
            files["entropy"] = EntropyFile(*place, image)
        return files

    def _sidecar(self, case: CaseFiles) -> dict[str, Any]:
        return {
            "image": [str(path.absolute()) for path in case.images],
            **self.about,
            "versions": software_versions(),
            "settings": self.settings,
            "device": self.device,
        }

    def _failed(self, case: CaseFiles, error: Exception) -> Told:
        fault = fault_of(case, error)
        if self.is_only:
            raise fault from error
        return Outcome(case, None, str(fault)), None


def _overlapped(
    items: Sequence[int],
    read: Callable[[int], R],
    work: Callable[[int, R], S],
    write: Callable[[int, S], T],
    *,
    at_once: bool,
) -> Iterator[T]:
    """Takes items through three steps, in order; ``at_once``: reads the next and writes the last meanwhile."""
    if not at_once:
        for item in items:
            yield write(item, work(item, read(item)))
        return
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead: Future[R] = reader.submit(read, items[0])
        behind: Future[T] | None = None
        for item, following in zip(items, [*items[1:], None], strict=True):
            try:
                given = ahead.result()
                if following is not None:
                    ahead = reader.submit(read, following)
                done = work(item, given)
            except BaseException:
                # Cut short: what is written by then counts.
                if behind is not None:
                    yield behind.result()
                raise
            # One case waits to be written at most.
            del given
            if behind is not None:
                yield behind.result()
            behind = writer.submit(write, item, done)
            del done
        if behind is not None:
            yield behind.result()


def _cases(models: Sequence[str | Path], inputs: Sequence[str | Path], fold: str | None, count: int) -> list[CaseFiles]:
    """What is to be segmented by models that take so many channels."""
    if not asks_for_validation(inputs, fold):
        return find_inputs(inputs, count)
    if len(models) > 1:
        raise MedmomError(
            f"{models[1]}: besides --fold; the validation cases of one model are training cases of another. "
            "Score an ensemble on cases that none has seen."
        )
    return validation_cases(models[0])


def _about(models: Sequence[str | Path], predictor: Predictor) -> dict[str, Any]:
    package = predictor.package
    about = {
        "path": str(Path(models[0]).resolve()),
        "network": type(package.network).__name__,
        "checksum": predictor.checksum,
        "overlap": predictor.settings.overlap,
        "evaluation": package.recipe.get("evaluation", {}),
    }
    if len(models) > 1:
        about["members"] = [
            {"path": str(Path(path).resolve()), "network": type(each.network).__name__, "checksum": each.checksum}
            for path, each in zip(models, predictor.packages, strict=True)
        ]
    return {"labels": package.labels.as_dict(), "model": about}
