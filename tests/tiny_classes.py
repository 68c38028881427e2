"""Classified pictures, volumes and files of many images, a few pixels each, for the tests of classification."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from medmom.data.casefiles import CaseFiles


def write_picture(path: Path, *, seed: int = 0, size: tuple[int, int] = (8, 6), colour: bool = False) -> Path:
    """A picture of noise, ``size`` columns by rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if colour else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def write_volume(path: Path, *, seed: int = 0, shape: tuple[int, int, int] = (8, 7, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nib.Nifti1Image(np.random.default_rng(seed).normal(0, 50, shape).astype(np.float32), np.eye(4))
    file.header.set_xyzt_units("mm")
    nib.save(file, path)
    return path


def write_class_folders(folder: Path, counts: dict[str, int]) -> Path:
    """A folder for each class with pictures 0.png, 1.png, ..., no two alike."""
    for kind, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            write_picture(folder / name / f"{k}.png", seed=1000 * kind + k)
    return folder


def write_items(path: Path, *, shape: tuple[int, ...] = (8, 6), sizes: tuple[int, int, int] = (6, 3, 2)) -> Path:
    """A file as those of MedMNIST: grey pictures of two classes, three parts."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in zip(("train", "val", "test"), sizes, strict=True):
        arrays[f"{part}_images"] = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(size) % 2)[:, None].astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def picture_case(path: Path, kind: str, *, group: str = "", **known: str) -> CaseFiles:
    return CaseFiles(path.stem, (path,), None, group or path.stem, classes=(kind,), **known)
