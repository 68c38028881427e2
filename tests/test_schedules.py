from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from medmom.optim.schedules import cosine, polynomial, warmup_stable_decay


def test_polynomial_falls_by_its_power() -> None:
    factor = polynomial(100)
    assert [factor(step) for step in (0, 50, 100)] == pytest.approx([1, 0.5**0.9, 0])
    assert polynomial(100, power=1)(25) == pytest.approx(0.75)


def test_cosine_is_half_a_wave() -> None:
    factor = cosine(100, floor=0.1)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2 for progress in (0, 0.3, 0.5, 1)]
    assert [factor(step) for step in (0, 30, 50, 100)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", [polynomial, cosine])
def test_warm_up_climbs_to_one_and_the_fall_begins_there(schedule: Callable[..., Callable[[int], float]]) -> None:
    factor = schedule(20, warmup_steps=4)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    rest = [factor(step) for step in range(4, 21)]
    assert rest == [schedule(16)(step) for step in range(17)]
    assert all(a > b for a, b in pairwise(rest))


def test_stable_schedule_falls_only_at_its_end() -> None:
    factor = warmup_stable_decay(100, warmup_steps=10, decay=0.2)
    assert [factor(step) for step in (0, 9, 10, 79, 80)] == pytest.approx([0.1, 1, 1, 1, 1])
    assert [factor(step) for step in (81, 90, 99, 100)] == pytest.approx([0.95, 0.5, 0.05, 0])


def test_course_before_the_fall_does_not_depend_on_the_end() -> None:
    short, long = (warmup_stable_decay(steps, warmup_steps=5) for steps in (50, 200))
    assert [short(step) for step in range(41)] == [long(step) for step in range(41)]


def test_fall_longer_than_what_the_warm_up_leaves_begins_behind_it() -> None:
    factor = warmup_stable_decay(10, warmup_steps=5, decay=1)
    assert [factor(step) for step in range(4, 11)] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2, 0])


@pytest.mark.parametrize("schedule", [polynomial, cosine, warmup_stable_decay])
def test_factor_stays_at_its_end(schedule: Callable[..., Callable[[int], float]]) -> None:
    assert schedule(10)(10) == schedule(10)(11) == schedule(10)(1000) == 0


@pytest.mark.parametrize("schedule", [polynomial, cosine, warmup_stable_decay])
def test_schedule_drives_a_lambda_lr(schedule: Callable[..., Callable[[int], float]]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(3))
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * schedule(3)(step) for step in range(4)])


@pytest.mark.parametrize(
    "build, options, message",
    [
        (polynomial, {"total_steps": 0}, r"total_steps 0; the warm-up must end before"),
        (cosine, {"total_steps": 5, "warmup_steps": 5}, r"warmup_steps is 5 and total_steps 5"),
        (cosine, {"total_steps": 5, "warmup_steps": -1}, r"warmup_steps is -1"),
        (polynomial, {"total_steps": 5, "power": -1.0}, r"power is -1\.0; it must not be negative"),
        (cosine, {"total_steps": 5, "floor": 2.0}, r"floor is 2\.0; it must lie in \[0, 1\]"),
        (warmup_stable_decay, {"total_steps": 5, "decay": 0.0}, r"decay is 0\.0; it must lie in \(0, 1\]"),
        (warmup_stable_decay, {"total_steps": 5, "warmup_steps": 5}, r"warmup_steps is 5 and total_steps 5"),
    ],
)
def test_impossible_schedules_are_refused(build: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
