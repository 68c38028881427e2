"""What one process or several tell of a run, also when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from rank_worker import begin, segment, work, write_images

from medmom.errors import MedmomError
from medmom.inference import lock, run_log
from medmom.inference.inputs import find_inputs
from medmom.inference.lock import LOCK, folder_lock
from medmom.inference.ranks import Ranks, deal

WORKER = ROOT / "tests" / "rank_worker.py"


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "START_S", 0.0)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def listed(out: Path) -> dict[str, str | None]:
    """Label map or error by case."""
    return {case["name"]: case["prediction"] or case["error"] for case in read(out / "cases.json")["cases"]}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(("a", "b", "c.", "d")))


# One process


def test_run_alone_lists_its_cases_and_collects_statistics(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", "a", "b", "d"), tmp_path / "out"
    (inputs / "b.nii.gz").write_bytes(b"")
    gathered = work(inputs, out, Ranks())
    assert gathered.has_failed and gathered.has_all
    assert "b.nii.gz: the file is empty" in gathered.failed[0]
    assert listed(out) == {"a": "a.nii.gz", "b": gathered.failed[0], "d": "d.nii.gz"}
    assert names(out) == ["cases.json", "run.json", "statistics.csv", "statistics.json"]
    assert list(read(out / "statistics.json")) == ["a", "d"]
    told = read(out / "run.json")
    assert told["started"] <= told["ended"]
    assert told["totals"] == {
        "cases": 3,
        "predicted": 2,
        "skipped": 0,
        "failed": 1,
        "seconds": pytest.approx(0.5, abs=0.4),
    }
    assert told["cases"][1]["inputs"][0]["sha256"].startswith("e3b0c442"), "the checksum of nothing"
    assert told["model"] == {"network": "Threshold", "checksum": "abc"}


def test_second_run_skips_what_is_done(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", "a", "b"), tmp_path / "out"
    work(inputs, out, Ranks())
    before = {name: (out / name).stat().st_mtime_ns for name in ("a.nii.gz", "b.nii.gz")}
    write_images(inputs, "b", "x")
    gathered = work(inputs, out, Ranks())
    assert not gathered.has_failed
    assert (out / "a.nii.gz").stat().st_mtime_ns == before["a.nii.gz"]
    assert (out / "b.nii.gz").stat().st_mtime_ns != before["b.nii.gz"]
    told = {case["name"]: case for case in read(out / "run.json")["cases"]}
    assert [told[name]["skipped"] for name in "abx"] == [True, False, False]
    assert told["a"]["inputs"][0]["path"].endswith("a.nii.gz")


def test_errors_and_cases_of_an_earlier_call_are_dropped(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", "a", "b", "d"), tmp_path / "out"
    (inputs / "b.nii.gz").write_bytes(b"")
    work(inputs, out, Ranks())
    write_images(inputs, "a", "b")
    (inputs / "d.nii.gz").unlink()
    work(inputs, out, Ranks())
    assert listed(out) == {"a": "a.nii.gz", "b": "b.nii.gz"}
    assert list(read(out / "statistics.json")) == ["a", "b"]


def test_run_that_is_cut_short_lists_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, out = write_images(tmp_path / "in", "a", "b"), tmp_path / "out"
    add = run_log.RunLog.add

    def stop(self: run_log.RunLog, *arguments: Any, **options: Any) -> None:
        add(self, *arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_log.RunLog, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        work(inputs, out, Ranks())
    assert listed(out) == {"a": "a.nii.gz", "b": f"{inputs / 'b.nii.gz'}: not reached. Run again with --skip-existing."}
    assert read(out / "run.json")["ended"] is None


def test_process_alone_that_did_nothing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("before the first case")

    monkeypatch.setattr("rank_worker.deal", fail)
    with pytest.raises(RuntimeError):
        work(write_images(tmp_path / "in", "a"), tmp_path / "out", Ranks())
    assert not (tmp_path / "out").exists()


# Several processes


def test_last_process_lists_the_cases_of_all(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", *"abde"), tmp_path / "out"
    (inputs / "b.nii.gz").write_bytes(b"")
    first, last = (work(inputs, out, Ranks(rank, rank, 2)) for rank in range(2))
    assert not first.has_all and not last.absent
    assert last.has_all and last.has_failed
    assert [value for value in listed(out).values() if value and value.endswith(".nii.gz")] == [
        "a.nii.gz",
        "d.nii.gz",
        "e.nii.gz",
    ]
    assert names(out) == [
        "cases.json",
        "e.json",
        "e.nii.gz",
        "run-0.json",
        "run-1.json",
        "statistics.csv",
        "statistics.json",
    ]
    assert list(read(out / "statistics.json")) == ["a", "d", "e"]
    shares = [[case["name"] for case in read(out / f"run-{rank}.json")["cases"]] for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == ["a", "b", "d", "e"]


def test_failure_is_told_by_the_last_process_alone(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", "a", "b"), tmp_path / "out"
    for name in "ab":
        (inputs / f"{name}.nii.gz").write_bytes(b"")
    begin(inputs, out, Ranks(1, 1, 2))
    first = work(inputs, out, Ranks(0, 0, 2))
    assert first.failed and not first.has_all and not first.absent
    assert not first.has_failed, "torchrun would stop the other"
    assert work(inputs, out, Ranks(1, 1, 2)).has_failed


def test_process_that_never_began_is_named(tmp_path: Path) -> None:
    gathered = work(write_images(tmp_path / "in", "a", "b"), tmp_path / "out", Ranks(0, 0, 3))
    assert gathered.absent == (1, 2)
    assert gathered.has_failed


def test_process_that_begins_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "START_S", 20.0)
    inputs, out = write_images(tmp_path / "in", "a", "b"), tmp_path / "out"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(work, inputs, out, Ranks(0, 0, 2))
        time.sleep(0.5)
        assert not first.done()
        begin(inputs, out, Ranks(1, 1, 2))
        assert first.result(timeout=10).absent == ()


def test_work_of_a_dead_process_counts_and_the_rest_is_not_reached(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", *"abdef"), tmp_path / "out"
    log = begin(inputs, out, Ranks(1, 1, 2))
    mine = deal(log.cases, Ranks(1, 1, 2))
    done, lost = log.cases[mine[0]], log.cases[mine[1]]
    segment(done, log.outputs.predictions[mine[0]], log.about, ())
    gathered = work(inputs, out, Ranks(0, 0, 2))
    assert not gathered.has_all and not gathered.absent
    found = listed(out)
    assert found[done.name] == f"{done.name}.nii.gz"
    assert found[lost.name] == f"{lost.images[0]}: not reached. Run again with --skip-existing."
    assert done.name in read(out / "statistics.json")
    again = work(inputs, out, Ranks())
    assert not again.has_failed
    assert set(listed(out).values()) == {f"{name}.nii.gz" for name in "abdef"}
    told = {case["name"]: case["skipped"] for case in read(out / "run.json")["cases"]}
    assert [name for name in told if not told[name]] == [log.cases[index].name for index in mine[1:]]


def test_stale_prediction_of_a_dead_process_does_not_count(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", "a", "b"), tmp_path / "out"
    work(inputs, out, Ranks())
    later = time.time() + 5
    for name in "ab":
        os.utime(inputs / f"{name}.nii.gz", (later, later))
    work(inputs, out, Ranks(0, 0, 2), skip=False)
    assert (
        sum(str(found).endswith("not reached. Run again with --skip-existing.") for found in listed(out).values()) == 1
    )


def test_lists_of_another_number_of_processes_are_taken_away(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", "a", "b"), tmp_path / "out"
    for rank in range(3):
        work(inputs, out, Ranks(rank, rank, 3))
    (out / "run-9.json").write_text('{"of": "somebody else"}')
    for rank in range(2):
        work(inputs, out, Ranks(rank, rank, 2))
    assert sorted(path.name for path in out.glob("run*")) == ["run-0.json", "run-1.json", "run-9.json"]
    work(inputs, out, Ranks())
    assert sorted(path.name for path in out.glob("run*")) == ["run-9.json", "run.json"]


def test_errors_of_another_start_are_not_taken_over(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", "a", "b"), tmp_path / "out"
    (inputs / "b.nii.gz").write_bytes(b"")
    for rank in range(2):
        work(inputs, out, Ranks(rank, rank, 2, "first"))
    assert work(inputs, out, Ranks(0, 0, 2, "second")).absent == (1,)
    assert [case["name"] for case in read(out / "run-0.json")["cases"]] == ["a"]
    assert str(listed(out)["b"]).endswith("not reached. Run again with --skip-existing.")


@pytest.mark.parametrize("content", ["{", "[]", '{"call": 1, "settings": {}, "cases": [{}]}'])
def test_damaged_list_of_another_process_is_passed_over(content: str, tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", "a", "b"), tmp_path / "out"
    out.mkdir()
    (out / "run-1.json").write_text(content)
    assert work(inputs, out, Ranks(0, 0, 2)).absent == (1,)


@pytest.mark.slow
def test_two_processes_of_torchrun_share_the_cases(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", *"abdef"), tmp_path / "out"
    (inputs / "b.nii.gz").write_bytes(b"")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [*launcher, str(WORKER), str(inputs), str(out)], cwd=ROOT, env=paths(), timeout=300, check=False
    )
    assert ended.returncode != 0, "the last process tells of the damaged case"
    assert [name for name, found in listed(out).items() if found == f"{name}.nii.gz"] == list("adef")
    assert "the file is empty" in str(listed(out)["b"])
    counts = [len(read(out / f"run-{rank}.json")["cases"]) for rank in range(2)]
    assert sum(counts) == 5 and min(counts) >= 1


@pytest.mark.slow
def test_killed_process_holds_up_nobody(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", *"abdefgh"), tmp_path / "out"
    processes = [start(rank, inputs, out, seconds) for rank, seconds in ((0, 0.2), (1, 30.0))]
    wait_for(out / "run-1.json")
    processes[1].kill()
    assert processes[0].wait(timeout=200) == 0
    lost = [name for name, found in listed(out).items() if found != f"{name}.nii.gz"]
    assert lost == [find_inputs([inputs], 1)[index].name for index in deal(find_inputs([inputs], 1), Ranks(1, 1, 2))]
    processes[1].wait()
    again = [start(rank, inputs, out, 0.0) for rank in range(2)]
    assert [process.wait(timeout=200) for process in again] == [0, 0]
    assert all(found == f"{name}.nii.gz" for name, found in listed(out).items())


def paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}


def start(rank: int, inputs: Path, out: Path, seconds: float) -> subprocess.Popen[bytes]:
    """One process as torchrun starts it, but with nobody who watches over it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "x", "MASTER_PORT": 29400}
    environment = {**paths(), "MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
    return subprocess.Popen([sys.executable, WORKER, inputs, out, str(seconds)], cwd=ROOT, env=environment)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_statistics_of_another_form_are_named(tmp_path: Path) -> None:
    inputs, out = write_images(tmp_path / "in", "a", "b"), tmp_path / "out"
    work(inputs, out, Ranks())
    told = read(out / "a.json")
    (out / "a.json").write_text(json.dumps({**told, "statistics": {"head": {"volume": 1}}}))
    with pytest.raises(MedmomError, match=r"out: statistics in a sidecar .*Run again without --skip-existing"):
        work(inputs, out, Ranks())


# The lock


@pytest.mark.parametrize("kind", ["flock", "no flock on this disk", "no flock on this system"])
def test_one_at_a_time_holds_the_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind.endswith("system"):
        monkeypatch.setattr(lock, "fcntl", None)
    if kind.endswith("disk"):
        monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    inside, most = [], []

    def enter(number: int) -> None:
        with folder_lock(tmp_path) as is_held:
            assert is_held
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(8)))
    assert most == [1] * 8
    assert list(tmp_path.iterdir()) == []


def unsupported(*arguments: object) -> None:
    raise OSError(95, "Operation not supported")


def test_lock_of_a_file_that_is_gone_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, taken = lock.fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        if not taken:
            # The holder before us took the file away while we waited.
            (tmp_path / LOCK).unlink()
        taken.append(descriptor)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with folder_lock(tmp_path) as is_held:
        assert is_held and len(taken) == 2
        assert (tmp_path / LOCK).exists()


def test_lock_of_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with folder_lock(tmp_path, patience_s=1.0) as is_held:
        assert is_held


def test_waiting_ends_where_the_holder_never_lets_go(tmp_path: Path) -> None:
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with folder_lock(tmp_path):
            held.set()
            go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with folder_lock(tmp_path, patience_s=0.2) as is_held:
        assert not is_held
    go.set()
    thread.join()


def test_lock_file_grows_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    left = tmp_path / f"{LOCK}.held"
    left.touch()
    with folder_lock(tmp_path, patience_s=0.2) as is_held:
        assert not is_held
    os.utime(left, (time.time() - 60, time.time() - 60))
    with folder_lock(tmp_path, patience_s=1.0) as is_held:
        assert is_held
