"""A classifier in memory: from an image file to what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from medmom.data.case import Case
from medmom.data.casefiles import CaseFiles
from medmom.data.class_images import choose_slices, fit_to_patch, is_volume, read_class_case
from medmom.data.class_survey import summarise
from medmom.data.preparation import prepare, working_geometry
from medmom.device import torch_device
from medmom.errors import MedmomError
from medmom.evaluation.calibration import probabilities
from medmom.inference.class_outputs import ClassOutcome
from medmom.inference.explain import draw_explanation, explain
from medmom.inference.kinds import check_kind, check_working_grid
from medmom.inference.novelty import look
from medmom.models.sizes import times
from medmom.package import Package, load_package


@dataclass(frozen=True, eq=False)
class ClassInput:
    """One image as the network takes it.

    Attributes:
        files: The case.
        image: float32, shape (C, *spatial); spatial is (px, py) of a picture, (px, py, S) of a volume that is seen
            slice by slice, (x, y, z) of another.
        summary: Of its intensities as they are in the file, shape (6,).
        slices: Which slices of the working grid the network sees; None where it does not see slices.
    """

    files: CaseFiles
    image: np.ndarray
    summary: np.ndarray
    slices: np.ndarray | None


class ClassPredictor:
    """A model, loaded once, that says what whole images are.

    Args:
        model: A run folder or model package.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.

    Raises:
        MedmomError: There is no sound model or no such device, or the model draws label maps instead.
    """

    def __init__(self, model: str | Path, *, device: str = "auto") -> None:
        self.device = torch_device(device)
        self.package: Package = load_package(model)
        self.classes = self.package.classes
        self._network = self.package.network.to(self.device)

    def read(self, files: CaseFiles) -> ClassInput:
        """Reads an image and brings it to the form that training fed the network.

        It is brought to the working grid and scaled; of a volume that is seen slice by slice, slices are chosen that
        lie evenly, all where there are fewer; and it is cut, or filled up, about its centre to the patch.

        Raises:
            MedmomError: The image cannot be read, or is none that the model takes.
        """
        case = read_class_case(files)
        self._check_size(files, case)
        check_kind(
            files.images[0],
            case.image,
            self.package.preparation,
            is_picture=files.item is None and not is_volume(files.images[0]),
            takes_volumes=len(self.package.patch) == 3 or self.package.slices is not None,
        )
        summary = summarise(case.image)
        image = prepare(case, self.package.preparation).image
        self._check_channels(files, image)
        slices = None
        if self.package.slices is not None:
            slices = choose_slices(image.shape[-1], self.package.slices)
            image = image[..., slices]
        elif len(self.package.patch) == 2:
            image = image[..., 0]
        return ClassInput(files, fit_to_patch(image, self.package.patch), summary, slices)

    def classify(self, inputs: Sequence[ClassInput]) -> list[ClassOutcome]:
        """Classifies images of one shape, at once; one fails where memory is too small or the logits are not finite."""
        batch = torch.from_numpy(np.stack([each.image for each in inputs])).to(self.device)
        try:
            found = look(self._network, batch)
        except (MemoryError, torch.OutOfMemoryError):
            if len(inputs) > 1:
                return [outcome for each in inputs for outcome in self.classify([each])]
            mend = "Name --device cpu" if self.device.type == "cuda" else "Take a larger machine"
            voxels = times(inputs[0].image.shape[1:])
            fact = f"memory is too small for the {voxels} voxels that the model looks at. {mend}."
            return [_failed(inputs[0].files, fact)]
        slices = [None] * len(inputs) if found.slices is None else list(found.slices.numpy())
        parts = zip(inputs, found.logits.numpy(), slices, strict=True)
        return [self._outcome(*part) for part in parts]

    def picture(self, given: ClassInput, outcome: ClassOutcome) -> bytes:
        """Draws where the network saw the class that it thinks most likely, see ``explain``; a PNG."""
        found = outcome.probabilities or ()
        top = int(np.argmax(found))
        image = torch.from_numpy(given.image)[None].to(self.device)
        seen = explain(self._network, image, top, is_multilabel=self.classes.is_multilabel)
        place = seen.place if given.slices is None or seen.place is None else int(given.slices[seen.place])
        lines = [
            f"{given.files.name}{'' if place is None else f', slice {place}'}",
            f"{self.classes.names[top]} {found[top]:.3f}",
            outcome.flag,
        ]
        return draw_explanation(seen, "\n".join(lines), is_volume=is_volume(given.files.images[0]))

    def _outcome(self, given: ClassInput, logits: np.ndarray, slices: np.ndarray | None) -> ClassOutcome:
        if not np.isfinite(logits).all():
            return _failed(given.files, "the network's output is not finite. Train the model again.")
        found = self._probabilities(logits)
        names = self.classes.names
        if self.classes.is_multilabel:
            classes = tuple(name for name, value in zip(names, found, strict=True) if value >= 0.5)
        else:
            classes = (names[int(np.argmax(found))],)
        novelty = self.package.novelty
        by_slice = () if slices is None or given.slices is None else zip(given.slices.tolist(), slices, strict=True)
        return ClassOutcome(
            given.files,
            classes,
            found,
            tuple(logits.astype(float).tolist()),
            flag="" if novelty is None else novelty.flag(given.image, given.summary),
            slices=tuple((index, self._probabilities(each)) for index, each in by_slice),
        )

    def _probabilities(self, logits: np.ndarray) -> tuple[float, ...]:
        found = probabilities(logits, self.package.temperature, is_multilabel=self.classes.is_multilabel)
        return tuple(found.tolist())

    def _check_size(self, files: CaseFiles, case: Case) -> None:
        check_working_grid(files.images[0], self.package.preparation, case.geometry)
        shape = working_geometry(self.package.preparation, case.geometry).shape
        if len(self.package.patch) == 2 and self.package.slices is None and shape[-1] > 1:
            raise MedmomError(
                f"{files.images[0]}: a volume of {shape[-1]} slices, the model classifies pictures. Give one slice."
            )

    def _check_channels(self, files: CaseFiles, image: np.ndarray) -> None:
        names = self.package.channels
        if len(image) != len(names):
            raise MedmomError(
                f"{files.images[0]}: the number of image channels is {len(image)}, the model takes {len(names)} "
                f"({', '.join(names)}). Give images with these."
            )


def _failed(files: CaseFiles, fact: str) -> ClassOutcome:
    return ClassOutcome(files, error=f"{files.images[0]}: {fact}")
