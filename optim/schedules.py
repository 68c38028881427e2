from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def polynomial(total_steps: int, *, power: float = 0.9, warmup_steps: int = 0) -> Schedule:
    """Factor of the learning rate that falls as (1 - progress)^power, for ``LambdaLR``.

    Args:
        total_steps: Steps of the whole training, warm-up included; from there on the factor is 0.
        power: 1 falls on a straight line, less stays high longer.
        warmup_steps: Steps over which the factor first climbs on a straight line, from 1 / warmup_steps to 1.

    Returns:
        A function from the number of steps done to a factor in [0, 1].

    Raises:
        ValueError: ``total_steps`` is not greater than ``warmup_steps``, or a number is negative.

    Source:
        Chen et al. 2018, doi:10.1109/TPAMI.2017.2699184 (the "poly" policy); the default as in nnU-Net.
    """
    if power < 0:
        raise ValueError(f"power is {power}; it must not be negative.")
    return _schedule(total_steps, warmup_steps, lambda progress: (1 - progress) ** power)


def cosine(total_steps: int, *, warmup_steps: int = 0, floor: float = 0.0) -> Schedule:
    """Factor of the learning rate that falls as half a cosine wave, for ``LambdaLR``.

    Args:
        total_steps: Steps of the whole training, warm-up included; from there on the factor is ``floor``.
        warmup_steps: Steps over which the factor first climbs on a straight line, from 1 / warmup_steps to 1.
        floor: Where it ends, in [0, 1].

    Returns:
        A function from the number of steps done to a factor in [0, 1].

    Raises:
        ValueError: ``total_steps`` is not greater than ``warmup_steps``, or a number is out of its range.

    Source:
        Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor}; it must lie in [0, 1].")
    return _schedule(total_steps, warmup_steps, lambda p: floor + (1 - floor) * (1 + math.cos(math.pi * p)) / 2)


def warmup_stable_decay(total_steps: int, *, warmup_steps: int = 0, decay: float = 0.2) -> Schedule:
    """Factor of the learning rate that stays at 1 and falls on a straight line at the end, for ``LambdaLR``.

    Until the fall begins the course does not depend on the end: a run can be made longer from a checkpoint before it.

    Args:
        total_steps: Steps of the whole training, warm-up included; from there on the factor is 0.
        warmup_steps: Steps over which the factor first climbs on a straight line, from 1 / warmup_steps to 1.
        decay: Share of ``total_steps`` over which it falls, in (0, 1]; of what the warm-up leaves, where that is less.

    Returns:
        A function from the number of steps done to a factor in [0, 1].

    Raises:
        ValueError: ``total_steps`` is not greater than ``warmup_steps``, or a number is out of its range.

    Source:
        Hu et al. 2024, arXiv:2404.06395, with a straight fall; Hägele et al. 2024, arXiv:2405.18392, on
        its length.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; it must lie in (0, 1].")
    fall_steps = min(decay * total_steps, total_steps - warmup_steps)
    return _schedule(total_steps, warmup_steps, lambda p: min(1.0, (1 - p) * (total_steps - warmup_steps) / fall_steps))


def _schedule(total_steps: int, warmup_steps: int, fall: Callable[[float], float]) -> Schedule:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} and total_steps {total_steps}; the warm-up must end before the training."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return fall(min(1.0, (step - warmup_steps) / (total_steps - warmup_steps)))

    return factor
