"""Voxels of two label maps, counted by what both say of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from medmom.labels import IGNORE

CHUNK = 1 << 22
"""Voxels that are counted at once, unless a single plane has more."""

KINDS = IGNORE + 1


def count_voxels(prediction: np.ndarray, reference: np.ndarray, channels: Iterable[int]) -> dict[int, dict[str, int]]:
    """Counts for each class how often prediction and reference agree and differ.

    Args:
        prediction: Channel indices, ``uint8``, shape (X, Y, Z) or (X, Y).
        reference: Channel indices, same shape; voxels of 255 are not counted.
        channels: The classes.

    Returns:
        By channel ``tp`` (in both), ``fp`` (in the prediction alone), ``fn`` (in the reference alone) and ``tn`` (in
        neither); all 0 where every voxel of the reference is 255.

    Raises:
        ValueError: The shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"label maps of shape {prediction.shape} and {reference.shape}")
    table = np.zeros((KINDS, KINDS), dtype=np.int64)
    planes = prediction.shape[-1]
    step = max(1, CHUNK * planes // max(prediction.size, 1))
    for start in range(0, planes, step):
        place = (..., slice(start, start + step))
        pairs = reference[place].astype(np.uint16) * KINDS + prediction[place]
        table += np.bincount(pairs.ravel(order="K"), minlength=table.size).reshape(table.shape)
    table[IGNORE] = 0
    found, wanted, both = table.sum(axis=0), table.sum(axis=1), table.diagonal()
    total = int(table.sum())
    return {
        channel: {
            "tp": int(both[channel]),
            "fp": int(found[channel] - both[channel]),
            "fn": int(wanted[channel] - both[channel]),
            "tn": int(total - found[channel] - wanted[channel] + both[channel]),
        }
        for channel in channels
    }
