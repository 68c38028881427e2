"""What a model package is, in plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from medmom.classes import Classes
from medmom.data.preparation import AXES, STORED, Preparation
from medmom.labels import Labels
from medmom.models.factorise import count_dense, count_parameters, list_ranks
from medmom.models.sizes import times
from medmom.package import Package, load_package

ROWS, COLUMNS = 8, 3
"""Of the table of classes, at most."""

INDENT = 11
"""Width of the titles."""


def describe_model(path: str | Path) -> str:
    """Tells what a model is: its classes, network, input, training and files, and the commands to use it.

    Args:
        path: A run folder or model package.

    Returns:
        Plain text, some twenty lines; of many classes the first are named and the others counted.

    Raises:
        MedmomError: There is no sound model.
    """
    package = load_package(path)
    table = package.table
    rows = [
        ("model", str(path)),
        *(_of_voxels(table, package) if isinstance(table, Labels) else _of_images(table, package)),
        ("network", _network(package)),
        *_input(package),
        *_training(package.recipe),
        ("made with", ", ".join(f"{name} {version}" for name, version in _first(package.versions))),
        ("package", f"{_size(package.folder)}, checksum verified: sha256 {package.checksum}"),
        *_commands(path, is_of_voxels=isinstance(table, Labels)),
    ]
    return "\n".join(f"{title:<{INDENT}}{text}".rstrip() for title, text in rows)


def _of_voxels(labels: Labels, package: Package) -> Iterator[tuple[str, str]]:
    count = len(labels.foreground)
    kind = "volumes" if len(package.patch) == 3 else "pictures, and volumes slice by slice"
    yield "segments", f"{count} {'class' if count == 1 else 'classes'} in {kind}: stored value, colour, name"
    cells = [
        f"{labels.value(name):>5}  {'#{:02x}{:02x}{:02x}'.format(*labels.colour(name))}  {name}"
        for name in labels.foreground
    ]
    yield from _cells(cells)
    if labels.ignore is not None:
        yield "", f"value {labels.ignore} was ignored in training and is never predicted"
    yield "cleanup", f"{package.cleanup}; as chosen on validation data" if package.cleanup else "none"


def _of_images(classes: Classes, package: Package) -> Iterator[tuple[str, str]]:
    seen = "pictures" if package.slices is None and len(package.patch) == 2 else "volumes"
    answer = "any number of" if classes.is_multilabel else "one of"
    yield "classifies", f"{seen}: {answer} {classes.num_channels} classes"
    yield from _cells([f"  {name}" for name in classes.names])
    yield "confidence", f"temperature {package.temperature:.3g}"
    unlike = "images unlike those of training are flagged" if package.novelty else "no image is flagged as unlike them"
    yield "novelty", unlike


def _cells(cells: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Lines of a small table, filled column by column; what does not fit is counted."""
    shown = cells[: ROWS * COLUMNS]
    height = -(-len(shown) // COLUMNS) if len(shown) > ROWS else len(shown)
    width = max(map(len, shown)) + 3
    for row in range(height):
        yield "", "".join(f"{cell:<{width}}" for cell in shown[row::height])
    if len(cells) > len(shown):
        yield "", f"  and {len(cells) - len(shown)} more, in model.json"


def _network(package: Package) -> str:
    network: Any = package.network
    arguments: dict[str, Any] = network.arguments
    parts = [f"{_count(count_parameters(network))} parameters", *_low_rank(network)]
    if "gate" in arguments:
        gating = arguments.get("gating", "fixed")
        parts.append(f"gate {arguments['gate']:g}{'' if gating == 'fixed' else f', {gating}'}")
    if "memory" in arguments:
        parts.append(f"memory {arguments['memory']}")
    preset = package.recipe.get("model", {}).get("preset")
    return f"{type(network).__name__}{f' ({preset})' if preset else ''}: {', '.join(parts)}"


def _low_rank(network: nn.Module) -> Iterator[str]:
    """What the factors of a package save, where there are any."""
    every = list_ranks(network).values()
    if every:
        share = mean(sizes.rank / min(sizes.rows, sizes.columns) for sizes in every)
        yield f"{_count(count_dense(network))} if dense"
        yield f"{len(every)} low-rank layers at {share:.0%} of full rank"


def _input(package: Package) -> Iterator[tuple[str, str]]:
    preparation = package.preparation
    colour = {"grey": "; pictures in colour become grey", "rgb": "; grey pictures become red, green and blue"}
    count = len(package.channels)
    yield (
        "channels",
        f"{count}: {', '.join(package.channels)}{colour.get(preparation.colour, '')}",
    )
    stored = f"{''.join('xyz'[axis] for axis in STORED[preparation.plane])} as stored"
    yield "grid", f"{_grid(preparation)}, axes {AXES[preparation.plane] if preparation.axes == 'patient' else stored}"
    yield "intensity", _intensity(preparation)
    if isinstance(package.table, Labels):
        yield "window", f"{times(package.patch)} voxels"
    else:
        slices = "" if package.slices is None else f", at most {package.slices} slices of a volume"
        yield "sees", f"{times(package.patch)} voxels about the centre{slices}"


def _grid(preparation: Preparation) -> str:
    if preparation.size is not None:
        return f"{times(preparation.size)} voxels, whatever the image's proportions"
    if preparation.spacing is None:
        return "each image's own voxels"
    slices = " in a slice" if len(preparation.spacing) == 2 else ""
    edges = ", outer edges kept" if preparation.exact == "extent" else ""
    return f"voxels of {' x '.join(f'{edge:g}' for edge in preparation.spacing)} mm{slices}{edges}"


def _intensity(preparation: Preparation) -> str:
    if preparation.intensity == "ct" and preparation.clip is not None:
        low, high = preparation.clip
        return f"CT, {low:g} to {high:g} HU, mean {preparation.mean:.5g}, standard deviation {preparation.std:.5g}"
    if preparation.intensity == "zscore":
        where = {"image": "", "box": " in the box that is not 0", "mask": " where the image is not 0, 0 elsewhere"}
        return f"each channel of an image by its own mean and standard deviation{where[preparation.within]}"
    return "0 to 255, divided by 255"


def _training(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the recipe tells, as far as there is one."""
    data, training = recipe.get("data", {}), recipe.get("training", {})
    facts = []
    if "epochs" in training:
        steps = training.get("steps_per_epoch")
        facts.append(f"{training['epochs']} epochs{f' of {steps} steps' if steps else ''}")
    for part in ("optimizer", "loss"):
        name = str(recipe.get(part, {}).get("class_path", "")).rsplit(".", 1)[-1]
        rate = recipe.get(part, {}).get("init_args", {}).get("lr")
        if name:
            facts.append(f"{name}{'' if rate is None else f' with lr {rate:g}'}")
    if data.get("folder"):
        facts.append(f"data {Path(str(data['folder'])).name}")
    if data.get("folds"):
        facts.append(f"fold {data.get('fold')} of {data['folds']}")
    if facts:
        yield "trained", ", ".join(facts)


def _commands(path: str | Path, *, is_of_voxels: bool) -> Iterator[tuple[str, str]]:
    out = "LABELS" if is_of_voxels else "classes.csv"
    yield "use", f"medmom predict {path} IMAGES --out {out}"
    yield "", f"medmom export {path} --to onnx --out FOLDER"
    if is_of_voxels:
        yield "", f"medmom export {path} --to monai-bundle --out FOLDER"


def _first(versions: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, versions[name]) for name in ("medmom", "torch", "monai", "python") if name in versions]


def _size(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"
