"""Dice of label maps before and after a change, on the same cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from medmom.cleanup import Cleanup, apply
from medmom.data.files import Volume, check_same_grid, read_geometry, read_label
from medmom.errors import MedmomError
from medmom.evaluation.matching import Matched, Matching
from medmom.labels import IGNORE, Labels

DRAWS = 1000
SEED = 0
LEVEL = 0.9


@dataclass(frozen=True)
class Gain:
    """Mean Dice of a class before and after, over the cases that have both; None where there are none.

    Attributes:
        before: Mean over cases.
        after: The same, after.
        gain: ``after`` less ``before``.
        low: Lower end of its 90 % interval; None with fewer than two patients.
        high: Upper end.
        num_patients: Patients with such a case.
        num_changed: Cases whose Dice is another.
    """

    before: float | None
    after: float | None
    gain: float | None
    low: float | None
    high: float | None
    num_patients: int
    num_changed: int


def paired_gain(before: np.ndarray, after: np.ndarray, patients: Sequence[str]) -> Gain:
    """Compares two Dice of each case, with a percentile bootstrap of 1000 draws over patients.

    A draw takes as many patients as there are, with replacement, and all cases of each.

    Args:
        before: One number a case, nan where there is none; a case counts where both are numbers.
        after: The same cases.
        patients: Whom each case shows.
    """
    known = ~(np.isnan(before) | np.isnan(after))
    names, group = np.unique(np.asarray(patients, str)[known], return_inverse=True)
    if not len(names):
        return Gain(None, None, None, None, None, 0, 0)
    change = after[known] - before[known]
    low = high = None
    if len(names) > 1:
        weights = np.random.default_rng(SEED).multinomial(len(names), np.full(len(names), 1 / len(names)), DRAWS)
        drawn = (weights @ np.bincount(group, change)) / (weights @ np.bincount(group))
        low, high = map(float, np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]))
    means = float(before[known].mean()), float(after[known].mean())
    return Gain(*means, float(change.mean()), low, high, len(names), int(np.count_nonzero(change)))


@dataclass(frozen=True)
class Pairs:
    """Predictions with their references.

    Attributes:
        cases: The files.
        labels: Classes of the predictions.
        references: Classes of the references.
        edge: Cube root of a voxel's volume in mm, median over the cases (of pictures 1).
        progress: Whether reading shows a bar.
    """

    cases: tuple[Matched, ...]
    labels: Labels
    references: Labels
    edge: float
    progress: bool = False

    @classmethod
    def find(cls, matching: Matching, *, progress: bool = False) -> Pairs:
        """Takes the cases of ``match``.

        Raises:
            MedmomError: Nothing names the classes of the predictions, or the references have none of them.
        """
        first, labels = matching.cases[0], matching.prediction_labels
        if labels is None:
            raise MedmomError(f"{first.prediction}: no list names its classes. Predict again with medmom predict.")
        edges = [float(np.prod(read_geometry(case.reference).spacing)) ** (1 / 3) for case in matching.cases]
        pairs = cls(matching.cases, labels, matching.reference_labels or labels, float(np.median(edges)), progress)
        if not pairs.names:
            raise MedmomError(
                f"{first.reference}: the references have the classes {', '.join(pairs.references.foreground)}, the "
                f"predictions {', '.join(labels.foreground)}. Give references of the same classes."
            )
        return pairs

    @property
    def names(self) -> tuple[str, ...]:
        """Foreground classes that predictions and references have."""
        return tuple(name for name in self.labels.foreground if name in self.references.foreground)

    def dice(self, cleanups: Sequence[Cleanup]) -> np.ndarray:
        """Dice of each class under each cleanup; every pair of files is read once, one at a time.

        Args:
            cleanups: What to do with the predictions.

        Returns:
            Shape (cleanups, cases, classes), in the order of ``names``; nan where prediction and reference are both
            empty, or the class is not annotated; 0 where the prediction is missing.

        Raises:
            MedmomError: A file cannot be read or has an unknown value, or a pair lies on two grids.
        """
        table = np.full((len(cleanups), len(self.cases), len(self.names)), np.nan)
        for k, case in enumerate(tqdm(self.cases, desc="cleanup", unit="case", disable=not self.progress)):
            told = [name in (self.names if case.annotated is None else case.annotated) for name in self.names]
            table[:, k, told] = self._case(case, cleanups)[:, told]
        return table

    def _case(self, case: Matched, cleanups: Sequence[Cleanup]) -> np.ndarray:
        if case.prediction is None:
            return np.zeros((len(cleanups), len(self.names)))
        reference, prediction = read_label(case.reference, self.references), read_label(case.prediction, self.labels)
        check_same_grid(reference, prediction)
        wanted = _wanted(_channels(reference, self.references), self.references, self.labels)
        _channels(prediction, self.labels)
        rows = []
        for cleanup in cleanups:
            cleaned = apply(prediction.array.copy(order="K"), prediction.geometry, self.labels, cleanup)
            rows.append(self._dice(self.labels.to_channels(cleaned), wanted))
        return np.array(rows)

    def _dice(self, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        looked_at = wanted != IGNORE
        found, wanted = found[looked_at], wanted[looked_at]
        sizes = np.bincount(found, minlength=IGNORE) + np.bincount(wanted, minlength=IGNORE)
        both = np.bincount(found[found == wanted], minlength=IGNORE)
        channels = [self.labels.channel(name) for name in self.names]
        with np.errstate(invalid="ignore"):
            return np.asarray(2 * both[channels] / sizes[channels])


def _channels(volume: Volume, labels: Labels) -> np.ndarray:
    try:
        return labels.to_channels(volume.array)
    except ValueError as error:
        raise MedmomError(f"{volume.path}: {error}. Correct the label map, or name the value in its labels.") from error


def _wanted(channels: np.ndarray, own: Labels, labels: Labels) -> np.ndarray:
    """Channels of ``labels`` for those of ``own``; classes that it has not become background."""
    table = np.full(IGNORE + 1, IGNORE, np.uint8)
    table[: own.num_channels] = [labels.channel(name) if name in labels.names else 0 for name in own.names]
    return np.asarray(table[channels])
