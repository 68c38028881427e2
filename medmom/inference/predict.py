from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from medmom.data.case import Case, CaseFiles
from medmom.data.files import Volume, read_images, stem, write_json
from medmom.data.preparation import prepare, restore, working_channels, working_geometry
from medmom.device import torch_device
from medmom.errors import MedmomError
from medmom.inference.inputs import find_inputs, validation_cases
from medmom.inference.kinds import check_kind
from medmom.inference.outputs import plan_outputs, write_prediction
from medmom.inference.windows import mirrored, num_windows, sliding_window
from medmom.models.sizes import times
from medmom.package import Package, load_package, software_versions

MAX_VOXELS = 2**31
"""Largest working grid; a coarser image than the model was made for could ask for any size."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        case: Its name and files.
        prediction: The label map, or None where there is none.
        error: Why there is none: one line that names the file, the fact and the mend; else None.
    """

    case: CaseFiles
    prediction: Path | None
    error: str | None


class Predictor:
    """A model, loaded once, that gives label maps of images in memory.

    Args:
        model: A run folder or model package.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.
        overlap: Share of a window that the next one covers again, in [0, 1).
        tta: Whether logits are averaged over mirror images (test-time augmentation), along the axes that were
            mirrored in training; each axis doubles the time.

    Raises:
        MedmomError: There is no sound model or no such device, ``overlap`` lies outside its range, or the model was
            trained without mirroring and ``tta`` is asked for.
    """

    def __init__(self, model: str | Path, *, device: str = "auto", overlap: float = 0.5, tta: bool = False) -> None:
        if not 0 <= overlap < 1:
            raise MedmomError(f"overlap {overlap}: give a share of at least 0 and less than 1.")
        self.device = torch_device(device)
        self.overlap = overlap
        self.package = load_package(model)
        self.mirrors = mirror_axes(self.package) if tta else ()
        self._network = self.package.network.to(self.device)
        self._windows = sliding_window(self.package.patch, overlap=overlap)

    def label_map(self, image: Volume, *, quiet: bool = True) -> np.ndarray:
        """Segments an image.

        It is brought to the working grid and scaled as in training, runs through the network in windows that are
        blended by a Gaussian, and its class logits are brought back slab by slab: the largest wins. Where the image
        is smaller than a window it is padded with 0, the mean of a prepared image, as in training.

        Args:
            image: float32, shape (C, X, Y, Z).
            quiet: No progress bar.

        Returns:
            Stored values, shape (X, Y, Z), of the type ``labels.dtype``.

        Raises:
            MedmomError: The image has another number of channels than the model takes, or its working grid is too
                large for this machine.
        """
        self._check(image)
        case = prepare(Case(stem(image.path), image.array, None, image.geometry, ()), self.package.preparation)
        try:
            logits = self._logits(case.image, bar_title=None if quiet else case.name)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise MedmomError(
                f"{image.path}: memory is too small for the {times(case.geometry.shape)} voxels of its working grid. "
                f"Crop the image{', or name --device cpu' if self.device.type == 'cuda' else ''}."
            ) from error
        if not all(map(math.isfinite, (logits.min(), logits.max()))):
            raise MedmomError(f"{image.path}: the network's output is not finite. Train the model again.")
        channels = restore(logits, case.geometry, image.geometry)
        return self.package.labels.to_values(channels)

    def _check(self, image: Volume) -> None:
        names, found = self.package.channels, len(image.array)
        check_kind(
            image.path,
            image.array,
            self.package.preparation,
            is_picture=image.is_picture,
            takes_volumes=len(self.package.patch) == 3,
        )
        if working_channels(self.package.preparation, found) != len(names):
            mend = "Give that one alone." if len(names) == 1 else "Give one file with all, or case_0000, case_0001, ..."
            raise MedmomError(
                f"{image.path}: the number of image channels is {found}, the model takes {len(names)} "
                f"({', '.join(names)}). {mend}"
            )
        shape = working_geometry(self.package.preparation, image.geometry).shape
        if math.prod(shape) > MAX_VOXELS:
            raise MedmomError(
                f"{image.path}: {times(shape)} voxels at the model's spacing {self.package.preparation.spacing} mm. "
                "Crop the image, and check the spacing in its header."
            )

    def _logits(self, image: np.ndarray, bar_title: str | None) -> np.ndarray:
        """Class logits on the working grid, float32 (K, X, Y, Z)."""
        total = num_windows(image.shape[1:], self.package.patch, overlap=self.overlap)
        with (
            torch.inference_mode(),
            tqdm(total=total, desc=bar_title, unit="window", leave=False, disable=bar_title is None) as bar,
        ):
            turned = mirrored(self._network, self.mirrors)

            def network(window: torch.Tensor) -> torch.Tensor:
                logits = turned(window)
                bar.update(len(window))
                return logits

            # Plain tensors: MONAI handles MetaTensors several times slower.
            batch = torch.from_numpy(image)[None].to(self.device)
            return np.asarray(self._windows(batch, network)[0].float().cpu())


def mirror_axes(package: Package) -> tuple[int, ...]:
    """Gives the axes of a window that were mirrored in training.

    Raises:
        MedmomError: There is none.
    """
    data = package.recipe.get("data", {})
    axes = tuple(int(axis) for axis in data.get("mirror", ()) if axis < len(package.patch))
    if not axes or not data.get("augment", True):
        raise MedmomError(
            f"{package.folder}: the model was trained without mirroring (data.mirror), and mirror images would mislead "
            "it. Leave out --tta."
        )
    return axes


def predict(
    model: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    device: str = "auto",
    fold: str | None = None,
    quiet: bool = False,
    overlap: float = 0.5,
    tta: bool = False,
) -> list[Outcome]:
    """Segments image files: a label map for each on its own grid, and a JSON file beside it that says what it is.

    The model is loaded once. With several cases one that fails does not stop the others; ``cases.json`` in the
    output folder lists all that were asked for. A single case that fails is raised, and nothing is written.
    What an earlier predict wrote is replaced; no other file is.

    Args:
        model: A run folder or model package.
        inputs: Files, folders and globs (see ``find_inputs``).
        out: A ``.nii.gz`` or ``.nii`` file for one case, else a folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.
        fold: ``"validation"``: the cases that the run was validated on, instead of ``inputs``.
        quiet: No progress bar.
        overlap: Share of a window that the next one covers again.
        tta: Whether logits are averaged over mirror images, see ``Predictor``.

    Returns:
        One outcome a case, in order.

    Raises:
        MedmomError: Model, device, inputs or output cannot be used, or the only case fails.
    """
    predictor = Predictor(model, device=device, overlap=overlap, tta=tta)
    cases = _cases(model, inputs, fold, len(predictor.package.channels))
    outputs = plan_outputs(cases, Path(out))
    about = _about(model, predictor)
    outcomes: list[Outcome] = []
    try:
        for case, path in tqdm(
            list(zip(cases, outputs.predictions, strict=True)),
            desc="predict",
            unit="case",
            disable=quiet or len(cases) == 1,
        ):
            outcomes.append(_predict_case(predictor, case, path, about, quiet=quiet, is_only=len(cases) == 1))
    finally:
        # Also when the run is cut short: the list says what there is.
        rest = [Outcome(case, None, f"{case.images[0]}: not reached.") for case in cases[len(outcomes) :]]
        if outputs.listing is not None and outcomes:
            listed = [_listed(outcome) for outcome in (*outcomes, *rest)]
            write_json(outputs.listing, {**about, "cases": listed})
    return outcomes


def _cases(model: str | Path, inputs: Sequence[str | Path], fold: str | None, num_channels: int) -> list[CaseFiles]:
    if fold is None:
        return find_inputs(inputs, num_channels)
    if fold != "validation":
        raise MedmomError(f"fold {fold}: unknown. Give validation.")
    if inputs:
        raise MedmomError(f"{inputs[0]}: an input besides --fold. Give one of the two.")
    return validation_cases(model)


def _predict_case(
    predictor: Predictor, case: CaseFiles, path: Path, about: dict[str, Any], *, quiet: bool, is_only: bool
) -> Outcome:
    try:
        image = read_images(case.images)
        label = predictor.label_map(image, quiet=quiet)
        sidecar = {"image": _absolute(case.images), **about, "versions": software_versions()}
        write_prediction(path, label, predictor.package.labels, image, sidecar)
    except (MedmomError, OSError) as error:
        fault = error if isinstance(error, MedmomError) else MedmomError(f"{case.images[0]}: {error}. Check the disk.")
        if is_only:
            raise fault from error
        return Outcome(case, None, str(fault))
    return Outcome(case, path, None)


def _about(model: str | Path, predictor: Predictor) -> dict[str, Any]:
    package = predictor.package
    return {
        "labels": package.labels.as_dict(),
        "model": {
            "path": str(Path(model).resolve()),
            "network": type(package.network).__name__,
            "checksum": package.checksum,
            "overlap": predictor.overlap,
            "mirrors": list(predictor.mirrors),
            "evaluation": package.recipe.get("evaluation", {}),
        },
    }


def _listed(outcome: Outcome) -> dict[str, Any]:
    case = outcome.case
    return {
        "name": case.name,
        "image": _absolute(case.images),
        # From the list's own folder, so that the folder may be moved.
        "prediction": None if outcome.prediction is None else outcome.prediction.name,
        "patient": case.group,
        "annotated": None if case.annotated is None else list(case.annotated),
        "reference": None if case.label is None else str(case.label.absolute()),
        "error": outcome.error,
    }


def _absolute(paths: Sequence[Path]) -> list[str]:
    return [str(path.absolute()) for path in paths]
