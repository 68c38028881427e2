from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from medmom.optim.batches import Batches
from medmom.optim.kernels import adam_
from medmom.optim.low_rank import Group, LowRankRule
from medmom.optim.tangent import Factors, Tangent, turn_squares


class LowRankAdam(LowRankRule):
    """Adam for weights of low rank, ``W = U S V^T``; AdamW for all others.

    With ``local_steps`` K the bases stand still for K steps, in which S is trained by AdamW,

        m <- b1 m + (1 - b1) g,  q <- b2 q + (1 - b2) g^2,  S <- (1 - lr weight_decay) S - lr m^ / (sqrt(q^) + eps)

    with the corrections m^ = m / (1 - b1^t) and q^ = q / (1 - b2^t). Into other bases m turns as a matrix, A m B^T, and
    q as the mean squares of uncorrelated numbers do, with the squares of all entries: A^2 q (B^2)^T.

    With ``local_steps`` 0 the bases move at every step. Squares of single numbers mean nothing in a tangent space that
    turns, so one mean square of the whole gradient stands for all, of G's size n x m:

        m <- b1 T(m) + (1 - b1) P(G),  q <- b2 q + (1 - b2) |P(G)|^2 / (n m),  step -lr m^ / (sqrt(q^) + eps)

    An entry of W then moves by about lr, as in AdamW.

    Args:
        params: Parameters of a network with low-rank layers, or groups of them; factors of a layer stay together.
        lr: Step size.
        betas: Shares of the averages that are kept, each in [0, 1).
        eps: Added to the root.
        weight_decay: Share of W, times lr, that is taken off at each step.
        tolerance: Largest relative error at which W is truncated, in [0, 1).
        local_steps: Steps between two changes of the bases; 0: they move at every step.
        maximize: Whether to climb.

    Source:
        Schotthoefer, Klein & Kusch 2025, arXiv:2506.17475, whose text and code were not to be had; the first form is
        the same group's practice (RobustDLRT, after arXiv:2205.13571) but for q, which turns there by its root,
        (A sqrt(q) B^T)^2: that may cancel to nothing, and the next step is hundreds of lr long. The second is derived
        here with the scalar second moment of Becigneul & Ganea 2019, arXiv:1810.00760.
    """

    buffers = ("average", "square")
    moment = "average"
    fused = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        tolerance: float = 0.1,
        local_steps: int = 0,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "tolerance": tolerance, "local_steps": local_steps, "maximize": maximize})

    def update_dense(self, batches: Batches) -> None:
        """Takes the step of AdamW."""
        for batch in batches:
            options = {name: batch.group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            adam_(batch, batch.grads, batch.state["average"], batch.state["square"], decoupled=True, **options)

    def cores(self) -> tuple[str, ...]:
        """Both moments."""
        return ("average", "square")

    def turned(self, name: str, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The average as a matrix, squares as mean squares."""
        return turn_squares(core, left, right) if name == "square" else super().turned(name, core, left, right)

    def train_core(self, group: Group, state: dict[str, Any], s: Tensor, grad: Tensor) -> Tensor:
        """AdamW on S."""
        (b1, b2), lr = group["betas"], group["lr"]
        first, second = _corrections(group, state)
        average: Tensor = state["average"].lerp_(grad, 1 - b1)
        square: Tensor = state["square"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        step = average / first / ((square / second).sqrt() + group["eps"])
        return torch.sub(s * (1 - lr * group["weight_decay"]), step, alpha=lr)

    def tangent_step(
        self, group: Group, state: dict[str, Any], at: Factors, grad: Tangent, moment: Tangent
    ) -> tuple[Factors, Tangent, Tangent]:
        """Adam in the tangent space, with one second moment for the whole weight."""
        (b1, b2), lr = group["betas"], group["lr"]
        first, second = _corrections(group, state)
        average = moment.times(b1).plus(grad, 1 - b1)
        mean = grad.square_norm() / (len(at.u) * len(at.v))
        square = state.setdefault("mean_square", torch.zeros_like(mean)).lerp_(mean, 1 - b2)
        step = average.times(-lr / first / ((square / second).sqrt() + group["eps"]))
        return at._replace(s=at.s * (1 - lr * group["weight_decay"])), step, average


def _corrections(group: Group, state: dict[str, Any]) -> tuple[float, float]:
    """What the averages from zero have gathered of their weight by now: 1 - b^t."""
    step = float(state["step"])
    b1, b2 = group["betas"]
    return 1 - b1**step, 1 - b2**step
