"""Small files written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from medmom.errors import MedmomError


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
    part = path.parent / f".{secrets.token_hex(8)}.part"
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
