from __future__ import annotations

import copy
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from medmom import __version__, models
from medmom.classes import Classes
from medmom.cleanup import Cleanup
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.inference.novelty import Novelty
from medmom.labels import Labels
from medmom.models.factorise import compact, list_ranks, with_ranks
from medmom.package_files import (
    DESCRIPTION,
    MEND,
    OLD,
    SCHEMA,
    WEIGHTS,
    read_description,
    read_weights,
    with_field,
    write_files,
)

CLASSIFIERS = ("MomentumResNet", "SliceClassifier")
"""Networks of ``medmom.models`` that give one answer for a whole image."""

NOVELTY = "novelty."
"""Begin of the names of tensors that lie beside the network's weights."""


@dataclass(frozen=True, eq=False)
class Package:
    """A trained network with all that predict needs to know.

    Attributes:
        folder: Where it was read from.
        network: In evaluation mode, on the CPU.
        table: Classes by output channel: of voxels, or of whole images.
        preparation: How a case is brought to the working grid; fitted.
        patch: Voxels of a window, or of the image that is classified, along each axis of the working grid.
        channels: Names of the image channels, in order.
        recipe: The recipe that the network was trained with, plain types.
        versions: Version of medmom, python and the packages that mattered, by name.
        checksum: sha256 over the description, which holds that of the weights.
        temperature: By which a classifier's logits are divided before they become probabilities.
        novelty: What a classifier's training images look like; None: not known.
        slices: How many slices of a volume a classifier looks at; None: it looks at the whole image.
        cleanup: What validation cases chose to do with label maps after the network; None: nothing.
        raw_checksum: What ``checksum`` is without the cleanup; predictions that chose it carry this one.
    """

    folder: Path
    network: nn.Module
    table: Labels | Classes
    preparation: Preparation
    patch: tuple[int, ...]
    channels: tuple[str, ...]
    recipe: dict[str, Any]
    versions: dict[str, str]
    checksum: str
    temperature: float = 1.0
    novelty: Novelty | None = None
    slices: int | None = None
    cleanup: Cleanup | None = None
    raw_checksum: str = ""

    @property
    def labels(self) -> Labels:
        """Classes of voxels; MedmomError where the network classifies whole images."""
        if isinstance(self.table, Labels):
            return self.table
        raise MedmomError(
            f"{self.folder}: the model classifies whole images ({_few(self.table.names)}) and draws no label maps. "
            "Name a table: medmom predict MODEL SCANS --out classes.csv."
        )

    @property
    def classes(self) -> Classes:
        """Classes of whole images; MedmomError where the network draws label maps."""
        if isinstance(self.table, Classes):
            return self.table
        raise MedmomError(
            f"{self.folder}: the model draws label maps ({_few(self.table.foreground)}) and does not classify images. "
            "Name a folder: medmom predict MODEL SCANS --out FOLDER."
        )


def save_package(
    folder: str | Path,
    network: nn.Module,
    *,
    labels: Labels | None = None,
    classes: Classes | None = None,
    preparation: Preparation,
    patch: Sequence[int],
    channels: Sequence[str],
    recipe: Mapping[str, Any],
    temperature: float = 1.0,
    novelty: Novelty | None = None,
    slices: int | None = None,
) -> None:
    """Writes a model package: ``model.safetensors`` and ``model.json``, both or none.

    An older package in ``folder`` is replaced when the new one is complete. Every changed byte of either file is
    found by ``load_package``: the description holds the sha256 of the weights and of itself.

    Args:
        folder: Where the package is to lie.
        network: An instance of a class in ``medmom.models`` with an attribute ``arguments`` that rebuilds it.
        labels: Classes by output channel, of a network that draws label maps.
        classes: The same of one that classifies whole images; either this or ``labels``.
        preparation: Fitted.
        patch: Voxels of a window along each axis, two or three.
        channels: Names of the image channels, in order.
        recipe: Plain types; paths become text.
        temperature: Of a classifier, above 0.
        novelty: Of a classifier; None: not known.
        slices: Of a classifier of volumes that looks at slices.

    Raises:
        MedmomError: The folder cannot be written, or holds something else than a package.
        ValueError: The network cannot be rebuilt by its name, has another number of channels or does not do what the
            table says, or a number is nan, infinite or out of its range.
    """
    name = type(network).__name__
    if name not in models.__all__ or getattr(models, name) is not type(network):
        raise ValueError(f"{name} is not a network of medmom.models")
    table = classes if labels is None else labels
    if table is None or None not in (labels, classes):
        raise ValueError("a package has either labels or classes")
    _check_fit(network, table, channels)
    ranks = {layer: sizes.rank for layer, sizes in list_ranks(network).items()}
    kept = compact(copy.deepcopy(network)) if ranks else network
    tensors = dict(kept.state_dict())
    description = {
        "schema": SCHEMA,
        "network": {"name": name, "arguments": network.arguments, **({"ranks": ranks} if ranks else {})},
        "preparation": asdict(preparation),
        "patch": list(patch),
        "spatial_dims": len(patch),
        "channels": list(channels),
        "recipe": dict(recipe),
        "versions": software_versions(),
    }
    if isinstance(table, Labels):
        description["labels"] = table.as_dict()
    else:
        description["classes"] = table.as_dict()
        description["temperature"] = _checked_temperature(temperature)
        description["slices"] = slices
        description["novelty"] = None if novelty is None else novelty.as_dict()
        extra = {} if novelty is None else novelty.tensors()
        tensors.update({f"{NOVELTY}{key}": tensor for key, tensor in extra.items()})
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_files(Path(folder), description, safetensors.torch.save(plain, metadata={"format": "pt"}))


def load_package(path: str | Path) -> Package:
    """Reads a model package and checks every byte of it.

    Nothing in a package is executed: weights are plain tensors, and the network is built from a class of
    ``medmom.models`` alone.

    Args:
        path: A package folder, or a run folder with the package in ``model/``.

    Returns:
        The package; its network in evaluation mode on the CPU.

    Raises:
        MedmomError: There is no package, a byte of it was changed, or this medmom does not know its layout or
            network.
    """
    folder = _find(Path(path))
    description = read_description(folder / DESCRIPTION)
    content = read_weights(folder / WEIGHTS, description.get("weights_sha256"))
    try:
        return _package(folder, description, safetensors.torch.load(content))
    except KeyError as error:
        raise MedmomError(f"{folder / DESCRIPTION}: the field {error} is missing. {MEND}") from error
    except (TypeError, ValueError, AttributeError, RuntimeError, MedmomError, safetensors.SafetensorError) as error:
        # The message of a strict load has a line for each tensor; the first two say enough.
        fact = " ".join(" ".join(str(error).split("\n")[:2]).split())
        raise MedmomError(f"{folder}: the package does not fit together ({fact}). {MEND}") from error


def is_classifier(path: str | Path) -> bool:
    """Whether a model classifies whole images rather than draws label maps, from its description alone.

    Args:
        path: As for ``load_package``.

    Raises:
        MedmomError: There is no package, its description was changed, or this medmom does not know its layout.
    """
    return "classes" in read_description(_find(Path(path)) / DESCRIPTION)


def package_folder(path: str | Path) -> Path | None:
    """Gives the package folder of a run folder, a package folder or a file in one; None where there is none."""
    path = Path(path)
    places = (path / "model", path, path.parent) if path.name in (WEIGHTS, DESCRIPTION) else (path / "model", path)
    return next((place for place in places if (place / DESCRIPTION).is_file()), None)


def software_versions() -> dict[str, str]:
    """Gives the versions of medmom, python and the packages that results depend on, by name."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "monai", "numpy", "safetensors")}
    return {"medmom": __version__, "python": platform.python_version(), **packages}


def _find(path: Path) -> Path:
    try:
        folder = package_folder(path)
        is_there = path.exists()
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check path and permissions.") from error
    if folder is not None:
        return folder
    for place in (path, path.parent):
        for old in place.glob(f"{OLD}*/{DESCRIPTION}"):
            raise MedmomError(
                f"{path}: no model package; one whose replacement was cut off lies in {old.parent}. Rename that folder "
                "back, if it is the one."
            )
    if not is_there:
        raise MedmomError(f"{path}: there is no such folder. Give a run folder or a model package.")
    if (path / "split.json").is_file():
        raise MedmomError(f"{path}: a run without model/{DESCRIPTION}; it has not ended. Continue it with --resume.")
    raise MedmomError(
        f"{path}: no model package: neither {DESCRIPTION} nor model/{DESCRIPTION} is there. "
        "Give a run folder of medmom train or its folder model."
    )


def _package(folder: Path, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Package:
    weights = {key: tensor for key, tensor in tensors.items() if not key.startswith(NOVELTY)}
    extra = {key.removeprefix(NOVELTY): tensor for key, tensor in tensors.items() if key.startswith(NOVELTY)}
    is_of_images = "classes" in description
    table = Classes.from_dict(description["classes"]) if is_of_images else Labels.from_dict(description["labels"])
    channels = tuple(str(name) for name in description["channels"])
    network = _build(description["network"], weights)
    numbers, slices = description.get("novelty"), description.get("slices")
    novelty = None if numbers is None else Novelty.from_parts(numbers, extra)
    cleanup = description.get("cleanup")
    if cleanup is not None and not isinstance(table, Labels):
        raise ValueError("a cleanup of label maps for classes of images")
    _check_fit(network, table, channels)
    return Package(
        folder=folder,
        network=network,
        table=table,
        preparation=_preparation(description["preparation"]),
        patch=tuple(int(n) for n in description["patch"]),
        channels=channels,
        recipe=dict(description["recipe"]),
        versions=dict(description["versions"]),
        checksum=str(description["sha256"]),
        temperature=_checked_temperature(description["temperature"]) if is_of_images else 1.0,
        novelty=novelty,
        slices=None if slices is None else int(slices),
        cleanup=Cleanup.from_dict(cleanup, table) if cleanup is not None and isinstance(table, Labels) else None,
        raw_checksum=str(with_field(description, "cleanup", None)["sha256"]),
    )


def _preparation(data: Mapping[str, Any]) -> Preparation:
    unknown = set(data) - {field.name for field in fields(Preparation)}
    if unknown:
        raise ValueError(f"unknown preparation {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Preparation(**values)


def _build(data: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Builds the network by its name and gives it its weights."""
    kind = getattr(models, data["name"]) if data["name"] in models.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"no network {data['name']!r} in medmom {__version__}; update medmom")
    # Without memory first: the arguments could ask for any.
    ranks = {str(layer): int(rank) for layer, rank in data.get("ranks", {}).items()}
    with torch.device("meta"):
        with_ranks(kind(**data["arguments"]), ranks).load_state_dict(weights, strict=True, assign=True)
    # First weights are drawn and thrown away: the caller's random numbers must not notice.
    with torch.random.fork_rng(devices=[]):
        network = with_ranks(kind(**data["arguments"]), ranks)
    network.load_state_dict(weights, strict=True)
    return network.eval()


def _arguments(network: nn.Module) -> dict[str, Any]:
    arguments: Any = network.arguments
    return dict(arguments)


def _check_fit(network: nn.Module, table: Labels | Classes, channels: Sequence[str]) -> None:
    name, arguments = type(network).__name__, _arguments(network)
    if (name in CLASSIFIERS) != isinstance(table, Classes):
        raise ValueError(f"a {name} for {'classes of images' if isinstance(table, Classes) else 'labels of voxels'}")
    if arguments["in_channels"] != len(channels) or arguments["out_channels"] != table.num_channels:
        raise ValueError(
            f"a network from {arguments['in_channels']} to {arguments['out_channels']} channels, for {len(channels)} "
            f"image channels and {table.num_channels} {'classes' if isinstance(table, Classes) else 'labels'}"
        )


def _checked_temperature(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a temperature of {value}")
    return float(value)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
