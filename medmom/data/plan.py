"""What a data folder suggests for spacing, size, patch and intensities, for volumes by nnU-Net's rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medmom.data.preparation import Preparation, fit_preparation
from medmom.geometry import Geometry

ANISOTROPY = 3.0
"""An axis this many times coarser than the others, with as many times fewer voxels, is anisotropic."""

BUDGETS = {"cpu": (64**3, 4), "gpu": (128**3, 6)}
"""Largest patch in voxels and number of stages, for ``mom3d_xs`` on two cores and ``mom3d_m`` on 12 GB."""

PICTURE_BUDGETS = {"cpu": (192**2, 5), "gpu": (256**2, 5)}
"""The same in pixels, for ``mom2d_xs`` and ``mom2d_s``."""

HOUNSFIELD_AIR = -500.0


@dataclass(frozen=True)
class PatchPlan:
    """A patch for one device.

    Attributes:
        device: ``cpu`` or ``gpu``.
        budget: Largest number of voxels or pixels that was allowed.
        patch: Voxels or pixels by axis, in the order of the working grid.
        num_stages: Resolution levels that such a patch carries.
    """

    device: str
    budget: int
    patch: tuple[int, ...]
    num_stages: int


@dataclass(frozen=True)
class Proposal:
    """Values for a recipe.

    Attributes:
        preparation: Spacing of the working grid (RAS axis order) or, of pictures, its size on the CPU; intensity rule
            with its numbers.
        shape: Median shape of the cases on that grid; of pictures as they are.
        patches: One plan a device.
        reasons: A line for each decision.
    """

    preparation: Preparation
    shape: tuple[int, ...]
    patches: tuple[PatchPlan, ...]
    reasons: tuple[str, ...]


def propose(geometries: Sequence[Geometry], channels: Sequence[str], foreground: Sequence[np.ndarray]) -> Proposal:
    """Derives a proposal from the grids and foreground intensities of all cases.

    Args:
        geometries: Grid of each case, in any orientation.
        channels: Channel names; ``CT`` means Hounsfield units.
        foreground: Intensities of foreground voxels of each case, shape (n,), of the first channel.

    Source:
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, and nnU-Net version 2.
    """
    turned = [geometry.reoriented("RAS") for geometry in geometries]
    spacings = np.array([geometry.spacing for geometry in turned])
    shapes = np.array([geometry.shape for geometry in turned])
    spacing, why_spacing = choose_spacing(spacings, shapes)
    shape = np.median(np.maximum(1, np.round(shapes * spacings / spacing)), axis=0)
    patches = tuple(plan_patch(spacing, shape, device=device) for device in BUDGETS)
    preparation, why_intensity = choose_intensity(spacing, channels, foreground)
    why_patch = (
        f"patch: the median shape {_times(shape)} on that spacing, or as much of it as the "
        "voxels allow; an axis is halved while it has 8 voxels and less than twice the smallest spacing"
    )
    return Proposal(preparation, tuple(int(n) for n in shape), patches, (why_spacing, why_patch, why_intensity))


def propose_pictures(geometries: Sequence[Geometry], num_channels: Sequence[int]) -> Proposal:
    """Derives a proposal for a two-dimensional network from the sizes and colours of all pictures.

    Args:
        geometries: Grid of each picture, (columns, rows, 1).
        num_channels: Channels of each picture.
    """
    sizes = np.array([geometry.shape[:2] for geometry in geometries])
    median, ratios = np.median(sizes, axis=0), sizes[:, 0] / sizes[:, 1]
    patches = tuple(plan_patch((1.0, 1.0), median, device=device) for device in PICTURE_BUDGETS)
    num_grey = sum(count == 1 for count in num_channels)
    is_mixed = 0 < num_grey < len(num_channels)
    colours = f"{num_grey} of the {len(num_channels)}" if is_mixed else "all" if num_grey else "no"
    reasons = (
        f"size: the median picture has {_times(median)} pixels (they range from {_times(sizes.min(axis=0))} to "
        f"{_times(sizes.max(axis=0))}), the network sees as much of it as the pixels allow",
        f"size: each picture is brought to it whatever its proportions (width to height {ratios.min():.2f} to "
        f"{ratios.max():.2f}), and its label map back to its own",
        "patch: the whole size; two edges make the network two-dimensional",
        "intensity: pictures are on one scale, 0 to 255; divided by 255",
        f"colour: {colours} pictures are grey",
    )
    preparation = Preparation(None, "unit", size=patches[0].patch, colour="rgb" if is_mixed else "own")
    return Proposal(preparation, tuple(int(n) for n in median), patches, reasons)


def choose_spacing(spacings: np.ndarray, shapes: np.ndarray) -> tuple[tuple[float, ...], str]:
    """Gives the median spacing, finer along an anisotropic axis, and the reason.

    Args:
        spacings: In mm, shape (cases, 3).
        shapes: In voxels, shape (cases, 3).
    """
    spacing, size = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(spacing.argmax())
    others = [axis for axis in range(3) if axis != worst]
    ranges = " x ".join(f"{low:.3g}-{high:.3g}" for low, high in zip(spacings.min(0), spacings.max(0), strict=True))
    reason = f"spacing: median of {len(spacings)} cases (they range over {ranges} mm)"
    if spacing[worst] > ANISOTROPY * spacing[others].max() and size[worst] * ANISOTROPY < size[others].min():
        spacing[worst] = max(np.percentile(spacings[:, worst], 10), spacing[others].max())
        reason += f"; axis {'RAS'[worst]} is over {ANISOTROPY:g} times coarser, so its 10th percentile"
    return tuple(float(f"{edge:.4g}") for edge in spacing), reason


def plan_patch(spacing: Sequence[float], shape: Sequence[float] | np.ndarray, *, device: str) -> PatchPlan:
    """Gives the largest patch for a device's budget that resembles the median case and halves evenly.

    It starts from a block of equal edges in mm with 256^3 voxels (512^2 pixels), no larger than the case, and
    shortens the axis that covers most of the case until the budget is met.

    Args:
        spacing: Of the working grid, in mm; two or three edges.
        shape: Median shape of the cases on it.
        device: A key of ``BUDGETS``.
    """
    is_flat = len(spacing) == 2
    budget, max_stages = (PICTURE_BUDGETS if is_flat else BUDGETS)[device]
    edges = 1 / np.array(spacing)
    block = 512**2 if is_flat else 256**3
    size = np.minimum(np.round(edges * (block / edges.prod()) ** (1 / len(edges))), shape).astype(int)
    patch, num_stages = _padded(size, spacing, max_stages)
    while patch.prod() > budget:
        axis = int((patch / np.array(shape)).argmax())
        size, before = patch.copy(), patch[axis]
        while patch[axis] >= before:
            size[axis] -= 1
            patch, num_stages = _padded(size, spacing, max_stages)
    return PatchPlan(device, budget, tuple(int(n) for n in patch), num_stages)


def choose_intensity(
    spacing: tuple[float, ...], channels: Sequence[str], foreground: Sequence[np.ndarray]
) -> tuple[Preparation, str]:
    """Chooses fixed Hounsfield limits where every channel is named CT, else a z-score of each case."""
    names, lowest = ", ".join(channels), min((float(part.min()) for part in foreground if part.size), default=0.0)
    if any(name.strip().upper() != "CT" for name in channels):
        hint = "; values reach below -500: if this is CT, name the channel CT" if lowest < HOUNSFIELD_AIR else ""
        return Preparation(
            spacing, "zscore"
        ), f"intensity: z-score of each case, for channel {names} has no fixed scale{hint}"
    if not any(part.size for part in foreground):
        return Preparation(spacing, "ct"), "intensity: channel CT; no labelled foreground yet to take limits from"
    preparation = fit_preparation(Preparation(spacing, "ct"), foreground)
    return preparation, "intensity: channel CT; clipped to the 0.5 and 99.5 percentile of the labelled foreground"


def _times(shape: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{n:.0f}" for n in shape)


def _padded(size: np.ndarray, spacing: Sequence[float], max_stages: int) -> tuple[np.ndarray, int]:
    """Rounds a size up to what its halvings divide; returns it with the number of stages."""
    edges, widths = size.astype(float), np.array(spacing, dtype=float)
    divisor, num_stages = np.ones(len(size), dtype=int), 1
    while num_stages < max_stages:
        long = edges >= 8
        halved = long & (widths < 2 * widths[long].min(initial=np.inf))
        if not halved.any() or (halved.sum() == 1 and edges[halved][0] < 12):
            break
        edges, widths = np.where(halved, np.ceil(edges / 2), edges), np.where(halved, widths * 2, widths)
        divisor, num_stages = np.where(halved, divisor * 2, divisor), num_stages + 1
    return -(-size // divisor) * divisor, num_stages
