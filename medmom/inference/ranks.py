"""Which part of the work is this process's own, where one command runs as several processes."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from medmom.data.casefiles import CaseFiles
from medmom.errors import MedmomError


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that share the work.

    Attributes:
        rank: Its number, from 0.
        local_rank: Its number on its own machine, from 0.
        world_size: How many processes there are, on all machines.
        job: What the processes of one start have in common, as far as the launcher tells; empty for one alone.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    job: str = ""


def find_ranks() -> Ranks:
    """Asks the launcher: ``torchrun``, SLURM's ``srun``, or MPI where mpi4py is installed.

    Without a launcher, and in an interactive SLURM shell (a job named ``bash`` or ``interactive``), the process is
    alone. Nothing is opened: processes that share the cases do not speak to each other.

    Raises:
        MedmomError: The launcher leaves something out that is needed.
    """
    try:
        with warnings.catch_warnings():
            # A machine that has srun, without it: a process alone is as good.
            warnings.simplefilter("ignore")
            environment = _environment()
            if environment is None:
                return Ranks()
            return Ranks(
                environment.global_rank(), environment.local_rank(), environment.world_size(), _job(environment)
            )
    except (RuntimeError, KeyError, ValueError) as error:
        raise MedmomError(
            f"rank and number of processes cannot be told ({' '.join(str(error).split())}). Start medmom with "
            "torchrun, with srun --ntasks-per-node N, or alone."
        ) from error


def deal(cases: Sequence[CaseFiles], ranks: Ranks) -> list[int]:
    """Gives each case to exactly one process, and each process about as many bytes to read.

    The largest case goes first, each to the process that has least. Where the size of any is not known they are
    dealt in turn. Processes that see the same files come to the same answer without a word between them.

    Args:
        cases: All that was asked for.
        ranks: The place of this process.

    Returns:
        Indices of this process's own cases, ascending; empty where there are fewer cases than processes.
    """
    sizes = [_size(case) for case in cases]
    if any(size is None for size in sizes):
        return list(range(ranks.rank, len(cases), ranks.world_size))
    # The number of cases parts those of equal load, such as empty files.
    loads = [(0, 0)] * ranks.world_size
    mine = []
    for index in sorted(range(len(cases)), key=lambda index: (-(sizes[index] or 0), index)):
        least = min(range(ranks.world_size), key=lambda rank: (*loads[rank], rank))
        loads[least] = (loads[least][0] + (sizes[index] or 0), loads[least][1] + 1)
        if least == ranks.rank:
            mine.append(index)
    return sorted(mine)


def device_of(name: str, ranks: Ranks) -> str:
    """Gives each process of a machine a GPU of its own, as far as there are enough.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        ranks: The place of this process.

    Returns:
        ``cuda:N`` where several processes share several GPUs that ``auto`` or ``cuda`` leaves open, else ``name``.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name not in ("auto", "cuda") or ranks.world_size == 1 or count < 2:
        return name
    return f"cuda:{ranks.local_rank % count}"


@contextmanager
def stopped_in_order() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt meanwhile, so that what is to be done at the end is done.

    Launchers send it to all processes where one fails, and SLURM where the time is up; SIGKILL follows later.
    Outside the main thread, where Python takes no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        # Once: a second one must not break off the writing that the first began.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _environment() -> ClusterEnvironment | None:
    for kind in (TorchElasticEnvironment, SLURMEnvironment, MPIEnvironment):
        if kind.detect():
            environment: ClusterEnvironment = kind()
            return environment
    return None


def _job(environment: ClusterEnvironment) -> str:
    if isinstance(environment, SLURMEnvironment):
        return str(environment.job_id() or "")
    # torchrun chooses a free port for each start, unless it is told one.
    return str(environment.main_port) if isinstance(environment, TorchElasticEnvironment) else ""


def _bytes(path: Path) -> int:
    """Of a file, or of those in the folder of a DICOM series."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _size(case: CaseFiles) -> int | None:
    try:
        return sum(_bytes(path) for path in case.images)
    except (OSError, ValueError):
        return None
