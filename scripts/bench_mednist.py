"""Classification of MedNIST pictures three times: six classes, CT against MRI, and labels that were shuffled.

    python scripts/bench_mednist.py FOLDER                      # 15, 5 and 5 minutes on two CPU cores
    python scripts/bench_mednist.py FOLDER --minutes 2 1 1      # a quick look

FOLDER holds a folder a class. Neighbours in the numbering are often slices of one scan, so that the numbering of each
class is cut into 20 blocks, and blocks take the place of patients: in the split and in the intervals. Each time the
road is the same: train a fold, predict its validation images, evaluate the written table. Shuffled labels, blocks left
as they are, tell whether anything leaks: what is learnt from them must score at chance.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BLOCKS = 20
MODALITIES = {"AbdomenCT": "CT", "ChestCT": "CT", "HeadCT": "CT", "BreastMRI": "MRI"}
CAVEAT = "The only MRI is of the breast: the network may tell the part of the body rather than the modality."

Row = tuple[Path, str, str]
"""Picture, class, block."""


def listed(folder: Path) -> list[Row]:
    """Pictures of a folder with their class and block."""
    rows = []
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        pictures = sorted(kind.iterdir())
        rows += [(path, kind.name, f"{kind.name}-{k * BLOCKS // len(pictures)}") for k, path in enumerate(pictures)]
    return rows


def by_modality(rows: Sequence[Row]) -> list[Row]:
    """CT and MRI alone, and named so."""
    return [(path, MODALITIES[name], block) for path, name, block in rows if name in MODALITIES]


def shuffled(rows: Sequence[Row]) -> list[Row]:
    """The same pictures and blocks with the labels in another order."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [(path, rows[k][1], block) for (path, _, block), k in zip(rows, order, strict=True)]


TASKS: dict[str, tuple[str, Callable[[Sequence[Row]], list[Row]]]] = {
    "classes": ("six classes", list),
    "modality": ("CT (three parts of the body) against MRI", by_modality),
    "shuffled": ("six classes, labels shuffled", shuffled),
}


def run(task: str, rows: Sequence[Row], out: Path, minutes: float) -> dict[str, Any]:
    """Trains, predicts and evaluates; gives the scores."""
    table = out / f"{task}.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "patient"])
        writer.writerows((str(path.resolve()), name, block) for path, name, block in rows)
    folder = out / task
    time = ["--training.max_minutes", str(minutes), "--data.blocks", "null"]
    medmom("train", "modality", "--data.folder", table, "--data.cache", out / "cache", "--out", folder, *time)
    medmom("predict", folder, "--fold", "validation", "--out", folder / "validation.csv", "--explain")
    medmom("evaluate", folder / "validation.csv")
    medmom("report", folder, "--out", folder / "report.html")
    scores: dict[str, Any] = json.loads((folder / "validation_scores.json").read_text(encoding="utf-8"))
    return scores


def medmom(*arguments: object) -> None:
    """Runs a command of medmom."""
    subprocess.run([sys.executable, "-m", "medmom", *map(str, arguments)], check=True)


def line(title: str, minutes: float, scores: dict[str, Any]) -> str:
    """A row of the table."""
    found = [spelt(scores["summary"][name]) for name in ("accuracy", "balanced_accuracy", "auroc")]
    before, after = (scores["reliability"][when]["ece"] for when in ("before", "after"))
    chance = f"{1 / len(scores['classes']):.3f}"
    cells = [title, f"{minutes:g}", str(scores["num_cases"]), *found, chance, f"{before:.3f}", f"{after:.3f}"]
    return f"| {' | '.join(cells)} |"


def spelt(score: dict[str, float]) -> str:
    """A score with its interval."""
    return f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the three and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="MedNIST: a folder a class")
    parser.add_argument("--minutes", type=float, nargs=3, default=[15.0, 5.0, 5.0], help="of each training")
    parser.add_argument("--out", type=Path, default=Path("runs/mednist"), help="a new folder for the runs")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True)
    rows = listed(options.folder)
    lines = [
        "| task | minutes | validation images | accuracy | balanced accuracy | AUROC | chance | ECE | scaled |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (task, (title, choose)), minutes in zip(TASKS.items(), options.minutes, strict=True):
        lines.append(line(title, minutes, run(task, choose(rows), options.out, minutes)))
    text = "\n".join([*lines, "", CAVEAT, ""])
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
