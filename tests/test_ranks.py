"""How processes share the cases."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from medmom.data.casefiles import CaseFiles
from medmom.errors import MedmomError
from medmom.inference.ranks import Ranks, deal, device_of, find_ranks, stopped_in_order

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT", "MASTER_ADDR")
SLURM = ("NTASKS", "NTASKS_PER_NODE", "PROCID", "LOCALID", "JOB_ID", "JOB_NAME")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHERS, *(f"SLURM_{name}" for name in SLURM)):
        monkeypatch.delenv(name, raising=False)


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def cases_of(folder: Path, *sizes: int) -> list[CaseFiles]:
    cases = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.nii"
        path.write_bytes(bytes(size))
        cases.append(CaseFiles(path.stem, (path,), None, path.stem))
    return cases


def dealt(cases: list[CaseFiles], world_size: int) -> list[list[int]]:
    return [deal(cases, Ranks(rank, rank, world_size)) for rank in range(world_size)]


def test_process_without_a_launcher_is_alone() -> None:
    assert find_ranks() == Ranks(0, 0, 1, "")


def test_torchrun_tells_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    environment(monkeypatch, **place, MASTER_PORT="29511", MASTER_ADDR="127.0.0.1")
    assert find_ranks() == Ranks(3, 1, 4, "29511")


def test_srun_tells_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, SLURM_NTASKS="4", SLURM_NTASKS_PER_NODE="2", SLURM_PROCID="3", SLURM_LOCALID="1")
    environment(monkeypatch, SLURM_JOB_ID="77", SLURM_JOB_NAME="predict")
    assert find_ranks() == Ranks(3, 1, 4, "77")


def test_interactive_slurm_shell_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_ID="77")
    for name in ("bash", "interactive"):
        monkeypatch.setenv("SLURM_JOB_NAME", name)
        assert find_ranks() == Ranks(0, 0, 1, "")
    monkeypatch.setenv("SLURM_JOB_NAME", "wrap")
    assert find_ranks().world_size == 1


def test_machine_with_srun_gives_no_warning_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert find_ranks() == Ranks()


@pytest.mark.parametrize("missing", ["SLURM_NTASKS_PER_NODE", "SLURM_PROCID"])
def test_launcher_that_leaves_something_out_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_PROCID="0", SLURM_LOCALID="0")
    monkeypatch.delenv(missing)
    with pytest.raises(MedmomError, match="srun --ntasks-per-node N"):
        find_ranks()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [(5, 5, 5, 5, 5), (0, 0, 0, 0), (9, 1, 1, 1, 3, 3), ()])
def test_each_case_goes_to_exactly_one_process(sizes: tuple[int, ...], world_size: int, tmp_path: Path) -> None:
    shares = dealt(cases_of(tmp_path, *sizes), world_size)
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)


def test_bytes_are_shared_evenly(tmp_path: Path) -> None:
    sizes = (100, 10, 90, 20, 80, 30)
    shares = dealt(cases_of(tmp_path, *sizes), 3)
    assert sorted(sum(sizes[index] for index in share) for share in shares) == [110, 110, 110]


def test_empty_files_are_shared_by_number(tmp_path: Path) -> None:
    assert dealt(cases_of(tmp_path, 0, 0, 0, 0), 2) == [[0, 2], [1, 3]]


def test_cases_are_dealt_in_turn_where_a_size_is_not_known(tmp_path: Path) -> None:
    cases = cases_of(tmp_path, 1000, 1, 1, 1)
    cases[2].images[0].unlink()
    assert dealt(cases, 2) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("name", "count", "ranks", "expected"),
    [
        ("auto", 4, Ranks(6, 2, 8), "cuda:2"),
        ("cuda", 4, Ranks(6, 2, 8), "cuda:2"),
        ("auto", 2, Ranks(3, 3, 4), "cuda:1"),
        ("auto", 4, Ranks(), "auto"),
        ("auto", 1, Ranks(1, 1, 2), "auto"),
        ("auto", 0, Ranks(1, 1, 2), "auto"),
        ("cuda:3", 4, Ranks(1, 1, 2), "cuda:3"),
        ("cpu", 4, Ranks(1, 1, 2), "cpu"),
    ],
)
def test_processes_of_one_machine_share_its_gpus(
    name: str, count: int, ranks: Ranks, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert device_of(name, ranks) == expected


def test_termination_ends_in_order_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended = []
    with pytest.raises(KeyboardInterrupt), stopped_in_order():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            # A second one comes while the first is dealt with.
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append("in order")
    assert ended == ["in order"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_thread_that_takes_no_signals_goes_on() -> None:
    done = []

    def work() -> None:
        with stopped_in_order():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
