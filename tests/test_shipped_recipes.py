"""Every shipped recipe trains: two batches on made-up data of its own kind, in small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import rows, write_scans

from medmom.package import is_classifier, load_package
from medmom.recipe_file import RecipeFile, recipe_path, shipped_recipes
from medmom.train import train


def pictures(folder: Path) -> Path:
    """``images/`` and ``masks/``: a red ball on brown, drawn in 0 and 255; sizes differ."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(6):
        rows_, columns = 40 + number, 60
        y, x = np.indices((rows_, columns))
        ball = (y - rng.integers(10, 30)) ** 2 + (x - rng.integers(12, 48)) ** 2 < 80
        image = rng.integers(60, 90, (rows_, columns, 3)) + 120 * ball[..., None] * np.array([1, 0, 0])
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"frame_{number}.jpg")
        Image.fromarray(255 * ball.astype(np.uint8)).save(folder / "masks" / f"frame_{number}.png")
    return folder


def livers(folder: Path) -> Path:
    """Volumes named as those of the decathlon's liver task."""
    write_scans(folder)
    for kind in ("images", "labels"):
        for path, number in zip(sorted((folder / kind).iterdir()), (1, 13, 31, 70, 71), strict=True):
            path.rename(path.with_name(f"liver_{number}.nii.gz"))
    return folder


def classes(folder: Path) -> Path:
    """Two folders of grey pictures, bright and dark."""
    rng = np.random.default_rng(0)
    for name, level in (("bright", 160), ("dark", 40)):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            image = rng.integers(level, level + 60, (30, 34)).astype(np.uint8)
            Image.fromarray(image).save(folder / name / f"{number:03d}.png")
    return folder


def organs(folder: Path) -> Path:
    """A file like those of MedMNIST."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 22), ("val", 11), ("test", 11)):
        arrays[f"{part}_images"] = rng.integers(0, 255, (count, 28, 28)).astype(np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % 11)[:, None].astype(np.uint8)
    np.savez(folder / "organamnist.npz", **arrays)
    return folder / "organamnist.npz"


SMALL_2D = ["--data.patch", "[64,64]", "--preparation.size", "[64,64]", "--model.preset", "mom2d_xs"]
SMALL_3D = ["--data.patch", "[32,32,8]", "--preparation.spacing", "[1.0,1.0,2.0]", "--model.preset", "mom3d_xs"]
SMALL_CLASSIFIER = ["--data.patch", "[32,32]", "--preparation.size", "[32,32]", "--model.preset", "cls2d_xs"]
KINDS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "abdomen_pelvis": (classes, SMALL_CLASSIFIER),
    "liver_slices": (livers, SMALL_2D),
    "lung_slices": (write_scans, SMALL_2D),
    "modality": (classes, [*SMALL_CLASSIFIER, "--data.folds", "2"]),
    "organ_slices": (organs, []),
    "polyps": (pictures, SMALL_2D),
    "polyps_paper": (pictures, []),
}
IN_SMALL = ["--data.batch_size", "2", "--training.epochs", "1", "--training.steps_per_epoch", "2"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_trains_for_two_batches(name: str, tmp_path: Path) -> None:
    make, small = KINDS.get(name, (write_scans, SMALL_3D))
    data = make(tmp_path / "data")
    places = ["--data.folder", str(data), "--data.cache", str(tmp_path / "cache"), "--training.warmup_steps", "0"]
    recipe = RecipeFile(recipe_path(name), [*places, *IN_SMALL, *small])
    if recipe.get("data.group") is not None:
        (data / "cases.csv").write_text(
            f"name,{recipe.get('data.group')}\n" + "".join(f"case_{number},{number}\n" for number in range(5))
        )
    model = train(recipe, tmp_path / "run", device="cpu", quiet=True)
    (row,) = rows(tmp_path / "run" / "metrics.csv")
    assert np.isfinite(float(row["train_loss"]))
    package = load_package(model)
    assert package.patch == tuple(recipe.get("data.patch"))
    assert is_classifier(model) == (make in (classes, organs))
    if name == "liver_slices":
        split = json.loads((tmp_path / "run" / "split.json").read_text())
        assert [case["name"] for case in split["validation"]] == ["liver_31"]
        assert [case["name"] for case in split["train"]] == ["liver_70", "liver_71"]


def test_every_recipe_of_its_own_kind_is_shipped() -> None:
    assert KINDS.keys() <= set(shipped_recipes())
