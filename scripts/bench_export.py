# mypy: disable-error-code="no-untyped-call"
"""From given logits to a label map on the scan's own grid, side by side; `--help` says what is measured and how."""

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from bench_export_ways import WAYS, Problem, Way
from bench_page import Formatter, page_head, reason, table, write_page
from scipy.ndimage import find_objects, gaussian_filter
from scipy.spatial import cKDTree

DESCRIPTION = """\
From class logits to a label map on the scan's own grid: seconds, memory, and whether the labels are the same.

Every way has a process of its own. Others find the logits in memory, in the form their own prediction leaves them in;
medmom reads them from the file in slabs, as its prediction hands them on. Extra memory is the rise of the peak (VmHWM)
above what the process held before, the logits that it was given not counted, the label map counted.
A way that would need more than --limit by the formula in the table is not run.

  python scripts/bench_export.py --tall --peer-python peers/bin/python  # many minutes
  python scripts/bench_export.py --small                                # seconds
"""

WHAT = """\
Logits are those of smooth organs: blurred class maps with noise that is small against the margins, float16, on a grid
of 1.5 mm. Extra memory: rise of VmHWM over what the process held before, the given logits not counted, the label map
counted; of medmom the slab of logits too. Equal: share of voxels that have medmom's label. Need: logits and all else,
by the formula below (K classes, w voxels of the grid of logits, o of the own one); above {limit:.0f} GiB a way was
not run. {threads} thread(s)."""

GIB = 2**30
MARGIN, BLUR, NOISE = 14.0, 1.2, 0.3
"""Of the logits: what a sure class is above the others, voxels of its edge, standard deviation."""


Shape = tuple[int, int, int]

SMALL: tuple[Shape, Shape] = (26, 21, 12), (48, 40, 12)
USUAL: tuple[Shape, Shape] = (273, 273, 280), (512, 512, 280)
TALL: tuple[Shape, Shape] = (263, 263, 549), (512, 512, 824)
"""Shapes of the logits and of the scan."""

PACKAGES = ("numpy", "scipy", "monai")
"""Here; the others' versions stand beside their times."""

# Logits


def organ_labels(shape: Sequence[int], num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """A body of organs, ``uint8`` (Z, X, Y): parts of balls, two a class, in background."""
    num_organs = 2 * max(num_classes - 1, 12)
    seeds = rng.uniform(0.1, 0.9, size=(num_organs, 3)) * shape
    radius = rng.uniform(0.35, 0.75, size=num_organs) * (np.prod(shape) / num_organs) ** (1 / 3)
    classes = 1 + np.arange(num_organs) % max(num_classes - 1, 1)
    labels = np.zeros(tuple(shape), dtype=np.uint8)
    tree, grid = cKDTree(seeds), np.indices(tuple(shape[1:]), dtype=np.float32).reshape(2, -1)
    for z, plane in enumerate(labels):
        distance, nearest = tree.query(np.stack([np.full_like(grid[0], z), *grid], axis=1), workers=-1)
        plane.flat = np.where(distance < radius[nearest], classes[nearest], 0)
    return labels


def write_logits(problem: Problem, seed: int) -> float:
    """Writes the logits class by class; gives the share of cells whose corners differ."""
    rng = np.random.default_rng(seed)
    labels = organ_labels(problem.stored[1:], problem.num_classes, rng)
    boxes = find_objects(labels + 1, max_label=problem.num_classes) if problem.num_classes < 256 else []
    with Path(problem.path).open("wb") as stream:
        for k, box in enumerate(boxes):
            values = rng.standard_normal(labels.shape, dtype=np.float32) * np.float32(NOISE)
            if box is not None:
                wide = tuple(slice(max(0, side.start - 6), side.stop + 6) for side in box)
                values[wide] += gaussian_filter((labels[wide] == k).astype(np.float32) * np.float32(MARGIN), BLUR)
            stream.write(values.astype(np.float16).data)
    return mixed_share(labels)


def mixed_share(labels: np.ndarray) -> float:
    """Share of cells within planes (Z, X, Y) whose four corners have several labels."""
    low = labels[:, :-1, :-1]
    differs = [labels[:, 1:, :-1] != low, labels[:, :-1, 1:] != low, labels[:, 1:, 1:] != low]
    return float(np.logical_or.reduce(differs).mean())


# One way, in a process of its own


def peak_bytes(*, reset: bool = False) -> int:
    """Largest resident size of this process, of now where it is reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def run_way(name: str, problem: Problem, label_path: Path) -> dict[str, Any]:
    """Measures one way in this process, and keeps its labels (X, Y, Z), LPS."""
    way = WAYS[name]
    torch.set_num_threads(problem.threads)
    try:
        with torch.inference_mode():
            work = way.start(problem)
            before = peak_bytes(reset=True)
            start = perf_counter()
            labels = work()
            seconds = perf_counter() - start
            extra = peak_bytes() - before
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError, MemoryError) as error:
        return {"failure": reason(error)}
    # The logits are RAS, the scan is LPS.
    turned = labels if way.is_lps else labels.transpose(1, 2, 0)[::-1, ::-1]
    np.save(label_path, np.asfortranarray(turned, dtype=np.uint8))
    return {"seconds": seconds, "extra": extra, "version": version(way.package)}


def measured(name: str, problem: Problem, label_path: Path, python: str) -> dict[str, Any]:
    """The same, in a new process."""
    words = [python, __file__, "--run", name, "--problem", json.dumps(asdict(problem)), "--label", str(label_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(problem.threads)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        trouble = done.stderr.strip().splitlines() or ["nothing said"]
        return {"failure": f"ended with {done.returncode}: {trouble[-1]}"}
    return dict(json.loads(lines[-1]))


def need_of(way: Way, problem: Problem) -> int | None:
    """Bytes that a way needs at least, the logits among them."""
    sizes = problem.num_classes, int(np.prod(problem.working)), int(np.prod(problem.own))
    return None if way.need is None else way.need(*sizes)


def equal_share(first: Path, second: Path) -> float:
    """Share of voxels with one label in two files."""
    ours, theirs = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (first, second))
    return float(np.mean([np.mean(ours[..., z] == theirs[..., z]) for z in range(ours.shape[2])]))


def compare(problem: Problem, options: Namespace, folder: Path) -> list[list[str]]:
    """Rows of the table, medmom's first."""
    rows: list[list[str]] = []
    first: dict[str, Any] = {}
    for name in dict.fromkeys(["medmom", *options.ways]):
        way, path = WAYS[name], folder / f"{name}.npy"
        need = need_of(way, problem)
        known = "bounded" if need is None else f"{need / GIB:.1f} GiB"
        if need is not None and need > options.limit * GIB:
            rows.append([way.title, f"does not fit (needs {known})", "", "", known])
            continue
        result = measured(name, problem, path, sys.executable if name == "medmom" else options.peer_python)
        first = first or result
        rows.append([way.title, *_cells(result, first, path, folder / "medmom.npy"), known])
        print(" | ".join(rows[-1]), file=sys.stderr)
    return rows


def _cells(result: dict[str, Any], first: dict[str, Any], path: Path, ours: Path) -> list[str]:
    if "failure" in result:
        return [str(result["failure"]), "", ""]
    times, memory = f"{result['seconds']:.2f} s", f"{result['extra'] / GIB:.2f} GiB"
    if result is not first and "failure" not in first:
        times += f" ({result['seconds'] / first['seconds']:.1f}x)"
        memory += f" ({result['extra'] / max(first['extra'], 1):.1f}x)"
    equal = f"{equal_share(ours, path):.4%}" if ours.is_file() else ""
    return [f"{times}, version {result['version']}" if result is not first else times, memory, equal]


def problems(options: Namespace) -> list[tuple[int, Shape, Shape]]:
    """Classes, shape of the logits and of the scan, of each section."""
    if options.small:
        return [(num_classes, *SMALL) for num_classes in options.classes or [3]]
    usual = [(num_classes, *USUAL) for num_classes in options.classes or [3, 25, 104]]
    return [*usual, (25, *TALL)] if options.tall else usual


def bench(options: Namespace) -> list[str]:
    """Sections of the page."""
    parts = []
    for num_classes, working, own in problems(options):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            problem = Problem(str(folder / "logits.bin"), num_classes, working, own, 1.5, options.threads)
            mixed = write_logits(problem, options.seed)
            rows = compare(problem, options, folder)
        grids = ["x".join(map(str, shape)) for shape in (working, own)]
        parts.append(f"## {num_classes} classes, {grids[0]} to {grids[1]}")
        parts.append(f"{mixed:.1%} of the cells between four voxels of a plane lie on an edge between classes.")
        parts.append(table(["way", "time", "extra memory", "equal voxels", "need"], rows))
    return parts


def size_gib(text: str) -> float:
    """A number of GiB, such as ``16GiB``."""
    return float(text.removesuffix("GiB"))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison, or in its processes one way."""
    parser = ArgumentParser(description=DESCRIPTION, formatter_class=Formatter)
    parser.add_argument("--classes", type=int, nargs="+", help="numbers of classes (3, 25, 104)")
    parser.add_argument("--tall", action="store_true", help="besides, 25 classes on 512x512x824")
    parser.add_argument("--small", action="store_true", help="a size for tests")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="besides medmom")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the other packages")
    parser.add_argument("--limit", type=size_gib, default="16GiB", help="largest need of a way that is run")
    parser.add_argument("--threads", type=int, default=2, help="of every way")
    parser.add_argument("--seed", type=int, default=0, help="of the logits")
    parser.add_argument("--folder", type=Path, help="for the logits, 5 GiB; the system's temporary one")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="gets benchmarks/export.md; docs fits")
    for hidden in ("--run", "--problem", "--label"):
        parser.add_argument(hidden, help="of a process of its own")
    options = parser.parse_args(argv)
    if options.run:
        problem = Problem(**{key: _tupled(value) for key, value in json.loads(options.problem).items()})
        print(json.dumps(run_way(options.run, problem, Path(options.label))))
        return
    needs = [[way.title, way.formula] for way in WAYS.values() if way.formula]
    what = WHAT.format(limit=options.limit, threads=options.threads)
    options.device, options.amp = torch.device("cpu"), "off"
    head = page_head("Export of logits", "bench_export.py", sys.argv[1:] if argv is None else argv, options, PACKAGES)
    parts = [head, what, *bench(options)]
    parts += ["## What the others need, in bytes", table(["way", "sum"], needs)]
    print("\n\n".join(parts))
    print(write_page(options.out, "export", parts), file=sys.stderr)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
