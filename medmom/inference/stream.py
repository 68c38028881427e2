"""Windows in order along one axis, so that only one row of them is ever blended at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor, nn

from medmom.inference.ensemble import Ensemble
from medmom.inference.ring import Ring

CHUNK_BYTES = 32 * 2**20
"""Logits that leave at once, but a plane at least."""

OUTSIDE = (0.0, -10.0)
"""Logits of channel 0 and of all others outside the body."""

SURELY_OUTSIDE = (1.0, 0.0)
"""Their probabilities."""

SIGMA = 0.125
"""Standard deviation of the Gaussian weights, in edges of a window."""

Corner = tuple[int, ...]


@dataclass(frozen=True)
class StreamPlan:
    """How the windows of a case run.

    Attributes:
        patch: Voxels of a window along each axis, two or three; two run slice by slice along the third axis.
        overlap: Share of a window that the next one covers again, in [0, 1).
        axis: Of the working grid, along which finished planes leave.
        batch: Windows that run through the network at once.
        dtype: Of the sums: ``torch.float32``, or ``torch.float16`` with the error that ``stream_logits`` states.
        on_device: Whether the sums lie on the device of the network; else in RAM.
    """

    patch: tuple[int, ...]
    overlap: float
    axis: int
    batch: int
    dtype: torch.dtype
    on_device: bool


def window_starts(shape: Sequence[int], patch: Sequence[int], overlap: float) -> list[list[int]]:
    """Gives where windows start along each of three axes, as MONAI's sliding window sets them.

    Args:
        shape: Of the image, (X, Y, Z).
        patch: Voxels of a window along each axis, two or three.
        overlap: Share of a window that the next one covers again.

    Returns:
        Ascending starts by axis. Where the image is smaller than a window, of the image padded to one.
    """
    starts = []
    for size, edge in zip(shape, window_edges(patch), strict=True):
        padded = max(size, edge)
        step = edge if padded == edge else max(1, int(edge * (1 - overlap)))
        starts.append([place.start for (place,) in dense_patch_slices((padded,), (edge,), (step,))])
    return starts


def num_windows(shape: Sequence[int], patch: Sequence[int], overlap: float) -> int:
    """Counts the windows over an image of this shape (X, Y, Z)."""
    return math.prod(map(len, window_starts(shape, patch, overlap)))


def window_edges(patch: Sequence[int]) -> tuple[int, ...]:
    """Gives the voxels of a window along three axes: one of two edges is a slice thick."""
    return (*patch, 1) if len(patch) == 2 else tuple(patch)


def window_logits(network: nn.Module, windows: Tensor, mirrors: Sequence[int] = ()) -> Tensor:
    """Runs windows through the network, and their mirror images, one pass after the other.

    Args:
        network: In evaluation mode.
        windows: Shape (B, C, *patch), on the network's device.
        mirrors: Axes along which windows are mirrored, in all combinations.

    Returns:
        float32 (B, K, *patch): the mean over all passes, each mirrored back.

    Raises:
        ValueError: The network gives logits of another size, or the window lacks an axis of ``mirrors``.
    """
    if any(axis not in range(windows.ndim - 2) for axis in mirrors):
        raise ValueError(f"a window of {windows.ndim - 2} axes is not mirrored along axes {list(mirrors)}")
    mean: Tensor = network(windows).float()
    if mean.shape[2:] != windows.shape[2:]:
        raise ValueError(f"logits of shape {tuple(mean.shape)} for windows of shape {tuple(windows.shape)}")
    for count in range(1, len(mirrors) + 1):
        for chosen in itertools.combinations(sorted(mirrors), count):
            axes = [2 + axis for axis in chosen]
            # A flip is a new tensor, which may be written to; a network's output may be its input.
            mean = network(windows.flip(axes)).float().flip(axes).add_(mean)
    return mean.div_(2 ** len(mirrors)) if mirrors else mean


def planes_at_once(num_classes: int, shape: Sequence[int], axis: int) -> int:
    """Gives how many planes of logits leave at once along ``axis`` of a working grid (X, Y, Z)."""
    plane = 4 * num_classes * math.prod(shape) // shape[axis]
    return min(shape[axis], max(1, CHUNK_BYTES // plane))


def stream_logits(
    network: nn.Module | Sequence[nn.Module],
    image: np.ndarray | Sequence[np.ndarray],
    plan: StreamPlan,
    *,
    device: torch.device,
    mirrors: Sequence[int] = (),
    body: np.ndarray | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Gives the logits of ``sliding_window`` plane by plane, in the memory of one row of windows.

    Windows run row by row along ``plan.axis``. When a row is done, no later window covers the planes before the next
    row's start: they are divided by their summed weights and leave. The sums lie in a ring of one window's edge. The
    order of additions is fixed, so that a voxel's logits do not depend on how planes are cut.

    Of an ensemble probabilities take the place of logits, in the same sums: of each window the mean over members and
    mirrored passes of softmax(logits). They are kept from rounding above 1.

    Windows in which every channel is constant differ by these constants alone: of a row, those with the same
    constants run once.

    In float16 each addition rounds to 11 bits. Weights are scaled by a power of two so that their sum W at a voxel is
    1 at most, and no sum exceeds the largest absolute logit M of its windows (of probabilities M = 1). After n windows
    over a voxel::

        |error| <= (1 + u)^n * (n u M + n 2^-25 / W),    u = 2^-11

    where the second term is the rounding of sums below 2^-14. W is 10^-3 times that power of two at least.

    Args:
        network: In evaluation mode, on ``device``; gives one tensor of the window's size. Several, or an
            ``Ensemble``: an ensemble, of one member too.
        image: float32 (C, X, Y, Z) on the working grid; windows are cut from it one by one. Where it is smaller than
            a window it is padded with 0 on both sides. Several of one grid: the channels of all, in this order.
        plan: How they run.
        device: Of the network.
        mirrors: Axes of the working grid; logits are the mean over all mirrored passes of a window.
        body: bool (X, Y, Z); windows without a voxel of it are not run. In the body nothing changes, for all windows
            over its voxels run; outside logits are 0 for channel 0 and -10 for the others, probabilities 1 and 0.
        advance: Told how many windows are settled since it was last told, skipped ones counted.

    Yields:
        Planes along ``plan.axis``, and their logits, of an ensemble probabilities (K, X, Y, Z with that axis cut to
        these planes), float32 on the CPU; every plane once, in order.

    Raises:
        FloatingPointError: The network's output is not finite.
        OverflowError: A logit is too large for float16 sums; take float32.
        ValueError: See ``window_logits``.
    """
    network = network if isinstance(network, nn.Module) else Ensemble(network)
    windows = _Windows(image, plan, body)
    ring: Ring | None = None
    rows = windows.starts[plan.axis]
    for row, start in enumerate(rows):
        jobs, num_skipped = windows.in_row(start)
        if advance is not None and num_skipped:
            advance(num_skipped)
        # A first row without a window to run leaves the number of classes open: one runs, and is not added.
        for corners in _batches(jobs or ([[windows.first]] if ring is None else []), plan.batch):
            logits = _run(network, windows.stacked(corners), device, mirrors, is_flat=len(plan.patch) == 2)
            ring = ring or _ring(logits.shape[1], windows, plan, device)
            if jobs:
                ring.add(logits, corners)
            del logits
            if advance is not None and jobs:
                advance(sum(map(len, corners)))
        if ring is not None:
            stop = rows[row + 1] if row + 1 < len(rows) else windows.padded[plan.axis]
            for place, planes in ring.leave(start, stop):
                if isinstance(network, Ensemble):
                    yield place, windows.in_body(place, planes.clamp_(max=1), SURELY_OUTSIDE)
                else:
                    yield place, windows.in_body(place, planes, OUTSIDE)


class _Windows:
    """The windows of an image: where they lie, and which need not run."""

    def __init__(self, image: np.ndarray | Sequence[np.ndarray], plan: StreamPlan, body: np.ndarray | None) -> None:
        self.images = (image,) if isinstance(image, np.ndarray) else tuple(image)
        self.body, self.axis = body, plan.axis
        self.shape = self.images[0].shape[1:]
        self.edges = window_edges(plan.patch)
        self.starts = window_starts(self.shape, plan.patch, plan.overlap)
        self.padded = tuple(max(size, edge) for size, edge in zip(self.shape, self.edges, strict=True))
        self.margin = tuple((padded - size) // 2 for padded, size in zip(self.padded, self.shape, strict=True))
        self.first: Corner = (0, 0, 0)

    def in_row(self, start: int) -> tuple[list[list[Corner]], int]:
        """Corners of the windows that start there along the axis, those with one answer together; number skipped."""
        jobs: dict[tuple[object, ...], list[Corner]] = {}
        num_skipped = 0
        for corner in itertools.product(*(self.starts[a] if a != self.axis else [start] for a in range(3))):
            if self.body is not None and not self.body[self._inside(corner)[0]].any():
                num_skipped += 1
                continue
            window = self._cut(corner)
            constants = window[:, :1, :1, :1]
            key = ("constant", *constants.ravel().tolist()) if (window == constants).all() else corner
            jobs.setdefault(key, []).append(corner)
        return list(jobs.values()), num_skipped

    def in_body(self, place: slice, planes: Tensor, outside: tuple[float, float]) -> Tensor:
        """The planes; outside the body the values ``outside`` of channel 0 and of all others."""
        if self.body is not None:
            cut: list[Any] = [slice(None)] * 3
            cut[self.axis] = place
            is_outside = torch.from_numpy(~self.body[tuple(cut)])
            planes[0].masked_fill_(is_outside, outside[0])
            planes[1:].masked_fill_(is_outside, outside[1])
        return planes

    def stacked(self, corners: Sequence[Sequence[Corner]]) -> Tensor:
        """Windows (B, C, *edges), one of each list of corners."""
        return torch.from_numpy(np.stack([self._cut(alike[0]) for alike in corners]))

    def _inside(self, corner: Corner) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """A window's part inside the image: its place in the image, and in the window."""
        image, window = [], []
        for start, margin, edge, size in zip(corner, self.margin, self.edges, self.shape, strict=True):
            low, high = max(0, start - margin), min(size, start - margin + edge)
            image.append(slice(low, high))
            window.append(slice(low - start + margin, high - start + margin))
        return tuple(image), tuple(window)

    def _cut(self, corner: Corner) -> np.ndarray:
        place, inside = self._inside(corner)
        parts = [image[(slice(None), *place)] for image in self.images]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if found.shape[1:] == self.edges:
            return found
        window = np.zeros((len(found), *self.edges), dtype=np.float32)
        window[(slice(None), *inside)] = found
        return window


def _batches(jobs: Sequence[list[Corner]], size: int) -> Iterator[Sequence[list[Corner]]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


@torch.inference_mode()
def _run(network: nn.Module, windows: Tensor, device: torch.device, mirrors: Sequence[int], *, is_flat: bool) -> Tensor:
    if device.type == "cuda":
        windows = windows.pin_memory().to(device, non_blocking=True)
    logits = window_logits(network, windows.squeeze(-1) if is_flat else windows, mirrors)
    return logits.unsqueeze(-1) if is_flat else logits


def _ring(num_classes: int, windows: _Windows, plan: StreamPlan, device: torch.device) -> Ring:
    weights = compute_importance_map(windows.edges, mode="gaussian", sigma_scale=SIGMA) * _scale(windows)
    return Ring(
        num_classes,
        windows.shape,
        weights,
        axis=plan.axis,
        dtype=plan.dtype,
        device=device if plan.on_device else torch.device("cpu"),
        chunk=planes_at_once(num_classes, windows.shape, plan.axis),
    )


def _scale(windows: _Windows) -> float:
    """The power of two that brings the summed weights of any voxel to 1 at most.

    The weight of a window is the product of three Gaussians, or its lowest value of 10^-3 where that is more.
    """
    product, num_over = 1.0, 1
    for starts, edge, size in zip(windows.starts, windows.edges, windows.padded, strict=True):
        gaussian = compute_importance_map((edge,), mode="gaussian", sigma_scale=SIGMA)
        total, over = torch.zeros(size), torch.zeros(size, dtype=torch.long)
        for start in starts:
            total[start : start + edge] += gaussian
            over[start : start + edge] += 1
        product *= float(total.max())
        num_over *= int(over.max())
    return 2.0 ** -math.ceil(math.log2(product + 1e-3 * num_over))
