"""Files written whole or not at all, and put back where the work on several fails."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from medmom.errors import MedmomError

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""What disks without second names answer to one."""


def write_json(path: str | Path, data: Any) -> None:
    """Writes JSON, indented by two, whole or not at all; nan and infinity are a ValueError."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with atomic_file(path) as stream:
        stream.write(text.encode())


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        MedmomError: The file is missing or not JSON; the message names line and column.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise MedmomError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}). Mend it there."
        ) from error
    except UnicodeDecodeError as error:
        raise MedmomError(f"{path}: not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside ``path`` that takes its place at the end; on failure nothing changes.

    Raises:
        MedmomError: The place cannot be written.
    """
    path = Path(path)
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        raise MedmomError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def put_back(paths: Iterable[str | Path]) -> Iterator[None]:
    """Lets files be as they were where the work on them fails: what is new goes, what was replaced comes back.

    What is there is kept meanwhile under a second name of the same file, which takes no room; who changes it must let
    another file take its place, as ``atomic_file`` does. Where a disk has no second names (FAT), what was replaced
    stays so.

    Args:
        paths: Files, there or not. They are put back in this order.

    Raises:
        MedmomError: The place cannot be written.
    """
    kept: dict[Path, Path | None] = {}
    try:
        for path in map(Path, paths):
            if path not in kept:
                kept[path] = _second_name(path)
        yield
    except BaseException:
        for path, second in kept.items():
            with suppress(OSError):
                if second is None:
                    path.unlink(missing_ok=True)
                else:
                    second.replace(path)
        raise
    finally:
        for path, second in kept.items():
            if second not in (None, path):
                with suppress(OSError):
                    second.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Gives the place of a draft, not made yet, that becomes ``folder`` when the work ends; nothing where it fails.

    Args:
        folder: It must be new, or empty.

    Raises:
        MedmomError: The folder exists and holds something, or is a file, or cannot be written.
    """
    folder = Path(folder)
    draft = folder.absolute().parent / f".draft-{secrets.token_hex(4)}"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise MedmomError(f"{folder}: exists and is not an empty folder. Remove it, or name another output.")
        yield draft
        # An empty folder may be in the way; a rename replaces it, but not on Windows.
        if folder.exists():
            folder.rmdir()
        draft.rename(folder.absolute())
    except OSError as error:
        raise MedmomError(f"{folder}: cannot be written ({error.strerror}). Choose another place.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def cache_draft(folder: Path) -> Iterator[Path]:
    """Makes a draft beside a folder of a cache, for ``take_place``; what is left of it goes when the work ends.

    Raises:
        MedmomError: The cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise MedmomError(
            f"{folder.parent}: the cache cannot be written ({error.strerror or error}); "
            "free some space, or name another folder with --data.cache."
        ) from error


def take_place(draft: Path, folder: Path) -> bool:
    """Renames a full draft to ``folder``; where another run was there first, its folder stays.

    Returns:
        Whether the draft became the folder.

    Raises:
        OSError: It cannot be renamed, and no folder is there.
    """
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        return False
    return True


def _second_name(path: Path) -> Path | None:
    """Gives a file a second name; None where it is not there, its own where the disk has no second names."""
    second = _part(path)
    try:
        os.link(path, second, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in NO_LINKS:
            return path
        raise MedmomError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error
    return second


def _part(path: Path) -> Path:
    return path.parent / f".{secrets.token_hex(8)}.part"
