"""A model, loaded once, that segments images: files, nibabel images and arrays."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from tqdm.auto import tqdm

from medmom.cleanup import apply
from medmom.data.case import Case
from medmom.data.files import Volume, read_images, stem, write_label
from medmom.data.in_memory import volume_in_memory
from medmom.data.nifti import label_header
from medmom.data.preparation import prepare, working_channels, working_geometry
from medmom.device import torch_device
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.inference.body import body_mask
from medmom.inference.cells import Scores
from medmom.inference.kinds import check_kind, check_working_grid
from medmom.inference.members import as_one, check_members, common_cleanup, mirror_axes, preparations
from medmom.inference.memory import plan_stream, step_down
from medmom.inference.restore import Restorer, Sink
from medmom.inference.statistics import label_statistics
from medmom.inference.stream import StreamPlan, num_windows, stream_logits
from medmom.labels import Labels
from medmom.models.sizes import times
from medmom.package import load_package

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How a model is run.

    Attributes:
        overlap: Share of a window that the next one covers again, in [0, 1).
        tta: Whether logits, of an ensemble probabilities, are averaged over mirror images (test-time augmentation),
            along the axes that were mirrored in training; each axis doubles the time.
        skip_air: Whether windows of a CT in which there is no body are left out.
        max_ram: Bytes that the process may hold at most; None: what a plan without regard to it takes.
        max_vram: The same of the GPU.

    Raises:
        MedmomError: ``overlap`` lies outside its range.
    """

    overlap: float = 0.5
    tta: bool = False
    skip_air: bool = True
    max_ram: int | None = None
    max_vram: int | None = None

    def __post_init__(self) -> None:
        """Refuses an overlap of windows that would not move on."""
        if not 0 <= self.overlap < 1:
            raise MedmomError(f"overlap {self.overlap}: give a share of at least 0 and less than 1.")


@dataclass(frozen=True, eq=False)
class Given:
    """An image that was read and brought to the working grid.

    Attributes:
        image: On its own grid.
        working: On the working grid; of models that scale intensities differently, as the first of them does.
        plan: How its windows run, and a line that tells it.
        seconds: That all took.
        again: Files to read it from again, where the budget of memory has no room for it meanwhile and ``image`` is
            without voxels; empty where it is kept.
        also: The image of ``working`` as the other models scale it, shape (C, X, Y, Z) each.
    """

    image: Volume
    working: Case
    plan: tuple[StreamPlan, str]
    seconds: float
    again: tuple[Path, ...] = ()
    also: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, eq=False)
class Prediction:
    """A label map on the grid of its image.

    Attributes:
        image: The image.
        label: Stored values, shape (X, Y, Z), of the type ``labels.dtype``.
        labels: Their names.
        confidence: Mean probability of each class where it was found; nan where it was not.
        seconds: By part of the work: ``read``, ``network`` (blending included), ``restore``.
    """

    image: Volume
    label: np.ndarray
    labels: Labels
    confidence: Mapping[str, float]
    seconds: Mapping[str, float]

    @cached_property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Volume, intensities and place of each class, see ``label_statistics``."""
        return label_statistics(self.label, self.image, self.labels, confidence=self.confidence)

    def nifti(self) -> nib.Nifti1Image:
        """Gives the label map as a nibabel image, with the affine and the codes of the image."""
        if self.image.is_picture:
            return nib.Nifti1Image(self.label, self.image.geometry.affine)
        header = label_header(self.image.header, self.label.shape, self.label.dtype)
        return nib.Nifti1Image(self.label, header.get_best_affine(), header)

    def save(self, path: str | Path) -> None:
        """Writes the label map, see ``write_label``."""
        write_label(path, self.label, self.labels, self.image)


class Predictor:
    """Segments one image after the other, in bounded memory.

    Several models are an ensemble: what one of them would blend as logits, they blend as the mean of their
    probabilities, window by window, in the sums of one. The order in which they are given changes no bit of a label
    map. A cleanup is done where all of them chose the same one; what validation cases asked for in the label maps of
    one model says nothing about those of all.

    Args:
        model: A run folder or model package, or several.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.
        settings: How it is run; test-time augmentation of an ensemble along the axes that all were mirrored along.

    Attributes:
        packages: The models, in the order given.
        package: The first.
        labels: Their classes.
        cleanup: What is done to label maps; None: nothing.
        mirrors: Axes along which windows are mirrored.

    Raises:
        MedmomError: There is no sound model or no such device, models do not go together (see ``check_members``), or
            one was trained without mirroring and ``settings.tta`` asks for it.
    """

    def __init__(
        self, model: str | Path | Sequence[str | Path], *, device: str = "auto", settings: Settings | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.device = torch_device(device)
        models = [model] if isinstance(model, str | Path) else model
        self.packages = tuple(load_package(path) for path in models)
        check_members(self.packages)
        self.package = self.packages[0]
        self.labels = self.package.labels
        self.cleanup = common_cleanup(self.packages)
        self.mirrors = mirror_axes(self.packages) if self.settings.tta else ()
        # Sums of floats depend on their order a little.
        members = sorted(self.packages, key=lambda package: package.checksum)
        self._preparations = preparations(members)
        self._network = as_one(members).to(self.device)

    @property
    def checksum(self) -> str:
        """Of one model its package's; of several the sha256 over theirs, sorted and put together."""
        checksums = sorted(package.checksum for package in self.packages)
        return checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode("ascii")).hexdigest()

    def choices(self) -> dict[str, Any]:
        """Gives all that can change a label besides model and image, as plain types; of an ensemble its members."""
        checksums = sorted(package.checksum for package in self.packages)
        return {
            "overlap": self.settings.overlap,
            "mirrors": list(self.mirrors),
            "skip_air": self.settings.skip_air,
            "cleanup": None if self.cleanup is None else self.cleanup.as_dict(),
            **({"ensemble": checksums} if len(checksums) > 1 else {}),
        }

    def __call__(self, image: Any, affine: np.ndarray | None = None, *, quiet: bool = False) -> Prediction:
        """Segments an image.

        Args:
            image: A path, a sequence of paths (one a channel), a nibabel image, an array of shape (X, Y, Z) or
                (C, X, Y, Z), or what ``read_images`` gave.
            affine: Of an array, shape (4, 4), mm, RAS+.
            quiet: No progress bar.

        Raises:
            MedmomError: The image cannot be read or does not suit the model, or memory does not suffice.
        """
        if isinstance(image, str | Path):
            image = [image]
        if isinstance(image, Sequence) and all(isinstance(path, str | Path) for path in image):
            return self.segment(self.read([Path(path) for path in image]), quiet=quiet)
        started = time.monotonic()
        volume = image if isinstance(image, Volume) else volume_in_memory(image, affine)
        return self.segment(self._prepared(volume, (), started), quiet=quiet)

    def read(self, paths: Sequence[Path]) -> Given:
        """Reads an image and brings it to the working grid.

        Raises:
            MedmomError: It cannot be read, is of another kind or number of channels than the model takes, or its
                working grid is too large.
        """
        started = time.monotonic()
        return self._prepared(read_images(paths, compact=True), tuple(paths), started)

    def _prepared(self, image: Volume, paths: tuple[Path, ...], started: float) -> Given:
        """Brings an image to the working grid; it may be let go of where there are files to read it from again."""
        self._check(image)
        # Before it is prepared: what that takes of the memory is part of the plan.
        plan, again = self._plan(image, paths)
        # The name is for the progress bar.
        own = Case(stem(image.path), image.array, None, image.geometry, ())
        case, *others = (prepare(own, preparation) for preparation in self._preparations)
        if again:
            image = replace(image, array=np.empty((len(image.array), 0, 0, 0), image.array.dtype))
        also = tuple(other.image for other in others)
        return Given(image, case, plan, time.monotonic() - started, again, also)

    def segment(
        self, given: Given, *, quiet: bool = True, probabilities: Sink | None = None, entropy: Sink | None = None
    ) -> Prediction:
        """Segments an image that was read.

        Windows run in order along one axis and are blended by a Gaussian; the logits of finished planes are brought
        to the image's own grid at once, where the largest wins; of an ensemble, probabilities in their place. Where the
        image is smaller than a window it is padded with 0, the mean of a prepared image, as in training. What does
        not fit into the memory of the GPU is tried once more with windows one at a time and their sums in RAM.

        Args:
            given: What ``read`` gave.
            quiet: No progress bar.
            probabilities: Takes the probabilities of all classes, float32 (K, X, Y, Z), plane by plane: one axis
                of the image's grid is cut to the place that is told with them (see ``Restorer``).
            entropy: Takes in the same way the entropy of these probabilities, float32 (X, Y, Z), from 0 to 1.

        Raises:
            MedmomError: Memory does not suffice, or the network's output is not finite.
        """
        plan, told = given.plan
        if not quiet:
            logger.info("%s", told)
        try:
            return self._run(given, plan, quiet, probabilities=probabilities, entropy=entropy)
        except torch.OutOfMemoryError as error:
            smaller = step_down(plan)
            # What a sink took cannot be taken back.
            if smaller is None or probabilities is not None or entropy is not None:
                raise self._too_large(given) from error
            logger.warning("%s: too large for the GPU; once more, one window at a time.", given.image.path)
        except MemoryError as error:
            raise self._too_large(given) from error
        try:
            return self._run(given, smaller, quiet)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise self._too_large(given) from error

    def _run(self, given: Given, plan: StreamPlan, quiet: bool, **sinks: Sink | None) -> Prediction:
        working, own = given.working, given.image.geometry
        scores: Scores = "logits" if len(self.packages) == 1 else "probabilities"
        restorer = Restorer(working.geometry, own, self.labels.num_channels, axis=plan.axis, scores=scores, **sinks)
        body = None
        if self.settings.skip_air:
            body = body_mask(working.image, self._preparations[0], working.geometry.spacing)
        total = num_windows(working.geometry.shape, plan.patch, plan.overlap)
        started, restoring = time.monotonic(), 0.0
        with (
            torch.inference_mode(),
            tqdm(total=total, desc=working.name, unit="window", leave=False, disable=quiet) as bar,
        ):

            def advance(count: int) -> None:
                bar.update(count)

            try:
                for place, logits in stream_logits(
                    self._network,
                    (working.image, *given.also) if given.also else working.image,
                    plan,
                    device=self.device,
                    mirrors=self.mirrors,
                    body=body,
                    advance=advance,
                ):
                    begun = time.monotonic()
                    restorer.push(place, logits)
                    restoring += time.monotonic() - begun
            except FloatingPointError as error:
                raise MedmomError(
                    f"{given.image.path}: the network's output is not finite. Train the model again."
                ) from error
            except OverflowError as error:
                raise MedmomError(
                    f"{given.image.path}: the network's output is too large for sums of 16 bits. Give more --max-ram."
                ) from error
        label = self._cleaned(self.labels.to_values(restorer.finish()), own)
        ended = time.monotonic()
        seconds = {"read": given.seconds, "network": ended - started - restoring, "restore": restoring}
        names = dict(zip(self.labels.names, restorer.confidence.tolist(), strict=True))
        image = read_images(given.again, compact=True) if given.again else given.image
        return Prediction(image, label, self.labels, names, {k: round(v, 3) for k, v in seconds.items()})

    def _cleaned(self, label: np.ndarray, own: Geometry) -> np.ndarray:
        return label if self.cleanup is None else apply(label, own, self.labels, self.cleanup)

    def _plan(self, image: Volume, paths: tuple[Path, ...]) -> tuple[tuple[StreamPlan, str], tuple[Path, ...]]:
        """A plan that keeps the budget, and the files to read the image from again if it is let go of meanwhile."""
        working = working_geometry(self.package.preparation, image.geometry)
        plan = partial(
            plan_stream,
            self._network,
            (len(self._preparations) * len(self.package.channels), *working.shape),
            image.geometry.reoriented(working.orientation).shape,
            self.package.patch,
            self.settings.overlap,
            self.labels.num_channels,
            device=self.device,
            max_ram=self.settings.max_ram,
            max_vram=self.settings.max_vram,
            mirrors=self.mirrors,
        )
        try:
            return plan(), ()
        except MedmomError as error:
            fault = error
        try:
            if paths and not image.is_picture:
                return plan(image_bytes=-image.array.nbytes), paths
        except MedmomError as error:
            fault = error
        raise MedmomError(f"{image.path}: {fault}")

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
        check_working_grid(image.path, self.package.preparation, image.geometry)

    def _too_large(self, given: Given) -> MedmomError:
        return MedmomError(
            f"{given.image.path}: memory is too small for the {times(given.working.geometry.shape)} voxels of its "
            f"working grid. Crop the image{', or name --device cpu' if self.device.type == 'cuda' else ''}."
        )
