"""Predict on a whole scan keeps its memory bounded, and keeps nothing from case to case."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from medmom.data.preparation import Preparation
from medmom.labels import Labels
from medmom.models import MomentumUNet
from medmom.package import save_package

sys.path.insert(0, str(ROOT / "scripts"))
scene = import_module("bench_predict_scene")
# Not on the path for the other tests.
sys.path.pop(0)

pytestmark = pytest.mark.slow

MIB = 2**20
SHAPE, SPACING, EDGE, WINDOW, CLASSES = (256, 256, 400), (0.77, 0.77, 1.0), 3.0, 32, 25
OWN = math.prod(SHAPE)
WORKING = [round(n * mm / EDGE) for n, mm in zip(SHAPE, SPACING, strict=True)]

# Of this process alone: what a child's resource usage tells may be its parent's.
CHILD = """
import importlib, json, sys
from pathlib import Path
from medmom.cli import main
importlib.import_module("medmom.inference.predict")
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
before = status("VmRSS")
try:
    main(sys.argv[2:])
except SystemExit as end:
    Path(sys.argv[1]).write_text(json.dumps([end.code, before, status("VmHWM")]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MomentumUNet(
            1, CLASSES, channels=(4, 6), blocks=(1, 3), kernels=[[3] * 3] * 2, strides=[[1] * 3, [2] * 3]
        )
    folder = tmp_path_factory.mktemp("memory") / "model"
    save_package(
        folder,
        network,
        labels=Labels(tuple(f"class_{k}" for k in range(CLASSES)), tuple(range(CLASSES))),
        preparation=Preparation((EDGE,) * 3, "ct", (-200.0, 1400.0), 400.0, 400.0),
        patch=(WINDOW,) * 3,
        channels=("CT",),
        recipe={},
    )
    return folder


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    body = scene.make_body([n * mm for n, mm in zip(SHAPE, SPACING, strict=True)], CLASSES - 1)
    scene.write_phantom(path, body, SHAPE, SPACING)
    return path


def run(folder: Path, *words: str | Path) -> tuple[int, int]:
    """Resident bytes of a predict after its imports, and its peak."""
    told = folder / "told.json"
    command = [sys.executable, "-c", CHILD, str(told), "predict", *map(str, words), "--device", "cpu", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    code, before, peak = json.loads(told.read_text())
    assert code == 0, done.stderr
    return before, peak


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc on this system")
def test_memory_holds_no_logits_of_the_whole_scan(model: Path, scan: Path, tmp_path: Path) -> None:
    before, peak = run(tmp_path, model, scan, "--out", tmp_path / "out.nii.gz")
    row = CLASSES * WORKING[0] * WORKING[1] * WINDOW
    # Stored integers once and a copy while they are decompressed, the label map and its statistics, the working
    # image, a row of windows of float32 sums with their neighbours, one window's activations.
    bound = before + OWN * (2 * 2 + 2 * 1) + 3 * 4 * math.prod(WORKING) + 2 * 4 * row + 128 * MIB
    assert peak <= bound, f"{(peak - before) / MIB:.0f} MiB over imports, {(bound - before) / MIB:.0f} allowed"
    assert bound - before < CLASSES * OWN * 4 / 5, "the bound would not see the logits of the whole scan"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc on this system")
def test_budget_is_kept(model: Path, scan: Path, tmp_path: Path) -> None:
    _, peak = run(tmp_path, model, scan, "--out", tmp_path / "out.nii.gz", "--max-ram", "1GiB")
    assert peak <= 2**30, f"{peak / MIB:.0f} MiB"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc on this system")
def test_memory_does_not_grow_from_case_to_case(model: Path, scan: Path, tmp_path: Path) -> None:
    cases = [tmp_path / f"case_{number}.nii.gz" for number in range(6)]
    for case in cases:
        shutil.copyfile(scan, case)
    # Two, so that reading, computing and writing overlap in both calls.
    _, of_two = run(tmp_path, model, *cases[:2], "--out", tmp_path / "two")
    _, of_six = run(tmp_path, model, *cases, "--out", tmp_path / "six")
    assert of_six <= of_two + 1.5 * OWN * 2 + 32 * MIB, f"{of_two / MIB:.0f}, then {of_six / MIB:.0f} MiB"
    peaks = [json.loads((tmp_path / "six" / f"{case.name[:6]}.json").read_text())["peak_ram_mib"] for case in cases]
    assert peaks[-1] <= peaks[2] + 32, peaks
