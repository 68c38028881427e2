from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from medmom.optim.batches import Batches
from medmom.optim.heavy_ball import heavy_ball_
from medmom.optim.low_rank import Group, LowRankRule
from medmom.optim.tangent import Factors, Tangent


class LowRankHeavyBall(LowRankRule):
    """Polyak's momentum for weights of low rank, ``W = U S V^T``; ``HeavyBall`` for all others.

    With P the projection onto the tangent space at W and T that onto the next one, every step is

        v <- momentum v + P(G + weight_decay W),  W <- the nearest matrix to W - lr v of the rank that tolerance asks
        for,  v <- T(v)

    and with ``local_steps`` K, in bases that stand still for K steps, heavy ball on S alone. With ``nesterov`` the step
    is lr (g + momentum v), as in ``HeavyBall``.

    Args:
        params: Parameters of a network with low-rank layers, or groups of them; factors of a layer stay together.
        lr: Step size.
        momentum: Share of v that is kept, in [0, 1).
        nesterov: Whether to look one momentum step ahead.
        weight_decay: Factor of W that is added to the gradient.
        tolerance: Largest relative error at which W is truncated, in [0, 1).
        local_steps: Steps between two changes of the bases; 0: they move at every step.
        maximize: Whether to climb.

    Source:
        Schotthoefer, Klein & Kusch 2025, arXiv:2506.17475, whose text and code were not to be had: the tangent form is
        derived here, the other follows the group's published practice (arXiv:2205.13571, arXiv:2410.18720).
    """

    buffers = ("velocity",)
    moment = "velocity"
    fused = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        tolerance: float = 0.1,
        local_steps: int = 0,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**options, "tolerance": tolerance, "local_steps": local_steps, "maximize": maximize})

    def update_dense(self, batches: Batches) -> None:
        """Takes the step of ``HeavyBall``."""
        heavy_ball_(batches)

    def train_core(self, group: Group, state: dict[str, Any], s: Tensor, grad: Tensor) -> Tensor:
        """Heavy ball on S."""
        grad = grad + group["weight_decay"] * s
        velocity: Tensor = state["velocity"].mul_(group["momentum"]).add_(grad)
        step = grad + group["momentum"] * velocity if group["nesterov"] else velocity
        return torch.sub(s, step, alpha=group["lr"])

    def tangent_step(
        self, group: Group, state: dict[str, Any], at: Factors, grad: Tangent, moment: Tangent
    ) -> tuple[Factors, Tangent, Tangent]:
        """Heavy ball in the tangent space; W lies in its own."""
        grad = grad._replace(a=grad.a + group["weight_decay"] * at.s)
        velocity = moment.times(group["momentum"]).plus(grad)
        step = grad.plus(velocity, group["momentum"]) if group["nesterov"] else velocity
        return at, step.times(-group["lr"]), velocity
