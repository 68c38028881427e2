"""The command, as two processes: each case once, and what a killed process leaves is done by a second start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from tiny import save_image, save_tiny

pytestmark = pytest.mark.slow

NAMES, DAMAGED = [f"case_{number}" for number in range(8)], "case_5"


class Scene:
    """A model, eight scans of which one is damaged, and what one process makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inputs = folder, folder / "in"
        self.model = save_tiny(folder / "model")
        for number, name in enumerate(NAMES):
            save_image(self.inputs / f"{name}.nii.gz", (40, 36, 30), affine=np.eye(4), seed=number)
        (self.inputs / f"{DAMAGED}.nii.gz").write_bytes(b"no scan")
        self.alone = folder / "alone"
        assert subprocess.run([sys.executable, *self.words(self.alone)], **self.place(), check=False).returncode == 2

    def words(self, out: Path, *options: str) -> list[str]:
        command = ["-m", "medmom", "predict", str(self.model), str(self.inputs), "--out", str(out)]
        return [*command, "--device", "cpu", "--quiet", *options]

    def place(self, **environment: str) -> dict[str, Any]:
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        return {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}}

    def start(self, rank: int, out: Path) -> subprocess.Popen[bytes]:
        """One process as torchrun starts it, but with nobody who watches over it."""
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        launcher = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29401"}
        command = [sys.executable, *self.words(out, "--skip-existing")]
        return subprocess.Popen(command, **self.place(**numbers, **launcher))

    def check(self, out: Path) -> None:
        """Demands what one process makes, voxel for voxel, and one list of it."""
        expected = sorted(path.name for path in self.alone.glob("*.nii.gz"))
        assert sorted(path.name for path in out.glob("*.nii.gz")) == expected
        assert len(expected) == len(NAMES) - 1
        for name in expected:
            ours, theirs = (np.asarray(nib.load(folder / name).dataobj) for folder in (out, self.alone))
            np.testing.assert_array_equal(ours, theirs)
        assert [case["name"] for case in listed(out)] == NAMES
        failed = [case for case in listed(out) if case["error"]]
        assert [case["name"] for case in failed] == [DAMAGED]
        assert "not reached" not in failed[0]["error"]
        assert list(read(out / "statistics.json")) == [name for name in NAMES if name != DAMAGED]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def listed(out: Path) -> list[dict[str, Any]]:
    return list(read(out / "cases.json")["cases"])


def shares(out: Path) -> list[list[str]]:
    return [[case["name"] for case in read(out / f"run-{rank}.json")["cases"]] for rank in range(2)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("ranks"))


def test_torchrun_gives_each_case_to_one_process(scene: Scene, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run([*launcher, *scene.words(tmp_path / "out")], **scene.place(), timeout=500, check=False)
    assert ended.returncode != 0, "the damaged case is told"
    scene.check(tmp_path / "out")
    first, second = shares(tmp_path / "out")
    assert sorted(first + second) == NAMES
    assert first and second


def test_cases_of_a_killed_process_are_done_by_a_second_start(scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    survivor, victim = (scene.start(rank, out) for rank in range(2))
    deadline = time.monotonic() + 300
    while not (out / "run-1.json").exists():
        assert time.monotonic() < deadline and victim.poll() is None, "the second process did not begin"
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    survivor.wait(timeout=300)
    own = shares(out)[0]
    assert own, "the survivor went on"
    for case in listed(out):
        if case["name"] in own and case["name"] != DAMAGED:
            assert case["prediction"] == f"{case['name']}.nii.gz"
        elif case["prediction"] is None and case["name"] != DAMAGED:
            assert case["error"].endswith("not reached. Run again with --skip-existing.")
    again = [scene.start(rank, out) for rank in range(2)]
    codes = [process.wait(timeout=300) for process in again]
    assert max(codes) == 2, "the last one tells of the damaged case, for both"
    scene.check(out)
    skipped = [case["name"] for rank in range(2) for case in read(out / f"run-{rank}.json")["cases"] if case["skipped"]]
    assert set(own) - {DAMAGED} <= set(skipped), "nothing is done twice"
