"""Two calls of predict on one output: one of them works, the other says so, and nothing is mixed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tiny import save_image, save_tiny, tiny_network

from medmom.errors import MedmomError
from medmom.inference import lock
from medmom.inference.lock import CALL_LOCK, call_lock
from medmom.inference.predict import predict

NAMES = [f"case_{number}" for number in range(4)]
REFUSAL = "another medmom predict is writing there. Let it end, or name another output."


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The lock of a call


def test_call_has_the_place_for_itself_until_its_end(tmp_path: Path) -> None:
    with call_lock(tmp_path, "one") as is_first:
        with call_lock(tmp_path, "one") as is_same, call_lock(tmp_path, "two") as is_other:
            assert (is_first, is_same, is_other) == (True, False, False)
        with call_lock(tmp_path, "two", name="of another file") as is_elsewhere:
            assert is_elsewhere
        assert names(tmp_path) == [CALL_LOCK]
    assert names(tmp_path) == []
    with call_lock(tmp_path, "two") as is_later:
        assert is_later


def test_processes_of_one_call_share_the_place(tmp_path: Path) -> None:
    with call_lock(tmp_path, "one", is_shared=True) as is_first:
        with call_lock(tmp_path, "one", is_shared=True) as is_second:
            with call_lock(tmp_path, "two", is_shared=True) as is_stranger, call_lock(tmp_path, "one") as is_alone:
                assert (is_first, is_second, is_stranger, is_alone) == (True, True, False, False)
        # The one that is left still keeps strangers away.
        with call_lock(tmp_path, "two", is_shared=True) as is_stranger:
            assert not is_stranger
    assert names(tmp_path) == []


def test_folder_that_was_made_for_nothing_is_gone(tmp_path: Path) -> None:
    with call_lock(tmp_path / "a" / "b", "one"):
        assert (tmp_path / "a" / "b").is_dir()
    assert names(tmp_path) == []
    with call_lock(tmp_path / "a" / "b", "one"):
        (tmp_path / "a" / "file").touch()
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["file"]


@pytest.mark.parametrize("kind", ["disk", "system"])
def test_nobody_is_kept_away_where_there_are_no_locks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(95, os.strerror(95))

    if kind == "disk":
        monkeypatch.setattr("medmom.inference.lock.fcntl.flock", unsupported)
    else:
        monkeypatch.setattr(lock, "fcntl", None)
    with call_lock(tmp_path, "one") as is_first, call_lock(tmp_path, "two") as is_second:
        assert is_first and is_second
    assert names(tmp_path) == []


def test_lock_of_a_dead_call_keeps_nobody_away(tmp_path: Path) -> None:
    (tmp_path / CALL_LOCK).write_text("one")
    with call_lock(tmp_path, "two") as is_alone:
        assert is_alone
    assert names(tmp_path) == []


@pytest.mark.parametrize("out", ["out", "out.nii.gz"])
def test_second_call_is_told_and_changes_nothing(out: str, tmp_path: Path) -> None:
    model, image = save_tiny(tmp_path / "model", patch=(8, 8, 8)), save_image(tmp_path / "a.nii.gz", (6, 6, 6))
    predict(model, [image], tmp_path / out, quiet=True)
    place = tmp_path / out if (tmp_path / out).is_dir() else tmp_path
    before = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    name = CALL_LOCK if out == "out" else f"{CALL_LOCK}.{hashlib.sha256(out.encode()).hexdigest()[:16]}"
    with call_lock(place, "another", name=name), pytest.raises(MedmomError, match=f"{out}: {REFUSAL}"):
        predict(model, [image], tmp_path / out, quiet=True)
    assert {path: path.read_bytes() for path in place.iterdir() if path.is_file()} == before


# Real calls


class Scene:
    """Two models, some scans, and what each model makes of them alone."""

    def __init__(self, folder: Path) -> None:
        self.inputs = folder / "in"
        self.models = [save_tiny(folder / f"model_{k}", network=tiny_network(seed=5 * k)) for k in range(2)]
        for number, name in enumerate(NAMES):
            save_image(self.inputs / f"{name}.nii.gz", (40, 36, 30), affine=np.eye(4), seed=number)
        self.alone = []
        for k in range(2):
            out = folder / f"alone_{k}"
            assert ended(self.start(k, out)) == (0, "")
            self.alone.append(checksums(out))
        assert not set(self.alone[0].values()) & set(self.alone[1].values())

    def start(self, k: int, out: Path, *options: str, inputs: Path | None = None) -> subprocess.Popen[str]:
        words = ["predict", str(self.models[k]), str(inputs or self.inputs), "--out", str(out), *options]
        command = [sys.executable, "-m", "medmom", *words, "--device", "cpu", "--quiet"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def check(self, k: int, out: Path) -> None:
        """Demands what one model makes of the scans alone, with sidecars and lists of that very run."""
        assert checksums(out) == self.alone[k]
        listed = read(out / "cases.json")
        told = {name: read(out / f"{name}.json") for name in NAMES}
        checksum = read(self.models[k] / "model.json")["sha256"]
        assert listed["model"]["checksum"] == checksum
        assert {about["model"]["checksum"] for about in told.values()} == {checksum}
        assert {name: about["prediction_sha256"] for name, about in told.items()} == self.alone[k]
        assert [case["prediction"] for case in listed["cases"]] == [f"{name}.nii.gz" for name in NAMES]
        assert list(read(out / "statistics.json")) == NAMES
        assert not [name for name in os.listdir(out) if name.startswith(".")]  # noqa: PTH208


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def checksums(out: Path) -> dict[str, str]:
    found = sorted(out.glob("*.nii.gz"))
    return {path.name.removesuffix(".nii.gz"): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits for a process; gives its code and what it complained of."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None, f"{path.name} never came"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("two"))


@pytest.mark.slow
def test_two_calls_at_once_end_with_right_files_or_a_line(scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calls = [scene.start(k, out) for k in range(2)]
    told = [ended(call) for call in calls]
    refused = (2, f"medmom: {out}: {REFUSAL}\n")
    assert sorted(told) in ([(0, ""), (0, "")], [(0, ""), refused])
    # Where one was done before the other began, the files are the later one's.
    last = 0 if told[1] == refused or checksums(out) == scene.alone[0] else 1
    assert told[last] == (0, "")
    scene.check(last, out)


@pytest.mark.slow
def test_call_that_comes_while_another_works_leaves_its_files_alone(scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ended(scene.start(1, out)) == (0, "")
    # The first is stopped as soon as it has the place, so that it surely is at work meanwhile.
    first = scene.start(0, out)
    wait_for(out / CALL_LOCK, first)
    first.send_signal(signal.SIGSTOP)
    assert ended(scene.start(1, out, "--preview")) == (2, f"medmom: {out}: {REFUSAL}\n")
    first.send_signal(signal.SIGCONT)
    assert ended(first) == (0, "")
    scene.check(0, out)


@pytest.mark.slow
def test_two_files_of_one_folder_are_written_at_once(scene: Scene, tmp_path: Path) -> None:
    pair = NAMES[:2]
    calls = [scene.start(0, tmp_path / f"{name}.nii.gz", inputs=scene.inputs / f"{name}.nii.gz") for name in pair]
    assert [ended(call) for call in calls] == [(0, "")] * 2
    assert checksums(tmp_path) == {name: scene.alone[0][name] for name in pair}
    assert names(tmp_path) == sorted(f"{name}{ending}" for name in pair for ending in (".json", ".nii.gz"))


@pytest.mark.slow
def test_killed_call_keeps_nobody_away(scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = scene.start(0, out)
    wait_for(out / CALL_LOCK, first)
    first.kill()
    assert ended(first) == (-signal.SIGKILL, "")
    assert ended(scene.start(1, out)) == (0, "")
    scene.check(1, out)
