from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from medmom.data.case import Case
from medmom.data.intensities import grey, nonzero_box, nonzero_mask, parted, statistics
from medmom.errors import MedmomError
from medmom.geometry import Geometry, resample, resample_slabs

AXES = {"axial": "RAS", "coronal": "RSA", "sagittal": "ASR"}
"""Where the axes of the working grid point, by what the third one counts."""

STORED = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}
"""Which of the file's own axes they are, where these are not turned."""


@dataclass(frozen=True)
class Preparation:
    """How a case is brought to the working grid; the same for training and for inference.

    The working grid has the case's own axes, turned to the closest right-anterior-superior order or to that of
    ``plane``, and the spacing or the size given here. Images go there by cubic, labels by linear interpolation of
    each class.

    Attributes:
        spacing: Voxel edges of the working grid in mm, in the order of its axes; two numbers leave the third axis,
            that of the slices, alone; None keeps each case's own.
        intensity: ``"ct"`` clips and standardises with numbers fixed for all cases, in Hounsfield units;
            ``"zscore"`` subtracts each case's own mean and divides by its own standard deviation; ``"unit"`` divides
            by 255, for pictures.
        clip: For ``"ct"``: lowest and highest value kept; None: 0.5 and 99.5 percentile of the
            foreground of the training cases.
        mean: For ``"ct"``: value that becomes 0; None: mean of the clipped foreground.
        std: For ``"ct"``: value that becomes 1; None: standard deviation of the clipped foreground.
        size: Voxels of the working grid along its axes, instead of a spacing, whatever the image's own proportions;
            two numbers leave the third axis, that of the slices, alone. None: as many as the spacing asks for.
        plane: What the third axis of the working grid counts: ``"axial"``, ``"coronal"`` or ``"sagittal"`` slices.
        colour: ``"grey"`` or ``"rgb"`` brings pictures of one and of three channels to that; ``"own"`` leaves them.
        axes: ``"patient"`` turns the axes to the patient's; ``"stored"`` takes them as the file has them, whatever
            they are in the patient: (x, y, z) for ``"axial"``, (x, z, y) for ``"coronal"``, (y, z, x) for
            ``"sagittal"``.
        exact: What a spacing meets exactly: ``"spacing"``, about the same centre, or ``"extent"``, the outer edges of
            the image, as nnU-Net does; the other one to half a voxel.
        within: For ``"zscore"``: the voxels whose mean and standard deviation count. ``"image"``: all; ``"box"``: the
            smallest box with all voxels that are not 0 in every channel; ``"mask"``: these voxels and the holes
            between them, outside of which the image becomes 0.
    """

    spacing: tuple[float, ...] | None
    intensity: Literal["ct", "zscore", "unit"]
    clip: tuple[float, float] | None = None
    mean: float | None = None
    std: float | None = None
    size: tuple[int, ...] | None = None
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    colour: Literal["own", "grey", "rgb"] = "own"
    axes: Literal["patient", "stored"] = "patient"
    exact: Literal["spacing", "extent"] = "spacing"
    within: Literal["image", "box", "mask"] = "image"

    def __post_init__(self) -> None:
        """Refuses numbers that no case could be prepared with."""
        if self.size is not None and (len(self.size) not in (2, 3) or min(self.size) < 1):
            raise MedmomError(f"preparation.size {self.size}: give two or three numbers of voxels, each 1 or more.")
        if self.size is not None and self.spacing is not None:
            raise MedmomError(
                f"preparation.size {self.size} and preparation.spacing {self.spacing}: one follows from the other; "
                "set one of them to null."
            )
        if self.spacing is not None and (len(self.spacing) not in (2, 3) or min(self.spacing) <= 0):
            raise MedmomError(f"preparation.spacing {self.spacing}: give two or three voxel edges in mm, each above 0.")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise MedmomError(f"preparation.clip {self.clip}: give the lower bound first.")
        if self.std is not None and self.std <= 0:
            raise MedmomError(f"preparation.std {self.std}: give a value above 0.")
        if self.within != "image" and (self.intensity != "zscore" or self.colour == "grey"):
            raise MedmomError(
                f"preparation.within {self.within}: it says which voxels preparation.intensity zscore looks at, in the "
                "colours that are stored; leave it at image."
            )

    @property
    def is_fitted(self) -> bool:
        """Whether every number that ``prepare`` needs is known."""
        return self.intensity != "ct" or None not in (self.clip, self.mean, self.std)


def fit_preparation(preparation: Preparation, foreground: Iterable[np.ndarray]) -> Preparation:
    """Fills in the intensity numbers that a recipe leaves open.

    Args:
        preparation: What the recipe says; numbers it gives are kept.
        foreground: Intensities of labelled foreground voxels, one 1-D array a training case, on a
            common scale (Hounsfield units). Not read where nothing is open.

    Returns:
        A preparation that is fitted.

    Raises:
        MedmomError: There is no foreground voxel.
    """
    if preparation.is_fitted:
        return preparation
    values = np.concatenate([np.asarray(part, dtype=np.float64) for part in foreground] or [np.zeros(0)])
    if values.size == 0:
        raise MedmomError("no labelled foreground in the training cases; give preparation.clip, mean and std.")
    low, high = preparation.clip or np.percentile(values, (0.5, 99.5))
    if high <= low:
        raise MedmomError(f"the foreground has one intensity only ({low:g}); give preparation.clip, mean and std.")
    clipped = np.clip(values, low, high)
    mean = preparation.mean if preparation.mean is not None else float(clipped.mean())
    std = preparation.std if preparation.std is not None else float(clipped.std())
    return replace(preparation, clip=(float(low), float(high)), mean=mean, std=std)


def working_geometry(preparation: Preparation, geometry: Geometry) -> Geometry:
    """Gives the grid on which the network sees a case that lies on ``geometry``."""
    own = "".join(geometry.orientation[axis] for axis in STORED[preparation.plane])
    turned = geometry.reoriented(AXES[preparation.plane] if preparation.axes == "patient" else own)
    if preparation.size is not None:
        return turned.with_shape((*preparation.size, *turned.shape[len(preparation.size) :]))
    if preparation.spacing is None:
        return turned
    spacing = (*preparation.spacing, *turned.spacing[len(preparation.spacing) :])
    if preparation.exact == "spacing":
        return turned.with_spacing(spacing)
    edges = zip(turned.spacing, spacing, turned.shape, strict=True)
    return turned.with_shape([max(1, round(old / new * count)) for old, new, count in edges])


def prepare(case: Case, preparation: Preparation) -> Case:
    """Brings a case to the working grid and scales its intensities.

    Besides what is given and what is returned, the image exists at most half resampled, and once more where a mask is
    looked at: slabs of it become float32 and are scaled one after the other. The result is the same to the last bit
    for the same intensities, however they are stored.

    Args:
        case: On its own grid; the image float32 or integers (see ``read_images``), in any memory order.
        preparation: Fitted (see ``fit_preparation``).

    Returns:
        The case on the working grid: image float32 (C, X, Y, Z), label ``uint8`` (X, Y, Z) or None.
    """
    target = working_geometry(preparation, case.geometry)
    image = case.image
    if preparation.within == "mask":
        # As a channel it reaches the slabs that are scaled, wherever they lie.
        image = np.concatenate([image, nonzero_mask(image)[None]], dtype=image.dtype)
    image = resample(image, case.geometry, target, order=3, change=_change(image, preparation))
    if preparation.colour == "rgb" and len(image) == 1:
        image = np.repeat(image, 3, axis=0)
    label = case.label
    if label is not None:
        label = resample_label(label, case.geometry, target)
    return replace(case, image=image, label=label, geometry=target)


def working_channels(preparation: Preparation, num_channels: int) -> int:
    """Gives the number of channels that the network sees of an image with ``num_channels``."""
    wanted = {"grey": 1, "rgb": 3}.get(preparation.colour)
    return num_channels if wanted is None or num_channels not in (1, 3) else wanted


def _change(image: np.ndarray, preparation: Preparation) -> Callable[[np.ndarray], np.ndarray]:
    """Gives what brings a float32 slab (C, ...) of the image to the channels and the scale of the working grid."""
    to_grey = preparation.colour == "grey" and len(image) == 3
    scale = _scale(image, to_grey, preparation)
    return lambda slab: scale(grey(slab) if to_grey else slab)


def _scale(image: np.ndarray, to_grey: bool, preparation: Preparation) -> Callable[[np.ndarray], np.ndarray]:
    """Gives what scales a slab in place."""
    if preparation.intensity == "unit":
        return lambda slab: np.divide(slab, np.float32(255), out=slab)
    if preparation.intensity == "ct":
        if preparation.clip is None or preparation.mean is None or preparation.std is None:
            raise ValueError("the preparation is not fitted")
        (low, high), mean, std = preparation.clip, np.float32(preparation.mean), np.float32(preparation.std)

        def clip(slab: np.ndarray) -> np.ndarray:
            np.clip(slab, low, high, out=slab)
            slab -= mean
            slab /= std
            return slab

        return clip
    has_mask = preparation.within == "mask"
    counted = image[(slice(None), *nonzero_box(image))] if preparation.within == "box" else image
    means, deviations = statistics(counted, to_grey, has_mask=has_mask)

    def standardise(slab: np.ndarray) -> np.ndarray:
        slab, mask = parted(slab, has_mask)
        # float32 would lose what differs by little from a large mean.
        double = slab - means
        double /= deviations
        if mask is not None:
            double *= mask
        slab[...] = double
        return slab

    return standardise


def resample_label(label: np.ndarray, source: Geometry, target: Geometry) -> np.ndarray:
    """Brings a label map to another grid: each class is interpolated linearly, the largest wins.

    Args:
        label: ``uint8`` channel indices, shape ``source.shape``.
        source: Grid of ``label``.
        target: Grid wanted; shares its axes with ``source``.

    Returns:
        ``uint8`` channel indices, shape ``target.shape``; ties go to the smaller index.
    """
    present = np.unique(label)
    if source.is_close(target) or len(present) == 1:
        return np.asarray(resample(label[None], source, target, order=0)[0], dtype=np.uint8)
    return _largest((np.asarray(label == k, dtype=np.float32) for k in present), source, target, present)


def restore(logits: np.ndarray, working: Geometry, own: Geometry) -> np.ndarray:
    """Brings class logits from the working grid back to the case's own grid, as a label map.

    Logits are interpolated linearly, one class at a time and slab by slab, and the largest wins: label maps are
    never interpolated, and the logits of all classes never exist on the own grid at once.

    Args:
        logits: Shape (K, *working.shape).
        working: Grid of ``logits``.
        own: Grid of the case.

    Returns:
        ``uint8`` channel indices, shape ``own.shape``; ties go to the smaller index.
    """
    return _largest(iter(logits), working, own, np.arange(len(logits)))


def _largest(scores: Iterable[np.ndarray], source: Geometry, target: Geometry, indices: np.ndarray) -> np.ndarray:
    """Index of the score that is largest after linear interpolation to ``target``."""
    label = np.zeros(target.shape, dtype=np.uint8)
    best = np.full(target.shape, -np.inf, dtype=np.float32)
    for index, score in zip(indices, scores, strict=True):
        for place, (slab,) in resample_slabs(score[None], source, target):
            wins = slab > best[..., place]
            label[..., place][wins] = index
            np.copyto(best[..., place], slab, where=wins)
    return label
