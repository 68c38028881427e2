from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from medmom.optim import kernels
from medmom.optim.batches import Batch, Batches, is_readable, local
from medmom.optim.engine import MomentumOptimizer


class TwoPoints(MomentumOptimizer):
    """A rule that trains at one point and is judged at another, as schedule-free rules do.

    A base sequence z takes the steps, x is a weighted average of it, and gradients belong to a point between them::

        y = (1 - b) z + b x

    where b is ``momentum``, or the first of ``betas``. Parameters hold y while training and x after ``eval()``;
    ``train()`` goes back. Both may be called at any time and more than once. Validate, save and export at x; a saved
    state says at which point it was saved. A parameter that has not been trained yet is at x, y and z alike.
    Statistics of batch norm are those of y: let some batches renew them at x before it is judged. Parameters of half
    precision round all three: keep them in float32, under autocast.

    The state keeps y - z, as ``unit`` times ``apart``. A step lr of z along d, and a share c of the new z in x, are::

        y - z <- y - z + b lr d
        y     <- y - (1 - b) lr d - c (y - z)
        y - z <- (1 - c) (y - z)

    With a unit q = sqrt((1 - b) lr unit / c) for the new y - z, this is one step of Nesterov's kernel::

        apart <- (unit / q) apart + (b lr / q) d
        y     <- y - (1 - b) lr (d + (unit / q) apart)
        unit  <- (1 - c) q
    """

    buffers = ("apart",)
    scalars = ("unit",)

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "evaluating": False})

    def train(self) -> None:
        """Brings the parameters to y, where the next gradients are to be taken."""
        self._switch(False)

    def eval(self) -> None:
        """Brings the parameters to x, the average: the weights that count."""
        self._switch(True)

    @torch.no_grad()
    def _switch(self, evaluating: bool) -> None:
        for group in self.param_groups:
            if group["evaluating"] == evaluating:
                continue
            b = momentum_of(group)
            # x = y + (1/b - 1)(y - z).
            weight = (1 / b - 1) * (1 if evaluating else -1)
            for p in group["params"]:
                if "apart" in self.state.get(p, {}):
                    point, apart = local(p), local(self.state[p]["apart"])
                    point.copy_(point.to(apart.dtype) + apart * (self.state[p]["unit"] * weight))
            group["evaluating"] = evaluating

    def check_ready(self) -> None:
        """Refuses a step at x, where gradients mean nothing to the rule.

        Raises:
            RuntimeError: The parameters are at x.
        """
        if any(group["evaluating"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__} was asked for a step at the averaged weights, after eval(): "
                "call train() before the gradients are taken."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; not trained yet, they are at both points.

        Args:
            param_group: ``params`` and the options in which the group differs from the defaults.

        Raises:
            ValueError: An option is out of its range, or differs where all groups must agree.
        """
        b = momentum_of({**self.defaults, **param_group})
        if b == 0:
            raise ValueError(
                f"{type(self).__name__}: momentum is {b}; it must lie in (0, 1), for x cannot be told from y and z "
                "without it."
            )
        super().add_param_group(param_group)


def momentum_of(group: dict[str, Any]) -> float:
    """How near y lies to x, from the options of a group."""
    b: float = group["betas"][0] if "betas" in group else group["momentum"]
    return b


class Move(NamedTuple):
    """How a tensor takes its step: floats where they can be read without waiting for a device, else 0-dim tensors.

    Attributes:
        unit: Of ``apart`` before the step.
        next_unit: q above, or 1 where there is none: at a first step, and where lr or c is 0.
        share: c, the weight of the new z in x.
    """

    unit: kernels.Number
    next_unit: kernels.Number
    share: kernels.Number


def plan(batches: Batches, lrs: Sequence[kernels.Number], shares: Tensor) -> Iterator[tuple[Batch, list[Move]]]:
    """Each batch with the moves of its tensors; brings the units up to date.

    Args:
        batches: What to walk over.
        lrs: For each group, its step size.
        shares: One for each parameter that has a gradient, in the order of the groups.

    Yields:
        What ``move_`` takes.
    """
    units, after = batches.stacked("unit"), torch.ones_like(shares)
    if is_readable(shares):
        pulls = [(1 - momentum_of(group)) * lr for group, lr in zip(batches.groups, lrs, strict=True)]
        counts = torch.tensor([span.stop - span.start for span in batches.spans])
        pull = torch.tensor(pulls, dtype=torch.float64).repeat_interleave(counts)
        after = (pull * units / shares).sqrt()
        after = torch.where(after.isfinite() & (after > 0), after, 1.0)
    torch._foreach_copy_(batches.scalars["unit"], list(((1 - shares) * after).unbind()))
    moves = torch.stack([units, after, shares])
    as_floats = [Move(*row) for row in moves.T.tolist()] if is_readable(shares) else None
    owners = iter(batches.owners)
    for batch in batches:
        found = as_floats or [Move(*row) for row in zip(*moves.to(batch.params[0]).unbind(), strict=True)]
        yield batch, [found[next(owners)] for _ in batch.params]


def move_(batch: Batch, terms: list[Tensor], lr: kernels.Number, moves: list[Move], weight_decay: float = 0.0) -> None:
    """Lets z take a step, x a share of the new z, and y follow, in place: the formulas of ``TwoPoints``.

    Args:
        batch: What to change.
        terms: d, of the batch's shapes.
        lr: Step size.
        moves: Of the batch's tensors, from ``plan``.
        weight_decay: Factor of y that is added to d.
    """
    if not isinstance(moves[0].share, float):
        _move_plainly_(batch, kernels.decayed(terms, batch.params, weight_decay), lr, moves)
        return
    begin, b = 0, momentum_of(batch.group)
    # Parameters that have been trained from the beginning move alike.
    for move, alike in groupby(moves):
        part = slice(begin, begin + len(list(alike)))
        begin = part.stop
        run = batch.part(part)._replace(grads=terms[part])
        if move.next_unit == 1:
            _move_plainly_(run, kernels.decayed(run.grads, run.params, weight_decay), lr, moves[part])
            continue
        kernels.sgd_(
            run,
            run.state["apart"],
            lr=(1 - b) * float(lr),
            momentum=move.unit / move.next_unit,
            dampening=1 - b * float(lr) / move.next_unit,
            nesterov=True,
            weight_decay=weight_decay,
        )


def _move_plainly_(batch: Batch, terms: list[Tensor], lr: kernels.Number, moves: list[Move]) -> None:
    """The same from any unit, to a unit of 1."""
    apart, b = batch.state["apart"], momentum_of(batch.group)
    torch._foreach_mul_(apart, [move.unit for move in moves])
    kernels.add_(apart, terms, b * lr)
    kernels.add_(batch.params, terms, -(1 - b) * lr)
    torch._foreach_sub_(batch.params, torch._foreach_mul(apart, [move.share for move in moves]))
