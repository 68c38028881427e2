"""The files of a model package, every byte of them under a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from medmom import __version__
from medmom.errors import MedmomError

SCHEMA = 1
"""Number of the layout of ``model.json``; raise it when a field changes its meaning."""

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"

OLD = ".old-"
"""Start of the name that a package has while another takes its place."""

MEND = "Copy it again from its source, or write it anew with medmom train."


def read_description(path: Path) -> dict[str, Any]:
    """Reads the description and refuses one that differs from what was written in any byte.

    Raises:
        MedmomError: It cannot be read, was changed, or has a layout that this medmom does not know.
    """
    content = read_bytes(path)
    try:
        description = json.loads(content)
        # A space more or 1.50 for 1.5 leave the meaning and its digest alone; the bytes are compared as well.
        is_whole = _canonical(description) == content and _digest(description) == description["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        is_whole = False
    if not is_whole:
        raise MedmomError(f"{path}: the content does not match its own checksum; it was changed or damaged. {MEND}")
    if description.get("schema") != SCHEMA:
        raise MedmomError(
            f"{path}: layout {description.get('schema')} of a model package; medmom {__version__} reads layout "
            f"{SCHEMA}. Update medmom."
        )
    return dict(description)


def read_weights(path: Path, sha256: Any) -> bytes:
    """Reads the weights and refuses bytes that have another checksum.

    Raises:
        MedmomError: The file cannot be read, or a byte of it was changed.
    """
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise MedmomError(f"{path}: the weights do not match their checksum in {DESCRIPTION}. {MEND}")
    return content


def read_bytes(path: Path) -> bytes:
    """Reads a file of a package; MedmomError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). {MEND}") from error


def write_files(folder: Path, description: Mapping[str, Any], weights: bytes) -> None:
    """Writes both files with their checksums, or none; an older package is replaced when the new one is complete.

    Raises:
        MedmomError: The folder cannot be written, or holds something else than a package.
        ValueError: A number in the description is nan or infinite.
    """
    # Numbers as keys become text here, before keys are sorted: reading must find the same order.
    told = {key: value for key, value in description.items() if key != "sha256"}
    whole = json.loads(json.dumps({**told, "weights_sha256": hashlib.sha256(weights).hexdigest()}, default=_plain))
    _replace_folder(folder, {WEIGHTS: weights, DESCRIPTION: _canonical({**whole, "sha256": _digest(whole)})})


def with_field(description: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Gives a description with one field of plain types changed, or without it where ``value`` is None.

    Its own checksum is that of the new content.
    """
    changed = {key: field for key, field in description.items() if key not in (name, "sha256")}
    changed = json.loads(json.dumps(changed if value is None else {**changed, name: value}))
    return {**changed, "sha256": _digest(changed)}


def _canonical(description: Mapping[str, Any]) -> bytes:
    return (json.dumps(description, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _digest(description: Mapping[str, Any]) -> str:
    """Sha256 of everything in the description but its own checksum."""
    return hashlib.sha256(_canonical({k: v for k, v in description.items() if k != "sha256"})).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no plain type: {value!r}")


def _replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files beside ``folder`` and lets it take its place."""
    folder = folder.absolute()
    draft, old = (folder.parent / f"{start}{secrets.token_hex(4)}" for start in (".draft-", OLD))
    try:
        if folder.exists() and {path.name for path in folder.iterdir()} - {WEIGHTS, DESCRIPTION}:
            raise MedmomError(f"{folder}: holds other files than a model package. Name another folder.")
        draft.mkdir(parents=True)
        for name, content in files.items():
            with (draft / name).open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise MedmomError(f"{folder}: cannot be written ({error.strerror}). Choose another place.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
