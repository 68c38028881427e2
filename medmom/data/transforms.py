from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform

from medmom.data.case import Case, CaseFiles, read_case
from medmom.data.preparation import Preparation, prepare
from medmom.geometry import Geometry
from medmom.labels import Labels

Sample = dict[str, Any]
"""A case as MONAI transforms take it: ``image``, ``label``, ``annotated``, ``case``."""


def to_sample(case: Case) -> Sample:
    """Turns a case into the dictionary that MONAI transforms take: MetaTensors that carry the case's affine."""
    affine = torch.from_numpy(case.geometry.affine)
    sample: Sample = {"case": case.name, "annotated": torch.tensor(case.annotated)}
    sample["image"] = MetaTensor(torch.from_numpy(case.image), affine=affine)
    if case.label is not None:
        sample["label"] = MetaTensor(torch.from_numpy(case.label[None]), affine=affine)
    return sample


def to_case(sample: Sample) -> Case:
    """Turns the dictionary back into a case; the label may be of any type, ``annotated`` and ``case`` may be absent."""
    image = sample["image"]
    label = np.asarray(sample["label"][0]).astype(np.uint8) if "label" in sample else None
    geometry = Geometry(tuple(image.shape[1:]), np.asarray(image.affine))
    annotated = tuple(bool(flag) for flag in sample.get("annotated", ()))
    return Case(sample.get("case", ""), np.asarray(image, dtype=np.float32), label, geometry, annotated)


class ReadCased(Transform):
    """Reads the files of a case: ``CaseFiles`` in, a sample on the case's own grid out.

    Args:
        labels: Class names and stored values.
    """

    def __init__(self, labels: Labels) -> None:
        self.labels = labels

    def __call__(self, files: CaseFiles) -> Sample:
        """Reads one case."""
        return to_sample(read_case(files, self.labels))


class PrepareCased(MapTransform):
    """``prepare`` as a MONAI transform: MetaTensors on the case's own grid in, on the working grid out.

    Keys: ``image`` (C, X, Y, Z), optionally ``label`` (1, X, Y, Z) of channel indices.

    Args:
        preparation: Fitted.
    """

    def __init__(self, preparation: Preparation) -> None:
        super().__init__(keys=("image",))
        self.preparation = preparation

    def __call__(self, data: Sample) -> Sample:
        """Prepares one case; other entries of the dictionary stay as they are."""
        prepared = to_sample(prepare(to_case(data), self.preparation))
        return {**data, **{key: prepared[key] for key in ("image", "label") if key in prepared}}
