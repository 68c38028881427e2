"""Trained folders of nnU-Net v2 become model packages, one a fold."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medmom.checkpoint import read_checkpoint
from medmom.data.atomic import new_folder
from medmom.errors import MedmomError
from medmom.models import MomentumUNet, PlainUNet, from_host, from_plain_host
from medmom.models.sizes import times
from medmom.nnunet.plans import Plan, read_plan, refuse_other_folder
from medmom.package import save_package

logger = logging.getLogger(__name__)

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
"""Of a fold; the first that is there counts."""

TRAINERS = re.compile(
    r"nnUNetTrainer(_?(\d+epochs?|\d+ep|Benchmark|noDataLoading|warmup|CosAnneal|Vanilla|Ada[mn]|\d+en\d+"
    r"|NoMirroring|onlyMirror01|NoDA|DA5|DASegOrd0|Segord0|ord0|noDummy2DDA|probabilisticOversampling|\d+"
    r"|CELoss|DiceLoss|DiceCELoss|noSmooth|DiceTopK10Loss|Topk10Loss|LS01|NoDeepSupervision))*"
)
"""Trainers of nnU-Net that change the training alone: the network is the one in the plans."""


def import_nnunet(
    folder: str | Path, out: str | Path, *, configuration: str | None = None, folds: Sequence[str] | None = None
) -> list[Path]:
    """Writes a model package for each fold of a trained folder of nnU-Net v2.

    A residual-encoder U-Net becomes a ``MomentumUNet`` of gate 0, a plain one a ``PlainUNet``; either gives the logits
    that it gave there. Preparation, window and mirror axes are those of the plans, the image's axes those of the
    file. Where a prediction does otherwise than nnU-Net's own, a sentence says so, in the log and in the recipe of the
    package, under ``nnunet.notes``. Of a checkpoint, numbers, texts and tensors are read, and nothing in it is run.

    Args:
        folder: Of one configuration, such as ``Dataset001/nnUNetTrainer__nnUNetPlans__3d_fullres``, with
            ``plans.json``, ``dataset.json`` and ``fold_0/checkpoint_final.pth`` (or ``checkpoint_best.pth``).
        out: Of one fold, the package's folder; of several, the folder of packages ``fold_0``, ``fold_1``, ..., new or
            empty: all are written or none.
        configuration: Such as ``3d_fullres``; None: the one that the checkpoint was trained in.
        folds: Their numbers, or ``all``; None: those that are there, without ``all`` where there are others.

    Returns:
        The packages' folders.

    Raises:
        MedmomError: A file is missing or damaged, a checkpoint holds something that would have to be run, the weights
            are not those of the plans, something has no equal here (a cascade, regions, another normalisation, network
            or trainer; each is named), or ``out`` cannot be written or holds something.
    """
    folder, out = Path(folder), Path(out)
    refuse_other_folder(folder)
    found = _checkpoints(folder, folds)
    if len(found) == 1:
        _import_fold(folder, *found[0], out, configuration)
        return [out]
    with new_folder(out) as draft:
        for fold, path in found:
            _import_fold(folder, fold, path, draft / f"fold_{fold}", configuration)
    return [out / f"fold_{fold}" for fold, _ in found]


def _checkpoints(folder: Path, folds: Sequence[str] | None) -> list[tuple[str, Path]]:
    """Name and checkpoint of each fold that is asked for."""
    trained: dict[str, Path] = {}
    try:
        for path in (place / name for name in reversed(CHECKPOINTS) for place in folder.glob("fold_*")):
            if path.is_file():
                trained[path.parent.name.removeprefix("fold_")] = path
    except OSError as error:
        raise MedmomError(f"{folder}: cannot be read ({error.strerror}). Check path and permissions.") from None
    if not trained:
        raise MedmomError(f"{folder}: no fold_0/{CHECKPOINTS[0]} nor that of another fold. Train it to its end first.")
    numbers = sorted((fold for fold in trained if fold.isdecimal()), key=int)
    names = list(dict.fromkeys(str(fold) for fold in folds or numbers or trained))
    for fold in names:
        if fold not in trained:
            raise MedmomError(
                f"{folder / f'fold_{fold}'}: neither {' nor '.join(CHECKPOINTS)} is there. Trained folds are "
                f"{', '.join(sorted(trained))}."
            )
    return [(fold, trained[fold]) for fold in names]


def _import_fold(folder: Path, fold: str, path: Path, out: Path, configuration: str | None) -> None:
    checkpoint = read_checkpoint(path)
    trainer, trained = _names(path, checkpoint)
    if configuration is not None and trained is not None and configuration != trained:
        raise MedmomError(f"{path}: trained in the configuration {trained}, not in {configuration}. Leave it out.")
    plan = read_plan(folder, configuration or trained or folder.name.rpartition("__")[2])
    network = _network(path, plan, checkpoint["network_weights"])
    save_package(
        out,
        network,
        labels=plan.labels,
        preparation=plan.preparation,
        patch=plan.patch,
        channels=plan.channels,
        recipe={
            "data": {
                "folder": plan.dataset,
                "fold": int(fold) if fold.isdecimal() else fold,
                "mirror": _mirror(path, checkpoint.get("inference_allowed_mirroring_axes"), len(plan.patch)),
            },
            "nnunet": {
                "configuration": plan.configuration,
                "trainer": trainer,
                "network": plan.architecture.kind,
                "checkpoint": path.name,
                "notes": list(plan.notes),
            },
        },
    )
    logger.info("%s: %s of %s, fold %s, as %s.", out, plan.configuration, plan.dataset, fold, type(network).__name__)
    for note in plan.notes:
        logger.info("%s", note)


def _names(path: Path, checkpoint: Mapping[str, Any]) -> tuple[str, str | None]:
    """The trainer and the configuration of a checkpoint."""
    trainer, started = checkpoint.get("trainer_name"), checkpoint.get("init_args")
    if not isinstance(trainer, str) or not TRAINERS.fullmatch(trainer):
        raise MedmomError(
            f"{path}: the trainer {trainer!r:.80} is none of nnU-Net's own that leave the network as it is planned; it "
            "may have built another one. Predict with nnU-Net."
        )
    name = started.get("configuration") if isinstance(started, Mapping) else None
    return trainer, name if isinstance(name, str) else None


def _network(path: Path, plan: Plan, weights: Mapping[str, Tensor]) -> MomentumUNet | PlainUNet:
    _refuse_empty_promises(path, weights)
    num_axes = len(plan.patch)
    # Kernels there are (z, y, x).
    turned = {
        name: value.permute(0, 1, *range(1 + num_axes, 1, -1)) if value.ndim == 2 + num_axes else value
        for name, value in weights.items()
    }
    build = from_plain_host if plan.architecture.kind == "PlainConvUNet" else from_host
    try:
        # Without memory first: a few weights that lie about the others' shapes could ask for any.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build(turned)
        network = build(turned)
    except ValueError as error:
        raise MedmomError(f"{path}: {error}") from None
    arguments = network.arguments
    wanted = {
        **plan.architecture.sizes,
        "in_channels": len(plan.channels),
        "out_channels": plan.labels.num_channels,
    }
    for key, value in wanted.items():
        if arguments[key] != value:
            raise MedmomError(
                f"{path}: the weights have {key} {arguments[key]}, plans.json and dataset.json say {value}. Both are "
                "of one training; copy the folder again from its source."
            )
    if any(edge % step for edge, step in zip(plan.patch, network.divisor, strict=True)):
        raise MedmomError(
            f"{path}: the network does not take patches of {times(plan.patch)} voxels, as plans.json says."
        )
    for name, value in network.state_dict().items():
        if not torch.isfinite(value).all():
            raise MedmomError(f"{path}: {name} holds a value that is not finite. Import another fold.")
    return network


def _refuse_empty_promises(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuses tensors of another kind, and those whose numbers are not all in the file."""
    size = path.stat().st_size
    for name, value in weights.items():
        # A view of one number may have any shape.
        if value.layout != torch.strided or not value.is_floating_point() or not 0 < value.nbytes <= size:
            raise MedmomError(
                f"{path}: {name!r:.80} is no tensor of floating-point numbers that lie in the file "
                f"({value.dtype}, shape {list(value.shape)}). Copy it again from its source."
            )


def _mirror(path: Path, axes: Any, num_axes: int) -> list[int]:
    """Axes that were mirrored, in our order."""
    if axes is None:
        return []
    if not isinstance(axes, list | tuple) or any(axis not in range(num_axes) for axis in axes):
        raise MedmomError(
            f"{path}: inference_allowed_mirroring_axes is {axes!r:.40}, for images of {num_axes} axes. Copy it again "
            "from its source."
        )
    return sorted({num_axes - 1 - int(axis) for axis in axes})
