from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medmom.errors import MedmomError
from medmom.models.cost import MEMORIES, Cost, measure_cost
from medmom.recipe import Recipe

logger = logging.getLogger(__name__)

GIB = 2**30

DTYPES = {"32": torch.float32, "64": torch.float64, "bf16": torch.bfloat16, "16": torch.float16}
"""What the first half of Lightning's names for precisions stands for."""


def measure_step(
    recipe: Recipe, network: nn.Module, channels: tuple[int, int], *, precision: str, memories: Sequence[str]
) -> Cost:
    """Plans a training step with the recipe's loss, or, where that needs real values, without it.

    Args:
        recipe: What to train.
        network: Its network, on any device; its weights are brought to the precision.
        channels: Image channels, and classes.
        precision: Lightning's name of it.
        memories: Those to be planned.

    Returns:
        The cost.
    """
    name, _, kind = precision.partition("-")
    num_images, (num_channels, num_classes) = recipe.data.batch_size, channels
    slices = () if recipe.data.slices is None else (recipe.data.slices,)
    batch = (num_images, num_channels, *recipe.data.patch, *slices)
    loss = copy.deepcopy(recipe.loss).to("meta")

    def of_batch(outputs: Any) -> Tensor:
        wanted: tuple[Tensor, ...]
        if isinstance(outputs, Tensor) and outputs.ndim == 2:
            wanted = (torch.empty(num_images, num_classes, device="meta"),)
        else:
            label = torch.empty(num_images, 1, *batch[2:], dtype=torch.uint8, device="meta")
            wanted = (label, torch.empty(num_images, num_classes, dtype=torch.bool, device="meta"))
        value: Tensor = loss(outputs, *wanted)
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


def optimizer_share(recipe: Recipe) -> float:
    """Gives the bytes that the optimizer keeps for each byte of a weight, found on a small one.

    Raises:
        MedmomError: It refuses to step on plain gradients.
    """
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


def describe_step(recipe: Recipe, cost: Cost, beside: float, *, precision: str, chosen: str) -> str:
    """Tells for people what a training step takes with every memory that was planned, a line each.

    Args:
        recipe: What is trained.
        cost: Of its network.
        beside: Bytes of weights, gradients and optimizer.
        precision: Lightning's name of it.
        chosen: The memory that is marked.
    """
    size = f"{_spaced(cost.num_parameters)} parameters, {cost.flops / 1e9:.1f} GFLOP a patch"
    step = f"Planned for a step of {recipe.data.batch_size} patches in {precision}, GiB:"
    return "\n".join([f"{recipe.model.preset}: {size}.", step, *_rows(cost, beside, chosen)])


def _rows(cost: Cost, beside: float, chosen: str) -> Iterator[str]:
    yield f"  {'weights, gradients, optimizer':32}{beside / GIB:9.3f}"
    plain = cost.activations["plain"].peak
    for memory in (memory for memory in MEMORIES if memory in {**cost.activations, **cost.refused}):
        text = f"  activations, memory {memory:12}"
        if memory in cost.refused:
            yield f"{text}        -         {cost.refused[memory]}"
        else:
            peak = cost.activations[memory].peak
            yield f"{text}{peak / GIB:9.3f}{peak / plain:7.0%}{'  chosen' if memory == chosen else ''}"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
