# mypy: disable-error-code="no-untyped-call"
"""Deep networks in little memory, on a GPU: peak, time, largest patch, equal bits; `--help` says how."""

import gc
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from bench_measure import MIB, Trial, Use, memory_use
from bench_networks import Row, bit_rows
from bench_page import image_path, make_parser, page_head, ready, reason, table, write_page
from bench_plots import plot_bars
from bench_times import interleaved, ratio_of_medians
from tqdm import tqdm

DESCRIPTION = """\
What depth costs with and without reversible stages. Each row is PRESET:MEMORY:GATE; the first is what the others are
compared with. By default mom3d_m without momentum (the plain residual encoder M), with it, and mom3d_deep. Measured are

  peak     most bytes held during a step, beside weights and image: activations, gradients, workspaces
  kept     bytes held between the forward and the backward pass
  time     forward and backward, in interleaved rounds
  largest  largest cubic patch with which one step fits, by bisection over the multiples that the network takes
  bits     whether the blocks see the very same inputs on the way back, exact and (for contrast) reversible, with
           every setting of cuDNN

On a CPU memory is that of all storages that operations made and that are alive, and a patch fits when weights, image
and that peak stay below --limit; this proves the script, not the networks.

  python scripts/bench_deep.py                                                   # a GPU, minutes
  python scripts/bench_deep.py --limit 24                                        # as if the card had 24 GiB
  python scripts/bench_deep.py --device cpu --amp off --rows mom3d_xs:plain:0 mom3d_xs:hybrid:0.9 --patch 16 \\
      --rounds 3 --largest 48 --limit 0.05 --exact-preset mom3d_xs --exact-patch 16
"""

WHAT = """\
Patch {patch}^3, batch {batch}, {limit}; forward and backward, no optimizer. Kept and peak: bytes beside weights and
image, between the two passes and at most, gradients counted. Times are medians of {rounds} interleaved rounds, ratios
have a 95 % bootstrap interval. Largest patch: the largest with which one such step fits."""

BITS = """\
Inputs of the momentum blocks of {preset}, {patch}^3, on the way forth and computed again on the way back."""

ROWS = (
    Row("mom3d_m", "plain", 0.0),
    Row("mom3d_m", "plain", 0.9),
    Row("mom3d_m", "hybrid", 0.9),
    Row("mom3d_deep", "plain", 0.9),
    Row("mom3d_deep", "hybrid", 0.9),
)


class Result(NamedTuple):
    """Of one row; what did not run has a reason instead."""

    num_parameters: int
    use: Use | None = None
    times: list[float] | None = None
    largest: str = ""
    reason: str = ""


def measure(rows: Sequence[Row], options: Namespace) -> dict[Row, Result]:
    """Memory and time of all rows, all networks alive, then the largest patch of each alone."""
    results: dict[Row, Result] = {}
    trials: dict[str, Trial] = {}
    trial: Trial | None = None
    for row in tqdm(rows, desc="memory", disable=None, leave=False):
        results[row] = Result(sum(parameter.numel() for parameter in row.network().parameters()))
        try:
            trial = row.trial(options.patch, options)
            trial.step()
            results[row] = results[row]._replace(use=memory_use(trial))
            trials[str(row)] = trial
        except (RuntimeError, ValueError) as error:
            results[row] = results[row]._replace(reason=reason(error))
    times = interleaved({name: trial.step for name, trial in trials.items()}, options.rounds, options.device, "time")
    # The search wants the memory for itself.
    trial = None
    trials.clear()
    for row in tqdm(rows, desc="largest patch", disable=None, leave=False):
        text = largest_text(row, options)
        results[row] = results[row]._replace(times=times.get(str(row)), largest=text)
    return results


def largest_text(row: Row, options: Namespace) -> str:
    """Edge of the largest patch that fits, in words; with the reason where it was not memory that ended the search."""
    if not options.largest or (options.device.type == "cpu" and not options.limit):
        return "not searched"
    other: list[str] = []
    step = max(row.network().divisor)
    edge = largest_patch(lambda patch: fits(row, patch, options, other), step, options.largest)
    if not edge:
        return "none" + "".join(f" ({text})" for text in other)
    bound = f" (the largest tried is {options.largest})" if edge + step > options.largest else ""
    return f"{edge}^3" + bound + "".join(f" ({text})" for text in other)


def largest_patch(fits: Callable[[int], bool], step: int, limit: int) -> int:
    """Largest multiple of ``step``, from ``2 step`` to ``limit``, that fits; 0 where none does.

    Args:
        fits: Whether an edge does; if one does, all smaller ones do.
        step: Of which edges are multiples.
        limit: Largest edge tried.
    """
    low, high = 1, limit // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step if low > 1 else 0


def fits(row: Row, patch: int, options: Namespace, other: list[str]) -> bool:
    """Whether a step with this patch fits into memory; a failure that is not of memory is written down, too."""
    _let_go(options)
    try:
        trial = row.trial(patch, options)
        if options.device.type == "cuda":
            trial.step()
            return True
        weights = sum(tensor.nbytes for tensor in trial.outside)
        return bool(memory_use(trial).peak + weights <= options.limit * 2**30)
    except torch.cuda.OutOfMemoryError:
        return False
    except RuntimeError as error:
        # cuDNN has limits of its own, on elements and workspaces, and they end the search as well.
        other.append(f"{patch}^3: {reason(error)}")
        return False
    finally:
        _let_go(options)


def _let_go(options: Namespace) -> None:
    if options.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def table_rows(results: dict[Row, Result]) -> list[list[str]]:
    """Parameters, memory, time and largest patch of each row; ratios are to the first."""
    base = next(iter(results.values()))
    rows = []
    for row, result in results.items():
        cells = [str(row), f"{result.num_parameters:,}".replace(",", " ")]
        if result.use and result.times:
            median = sorted(result.times)[len(result.times) // 2]
            is_base = result is base or not base.times
            ratio = "1" if is_base else str(ratio_of_medians(result.times, base.times or []))
            cells += [f"{result.use.kept / MIB:.1f}", f"{result.use.peak / MIB:.1f}", f"{median:.1f}", ratio]
        else:
            cells += [result.reason, "", "", ""]
        rows.append([*cells, result.largest])
    return rows


def parser() -> ArgumentParser:
    made = make_parser(DESCRIPTION, device="cuda", amp="bf16")
    made.add_argument("--rows", type=Row.parse, nargs="+", default=ROWS, metavar="PRESET:MEMORY:GATE", help="networks")
    made.add_argument("--patch", type=int, default=128, help="voxels along each edge, for memory and time")
    made.add_argument("--batch", type=int, default=1, help="samples a step")
    made.add_argument("--rounds", type=int, default=15, help="timed rounds")
    made.add_argument("--largest", type=int, default=512, help="largest patch edge tried; 0 leaves the search out")
    made.add_argument("--limit", type=float, default=0.0, help="GiB that may be used; 0: the card has its own")
    made.add_argument("--exact-preset", default="mom3d_m", help="network whose bits are compared")
    made.add_argument("--exact-patch", type=int, default=64, help="edge of its image")
    return made


def main(argv: Sequence[str]) -> Path:
    """Measures, writes page and plot, prints the page's path and the tables."""
    options = ready(parser(), argv)
    if options.limit and options.device.type == "cuda":
        total = torch.cuda.get_device_properties(options.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.limit * 2**30 / total), options.device)
    results = measure(options.rows, options)
    sizes = {str(row): (r.use.peak / MIB, r.use.kept / MIB) for row, r in results.items() if r.use}
    plot_bars(sizes, image_path(options.out, "deep"))
    head = ["network", "parameters", "kept, MiB", "peak, MiB", "ms", "ratio of times", "largest patch"]
    tables = [
        table(head, table_rows(results)),
        table(["memory", "cuDNN", "equal block inputs", "largest difference", "raised"], bit_rows(options)),
    ]
    limit = f"at most {options.limit:g} GiB" if options.limit else "all the memory there is"
    parts = [
        page_head("Depth in little memory", "bench_deep.py", argv, options, ()),
        WHAT.format(patch=options.patch, batch=options.batch, limit=limit, rounds=options.rounds),
        tables[0],
        "![Memory of every network](../images/deep.png)",
        "## Bits",
        BITS.format(preset=options.exact_preset, patch=options.exact_patch),
        tables[1],
    ]
    path = write_page(options.out, "deep", parts)
    print(path, *tables, sep="\n")
    return path


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
