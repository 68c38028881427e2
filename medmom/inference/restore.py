"""Class logits on the working grid, plane by plane, become a label map on the case's own grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from medmom.geometry import Geometry
from medmom.inference.cells import TILE, Cells, Plane, PlaneRule, Scores, axis_rules

MAX_CLASSES = 256
"""As many as a label of one byte can tell apart."""

BLOCK = 1 << 23
"""Numbers copied at once where a plane of the logits is not one piece of memory."""


_Layer = tuple[int, Sequence[Plane | None]]
"""Number of a plane of the working grid; the plane before it, if there is one, and itself."""

Sink = Callable[[slice, np.ndarray], None]
"""Takes planes of the own grid and what is told of their voxels, see ``Restorer``."""


class Restorer:
    """Brings logits back to the case's own grid while they are made, and keeps one byte a voxel.

    Logits are interpolated linearly, the border value outside, and the largest wins, as in
    ``medmom.data.preparation.restore``; where one class wins at all corners of a cell nothing is computed. How the
    planes are cut into slabs changes no label.

    Args:
        working: Grid of the logits.
        own: Grid of the case; its axes are the working grid's, permuted, flipped and scaled.
        num_classes: K, at most 256.
        axis: Axis of the working grid along which planes come.
        probabilities: Called for every plane of the own grid with its place along the own axis that belongs to
            ``axis``, and the softmax of the interpolated logits, float32 (K, *own.shape) with that axis cut to the
            place. Planes come in order; in falling order where that own axis points against ``axis``.
        entropy: Called in the same way with the entropy of these probabilities over that of K equal ones, float32
            (*own.shape, cut), from 0 (sure) to 1 (all classes equal).
        scores: ``"probabilities"``: these come instead of logits, and are interpolated in their place; what is told
            of them are they themselves, without a softmax.

    Attributes:
        confidence: After ``finish``: mean softmax probability of a class over the voxels of the working grid that
            it wins, float64 (K,); nan where it wins none.

    Raises:
        ValueError: The grids do not share their axes, or there is no class, or more than a byte tells apart.
    """

    def __init__(
        self,
        working: Geometry,
        own: Geometry,
        num_classes: int,
        *,
        axis: int,
        probabilities: Sink | None = None,
        entropy: Sink | None = None,
        scores: Scores = "logits",
    ) -> None:
        if not 1 <= num_classes <= MAX_CLASSES:
            raise ValueError(f"{num_classes} classes: give 1 to {MAX_CLASSES}")
        rules = axis_rules(working, own)
        self._own_axis = next(own_axis for own_axis, rule in enumerate(rules) if rule.source == axis)
        self._along = rules.pop(self._own_axis)
        columns, rows = rules
        self._across = PlaneRule(rows, columns, working.shape)
        self._shape, self._num_classes, self._axis = working.shape, num_classes, axis
        self._probabilities, self._entropy, self._scores = probabilities, entropy, scores
        # X runs fastest, as in a NIfTI file.
        self._label = np.zeros(own.shape, dtype=np.uint8, order="F")
        self._next = 0
        self._last: Plane | None = None
        self._sums, self._counts = np.zeros(num_classes), np.zeros(num_classes)
        self.confidence = np.full(num_classes, np.nan)

    def push(self, place: slice, logits: Tensor) -> None:
        """Takes the next planes of the working grid and fills the own planes that need no later one.

        Fastest where, for each class, a plane of the logits is one piece of memory.

        Args:
            place: Of the planes, along ``axis``; begins where the one before ended.
            logits: float32 (K, X, Y, Z) with ``axis`` cut to ``place``, on the CPU; not kept, and not changed.

        Raises:
            ValueError: The planes are not the next ones, have another shape, or hold a number that is not finite.
        """
        shape = [*self._shape]
        shape[self._axis] = place.stop - place.start
        if place.start != self._next or place.stop > self._shape[self._axis]:
            raise ValueError(f"planes {place.start} to {place.stop}: the next one is {self._next}")
        if tuple(logits.shape) != (self._num_classes, *shape):
            raise ValueError(f"logits of shape {tuple(logits.shape)}: expected {(self._num_classes, *shape)}")
        with _threads() as pool:
            for block in _blocks(logits.detach(), self._axis):
                self._take([plane.flatten(1) for plane in block], pool)
        if self._last is not None:
            # The giver may use its memory again.
            self._last = Plane(self._last.logits.clone(), self._last.winner)

    def finish(self) -> np.ndarray:
        """Gives the label map.

        Returns:
            ``uint8`` channel indices, shape ``own.shape``, in Fortran order; ties go to the smaller index.

        Raises:
            ValueError: Planes are missing.
        """
        if self._next != self._shape[self._axis]:
            raise ValueError(f"{self._next} of {self._shape[self._axis]} planes have come")
        self._last = None
        wins = self._counts > 0
        self.confidence[wins] = self._sums[wins] / self._counts[wins]
        return self._label

    def _take(self, logits: list[Tensor], pool: Executor) -> None:
        planes = []
        found = pool.map(partial(_winners, scores=self._scores), logits)
        for values, (winner, probability) in zip(logits, found, strict=True):
            self._sums += np.bincount(winner, weights=probability, minlength=self._num_classes)
            self._counts += np.bincount(winner, minlength=self._num_classes)
            planes.append(Plane(values, self._across.turned(torch.from_numpy(winner))))
        known = [self._last, *planes]
        layers = [(self._next + i, known[i : i + 2]) for i in range(len(planes))]
        for _ in pool.map(self._fill, layers):
            pass
        if self._probabilities is not None or self._entropy is not None:
            for layer in layers:
                self._tell(layer)
        self._last, self._next = planes[-1], self._next + len(planes)

    def _corners(self, layer: _Layer) -> tuple[list[int], list[Plane]]:
        """The own planes whose last corner is the last of two planes, and their corners."""
        number, planes = layer
        num_corners = self._along.num_corners
        indices = (self._along.low == number - num_corners + 1).nonzero()[:, 0].tolist()
        return indices, [plane for plane in planes if plane is not None][-num_corners:]

    def _fill(self, layer: _Layer) -> None:
        indices, corners = self._corners(layer)
        if not indices:
            return
        cells = Cells(corners, self._across)
        for index in indices:
            label = self._label[tuple(index if axis == self._own_axis else slice(None) for axis in range(3))]
            label.T[...] = cells.labels(self._along.share[index]).numpy()

    def _tell(self, layer: _Layer) -> None:
        indices, corners = self._corners(layer)
        if not indices:
            return
        cells = Cells(corners, self._across, everywhere=True)
        rises = bool(self._along.low[0] <= self._along.low[-1])
        rows_columns = [n for axis, n in enumerate(self._label.shape) if axis != self._own_axis][::-1]
        for index in indices if rises else reversed(indices):
            place = slice(index, index + 1)
            probabilities = None if self._probabilities is None else torch.empty(self._num_classes, *rows_columns)
            entropy = None if self._entropy is None else torch.empty(rows_columns)
            cells.tell(self._along.share[index], self._scores, probabilities=probabilities, entropy=entropy)
            if self._probabilities is not None and probabilities is not None:
                self._probabilities(place, np.expand_dims(probabilities.mT.numpy(), 1 + self._own_axis))
            if self._entropy is not None and entropy is not None:
                self._entropy(place, np.expand_dims(entropy.mT.numpy(), self._own_axis))


@contextmanager
def _threads() -> Iterator[Executor]:
    """As many threads as torch may use, each of which works alone.

    Torch's own threads wait for one another after every operation; on a busy machine these thousands of small ones
    would take minutes.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # New threads begin with the number of torch's threads that is set now.
        with ThreadPoolExecutor(num_threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)


def _blocks(logits: Tensor, axis: int) -> Iterator[Tensor]:
    """Some planes at a time, (planes, K, rest), each class of a plane in one piece of memory."""
    moved = logits.movedim(1 + axis, 0)
    step = max(1, BLOCK // moved[0].numel())
    for start in range(0, len(moved), step):
        block = moved[start : start + step]
        is_flat = block.stride()[2:] == (block.shape[3], 1)
        # Several at once: single planes would be read number by number, each from another line of the cache.
        yield block if is_flat else block.contiguous()


def _winners(logits: Tensor, *, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Index of the largest class of each voxel, the smaller one of equal ones, and its probability."""
    num_classes, num_voxels = logits.shape
    if not all(map(torch.isfinite, logits.aminmax())):
        raise ValueError("logits are not finite")
    winner, probability = torch.empty(num_voxels, dtype=torch.uint8), torch.empty(num_voxels)
    # The first of equal ones has the highest rank; torch's own argmax over a first axis is several times slower.
    rank = torch.arange(MAX_CLASSES - 1, MAX_CLASSES - 1 - num_classes, -1, dtype=torch.uint8)[:, None]
    step = max(1, TILE // num_classes)
    for start in range(0, num_voxels, step):
        part = slice(start, start + step)
        tile = logits[:, part]
        best = tile.amax(dim=0)
        winner[part] = MAX_CLASSES - 1 - ((tile == best).view(torch.uint8) * rank).amax(dim=0)
        probability[part] = (tile - best).exp_().sum(dim=0).reciprocal_() if scores == "logits" else best
    return winner.numpy(), probability.numpy()
