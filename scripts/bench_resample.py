"""Time, memory and values of bringing a CT to 1.5 mm by cubic splines, beside what others do it with.

    python scripts/bench_resample.py --small        # seconds: shows that it runs
    python scripts/bench_resample.py --out docs

Every competitor runs in a process of its own; those whose package is missing are named as such.
"""

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from medmom.geometry import Geometry, resample

MIB = 2**20

SPACING = (0.8, 0.8, 1.5)
"""Of the scan, in mm."""

SHAPES = {False: (512, 512, 280), True: (64, 60, 40)}
"""Voxels of the scan, by whether it is small."""

DEMANDED = 1e-4
"""Largest difference from nnU-Net's values, as a share of the range."""

PEERS = ("numpy", "scipy", "scikit-image", "nnunetv2", "totalsegmentator")

WHAT = """A phantom CT of {shape} voxels, int16, {spacing} mm, order 3, to {target} voxels of 1.5 mm on a grid of the
same extent, so that values can be compared. Seconds: median of {repeats} runs behind the first, whose rise of resident
memory is the MiB, result included. The difference is the largest from {reference}, as a share of the range of values.
scipy.ndimage.zoom alone leaves the range of the scan."""


class Result(NamedTuple):
    """What a competitor took, and what came out; or why it did not run."""

    seconds: float = float("nan")
    mib: float = float("nan")
    values: np.ndarray | None = None
    reason: str = ""


def grids(shape: Sequence[int]) -> tuple[Geometry, Geometry]:
    """The scan's grid, its axes as CT scanners write them, and that of the result, of the same extent."""
    source = Geometry(tuple(shape), np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0]))
    return source, source.with_shape(source.with_spacing((1.5, 1.5, 1.5)).shape)


def phantom(shape: Sequence[int], seed: int) -> np.ndarray:
    """A body with organs and noise in a round field of view, int16, shape (Z, Y, X): the order in a file."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape[:2]))
    scan = np.full(tuple(shape)[::-1], -1024, dtype=np.int16)
    for index, height in enumerate(np.linspace(0, 6, shape[2], dtype=np.float32)):
        body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
        organ = (x - 0.3 * np.cos(height)) ** 2 + (y - 0.2 * np.sin(2 * height)) ** 2 < 0.04
        plane = np.where(body, 40, -1000) + 110 * organ + rng.normal(0, 20, x.shape)
        scan[index] = np.where(np.square(x) + np.square(y) < 0.97, plane, -1024)
    return scan


def medmom(scan: np.ndarray, target: Sequence[int]) -> np.ndarray:
    """``resample`` on the integers as they lie in the file."""
    source, wanted = grids(scan.shape[::-1])
    return np.asarray(resample(scan.T[None], source, wanted, order=3)[0])


def nnunet(scan: np.ndarray, target: Sequence[int]) -> np.ndarray:
    """What nnU-Net v2 prepares a case with by default, on the float32 array that its reader gives."""
    rule = import_module("nnunetv2.preprocessing.resampling.default_resampling").resample_data_or_seg_to_shape
    spacing = [count * edge / wanted for count, edge, wanted in zip(scan.T.shape, SPACING, target, strict=True)]
    values = rule(scan.astype(np.float32)[None], tuple(target)[::-1], SPACING[::-1], spacing[::-1], order=3)
    return np.asarray(values[0]).T


def skimage(scan: np.ndarray, target: Sequence[int]) -> np.ndarray:
    """The function that nnU-Net calls, as it calls it."""
    resize = import_module("skimage.transform").resize
    return np.asarray(resize(scan.astype(float), tuple(target)[::-1], 3, mode="edge", anti_aliasing=False)).T


def scipy(scan: np.ndarray, target: Sequence[int]) -> np.ndarray:
    """Zooms with the outer edges of voxels aligned."""
    zoom = import_module("scipy.ndimage").zoom
    factors = np.divide(tuple(target)[::-1], scan.shape)
    return np.asarray(zoom(scan, factors, np.float32, order=3, mode="nearest", grid_mode=True)).T


def totalsegmentator(scan: np.ndarray, target: Sequence[int]) -> np.ndarray:
    """Its own function for the CPU, in one process; it lays centres of outer voxels on each other: another grid."""
    rule = import_module("totalsegmentator.resampling").resample_img
    return np.asarray(rule(scan.T.astype(np.float32), np.divide(target, scan.T.shape), order=3, nr_cpus=1))


COMPETITORS: dict[str, Callable[[np.ndarray, Sequence[int]], np.ndarray]] = {
    "medmom": medmom,
    "nnU-Net v2": nnunet,
    "skimage.transform.resize": skimage,
    "scipy.ndimage.zoom": scipy,
    "TotalSegmentator": totalsegmentator,
}
SAME_GRID = ("nnU-Net v2", "skimage.transform.resize", "scipy.ndimage.zoom")
"""Whose values medmom's may be compared with, the wanted first."""


def resident(field: str) -> int:
    """Memory of this process in KiB: VmRSS now, VmHWM the most it ever was; Linux alone."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def compete(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Runs one competitor in this process on ``scan.npy`` of a folder, and leaves ``result.npy`` there."""
    scan = np.load(folder / "scan.npy", allow_pickle=False)
    run, target = COMPETITORS[name], grids(scan.shape[::-1])[1].shape
    try:
        run(scan[:8, :8, :8].copy(), (4, 4, 4))
    except ModuleNotFoundError as error:
        return {"reason": f"not installed ({error.name})"}
    before = resident("VmRSS")
    values = run(scan, target)
    rise = resident("VmHWM") - before
    np.save(folder / "result.npy", values.astype(np.float32))
    del values
    seconds = []
    for _ in range(repeats):
        begin = perf_counter()
        run(scan, target)
        seconds.append(perf_counter() - begin)
    return {"seconds": median(seconds), "mib": rise / 1024}


def measure(name: str, folder: Path, repeats: int) -> Result:
    """Runs one competitor in a process of its own."""
    command = [sys.executable, __file__, "--only", name, "--folder", str(folder), "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Result(reason=(done.stderr.strip().splitlines() or ["no message"])[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    return (
        Result(**found)
        if "reason" in found
        else Result(**found, values=np.load(folder / "result.npy", allow_pickle=False))
    )


def difference(values: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference as a share of the range."""
    return float(np.abs(values - reference).max() / np.ptp(reference))


def rows(results: dict[str, Result], reference: str | None) -> list[list[str]]:
    """A line of the table for each competitor; ``reference`` names whose values the others are held against."""
    found = []
    for name, result in results.items():
        if result.values is None:
            found.append([name, result.reason, "", "", ""])
            continue
        ratio, apart = result.seconds / results["medmom"].seconds, "another grid"
        if reference == name:
            apart = "reference"
        elif reference and name in ("medmom", *SAME_GRID):
            values = results[reference].values
            assert values is not None
            apart = f"{difference(result.values, values):.1e}"
        found.append([name, f"{result.seconds:.3g}", f"{ratio:.3g}", f"{result.mib:.0f}", apart])
    return found


def acceptance(results: dict[str, Result], reference: str | None) -> list[str]:
    """Whether medmom is six times as fast as the reference, with its values."""
    ours = results["medmom"]
    if reference is None or ours.values is None:
        return []
    theirs = results[reference]
    assert theirs.values is not None
    ratio, apart = theirs.seconds / ours.seconds, difference(ours.values, theirs.values)
    return [
        f"Six times as fast as {reference} or more: {'yes' if ratio >= 6 else 'no'} ({ratio:.3g}).",
        f"Values within {DEMANDED:g} of its range: {'yes' if apart <= DEMANDED else 'no'} ({apart:.1e}).",
    ]


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__)
    made.add_argument("--small", action="store_true", help="a scan of few voxels, whose figures say nothing")
    made.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    made.add_argument("--seed", type=int, default=0, help="of the phantom")
    made.add_argument("--out", type=Path, default=Path("runs/bench"), help="gets benchmarks/resample.md; docs fits")
    made.add_argument("--only", choices=list(COMPETITORS), help="run this one here, and print its figures")
    made.add_argument("--folder", type=Path, help="where --only finds scan.npy")
    return made


def main(argv: Sequence[str]) -> Path | None:
    """Measures, writes the page, prints its path and the table."""
    options = parser().parse_args(argv)
    if options.only:
        print(json.dumps(compete(options.only, options.folder, options.repeats)))
        return None
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "scan.npy", phantom(SHAPES[options.small], options.seed))
        results = {name: measure(name, Path(folder), options.repeats) for name in COMPETITORS}
    return _report(results, argv, options)


def _report(results: dict[str, Result], argv: Sequence[str], options: Namespace) -> Path:
    # It imports torch, which would take longer than a small run of a competitor.
    page: Any = import_module("bench_page")
    reference = next((name for name in SAME_GRID if results[name].values is not None), None)
    options.device, options.amp = import_module("torch").device("cpu"), "off"
    shape = SHAPES[options.small]
    words = {"shape": shape, "spacing": SPACING, "target": grids(shape)[1].shape}
    what = WHAT.format(
        **{name: " x ".join(map(str, counts)) for name, counts in words.items()},
        repeats=options.repeats,
        reference=reference,
    )
    text = page.table(["resampling", "s", "of medmom's", "MiB", "difference"], rows(results, reference))
    lines = acceptance(results, reference)
    head = page.page_head("Bringing a CT to 1.5 mm", "bench_resample.py", argv, options, PEERS)
    path: Path = page.write_page(options.out, "resample", [head, what, text, *lines])
    print(path, text, *lines, sep="\n")
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
