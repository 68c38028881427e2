"""Predict that is killed at any moment leaves whole files alone, and a second start does the rest."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from tiny import save_image, save_tiny

from medmom.data.preparation import Preparation

CASES, DAMAGED = 20, "case_07"
SHAPE = (48, 44, 40)
READERS = {
    ".nii.gz": lambda path: np.asarray(nib.load(path).dataobj).sum(),
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".csv": lambda path: path.read_text(encoding="utf-8"),
}


class Watcher(threading.Thread):
    """Lists a folder all the time and reads whatever is visible in it, whole.

    Attributes:
        faults: What could not be read, or had a name that no reader knows.
        reads: How many files were read.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.faults, self.reads = folder, list[str](), 0
        self._seen: dict[str, tuple[int, int]] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self.join()
        self.look()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self.look()

    def look(self) -> None:
        if not self.folder.is_dir():
            return
        for entry in list(os.scandir(self.folder)):
            if not entry.name.startswith("."):
                self.read(Path(entry.path))

    def read(self, path: Path) -> None:
        try:
            stat = path.stat()
            if self._seen.get(path.name) == (stat.st_ino, stat.st_mtime_ns):
                return
            reader = next((reader for ending, reader in READERS.items() if path.name.endswith(ending)), None)
            if reader is None:
                raise ValueError("a file of an unknown kind")
            reader(path)
            self.reads += 1
            self._seen[path.name] = (stat.st_ino, stat.st_mtime_ns)
        except FileNotFoundError:
            return  # replaced meanwhile; the next look sees the new one
        except Exception as error:
            self.faults.append(f"{path.name}: {error!r}")


class Scene:
    """A model, twenty scans of which one is damaged, and the command that segments them."""

    def __init__(self, folder: Path) -> None:
        self.inputs = folder / "in"
        # Windows enough for a second or so a case: a kill must find the work half done.
        self.model = save_tiny(folder / "model", preparation=Preparation((1.0, 1.0, 1.0), "zscore"))
        for number in range(CASES):
            save_image(self.inputs / f"case_{number:02d}.nii.gz", SHAPE, affine=np.eye(4), seed=number)
        damaged = self.inputs / f"{DAMAGED}.nii.gz"
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])

    def start(self, out: Path, *options: str) -> subprocess.Popen[str]:
        words = ["predict", str(self.model), str(self.inputs), "--out", str(out), "--device", "cpu", "--quiet"]
        command = [sys.executable, "-m", "medmom", *words, *options]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def undisturbed(scene: Scene) -> dict[str, np.ndarray]:
    out = scene.inputs.parent / "undisturbed"
    _, errors = (process := scene.start(out)).communicate(timeout=300)
    assert process.returncode == 2, errors
    return label_maps(out)


def label_maps(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nib.load(path).dataobj) for path in folder.glob("*.nii.gz")}


def kill_after(process: subprocess.Popen[str], out: Path, count: int, delay: float) -> None:
    """Waits for so many label maps and a moment more; then SIGKILL, which nothing can catch."""
    deadline = time.monotonic() + 200
    while len(list(out.glob("*.nii.gz"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    assert process.poll() is None, "nothing was left to be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_predict_is_finished_by_the_same_command(
    scene: Scene, undisturbed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    moments = random.Random(6)
    done_before: dict[str, int] = {}
    with Watcher(out) as watcher:
        for count in (1, 3, 6, 10, 14):
            kill_after(scene.start(out, "--skip-existing"), out, count, moments.uniform(0, 0.5))
            check_untouched(out, done_before)
            done_before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
        last = scene.start(out, "--skip-existing")
        _, errors = last.communicate(timeout=300)
    assert watcher.faults == []
    assert watcher.reads > 2 * CASES - 2
    assert last.returncode == 2
    named = errors.strip().splitlines()
    assert len(named) == 1, errors
    assert named[0].startswith(f"medmom: {scene.inputs / DAMAGED}.nii.gz: ")
    check_untouched(out, done_before)
    check_label_maps(out, undisturbed)
    check_lists(out)


def check_untouched(out: Path, done_before: dict[str, int]) -> None:
    """What an earlier start finished was skipped; the newest may have lacked its record when the kill came."""
    changed = [name for name, moment in done_before.items() if (out / name).stat().st_mtime_ns != moment]
    assert len(changed) <= 1


def check_label_maps(out: Path, undisturbed: dict[str, np.ndarray]) -> None:
    found = label_maps(out)
    assert len(undisturbed) == CASES - 1
    assert sorted(found) == sorted(undisturbed)
    for name, label in undisturbed.items():
        assert len(np.unique(label)) > 1, "an empty label map says little"
        np.testing.assert_array_equal(found[name], label)


def check_lists(out: Path) -> None:
    names = [f"case_{number:02d}" for number in range(CASES)]
    cases = {entry["name"]: entry for entry in read(out / "cases.json")["cases"]}
    assert sorted(cases) == names
    assert [name for name in names if cases[name]["error"]] == [DAMAGED]
    assert all((out / cases[name]["prediction"]).is_file() for name in names if name != DAMAGED)
    manifest = {entry["name"]: entry for entry in read(out / "run.json")["cases"]}
    assert sorted(manifest) == names
    assert [name for name in names if manifest[name]["error"]] == [DAMAGED]
    assert sum(bool(entry["skipped"]) for entry in manifest.values()) >= 13
    for name in set(names) - {DAMAGED}:
        assert read(out / f"{name}.json")["prediction_sha256"]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_watcher_sees_a_partial_file(tmp_path: Path) -> None:
    whole = save_image(tmp_path / "whole.nii.gz").read_bytes()
    with Watcher(tmp_path / "out") as watcher:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a.nii.gz").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "out" / "a.json").write_text('{"a": 1')
        (tmp_path / "out" / "a.part").write_text("")
        (tmp_path / "out" / ".b.part").write_text("")
        time.sleep(0.1)
    assert {fault.split(":")[0] for fault in watcher.faults} == {"a.nii.gz", "a.json", "a.part"}
