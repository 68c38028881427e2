"""Whether an image looks like those that a classifier learned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medmom.errors import MedmomError
from medmom.models.resnet import ClassificationHead
from medmom.models.slices import SliceClassifier

USUAL = 99.0
"""Percentile of the validation images' distances beyond which an image counts as unlike: one in a hundred is."""

TAIL = 0.5
"""Percentile below which, and above 100 less which, intensities of training images do not make a range wider."""

BLANK = 0.02
"""Share of the least usual contrast below which an image shows nothing."""

SUMMARY = ("minimum", "1st percentile", "median", "99th percentile", "maximum", "share of voxels at the minimum")
"""What the six numbers of an image's summary are, in order."""


@dataclass(frozen=True, eq=False)
class Novelty:
    """What training images look like to the network, and in their intensities.

    The distance of an image is that of its features f to the closest class mean, ``min_c |W (f - m_c)|``, where
    ``W`` whitens the covariance within classes: Mahalanobis'.

    Attributes:
        means: float32, shape (number of means, D): of each class that training images are of, else of all images.
        whitening: W, float32, shape (D, D).
        threshold: Usual distances lie below.
        ranges: Lowest and highest usual value of each number of a summary.
        contrast: Least usual difference of the 99th and the 1st percentile.

    Source:
        Lee et al. 2018, arXiv 1807.03888, equations 1 and 2, on the last features alone and without their
        perturbation of the input.
    """

    means: np.ndarray
    whitening: np.ndarray
    threshold: float
    ranges: tuple[tuple[float, float], ...]
    contrast: float

    def __post_init__(self) -> None:
        """Refuses parts that do not fit together."""
        width = self.means.shape[-1]
        if self.means.ndim != 2 or self.whitening.shape != (width, width) or len(self.ranges) != len(SUMMARY):
            raise ValueError(f"novelty of {self.means.shape}, {self.whitening.shape} and {len(self.ranges)} ranges")

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Distances, shape (N,), of features, shape (N, D)."""
        # As many steps as means: the differences of all pairs would be large.
        squares = [np.square((features - mean) @ self.whitening.T.astype(np.float64)).sum(1) for mean in self.means]
        distances: np.ndarray = np.sqrt(np.min(squares, axis=0))
        return distances

    def flag(self, features: np.ndarray, summary: np.ndarray) -> str:
        """Says in a few words why an image's class is not to be trusted.

        Args:
            features: Of the image, shape (D,).
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
        distance = float(self.distance(features[None])[0])
        if not distance <= self.threshold:
            reasons.append(f"unlike the training images (distance {distance:.3g}, usual below {self.threshold:.3g})")
        return "; ".join(reasons)

    def as_dict(self) -> dict[str, Any]:
        """The plain numbers, for JSON; ``tensors`` has the rest."""
        return {"threshold": self.threshold, "ranges": [list(pair) for pair in self.ranges], "contrast": self.contrast}

    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name."""
        return {"means": torch.from_numpy(self.means), "whitening": torch.from_numpy(self.whitening)}

    @classmethod
    def from_parts(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Novelty:
        """Puts ``as_dict`` and ``tensors`` together; KeyError, TypeError or ValueError where parts are missing."""
        ranges = tuple((float(low), float(high)) for low, high in data["ranges"])
        means, whitening = tensors["means"].numpy(), tensors["whitening"].numpy()
        return cls(means, whitening, float(data["threshold"]), ranges, float(data["contrast"]))


class Look(NamedTuple):
    """What a classifier says of images, and what it says it from; all float32 on the CPU.

    Attributes:
        logits: Of whole images, shape (B, K).
        features: What the last linear layer reads, shape (B, D); of a volume seen slice by slice, those of the volume.
        slices: Logits of each slice, shape (B, S, K), of a ``SliceClassifier``; else None.
    """

    logits: Tensor
    features: Tensor
    slices: Tensor | None


def fit_novelty(
    features: np.ndarray, summaries: np.ndarray, targets: np.ndarray, *, validation_features: np.ndarray
) -> Novelty:
    """Learns what images look like: means and covariance from training images, the threshold from validation images.

    Where every training image is of one class there is a mean for each class, with one covariance for all; else one
    mean. The covariance is shrunk towards a multiple of the identity. The threshold is the 99th percentile of the
    distances of the validation images, which are of the same kind: one in a hundred of them is flagged.

    The range of each number of the summaries is that between the 0.5th and the 99.5th percentile of the training
    images, widened on both sides by half of itself, and at least by a tenth of the median contrast (for the share of
    voxels, a tenth).

    Args:
        features: Of training images, shape (N, D); see ``pooled_features``.
        summaries: Of their intensities, shape (N, 6).
        targets: Their classes, 0 or 1, shape (N, K).
        validation_features: Of validation images, shape (M, D).

    Raises:
        MedmomError: Features are not finite, as after a training that diverged.

    Source:
        Lee et al. 2018, arXiv 1807.03888 (features, class means, one covariance); Ledoit and Wolf 2004,
        doi:10.1016/S0047-259X(03)00096-4 (shrinkage). Threshold and ranges are our own choice.
    """
    features, validation = features.astype(np.float64), validation_features.astype(np.float64)
    if not (np.isfinite(features).all() and np.isfinite(validation).all()):
        raise MedmomError("the network's features are not finite; train again with a smaller learning rate.")
    known = targets.argmax(axis=1) if (targets.sum(axis=1) == 1).all() else np.zeros(len(targets), dtype=int)
    present = np.unique(known)
    means = np.stack([features[known == k].mean(axis=0) for k in present])
    residuals = features - means[np.searchsorted(present, known)]
    values, vectors = np.linalg.eigh(_shrunk_covariance(residuals))
    # Features that never change have no scale of their own.
    floor = max(1e-6 * float(values.max()), 1e-12)
    whitening = (vectors / np.sqrt(np.maximum(values, floor))).T
    contrasts = summaries[:, 3] - summaries[:, 1]
    low, high = np.percentile(summaries.astype(np.float64), (TAIL, 100 - TAIL), axis=0)
    least = np.full(len(SUMMARY), 0.1 * float(np.median(contrasts)))
    least[5] = 0.1
    margin = np.maximum((high - low) / 2, least)
    low, high = low - margin, high + margin
    low[5], high[5] = max(low[5], 0.0), min(high[5], 1.0)
    novelty = Novelty(
        means.astype(np.float32),
        whitening.astype(np.float32),
        threshold=0.0,
        ranges=tuple(zip(low.tolist(), high.tolist(), strict=True)),
        contrast=float(np.percentile(contrasts, TAIL)),
    )
    threshold = float(np.percentile(novelty.distance(validation), USUAL))
    return Novelty(novelty.means, novelty.whitening, threshold, novelty.ranges, novelty.contrast)


def summarise(image: np.ndarray) -> np.ndarray:
    """Six numbers of an image's intensities, float32, shape (6,), see ``SUMMARY``; the image as it is in the file."""
    low = image.min()
    share = np.count_nonzero(image == low) / image.size
    return np.array([low, *np.percentile(image, (1, 50, 99)), image.max(), share], np.float32)


def look(network: nn.Module, image: Tensor) -> Look:
    """Runs a classifier once and keeps what its last linear layer reads.

    Args:
        network: A classifier of ``medmom.models`` in evaluation mode.
        image: Shape (B, C, *spatial), on the network's device, as the network takes it.
    """
    (head,) = [module for module in network.modules() if isinstance(module, ClassificationHead)]
    caught: list[Tensor] = []
    handle = head.linear.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    try:
        with torch.no_grad():
            by_slice = network.by_slice(image) if isinstance(network, SliceClassifier) else None
            logits: Tensor = network(image) if by_slice is None else by_slice.volume
    finally:
        handle.remove()
    # Beside the features of whole images the layer may read those of each slice, (B, S, D).
    features = next(given for given in caught if given.ndim == 2)
    return Look(
        logits.float().cpu(), features.float().cpu(), None if by_slice is None else by_slice.slices.float().cpu()
    )


def pooled_features(network: nn.Module, image: Tensor) -> Tensor:
    """Features of whole images before the last linear layer, shape (B, D), float32 on the CPU; see ``look``."""
    return look(network, image).features


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
