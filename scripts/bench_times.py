# mypy: disable-error-code="no-untyped-call"
"""Times of steps that run in turns, and ratios of them with an interval."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm


class Ratio(NamedTuple):
    """A ratio of medians with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "1" if self == (1, 1, 1) else f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, label: str = ""
) -> dict[str, list[float]]:
    """Times in ms: every round runs every step once, each round beginning with the next; one round before is not kept.

    Args:
        steps: By name.
        rounds: How many times each is run.
        device: On a GPU events are timed.
        label: Of the bar that shows progress.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(rounds + 1) * len(names), desc=label, disable=None, leave=False) as bar:
        for number in range(-1, rounds):
            first = max(number, 0) % max(1, len(names))
            for name in names[first:] + names[:first]:
                duration = _milliseconds(steps[name], device)
                bar.update()
                if number >= 0:
                    times[name].append(duration)
    return times


def _milliseconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = perf_counter()
        step()
        return 1000 * (perf_counter() - begin)
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin_event.record()
    step()
    end_event.record()
    torch.cuda.synchronize(device)
    return float(begin_event.elapsed_time(end_event))


def ratio_of_medians(times: list[float], base: list[float], *, draws: int = 4000, seed: int = 0) -> Ratio:
    """Median of the times over that of the base, with the interval of a bootstrap over rounds.

    Args:
        times: By round.
        base: Of the same rounds: what slowed one of a pair slowed the other.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    a, b = np.asarray(times), np.asarray(base)
    rounds = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    drawn = np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))
