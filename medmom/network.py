from __future__ import annotations

import inspect
import logging
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from medmom import models
from medmom.errors import MedmomError
from medmom.models.cost import MEMORIES, choose_memory
from medmom.models.factorise import to_low_rank
from medmom.models.low_rank import Gradients
from medmom.models.presets import CLASSIFIER_SIZES, SIZES
from medmom.recipe import ModelRecipe, Recipe, TrainingRecipe
from medmom.step_cost import GIB, describe_step, measure_step, optimizer_share

logger = logging.getLogger(__name__)

Job = Literal["segmentation", "classification"]

FREE_SHARE = 0.9
"""Share of a GPU's free memory that is planned with; the rest is for what convolutions work in."""


class _Preset(NamedTuple):
    job: Job
    spatial_dims: int
    kind: type[nn.Module]


_PRESETS = {
    **{name: _Preset("segmentation", size.spatial_dims, models.MomentumUNet) for name, size in SIZES.items()},
    "paper2d": _Preset("segmentation", 2, models.Paper2D),
    "transnetr": _Preset("segmentation", 2, models.TransNetR),
    **{
        name: _Preset("classification", size.spatial_dims, models.MomentumResNet)
        for name, size in CLASSIFIER_SIZES.items()
    },
}

_NO_OPTIONS = ("preset", "memory_limit", "pooling", "low_rank", "init_from")
"""Keys of a recipe's model that say something else than how its preset is made."""


def presets(job: Job | None = None, spatial_dims: int | None = None) -> list[str]:
    """Lists the names that ``model.preset`` takes, of one job and for patches of so many edges, or of any."""
    return [
        name
        for name, preset in _PRESETS.items()
        if job in (None, preset.job) and spatial_dims in (None, preset.spatial_dims)
    ]


def job_of(recipe: Recipe) -> Job:
    """Says what a recipe's network is for.

    Raises:
        MedmomError: There is no such preset, or it does not suit the edges of the patch.
    """
    return _preset(recipe).job


def training_precision(settings: TrainingRecipe, device: torch.device) -> str:
    """Gives Lightning's name of the precision that a device will train in."""
    if settings.precision is not None:
        return settings.precision
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def build_network(recipe: Recipe, in_channels: int, out_channels: int) -> nn.Module:
    """Makes the recipe's network, with kernels and strides that suit its patch and spacing.

    Where ``data.slices`` is given, it classifies volumes by their slices. As long as memory is ``auto``, everything is
    kept. Settings that a network does not know are left out while they have their defaults.

    Raises:
        MedmomError: There is no such preset, or it does not suit the patch or the other settings.
    """
    name, preset = recipe.model.preset, _preset(recipe)
    _check_slices(recipe)
    make = partial(_make, recipe, preset, (in_channels, out_channels), _options(recipe, preset))
    try:
        if recipe.data.slices is None:
            return _factored(recipe, make())
        # On the meta device its first weights take no time, and no random numbers.
        with torch.device("meta"):
            backbone: Any = make()
        return _factored(recipe, models.SliceClassifier(**backbone.arguments, pooling=recipe.model.pooling))
    except ValueError as error:
        raise MedmomError(f"model with preset {name}: {error}") from None


def _factored(recipe: Recipe, network: nn.Module) -> nn.Module:
    """The network with weights of low rank, where the recipe wants it, as its optimizer needs them."""
    if recipe.model.low_rank is None:
        return network
    # A low-rank rule says how much room it wants; any other trains the factors as they are.
    room = getattr(recipe.optimizer([nn.Parameter(torch.zeros(1, 1, device="cpu"))]), "room", None)
    gradients: Gradients = "factors" if room is None else "tangent"
    return to_low_rank(network, recipe.model.low_rank, gradients=gradients, room=room or 1, keep_norm=True)


def _preset(recipe: Recipe) -> _Preset:
    name, edges = recipe.model.preset, len(recipe.data.patch)
    known = _PRESETS.get(name)
    fitting = ", ".join(presets(known and known.job, edges))
    patch = f"data.patch {list(recipe.data.patch)} has {edges} edges"
    if known is None:
        raise MedmomError(f"model.preset {name}: no such network; {patch}, for which there are {fitting}.")
    if known.spatial_dims != edges:
        raise MedmomError(
            f"model.preset {name}: a network of {known.spatial_dims} axes, but {patch}; choose one of {fitting}, or a "
            f"patch of {known.spatial_dims} edges."
        )
    return known


def _check_slices(recipe: Recipe) -> None:
    slices, fitting = recipe.data.slices, presets("classification", 2)
    if slices is not None and recipe.model.preset not in fitting:
        raise MedmomError(
            f"data.slices {slices}: {recipe.model.preset} does not classify volumes by their slices; set it to null, "
            f"or choose one of {', '.join(fitting)}."
        )
    if slices is None and recipe.model.pooling != ModelRecipe.pooling:
        raise MedmomError(
            f"model.pooling {recipe.model.pooling}: there are no slices to pool; say with data.slices how many of each "
            "volume are looked at, or leave the key out."
        )


def _options(recipe: Recipe, preset: _Preset) -> dict[str, Any]:
    """Settings of the recipe that the network takes, but for those that are left to its preset."""
    # Any network can keep everything, and some can do nothing else.
    everything = (("memory", "plain"), ("memory", "auto"))
    takes, plain = inspect.signature(preset.kind).parameters, ModelRecipe()
    options: dict[str, Any] = {}
    for key, value in asdict(recipe.model).items():
        if key in _NO_OPTIONS or value is None:
            continue
        if key in takes:
            options[key] = "plain" if (key, value) == ("memory", "auto") else value
        elif value != getattr(plain, key) and (key, value) not in everything:
            raise MedmomError(f"model.{key} {value}: {recipe.model.preset} knows no {key}; leave the key out.")
    return options


def _make(recipe: Recipe, preset: _Preset, channels: tuple[int, int], options: dict[str, Any]) -> nn.Module:
    network: nn.Module
    if preset.kind in (models.Paper2D, models.TransNetR):
        network = preset.kind(*channels, **options)
        return network
    name, patch = recipe.model.preset, recipe.data.patch
    # A classifier's stem may halve a patch once more: the mean over its last stage can do with 2 voxels an edge.
    num_stages = len({**SIZES, **CLASSIFIER_SIZES}[name].channels)
    spacing = (recipe.preparation.spacing or (1.0, 1.0, 1.0))[: len(patch)]
    kernels, strides = models.plan_kernels_and_strides(patch, spacing, num_stages)
    network = getattr(models, name)(*channels, kernels=kernels, strides=strides, **options)
    return network


def plan_memory(recipe: Recipe, in_channels: int, out_channels: int, device: torch.device) -> str:
    """Gives the memory with which a network is trained, and tells what every one would take.

    Where nobody listens to what is told, only what the choice needs is planned.

    Args:
        recipe: What to train.
        in_channels: Image channels.
        out_channels: Classes.
        device: Where.

    Returns:
        The memory: the recipe's, or where that is ``auto`` the fastest that fits.

    Raises:
        MedmomError: The memory does not suit the precision, none fits, there is no limit to fit into, or the loss is
            one for another job.
    """
    _check_loss(recipe)
    precision = training_precision(recipe.training, device)
    with torch.device("meta"):
        network: Any = build_network(recipe, in_channels, out_channels)
    # A network that has no choice keeps everything.
    every = MEMORIES if hasattr(network, "memory") else ("plain",)
    own: str = getattr(network, "memory", "plain")
    chosen: str = recipe.model.memory or own
    limit = _limit(recipe, device) if chosen == "auto" else None
    is_told = logger.isEnabledFor(logging.INFO)
    memories = every if is_told or chosen == "auto" else (chosen,)
    cost = measure_step(recipe, network, (in_channels, out_channels), precision=precision, memories=memories)
    beside = cost.parameter_bytes * (2 + optimizer_share(recipe))
    if limit is not None:
        try:
            chosen = choose_memory(cost, limit, beside=beside)
        except ValueError as error:
            raise MedmomError(f"model.memory auto: {error}") from None
    if chosen in cost.refused:
        raise MedmomError(f"model.memory {chosen}, training.precision {precision}: {cost.refused[chosen]}")
    if is_told:
        logger.info("%s", describe_step(recipe, cost, beside, precision=precision, chosen=chosen))
    return chosen


def _limit(recipe: Recipe, device: torch.device) -> float:
    if recipe.model.memory_limit is not None:
        return recipe.model.memory_limit * GIB
    if device.type != "cuda":
        raise MedmomError(
            f"model.memory auto: device {device.type} has no memory of its own to fit into; say --model.memory_limit "
            "GIB, or name a memory."
        )
    return FREE_SHARE * torch.cuda.mem_get_info(device)[0]


def _check_loss(recipe: Recipe) -> None:
    """Refuses a loss that is called with other things than those that the job has."""
    given, fitting = {
        "segmentation": (("outputs", "label", "annotated"), "medmom.tasks.losses.DiceCrossEntropy"),
        "classification": (("logits", "target"), "medmom.tasks.class_losses.ClassificationLoss"),
    }[job_of(recipe)]
    try:
        inspect.signature(recipe.loss.forward).bind(*given)
    except TypeError:
        raise MedmomError(
            f"loss {type(recipe.loss).__name__}: is not called with {' and '.join(given)}, as {recipe.model.preset} "
            f"needs; take {fitting}."
        ) from None
