"""A model package as a folder after MONAI's bundle specification."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from medmom.data.atomic import new_folder
from medmom.errors import MedmomError
from medmom.export.bundle_metadata import LICENSE, bundle_metadata, readme
from medmom.export.steps import OVERLAP
from medmom.labels import Labels
from medmom.models import to_dense
from medmom.package import Package, load_package

TRANSFORMS = "medmom.export.transforms"

EXPRESSION = re.compile(r"^[$@%]|[@%](::|#)")
"""Texts that MONAI's configuration would take for a command or a reference."""


def export_monai_bundle(model: str | Path, out: str | Path) -> Path:
    """Writes a model as a MONAI bundle: metadata, configuration of the inference, weights, read-me.

    The configuration builds the network from ``medmom.models``, runs MONAI's sliding windows, and brings images to the
    network and labels back by ``medmom.export.transforms``: where it runs, medmom must be installed. Weights are a
    plain ``state_dict``, of low rank or not a dense one. Expressions that MONAI evaluates are those of this function; a
    name in the package that looks like one is refused.

    Args:
        model: A run folder or model package of a network that draws label maps.
        out: The bundle's folder; it must be new, or empty.

    Returns:
        The folder.

    Raises:
        MedmomError: There is no sound model, it classifies images, a name in it begins like an expression, or the
            folder exists or cannot be written.

    Source:
        MONAI bundle specification, https://monai.readthedocs.io/en/stable/mb_specification.html.
    """
    package, out = load_package(model), Path(out)
    # The bundle builds the network from its arguments alone, in which nothing stands of ranks.
    to_dense(package.network)
    if not isinstance(package.table, Labels):
        raise MedmomError(
            f"{model}: the model classifies whole images; bundles are written of models that draw label maps. "
            "Take --to onnx."
        )
    metadata, inference = bundle_metadata(package, out.resolve().name), _inference(package, package.table)
    _check_texts(package, [metadata, inference["labels"], package.channels, _arguments(package)])
    files = {
        "configs/metadata.json": _json(metadata),
        "configs/inference.json": _json(inference),
        "models/model.pt": _weights(package),
        "docs/README.md": readme(metadata, package).encode(),
        "LICENSE": LICENSE.encode(),
    }
    with new_folder(out) as draft:
        _write(draft, files)
    return out


def _inference(package: Package, labels: Labels) -> dict[str, Any]:
    """The program that MONAI runs; the ids are those that its tools ask for."""
    prepared = {"keys": "image", "preparation": "@preparation", "channels": list(package.channels)}
    restored: dict[str, Any] = {"keys": "pred", "preparation": "@preparation", "labels": "@labels"}
    if package.cleanup is not None:
        # Pairs, for MONAI splits keys at its separators.
        smoothing = [list(pair) for pair in package.cleanup.smoothing]
        restored["cleanup"] = {"largest": list(package.cleanup.largest), "smoothing": smoothing}
    return {
        "bundle_root": ".",
        "checkpoint": "$@bundle_root + '/models/model.pt'",
        "dataset_dir": "images",
        "output_dir": "$@bundle_root + '/eval'",
        "device": {"_target_": "medmom.device.torch_device", "name": "auto"},
        "preparation": _plain(asdict(package.preparation)),
        "labels": labels.as_dict(),
        "network_def": {"_target_": f"medmom.models.{type(package.network).__name__}", **_arguments(package)},
        "network": "$@network_def.to(@device)",
        "preprocessing": _composed(
            {"_target_": f"{TRANSFORMS}.Prepared", **prepared, "spatial_dims": len(package.patch)}
        ),
        "dataset": {
            "_target_": "monai.data.Dataset",
            "data": {
                "_target_": f"{TRANSFORMS}.find_images",
                "inputs": "@dataset_dir",
                "num_channels": len(package.channels),
            },
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "monai.data.DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": _inferer(package.patch),
        "postprocessing": _composed(
            {"_target_": f"{TRANSFORMS}.Restored", **restored},
            {"_target_": f"{TRANSFORMS}.Written", "keys": "pred", "output_dir": "@output_dir", "labels": "@labels"},
        ),
        "handlers": [
            {
                "_target_": "monai.handlers.CheckpointLoader",
                "load_path": "@checkpoint",
                "load_dict": {"model": "@network"},
            }
        ],
        "evaluator": {
            "_target_": "monai.engines.SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def _composed(*transforms: Mapping[str, Any]) -> dict[str, Any]:
    return {"_target_": "monai.transforms.Compose", "transforms": list(transforms)}


def _inferer(patch: tuple[int, ...]) -> dict[str, Any]:
    """The windows of ``medmom.inference.windows.sliding_window``."""
    kind: dict[str, Any] = {"_target_": "monai.inferers.SlidingWindowInferer"}
    if len(patch) == 2:
        kind = {"_target_": "monai.inferers.SliceInferer", "spatial_dim": 2}
    return {**kind, "roi_size": list(patch), "sw_batch_size": 1, "overlap": OVERLAP, "mode": "gaussian"}


def _check_texts(package: Package, data: list[Any]) -> None:
    """Refuses names that MONAI would run as a command, or follow, instead of showing them."""
    for text in _texts(data):
        if EXPRESSION.search(text):
            raise MedmomError(
                f"{package.folder}: the name {text!r} would be run, or followed as a reference, in a MONAI bundle. "
                "Rename it; let it begin with a letter."
            )


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts([key, value])
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _texts(value)


def _arguments(package: Package) -> dict[str, Any]:
    network: Any = package.network
    if hasattr(network, "memory"):
        # What is kept for the backward pass changes no logit.
        network.memory = "plain"
    return dict(network.arguments)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=4, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _weights(package: Package) -> bytes:
    stream = io.BytesIO()
    torch.save({key: tensor.cpu().contiguous() for key, tensor in package.network.state_dict().items()}, stream)
    return stream.getvalue()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
