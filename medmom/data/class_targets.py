"""What a classification is taught: targets, weights, and images that suit one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from medmom.classes import Classes
from medmom.data.casefiles import CaseFiles
from medmom.data.class_survey import ClassSurvey
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError

PLANE_AXES = {"axial": 2, "coronal": 1, "sagittal": 0}
"""Axis of a right-anterior-superior grid that counts the slices of a plane."""


def multi_hot(cases: Sequence[CaseFiles], classes: Classes) -> np.ndarray:
    """Gives 1 for each class that a case is of, else 0; float32, shape (cases, K)."""
    targets = np.zeros((len(cases), classes.num_channels), np.float32)
    for row, case in zip(targets, cases, strict=True):
        row[[classes.channel(name) for name in case.classes or ()]] = 1
    return targets


def class_weights(cases: Sequence[CaseFiles], classes: Classes) -> torch.Tensor:
    """Gives each class a weight that goes with the inverse of its frequency, 1 on average over the cases.

    w_k = sum_j n_j / (K n_k), with n_k cases of class k; where cases may be of several classes, each counts for all.

    Args:
        cases: Those that are trained on.
        classes: What they are told apart by.

    Returns:
        float32, shape (K,).

    Raises:
        MedmomError: A class has no case.
    """
    counts = multi_hot(cases, classes).sum(axis=0, dtype=np.float64)
    if not counts.all():
        name = classes.names[int(counts.argmin())]
        raise MedmomError(f"class {name} has no training image, so it can have no weight. Set --data.balance none.")
    return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)


def check_images(
    surveys: Mapping[str, ClassSurvey],
    cases: Sequence[CaseFiles],
    preparation: Preparation,
    *,
    patch: Sequence[int],
    slices: int | None,
) -> int:
    """Demands that all images suit one network, and counts their channels.

    Args:
        surveys: By case name.
        cases: Which.
        preparation: The recipe's.
        patch: Edges of the recipe's patch.
        slices: Slices of each volume for a 2-D network; None: it is for pictures, or the network is 3-D.

    Returns:
        Number of channels that the network sees.

    Raises:
        MedmomError: Grey and colour images are mixed, or volumes meet a network for pictures or the reverse.
    """
    first: dict[int, CaseFiles] = {}
    for case in cases:
        channels, *shape = surveys[case.name].shape
        depth = shape[PLANE_AXES[preparation.plane]]
        if preparation.colour != "own" and channels in (1, 3):
            channels = 1 if preparation.colour == "grey" else 3
        first.setdefault(channels, case)
        if depth > 1 and len(patch) == 2 and slices is None:
            raise MedmomError(
                f"{case.images[0]}: a volume of {depth} {preparation.plane} slices, and data.patch {list(patch)} is "
                "for pictures. Set --data.slices, or a patch of three edges."
            )
        if depth == 1 and (len(patch) == 3 or slices is not None):
            key = "data.slices" if len(patch) == 2 else f"data.patch {list(patch)}"
            raise MedmomError(
                f"{case.images[0]}: one slice only, and {key} is for volumes. Set a patch of two edges and no slices."
            )
    if len(first) > 1:
        (one, case), (two, other) = sorted(first.items())[:2]
        raise MedmomError(
            f"{other.images[0]}: {two} channels, {case.images[0]} has {one}. Set --preparation.colour grey or rgb."
        )
    return next(iter(first))
