"""What ``dataset.json`` says, in the spelling of the decathlon or of nnU-Net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmom.data.files import read_json
from medmom.errors import MedmomError
from medmom.labels import Labels

EXAMPLE = '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}}'


@dataclass(frozen=True)
class Dataset:
    """The meaning of label values and channels.

    Attributes:
        path: The file.
        labels: Class names and stored values, by value.
        channels: Name of each image channel.
        content: The whole file.
    """

    path: Path
    labels: Labels
    channels: tuple[str, ...]
    content: Mapping[str, Any]


def read_dataset(path: Path) -> Dataset:
    """Reads ``labels`` (name to value, or value to name) and ``channel_names`` or ``modality``.

    A class named ``ignore`` marks voxels that are not looked at. Overlapping regions, a list of values
    for one name, are refused.

    Raises:
        MedmomError: The file is missing, not valid, or says nothing on labels or channels.
    """
    if not path.is_file():
        raise MedmomError(f"{path}: no such file. Write one that names channels and labels, such as {EXAMPLE}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise MedmomError(f"{path}: a {type(content).__name__}, not an object. Write it as {EXAMPLE}")
    return Dataset(path, _labels(path, content.get("labels")), _channels(path, content), content)


def _labels(path: Path, table: Any) -> Labels:
    if not isinstance(table, dict) or not table:
        raise MedmomError(f'{path}: no "labels". Name the classes, as in {EXAMPLE}')
    if all(isinstance(value, str) and _is_whole(key) for key, value in table.items()):
        table = _by_name(path, table)
    for name, value in table.items():
        if isinstance(value, list):
            raise MedmomError(
                f'{path}: label "{name}" is a region of values {value}. Give each class one value of its own.'
            )
        if isinstance(value, bool) or not isinstance(value, int):
            raise MedmomError(f'{path}: label "{name}" has the value {value!r}. Give it a whole number.')
    ignore = table.get("ignore")
    classes = sorted((item for item in table.items() if item[0] != "ignore"), key=lambda item: (item[1] != 0, item[1]))
    try:
        return Labels(tuple(name for name, _ in classes), tuple(value for _, value in classes), ignore)
    except MedmomError as error:
        raise MedmomError(f"{path}: {error}") from error


def _by_name(path: Path, table: Mapping[str, str]) -> dict[str, int]:
    """Turns the decathlon's value-to-name table round."""
    by_name: dict[str, int] = {}
    for value, name in table.items():
        if name in by_name:
            raise MedmomError(f'{path}: two label values are named "{name}". Give each class its own name.')
        by_name[name] = int(value)
    return by_name


def _channels(path: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    table = content.get("channel_names", content.get("modality"))
    if isinstance(table, dict) and table and all(_is_whole(key) for key in table):
        return tuple(str(table[key]) for key in sorted(table, key=int))
    if isinstance(table, list) and table:
        return tuple(map(str, table))
    raise MedmomError(f'{path}: no "channel_names" (or "modality"). Name the image channels, as in {EXAMPLE}')


def _is_whole(text: str) -> bool:
    return text.strip().lstrip("-").isdecimal()
