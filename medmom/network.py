from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from medmom import models
from medmom.errors import MedmomError
from medmom.models.cost import MEMORIES, Cost, choose_memory, measure_cost
from medmom.models.presets import SIZES
from medmom.recipe import Recipe, TrainingRecipe

logger = logging.getLogger(__name__)

GIB = 2**30

FREE_SHARE = 0.9
"""Share of a GPU's free memory that is planned with; the rest is for what convolutions work in."""

DTYPES = {"32": torch.float32, "64": torch.float64, "bf16": torch.bfloat16, "16": torch.float16}
"""What the first half of Lightning's names for precisions stands for."""


def presets() -> list[str]:
    """Lists the presets that segment volumes."""
    # Others classify, or have two axes: what a preset gives stands in its signature.
    kinds = {name: get_type_hints(getattr(models, name))["return"] for name in SIZES}
    return [name for name, size in SIZES.items() if size.spatial_dims == 3 and kinds[name] is models.MomentumUNet]


def training_precision(settings: TrainingRecipe, device: torch.device) -> str:
    """Gives Lightning's name of the precision that a device will train in."""
    if settings.precision is not None:
        return settings.precision
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def build_network(recipe: Recipe, in_channels: int, out_channels: int) -> nn.Module:
    """Makes the recipe's network, with kernels and strides that suit its patch and spacing.

    As long as memory is ``auto``, everything is kept.

    Raises:
        MedmomError: There is no such preset, or it does not suit the patch or the other settings.
    """
    name = recipe.model.preset
    if name not in presets():
        known = ", ".join(presets())
        raise MedmomError(f"model.preset {name}: no network that segments volumes of 3 axes; choose one of {known}.")
    options = asdict(recipe.model)
    for key in ("preset", "memory_limit"):
        del options[key]
    if recipe.model.memory is None:
        del options["memory"]
    elif recipe.model.memory == "auto":
        options["memory"] = "plain"
    try:
        kernels, strides = models.plan_kernels_and_strides(
            recipe.data.patch, recipe.preparation.spacing or (1.0, 1.0, 1.0), len(SIZES[name].channels)
        )
        network: nn.Module = getattr(models, name)(
            in_channels, out_channels, kernels=kernels, strides=strides, **options
        )
    except ValueError as error:
        raise MedmomError(f"model with preset {name}: {error}") from None
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
        MedmomError: The memory does not suit the precision, none fits, or there is no limit to fit into.
    """
    precision = training_precision(recipe.training, device)
    with torch.device("meta"):
        network: Any = build_network(recipe, in_channels, out_channels)
    chosen = recipe.model.memory or network.memory
    limit = _limit(recipe, device) if chosen == "auto" else None
    is_told = logger.isEnabledFor(logging.INFO)
    memories = MEMORIES if is_told or chosen == "auto" else (chosen,)
    cost = _measure(recipe, network, precision, (in_channels, out_channels), memories)
    beside = cost.parameter_bytes * (2 + _optimizer_share(recipe))
    if limit is not None:
        try:
            chosen = choose_memory(cost, limit, beside=beside)
        except ValueError as error:
            raise MedmomError(f"model.memory auto: {error}") from None
    if chosen in cost.refused:
        raise MedmomError(f"model.memory {chosen}, training.precision {precision}: {cost.refused[chosen]}")
    if is_told:
        head = (
            f"{recipe.model.preset}: {_spaced(cost.num_parameters)} parameters, {cost.flops / 1e9:.1f} GFLOP a patch."
        )
        step = f"Planned for a step of {recipe.data.batch_size} patches in {precision}, GiB:"
        logger.info("%s", "\n".join([head, step, *_rows(cost, beside, chosen)]))
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


def _measure(
    recipe: Recipe, network: nn.Module, precision: str, channels: tuple[int, int], memories: Sequence[str]
) -> Cost:
    """Plans a step with the recipe's loss, or, where that needs real values, without it."""
    name, _, kind = precision.partition("-")
    batch = (recipe.data.batch_size, channels[0], *recipe.data.patch)
    loss = copy.deepcopy(recipe.loss).to("meta")

    def of_batch(outputs: Any) -> Tensor:
        label = torch.empty(batch[0], 1, *batch[2:], dtype=torch.uint8, device="meta")
        annotated = torch.empty(batch[0], channels[1], dtype=torch.bool, device="meta")
        value: Tensor = loss(outputs, label, annotated)
        return value

    measure = partial(
        measure_cost,
        network.to(torch.float32 if kind == "mixed" else DTYPES[name]),
        batch,
        mixed=DTYPES[name] if kind == "mixed" else None,
        memories=memories,
    )
    try:
        return measure(loss=of_batch)
    except Exception as error:  # a loss may come from anywhere, and want to see values
        logger.info("%s is left out of the plan (%s).", type(loss).__name__, " ".join(str(error).split())[:100])
        return measure()


def _optimizer_share(recipe: Recipe) -> float:
    """Bytes that the optimizer keeps for each byte of a weight, found on a small one."""
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer: Any = recipe.optimizer([weight])

    def closure() -> Tensor:
        weight.grad = torch.ones_like(weight)
        return weight.detach().sum()

    try:
        optimizer.step(closure)
    except RuntimeError as error:
        raise MedmomError(f"optimizer {type(optimizer).__name__}: {error}; choose another.") from None
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in kept) / weight.nbytes


def _rows(cost: Cost, beside: float, chosen: str) -> Iterator[str]:
    yield f"  {'weights, gradients, optimizer':32}{beside / GIB:9.3f}"
    plain = cost.activations["plain"].peak
    for memory in MEMORIES:
        text = f"  activations, memory {memory:12}"
        if memory in cost.refused:
            yield f"{text}        -         {cost.refused[memory]}"
        else:
            peak = cost.activations[memory].peak
            yield f"{text}{peak / GIB:9.3f}{peak / plain:7.0%}{'  chosen' if memory == chosen else ''}"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
