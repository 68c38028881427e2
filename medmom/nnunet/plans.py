"""What plans.json and dataset.json of nnU-Net v2 say, in our words and our order of axes.

Source:
    Isensee et al. 2021, doi:10.1038/s41592-020-01008-z; version 2.8.1 of nnU-Net, ``DefaultPreprocessor``,
    ``ConfigurationManager`` and ``LabelManager``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.labels import Labels
from medmom.nnunet.architecture import Architecture, read_architecture
from medmom.nnunet.preparing import NO_RESAMPLING, RESAMPLING, read_preparation

PLANS, DATASET = "plans.json", "dataset.json"

MEND = "Copy it again from its source."


@dataclass(frozen=True)
class Plan:
    """One configuration.

    Attributes:
        dataset: Name of the data.
        configuration: Its name.
        architecture: Of the network.
        preparation: Fitted.
        patch: Voxels of a window, (x, y, z) of the working grid.
        channels: Names of the image channels.
        labels: Classes by output channel.
        notes: Sentences on what a prediction does otherwise than nnU-Net's own.
    """

    dataset: str
    configuration: str
    architecture: Architecture
    preparation: Preparation
    patch: tuple[int, ...]
    channels: tuple[str, ...]
    labels: Labels
    notes: tuple[str, ...]


def read_plan(folder: Path, configuration: str) -> Plan:
    """Reads one configuration from the plans in a folder.

    Args:
        folder: With ``plans.json`` and ``dataset.json``, as nnU-Net v2 writes it when it trains.
        configuration: Such as ``3d_fullres``.

    Raises:
        MedmomError: A file is missing or damaged, there is no such configuration, or it is one that has no equal here;
            what it is is named.
    """
    plans, dataset = _read(folder / PLANS), _read(folder / DATASET)
    path = folder / DATASET
    try:
        channels, labels = _channels(dataset), _labels(path, dataset)
        path = folder / PLANS
        options = _resolved(path, plans, configuration)
        _refuse_parts(path, plans, options, configuration)
        patch = tuple(reversed(_whole_numbers(options["patch_size"])))
        if len(patch) not in (2, 3):
            raise ValueError(f"patch_size has {len(patch)} edges")
        return Plan(
            dataset=str(plans.get("dataset_name") or dataset.get("name") or "nnU-Net"),
            configuration=configuration,
            architecture=read_architecture(path, options),
            preparation=read_preparation(path, plans, options, len(channels)),
            patch=patch,
            channels=channels,
            labels=labels,
            notes=_notes(options),
        )
    except KeyError as error:
        raise MedmomError(f"{path}: the field {error} is missing. {MEND}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise MedmomError(f"{path}: not as nnU-Net v2 writes it ({' '.join(str(error).split())}). {MEND}") from None


def refuse_other_folder(folder: Path) -> None:
    """Refuses a folder that nnU-Net did not train in; where one near by may be meant, it is named.

    Raises:
        MedmomError: There is no ``plans.json`` in it.
    """
    if not (folder / PLANS).exists():
        raise MedmomError(f"{folder / PLANS}: there is no such file. {_where(folder)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MedmomError(f"{path}: there is no such file. {MEND}") from None
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check path and permissions.") from None
    except (ValueError, RecursionError):
        raise MedmomError(f"{path}: not a readable JSON file. {MEND}") from None
    if not isinstance(content, dict):
        raise MedmomError(f"{path}: holds no table of fields. {MEND}")
    return content


def _where(folder: Path) -> str:
    """Names the folder that may have been meant: nnU-Net has one a configuration, and in it one a fold."""
    try:
        inside = sorted(path.parent for path in folder.glob(f"*/{PLANS}"))
    except OSError:
        inside = []
    if inside:
        return f"Give the folder of one configuration, such as {inside[0]}."
    if (folder.parent / PLANS).is_file():
        return f"Give the folder of the configuration, {folder.parent}."
    return "Give the folder of a trained configuration, such as Dataset001/nnUNetTrainer__nnUNetPlans__3d_fullres."


def _channels(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    names = dataset["modality"] if "modality" in dataset else dataset["channel_names"]
    numbered = sorted((int(number), str(name)) for number, name in names.items())
    if [number for number, _ in numbered] != list(range(len(numbered))) or not numbered:
        raise ValueError(f"channels {', '.join(map(str, names))} are not numbered from 0")
    return tuple(name for _, name in numbered)


def _labels(path: Path, dataset: Mapping[str, Any]) -> Labels:
    table: dict[str, int] = {}
    for name, value in dataset["labels"].items():
        if isinstance(value, list) and len(value) > 1:
            raise MedmomError(
                f"{path}: the class {name} is a region of several labels ({', '.join(map(str, value[:4]))}): trained "
                "by regions (regions_class_order), whose classes overlap; label maps here have one class a voxel. "
                "Predict with nnU-Net."
            )
        table[name] = value[0] if isinstance(value, list) and value else value
        if type(table[name]) is not int:
            raise ValueError(f"the label {name!r:.40} has the value {value!r:.40}")
    ignore = table.pop("ignore", None)
    names = sorted(table, key=lambda name: table[name])
    if [table[name] for name in names] != list(range(len(names))):
        raise ValueError(f"label values {sorted(table.values())[:8]} are not 0, 1, 2, ...")
    try:
        return Labels(tuple(names), tuple(range(len(names))), ignore)
    except MedmomError as error:
        raise MedmomError(f"{path}: {error}") from None


def _resolved(path: Path, plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits."""
    known, chain = plans["configurations"], [name]
    if name not in known:
        raise MedmomError(f"{path}: no configuration {name!r}; there are {', '.join(map(str, known))}. Name one.")
    options = dict(known[name])
    while "inherits_from" in options:
        parent = options.pop("inherits_from")
        if parent in chain:
            raise ValueError(f"the configuration {parent} inherits from itself")
        chain.append(parent)
        options = {**known[parent], **options}
    return options


def _refuse_parts(path: Path, plans: Mapping[str, Any], options: Mapping[str, Any], name: str) -> None:
    """Refuses what predicts otherwise than can be told here."""
    if options.get("previous_stage") or "cascade" in name:
        raise MedmomError(
            f"{path}: {name} is the second stage of a cascade and also takes the labels of the first one, "
            f"{options.get('previous_stage') or '3d_lowres'}; packages take images alone. Import 3d_lowres, 3d_fullres "
            "or 2d."
        )
    usual: dict[str, tuple[Mapping[str, Any], list[str]]] = {
        "preprocessor_name": (options, ["DefaultPreprocessor"]),
        "label_manager": (plans, ["LabelManager"]),
        "resampling_fn_probabilities": (options, [RESAMPLING, NO_RESAMPLING]),
    }
    for key, (table, known) in usual.items():
        if table.get(key, known[0]) not in known:
            raise MedmomError(
                f"{path}: {key} is {table[key]}, which has no equal here; known is {known[0]}. Predict with nnU-Net."
            )


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not values or any(type(value) is not int or value < 1 for value in values):
        raise ValueError(f"{values!r:.60} is no list of whole numbers above 0")
    return tuple(values)


def _notes(options: Mapping[str, Any]) -> tuple[str, ...]:
    is_volume = len(options["patch_size"]) == 3
    notes: Sequence[str | bool] = (
        "nnU-Net spreads windows evenly over an image; here they follow each other at half a window, the last one "
        "moved back, and the border of a window weighs 0.001 at least.",
        "nnU-Net cuts images to the box that is not 0 before it resamples, and predicts background outside; here the "
        "whole image is looked at. Where the border of an image is not 0 this is the same.",
        is_volume
        and "Where slices lie more than 3 times further apart than their voxels are wide, nnU-Net takes the nearest "
        "slice when it resamples between them; here they are interpolated. At the model's own slice distance this is "
        "the same.",
        "nnU-Net averages over mirror images unless told otherwise; here --tta does.",
    )
    return tuple(note for note in notes if isinstance(note, str))
