"""The cells of a grid of logits, and linear interpolation in those that need it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from medmom.geometry import Geometry, shared_axes

SAME_VOXEL = 1e-4
"""Share of a voxel within which an axis counts as not scaled, as in ``medmom.geometry``."""

TILE = 1 << 17
"""Numbers worked on at once, so that they stay in a core's cache."""

Scores = Literal["logits", "probabilities"]
"""What is interpolated; probabilities sum to 1 over the classes."""


@dataclass(frozen=True, eq=False)
class AxisRule:
    """How one axis of the own grid lies on the working grid.

    Attributes:
        source: The working axis.
        low: First corner of each own voxel, int64 (n,).
        share: Weights of the corners, float32 (n, 2); (n, 1) where voxels are taken as they are.
    """

    source: int
    low: Tensor
    share: Tensor

    @property
    def num_corners(self) -> int:
        """Working voxels that an own voxel lies between, 1 or 2."""
        return self.share.shape[1]


def axis_rules(working: Geometry, own: Geometry) -> list[AxisRule]:
    """Gives linear interpolation from ``working`` to each axis of ``own``, the border value outside.

    Raises:
        ValueError: The own axes are not the working grid's, permuted, flipped and scaled.
    """
    sources, linear, offset = shared_axes(working, own)
    return [
        _axis_rule(
            int(source), linear[source, axis] * np.arange(own.shape[axis]) + offset[source], working.shape[source]
        )
        for axis, source in enumerate(sources)
    ]


def _axis_rule(source: int, position: np.ndarray, count: int) -> AxisRule:
    nearest = np.clip(np.round(position), 0, count - 1)
    is_same = len(position) == count and np.abs(position - nearest).max() < SAME_VOXEL
    if is_same or count == 1:
        return AxisRule(source, torch.from_numpy(nearest.astype(np.int64)), torch.ones(len(position), 1))
    position = np.clip(position, 0, count - 1)
    low = np.minimum(np.floor(position).astype(np.int64), count - 2)
    share = np.stack([1 - (position - low), position - low], axis=1).astype(np.float32)
    return AxisRule(source, torch.from_numpy(low), torch.from_numpy(share))


class PlaneRule:
    """How a plane of the own grid lies on planes of the working grid.

    Args:
        rows: The own axis that is the slower one in the label map's memory.
        columns: The faster one.
        shape: Of the working grid.

    Attributes:
        share: Weights of the corners within a plane of each own voxel, float32 (voxels, 1, corners).
        index: Place of each working voxel in a flat plane of the working grid, int64 (rows, columns).
    """

    def __init__(self, rows: AxisRule, columns: AxisRule, shape: Sequence[int]) -> None:
        self._rules = (rows, columns)
        self._shape = tuple(shape[axis] for axis in sorted((rows.source, columns.source)))
        share = (rows.share[:, None, :, None] * columns.share[None, :, None, :]).flatten(2)
        self.share = share.flatten(0, 1)[:, None]
        self.index = self.turned(torch.arange(self._shape[0] * self._shape[1]))

    def turned(self, plane: Tensor) -> Tensor:
        """Gives a flat plane of the working grid as (rows, columns)."""
        rows, columns = self._rules
        plane = plane.reshape(self._shape)
        return plane.T.contiguous() if rows.source > columns.source else plane

    def expanded(self, cells: Tensor) -> Tensor:
        """Gives each own voxel what stands in its cell: (rows, columns) of cells become those of the own grid."""
        rows, columns = self._rules
        return cells.index_select(0, rows.low).index_select(1, columns.low)

    def corners(self, plane: Tensor) -> list[Tensor]:
        """Gives the corners of all cells as views of a plane (rows, columns) of the working grid."""
        counts = [rule.num_corners for rule in self._rules]
        height, width = (size - count + 1 for size, count in zip(plane.shape, counts, strict=True))
        return [plane[i : i + height, j : j + width] for i, j in product(*map(range, counts))]


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane of the working grid.

    Attributes:
        logits: float32 (K, voxels), in the order of the working grid.
        winner: The largest class of each voxel, ``uint8`` (rows, columns) of a ``PlaneRule``.
    """

    logits: Tensor
    winner: Tensor


class Cells:
    """The cells between two planes of the working grid, or within one, and the own voxels that lie in them.

    Linear interpolation is a mean of a cell's corners with weights of at least 0: the class that wins at every
    corner wins everywhere in the cell. Only cells whose corners disagree keep their logits.

    Args:
        planes: The corners along the third axis, one or two.
        rule: The other two axes.
        everywhere: Keep the logits of all cells.
    """

    def __init__(self, planes: Sequence[Plane], rule: PlaneRule, *, everywhere: bool = False) -> None:
        self._rule, self._num_classes = rule, len(planes[0].logits)
        winner, *others = (corner for plane in planes for corner in rule.corners(plane.winner))
        mixed = torch.full(winner.shape, everywhere)
        for other in others:
            mixed |= other != winner
        number = mixed.flatten().cumsum(0, dtype=torch.int32).view(mixed.shape)
        # A class, or K plus the number of a mixed cell: one look-up serves both.
        code = rule.expanded(torch.where(mixed, number + (self._num_classes - 1), winner.int()))
        self._labels = code.to(torch.uint8)
        self._voxels = (code >= self._num_classes).flatten().nonzero()[:, 0]
        self._cell = code.flatten()[self._voxels] - self._num_classes
        self._corners, self._table = _corner_rows(planes, rule, mixed)

    def labels(self, share: Tensor) -> Tensor:
        """Gives the label of every own voxel of a plane: the largest of the interpolated logits.

        Args:
            share: Weights of the planes.

        Returns:
            ``uint8`` (rows, columns); ties go to the smaller index. The next call overwrites it.
        """
        flat = self._labels.view(-1)
        for part, logits in self._interpolated(share):
            # On rows faster than argmax, and as sure to give the first of equal ones.
            flat[self._voxels[part]] = logits.max(dim=1).indices.to(torch.uint8)
        return self._labels

    def tell(
        self, share: Tensor, scores: Scores, *, probabilities: Tensor | None = None, entropy: Tensor | None = None
    ) -> None:
        """Fills in what is wanted of every own voxel of a plane; the cells must have kept all logits.

        Args:
            share: Weights of the planes.
            scores: What they hold.
            probabilities: float32 (K, rows, columns), contiguous: the softmax of interpolated logits, or the
                interpolated probabilities.
            entropy: float32 (rows, columns), contiguous: that of these probabilities p, -sum p ln p / ln K, from 0
                where one class is sure to 1 where all are equal; 0 of a single class.

        Source:
            Shannon 1948, doi:10.1002/j.1538-7305.1948.tb01338.x, section 6, over that of K equal chances.
        """
        largest = math.log(max(2, self._num_classes))
        for part, values in self._interpolated(share):
            found = values.softmax(dim=1) if scores == "logits" else values
            if probabilities is not None:
                probabilities.view(self._num_classes, -1)[:, part] = found.T
            if entropy is not None:
                entropy.view(-1)[part] = torch.special.entr(found).sum(dim=1).div_(largest).clamp_(0, 1)

    def _interpolated(self, share: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Logits (n, K) of the own voxels that need them, a tile at a time."""
        step = max(1, TILE // max(self._num_classes, self._corners.shape[1]))
        for start in range(0, len(self._voxels), step):
            part = slice(start, start + step)
            weights = (share[:, None] * self._rule.share.index_select(0, self._voxels[part])).flatten(1)
            corners = self._corners.index_select(0, self._cell[part])
            # A weighted sum of some rows of a table, made for word embeddings: torch's fastest gather.
            yield part, embedding_bag(corners, self._table, per_sample_weights=weights, mode="sum")


def _corner_rows(planes: Sequence[Plane], rule: PlaneRule, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the corners of each mixed cell, int32 (cells, corners), and the logits of these rows (rows, K)."""
    needed = torch.zeros(planes[0].winner.shape, dtype=torch.bool)
    for corner in rule.corners(needed):
        corner.logical_or_(mixed)
    row = (needed.flatten().cumsum(0, dtype=torch.int32) - 1).view(needed.shape)
    cells = mixed.flatten().nonzero()[:, 0]
    rows = torch.stack([corner.flatten()[cells] for corner in rule.corners(row)], dim=1)
    voxels = rule.index[needed]
    # Turned before they are put together: the other way round takes several times as long.
    table = torch.cat([plane.logits.index_select(1, voxels).T.contiguous() for plane in planes])
    return torch.cat([rows + i * len(voxels) for i in range(len(planes))], dim=1), table
