"""A disk that is full, or a process that dies, at any one of the steps by which files change."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

Kind = Literal["none", "once", "full", "kill"]

SPACE = frozenset({"create", "write", "fsync", "mkdir"})
"""What a full disk refuses; a rename takes no room there, but is refused once all the same."""

EXIT = 77
"""Code of a process that died as it was told."""


class Disk:
    """Counts the steps below a folder and breaks one of them.

    Attributes:
        steps: What was done so far, or tried: ``"write"``, ``"rename"``, ...
        is_broken: Whether the step to break was reached.
    """

    def __init__(self, folder: Path, *, at: int = -1, kind: Kind = "none") -> None:
        self.folder, self.at, self.kind = folder, at, kind
        self.steps: list[str] = []
        self.is_broken = False

    def step(self, name: str, path: Any, before: Callable[[], object] | None = None) -> None:
        """Counts a step; where it is the one to break, does ``before`` and raises ENOSPC or ends the process."""
        if not self._is_inside(path):
            return
        if self.kind != "kill" and name in ("unlink", "rmdir"):
            return
        number = len(self.steps)
        self.steps.append(name)
        is_hit = number == self.at or (self.kind == "full" and 0 <= self.at < number and name in SPACE)
        if self.kind == "none" or not is_hit:
            return
        self.is_broken = True
        if before is not None:
            before()
        if self.kind == "kill":
            os._exit(EXIT)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))

    def _is_inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(os.fspath(path)).is_relative_to(self.folder)


class _File(io.FileIO):
    """A file on such a disk; of bytes that do not fit the first half is written."""

    def __init__(self, disk: Disk, path: Any, mode: str) -> None:
        disk.step("create", path)
        self._disk, self._path = disk, path
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        self._disk.step("write", self._path, lambda: super(_File, self).write(whole[: len(whole) // 2]))
        return super().write(data)


@contextmanager
def broken_disk(disk: Disk) -> Iterator[None]:
    """Puts a disk below all that Python writes."""
    open_ = io.open

    def opened(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if "opener" in options or not set(mode) & set("wxa+") or not disk._is_inside(file):
            return open_(file, mode, *more, **options)
        raw = _File(disk, file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding=options.get("encoding"), newline=options.get("newline"))

    def synced(descriptor: int) -> None:
        # Nothing is synced in truth: a power cut is not tried here, and hundreds of them take minutes.
        disk.step("fsync", Path(f"/proc/self/fd/{descriptor}").resolve())

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(path: Any, *more: Any, **options: Any) -> Any:
            # A folder that is there is no step: the system looks for the name before it asks for room.
            if not (name == "mkdir" and os.path.isdir(path)):  # noqa: PTH112 - may be a descriptor's relative name
                disk.step(name, path)
            return call(path, *more, **options)

        return stepped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        patch.setattr(os, "fsync", synced)
        for function, name in (("replace", "rename"), ("rename", "rename"), ("link", "link"), ("mkdir", "mkdir")):
            patch.setattr(os, function, wrapped(name, getattr(os, function)))
        for function in ("unlink", "rmdir"):
            patch.setattr(os, function, wrapped(function, getattr(os, function)))
        yield
