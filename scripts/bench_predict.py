# mypy: disable-error-code="no-untyped-call"
"""Predict on whole scans: memory, seconds, and labels beside MONAI's; `--help` says what is measured and how."""

import hashlib
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from bench_page import make_parser, page_head, ready, table, write_page
from bench_predict_process import GIB, OVERLAP, Result, monai_need, run_road
from bench_predict_scene import SIZES, Size, fit_network, make_body, save_model, write_phantom
from bench_predict_slabs import Streamed

DESCRIPTION = """\
Segments made-up CT scans with `medmom predict` and, beside it, with MONAI's transforms, sliding window and inversion,
each in a process of its own, with the same weights and windows.

  tall    one scan of 512 x 512 x 824 voxels, 25 classes, without and with --max-ram 2GiB
  usual   one scan of 512 x 512 x 280 voxels with 3, 25 and 104 classes, beside MONAI
  slabs   whether labels depend on the height of the slabs in which logits are restored, and how many equal those of
          the same logits kept in a file of 16-bit floats and restored class by class

The network is mom3d_xs with random weights, its last convolution fitted in closed form, so that labels are regions.
The scan is an elliptic body with ellipsoids in it, stored RAS (what suits MONAI best: it copies no logits to turn
them). Measured are

  whole     seconds of the process after its imports, and by part as medmom's sidecar tells them
  peak      most memory of the process that was ever resident (VmHWM); extra: without its imports
  equal     share of voxels with one label; the two prepare the scan by cubic and by linear interpolation

MONAI's need is computed first (logits on both grids, the sampling grid, the scan); what needs more than --limit is
not run.

  python scripts/bench_predict.py --case tall
  python scripts/bench_predict.py --case usual --classes 3 25 104
  python scripts/bench_predict.py --check slabs
  python scripts/bench_predict.py --small --case usual          # proves that all of it runs, in seconds
"""

WHAT = """\
Made-up CT scans, int16: an elliptic body with ellipsoids in it. The network is mom3d_xs with random weights, its last
convolution fitted in closed form, so that labels are regions. Each row is a process of its own; seconds and extra RAM
are without its imports, peak RAM is VmHWM. MONAI has the same weights and windows, float32 throughout; it prepares the
scan by linear interpolation, medmom by cubic, which is where labels differ. Seconds of one run on a shared machine
move by some percent."""

HEIGHTS = (1, 7, 16, 48, 200)
"""Planes of the working grid that are restored at once."""


def digest(path: Path) -> str:
    """First figures of the sha256 of a label map's voxels."""
    return hashlib.sha256(np.asfortranarray(nib.load(path).dataobj).tobytes(order="F")).hexdigest()[:12]


def equal_share(first: Path, second: Path) -> float:
    """Share of voxels with one label."""
    return float(np.mean(np.asarray(nib.load(first).dataobj) == np.asarray(nib.load(second).dataobj)))


class Bench:
    """Scans and models in a work folder; what is there already is used again.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.work = options.work / ("small" if options.small else "full")
        self._network: torch.nn.Module | None = None

    def size(self, name: str) -> Size:
        """Of a scan, as the options want it."""
        return SIZES[name].small() if self.options.small else SIZES[name]

    def scan(self, name: str) -> Path:
        """Writes a scan."""
        size, path = self.size(name), self.work / f"{name}.nii.gz"
        millimetres = [n * mm for n, mm in zip(size.shape, size.spacing, strict=True)]
        write_phantom(path, make_body(millimetres, size.organs, seed=3), size.shape, size.spacing, seed=4)
        return path

    def model(self, num_classes: int) -> Path:
        """Writes the package of a network of so many classes; all share their weights but the last rows."""
        size = self.size("usual")
        if self._network is None:
            most = max(size.organs + 1, *self.options.classes)
            self._network = fit_network(most, spacing=size.working, window=min(size.window, 64), seed=self.options.seed)
        folder = self.work / f"model_{num_classes:03d}"
        return save_model(folder, self._network, num_classes, spacing=size.working, window=size.window)

    def tall(self) -> str:
        """Table of the tall scan."""
        num_classes = 5 if self.options.small else 25
        model, image = self.model(num_classes), self.scan("tall")
        rows = []
        for words in ([], ["--max-ram", self.options.max_ram]):
            out = self.work / f"tall{'_bounded' if words else ''}"
            result = run_road("medmom", model, image, out, device=self.options.device, words=words)
            rows.append([" ".join(["medmom predict", *words]), *_figures(result), _parts(result)])
            rows[-1].append(digest(result.label) if result.label else result.fault)
        return "\n\n".join([self._title("tall", num_classes), table([*HEAD, "parts, s", "labels (sha256)"], rows)])

    def usual(self) -> str:
        """Table of the usual scan beside MONAI."""
        image, rows = self.scan("usual"), []
        for num_classes in self.options.classes:
            model = self.model(num_classes)
            ours = run_road("medmom", model, image, self.work / f"medmom_{num_classes}", device=self.options.device)
            theirs = self._theirs(model, image, num_classes)
            for name, result in (("medmom", ours), ("MONAI", theirs)):
                rows.append([f"{name}, {num_classes} classes", *_figures(result), _parts(result)])
                rows[-1].append(result.fault or _compared(ours, theirs) if name == "MONAI" else result.fault or "")
        return "\n\n".join([self._title("usual", None), table([*HEAD, "parts, s", "MONAI beside medmom"], rows)])

    def _theirs(self, model: Path, image: Path, num_classes: int) -> Result:
        need = monai_need(self.size("usual"), num_classes) / GIB
        if need > self.options.limit:
            return Result(None, f"does not fit (needs {need:.1f} GiB)")
        return run_road("monai", model, image, self.work / f"monai_{num_classes}", device=self.options.device)

    def slabs(self) -> str:
        """Tables of what labels depend on."""
        num_classes = 5 if self.options.small else 25
        model, rows = self.model(num_classes), []
        for name in ("tall", "reference"):
            with Streamed(
                model, self.scan(name), self.work / "logits.f32", self.options.device, overlap=OVERLAP
            ) as streamed:
                labels = {height: streamed.label(height) for height in HEIGHTS}
                hashes = {height: hashlib.sha256(label.tobytes()).hexdigest()[:12] for height, label in labels.items()}
                equal = streamed.equal_to_reference(labels[HEIGHTS[0]]) if name == "reference" else math.nan
            rows += [
                [_times(self.size(name).shape), str(height), found, _percent(equal)] for height, found in hashes.items()
            ]
        head = ["scan", "planes at once", "labels (sha256)", "equal to fp16 logits, class by class"]
        return "\n\n".join([f"## Labels and slabs, {num_classes} classes", table(head, rows)])

    def _title(self, name: str, num_classes: int | None) -> str:
        size = self.size(name)
        grid = f"{_times(size.shape)} voxels of {_times(size.spacing)} mm, network on {size.working} mm"
        classes = "" if num_classes is None else f", {num_classes} classes"
        return f"## {name}: {grid}, windows of {size.window}^3, overlap {OVERLAP}{classes}"


HEAD = ["", "whole, s", "outside the network", "peak RAM, GiB", "extra, GiB", "peak VRAM, GiB"]


def _figures(result: Result) -> list[str]:
    if result.label is None:
        return ["-"] * 5
    vram = "-" if not result.vram_mib else f"{result.vram_mib / 1024:.2f}"
    extra = result.peak_mib - result.imports_mib
    return [
        f"{result.seconds:.1f}",
        _percent(result.outside),
        f"{result.peak_mib / 1024:.2f}",
        f"{extra / 1024:.2f}",
        vram,
    ]


def _parts(result: Result) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in result.parts.items()) or "-"


def _compared(ours: Result, theirs: Result) -> str:
    if ours.label is None or theirs.label is None:
        return "-"
    network = ours.parts.get("network", math.nan) / theirs.parts["network"]
    extra = (ours.peak_mib - ours.imports_mib) / (theirs.peak_mib - theirs.imports_mib)
    return (
        f"equal {_percent(equal_share(ours.label, theirs.label))}; medmom takes {network:.2f} of the network's time, "
        f"{ours.seconds / theirs.seconds:.2f} of the whole, {extra:.2f} of the extra RAM"
    )


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.3f} %"


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def parse(argv: Sequence[str] | None) -> Namespace:
    """Options of the command line."""
    parser: ArgumentParser = make_parser(DESCRIPTION, device="cpu", amp="off")
    parser.add_argument("--case", nargs="*", choices=["tall", "usual"], default=[], help="what is segmented")
    parser.add_argument("--check", nargs="*", choices=["slabs"], default=[], help="what is checked")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 25, 104], help="of the usual case")
    parser.add_argument("--max-ram", default="2GiB", help="of the second run of the tall case")
    parser.add_argument("--limit", type=float, default=16.0, help="GiB above which MONAI is not run")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_predict"), help="scans, models, label maps")
    parser.add_argument("--small", action="store_true", help="small scans: proves that everything runs")
    return ready(parser, argv)


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs what was asked for, prints the tables, writes the page and gives its path."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    bench = Bench(options)
    sections: dict[str, Callable[[], str]] = {"tall": bench.tall, "usual": bench.usual, "slabs": bench.slabs}
    wanted: list[Any] = [*options.case, *options.check] or ["tall", "usual", "slabs"]
    head = page_head("Predict on whole scans", "bench_predict.py", argv, options, ("monai", "nibabel", "numpy"))
    parts = [head, WHAT]
    path = options.out
    for name in wanted:
        parts.append(sections[name]())
        print(parts[-1], end="\n\n", flush=True)
        path = write_page(options.out, "predict", parts)
    return Path(path)


if __name__ == "__main__":
    print(main())
