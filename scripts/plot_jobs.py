"""The pictures of the README's two jobs, on made-up images from start to end.

    python scripts/plot_jobs.py                     # five minutes on two CPU cores
    python scripts/plot_jobs.py --steps 200 100 --images runs/look

Frames show a fleshy tube with folds, shine and one or two lumps; the lumps are to be found. Slices come from phantoms,
and their class is the organ that fills most of them: lungs, liver or colon. Both go the road that real images go.
What a network reaches here says nothing about patients.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from scipy import ndimage

from medmom.data.files import read_images
from medmom.evaluation.class_pictures import draw_confusion, draw_reliability
from medmom.evaluation.drawing import draw_planes
from medmom.evaluation.overlay import cut_picture
from medmom.labels import Labels
from medmom.phantom import make_phantom
from medmom.recipe_file import recipe_path

FRAMES, UNSEEN, SHOWN, SIZE = 160, 40, 4, (128, 128)
PATIENTS, SLICES = 60, 8
EPOCHS = 10
WIDTH = 1200
"""Pixels of a picture on a page."""
REGIONS = {2: "lungs", 1: "liver", 3: "colon"}
"""Class of a slice by the label that has most of its voxels."""

WINDOW = (-160.0, 240.0)
"""CT numbers that become black and white."""


def medmom(*arguments: object) -> None:
    """Runs a command of medmom."""
    subprocess.run([sys.executable, "-m", "medmom", *map(str, arguments)], check=True)


def frame(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A made-up frame of a colonoscopy, uint8 (rows, columns, 3), and the mask of its lumps, bool."""
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(150, 200)), int(rng.integers(170, 240))
    place = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")).astype(float)
    scale = min(rows, columns)
    waves = _noise(rng, (rows, columns), scale / 6)
    lumen = rng.uniform(0.25, 0.75, 2) * (rows, columns)
    depth = np.hypot(*(place - lumen[:, None, None])) / scale
    folds = np.sin(rng.uniform(14, 22) * (depth + 0.12 * waves) + rng.uniform(0, 6))
    light = np.clip(0.25 + 1.5 * depth, 0, 1) * (0.85 + 0.10 * folds + 0.10 * waves)
    mask = np.zeros((rows, columns), bool)
    red = np.zeros((rows, columns))
    for _ in range(rng.integers(1, 3)):
        near = _lump(rng, place, scale)
        inside = near < 1
        # A dome: bright towards the lamp, darker at its foot.
        light = np.where(inside, 0.60 + 0.38 * np.sqrt(np.clip(1 - near, 0, 1)) + 0.06 * waves, light)
        light = np.where((near >= 1) & (near < 1.25), 0.8 * light, light)
        red, mask = np.where(inside, rng.uniform(0.02, 0.10), red), mask | inside
    colour = np.stack([0.95 - 0.3 * red, 0.52 - red + 0.03 * waves, 0.42 - red], axis=-1) * light[..., None]
    shine = ndimage.gaussian_filter((rng.random((rows, columns)) < 4e-4).astype(float), 1.5) * 14
    colour += np.clip(shine, 0, 1)[..., None] * 0.7
    middle = np.array([(rows - 1) / 2, (columns - 1) / 2])[:, None, None]
    seen = np.hypot(*((place - middle) / middle)) < 1.25
    colour = (colour + rng.normal(0, 0.02, colour.shape)) * seen[..., None]
    return (np.clip(colour, 0, 1) * 255).astype(np.uint8), mask & seen


def _lump(rng: np.random.Generator, place: np.ndarray, scale: float) -> np.ndarray:
    """Squared distance from a lump's centre; 1 at its wavy edge."""
    centre = rng.uniform(0.25, 0.75, 2)[:, None, None] * np.array(place.shape[1:])[:, None, None]
    turn = rng.uniform(0, np.pi)
    across, up = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    edge = rng.uniform(0.08, 0.22, 2) * scale
    offset = place - centre
    found = sum((np.tensordot(axis, offset, 1) / e) ** 2 for axis, e in zip((across, up), edge, strict=True))
    return np.asarray(found * (1 + 0.25 * _noise(rng, place.shape[1:], scale / 10)))


def _noise(rng: np.random.Generator, shape: Sequence[int], width: float) -> np.ndarray:
    smooth = ndimage.gaussian_filter(rng.normal(size=tuple(shape)), width)
    return np.asarray(smooth / smooth.std())


def write_frames(folder: Path, seeds: Sequence[int]) -> None:
    """Writes frames and masks, as Kvasir-SEG lays them out."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for seed in seeds:
        picture, mask = frame(seed)
        Image.fromarray(picture).save(folder / "images" / f"frame_{seed:03d}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"frame_{seed:03d}.png")


def write_slices(folder: Path) -> Path:
    """Writes axial slices of phantoms and the table of their classes; gives the table."""
    folder.mkdir(parents=True)
    lines = [("image", "label", "patient")]
    for patient in range(PATIENTS):
        rng = np.random.default_rng([patient, 3])
        image, label, _ = make_phantom(patient, shape=(77, 65, 77), spacing=(5.0, 5.0, 5.0))
        counts = np.stack([(label == value).sum(axis=(0, 1)) for value in REGIONS])
        for height in np.sort(rng.choice(np.flatnonzero(counts.max(axis=0) > 40), SLICES, replace=False)):
            name = f"patient_{patient:02d}_{height:02d}.png"
            grey = (image[..., height] - WINDOW[0]) / (WINDOW[1] - WINDOW[0])
            Image.fromarray((np.clip(grey, 0, 1).T[::-1] * 255).astype(np.uint8)).save(folder / name)
            region = list(REGIONS.values())[int(counts[:, height].argmax())]
            lines.append((str((folder / name).resolve()), region, f"patient_{patient:02d}"))
    with (folder / "slices.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
    return folder / "slices.csv"


def small_recipe(path: Path) -> Path:
    """Writes the recipe ``polyps`` for the CPU: smaller frames and a smaller network."""
    recipe = yaml.safe_load(recipe_path("polyps").read_text(encoding="utf-8"))
    recipe["data"]["patch"] = recipe["preparation"]["size"] = list(SIZE)
    recipe["model"]["preset"] = "mom2d_xs"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def settings(work: Path, steps: int) -> list[object]:
    """What is changed in a recipe for a short training."""
    length = ["--training.epochs", EPOCHS, "--training.steps_per_epoch", steps // EPOCHS, "--training.warmup_steps", 20]
    return [*length, "--training.validate_every", 1, "--data.cache", work / "cache"]


def pictures(work: Path, images: Path, steps: int) -> None:
    """Trains on frames; draws what the network is fed and what it says of frames that it never saw."""
    write_frames(work / "frames", range(FRAMES))
    write_frames(work / "unseen", range(FRAMES, FRAMES + UNSEEN))
    recipe = small_recipe(work / "polyps.yaml")
    medmom("inspect", work / "frames", "--augment", recipe, "--out", images / "augment.png")
    _small(images / "augment.png")
    medmom("train", recipe, "--data.folder", work / "frames", "--out", work / "polyps", *settings(work, steps))
    medmom("predict", work / "polyps", work / "unseen" / "images", "--out", work / "found")
    medmom("evaluate", work / "found", work / "unseen" / "masks")
    planes = []
    for number in range(FRAMES, FRAMES + SHOWN):
        name = f"frame_{number:03d}.png"
        image = read_images([work / "unseen" / "images" / name]).array
        found, wanted = (
            np.asarray(Image.open(path / name)).T[..., None] > 0 for path in (work / "found", work / "unseen" / "masks")
        )
        planes.append(cut_picture(image, found.astype(np.uint8), wanted.astype(np.uint8)))
    (images / "pictures.png").write_bytes(draw_planes(planes, Labels(("background", "lump"), (0, 1))))
    _small(images / "pictures.png")


def classes(work: Path, images: Path, steps: int) -> None:
    """Trains on slices; draws the scores of the patients that it never saw, and where it looked."""
    table = write_slices(work / "slices")
    blocks = ["--data.blocks", "null"]
    medmom("train", "modality", "--data.folder", table, "--out", work / "regions", *settings(work, steps), *blocks)
    answers = work / "regions" / "validation.csv"
    medmom("predict", work / "regions", "--fold", "validation", "--out", answers, "--explain")
    medmom("evaluate", answers)
    medmom("report", work / "regions", "--out", work / "regions" / "report.html")
    scores = json.loads((work / "regions" / "validation_scores.json").read_text(encoding="utf-8"))
    drawn = (
        draw_confusion(scores, "light"),
        draw_reliability(scores["reliability"], "light", is_multilabel=False),
    )
    _side_by_side([_opened(data) for data in drawn], images / "classes.png")
    heat = {case["reference"][0]: case["name"] for case in scores["cases"] if case["right"]}
    shown = [Image.open(work / "regions" / "validation_explain" / f"{heat[name]}.png") for name in REGIONS.values()]
    _side_by_side([picture.convert("RGB") for picture in shown], images / "explain.png")


def _small(path: Path) -> None:
    """Rewrites a picture at the width at which a page shows it, in 256 colours."""
    picture = Image.open(path).convert("RGB")
    size = (WIDTH, picture.height * WIDTH // picture.width)
    picture.resize(size, Image.Resampling.LANCZOS).quantize(256).save(path, optimize=True)


def _opened(data: bytes) -> Image.Image:
    """A drawing on white paper."""
    drawing = Image.open(BytesIO(data)).convert("RGBA")
    paper = Image.new("RGBA", drawing.size, "white")
    return Image.alpha_composite(paper, drawing).convert("RGB")


def _side_by_side(shown: Sequence[Image.Image], path: Path) -> None:
    height = min(picture.height for picture in shown)
    scaled = [
        picture.resize((picture.width * height // picture.height, height), Image.Resampling.LANCZOS)
        for picture in shown
    ]
    sheet = Image.new("RGB", (sum(picture.width for picture in scaled), height), "white")
    left = 0
    for picture in scaled:
        sheet.paste(picture, (left, 0))
        left += picture.width
    sheet.save(path)
    _small(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Goes both roads and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=[800, 400], help="of the two trainings")
    parser.add_argument("--work", type=Path, default=Path("runs/jobs"), help="a new folder for the runs")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="where the pictures go")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True)
    options.images.mkdir(parents=True, exist_ok=True)
    pictures(options.work, options.images, options.steps[0])
    classes(options.work, options.images, options.steps[1])


if __name__ == "__main__":
    main()
