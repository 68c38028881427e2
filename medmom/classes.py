from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medmom.errors import MedmomError


@dataclass(frozen=True)
class Classes:
    """What whole images are told apart by: the name of each network channel.

    Attributes:
        names: Class names by channel.
        is_multilabel: Whether an image may be of any number of classes, none included; else it is of exactly one.
    """

    names: tuple[str, ...]
    is_multilabel: bool = False

    def __post_init__(self) -> None:
        """Refuses a table with nothing to tell apart."""
        least = 1 if self.is_multilabel else 2
        if len(self.names) < least:
            listed = ", ".join(self.names) or "none"
            raise MedmomError(f"{len(self.names)} classes ({listed}): there is nothing to tell apart. Add images.")
        if len(set(self.names)) != len(self.names) or not all(self.names):
            raise MedmomError(f"classes {', '.join(map(repr, self.names))}: give each class a name of its own.")

    @property
    def num_channels(self) -> int:
        """Number of classes."""
        return len(self.names)

    def channel(self, name: str) -> int:
        """Channel index of a class; ValueError when there is no such class."""
        return self.names.index(name)

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON; ``from_dict`` reads them back."""
        return {"names": list(self.names), "is_multilabel": self.is_multilabel}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Classes:
        """Reads what ``as_dict`` wrote."""
        return cls(tuple(str(name) for name in data["names"]), bool(data["is_multilabel"]))
