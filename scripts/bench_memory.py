# mypy: disable-error-code="no-untyped-call"
"""Memory and time of a momentum stage against its depth; `--help` says what is measured and how."""

import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_measure import MIB, GradientError, Trial, Use, gradient_error, memory_use
from bench_page import image_path, make_parser, page_head, ready, reason, table, write_page
from bench_plots import Panel, plot_curves
from bench_stages import PEERS, Contender, network_contenders, stage_contenders
from bench_times import Ratio, interleaved, ratio_of_medians
from tqdm import tqdm

DESCRIPTION = """\
Memory and time of a momentum stage, and of a whole network of such stages, against the number of blocks.

For each depth, one stage of residual blocks is run with stored activations (plain), with a checkpoint a block,
reversible and exact, and as other packages would run it: momentumnet, memcnn, revtorch, where they are installed
(pip install --no-deps momentumnet memcnn revtorch). Measured are

  kept    bytes held between the forward and the backward pass, without parameters: on a GPU what its allocator
          holds; on a CPU every storage that an operation made and that is still alive, whoever holds it
  saved   of these, autograd's saved tensors alone: the rest hides in attributes
  peak    most bytes held at any time of the step, gradients included
  time    forward and backward, in interleaved rounds, as a ratio of medians with a bootstrap interval
  error   of the gradients, relative, against ordinary backpropagation of the same function in float64

Shares and ratios are to the same function with stored activations. What cannot run has its reason written down.

  python scripts/bench_memory.py                                        # CPU, minutes
  python scripts/bench_memory.py --depths 2 4 --size 12 --no-network    # a quick look
  python scripts/bench_memory.py --device cuda --amp bf16 --gate 1 --channels 32 --size 128 --network-size 64
"""

WHAT = """\
One step is a forward and a backward pass without an optimizer. Kept: bytes held between the two, parameters apart,
{how}; saved: what autograd alone knows of, where it is less. Share and time: ratios to the same
function with stored activations; times are medians of {rounds} interleaved rounds, with a 95 % bootstrap interval.
Coupled stages (memcnn, revtorch) have two branches on half the channels in place of a block: half the weights, and
another function. momentumnet has its own coupling, with gate 0.9."""

ERRORS = """\
Against ordinary backpropagation of the same function in float64: the norm of all errors over that of all gradients, and
the median over elements. Rounding that flips the sign at a single leaky ReLU moves the first to 1e-3, with stored
activations as well; the second tells it from an error everywhere. Exact rounds its forward pass to 2^-20 (2^-16 under
autocast), and so flips more of them."""


@dataclass
class Result:
    """Of one contender at one depth; ``failure`` says why there is nothing."""

    use: Use | None = None
    error: GradientError | None = None
    times: list[float] = field(default_factory=list)
    time: Ratio | None = None
    share: float | None = None
    failure: str = ""


Results = dict[str, dict[int, Result]]
"""By name of the contender and depth."""


def measure(contenders: Sequence[Contender], source: Any, cotangent: Any, options: Namespace) -> dict[str, Result]:
    """Results of one depth, by name."""
    results: dict[str, Result] = {}
    steps: dict[str, Callable[[], None]] = {}
    for contender in tqdm(contenders, desc="memory", disable=None, leave=False):
        result = results[contender.name] = Result()
        try:
            if source.is_cuda:
                # The first run on a GPU allocates workspaces that stay; they are nobody's activations.
                Trial(contender.build().to(source.device), source, cotangent, options.amp).step()
            trial = Trial(contender.build().to(source.device), source, cotangent, options.amp)
            result.use = memory_use(trial)
            if contender.twin is not None:
                result.error = gradient_error(trial, contender.twin())
            steps[contender.name] = trial.step
        except Exception as error:  # whatever another package raises is a result
            result.use, result.failure = None, reason(error)
    for name, times in interleaved(steps, options.rounds, source.device, "time").items():
        results[name].times = times
    _compare(contenders, results)
    return results


def _compare(contenders: Sequence[Contender], results: Mapping[str, Result]) -> None:
    for contender in contenders:
        result, base = results[contender.name], results[contender.like]
        if result.use and base.use:
            result.share = result.use.kept / base.use.kept
            result.time = Ratio(1, 1, 1) if result is base else ratio_of_medians(result.times, base.times)


def run(kind: str, options: Namespace) -> Results:
    """Results of the stage or of the network at all depths."""
    results: Results = {}
    for depth in options.depths:
        torch.manual_seed(options.seed)
        if kind == "stage":
            contenders = stage_contenders(depth, options.channels, options.gate, options.seed)
            source = torch.randn(options.batch, options.channels, *[options.size] * 3)
            cotangent = torch.randn_like(source)
        else:
            contenders = network_contenders(depth, options.network_channels, options.gate, options.seed)
            source = torch.randn(options.batch, 1, *[options.network_size] * 3)
            cotangent = torch.randn(options.batch, 3, *[options.network_size] * 3)
        print(f"{kind}, {depth} blocks", flush=True)
        here = measure(contenders, source.to(options.device), cotangent.to(options.device), options)
        for name, result in here.items():
            results.setdefault(name, {})[depth] = result
    return results


def pivot(results: Results, depths: Sequence[int], cell: Callable[[Result], str], notes: list[str]) -> str:
    """A table of one quantity, contenders by depths; failures are numbered and their reasons put into the notes."""
    rows = []
    for name, by_depth in results.items():
        row = [name]
        for depth in depths:
            failure = by_depth[depth].failure
            if failure and failure not in notes:
                notes.append(failure)
            row.append(f"none [{notes.index(failure) + 1}]" if failure else cell(by_depth[depth]))
        rows.append(row)
    return table(["", *(f"{depth} blocks" for depth in depths)], rows)


def _kept(result: Result) -> str:
    assert result.use is not None
    saved = "" if result.use.saved == result.use.kept else f", saved {result.use.saved / MIB:.2f}"
    return f"{result.use.kept / MIB:.2f}{saved}"


def _peak(result: Result) -> str:
    return "" if result.use is None else f"{result.use.peak / MIB:.2f}"


def tables(kind: str, results: Results, options: Namespace) -> str:
    """Every quantity of a stage or network, with its notes."""
    cells = {
        "Kept for the backward pass, MiB": _kept,
        "Share of what the same function keeps when it stores": lambda r: (
            "" if r.share is None else f"{100 * r.share:.1f} %"
        ),
        "Most held during a step, MiB": _peak,
        "Time of a step, ratio": lambda r: str(r.time or ""),
        "Median time, ms": lambda r: f"{sorted(r.times)[len(r.times) // 2]:.1f}",
    }
    if kind == "stage":
        cells["Relative error of the gradients"] = lambda r: str(r.error or "")
    notes: list[str] = []
    parts = [f"### {title}\n\n{pivot(results, options.depths, cell, notes)}" for title, cell in cells.items()]
    if kind == "stage":
        parts.append(ERRORS)
    parts += [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    return "\n\n".join(parts)


def acceptance(results: Mapping[int, Result]) -> list[str]:
    """What a reversible stage has to hold, each with yes or no, from its results by depth; and where it did not run."""
    lines = [
        f"Reversible did not run at {depth} blocks: {result.failure}"
        for depth, result in results.items()
        if result.failure
    ]
    kept = {depth: result.use.kept for depth, result in results.items() if result.use}
    if len(kept) > 1:
        first, last = min(kept), max(kept)
        lines.append(
            f"Kept by reversible at {last} blocks equals that at {first}: {_yes(kept[last] == kept[first])} "
            f"({kept[last]} and {kept[first]} bytes)."
        )
    legal = [depth for depth in kept if results[depth].time]
    at = 16 if 16 in legal else max(legal, default=0)
    share, time = (results[at].share, results[at].time) if at else (None, None)
    if share is not None and time is not None:
        lines += [
            f"Kept by reversible at {at} blocks, 15 % of plain or less: {_yes(share <= 0.15)} ({100 * share:.1f} %).",
            f"Time of reversible at {at} blocks, 1.45 of plain or less: {_yes(time.value <= 1.45)} ({time}).",
        ]
    return lines


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def curves(results: Results, value: Callable[[Any], float]) -> dict[str, dict[int, float]]:
    """One number of every result that can be compared."""
    return {
        name: {depth: value(result) for depth, result in by_depth.items() if result.time}
        for name, by_depth in results.items()
    }


def parser() -> ArgumentParser:
    made = make_parser(DESCRIPTION, device="cpu", amp="off")
    made.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="blocks a stage")
    made.add_argument("--gate", type=float, default=0.9, help="of our stages; autocast allows 0.9 up to 19 blocks")
    made.add_argument("--channels", type=int, default=16, help="of the stage, even")
    made.add_argument("--size", type=int, default=24, help="voxels along each edge of the stage's features")
    made.add_argument("--batch", type=int, default=1, help="samples a step")
    made.add_argument("--rounds", type=int, default=7, help="timed rounds a depth")
    made.add_argument("--no-network", action="store_true", help="leave the network out")
    made.add_argument("--network-channels", type=int, nargs="+", default=[16, 32, 64], help="by stage")
    made.add_argument("--network-size", type=int, default=24, help="edge of the image, in voxels")
    return made


def main(argv: Sequence[str]) -> Path:
    """Measures, writes page and plot, prints the page's path and what a stage has to hold."""
    options = ready(parser(), argv)
    # memcnn uses names that torch has since renamed, and says so at every import and step.
    warnings.filterwarnings("ignore", module="memcnn")
    stage = run("stage", options)
    network: Results = {} if options.no_network else run("network", options)
    verdict = acceptance(stage["reversible"])
    panels = [
        Panel("stage: kept for the backward pass, MiB", curves(stage, lambda r: r.use.kept / MIB)),
        Panel("stage: time, ratio to stored", curves(stage, lambda r: r.time.value), is_log=False),
    ]
    if network:
        panels.append(Panel("network: kept for the backward pass, MiB", curves(network, lambda r: r.use.kept / MIB)))
    plot_curves(panels, PEERS, image_path(options.out, "memory"))
    how = "as the allocator counts" if options.device.type == "cuda" else "whoever holds them"
    parts = [
        page_head("Memory and time against depth", "bench_memory.py", argv, options, PEERS),
        WHAT.format(how=how, rounds=options.rounds),
        "![Memory and time against blocks a stage](../images/memory.png)",
        "\n".join(f"- {line}" for line in verdict),
        f"## One stage: {options.channels} channels, {options.size}^3 voxels, batch {options.batch}",
        tables("stage", stage, options),
    ]
    if network:
        channels = ", ".join(str(width) for width in options.network_channels)
        parts += [
            f"## A network: channels {channels}, {options.network_size}^3 voxels",
            "Blocks are the momentum blocks of every stage, behind its entry block. Exact has gate 1.",
            tables("network", network, options),
        ]
    path = write_page(options.out, "memory", parts)
    print(path, *verdict, sep="\n")
    return path


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
