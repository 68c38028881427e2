"""What a MONAI bundle says of itself: to programs, and to people."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.utils import IgniteInfo

from medmom import __version__
from medmom.data.preparation import Preparation
from medmom.labels import Labels
from medmom.package import Package

SCHEMA_URL = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
"""What MONAI's ``verify_metadata`` checks the metadata against."""

LICENSE = """\
The licence of this model is for its owner to state, and is not stated here.

The weights in models/model.pt were trained by whoever exported this bundle, on data of theirs. Neither medmom nor
MONAI gives or implies any right to use, copy or pass on the weights. Replace this text by the terms of the model, or
ask whoever gave it to you. The terms of the training data may bind the model too.

The programs are another matter: medmom and MONAI are each under the Apache License 2.0.
"""

README = """\
# {name}

{task}.

{description}

**Research only.** Not a medical device; not for diagnosis or treatment.

## Run it

    pip install "medmom>={medmom}" "monai[fire,ignite]"
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir SCANS

`SCANS` is an image file, a folder of images or a pattern; `--output_dir FOLDER` says where the label maps go (else
`eval`). Each lies on the grid of its image. `--device cpu` keeps the run off the GPU.

Reading, preparation and the way back are those of medmom (`medmom.export.transforms`); the windows are MONAI's.
The labels are those of `medmom predict` with the package this bundle comes from; medmom needs less memory.

## Input

{image_classes}. Prepared, in windows of {window} voxels, values {value_range}.

## Output

{labels}

## What is not stated

Authors, copyright, data and licence: see `LICENSE` and `configs/metadata.json`, which the model's owner is to fill in.
The model's scores: it was not scored for this bundle.

Package sha256 `{checksum}`.
"""


def bundle_metadata(package: Package, name: str) -> dict[str, Any]:
    """Gives the metadata of a bundle, as MONAI's specification lists them.

    Args:
        package: Of a network that draws label maps.
        name: Of the bundle.

    Returns:
        Plain types for JSON. What the package does not know, such as authors and scores, is said to be not stated.
    """
    labels = package.labels
    names, channels = ", ".join(labels.foreground), ", ".join(package.channels)
    stored = ", ".join(f"{value} is {name}" for name, value in zip(labels.names, labels.values, strict=True))
    versions = {key: importlib.metadata.version(key) for key in ("nibabel", "numpy", "torch", "monai")}
    folder = Path(str(package.recipe.get("data", {}).get("folder", ""))).name
    return {
        "schema": SCHEMA_URL,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"Exported by medmom {__version__}"},
        "monai_version": versions["monai"],
        "pytorch_version": versions["torch"].split("+")[0],
        "numpy_version": versions["numpy"],
        "required_packages_version": {
            "medmom": __version__,
            "nibabel": versions["nibabel"],
            "pytorch-ignite": IgniteInfo.OPT_IMPORT_VERSION,
        },
        "supported_apps": {},
        "name": name,
        "task": f"Segmentation of {names}",
        "description": (
            f"A {type(package.network).__name__} that segments {names} in {len(package.patch)}-D windows of images "
            f"with the channels {channels}. Trained by medmom {package.versions.get('medmom', '?')}."
        ),
        "authors": "Not stated; whoever trained the model is to fill this in",
        "copyright": "Not stated; whoever owns the model is to fill this in",
        "data_source": f"Folder {folder} of whoever trained the model" if folder else "Not stated",
        "data_type": "pictures" if package.preparation.intensity == "unit" else "nifti",
        "image_classes": f"{_counted(len(package.channels))}: {channels}; {_intensity(package.preparation)}",
        "label_classes": f"single channel data: {stored}",
        "pred_classes": f"{labels.num_channels} channels of logits; after postprocessing single channel data: {stored}",
        "eval_metrics": {},
        "intended_use": "Research only; not a medical device, and not for diagnosis or treatment",
        "references": [],
        "network_data_format": _data_format(package, labels),
        "medmom": {"package_sha256": package.checksum, "trained_with": package.versions},
    }


def _data_format(package: Package, labels: Labels) -> dict[str, Any]:
    ct = package.preparation.intensity == "ct"
    shared = {"dtype": "float32", "is_patch_data": True, "spatial_shape": list(package.patch)}
    return {
        "inputs": {
            "image": {
                "type": "image",
                "format": "hounsfield" if ct else "magnitude",
                "modality": "CT" if ct else "n/a",
                "num_channels": len(package.channels),
                "value_range": _value_range(package.preparation),
                "channel_def": _numbered(package.channels),
                **shared,
            }
        },
        "outputs": {
            "pred": {
                "type": "image",
                "format": "labels",
                "num_channels": labels.num_channels,
                "value_range": [],
                "channel_def": _numbered(labels.names),
                **shared,
            }
        },
    }


def _counted(channels: int) -> str:
    return "single channel data" if channels == 1 else f"{channels} channels"


def _numbered(names: tuple[str, ...]) -> dict[str, str]:
    return {str(channel): name for channel, name in enumerate(names)}


def _intensity(preparation: Preparation) -> str:
    if preparation.intensity == "ct" and preparation.clip is not None:
        low, high = preparation.clip
        return f"Hounsfield units from {low:g} to {high:g}, minus {preparation.mean:g}, by {preparation.std:g}"
    return {"zscore": "each channel with mean 0 and standard deviation 1"}.get(preparation.intensity, "from 0 to 1")


def _value_range(preparation: Preparation) -> list[float]:
    """Lowest and highest value of a prepared image; empty where they are not known."""
    if preparation.intensity == "ct" and preparation.clip is not None:
        mean, std = preparation.mean or 0.0, preparation.std or 1.0
        return [(bound - mean) / std for bound in preparation.clip]
    return [0.0, 1.0] if preparation.intensity == "unit" else []


def readme(metadata: Mapping[str, Any], package: Package) -> str:
    """Gives the read-me of a bundle from its metadata, in Markdown."""
    bounds = metadata["network_data_format"]["inputs"]["image"]["value_range"]
    labels = package.labels
    rows = [f"| {value} | {name} |" for name, value in zip(labels.names, labels.values, strict=True)]
    return README.format(
        **{key: metadata[key] for key in ("name", "task", "description", "image_classes")},
        medmom=metadata["required_packages_version"]["medmom"],
        window=" x ".join(map(str, package.patch)),
        value_range="from {:g} to {:g}".format(*bounds) if bounds else "of no fixed range",
        labels="\n".join(["| value | class |", "| ---: | --- |", *rows]),
        checksum=package.checksum,
    )
