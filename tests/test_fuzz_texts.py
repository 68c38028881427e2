"""Model packages, dataset.json and tables with any damage give what they say or one line, whatever it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import Rng, cut, extend, flip, one
from tiny import save_tiny

from medmom.data.case import find_cases
from medmom.data.dataset_json import read_dataset
from medmom.errors import MedmomError
from medmom.inference.table_inputs import cases_of_table
from medmom.package import is_classifier, load_package
from medmom.package_files import DESCRIPTION, WEIGHTS, write_files

SEED = 0
SECRETS = ("sha256", "weights_sha256")

# No whole number that asks for a large network and could get it.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**62, 2**70, -(2**70), 0.5, -0.0, 1e308, "", "a", "0", "-1", "a\nb", "\0", "/"),
    *("../..", "x" * 200, "\ud800", [], [[]], {}, {"a": 1}, [None], [0], [1, 1, 1], ["a", "b"], {"0": "a", "1": "b"}),
    *([[[[[[[[[[1]]]]]]]]]], {"": {"": {"": {}}}}, [1e308] * 3, [-1] * 3, "\u202e", {"background": 0, "a": 1}),
)

DATASET = {
    "name": "Task",
    "channel_names": {"0": "CT", "1": "MRI"},
    "modality": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "ignore": 9},
    "training": [{"image": "a.nii.gz", "label": "b.nii.gz"}, ["c.nii.gz"]],
}
TABLE = 'name,image,label,patient\na,a.nii.gz,b.nii.gz,p\nb,c d.nii.gz,,p\n"c,d",e.nii.gz,f.nii.gz,\n'


def changed(data: Any, rng: Rng) -> Any:
    """The same with a value somewhere in it replaced, left out or added."""
    if not isinstance(data, dict | list) or not data or rng.random() < 0.15:
        return one(rng, VALUES)
    copy = data.copy()
    key = one(rng, list(copy)) if isinstance(copy, dict) else int(rng.integers(len(copy)))
    part = rng.random()
    if part < 0.15:
        del copy[key]
    elif part < 0.25:
        value = one(rng, VALUES)
        copy.append(value) if isinstance(copy, list) else copy.update({str(one(rng, VALUES)): value})
    else:
        copy[key] = changed(copy[key], rng)
    return copy


def passes_or_says_why(read: Callable[[], object], folder: Path, what: object) -> None:
    try:
        read()
    except MedmomError as error:
        text = str(error)
        assert text.startswith(str(folder)), (what, text)
        assert "\n" not in text, (what, text)
        assert len(text) < 2000, (what, text)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__} {error}") from error


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("fuzz") / "model")


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_description_of_any_content_makes_a_package_or_a_line(first: int, sound: Path, tmp_path: Path) -> None:
    weights = (sound / WEIGHTS).read_bytes()
    whole = json.loads((sound / DESCRIPTION).read_text())
    for number in range(first, first + 25):
        description = changed(
            {key: value for key, value in whole.items() if key not in SECRETS}, np.random.default_rng([SEED, number])
        )
        if not isinstance(description, dict):
            continue
        try:
            write_files(tmp_path / "model", description, weights)
        except (ValueError, TypeError):
            continue
        for read in (load_package, is_classifier):
            passes_or_says_why(lambda read=read: read(tmp_path / "model"), tmp_path, (number, description))  # type: ignore[misc]


def test_weights_of_any_content_under_a_true_checksum_give_a_line(sound: Path, tmp_path: Path) -> None:
    weights = (sound / WEIGHTS).read_bytes()
    whole = json.loads((sound / DESCRIPTION).read_text())
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    for number in range(60):
        rng = np.random.default_rng([SEED, number])
        text = json.dumps(changed(header, rng)).encode() if number % 2 else flip(weights[8 : 8 + size], rng)
        length = one(rng, (len(text), len(text), len(text), 0, 2**63, 2**40, size - 1))
        content = length.to_bytes(8, "little") + text + weights[8 + size :]
        content = one(rng, (content, content, cut(content, rng), extend(content, rng)))
        write_files(tmp_path / "model", whole, content)
        passes_or_says_why(lambda: load_package(tmp_path / "model"), tmp_path, number)


def test_dataset_json_of_any_content_is_read_or_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    for number in range(150):
        rng = np.random.default_rng([SEED, number])
        content = json.dumps(changed(DATASET, rng), indent=1).encode()
        path.write_bytes(content if number % 3 else one(rng, (flip, cut, extend))(content, rng))
        passes_or_says_why(lambda: read_dataset(path), tmp_path, (number, content))
        passes_or_says_why(lambda: find_cases(tmp_path), tmp_path, (number, content))


def test_table_of_any_content_is_read_or_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    for number in range(150):
        rng = np.random.default_rng([SEED, number])
        content = one(rng, (flip, cut, extend, junk))(TABLE.encode(), rng)
        path.write_bytes(content)
        passes_or_says_why(lambda: cases_of_table(path), tmp_path, (number, content))


def junk(content: bytes, rng: Rng) -> bytes:
    """Signs that mean something to a table, anywhere in it."""
    signs = (b'"', b"\0", b",", b"\r", b"\n\n", b"\xff", b"..\\", b'"""', b";", b"\t", b"\xef\xbb\xbf", b"x" * 200_000)
    part: bytes = one(rng, signs)
    place = int(rng.integers(len(content)))
    return content[:place] + part + content[place:]
