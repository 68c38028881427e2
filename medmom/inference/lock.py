"""One process, or one call, at a time in a folder, on any disk, and never for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows has none.
    fcntl = None  # type: ignore[assignment]

LOCK = ".medmom.lock"

PAUSE_S = 0.05

CALL_LOCK = ".medmom.call.lock"

STALE_S = 30.0
"""Age of a lock file that a dead process left, where the disk knows no locks."""


@contextmanager
def folder_lock(folder: Path, *, patience_s: float = 60.0) -> Iterator[bool]:
    """Keeps other processes that ask for it out of a folder meanwhile.

    The lock is the kernel's (``flock``) and ends with its process, however that dies. Where the disk or the system
    has none, the mere existence of the file counts, until it is half a minute old. The file is gone afterwards.

    Args:
        folder: Made if missing.
        patience_s: How long to wait; after that work goes on without the lock, so what is done under it must do no
            harm when done twice.

    Yields:
        Whether the lock is held.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, deadline = folder / LOCK, time.monotonic() + patience_s
    release = _acquire(path)
    while release is None and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
        release = _acquire(path)
    try:
        yield release is not None
    finally:
        if release is not None:
            release()


@contextmanager
def call_lock(folder: Path, call: str, *, name: str = CALL_LOCK, is_shared: bool = False) -> Iterator[bool]:
    """Keeps other calls away from what this one writes, for as long as it works.

    The lock is the kernel's and ends with the processes that hold it. Where disk or system has none, nobody is kept
    away. The file is gone afterwards, and so are folders that were made for it and are still empty.

    Args:
        folder: Made if missing.
        call: What the processes of one call have in common.
        name: Of the lock file; what is written by itself has one of its own.
        is_shared: Whether other processes of the same call hold it as well.

    Yields:
        Whether this call has the place for itself; if not, another is at work there.

    Raises:
        OSError: The folder cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        # One at a time: who comes must not meet one who is just being told apart from a stranger.
        with folder_lock(folder):
            release = _join(folder / name, call, is_shared=is_shared)
        try:
            yield release is not None
        finally:
            if release is not None:
                release()
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _join(path: Path, call: str, *, is_shared: bool) -> Callable[[], None] | None:
    """Takes the lock of a call, or takes part in it; gives what lets it go, None where another call has it."""
    if fcntl is None:
        return lambda: None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_same(path, descriptor):
                # The last holder took it away meanwhile.
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
            os.write(descriptor, call.encode())
        except BlockingIOError:
            if not (is_shared and os.pread(descriptor, 4096, 0).decode() == call):
                os.close(descriptor)
                return None
        except OSError:
            # Some network disks know no locks.
            _let_go(path, descriptor)
            return lambda: None
        if is_shared:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return partial(_leave, path, descriptor)


def _leave(path: Path, descriptor: int) -> None:
    """Lets the lock of a call go; the last of its processes takes the file away."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
    else:
        _let_go(path, descriptor)


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _acquire(path: Path) -> Callable[[], None] | None:
    """Takes the lock, without waiting; gives what lets it go, None where somebody else has it."""
    if fcntl is None:
        return _acquire_by_name(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before us takes the file away: who waited for that one has locked nothing that others see.
        is_held = _is_same(path, descriptor)
    except BlockingIOError:
        is_held = False
    except OSError:
        # Some network disks know no locks.
        _let_go(path, descriptor)
        return _acquire_by_name(path)
    if not is_held:
        os.close(descriptor)
        return None
    return partial(_let_go, path, descriptor)


def _acquire_by_name(path: Path) -> Callable[[], None] | None:
    path = path.with_name(f"{path.name}.held")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
        return None
    return partial(path.unlink, missing_ok=True)


def _let_go(path: Path, descriptor: int) -> None:
    """Takes the file away while it is still locked: nobody may lock one that is about to go."""
    with suppress(OSError):
        path.unlink()
    os.close(descriptor)
