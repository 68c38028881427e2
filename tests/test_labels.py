from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from medmom.errors import MedmomError
from medmom.labels import IGNORE, Labels

LABELS = Labels(("background", "liver", "tumour"), (0, 7, 300), ignore=-1)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 2), ()])
def test_stored_values_survive_the_round_trip(dtype: type, shape: tuple[int, ...]) -> None:
    stored = np.random.default_rng(0).choice([0, 7, 300, -1], size=shape).astype(dtype)
    channels = LABELS.to_channels(stored)
    assert channels.dtype == np.uint8
    assert channels.shape == shape
    np.testing.assert_array_equal(LABELS.to_values(channels), stored)


def test_every_value_becomes_its_channel_and_ignore_becomes_255() -> None:
    assert LABELS.to_channels(np.array([0, 7, 300, -1])).tolist() == [0, 1, 2, IGNORE]


@pytest.mark.parametrize("values", [(0, 1, 2), (0, 70_000, 10**12), (0, -128, 127)])
def test_channels_do_not_depend_on_how_far_values_lie_apart(values: tuple[int, ...]) -> None:
    labels = Labels(("background", "a", "b"), values)
    stored = np.array(values, dtype=labels.dtype)
    assert labels.to_channels(stored).tolist() == [0, 1, 2]
    assert labels.to_values(np.array([2, 1, 0], dtype=np.uint8)).tolist() == [*values[::-1]]


def test_unknown_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"label value -3, 5 is not among \[-1, 0, 7, 300\]"):
        LABELS.to_channels(np.array([0, 5, -3, 5]))


def test_many_unknown_values_are_cut_short() -> None:
    with pytest.raises(ValueError, match=r"1, 2, 3, 4, 5, 6, 8, 9, \.\.\. is not"):
        LABELS.to_channels(np.arange(40))


def test_unknown_values_far_apart_are_named() -> None:
    with pytest.raises(ValueError, match="label value 100000 is not among"):
        LABELS.to_channels(np.array([0, 100_000]))


def test_255_is_a_value_as_any_other() -> None:
    labels = Labels(("background", "a"), (0, 255))
    assert labels.to_channels(np.array([255, 0], dtype=np.uint8)).tolist() == [1, 0]


def test_ignored_voxels_without_a_stored_value_become_background() -> None:
    labels = Labels(("background", "a"), (0, 1))
    assert labels.to_values(np.array([IGNORE, 1], dtype=np.uint8)).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "ignore", "dtype"),
    [
        ((0, 1), None, np.uint8),
        ((0, 255), None, np.uint8),
        ((0, 1), 255, np.uint8),
        ((0, 256), None, np.uint16),
        ((0, 1), 65_536, np.uint32),
        ((0, 1), -1, np.int8),
        ((0, 127), -1, np.int8),
        ((0, 128), -1, np.int16),
        ((0, -129), None, np.int16),
        ((0, 2**40), None, np.uint64),
    ],
)
def test_the_type_on_disk_is_the_smallest_that_holds_all(
    values: tuple[int, ...], ignore: int | None, dtype: type
) -> None:
    labels = Labels(("background", "a"), values, ignore)
    assert labels.dtype == dtype
    assert labels.to_values(np.zeros(1, np.uint8)).dtype == dtype


def test_names_values_and_channels_belong_together() -> None:
    assert LABELS.num_channels == 3
    assert LABELS.foreground == ("liver", "tumour")
    assert (LABELS.channel("tumour"), LABELS.value("tumour")) == (2, 300)
    with pytest.raises(ValueError, match="not in tuple"):
        LABELS.channel("spleen")


def test_json_gives_the_table_back() -> None:
    for labels in (LABELS, Labels(("background", "a"), (0, 1))):
        assert Labels.from_dict(json.loads(json.dumps(labels.as_dict()))) == labels


def test_twelve_classes_have_colours_well_apart_on_black() -> None:
    labels = Labels(tuple(f"class {k}" for k in range(13)), tuple(range(13)))
    colours = [labels.colour(name) for name in labels.names]
    assert colours[0] == (0, 0, 0)
    assert all(0 <= part <= 255 for colour in colours for part in colour)
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(colours, 2)) > 40


def test_the_colour_of_a_class_hangs_on_its_channel_alone() -> None:
    longer = Labels((*LABELS.names, "spleen"), (*LABELS.values, 9))
    assert [longer.colour(n) for n in LABELS.names] == [LABELS.colour(n) for n in LABELS.names]


@pytest.mark.parametrize(
    ("names", "values", "ignore", "message"),
    [
        (("background", "a"), (0,), None, "one name and one value"),
        (("background", "a", "a"), (0, 1, 2), None, "one name and one value"),
        (("background", "a", "b"), (0, 1, 1), None, "repeat"),
        (("background", "a"), (0, 1), 1, r"\(ignore 1\) repeat"),
        (("background", "a"), (0, 1), 0, r"\(ignore 0\) repeat"),
        (("a", "b"), (1, 2), None, "no background"),
        (("a", "background"), (1, 0), None, "no background"),
        ((), (), None, "no background"),
        (("background",), (0,), None, "2 to 255 classes"),
        (tuple(map(str, range(256))), tuple(range(256)), None, "2 to 255 classes"),
    ],
)
def test_a_faulty_table_is_refused(
    names: tuple[str, ...], values: tuple[int, ...], ignore: int | None, message: str
) -> None:
    with pytest.raises(MedmomError, match=message):
        Labels(names, values, ignore)


def test_255_classes_fit() -> None:
    labels = Labels(tuple(map(str, range(255))), tuple(range(255)))
    stored = np.arange(255, dtype=np.uint8)
    np.testing.assert_array_equal(labels.to_values(labels.to_channels(stored)), stored)
