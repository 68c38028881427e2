"""Dictionary transforms with which a MONAI bundle reads, prepares, restores and writes images as predict does."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medmom.cleanup import Cleanup, apply
from medmom.data.case import Case
from medmom.data.files import Volume, is_picture, read_images, stem, write_label
from medmom.data.nifti import open_nifti
from medmom.data.preparation import Preparation, prepare, working_channels, working_geometry
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.inference.inputs import find_inputs
from medmom.inference.kinds import check_kind, check_working_grid
from medmom.inference.restore import Restorer
from medmom.labels import Labels


def find_images(inputs: str | Path | Sequence[str | Path], num_channels: int) -> list[dict[str, Any]]:
    """Gives the cases of files, folders and globs as items of a MONAI dataset.

    Args:
        inputs: As for ``medmom.inference.inputs.find_inputs``; a single one may stand alone.
        num_channels: Image channels that the model takes.

    Returns:
        One item a case: ``image``, the list of its files, and ``name``.

    Raises:
        MedmomError: As ``find_inputs``.
    """
    cases = find_inputs([inputs] if isinstance(inputs, str | Path) else inputs, num_channels)
    return [{"image": [str(path) for path in case.images], "name": case.name} for case in cases]


class Prepared(MapTransform):  # type: ignore[misc]
    """Reads the files of an image and brings it to the working grid, as training and predict do.

    An item holds one file name, or a list of them, one a channel. It becomes a ``MetaTensor``, float32, shape
    (C, X, Y, Z), whose affine is that of the working grid, with ``original_affine``, ``spatial_shape`` and
    ``filename_or_obj`` of the image.

    Args:
        keys: Of the items.
        preparation: Fields of ``medmom.data.preparation.Preparation``.
        channels: Names of the channels that the network takes.
        spatial_dims: Axes of the network's window: 2 or 3.
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        preparation: Mapping[str, Any],
        channels: Sequence[str],
        spatial_dims: int,
    ) -> None:
        super().__init__(keys)
        self.preparation = preparation_from(preparation)
        self.channels = tuple(channels)
        self.spatial_dims = spatial_dims

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Gives the items with their images read and prepared.

        Raises:
            MedmomError: A file cannot be read, or is none that the model takes.
        """
        items = dict(data)
        for key in self.key_iterator(items):
            files = items[key]
            items[key] = self._read([files] if isinstance(files, str | Path) else files)
        return items

    def _read(self, files: Sequence[str | Path]) -> MetaTensor:
        image = read_images([Path(file) for file in files])
        self._check(image)
        case = prepare(Case(stem(image.path), image.array, None, image.geometry, ()), self.preparation)
        meta = {
            "filename_or_obj": str(image.path),
            "original_affine": image.geometry.affine,
            "spatial_shape": np.array(image.geometry.shape),
            "space": "RAS",
        }
        return MetaTensor(torch.from_numpy(case.image), affine=torch.from_numpy(case.geometry.affine), meta=meta)

    def _check(self, image: Volume) -> None:
        takes_volumes = self.spatial_dims == 3
        check_kind(image.path, image.array, self.preparation, is_picture=image.is_picture, takes_volumes=takes_volumes)
        if working_channels(self.preparation, len(image.array)) != len(self.channels):
            raise MedmomError(
                f"{image.path}: the number of image channels is {len(image.array)}, the model takes "
                f"{len(self.channels)} ({', '.join(self.channels)}). Give one file with all, or a list of files."
            )
        check_working_grid(image.path, self.preparation, image.geometry)


class Restored(MapTransform):  # type: ignore[misc]
    """Brings logits from the working grid to the image's own grid, as a label map of stored values.

    Args:
        keys: Of the logits, float, shape (K, X, Y, Z); they become a ``MetaTensor`` of whole numbers, shape
            (1, *own grid), with the image's own affine.
        preparation: As for ``Prepared``.
        labels: As ``medmom.labels.Labels.as_dict`` gives them.
        cleanup: As ``medmom.cleanup.Cleanup.as_dict`` gives it; None: nothing is cleaned up.
        image_key: Of the image that ``Prepared`` gave.
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        preparation: Mapping[str, Any],
        labels: Mapping[str, Any],
        cleanup: Mapping[str, Any] | None = None,
        image_key: Hashable = "image",
    ) -> None:
        super().__init__(keys)
        self.preparation = preparation_from(preparation)
        self.labels = Labels.from_dict(labels)
        self.cleanup = None if cleanup is None else Cleanup.from_dict(cleanup, self.labels)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Gives the items with label maps for logits.

        Raises:
            MedmomError: A logit is not finite.
        """
        items = dict(data)
        image = items[self.image_key]
        for key in self.key_iterator(items):
            items[key] = self._label(items[key], image)
        return items

    def _label(self, logits: torch.Tensor, image: MetaTensor) -> MetaTensor:
        own = _own_geometry(image)
        scores = logits.detach().float().cpu()
        # A MetaTensor is several times slower at every step than what it holds.
        scores = scores.as_tensor() if isinstance(scores, MetaTensor) else scores
        if not torch.isfinite(scores).all():
            path = image.meta["filename_or_obj"]
            raise MedmomError(f"{path}: the network's output is not finite. Train the model again.")
        restorer = Restorer(working_geometry(self.preparation, own), own, self.labels.num_channels, axis=2)
        restorer.push(slice(0, scores.shape[-1]), scores)
        label = self.labels.to_values(restorer.finish())
        if self.cleanup is not None:
            label = apply(label, own, self.labels, self.cleanup)
        # torch has few operations for unsigned integers of more than a byte.
        stored = label if label.dtype == np.uint8 else label.astype(np.int64)
        meta = {"filename_or_obj": image.meta["filename_or_obj"], "space": "RAS"}
        return MetaTensor(torch.from_numpy(stored[None]), affine=torch.from_numpy(own.affine), meta=meta)


class Written(MapTransform):  # type: ignore[misc]
    """Writes label maps as predict does: ``case.nii.gz`` with the image's header, of a picture ``case.png``.

    Args:
        keys: Of the label maps that ``Restored`` gave; they stay as they are.
        output_dir: Folder that they go to; it is made.
        labels: As for ``Restored``.
        image_key: Of the image that ``Prepared`` gave.
        name_key: Of the case's name; where there is none, the image's file name is taken.
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        output_dir: str | Path,
        labels: Mapping[str, Any],
        image_key: Hashable = "image",
        name_key: Hashable = "name",
    ) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.labels = Labels.from_dict(labels)
        self.image_key, self.name_key = image_key, name_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Writes and gives the items as they are.

        Raises:
            MedmomError: The place cannot be written, or is that of the image.
        """
        items = dict(data)
        image = items[self.image_key]
        path = Path(image.meta["filename_or_obj"])
        name = Path(str(items.get(self.name_key) or stem(path))).name
        out = self.output_dir / f"{name}{'.png' if is_picture(path) else '.nii.gz'}"
        for key in self.key_iterator(items):
            label = np.asarray(items[key][0].cpu())
            header = None if is_picture(path) else open_nifti(path).header
            write_label(out, label, self.labels, Volume(path, label, _own_geometry(image), header))
        return items


def preparation_from(fields: Mapping[str, Any]) -> Preparation:
    """Reads a preparation from plain types, where lists stand for tuples."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Preparation(**values)


def _own_geometry(image: MetaTensor) -> Geometry:
    """Grid of the image in its file, from what ``Prepared`` noted."""
    shape, affine = image.meta["spatial_shape"], image.meta["original_affine"]
    return Geometry(tuple(int(n) for n in shape), np.asarray(torch.as_tensor(affine).cpu(), dtype=np.float64))
