"""A pass over the labelled voxels of a label map, without a mask of the whole grid."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from medmom.labels import Labels

SLAB = 1 << 20
"""Voxels looked at together."""


class LabelledVoxels:
    """The foreground of a label map, a slab at a time, in the order of its memory.

    Args:
        label: Stored values, shape (X, Y, Z), in any order of memory.
        labels: The classes; voxels with the ignore value are of none.
    """

    def __init__(self, label: np.ndarray, labels: Labels) -> None:
        self.num_classes = labels.num_channels
        self._axes = sorted(range(3), key=lambda axis: -abs(label.strides[axis]))
        self._label, self._labels = label.transpose(self._axes), labels

    def slabs(self, wanted: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Finds voxels slab by slab.

        Args:
            wanted: Which classes to look for, bool (K,); None: every foreground class. The background never.

        Yields:
            Place of the slab, flat index in the slab of each voxel found, and its channel index.

        Raises:
            ValueError: The label map holds a value that ``labels`` does not name.
        """
        table = np.zeros(256, dtype=bool)
        table[1 : self.num_classes] = True if wanted is None else wanted[1:]
        depth, *plane = self._label.shape
        thickness = max(1, SLAB // math.prod(plane))
        for start in range(0, depth, thickness):
            place = slice(start, min(start + thickness, depth))
            channels = self._labels.to_channels(np.ascontiguousarray(self._label[place])).reshape(-1)
            index = np.flatnonzero(table[channels])
            yield place, index, channels[index].astype(np.intp)

    def values(self, image: np.ndarray, place: slice, index: np.ndarray) -> np.ndarray:
        """Gives the values of an image (X, Y, Z) at voxels that ``slabs`` found."""
        slab = np.ascontiguousarray(image.transpose(self._axes)[place]).reshape(-1)
        return np.asarray(slab[index])

    def profiles(self) -> tuple[np.ndarray, ...]:
        """Counts the voxels of each class in each plane.

        Returns:
            For each axis of the label map an array (K, size of the axis); the background counts 0.

        Raises:
            ValueError: As ``slabs``.
        """
        depth, height, width = self._label.shape
        found = [np.zeros((self.num_classes, size), dtype=np.int64) for size in (depth, height, width)]
        for place, index, classes in self.slabs():
            planes = place.stop - place.start
            row, column = np.divmod(index, width)
            rows = counted(classes * (planes * height) + row, (self.num_classes, planes, height))
            found[0][:, place] += rows.sum(axis=2)
            found[1] += rows.sum(axis=1)
            found[2] += counted(classes * width + column, (self.num_classes, width))
        return tuple(found[self._axes.index(axis)] for axis in range(3))


def counted(keys: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Counts how often each flat index into ``shape`` is there."""
    return np.bincount(keys, minlength=math.prod(shape)).reshape(shape)
