from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from medmom.data.case import Case
from medmom.errors import MedmomError
from medmom.geometry import Geometry, resample, resample_slabs

AXES = {"axial": "RAS", "coronal": "RSA", "sagittal": "ASR"}
"""Where the axes of the working grid point, by what the third one counts."""

LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in grey, as in ITU-R BT.601."""


@dataclass(frozen=True)
class Preparation:
    """How a case is brought to the working grid; the same for training and for inference.

    The working grid has the case's own axes, turned to the closest right-anterior-superior order or to that of
    ``plane``, and the spacing or the size given here. Images go there by cubic, labels by linear interpolation of
    each class.

    Attributes:
        spacing: Voxel edges of the working grid in mm, in the order of its axes; None keeps each case's own.
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
    """

    spacing: tuple[float, ...] | None
    intensity: Literal["ct", "zscore", "unit"]
    clip: tuple[float, float] | None = None
    mean: float | None = None
    std: float | None = None
    size: tuple[int, ...] | None = None
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    colour: Literal["own", "grey", "rgb"] = "own"

    def __post_init__(self) -> None:
        """Refuses numbers that no case could be prepared with."""
        if self.size is not None and (len(self.size) not in (2, 3) or min(self.size) < 1):
            raise MedmomError(f"preparation.size {self.size}: give two or three numbers of voxels, each 1 or more.")
        if self.size is not None and self.spacing is not None:
            raise MedmomError(
                f"preparation.size {self.size} and preparation.spacing {self.spacing}: one follows from the other; "
                "set one of them to null."
            )
        if self.spacing is not None and (len(self.spacing) != 3 or min(self.spacing) <= 0):
            raise MedmomError(f"preparation.spacing {self.spacing}: give three voxel edges in mm, each above 0.")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise MedmomError(f"preparation.clip {self.clip}: give the lower bound first.")
        if self.std is not None and self.std <= 0:
            raise MedmomError(f"preparation.std {self.std}: give a value above 0.")

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
    turned = geometry.reoriented(AXES[preparation.plane])
    if preparation.size is not None:
        return turned.with_shape((*preparation.size, *turned.shape[len(preparation.size) :]))
    return turned if preparation.spacing is None else turned.with_spacing(preparation.spacing)


def prepare(case: Case, preparation: Preparation) -> Case:
    """Brings a case to the working grid and scales its intensities.

    Args:
        case: On its own grid.
        preparation: Fitted (see ``fit_preparation``).

    Returns:
        The case on the working grid: image float32 (C, X, Y, Z), label ``uint8`` (X, Y, Z) or None.
    """
    target = working_geometry(preparation, case.geometry)
    image = _scale(_coloured(case.image, preparation.colour), preparation)
    image = resample(image, case.geometry, target, order=3)
    label = case.label
    if label is not None:
        label = resample_label(label, case.geometry, target)
    return replace(case, image=image, label=label, geometry=target)


def working_channels(preparation: Preparation, num_channels: int) -> int:
    """Gives the number of channels that the network sees of an image with ``num_channels``."""
    wanted = {"grey": 1, "rgb": 3}.get(preparation.colour)
    return num_channels if wanted is None or num_channels not in (1, 3) else wanted


def _coloured(image: np.ndarray, colour: str) -> np.ndarray:
    """Brings images of one and of three channels to the number wanted; others stay as they are."""
    if colour == "grey" and len(image) == 3:
        return np.tensordot(np.array(LUMA, np.float32), image, axes=1)[None]
    if colour == "rgb" and len(image) == 1:
        return np.repeat(image, 3, axis=0)
    return image


def _scale(image: np.ndarray, preparation: Preparation) -> np.ndarray:
    if preparation.intensity == "unit":
        return image / np.float32(255)
    if preparation.intensity == "ct":
        if not preparation.is_fitted or preparation.clip is None:
            raise ValueError("the preparation is not fitted")
        low, high = preparation.clip
        scaled: np.ndarray = np.clip(image, low, high)
        scaled -= np.float32(preparation.mean)
        scaled /= np.float32(preparation.std)
        return scaled
    axes = tuple(range(1, image.ndim))
    # Sums of float32 squares overflow for large and vanish for tiny intensities: reduce in float64.
    mean = image.mean(axis=axes, keepdims=True, dtype=np.float64)
    std = image.std(axis=axes, keepdims=True, dtype=np.float64)
    std[std == 0] = 1  # a constant image becomes 0, not NaN
    return np.asarray((image - mean) / std, dtype=np.float32)


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
