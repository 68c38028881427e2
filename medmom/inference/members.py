"""Which models go together in an ensemble, and what they have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from torch import nn

from medmom.cleanup import Cleanup
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.inference.ensemble import Ensemble
from medmom.models.sizes import times
from medmom.package import Package

logger = logging.getLogger(__name__)


def check_members(packages: Sequence[Package]) -> None:
    """Refuses models whose probabilities cannot be averaged voxel by voxel.

    They share labels, channels, window and preparation. Only the intensities of a CT may be scaled by other numbers,
    for those are fitted to the training cases of each fold.

    Raises:
        MedmomError: There is no model, one is there twice or classifies whole images, or something differs: the line
            names both and what it is.
    """
    if not packages:
        raise MedmomError("no model is given. Name a run folder or a model package.")
    seen: dict[str, Package] = {}
    for package in packages:
        difference = next(_differences(packages[0], package), None)
        if difference is not None:
            field, ours, theirs = difference
            raise MedmomError(
                f"{package.folder}: {field} {theirs}, but {ours} in {packages[0].folder}. "
                f"Leave out one of the two; the models of an ensemble have the same {field}."
            )
        same = seen.setdefault(package.checksum, package)
        if same is not package:
            raise MedmomError(f"{package.folder}: the same model as {same.folder}. Leave out one of the two.")


def preparations(packages: Sequence[Package]) -> list[Preparation]:
    """Gives the preparations that differ, in the order of the models."""
    return list(dict.fromkeys(package.preparation for package in packages))


def as_one(packages: Sequence[Package]) -> nn.Module:
    """Gives the network of one model, and the ensemble of several.

    Windows for an ensemble hold the channels of the first of ``preparations``, then those of the second, and so on.
    """
    if len(packages) == 1:
        return packages[0].network
    ways, count = preparations(packages), len(packages[0].channels)
    starts = [count * ways.index(package.preparation) for package in packages]
    return Ensemble([package.network for package in packages], [slice(start, start + count) for start in starts])


def mirror_axes(packages: Sequence[Package]) -> tuple[int, ...]:
    """Gives the axes of a window that were mirrored in the training of all models.

    Raises:
        MedmomError: There is none.
    """
    axes = [_mirror_axes(package) for package in packages]
    if len(axes) == 1:
        return axes[0]
    common = tuple(sorted(set(axes[0]).intersection(*axes)))
    if not common:
        folders = ", ".join(str(package.folder) for package in packages)
        raise MedmomError(f"{folders}: no axis was mirrored in the training of all (data.mirror). Leave out --tta.")
    return common


def common_cleanup(packages: Sequence[Package]) -> Cleanup | None:
    """Gives the cleanup that all models chose; None, and a warning in the log, where they did not choose the same."""
    first, *others = packages
    different = next((other for other in others if other.cleanup != first.cleanup), None)
    if different is None:
        return first.cleanup
    logger.warning("%s and %s chose different cleanups: the ensemble does none.", first.folder, different.folder)
    return None


def _differences(first: Package, other: Package) -> Iterator[tuple[str, str, str]]:
    """What must be the same and is not: its name, and what each of the two has."""
    ours, theirs = (list(zip(p.labels.names, p.labels.values, strict=True)) for p in (first, other))
    if len(ours) != len(theirs):
        yield "labels", f"of {len(ours)} classes", f"of {len(theirs)} classes"
    for (name, value), (other_name, other_value) in zip(ours, theirs, strict=False):
        if (name, value) != (other_name, other_value):
            yield "labels", f"with {name!r} as {value}", f"with {other_name!r} as {other_value}"
    if first.channels != other.channels:
        yield "channels", ", ".join(first.channels), ", ".join(other.channels)
    if first.patch != other.patch:
        yield "patch", times(first.patch), times(other.patch)
    before, after = (replace(p.preparation, clip=None, mean=None, std=None) for p in (first, other))
    for field in fields(Preparation):
        wanted, found = getattr(before, field.name), getattr(after, field.name)
        if wanted != found:
            yield f"preparation.{field.name}", str(wanted), str(found)


def _mirror_axes(package: Package) -> tuple[int, ...]:
    data = package.recipe.get("data", {})
    axes = tuple(int(axis) for axis in data.get("mirror", ()) if axis < len(package.patch))
    if not axes or not data.get("augment", True):
        raise MedmomError(
            f"{package.folder}: the model was trained without mirroring (data.mirror), and mirror images would mislead "
            "it. Leave out --tta."
        )
    return axes
