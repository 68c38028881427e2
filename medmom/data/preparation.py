from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from medmom.data.case import Case
from medmom.errors import MedmomError
from medmom.geometry import Geometry, resample, resample_slabs


@dataclass(frozen=True)
class Preparation:
    """How a case is brought to the working grid; the same for training and for inference.

    The working grid has the case's own axes, turned to the closest right-anterior-superior order, and
    the spacing given here. Images go there by cubic, labels by linear interpolation of each class.

    Attributes:
        spacing: Voxel edges of the working grid in mm, in RAS axis order; None keeps each case's own.
        intensity: ``"ct"`` clips and standardises with numbers fixed for all cases, in Hounsfield units;
            ``"zscore"`` subtracts each case's own mean and divides by its own standard deviation.
        clip: For ``"ct"``: lowest and highest value kept; None: 0.5 and 99.5 percentile of the
            foreground of the training cases.
        mean: For ``"ct"``: value that becomes 0; None: mean of the clipped foreground.
        std: For ``"ct"``: value that becomes 1; None: standard deviation of the clipped foreground.
    """

    spacing: tuple[float, ...] | None
    intensity: Literal["ct", "zscore"]
    clip: tuple[float, float] | None = None
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        """Refuses numbers that no case could be prepared with."""
        if self.spacing is not None and (len(self.spacing) != 3 or min(self.spacing) <= 0):
            raise MedmomError(f"preparation.spacing {self.spacing}: give three voxel edges in mm, each above 0.")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise MedmomError(f"preparation.clip {self.clip}: give the lower bound first.")
        if self.std is not None and self.std <= 0:
            raise MedmomError(f"preparation.std {self.std}: give a value above 0.")

    @property
    def is_fitted(self) -> bool:
        """Whether every number that ``prepare`` needs is known."""
        return self.intensity == "zscore" or None not in (self.clip, self.mean, self.std)


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
    turned = geometry.reoriented("RAS")
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
    image = _scale(case.image, preparation)
    image = resample(image, case.geometry, target, order=3)
    label = case.label
    if label is not None:
        label = resample_label(label, case.geometry, target)
    return replace(case, image=image, label=label, geometry=target)


def _scale(image: np.ndarray, preparation: Preparation) -> np.ndarray:
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
