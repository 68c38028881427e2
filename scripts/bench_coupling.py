"""Momentum off, normalised and the papers' coupling side by side on the hippocampus, at equal steps and seeds.

    python scripts/bench_coupling.py FOLDER OUT [--seeds 0 1 2] [--steps 600]

Trains every setting with every seed on fold 0, segments the fold, scores the written files and writes OUT/coupling.md.
What is there already is not trained again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ARMS = {
    "off (gate 0)": ("normalised", 0.0),
    "normalised, gate 0.9": ("normalised", 0.9),
    "normalised, gate 1": ("normalised", 1.0),
    "ema, gate 0.9": ("ema", 0.9),
}
"""Coupling and gate of each row."""


def main() -> None:
    """Trains what is missing and writes the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="labelled hippocampus crops")
    parser.add_argument("out", type=Path, help="folder for the runs and the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each run")
    parser.add_argument("--preset", default="mom3d_xs")
    arguments = parser.parse_args()
    scores = {
        arm: [train_and_score(arguments, coupling, gate, seed) for seed in arguments.seeds]
        for arm, (coupling, gate) in ARMS.items()
    }
    table = as_table(scores)
    (arguments.out / "coupling.md").write_text(table, encoding="utf-8")
    print(table)


def train_and_score(arguments: argparse.Namespace, coupling: str, gate: float, seed: int) -> dict[str, float]:
    """Dice of one run on the fold it did not see, and its loss in the last quarter."""
    run = arguments.out / f"{coupling}-{gate:g}-seed{seed}"
    scores = run / "validation" / "scores.json"
    if not scores.is_file():
        options = {
            "--data.folder": arguments.folder, "--data.cache": arguments.out / "cache", "--out": run,
            "--model.preset": arguments.preset, "--model.coupling": coupling, "--model.gate": gate,
            "--training.seed": seed, "--training.epochs": 4, "--training.steps_per_epoch": arguments.steps // 4,
            "--training.validate_every": 4,
        }  # fmt: skip
        medmom("train", "hippocampus", *(str(word) for pair in options.items() for word in pair), "--quiet")
        medmom("predict", str(run), "--fold", "validation", "--out", str(run / "validation"), "--quiet")
        medmom("evaluate", str(run / "validation"))
    content = json.loads(scores.read_text(encoding="utf-8"))
    dice = {f"Dice {name}": row["dice"]["mean"] for name, row in content["classes"].items()}
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        *_, last = csv.DictReader(file)
    return {**dice, "Dice mean": content["mean"]["dice"]["mean"], "training loss": float(last["train_loss"])}


def medmom(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "medmom", *words], check=True)


def as_table(scores: dict[str, list[dict[str, float]]]) -> str:
    """Mean and standard deviation over seeds, a row for each setting."""
    names = list(next(iter(scores.values()))[0])
    lines = ["| momentum | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for arm, rows in scores.items():
        cells = []
        for name in names:
            values = [row[name] for row in rows]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
