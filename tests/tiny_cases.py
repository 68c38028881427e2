"""Labelled cases of a few hundred voxels on disk, for the tests of the cache and of the data module."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from medmom.data.cache import CaseCache, PreparedCase
from medmom.data.casefiles import CaseFiles
from medmom.data.preparation import Preparation
from medmom.labels import Labels

LABELS = Labels(("background", "liver", "tumour"), (0, 1, 4), ignore=9)
CT = Preparation((1.0, 1.0, 1.0), "ct", (-1000.0, 1000.0), 0.0, 100.0)


def stored_label(shape: tuple[int, int, int] = (14, 12, 10)) -> np.ndarray:
    """A large liver, a tumour of eight voxels, and a slice that is to be ignored."""
    label = np.zeros(shape, dtype=np.uint8)
    label[2:8, 2:8, 2:8] = 1
    label[3:5, 3:5, 3:5] = 4
    label[-2:] = 9
    return label


def write_case(
    folder: Path,
    name: str,
    *,
    image: np.ndarray | None = None,
    label: np.ndarray | None = None,
    annotated: tuple[str, ...] | None = None,
    affine: np.ndarray | None = None,
) -> CaseFiles:
    folder.mkdir(parents=True, exist_ok=True)
    label = stored_label() if label is None else label
    if image is None:
        image = np.random.default_rng(len(name)).normal(0, 50, label.shape).astype(np.float32)
    paths = folder / f"{name}.nii.gz", folder / f"{name}-label.nii.gz"
    for path, array in zip(paths, (image, label), strict=True):
        file = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
        file.header.set_xyzt_units("mm")
        nib.save(file, path)
    return CaseFiles(name, (paths[0],), paths[1], name, annotated)


def prepare_case(folder: Path, files: CaseFiles, preparation: Preparation = CT) -> PreparedCase:
    (prepared,) = CaseCache(folder / "cache", LABELS, quiet=True).prepare([files], preparation)
    return prepared
