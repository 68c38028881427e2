"""Whether an image looks like those that a classifier learned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medmom.inference.appearance import appearance
from medmom.models.slices import SliceClassifier

USUAL = 99.0
"""Percentile of the validation images' distances beyond which an image counts as unlike: one in a hundred is."""

TAIL = 0.5
"""Percentile below which, and above 100 less which, intensities of training images do not make a range wider."""

BLANK = 0.02
"""Share of the least usual contrast below which an image shows nothing."""

FEW = 10
"""Fewer images of a class say too little of how much they differ."""

ARRAYS = ("means", "whitening", "thresholds")
"""Attributes of ``Novelty`` that are arrays."""

SUMMARY = ("minimum", "1st percentile", "median", "99th percentile", "maximum", "share of voxels at the minimum")
"""What the six numbers of an image's summary are, in order."""


@dataclass(frozen=True, eq=False)
class Novelty:
    """What training images look like, class by class, and where their intensities lie.

    The distance of an image is that of its appearance a to the closest class, in usual distances of that class:
    ``min_c |W_c (a - m_c)| / t_c``, where ``W_c`` whitens the covariance of the class: Mahalanobis' distance.

    It is a hint, not a guard: what looks alike and is something else is not found.

    Attributes:
        means: m_c, float32, shape (M, D), of each class that training images are of, else of all images.
        whitening: W_c, float32, shape (M, D, D).
        thresholds: t_c, float32, shape (M,): 99 of 100 validation images of the class lie closer.
        span: Intensity of black and of white for ``appearance``.
        ranges: Lowest and highest usual value of each number of a summary.
        contrast: Least usual difference of the 99th and the 1st percentile.
    """

    means: np.ndarray
    whitening: np.ndarray
    thresholds: np.ndarray
    span: tuple[float, float]
    ranges: tuple[tuple[float, float], ...]
    contrast: float

    def __post_init__(self) -> None:
        """Refuses parts that do not fit together."""
        num, width = self.means.shape
        fits = self.whitening.shape == (num, width, width) and self.thresholds.shape == (num,)
        if not fits or len(self.ranges) != len(SUMMARY) or len(self.span) != 2:
            raise ValueError(f"novelty of {self.means.shape}, {self.whitening.shape} and {len(self.ranges)} ranges")

    def distance(self, looks: np.ndarray) -> np.ndarray:
        """Distances, shape (N,), of appearances, shape (N, D); 1 is as far as usual images lie."""
        return np.asarray(np.min(_distances(looks, self.means, self.whitening) / self.thresholds[:, None], axis=0))

    def flag(self, image: np.ndarray, summary: np.ndarray) -> str:
        """Says in a few words why an image's class is not to be trusted.

        Args:
            image: As the network takes it, shape (C, *spatial).
            summary: Six numbers of its intensities as they are in the file, see ``SUMMARY``.

        Returns:
            Reasons, joined by "; "; empty where there is none.
        """
        if summary[3] - summary[1] < BLANK * self.contrast:
            return "blank image"
        reasons = []
        pairs = zip(SUMMARY, summary, self.ranges, strict=True)
        strange = next((each for each in pairs if not each[2][0] <= each[1] <= each[2][1]), None)
        if strange is not None:
            name, value, (low, high) = strange
            reasons.append(
                f"intensities unlike the training images ({name} {value:.3g}, usual {low:.3g} to {high:.3g})"
            )
        distance = float(self.distance(appearance(image, self.span)[None])[0])
        if not distance <= 1:
            reasons.append(f"unlike the training images ({distance:.3g} times as far from them as usual)")
        return "; ".join(reasons)

    def as_dict(self) -> dict[str, Any]:
        """The plain numbers, for JSON; ``tensors`` has the rest."""
        ranges = [list(pair) for pair in self.ranges]
        return {"span": list(self.span), "ranges": ranges, "contrast": self.contrast}

    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name."""
        return {name: torch.from_numpy(getattr(self, name)) for name in ARRAYS}

    @classmethod
    def from_parts(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Novelty:
        """Puts ``as_dict`` and ``tensors`` together; KeyError, TypeError or ValueError where parts are missing."""
        ranges = tuple((float(low), float(high)) for low, high in data["ranges"])
        low, high = data["span"]
        arrays = {name: tensors[name].numpy() for name in ARRAYS}
        return cls(**arrays, span=(float(low), float(high)), ranges=ranges, contrast=float(data["contrast"]))


class Look(NamedTuple):
    """What a classifier says of images; float32 on the CPU.

    Attributes:
        logits: Of whole images, shape (B, K).
        slices: Logits of each slice, shape (B, S, K), of a ``SliceClassifier``; else None.
    """

    logits: Tensor
    slices: Tensor | None


def fit_novelty(
    looks: np.ndarray,
    targets: np.ndarray,
    summaries: np.ndarray,
    *,
    validation: tuple[np.ndarray, np.ndarray],
    span: tuple[float, float],
) -> Novelty:
    """Learns what images look like: means and covariances from training images, usual distances from validation images.

    Where every training image is of one class there is a mean and a covariance for each class, else one for all. The
    covariance is shrunk towards a multiple of the identity; a class of fewer than 10 images has that of all classes.
    The usual distance of a class is the 99th percentile of its validation images: one in a hundred of them is flagged.
    A class with fewer than 10 of them takes the largest usual distance of the others.

    The range of each number of the summaries is that between the 0.5th and the 99.5th percentile of the training
    images, widened on both sides by half of itself, and at least by a tenth of the median contrast (for the share of
    voxels, a tenth).

    Args:
        looks: ``appearance`` of training images, shape (N, D).
        targets: Their classes, 0 or 1, shape (N, K).
        summaries: Of their intensities, shape (N, 6).
        validation: Appearances and classes of validation images.
        span: With which appearances were made.

    Source:
        Lee et al. 2018, arXiv 1807.03888, equation 2, of the image instead of a network's features (these are made to
        tell the classes apart, and lose what else there is to see), and with a covariance for each class; Ledoit and
        Wolf 2004, doi:10.1016/S0047-259X(03)00096-4 (shrinkage). The features, percentiles and ranges are our own.
    """
    looks, known = looks.astype(np.float64), _known(targets)
    present = np.unique(known)
    means = np.stack([looks[known == k].mean(axis=0) for k in present])
    residuals = looks - means[np.searchsorted(present, known)]
    own = [residuals[known == k] for k in present]
    whitening = np.stack([_whitening(rows if len(rows) >= FEW else residuals) for rows in own])
    held_out, classes = validation[0].astype(np.float64), _known(validation[1])
    if len(present) == 1:
        classes = np.full(len(held_out), present[0])
    thresholds = _thresholds(_distances(held_out, means, whitening), classes, present)
    contrasts = summaries[:, 3] - summaries[:, 1]
    return Novelty(
        means.astype(np.float32),
        whitening.astype(np.float32),
        thresholds.astype(np.float32),
        span,
        _ranges(summaries.astype(np.float64), float(np.median(contrasts))),
        contrast=float(np.percentile(contrasts, TAIL)),
    )


def _known(targets: np.ndarray) -> np.ndarray:
    """Index of the class of each image; 0 for all where an image may be of several."""
    is_single = (targets.sum(axis=1) == 1).all()
    return np.asarray(targets.argmax(axis=1) if is_single else np.zeros(len(targets), dtype=int))


def _distances(looks: np.ndarray, means: np.ndarray, whitening: np.ndarray) -> np.ndarray:
    """Mahalanobis' distance of each image to each class, shape (M, N)."""
    pairs = zip(means.astype(np.float64), whitening.astype(np.float64), strict=True)
    # Class by class: the differences of all pairs at once would be large.
    return np.stack([np.sqrt(np.square((looks - mean) @ matrix.T).sum(axis=1)) for mean, matrix in pairs])


def _thresholds(distances: np.ndarray, classes: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Usual distance of each class, shape (M,), above 0."""
    own = [distances[row, classes == k] for row, k in enumerate(present)]
    enough = [float(np.percentile(found, USUAL)) for found in own if len(found) >= FEW]
    largest = max(enough or [float(distances.min(axis=0).max(initial=0.0))])
    usual = [float(np.percentile(found, USUAL)) if len(found) >= FEW else largest for found in own]
    return np.maximum(usual, 1e-6)


def _ranges(summaries: np.ndarray, contrast: float) -> tuple[tuple[float, float], ...]:
    low, high = np.percentile(summaries, (TAIL, 100 - TAIL), axis=0)
    least = np.full(len(SUMMARY), 0.1 * contrast)
    least[5] = 0.1
    margin = np.maximum((high - low) / 2, least)
    return tuple(zip((low - margin).tolist(), (high + margin).tolist(), strict=True))


def _whitening(residuals: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(_shrunk_covariance(residuals))
    # What never changes has no scale of its own.
    floor = max(1e-6 * float(values.max()), 1e-12)
    return np.asarray((vectors / np.sqrt(np.maximum(values, floor))).T)


def look(network: nn.Module, image: Tensor) -> Look:
    """Runs a classifier.

    Args:
        network: A classifier of ``medmom.models`` in evaluation mode.
        image: Shape (B, C, *spatial), on the network's device, as the network takes it.
    """
    with torch.no_grad():
        if isinstance(network, SliceClassifier):
            found = network.by_slice(image)
            return Look(found.volume.float().cpu(), found.slices.float().cpu())
        return Look(network(image).float().cpu(), None)


def _shrunk_covariance(residuals: np.ndarray) -> np.ndarray:
    """Covariance of centred rows, shrunk towards a multiple of the identity.

    ``(1 - s) S + s m I`` with S the empirical covariance of n rows x of D numbers, m the mean of its diagonal and
    ``s = min(1, sum |x x' - S|^2 / n^2 / |S - m I|^2)`` in Frobenius norms.

    Source:
        Ledoit and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4, the estimator S*.
    """
    count, width = residuals.shape
    empirical = residuals.T @ residuals / count
    scale = float(np.trace(empirical)) / width
    spread = float(np.square(empirical - scale * np.eye(width)).sum())
    # The sum of |x x' - S|^2 is that of |x|^4 less n |S|^2.
    noise = float(np.square(np.square(residuals).sum(axis=1)).sum()) / count - float(np.square(empirical).sum())
    share = min(1.0, noise / count / spread) if spread > 0 else 1.0
    shrunk: np.ndarray = (1 - share) * empirical + share * scale * np.eye(width)
    return shrunk
