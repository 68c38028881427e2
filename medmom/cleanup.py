"""Islands and ragged borders of label maps, taken away for the classes for which validation data asked for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from medmom.geometry import Geometry
from medmom.islands import keep_largest
from medmom.labels import IGNORE, Labels

SLAB = 2**22
"""Voxels that are worked on at a time; no result depends on it."""

REACH = 3.0
"""Standard deviations at which a Gaussian ends."""

# Shares of a neighbourhood are sums of rounded numbers: half is half.
SLACK = 1e-6

PLACES = 2**13
"""Voxels whose neighbours are counted at a time."""

Kernels = Sequence[np.ndarray]


@dataclass(frozen=True)
class Cleanup:
    """What is done to label maps after the network, by class; classes without a mention stay as they are.

    Attributes:
        largest: Classes of which the largest connected part alone is kept, in alphabetical order.
        smoothing: Pairs of class and standard deviation of the Gaussian that smooths its border, in mm (in pixels of
            pictures), in alphabetical order.

    Raises:
        ValueError: A class has no name or two entries, or a standard deviation is not positive.
    """

    largest: tuple[str, ...] = ()
    smoothing: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Checks the entries and puts them in order: what is done does not depend on it."""
        largest, smoothing = tuple(sorted(self.largest)), tuple(sorted(self.smoothing))
        for names in (largest, [name for name, _ in smoothing]):
            if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
                raise ValueError(f"a cleanup of the classes {list(names)}")
        for name, mm in smoothing:
            if not (isinstance(mm, int | float) and math.isfinite(mm) and mm > 0):
                raise ValueError(f"a smoothing of {name} by {mm} mm")
        object.__setattr__(self, "largest", largest)
        object.__setattr__(self, "smoothing", tuple((name, float(mm)) for name, mm in smoothing))

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.largest or self.smoothing)

    def __str__(self) -> str:
        """Says in a line what is done: ``largest part of liver; liver smoothed by 1.5 mm``."""
        parts = [f"largest part of {', '.join(self.largest)}"] if self.largest else []
        return "; ".join([*parts, *(f"{name} smoothed by {mm:g} mm" for name, mm in self.smoothing)]) or "nothing"

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON; ``from_dict`` reads them back."""
        return {"largest": list(self.largest), "smoothing": dict(self.smoothing)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], labels: Labels) -> Cleanup:
        """Reads what ``as_dict`` wrote.

        Raises:
            KeyError: An entry is missing.
            ValueError: There is another entry, or a class that is none of ``labels`` or the background.
        """
        unknown = set(data) - {"largest", "smoothing"}
        cleanup = cls(tuple(data["largest"]), tuple(dict(data["smoothing"]).items()))
        unknown |= {*cleanup.largest, *dict(cleanup.smoothing)} - set(labels.foreground)
        if unknown:
            raise ValueError(f"a cleanup of {', '.join(map(repr, sorted(unknown)))}")
        return cleanup


def apply(label: np.ndarray, geometry: Geometry, labels: Labels, cleanup: Cleanup) -> np.ndarray:
    """Cleans a label map in place.

    First the largest parts: of each class in ``largest`` the connected part with the most voxels is kept, the others
    become background. Neighbours share a face, an edge or a corner (26; in a picture or a single slice 8). Of equal
    parts the one that begins first wins, from the feet up, then from back to front, then from left to right.

    Then the borders, all of them from the map as it is by now. The share of a class at a voxel is the weight of its
    voxels under a Gaussian, cut off at three standard deviations; beyond the image its outermost voxels go on.
        * A voxel of the background, or of a smoothed class, goes to the smoothed class whose share is above one half
          (the largest, where standard deviations differ and several are).
        * A voxel of a smoothed class with less than half that nobody took goes to the class with the largest share:
          background, any other, or its own. Equal shares: the first in ``labels``.
        * No voxel of a foreground class that is not smoothed changes.

    The work is done slab by slab on a view that faces RAS, so that the voxels that change depend neither on the order
    and the directions of the axes nor on the order of classes in ``cleanup``. Beyond the label map it needs some 35
    bytes for each voxel of a slab: about four million voxels, or four times the planes that a Gaussian reaches.

    Args:
        label: Stored values, shape (X, Y, Z), in any memory order; is changed.
        geometry: Its grid.
        labels: Its classes; each that ``cleanup`` names is one.
        cleanup: What to do.

    Returns:
        ``label`` itself. A class that it does not hold is no error, nor is an empty map.

    Source:
        A Gaussian of each mask and then the largest share: Merriman, Bence and Osher 1994,
        doi:10.1006/jcph.1994.1105, diffusion and threshold for regions that meet; one step of it, here with an own
        width for each class.
    """
    view = _upright(label, geometry)
    keep_largest(view, [labels.value(name) for name in cleanup.largest], slab=SLAB)
    if cleanup.smoothing:
        edges = geometry.reoriented("RAS").spacing[::-1]
        widths = {labels.channel(name): mm for name, mm in cleanup.smoothing}
        _smooth(view, labels, {channel: [_kernel(mm / edge) for edge in edges] for channel, mm in widths.items()})
    return label


def _upright(label: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The same voxels, as a view whose axes lead up, to the front and to the right."""
    facing = nib.orientations.apply_orientation(label, nib.orientations.io_orientation(geometry.affine))
    return np.asarray(facing).transpose(2, 1, 0)


def _kernel(sigma: float) -> np.ndarray:
    """Weights of a Gaussian of ``sigma`` voxels, sum 1; their number is odd."""
    reach = int(REACH * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def _smooth(view: np.ndarray, labels: Labels, kernels: Mapping[int, Kernels]) -> None:
    """Smooths borders in place, slab by slab, each with the planes around it as they were before."""
    reach = max(len(axes[0]) // 2 for axes in kernels.values())
    step = max(1, SLAB // math.prod(view.shape[1:]) - 2 * reach, 2 * reach)
    below = view[:0].copy()
    for start in range(0, len(view), step):
        stop = min(start + step, len(view))
        block = np.concatenate([below, view[start : stop + reach]])
        inner = slice(len(below), len(below) + stop - start)
        view[start:stop] = labels.to_values(_smoothed(labels.to_channels(block), kernels, inner))
        below = block[max(0, inner.stop - reach) : inner.stop].copy()


def _smoothed(channels: np.ndarray, kernels: Mapping[int, Kernels], inner: slice) -> np.ndarray:
    """New channels of the planes ``inner`` of a block; the planes around it are neighbours only."""
    is_open = np.zeros(IGNORE + 1, bool)
    is_open[[0, *kernels]] = True
    may_change, result = is_open[channels], channels.copy()
    best = np.full(channels.shape, 0.5 + SLACK, np.float32)
    lost, bare = np.zeros(channels.shape, bool), np.zeros(channels.shape, bool)
    boxes = ndimage.find_objects(channels, max(kernels))
    for channel in sorted(kernels):
        if boxes[channel - 1] is None:
            continue
        box = _widened(boxes[channel - 1], kernels[channel])
        share = _share(channels[box], channel, kernels[channel])
        gone = (channels[box] == channel) & (share < 0.5 - SLACK)
        takes = (share > best[box]) & may_change[box]
        result[box][takes], best[box][takes] = channel, share[takes]
        if gone.any():
            lost[box] |= gone
            bare[box] |= gone & (_share(channels[box], 0, kernels[channel]) > 0.5 + SLACK)
    lost &= result == channels
    # Most go to the background; only where regions meet must all classes be asked.
    result[lost & bare] = 0
    for places in _places(lost & ~bare, inner):
        result[tuple(places.T)] = _largest_share(channels, places, kernels)
    return result[inner]


def _share(channels: np.ndarray, channel: int, kernels: Kernels) -> np.ndarray:
    """Weight of the voxels of a channel under a Gaussian about each voxel, float32."""
    share = (channels == channel).astype(np.float32)
    for axis, kernel in enumerate(kernels):
        share = ndimage.correlate1d(share, kernel, axis, mode="nearest")
    return np.asarray(share)


def _widened(box: tuple[slice, ...], kernels: Kernels) -> tuple[slice, ...]:
    """A box with the neighbours that a Gaussian reaches; what lies beyond the array is cut off by indexing."""
    pairs = zip(box, kernels, strict=True)
    return tuple(slice(max(0, s.start - len(kernel) // 2), s.stop + len(kernel) // 2) for s, kernel in pairs)


def _places(mask: np.ndarray, inner: slice) -> Iterator[np.ndarray]:
    """Indices of voxels of the planes ``inner``, some thousands at a time, shape (N, 3)."""
    places = np.argwhere(mask[inner]) + np.array((inner.start, 0, 0))
    for start in range(0, len(places), PLACES):
        yield places[start : start + PLACES]


def _largest_share(channels: np.ndarray, places: np.ndarray, kernels: Mapping[int, Kernels]) -> np.ndarray:
    """The channel with the largest share at each place, under the Gaussian of the place's own channel."""
    own, result = channels[tuple(places.T)], np.zeros(len(places), np.uint8)
    last = np.array(channels.shape) - 1
    for channel in np.unique(own):
        members = places[own == channel]
        rows, shares = np.arange(len(members)), np.zeros((len(members), int(channels.max()) + 1))
        ranges = [range(-(len(kernel) // 2), len(kernel) // 2 + 1) for kernel in kernels[channel]]
        weights = product(*kernels[channel])
        for offset, weight in zip(product(*ranges), weights, strict=True):
            at = np.clip(members + offset, 0, last)
            shares[rows, channels[tuple(at.T)]] += math.prod(weight)
        # Sums of the same weights in another order differ in their last digits: equal is equal.
        result[own == channel] = (shares >= shares.max(axis=1, keepdims=True) - SLACK).argmax(axis=1)
    return result
