"""A road from scan to label map in a process of its own, and what the process tells."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_predict_scene import Size

GIB = 2**30
OVERLAP = 0.5
"""Share of a window that the next one covers again."""


@dataclass
class Result:
    """What a process told.

    Attributes:
        label: The label map; None where there is none.
        fault: Why there is none.
        seconds: After imports.
        parts: Seconds by part.
        imports_mib: Resident after imports.
        peak_mib: Most that was resident.
        vram_mib: Most on the GPU; None without one.
    """

    label: Path | None
    fault: str = ""
    seconds: float = math.nan
    parts: dict[str, float] = field(default_factory=dict)
    imports_mib: float = math.nan
    peak_mib: float = math.nan
    vram_mib: float | None = None

    @property
    def outside(self) -> float:
        """Share of the time that is not the network's."""
        return 1 - self.parts.get("network", math.nan) / self.seconds


def run_road(
    road: str, model: Path, image: Path, out: Path, *, device: torch.device, words: Sequence[str] = ()
) -> Result:
    """Runs a road in a process of its own.

    Args:
        road: Key of ``ROADS`` in bench_predict_run.py.
        model: Package.
        image: Scan.
        out: Folder that is made for the label map.
        device: That the network runs on.
        words: More options of ``medmom predict``.
    """
    out.mkdir(parents=True, exist_ok=True)
    job = {"model": str(model), "image": str(image), "out": str(out / image.name), "overlap": OVERLAP}
    path = out / "job.json"
    path.write_text(json.dumps({**job, "device": str(device), "options": list(words)}), encoding="utf-8")
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("bench_predict_run.py")), road, str(path)],
        env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("medmom:")] or done.stderr.splitlines()
        return Result(None, lines[-1] if lines else f"ended with code {done.returncode}")
    told = json.loads(path.with_suffix(".result").read_text(encoding="utf-8"))
    return Result(out / image.name, **told)


def monai_need(size: Size, num_classes: int) -> int:
    """Bytes that MONAI's road holds at once when it restores: the sum of what cannot be let go.

    Logits on the working grid and on the scan's own, both float32; the affine grid of the resampling, four float32 a
    voxel, and the three that are taken of it; the scan twice.
    """
    own = math.prod(size.shape)
    working = math.prod(round(n * mm / size.working) for n, mm in zip(size.shape, size.spacing, strict=True))
    return 4 * (num_classes * (own + working) + (4 + 3) * own + own + working)
