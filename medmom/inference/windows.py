from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from monai.inferers import SliceInferer, SlidingWindowInferer


def sliding_window(patch: Sequence[int], *, overlap: float = 0.5, batch_size: int = 1) -> SlidingWindowInferer:
    """Gives the way a whole case runs through a network: windows of the patch's size, blended by a Gaussian.

    The same in validation and in predict. A window of two edges runs slice by slice, along the third axis.

    Args:
        patch: Voxels of a window along each axis, two or three.
        overlap: Share of a window that the next one covers again.
        batch_size: Windows that run through the network at once.

    Returns:
        A function of (image (B, C, X, Y, Z), network) that gives logits (B, K, X, Y, Z).

    Source:
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z: half overlap and Gaussian weights.
    """
    kind = partial(SliceInferer, spatial_dim=2) if len(patch) == 2 else SlidingWindowInferer
    return kind(roi_size=tuple(patch), sw_batch_size=batch_size, overlap=overlap, mode="gaussian", progress=False)
