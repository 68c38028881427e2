# mypy: disable-error-code="no-untyped-call"
"""Dice against parameters: dense and low-rank networks on the hippocampus, at equal steps and seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from bench_page import Formatter, image_path, page_head, table, write_page
from matplotlib.figure import Figure

from medmom.models.factorise import count_parameters
from medmom.package import load_package

DESCRIPTION = """\
Trains every setting with every seed on fold 0, segments the fold, scores the written files, and writes
OUT/benchmarks/low_rank.md and its picture. What is in RUNS already is not trained again, so a benchmark that was
stopped goes on.

  python scripts/bench_low_rank.py FOLDER --side-by-side 2 --out docs                      # hours on two CPU cores
  python scripts/bench_low_rank.py FOLDER --presets mom3d_s --batch 4 --steps 50000        # a GPU
  python scripts/bench_low_rank.py FOLDER --presets mom3d_xs --seeds 0 --steps 4 --runs runs/quick     # a quick look
"""

WHAT = """\
Hippocampus crops of [hippocampus.md](hippocampus.md), fold 0 of 5: 155 cases to train on, 39 cases of 25 people to
score. Recipe `hippocampus`, {steps} steps of batch {batch}, fp32; a seed decides on weights, patches and augmentation,
the split is the same. Low rank: every convolution that gains by it starts at {share:g} of its full rank, or at what the
row says, which is also the most that it may have; first weights are those of the dense network, cut by SVD. Dice from
the written label maps on each scan's own grid, mean over cases and both classes; mean ± standard deviation over seeds.
Parameters are those of the model package, which holds factors cut to their ranks; beside dense: mean difference to
dense with the same seed."""

HEAVY_BALL = (
    *("--optimizer", "medmom.optim.LowRankHeavyBall", "--optimizer.lr", "0.3", "--optimizer.nesterov", "true"),
    *("--optimizer.weight_decay", "3.0e-5", "--optimizer.tolerance"),
)
"""Its tolerance follows."""
ADAM = (
    *("--optimizer", "medmom.optim.LowRankAdam", "--optimizer.lr", "0.01", "--optimizer.tolerance", "0.1"),
    "--optimizer.local_steps",
)
"""Its local steps follow."""
LEVELS = ("0.1", "0.25", "0.35")
"""Tolerances of truncation."""

WIDE = "0.85"
"""Share of the full rank to start from where the tolerance alone is to decide on the rank."""


class Arm(NamedTuple):
    """A setting: its words on the command line, and how it is drawn."""

    words: tuple[str, ...]
    colour: str
    mark: str


ARMS = {
    "dense, HeavyBall": Arm((), "#222222", "o"),
    "low rank, Adam on the factors": Arm(
        ("--optimizer", "torch.optim.AdamW", "--optimizer.lr", "0.01", "--optimizer.weight_decay", "0"), "#ff7f0e", "s"
    ),
    "low rank, LowRankAdam": Arm((*ADAM, "0"), "#17a2a2", "^"),
    "low rank, LowRankAdam, 10 local steps": Arm((*ADAM, "10"), "#9fdcdc", "^"),
    **{
        f"low rank, LowRankHeavyBall, tolerance {level}": Arm((*HEAVY_BALL, level), colour, "D")
        for level, colour in zip(LEVELS, ("#1f77b4", "#6baed6", "#9ecae1"), strict=True)
    },
    **{
        f"low rank from {WIDE}, LowRankHeavyBall, tolerance {level}": Arm(
            ("--model.low_rank", WIDE, *HEAVY_BALL, level), colour, "P"
        )
        for level, colour in zip(("0.2", "0.25", "0.35"), ("#1b7837", "#5aae61", "#a6dba0"), strict=True)
    },
    "low rank, LowRankHeavyBall, 10 local steps": Arm(
        (*HEAVY_BALL, LEVELS[0], "--optimizer.local_steps", "10"), "#d62728", "D"
    ),
}
"""Settings by name; the dense one is the recipe as it is."""

DENSE = next(iter(ARMS))


class Result(NamedTuple):
    """Dice of a run by class and on the mean, and the parameters of its package."""

    dice: Mapping[str, float]
    parameters: int


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing and writes the page."""
    parser = ArgumentParser(description=DESCRIPTION, formatter_class=Formatter)
    parser.add_argument("folder", type=Path, help="labelled hippocampus crops")
    parser.add_argument("--runs", type=Path, default=Path("runs/low_rank"), help="folder of the runs")
    parser.add_argument("--presets", nargs="+", default=["mom3d_xs", "mom3d_xw"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each run, in four epochs")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--share", type=float, default=0.45, help="of the full rank, unless a setting has its own; 0.45: half"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--side-by-side", type=int, default=1, help="runs at a time, each with its part of the cores")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="gets benchmarks/*.md and images/*.png")
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words)
    wanted = [(preset, seed, arm) for arm, preset, seed in product(ARMS, options.presets, options.seeds)]
    with ThreadPoolExecutor(options.side_by_side) as pool:
        results = dict(zip(wanted, pool.map(lambda key: train_and_score(options, *key), wanted), strict=True))
    plot(results, options, image_path(options.out, "low_rank"))
    print(write_page(options.out, "low_rank", page(results, options, words)))


def train_and_score(options: Namespace, preset: str, seed: int, arm: str) -> Result:
    """What became of one run on the fold that it did not see."""
    name = "".join(letter if letter.isalnum() else "-" for letter in arm.lower())
    run = options.runs / f"{preset}-{name}-seed{seed}"
    scores = run / "validation" / "scores.json"
    if not scores.is_file():
        low_rank = () if arm == DENSE else ("--model.low_rank", options.share)
        training = {"epochs": 4, "steps_per_epoch": options.steps // 4, "validate_every": 4, "seed": seed}
        data = {"folder": options.folder, "cache": options.runs / "cache", "batch_size": options.batch}
        keys = {
            f"--{part}.{key}": value
            for part, of in (("training", training), ("data", data))
            for key, value in of.items()
        }
        medmom(
            options,
            *("train", "hippocampus", "--out", run, "--device", options.device, "--quiet", "--model.preset", preset),
            *(word for pair in keys.items() for word in pair),
            *low_rank,
            *ARMS[arm].words,
        )
        medmom(options, "predict", run, "--fold", "validation", "--out", run / "validation", "--quiet")
        medmom(options, "evaluate", run / "validation")
    content = json.loads(scores.read_text(encoding="utf-8"))
    dice = {of: row["dice"]["mean"] for of, row in content["classes"].items()}
    count = count_parameters(load_package(run).network)
    result = Result({**dice, "mean": content["mean"]["dice"]["mean"]}, count)
    print(f"{preset}, seed {seed}, {arm}: Dice {result.dice['mean']:.4f}, {count} parameters", flush=True)
    return result


def medmom(options: Namespace, *words: object) -> None:
    """Runs a command of medmom, with its part of the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // options.side_by_side))
    subprocess.run(
        [sys.executable, "-m", "medmom", *map(str, words)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        stdout=subprocess.DEVNULL,
    )


def page(results: Mapping[tuple[str, int, str], Result], options: Namespace, words: Sequence[str]) -> list[str]:
    """The parts of the page."""
    head = Namespace(device=torch.device("cpu"), amp="off")
    places = {str(options.folder): "FOLDER", str(options.runs): "RUNS"}
    shown = [places.get(word, word) for word in words]
    parts = [
        page_head("Low rank: Dice against parameters", "bench_low_rank.py", shown, head, ["monai"]),
        WHAT.format(steps=options.steps, batch=options.batch, share=options.share),
        "![Dice against parameters](../images/low_rank.png)",
    ]
    for preset in options.presets:
        rows = [_row(results, options, preset, arm) for arm in ARMS]
        names = list(next(iter(results.values())).dice)
        columns = ["setting", "parameters", "of dense", *(f"Dice {name}" for name in names), "beside dense"]
        parts += [f"## {preset}", table(columns, rows)]
    return parts


def _row(results: Mapping[tuple[str, int, str], Result], options: Namespace, preset: str, arm: str) -> list[str]:
    found = [results[preset, seed, arm] for seed in options.seeds]
    dense = [results[preset, seed, DENSE] for seed in options.seeds]
    count = mean(of.parameters for of in found)
    dice = [_spread([of.dice[name] for of in found]) for name in found[0].dice]
    beside = mean(a.dice["mean"] - b.dice["mean"] for a, b in zip(found, dense, strict=True))
    share = count / dense[0].parameters
    return [arm, f"{count:,.0f}".replace(",", " "), f"{share:.0%}", *dice, "" if arm == DENSE else f"{beside:+.3f}"]


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def plot(results: Mapping[tuple[str, int, str], Result], options: Namespace, path: Path) -> None:
    """A panel a network: mean Dice against the share of the dense parameters, every seed a point."""
    figure = Figure(figsize=(6.5 * len(options.presets), 5), layout="constrained")
    drawn: dict[str, Any] = {}
    axes = figure.subplots(1, len(options.presets), squeeze=False, sharey=True)[0]
    for axis, preset in zip(axes, options.presets, strict=True):
        dense = results[preset, options.seeds[0], DENSE].parameters
        for arm, (_, colour, mark) in ARMS.items():
            found = [results[preset, seed, arm] for seed in options.seeds]
            x, y = [of.parameters / dense for of in found], [of.dice["mean"] for of in found]
            axis.plot(x, y, mark, color=colour, alpha=0.35, markersize=6)
            (drawn[arm],) = axis.plot(mean(x), mean(y), mark, color=colour, markersize=11)
        level = mean(results[preset, seed, DENSE].dice["mean"] for seed in options.seeds)
        axis.axhspan(level - 0.01, level + 0.01, color="#222222", alpha=0.08)
        axis.set(title=f"{preset}, {dense / 1e6:.2f} M parameters dense", xlabel="parameters, share of dense")
        axis.set_xlim(0, 1.05)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("Dice on unseen cases")
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=3, fontsize=10)
    figure.suptitle("Large marks: means over seeds; grey: within one Dice point of dense", fontsize=11)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
