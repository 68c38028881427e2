from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medmom.optim import HeavyBall

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.0},
    {"momentum": 0.99, "nesterov": True},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "nesterov": True},
    {"maximize": True},
]


def trained(rule: Any, dtype: torch.dtype, **options: Any) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in [(4, 3), (5,), (2, 3, 3)]]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.03, "weight_decay": 0.0}]
    optimizer = rule(groups, **{"lr": 0.01, "momentum": 0.9, **options})
    for _ in range(60):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype) + p.detach()
        optimizer.step()
    return params


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_sixty_steps_equal_those_of_torch(options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = trained(HeavyBall, dtype, **options), trained(torch.optim.SGD, dtype, **options)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_step_is_the_formula() -> None:
    w = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = HeavyBall([w], lr=0.1, momentum=0.5)
    v, expected = torch.zeros_like(w), w.detach().clone()
    for grad in torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.25, 0.0]], dtype=torch.float64):
        w.grad = grad
        optimizer.step()
        v = 0.5 * v + grad
        expected = expected - 0.1 * v
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-15)


def test_half_precision_keeps_what_torch_rounds_away() -> None:
    ours, theirs = (nn.Parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(2))
    exact = 0.0
    mine, torchs = HeavyBall([ours], lr=0.0, momentum=0.999), torch.optim.SGD([theirs], lr=0.0, momentum=0.999)
    for _ in range(2000):
        for p, optimizer in ((ours, mine), (theirs, torchs)):
            p.grad = torch.full_like(p, 0.001)
            optimizer.step()
        exact = 0.999 * exact + ours.grad.item()  # type: ignore[union-attr]
    assert mine.state[ours]["velocity"].item() == pytest.approx(exact, rel=1e-4)
    assert abs(torchs.state[theirs]["momentum_buffer"].item() - exact) > 0.1 * exact


def test_velocity_is_the_last_gradient_where_momentum_was_zero() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = HeavyBall([w], lr=0.1, momentum=0.0, nesterov=True)
    for _ in range(2):
        w.grad = torch.tensor([1.0, -2.0])
        optimizer.step()
    assert optimizer.state[w]["velocity"].tolist() == [1, -2]
    torch.testing.assert_close(w.detach(), torch.tensor([0.8, 1.4]))
