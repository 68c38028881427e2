from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from medmom import __version__, models
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.labels import Labels

SCHEMA = 1
"""Number of the layout of ``model.json``; raise it when a field changes its meaning."""

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"

MEND = "Copy it again from its source, or write it anew with medmom train."


@dataclass(frozen=True, eq=False)
class Package:
    """A trained network with all that predict needs to know.

    Attributes:
        network: In evaluation mode, on the CPU.
        labels: Classes by output channel.
        preparation: How a case is brought to the working grid; fitted.
        patch: Voxels of a window along each axis of the working grid.
        channels: Names of the image channels, in order.
        recipe: The recipe that the network was trained with, plain types.
        versions: Version of medmom, python and the packages that mattered, by name.
        checksum: sha256 over the description, which holds that of the weights.
    """

    network: nn.Module
    labels: Labels
    preparation: Preparation
    patch: tuple[int, ...]
    channels: tuple[str, ...]
    recipe: dict[str, Any]
    versions: dict[str, str]
    checksum: str


def save_package(
    folder: str | Path,
    network: nn.Module,
    *,
    labels: Labels,
    preparation: Preparation,
    patch: Sequence[int],
    channels: Sequence[str],
    recipe: Mapping[str, Any],
) -> None:
    """Writes a model package: ``model.safetensors`` and ``model.json``, both or none.

    An older package in ``folder`` is replaced when the new one is complete. Every changed byte of either file is
    found by ``load_package``: the description holds the sha256 of the weights and of itself.

    Args:
        folder: Where the package is to lie.
        network: An instance of a class in ``medmom.models`` with an attribute ``arguments`` that rebuilds it.
        labels: Classes by output channel.
        preparation: Fitted.
        patch: Voxels of a window along each axis.
        channels: Names of the image channels, in order.
        recipe: Plain types; paths become text.

    Raises:
        MedmomError: The folder cannot be written, or holds something else than a package.
        ValueError: The network cannot be rebuilt by its name or has another number of channels, or a number in the
            recipe is nan or infinite.
    """
    folder = Path(folder)
    name = type(network).__name__
    if name not in models.__all__ or getattr(models, name) is not type(network):
        raise ValueError(f"{name} is not a network of medmom.models")
    _check_fit(network, labels, channels)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    description = {
        "schema": SCHEMA,
        "network": {"name": name, "arguments": network.arguments},
        "labels": labels.as_dict(),
        "preparation": asdict(preparation),
        "patch": list(patch),
        "spatial_dims": len(patch),
        "channels": list(channels),
        "recipe": dict(recipe),
        "versions": software_versions(),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    # Numbers as keys become text here, before keys are sorted: reading must find the same order.
    description = json.loads(json.dumps(description, default=_plain))
    _replace_folder(
        folder, {WEIGHTS: weights, DESCRIPTION: _canonical({**description, "sha256": _digest(description)})}
    )


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
    description = _read_description(folder / DESCRIPTION)
    content = _read(folder / WEIGHTS)
    if hashlib.sha256(content).hexdigest() != description.get("weights_sha256"):
        raise MedmomError(f"{folder / WEIGHTS}: the weights do not match their checksum in {DESCRIPTION}. {MEND}")
    try:
        labels = Labels.from_dict(description["labels"])
        channels = tuple(str(name) for name in description["channels"])
        network = _build(description["network"], safetensors.torch.load(content))
        _check_fit(network, labels, channels)
        return Package(
            network=network,
            labels=labels,
            preparation=_preparation(description["preparation"]),
            patch=tuple(int(n) for n in description["patch"]),
            channels=channels,
            recipe=dict(description["recipe"]),
            versions=dict(description["versions"]),
            checksum=str(description["sha256"]),
        )
    except KeyError as error:
        raise MedmomError(f"{folder / DESCRIPTION}: the field {error} is missing. {MEND}") from error
    except (TypeError, ValueError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
        # The message of a strict load has a line for each tensor; the first two say enough.
        fact = " ".join(" ".join(str(error).split("\n")[:2]).split())
        raise MedmomError(f"{folder}: the package does not fit together ({fact}). {MEND}") from error


def package_folder(path: str | Path) -> Path | None:
    """Gives the package folder of a run folder, a package folder or a file in one; None where there is none."""
    path = Path(path)
    places = (path / "model", path, path.parent) if path.name in (WEIGHTS, DESCRIPTION) else (path / "model", path)
    return next((place for place in places if (place / DESCRIPTION).is_file()), None)


def _find(path: Path) -> Path:
    try:
        folder = package_folder(path)
        is_there = path.exists()
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check path and permissions.") from error
    if folder is not None:
        return folder
    if not is_there:
        raise MedmomError(f"{path}: there is no such folder. Give a run folder or a model package.")
    if (path / "split.json").is_file():
        raise MedmomError(f"{path}: a run without model/{DESCRIPTION}; it has not ended. Continue it with --resume.")
    raise MedmomError(
        f"{path}: no model package: neither {DESCRIPTION} nor model/{DESCRIPTION} is there. "
        "Give a run folder of medmom train or its folder model."
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). {MEND}") from error


def _read_description(path: Path) -> dict[str, Any]:
    """Reads the description and refuses one that differs from what was written in any byte."""
    content = _read(path)
    try:
        description = json.loads(content)
        # A space more or 1.50 for 1.5 leave the meaning and its digest alone; the bytes are compared as well.
        is_whole = _canonical(description) == content and _digest(description) == description["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        is_whole = False
    if not is_whole:
        raise MedmomError(f"{path}: the content does not match its own checksum; it was changed or damaged. {MEND}")
    if description.get("schema") != SCHEMA:
        raise MedmomError(
            f"{path}: layout {description.get('schema')} of a model package; medmom {__version__} reads layout "
            f"{SCHEMA}. Update medmom."
        )
    return dict(description)


def _canonical(description: Mapping[str, Any]) -> bytes:
    return (json.dumps(description, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _digest(description: Mapping[str, Any]) -> str:
    """Sha256 of everything in the description but its own checksum."""
    return hashlib.sha256(_canonical({k: v for k, v in description.items() if k != "sha256"})).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no plain type: {value!r}")


def software_versions() -> dict[str, str]:
    """Gives the versions of medmom, python and the packages that results depend on, by name."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "monai", "numpy", "safetensors")}
    return {"medmom": __version__, "python": platform.python_version(), **packages}


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
    # First weights are drawn and thrown away: the caller's random numbers must not notice.
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = kind(**data["arguments"])
    network.load_state_dict(weights, strict=True)
    return network.eval()


def _check_fit(network: nn.Module, labels: Labels, channels: Sequence[str]) -> None:
    arguments: Any = network.arguments
    if arguments["in_channels"] != len(channels) or arguments["out_channels"] != labels.num_channels:
        raise ValueError(
            f"a network from {arguments['in_channels']} to {arguments['out_channels']} channels, for {len(channels)} "
            f"image channels and {labels.num_channels} labels"
        )


def _replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files beside ``folder`` and lets it take its place."""
    folder = folder.absolute()
    draft, old = (folder.parent / f".{kind}-{secrets.token_hex(4)}" for kind in ("draft", "old"))
    try:
        if folder.exists() and {path.name for path in folder.iterdir()} - {WEIGHTS, DESCRIPTION}:
            raise MedmomError(f"{folder}: holds other files than a model package. Name another folder.")
        draft.mkdir(parents=True)
        for name, content in files.items():
            with (draft / name).open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise MedmomError(f"{folder}: cannot be written ({error.strerror}). Choose another place.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
