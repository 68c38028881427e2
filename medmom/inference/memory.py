"""What a prediction takes of the memory, and the plan that keeps a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from medmom.errors import MedmomError
from medmom.inference.footprint import resident, window_bytes
from medmom.inference.stream import StreamPlan, num_windows, planes_at_once, window_edges
from medmom.models.sizes import times

GIB = 2**30

UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}
"""Powers of 1024 or 1000."""

BATCHES = (8, 4, 2, 1)
"""Windows at a time that are tried on a GPU, in this order."""

SPARE, SPARE_DEVICE = 0.1, 0.1
"""Share of what is to come that is added for what is not counted: pieces kept by those who give out memory."""

KEPT = 96 * 2**20
"""What glibc may keep of freed memory: its largest trim threshold, and a block below its largest mmap threshold."""

START = "at the start"
"""Name of what is there before a plan is made."""

RESTORING = 4
"""Copies of the planes that leave at once, while they are turned and brought to the case's own grid."""

SLABS, SLAB_THICKNESS = 4, 16
"""Copies of a slab, and its planes, while an image is brought to the working grid."""


def parse_size(text: str, *, option: str) -> int:
    """Reads a size of memory.

    Args:
        text: Such as ``2GiB``, ``1500MB`` (10^6 bytes), ``3G`` (as GiB) or ``2.5``, a number of GiB.
        option: Whose value it is, for the error.

    Returns:
        Bytes.

    Raises:
        MedmomError: It is no size, or nothing.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:([kmgt])(ib|b)?)?", text.strip().lower())
    unit, kind = (found[2] or "g", found[3] or "ib") if found else ("g", "ib")
    size = int(float(found[1]) * (1024 if kind == "ib" else 1000) ** UNITS[unit]) if found else 0
    if size < 1:
        raise MedmomError(f"{option} {text}: no size of memory; give it as 2GiB, 1500MB, 3G or as a number of GiB.")
    return size


def plan_stream(  # noqa: PLR0917 - the case in full, then the budget
    network: nn.Module,
    shape: Sequence[int],
    own_shape: Sequence[int],
    patch: Sequence[int],
    overlap: float,
    num_classes: int,
    *,
    device: torch.device,
    max_ram: int | None = None,
    max_vram: int | None = None,
    image_bytes: int = 0,
    mirrors: Sequence[int] = (),
) -> tuple[StreamPlan, str]:
    """Chooses how the windows of a case run within a budget of memory.

    Counted is what the process takes when it is asked, which is best after the case was read and before it is
    prepared, and what is to come: the prepared image, sums, weights and body mask, one run of the network (measured
    on a window of zeros) or the planes that are restored, whichever is more, and the label map. Sums are float32
    where they fit, else float16. On a GPU they lie there if they can, and as many windows run at once as fit, 8 at
    most; without a budget of its own its free memory is one. On the CPU windows run one by one.

    Args:
        network: In evaluation mode, on ``device``.
        shape: Of the prepared image, (C, X, Y, Z).
        own_shape: Of the case's own grid, its axes in the order of the working grid's.
        patch: Voxels of a window along each axis, two or three.
        overlap: Share of a window that the next one covers again.
        num_classes: K.
        device: Of the network.
        max_ram: Bytes that the process may take; None: as many as it needs.
        max_vram: Bytes that torch may take of the GPU; torch is held to it from here on. What the driver takes for
            itself comes on top, some hundred MiB.
        image_bytes: Of the case as it will be read; 0 where it is and stays; below 0 what is let go of it once it is
            prepared.
        mirrors: Axes along which windows are mirrored.

    Returns:
        The plan, and a line that tells it.

    Raises:
        MedmomError: No plan keeps the budget; the smallest budget that one keeps is named.
    """
    case = _Case(tuple(shape), tuple(own_shape), tuple(patch), overlap, num_classes, image_bytes)
    if device.type == "cuda":
        return _plan_cuda(network, case, device=device, max_ram=max_ram, max_vram=max_vram, mirrors=mirrors)
    if max_ram is None:
        plan = case.plan(torch.float32, batch=1, on_device=False)
        return plan, f"{_told(case, plan)}."
    window = window_bytes(network, shape[0], patch, device=device, mirrors=mirrors)
    needs = []
    for dtype in (torch.float32, torch.float16):
        plan = case.plan(dtype, batch=1, on_device=False)
        needs.append(case.ram(plan, resident(), window))
        if _total(needs[-1]) <= max_ram:
            return plan, f"{_told(case, plan)}, {_of(_total(needs[-1]), max_ram)} RAM."
    raise _too_small("--max-ram", max_ram, min(needs, key=_total), "crop the image")


def step_down(plan: StreamPlan) -> StreamPlan | None:
    """Gives the plan that takes the least memory of a GPU; None if it is ``plan``."""
    least = replace(plan, batch=1, on_device=False)
    return None if least == plan else least


@dataclass(frozen=True)
class _Case:
    """Sizes of a case, and what plans for it take, by name, in bytes."""

    shape: tuple[int, ...]
    own_shape: tuple[int, ...]
    patch: tuple[int, ...]
    overlap: float
    num_classes: int
    image_bytes: int

    def plan(self, dtype: torch.dtype, *, batch: int, on_device: bool) -> StreamPlan:
        axis = min(range(3), key=lambda axis: (math.prod(self._extents(axis)), -axis))
        return StreamPlan(self.patch, self.overlap, axis, batch, dtype, on_device)

    def sums(self, plan: StreamPlan) -> int:
        """Sums of logits and of weights, and the weights of a window."""
        each = self.num_classes * plan.dtype.itemsize + 4
        return each * math.prod(self._extents(plan.axis)) + 4 * math.prod(window_edges(self.patch))

    def ram(self, plan: StreamPlan, at_start: int, window: int) -> dict[str, int]:
        """What the process takes at its largest, which may be while the image is prepared."""
        channels, *working = self.shape
        before = {START: at_start + max(0, self.image_bytes), "prepared image": 4 * math.prod(self.shape)}
        half_way = 4 * channels * math.prod(working[:2]) * self.own_shape[2]
        slab = 4 * channels * max(math.prod(self.own_shape[:2]), math.prod(working[:2])) * SLAB_THICKNESS
        preparing = {**before, "preparing": half_way + SLABS * slab}
        planes = 4 * self.num_classes * math.prod(working) // working[plan.axis]
        restoring = RESTORING * planes * planes_at_once(self.num_classes, working, plan.axis)
        windows = 4 * plan.batch * (channels + self.num_classes) * math.prod(window_edges(self.patch))
        running = {
            **before,
            START: at_start + self.image_bytes,
            "sums": 0 if plan.on_device else self.sums(plan),
            "body mask": math.prod(working),
            "kept when freed": KEPT,
            "a window": max(window, restoring, windows if window == 0 else 0),
            "label map": math.prod(self.own_shape),
        }
        return max(preparing, running, key=_total)

    def vram(self, plan: StreamPlan, at_start: int, window: int) -> dict[str, int]:
        planes = 4 * self.num_classes * math.prod(self.shape[1:]) // self.shape[1 + plan.axis]
        leaving = 2 * planes * planes_at_once(self.num_classes, self.shape[1:], plan.axis)
        needs = {START: at_start, "windows": plan.batch * window}
        if plan.on_device:
            needs |= {"sums": self.sums(plan), "planes": leaving}
        # Blocks of a GPU's memory are larger than what lies in them.
        return {name: int((1 + SPARE_DEVICE) * size) for name, size in needs.items()}

    def _extents(self, axis: int) -> list[int]:
        extents = [max(size, edge) for size, edge in zip(self.shape[1:], window_edges(self.patch), strict=True)]
        extents[axis] = window_edges(self.patch)[axis]
        return extents


def _plan_cuda(
    network: nn.Module,
    case: _Case,
    *,
    device: torch.device,
    max_ram: int | None,
    max_vram: int | None,
    mirrors: Sequence[int],
) -> tuple[StreamPlan, str]:
    free, total = torch.cuda.mem_get_info(device)
    if max_vram is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_vram / total), device)
    allowed = free + torch.cuda.memory_reserved(device) if max_vram is None else max_vram
    at_start = torch.cuda.memory_allocated(device)
    window = window_bytes(network, case.shape[0], case.patch, device=device, mirrors=mirrors)
    ram, on_gpu = [], []
    for plan in _cuda_plans(case):
        on_gpu.append(case.vram(plan, at_start, window))
        if _total(on_gpu[-1]) > allowed:
            continue
        ram.append(case.ram(plan, resident(), 0))
        if max_ram is None or _total(ram[-1]) <= max_ram:
            told = f"{_told(case, plan)}, {_of(_total(on_gpu[-1]), allowed)} VRAM"
            return plan, f"{told}." if max_ram is None else f"{told}, {_of(_total(ram[-1]), max_ram)} RAM."
    if max_ram is not None and ram:
        raise _too_small("--max-ram", max_ram, min(ram, key=_total), "crop the image")
    option = "--max-vram" if max_vram is not None else f"--device {device}"
    raise _too_small(option, allowed, min(on_gpu, key=_total), "name --device cpu", is_option=max_vram is not None)


def _cuda_plans(case: _Case) -> Iterator[StreamPlan]:
    """Every plan, the one that is liked best first."""
    for dtype in (torch.float32, torch.float16):
        for on_device in (True, False):
            for batch in BATCHES:
                yield case.plan(dtype, batch=batch, on_device=on_device)


def _total(needs: Mapping[str, int]) -> int:
    """Of what a plan takes by name; with some to spare, but for what is there already."""
    return int((1 + SPARE) * sum(needs.values()) - SPARE * needs[START])


def _told(case: _Case, plan: StreamPlan) -> str:
    count = num_windows(case.shape[1:], plan.patch, plan.overlap)
    at_once = "one" if plan.batch == 1 else str(plan.batch)
    dtype = str(plan.dtype).removeprefix("torch.")
    return (
        f"Plan: {count} windows of {times(plan.patch)} along {'xyz'[plan.axis]}, {at_once} at a time, "
        f"accumulator {case.sums(plan) / GIB:.2f} GiB {dtype}{' on the GPU' if plan.on_device else ''}"
    )


def _of(need: int, allowed: int) -> str:
    return f"{need / GIB:.2f} of {allowed / GIB:.2f} GiB"


def _too_small(
    option: str, allowed: int, needs: Mapping[str, int], mend: str, *, is_option: bool = True
) -> MedmomError:
    need = _total(needs)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needs.items() if size)
    # Rounded up: what the process takes at its start differs a little from run to run.
    enough = math.ceil(10 * (1.01 * need / GIB)) / 10
    has = f"{option} {allowed / GIB:.3g}GiB" if is_option else f"{option}: {allowed / GIB:.3g} GiB are free"
    advice = f"Give {option} {enough:.1f}GiB, or {mend}." if is_option else f"Free some, or {mend}."
    return MedmomError(f"{has}: this case needs at least {need / GIB:.2f} GiB ({parts}). {advice}")
