"""Connected parts of classes, found slab by slab."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import ndimage, sparse

NEIGHBOURS = np.ones((3, 3, 3), bool)

Box = tuple[slice, ...]


def keep_largest(label: np.ndarray, values: Sequence[int], *, slab: int) -> None:
    """Sets all but the largest connected part of some classes to 0, in place.

    Voxels that share a face, an edge or a corner are connected. Of parts of one size the one whose first voxel comes
    first in the order of the array's indices (C order) is kept.

    Parts are numbered slab by slab along the first axis, each slab with the last plane of the one before it; numbers
    that meet in that plane are one part. Memory: some 16 bytes for each voxel of a slab (16-bit labels or less), and
    some 50 for each part of a slab, of which noise has many; no copy of the array.

    Args:
        label: Stored values, shape (Z, Y, X), in any memory order; is changed.
        values: The classes, each once, none of them 0, at most 255.
        slab: Voxels of a slab, a plane more or less; no result depends on it.
    """
    if not len(values) or not label.size:
        return
    step = max(1, slab // math.prod(label.shape[1:]))
    starts = range(0, len(label), step)
    islands = {value: _Islands() for value in values}
    for start in starts:
        # A slab begins with the last plane of the one before it.
        found = _boxes(label[max(0, start - 1) : start + step], list(islands))
        for value, box, mask in found:
            islands[value].add(start, box, mask, depth=min(start + step, len(label)) - max(0, start - 1))
    kept = {value: found.largest() for value, found in islands.items() if found.count > 1}
    # From the last slab to the first: the plane that a slab shares with the one before is still as it was.
    for start in reversed(starts):
        block = label[max(0, start - 1) : start + step]
        for value, box, mask in _boxes(block, list(kept)):
            parts, _ = ndimage.label(mask, NEIGHBOURS)
            gone = mask & ~kept[value][islands[value].first[start] :][parts - 1]
            own = slice(1 if start and box[0].start == 0 else 0, None)
            block[box][own][gone[own]] = 0


class _Islands:
    """The parts of one class: numbers in the order of their first voxels, sizes, and which numbers are one part."""

    def __init__(self) -> None:
        self.count = 0
        self.first: dict[int, int] = {}
        self.sizes: list[np.ndarray] = []
        self.links: list[np.ndarray] = []
        self.border = np.zeros(0, np.int64)

    def add(self, start: int, box: Box, mask: np.ndarray, *, depth: int) -> None:
        """Takes up the parts of a slab that begins at plane ``start``, cut out by ``box``."""
        parts, count = ndimage.label(mask, NEIGHBOURS)
        is_shared = start > 0 and box[0].start == 0
        if is_shared:
            # One mask in one order: the numbers of both slabs stand side by side.
            here = parts[0][mask[0]] - 1 + self.count
            self.links.append(np.unique(np.stack([self.border, here]), axis=1))
        own = parts[1:] if is_shared else parts
        self.sizes.append(np.bincount(own.reshape(-1), minlength=count + 1)[1:])
        self.border = parts[-1][mask[-1]] - 1 + self.count if box[0].stop == depth else self.border[:0]
        self.first[start] = self.count
        self.count += count

    def largest(self) -> np.ndarray:
        """Whether each number belongs to the largest part, shape (count,)."""
        ends = np.concatenate([np.zeros((2, 0), np.int64), *self.links], axis=1)
        graph = sparse.coo_array((np.ones(ends.shape[1], bool), (ends[0], ends[1])), shape=(self.count, self.count))
        _, part = sparse.csgraph.connected_components(graph, directed=False)
        sizes = np.bincount(part, weights=np.concatenate(self.sizes))
        # Of several the one that holds the smallest number.
        winner = part[np.argmax(sizes[part])]
        return np.asarray(part == winner)


def _boxes(block: np.ndarray, values: Sequence[int]) -> Iterator[tuple[int, Box, np.ndarray]]:
    """The classes that a block holds, each with its bounding box and its mask in there."""
    if not len(values):
        return
    if block.dtype.itemsize <= 2:
        # Negative values count from the table's end, here as there.
        table = np.zeros(2 ** (8 * block.dtype.itemsize), np.uint8)
        table[list(values)] = np.arange(1, len(values) + 1)
        numbers = table[block]
    else:
        order = np.argsort(values)
        ranks = np.minimum(np.searchsorted(np.array(values)[order], block), len(values) - 1)
        numbers = np.where(np.array(values)[order][ranks] == block, order[ranks] + 1, 0).astype(np.uint8)
    for number, box in enumerate(ndimage.find_objects(numbers, len(values)), start=1):
        if box is not None:
            yield values[number - 1], box, numbers[box] == number
