"""Sums of overlapping windows, in the memory of one row of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Ring:
    """Weighted sums of logits over one row of windows.

    Plane p of the padded image lies in slot p mod edge, so that nothing moves when planes leave and others come.

    Args:
        num_classes: Channels of the logits.
        shape: Of the image, (X, Y, Z).
        weights: Of a window, (x, y, z); with a sum of 1 at most over the windows that share a voxel.
        axis: Along which rows follow each other.
        dtype: Of the sums, ``torch.float32`` or ``torch.float16``.
        device: Of the sums.
        chunk: Planes that leave at once.
    """

    def __init__(
        self,
        num_classes: int,
        shape: Sequence[int],
        weights: Tensor,
        *,
        axis: int,
        dtype: torch.dtype,
        device: torch.device,
        chunk: int,
    ) -> None:
        self.shape, self.axis, self.chunk = tuple(shape), axis, chunk
        self.edges = tuple(weights.shape)
        padded = [max(size, edge) for size, edge in zip(shape, self.edges, strict=True)]
        self.margin = [(large - size) // 2 for large, size in zip(padded, shape, strict=True)]
        self.edge = padded[axis] = self.edges[axis]
        self.sums = torch.zeros((num_classes, *padded), dtype=dtype, device=device)
        self.total = torch.zeros(padded, device=device)
        self.weights = weights.to(device)
        self.largest = torch.zeros(2, device=device)

    @torch.inference_mode()
    def add(self, logits: Tensor, corners: Sequence[Sequence[Sequence[int]]]) -> None:
        """Adds the logits (B, K, *edges), each at all of its corners."""
        for of_window, alike in zip(logits.to(self.sums.device), corners, strict=True):
            if self.sums.dtype == torch.float16:
                low, high = torch.aminmax(of_window)
                self.largest = torch.maximum(self.largest, torch.stack((-low, high)))
            for corner in alike:
                self._add(of_window, corner)

    def _add(self, logits: Tensor, corner: Sequence[int]) -> None:
        places = [slice(start, start + edge) for start, edge in zip(corner, self.edges, strict=True)]
        for offset, slot, count in self._segments(corner[self.axis], self.edge):
            places[self.axis] = slice(slot, slot + count)
            weights = self.weights.narrow(self.axis, offset, count)
            part = logits.narrow(1 + self.axis, offset, count)
            self.total[tuple(places)] += weights
            sums = self.sums[(slice(None), *places)]
            if self.sums.dtype == torch.float32:
                sums.addcmul_(part, weights)
                continue
            # Class by class: a copy of the whole window in float32 would undo what float16 saves.
            for one, values in zip(sums, part, strict=True):
                one.copy_(torch.addcmul(one.float(), values, weights))

    def leave(self, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """Planes from ``start`` to ``stop`` of the padded image, without the padding."""
        margin, size = self.margin[self.axis], self.shape[self.axis]
        start, stop = max(start, margin), min(stop, margin + size)
        for low in range(start, stop, self.chunk):
            high = min(low + self.chunk, stop)
            cut = [high - low if a == self.axis else self.shape[a] for a in range(3)]
            # Outside inference mode: who gets them may write to them.
            planes = torch.empty((len(self.sums), *cut))
            self._normalise(planes, low)
            yield slice(low - margin, high - margin), planes
            del planes  # before the next ones are made
        self._clear(start, stop - start)

    @torch.inference_mode()
    def _normalise(self, planes: Tensor, low: int) -> None:
        for offset, slot, count in self._segments(low, planes.shape[1 + self.axis]):
            places = [slice(margin, margin + size) for margin, size in zip(self.margin, self.shape, strict=True)]
            places[self.axis] = slice(slot, slot + count)
            total = self.total[tuple(places)].cpu().contiguous()
            part = planes.narrow(1 + self.axis, offset, count)
            part.copy_(self.sums[(slice(None), *places)])
            # Where no window ran, the sums are 0 and stay so.
            part.div_(total.where(total > 0, 1))
        if not torch.stack(torch.aminmax(planes)).isfinite().all():
            self._refuse()

    @torch.inference_mode()
    def _clear(self, start: int, count: int) -> None:
        for _, slot, number in self._segments(start, count):
            self.sums.narrow(1 + self.axis, slot, number).zero_()
            self.total.narrow(self.axis, slot, number).zero_()

    def _refuse(self) -> None:
        largest = float(self.largest.max())
        if self.sums.dtype == torch.float16 and math.isfinite(largest):
            raise OverflowError(f"a logit of {largest:g} is too large for sums in float16")
        raise FloatingPointError("the network's output is not finite")

    def _segments(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Offset, slot and count of the one or two runs of slots in which planes from ``start`` on lie."""
        slot = start % self.edge
        head = min(count, self.edge - slot)
        yield 0, slot, head
        if head < count:
            yield head, 0, count - head
