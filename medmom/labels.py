from __future__ import annotations

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from medmom.errors import MedmomError

IGNORE = 255
"""Channel index of voxels that no loss and no score looks at."""


@dataclass(frozen=True)
class Labels:
    """Class name, stored value, network channel and colour of every class, in one place.

    On disk a label map holds stored values; inside the pipeline it holds channel indices
    (``uint8``; 255 where a voxel is to be ignored).

    Attributes:
        names: Class names by channel; the first is the background.
        values: Stored value of each channel; the first is 0.
        ignore: Stored value of voxels that are not looked at, or None.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignore: int | None = None

    def __post_init__(self) -> None:
        """Checks the table once, so that nobody else has to."""
        if len(self.names) != len(self.values) or len(set(self.names)) != len(self.names):
            raise MedmomError(f"labels {self.names} and values {self.values}: give each class one name and one value.")
        if len(set(self.values)) != len(self.values) or self.ignore in self.values:
            raise MedmomError(
                f"label values {self.values} (ignore {self.ignore}) repeat: give each class its own value."
            )
        if not self.values or self.values[0] != 0:
            raise MedmomError(
                f"labels {dict(zip(self.names, self.values, strict=True))}: no background with value 0; add it."
            )
        if not 2 <= len(self.names) <= IGNORE:
            raise MedmomError(
                f"{len(self.names)} labels: a label table has 2 to {IGNORE} classes, background included."
            )

    @property
    def num_channels(self) -> int:
        """Number of classes, background included."""
        return len(self.names)

    @property
    def foreground(self) -> tuple[str, ...]:
        """Class names without the background."""
        return self.names[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Smallest integer type that holds every stored value, the ignore value included."""
        values = [*self.values, *([] if self.ignore is None else [self.ignore])]
        low, high = min(values), max(values)
        kinds = [np.dtype(f"{'u' if low >= 0 else 'i'}{size}") for size in (1, 2, 4, 8)]
        return next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)

    def channel(self, name: str) -> int:
        """Channel index of a class; ValueError when there is no such class."""
        return self.names.index(name)

    def value(self, name: str) -> int:
        """Stored value of a class; ValueError when there is no such class."""
        return self.values[self.channel(name)]

    def colour(self, name: str) -> tuple[int, int, int]:
        """Red, green, blue (0 to 255) of a class: black for the background, well apart for neighbours."""
        channel = self.channel(name)
        if channel == 0:
            return (0, 0, 0)
        # Steps of the golden angle keep any number of hues apart; the first is a warm red.
        hue = (0.02 + 0.381966 * (channel - 1)) % 1.0
        lightness = (0.55, 0.45, 0.65)[(channel - 1) // 8 % 3]
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.75)
        return (round(255 * red), round(255 * green), round(255 * blue))

    def to_channels(self, stored: np.ndarray) -> np.ndarray:
        """Turns stored values into channel indices.

        Args:
            stored: Label map of any shape and integer type.

        Returns:
            Channel indices, ``uint8``, same shape; 255 where the stored value is ``ignore``.

        Raises:
            ValueError: A stored value is not in the table; the message lists such values.
        """
        present, places = _distinct(stored)
        table = {value: channel for channel, value in enumerate(self.values)}
        if self.ignore is not None:
            table[self.ignore] = IGNORE
        unknown = [int(value) for value in present if int(value) not in table]
        if unknown:
            shown = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
            raise ValueError(f"label value {shown} is not among {sorted(table)}")
        channels = np.array([table[int(value)] for value in present], dtype=np.uint8)
        return np.asarray(channels[places].reshape(stored.shape))

    def to_values(self, channels: np.ndarray) -> np.ndarray:
        """Turns channel indices (``uint8``, 255 is ignore) into stored values of type ``dtype``."""
        table = np.zeros(IGNORE + 1, dtype=self.dtype)
        table[: self.num_channels] = self.values
        table[IGNORE] = 0 if self.ignore is None else self.ignore
        return np.asarray(table[channels])

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON; ``from_dict`` reads them back."""
        return {"names": list(self.names), "values": list(self.values), "ignore": self.ignore}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Labels:
        """Reads what ``as_dict`` wrote."""
        return cls(tuple(data["names"]), tuple(int(v) for v in data["values"]), data.get("ignore"))


def _distinct(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values in rising order, and where among them each voxel's value stands."""
    lowest = int(stored.min()) if stored.size else 0
    if stored.size == 0 or int(stored.max()) - lowest >= 2**16:
        present, places = np.unique(stored, return_inverse=True)
        return present, places
    # np.unique sorts: half a minute for a whole CT, where counting takes a second.
    shifted = stored.astype(np.int64).reshape(-1) - lowest
    found = np.bincount(shifted) > 0
    return np.flatnonzero(found) + lowest, (np.cumsum(found) - 1)[shifted]
