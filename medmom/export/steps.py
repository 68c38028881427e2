"""What comes before and after a network, in words and numbers, for whoever runs it without medmom."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from medmom.classes import Classes
from medmom.data.intensities import LUMA
from medmom.data.preparation import AXES, STORED, Preparation
from medmom.labels import Labels
from medmom.package import Package

OVERLAP = 0.5
"""Share of a window that the next one covers again, as ``medmom predict`` has it unless told otherwise."""

AXIS_ORDER = (
    "Array axes: channel, x, y, z. A volume: voxel axes as in the NIfTI file; a picture: x counts columns from the "
    "left, y rows from the top, z has one entry."
)
INTERPOLATION = (
    "Interpolating cubic B-spline (order 3) along each axis, of the voxels and of the border's value, which goes on "
    "outside (a a a | a b c d | d d d); an axis whose voxels stay where they are is copied. Each channel is then "
    "clipped to the range that it had before."
)
BLENDING = (
    "Logits of overlapping windows are averaged with the weights prod_axis exp(-d^2 / (2 s^2)), d the distance in "
    "voxels from the window's centre, s = 0.125 times its edge; weights below 0.001 count as 0.001."
)
RESTORING = (
    "The logits of each class are interpolated linearly to the image's own grid, the border's value outside, and the "
    "class with the largest logit wins there; of equal ones the first. Label maps are never interpolated."
)
_WITHIN = {
    "image": "all voxels of the image",
    "box": "the smallest box with all voxels of the image that are not 0 in every channel,",
    "mask": "all voxels of the image that are not 0 in every channel, and the holes between (the rest becomes 0),",
}
"""Of which voxels mean and standard deviation are taken."""


def processing_steps(package: Package) -> dict[str, Any]:
    """Gives every step from the image file to the network's input and from its output to the result.

    Args:
        package: Of either kind.

    Returns:
        Plain types for JSON: a title by step, each with words under ``rule`` and its numbers.
    """
    before = {"image": _image(package), **_preparation(package.preparation)}
    if isinstance(package.table, Labels):
        return {**before, **_windows(package.patch), **_label_map(package, package.table)}
    return {**before, **_whole(package), **_decision(package, package.table)}


def _image(package: Package) -> dict[str, Any]:
    colours = {
        "own": "Channels stay as they are.",
        "grey": f"Three channels become one: {LUMA[0]} red + {LUMA[1]} green + {LUMA[2]} blue.",
        "rgb": "One channel is taken three times.",
    }
    scale = "CT: Hounsfield units." if package.preparation.intensity == "ct" else "As stored, scale factors applied."
    picture = " Pictures: 0 to 255 whatever their depth." if package.preparation.intensity == "unit" else ""
    return {
        "rule": f"{AXIS_ORDER} {scale}{picture} {colours[package.preparation.colour]}",
        "channels": list(package.channels),
        "colour": package.preparation.colour,
    }


def _preparation(preparation: Preparation) -> dict[str, Any]:
    rules = {
        "ct": "clip to the range of clip, subtract mean, divide by std; on the image's own grid, before resampling.",
        "zscore": (
            "of each channel, subtract its mean and divide by its standard deviation (of the population), both over "
            f"{_WITHIN[preparation.within]} on its own grid, before resampling; a constant channel becomes 0."
        ),
        "unit": "divide by 255, before resampling.",
    }
    numbers = {key: asdict(preparation)[key] for key in ("clip", "mean", "std")}
    if preparation.size is not None:
        grid = (
            "The same axes, centre and extent (outer edges of voxels) with as many voxels as size says; axes that size "
            "does not name keep theirs."
        )
    elif preparation.exact == "extent" and preparation.spacing is not None:
        grid = (
            "The same axes, centre and extent (outer edges of voxels) with max(1, round(old / new n)) voxels along an "
            "axis, halves to even, new the edge in spacing; an axis that spacing does not name keeps its voxels."
        )
    elif preparation.spacing is not None:
        grid = (
            "The same axes and centre with voxels of exactly spacing mm: max(1, round(n old / new)) of them along an "
            "axis, halves to even. Where all edges differ by less than 0.001 %, the grid stays. An axis that spacing "
            "does not name keeps its voxels."
        )
    else:
        grid = "The image's own voxels."
    order = AXES[preparation.plane] if preparation.axes == "patient" else None
    stored = "".join("xyz"[axis] for axis in STORED[preparation.plane])
    turned = (
        f"Axes are permuted and flipped, never rotated, to the order closest to {order}."
        if order
        else f"Axes are those of the file, neither flipped nor rotated, in the order {stored}."
    )
    return {
        "intensity": {"rule": rules[preparation.intensity], "kind": preparation.intensity, **numbers},
        "working_grid": {
            "rule": f"{turned} {grid}",
            "orientation": order,
            "spacing_mm": None if preparation.spacing is None else list(preparation.spacing),
            "size_voxels": None if preparation.size is None else list(preparation.size),
            "interpolation": INTERPOLATION,
        },
    }


def _windows(patch: tuple[int, ...]) -> dict[str, Any]:
    steps = [max(1, int(edge * (1 - OVERLAP))) for edge in patch]
    slices = " Each slice along z runs by itself; the network sees x and y." if len(patch) == 2 else ""
    return {
        "windows": {
            "rule": (
                "Along each axis windows start at 0, step, 2 step, ...; the last is moved back to end where the image "
                "does, and there is one where the image has the window's size. An image that is smaller is padded with "
                f"0 to the window, floor(missing / 2) before it and the rest after it.{slices} {BLENDING}"
            ),
            "size_voxels": list(patch),
            "step_voxels": steps,
            "overlap": OVERLAP,
            "sigma_of_edge": 0.125,
            "smallest_weight": 0.001,
        }
    }


def _label_map(package: Package, labels: Labels) -> dict[str, Any]:
    cleanup = package.cleanup
    table = zip(range(labels.num_channels), labels.names, labels.values, strict=True)
    return {
        "restore": {"rule": RESTORING},
        "labels": {
            "rule": "The value of the winning channel is stored.",
            "classes": [
                {"channel": channel, "name": name, "value": value, "colour": list(labels.colour(name))}
                for channel, name, value in table
            ],
        },
        "cleanup": {
            "rule": "Nothing." if cleanup is None else f"On the own grid, as medmom.cleanup.apply does it: {cleanup}.",
            **({} if cleanup is None else cleanup.as_dict()),
        },
    }


def _whole(package: Package) -> dict[str, Any]:
    slices = "" if package.slices is None else (
        f" Of n slices along z the network sees floor((k + 0.5) n / {package.slices}) for k = 0 to "
        f"{package.slices - 1}, or all where n is at most {package.slices}."
    )  # fmt: skip
    return {
        "whole_image": {
            "rule": (
                "The image is cut about its centre to the size, floor(spare / 2) before; where it is smaller it is "
                f"filled up with the lowest value of each channel, floor(missing / 2) before.{slices}"
            ),
            "size_voxels": list(package.patch),
            "slices": package.slices,
        }
    }


def _decision(package: Package, classes: Classes) -> dict[str, Any]:
    kind = "sigmoid" if classes.is_multilabel else "softmax"
    chosen = "every class of at least 0.5" if classes.is_multilabel else "the class with the largest"
    return {
        "probabilities": {
            "rule": f"Logits are divided by the temperature; their {kind} are the probabilities; {chosen} is chosen.",
            "temperature": package.temperature,
            "activation": kind,
        },
        "classes": [{"channel": channel, "name": name} for channel, name in enumerate(classes.names)],
    }
