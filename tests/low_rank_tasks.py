"""Layers of low rank, and losses for them, for the tests of their rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from medmom.models import LowRankLinear
from medmom.optim import LowRankAdam, LowRankHeavyBall
from medmom.optim.low_rank import LowRankRule

RULES: dict[str, Any] = {"heavy ball": LowRankHeavyBall, "adam": LowRankAdam}
LRS = {"heavy ball": 0.05, "adam": 0.05}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_matrix(seed: int, n: int, m: int, rank: int) -> Tensor:
    return torch.mm(normal(seed, n, rank), normal(seed + 1, rank, m)).div(rank**0.5)


def make_layer(
    n: int = 9, m: int = 7, rank: int = 3, *, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any
) -> LowRankLinear:
    """A layer whose weight is any of that rank, without a bias."""
    options = {"gradients": "tangent", "bias": False, **options}
    layer = LowRankLinear(m, n, rank, **options).to(dtype)
    u, values, vt = torch.linalg.svd(normal(seed, n, m), full_matrices=False)
    with torch.no_grad():
        for factor, part in ((layer.u, u[:, :rank]), (layer.s, values[:rank].diag()), (layer.v, vt[:rank].T)):
            factor[: len(part), :rank] = part.to(dtype)
    return layer


def weight_of(layer: LowRankLinear) -> Tensor:
    """With gradients, shape (n, m)."""
    weight: Tensor = layer(torch.eye(len(layer.v), dtype=layer.v.dtype)).T
    return weight


def bowl(weight: Tensor, step: int, *, rank: int = 5) -> Tensor:
    """Noisy least squares around a target of that rank: another curvature at every step."""
    n, m = weight.shape
    inputs = (normal(1000 + step, m, m) * 0.3 + torch.eye(m, dtype=torch.float64)).to(weight.dtype)
    error: Tensor = (weight - make_matrix(77, n, m, rank).to(weight.dtype)) @ inputs
    return error.square().sum().div(2)


def walk(
    layer: LowRankLinear,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    loss_of: Callable[[Tensor, int], Tensor] = bowl,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(weight_of(layer), step)
        torch.autograd.backward(loss)
        optimizer.step()


def build(rule: str, layer: nn.Module, **options: Any) -> LowRankRule:
    made: LowRankRule = RULES[rule](layer.parameters(), **{"lr": LRS[rule], "tolerance": 1e-3, **options})
    return made


def moment_of(rule: LowRankRule, layer: LowRankLinear, name: str | None = None) -> Tensor:
    """The averaged gradient as a matrix, shape (n, m)."""
    name, r = name or rule.moment, layer.rank
    u, v = layer.u.detach()[:, :r], layer.v.detach()[:, :r]
    found: Tensor = u @ rule.state[layer.s][name][:r, :r] @ v.T
    if name in rule.state[layer.u]:
        found = found + rule.state[layer.u][name][:, :r] @ v.T + u @ rule.state[layer.v][name][:, :r].T
    return found
