from __future__ import annotations

import difflib
import importlib
import inspect
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, Randomizable
from monai.utils import convert_to_numpy

from medmom.errors import MedmomError

PREFIX = "albumentations."
"""What the name of one of albumentations' transforms begins with in a recipe."""

# They prepare images instead of changing them at random: images to predict on would not see them.
PREPARING = ("FromFloat", "Normalize", "ToFloat", "ToRGB", "ToTensor3D", "ToTensorV2")


class Albumented(Randomizable, MapTransform):
    """Random changes by albumentations as one MONAI transform of pictures and slices.

    Keys: ``image`` (C, X, Y) float32 and, where there is one, ``label`` (1, X, Y) uint8, which moves with it. X is the
    column, so that a horizontal flip reverses X. Both come back as plain tensors of the same shape and type. Where
    there are more than four channels, four at a time are changed alike, down to their noise.

    What happens is a function of the state that ``set_random_state`` gives; neither the global generators nor an
    earlier call enter.

    Args:
        transforms: Of albumentations, one after the other.
        num_channels: Images of another number of channels are left alone; None: all are changed.
    """

    def __init__(self, transforms: Sequence[Any], *, num_channels: int | None = None) -> None:
        MapTransform.__init__(self, keys=("image", "label"), allow_missing_keys=True)
        self.transforms, self.num_channels = tuple(transforms), num_channels
        self._seed = 0

    def randomize(self, data: Any = None) -> None:
        """Draws the seed of all transforms."""
        self._seed = int(self.R.randint(2**32, dtype=np.uint64))

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Changes one sample; other entries of the dictionary stay as they are.

        Raises:
            MedmomError: A transform does not take such an image, or gives one of another shape or type.
        """
        if self.num_channels not in (None, len(data["image"])):
            return dict(data)
        self.randomize()
        return self._changed(data)

    def try_out(self, shape: Sequence[int]) -> None:
        """Runs every transform once on a made-up image (C, X, Y), so that what does not fit is said at once.

        Raises:
            MedmomError: As in a call; or a transform warns, as some do that then change nothing.
        """
        image = torch.linspace(0, 1, int(np.prod(shape))).reshape(*shape)
        label = torch.ones(1, *shape[1:], dtype=torch.uint8)
        with warnings.catch_warnings(action="error", category=UserWarning):
            self._changed({"image": image, "label": label}, force_apply=True)

    def _changed(self, data: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        image = convert_to_numpy(data["image"])
        if image.ndim != 3:
            raise MedmomError(
                f"data.transforms: albumentations changes pictures and slices, not patches of {image.ndim - 1} axes; "
                "give data.patch two edges, or take transforms of MONAI."
            )
        mask = {"mask": convert_to_numpy(data["label"])[0].T} if "label" in data else {}
        # Loading processes share the cores; threads of OpenCV in each of them would only wait for one another.
        importlib.import_module("cv2").setNumThreads(0)
        parts = [self._run({"image": part, **mask}, options) for part in _fours(image.T)]
        result = np.concatenate([part["image"] for part in parts], axis=-1)[..., : len(image)]
        changed = {"image": torch.from_numpy(np.ascontiguousarray(result.T))}
        if mask:
            changed["label"] = torch.from_numpy(np.ascontiguousarray(parts[0]["mask"].T))[None]
        return {**data, **changed}

    def _run(self, arrays: Mapping[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
        # albumentations' own Compose seeds every transform alike, so that flips of equal probability come together.
        generators = np.random.default_rng(self._seed), random.Random(self._seed)
        changed = {key: np.array(array, order="C") for key, array in arrays.items()}
        for transform in self.transforms:
            transform.set_random_state(*generators)
            changed = _apply(transform, changed, options)
        return changed


def _fours(image: np.ndarray) -> list[np.ndarray]:
    """Parts of as many channels as all of OpenCV takes, filled up so that each draws the same random numbers."""
    channels = image.shape[-1]
    if channels <= 4:
        return [image]
    return [image.take(range(first, first + 4), axis=-1, mode="clip") for first in range(0, channels, 4)]


def _apply(transform: Any, arrays: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    name, image = f"{PREFIX}{type(transform).__name__}", arrays["image"]
    if not isinstance(transform, load_albumentations().DualTransform):
        # A gamma makes nan of the little below 0 that noise may have left.
        arrays = {**arrays, "image": np.clip(image, 0, 1)}
    try:
        changed: dict[str, np.ndarray] = transform(**arrays, **options)
    except Exception as error:  # of many kinds, OpenCV's among them
        fact = " ".join(str(error).split()) or type(error).__name__
        raise MedmomError(
            f"data.transforms: {name}: cannot change an image of {_size(image)} ({fact}); "
            "change its arguments, or take it out."
        ) from error
    result = changed["image"]
    if result.shape != image.shape or result.dtype != image.dtype:
        raise MedmomError(
            f"data.transforms: {name}: makes {_size(result)}, {result.dtype}, of {_size(image)}, {image.dtype}; "
            "take one that keeps both."
        )
    return changed


def _size(image: Any) -> str:
    return f"shape {tuple(image.shape)[::-1]}"


def load_albumentations() -> Any:
    """Imports albumentations, which only training with it needs."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for a newer version otherwise
    return importlib.import_module("albumentations")


def albumentations_transform(arguments: Mapping[str, Any], *, intensity: str) -> Any:
    """Makes one of albumentations' transforms from what a recipe writes.

    Args:
        arguments: ``class``, the name after ``albumentations.``, and that class's arguments.
        intensity: Scale of the images, as in ``Preparation``. What changes colours and grey values takes them for
            0 to 1, and cuts off what lies outside: it is made for ``"unit"`` alone.

    Returns:
        The transform, for ``Albumented``.

    Raises:
        MedmomError: There is no such transform (the nearest one is named), it refuses its arguments, needs more than
            an image and a label, or does not suit ``intensity``.
    """
    arguments = dict(arguments)
    name = str(arguments.pop("class")).removeprefix(PREFIX)
    offered = _offered()
    if name not in offered:
        close = difflib.get_close_matches(name, offered, n=1)
        hint = f"did you mean {PREFIX}{close[0]}?" if close else "see albumentations' list of 2-D transforms."
        raise MedmomError(f"data.transforms: no transform {PREFIX + name!r} of pictures; {hint}")
    kind = offered[name]
    if intensity != "unit" and not issubclass(kind, load_albumentations().DualTransform):
        raise MedmomError(
            f"data.transforms: {PREFIX}{name}: is made for pictures from 0 to 1, and preparation.intensity is "
            f"{intensity}; take a transform of MONAI."
        )
    transform = _made(name, kind, arguments)
    missing = sorted(set(transform.targets_as_params) - {"image", "mask"})
    if missing:
        raise MedmomError(f"data.transforms: {PREFIX}{name}: needs {', '.join(missing)}; a patch has image and label.")
    return transform


def _offered() -> dict[str, Any]:
    """Classes that change images at random, by name."""
    library = load_albumentations()
    bases = (library.BasicTransform, library.DualTransform, library.ImageOnlyTransform)
    return {
        name: kind
        for name, kind in vars(library).items()
        if isinstance(kind, type) and issubclass(kind, library.BasicTransform) and kind not in bases
        if not issubclass(kind, library.Transform3D) and name not in PREPARING
    }


def _made(name: str, kind: Any, arguments: dict[str, Any]) -> Any:
    known = [each for each in inspect.signature(kind.__init__).parameters if each != "self"]
    strange = sorted(set(arguments) - set(known))
    if strange:  # albumentations itself warns and goes on without them
        raise MedmomError(
            f"data.transforms: {PREFIX}{name}: no argument {', '.join(strange)}; it has {', '.join(known)}."
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # of slowness, and of names that stand for another
            return kind(**arguments, strict=True)
    except (TypeError, ValueError) as error:
        raise MedmomError(
            f"data.transforms: {PREFIX}{name}: {_fact(error)}; see its page in albumentations' documentation."
        ) from None


def _fact(error: Exception) -> str:
    """The first complaint, on one line: albumentations hands on the long report of what checks its arguments."""
    report = getattr(error.__cause__, "errors", None)
    if report is None:
        return " ".join(str(error).split())
    first = report()[0]
    place = first["loc"][0] if first["loc"] else "arguments"
    value = "" if first["type"] == "missing" or not first["loc"] else f" {first['input']!r}"
    return f"{place}{value}: {first['msg'].removeprefix('Value error, ').rstrip('.')}"
