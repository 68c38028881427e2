"""Made-up pictures, slices and classes, and recipes that train on them in seconds, for the tests of whole roads."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from medmom.callbacks import CurveFile
from medmom.classes import Classes
from medmom.cli import main
from medmom.data.preparation import Preparation
from medmom.labels import Labels
from medmom.models import MomentumResNet, MomentumUNet
from medmom.package import save_package

SIZES = ((40, 30), (33, 47), (50, 36), (36, 36), (41, 32))
"""Columns and rows of the pictures: no two alike, none a multiple of what the network halves."""

LABELS = {"background": 0, "polyp": 3, "tool": 9}
"""Stored values of masks, none of which is a channel of the network."""

TURNED = np.array([[0, -1.5, 0, 20], [2.0, 0, 0, -7], [0, 0, 3.0, 11], [0, 0, 0, 1.0]])
"""Voxel to mm of the volumes: axes exchanged and flipped."""


class Fault(NamedTuple):
    """What to break, and what the line must say: file, fact, mend."""

    spoil: Callable[[Path], object]
    words: tuple[str, ...]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def disc_picture(seed: int, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A bright reddish disc (value 3) and a dark one (value 9) in noise, (rows, columns, 3), and the mask."""
    rng = np.random.default_rng(seed)
    columns, rows = size
    y, x = np.indices((rows, columns))
    mask = np.zeros((rows, columns), np.uint8)
    for value, share in ((3, 0.3), (9, 0.7)):
        near = np.hypot(x - share * columns + rng.uniform(-2, 2), y - rows / 2 + rng.uniform(-3, 3)) < 6
        mask[near] = value
    pixels = rng.normal(110, 12, (rows, columns, 3))
    pixels[mask == 3] += (110, 50, 50)
    pixels[mask == 9] -= 80
    return np.clip(pixels, 0, 255).astype(np.uint8), mask


def write_pictures(folder: Path, *, num_cases: int = 5) -> Path:
    """Writes ``images/`` (JPEG in colours), ``masks/`` (PNG of class numbers) and ``dataset.json``."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for k in range(num_cases):
        pixels, mask = disc_picture(k, SIZES[k % len(SIZES)])
        Image.fromarray(pixels).save(folder / "images" / f"frame {k}.JPG", quality=95)
        Image.fromarray(mask).save(folder / "masks" / f"frame {k}.png")
    (folder / "dataset.json").write_text(json.dumps({"channel_names": dict(enumerate("RGB")), "labels": LABELS}))
    return folder


def write_volumes(folder: Path, *, num_cases: int = 5, shape: tuple[int, int, int] = (34, 38, 5)) -> Path:
    """Writes ``images/`` and ``labels/`` of thick slices on a turned grid."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for k in range(num_cases):
        slices = [disc_picture(100 * k + z, shape[:2]) for z in range(shape[2])]
        arrays = {
            "images": np.stack([pixels[..., 0].T.astype(np.float32) for pixels, _ in slices], axis=-1),
            "labels": np.stack([mask.T for _, mask in slices], axis=-1),
        }
        for name, array in arrays.items():
            file = nib.Nifti1Image(array, TURNED)
            file.header.set_xyzt_units("mm")
            nib.save(file, folder / name / f"scan_{k}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "labels": LABELS}))
    return folder


def class_picture(seed: int, kind: int, size: Sequence[int] = (36, 34)) -> np.ndarray:
    """Noise with stripes along the rows (kind 0), along the columns (1), both (2): (rows, columns)."""
    rng = np.random.default_rng([seed, kind])
    y, x = np.indices((size[1], size[0])) + rng.integers(0, 8)
    waves = [np.sin(y), np.sin(x), np.sin(x) + np.sin(y)][kind]
    grey: np.ndarray = np.clip(120 + 60 * waves + rng.normal(0, 10, waves.shape), 0, 255).astype(np.uint8)
    return grey


def write_class_pictures(folder: Path, *, num_cases: int = 6, names: Sequence[str] = ("rows", "columns")) -> Path:
    """Writes a folder for each class with PNG pictures in it."""
    for kind, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for k in range(num_cases):
            Image.fromarray(class_picture(k, kind)).save(folder / name / f"{name}_{k}.png")
    return folder


def write_class_volumes(folder: Path, *, num_cases: int = 5, num_slices: int = 5) -> Path:
    """Writes a folder for each class with NIfTI volumes in it."""
    for kind, name in enumerate(("rows", "columns")):
        (folder / name).mkdir(parents=True)
        for k in range(num_cases):
            array = np.stack([class_picture(10 * k + z, kind).T for z in range(num_slices)], axis=-1)
            file = nib.Nifti1Image(array.astype(np.int16), np.diag([1.0, 1.0, 4.0, 1.0]))
            file.header.set_xyzt_units("mm")
            nib.save(file, folder / name / f"{name}_{k}.nii.gz")
    return folder


def write_multilabel(folder: Path, *, num_cases: int = 12) -> Path:
    """Writes pictures and ``images.csv`` in which an image is of one class, of both or of none."""
    (folder / "frames").mkdir(parents=True)
    rows = []
    for k in range(num_cases):
        columns_too, rows_too = k % 2, (k // 2) % 2
        noise = np.random.default_rng(k).integers(100, 140, (34, 36), dtype=np.uint8)
        kind = {(1, 1): 2, (1, 0): 1, (0, 1): 0}.get((columns_too, rows_too))
        Image.fromarray(noise if kind is None else class_picture(k, kind)).save(folder / "frames" / f"{k}.png")
        names = [name for name, there in (("rows", rows_too), ("columns", columns_too)) if there]
        rows.append([f"frames/{k}.png", ";".join(names), f"patient {k // 2}"])
    return write_rows(folder / "images.csv", [["image", "label", "patient"], *rows]).parent


def write_packed(path: Path) -> Path:
    """Writes a file of many pictures in three parts, as those of MedMNIST."""
    arrays: dict[str, np.ndarray] = {}
    for part, start, size in (("train", 0, 8), ("val", 50, 4), ("test", 90, 4)):
        arrays[f"{part}_images"] = np.stack([class_picture(start + k, k % 2, (28, 28)) for k in range(size)])
        arrays[f"{part}_labels"] = (np.arange(size) % 2).astype(np.uint8)[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **arrays)
    return path


def write_rows(path: Path, rows: Sequence[Sequence[object]], **options: Any) -> Path:
    """Writes a CSV file."""
    encoding = options.pop("encoding", "utf-8")
    with path.open("w", newline="", encoding=encoding) as stream:
        csv.writer(stream, **options).writerows(rows)
    return path


def road_recipe(path: Path, source: Path, *, classes: bool, **sections: Mapping[str, Any]) -> Path:
    """Writes a recipe of two epochs of two steps; ``sections`` change theirs."""
    loss = "class_losses.ClassificationLoss" if classes else "losses.DiceCrossEntropy"
    edges = [32, 32] if classes else [64, 64]
    recipe: dict[str, Any] = {
        "data": {"folder": str(source), "cache": str(path.parent / "cache"), "patch": edges, "batch_size": 4},
        "preparation": {"size": edges, "intensity": "unit", "colour": "grey"},
        "model": {"preset": "cls2d_xs" if classes else "mom2d_xs"},
        "loss": {"class_path": f"medmom.tasks.{loss}"},
        "optimizer": {"class_path": "medmom.optim.HeavyBall", "init_args": {"lr": 0.01, "momentum": 0.9}},
        "training": {"epochs": 2, "steps_per_epoch": 2},
    }
    for name, changes in sections.items():
        recipe[name] = {**recipe[name], **changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(*words: str | Path) -> int:
    """Runs a command on the CPU without progress bars; its exit code."""
    more = [] if words[0] in ("report", "inspect", "evaluate") else ["--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), *more, "--quiet"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def contents(folder: Path) -> dict[Path, str]:
    """Checksums of all files but those of the cache."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "cache" not in path.relative_to(folder).parts
    }


def complaint(capsys: pytest.CaptureFixture[str], folder: Path, *words: str | Path) -> str:
    """Runs a command that must fail and change nothing in ``folder``; gives its one line."""
    before = contents(folder)
    capsys.readouterr()
    assert run(*words) == 2
    after = contents(folder)
    assert after == before, sorted(map(str, after.keys() ^ before.keys()))
    said = capsys.readouterr().err
    assert said.startswith("medmom: ")
    assert said.count("\n") == 1, said
    assert not [word for word in ("Traceback", "Errno", "Error:", "Error(") if word in said]
    return said


class StopError(Exception):
    """A run that is cut off."""


def check_resume(recipe: Path, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts a run off in its second epoch, resumes it by the command, and demands the straight run to the bit."""
    write, stopped = CurveFile.on_train_epoch_end, straight.with_name("stopped")

    def cut_off(self: CurveFile, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            raise StopError
        write(self, trainer, module)

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(CurveFile, "on_train_epoch_end", cut_off)
        main(["train", str(recipe), "--out", str(stopped), "--device", "cpu", "--quiet"])
    assert not (stopped / "model").exists()
    epochs: list[int] = []

    def watch(self: CurveFile, trainer: Any, module: Any) -> None:
        epochs.append(trainer.current_epoch)
        write(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(CurveFile, "on_train_epoch_end", watch)
        assert run("train", "--resume", stopped) == 0
    assert epochs == [1]
    for file in ("model/model.safetensors", "metrics.csv", "split.json"):
        assert (stopped / file).read_bytes() == (straight / file).read_bytes(), file


def save_model(folder: Path, *, classes: bool = False, edges: int = 2, colour: str = "grey", **changes: Any) -> Path:
    """Writes a package of an untrained network of a few thousand weights: of two classes, or of ``LABELS``."""
    sizes: dict[str, Any] = {"channels": (4, 6), "blocks": (1, 2)}
    sizes |= {"kernels": [[3] * edges] * 2, "strides": [[1] * edges, [2] * edges]}
    in_channels = 3 if colour == "rgb" else 1
    kind = MomentumResNet if classes else MomentumUNet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind(in_channels, 2 if classes else 3, **sizes)
    table = {"classes": Classes(("rows", "columns"))} if classes else {"labels": Labels(tuple(LABELS), (0, 3, 9))}
    preparation = Preparation(None, "zscore" if edges == 3 else "unit", colour=colour)  # type: ignore[arg-type]
    options = {"preparation": preparation, "patch": (16,) * edges, "channels": ("grey",) * in_channels, **table}
    save_package(folder, network.eval(), **{"recipe": {}, **options, **changes})
    return folder
