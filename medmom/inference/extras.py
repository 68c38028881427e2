"""What is written beside label maps, on request, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medmom.data.files import Volume, content_files, is_picture, read_geometry, stem
from medmom.errors import MedmomError
from medmom.inference.entropy_file import entropy_path
from medmom.inference.probability_files import probability_path


@dataclass(frozen=True)
class Extras:
    """Files of a case beside its label map and sidecar; None and empty where they are not asked for.

    Attributes:
        preview: A picture of three planes.
        entropy: A map of how sure the model was.
        dicom_seg: The label map as DICOM-SEG.
        probabilities: One file a class.
    """

    preview: Path | None = None
    entropy: Path | None = None
    dicom_seg: Path | None = None
    probabilities: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        single = (self.preview, self.entropy, self.dicom_seg)
        return (*(path for path in single if path is not None), *self.probabilities)


@dataclass(frozen=True)
class Wanted:
    """What is written beside label maps, and what is left as it is.

    Attributes:
        preview: Whether each case gets a picture of three planes.
        probabilities: Type of the steps in which the probability of each class is stored; None: not stored.
        entropy: Whether each case gets a map of the entropy of its probabilities.
        dicom_seg: Whether each case gets its label map as DICOM-SEG too; its image must be a DICOM series, unless
            ``reference`` names one.
        reference: A DICOM series on the grid of the one image, for ``dicom_seg``.
        skip_existing: Whether cases are left out whose label maps are there, of the same images by content, the same
            model and the same settings.
    """

    preview: bool = False
    probabilities: Literal["uint8", "uint16"] | None = None
    entropy: bool = False
    dicom_seg: bool = False
    reference: Path | None = None
    skip_existing: bool = False

    def extras(self, prediction: Path, classes: Sequence[str]) -> Extras:
        """Names the files beside a label map.

        Args:
            prediction: The label map.
            classes: Their names, by channel.

        Raises:
            MedmomError: Two files would have one name.
        """
        folder, case, is_flat = prediction.parent, stem(prediction), is_picture(prediction)
        extras = Extras(
            preview=folder / f"{case}_preview.png" if self.preview else None,
            entropy=entropy_path(folder, case, is_picture=is_flat) if self.entropy else None,
            dicom_seg=folder / f"{case}_seg.dcm" if self.dicom_seg else None,
            probabilities=tuple(probability_path(folder, case, name, is_picture=is_flat) for name in classes)
            if self.probabilities
            else (),
        )
        for path in (extras.preview, extras.entropy):
            for name, other in zip(classes, extras.probabilities, strict=False):
                # Some disks do not tell upper from lower case.
                if path is not None and path.name.casefold() == other.name.casefold():
                    raise MedmomError(f"{path}: the probabilities of the class {name!r} too. Rename the class.")
        return extras


def source_slices(image: Volume, wanted: Wanted) -> tuple[Path, ...]:
    """Gives the files of the DICOM series that the DICOM-SEG of an image will refer to; none where none is wanted.

    Raises:
        MedmomError: The image is no DICOM series and none is named, or the one that is named lies on another grid.
    """
    if not wanted.dicom_seg:
        return ()
    if wanted.reference is None:
        if not image.series:
            raise MedmomError(
                f"{image.path}: a DICOM-SEG lies on a DICOM series, and this is none. Name one by --reference-series."
            )
        return image.series
    ours, theirs = (grid.reoriented("RAS") for grid in (image.geometry, read_geometry(wanted.reference)))
    if not theirs.is_close(ours, tolerance=0.05 * min(ours.spacing)):
        raise MedmomError(
            f"{wanted.reference}: another grid than {image.path}, whatever the order of their axes. Name the series "
            "that the image was made from."
        )
    return tuple(content_files(wanted.reference))
