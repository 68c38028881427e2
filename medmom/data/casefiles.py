"""What a data folder lists, before any image is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medmom.labels import Labels


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case.

    Attributes:
        name: Its name, unique in the folder.
        images: One file with all channels, or one file a channel.
        label: The label map; None without one.
        group: What must stay in one fold, such as a patient; the case's own name where nothing is known.
        annotated: Foreground classes that were looked for in this case; None: all.
        classes: What the whole image is of, for classification; None where that is not known.
        fold: The part of the data that the case was assigned to; None: not assigned.
        item: Place of the image in a file of many, from 0; None: the file is one image.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    group: str
    annotated: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    fold: str | None = None
    item: int | None = None


@dataclass(frozen=True)
class CaseFolder:
    """The cases of a data folder and what its label values and channels mean.

    Attributes:
        folder: The folder that relative paths start from.
        cases: By name.
        labels: Class names and stored values.
        channels: Name of each image channel, such as ``CT``.
        notes: Lines to tell the user, such as how cases were grouped.
        unused: Image and label files of the folder that belong to no case.
    """

    folder: Path
    cases: tuple[CaseFiles, ...]
    labels: Labels
    channels: tuple[str, ...]
    notes: tuple[str, ...] = ()
    unused: tuple[Path, ...] = ()
