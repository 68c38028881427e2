"""A folder of tiny scans and a recipe that trains on them in seconds, for the tests of training and commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import yaml

from medmom.recipe_file import RecipeFile

# The smallest patch with two axes of one size that carries the four stages of mom3d_xs.
PATCH = [32, 32, 8]


def write_scans(folder: Path, *, num_cases: int = 5, seed: int = 0) -> Path:
    """Writes ``images/`` and ``labels/``: a bright ball (head) beside a dark one (body) in noise."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for number in range(num_cases):
        image, label = scan([seed, number])
        for name, array in (("images", image), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), folder / name / f"case_{number}.nii.gz")
    labels = {"background": 0, "head": 1, "body": 4}
    dataset = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


def scan(seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    index = np.indices((24, 22, 10)).T.T
    label = np.zeros(index.shape[1:], dtype=np.uint8)
    for value, centre in ((1, (7, 11, 5)), (4, (16, 11, 5))):
        place = np.array(centre) + rng.uniform(-1.5, 1.5, 3)
        distance = np.sqrt((((index.T - place) / (1, 1, 0.6)) ** 2).sum(-1)).T
        label[distance < 4.5] = value
    image = rng.normal(0, 0.3, label.shape) + np.choose(np.minimum(label, 2), [0.0, 3.0, -3.0])
    return image.astype(np.float32), label


def write_recipe(path: Path, data: Path, **training: object) -> Path:
    """Writes a recipe of two epochs of two steps; ``training`` changes its section of that name."""
    recipe = {
        "data": {"folder": str(data), "cache": str(path.parent / "cache"), "patch": PATCH, "batch_size": 2},
        "preparation": {"spacing": [1.0, 1.0, 2.0], "intensity": "zscore"},
        "model": {"preset": "mom3d_xs"},
        "loss": {"class_path": "medmom.tasks.losses.DiceCrossEntropy"},
        "optimizer": {"class_path": "medmom.optim.HeavyBall", "init_args": {"lr": 0.01, "momentum": 0.9}},
        "training": {"epochs": 2, "steps_per_epoch": 2, "picture_every": 1, **training},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def tiny_recipe(folder: Path, *overrides: str, **training: object) -> RecipeFile:
    """Writes scans (once) and a recipe into ``folder`` and reads the recipe."""
    data = folder / "scans"
    if not data.exists():
        write_scans(data)
    return RecipeFile(write_recipe(folder / "tiny.yaml", data, **training), list(overrides))


def rows(path: Path) -> list[dict[str, str]]:
    """Gives the rows of a metrics.csv."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
