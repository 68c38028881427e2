from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from medmom.optim import kernels
from medmom.optim.batches import Batch, Batches
from medmom.optim.two_points import TwoPoints, move_, plan

WEIGHTS = ("schedulet", "schedulet_next", "lr_max_squared", "uniform")


class _ScheduleFree(TwoPoints):
    """What the two rules share: the schedule inside, and the weights of the average."""

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], schedule: Callable[[int], float] | None, weights: str
    ) -> None:
        rule = type(self).__name__
        if weights not in WEIGHTS:
            raise ValueError(f"{rule}: weights is {weights!r}; it must be one of {', '.join(WEIGHTS)}.")
        if weights == "schedulet_next" and schedule is None:
            raise ValueError(
                f"{rule}: weights is {weights!r}, but no schedule says what the next learning rate is; "
                "give schedule=, or take 'schedulet'."
            )
        self.schedule, self.weights = schedule, weights
        super().__init__(params, {**defaults, "steps_done": 0})

    @property
    def scalars(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of what both points need, of the sum of w, and of the highest lr so far where w is made of it."""
        own = ("weight_sum", "lr_max") if self.weights == "lr_max_squared" else ("weight_sum",)
        return (*super().scalars, *own)

    def update(self, batches: Batches, loss: Tensor | None) -> None:
        """Takes one step of the formulas above."""
        now, after = self._factors(torch.compiler.is_compiling(), batches.totals["skipped"].device)
        shares = self._shares(batches, now, after)
        self._move(batches, [group["lr"] * now for group in batches.groups], shares)

    def _move(self, batches: Batches, lrs: list[kernels.Number], shares: Tensor) -> None:
        """Moves the parameters, from the step size of each group and the weight of the new z in each x."""
        raise NotImplementedError

    # Compiled in, the count and what is made of it would ask for a new compilation at every step.
    @torch.compiler.disable
    def _factors(self, compiling: bool, device: torch.device) -> tuple[kernels.Number, kernels.Number]:
        """The schedule at this step and at the next; counts the step."""
        done = self.param_groups[0]["steps_done"]
        for group in self.param_groups:
            group["steps_done"] = done + 1
        if self.schedule is None:
            return 1.0, 1.0
        now, after = self.schedule(done), self.schedule(done + 1)
        # Filled on the device: a copy of a number would be waited for.
        return (torch.full((), now, device=device), torch.full((), after, device=device)) if compiling else (now, after)

    def _shares(self, batches: Batches, now: kernels.Number, after: kernels.Number) -> Tensor:
        """Weight of the new z in x, one for each parameter; brings the sums of the weights up to date."""
        shares = []
        for group, span in zip(batches.groups, batches.spans, strict=True):
            if span.start == span.stop:
                continue
            sums = batches.stacked("weight_sum", span)
            weight = torch.ones_like(sums)
            if self.weights == "schedulet":
                weight = weight * group["lr"] * now
            elif self.weights == "schedulet_next":
                weight = weight * group["lr"] * after
            elif self.weights == "lr_max_squared":
                highest = torch.maximum(batches.stacked("lr_max", span), weight * group["lr"] * now)
                torch._foreach_copy_(batches.scalars["lr_max"][span], list(highest.unbind()))
                weight = highest.square()
            sums = sums + weight
            torch._foreach_copy_(batches.scalars["weight_sum"][span], list(sums.unbind()))
            shares.append((weight / sums).masked_fill(sums == 0, 0.0))
        return torch.cat(shares)

    def __getstate__(self) -> dict[str, Any]:
        """What copies are made from: torch's part, and what no group can hold."""
        return {**super().__getstate__(), "schedule": self.schedule, "weights": self.weights}


class ScheduleFreeSGD(_ScheduleFree):
    """Gradient descent with an average of its points in place of a schedule, or beside one.

    With the gradient at y, d = gradient + weight_decay y, and the weight w of this step::

        z <- z - lr d
        x <- (1 - c) x + c z,  c = w / (sum of w so far), and 0 where that is 0 / 0
        y <- (1 - momentum) z + momentum x

    x, y and z start at the parameter, which holds y while training and x after ``eval()``: see ``TwoPoints``. Each
    parameter averages from its own first step on. The weight w follows the learning rate:

    - "schedulet": w = lr of this step. With a schedule that falls over the whole run the average forgets its noise;
      with a constant lr all weights are alike.
    - "schedulet_next": w = lr of the next step, the one that will be taken from the new z, as the proof has it.
    - "lr_max_squared": w = (highest lr so far)^2, as in the authors' package: a warm-up counts less, a decay not.
    - "uniform": w = 1.

    Args:
        params: Parameters, or groups of them.
        lr: Step size; 10 to 50 times what plain gradient descent takes.
        momentum: How near y lies to x, in (0, 1); 0.95 to 0.98 for very long runs.
        schedule: Factor of lr from the number of steps done, such as those of ``medmom.optim.schedules``; not part of
            the state. A step given up for its loss counts as done on a device that is not waited for, else not. A
            scheduler that changes the lr from outside does as well, where w does not look ahead: never use both.
        weights: Which weights the average takes, one of the above; not part of the state either.
        weight_decay: Factor of y that is added to the gradient.
        maximize: Whether to climb.

    Raises:
        ValueError: "schedulet_next" is asked for without a schedule, or an option is out of its range.

    Source:
        Defazio et al. 2024, arXiv:2405.15682, as in schedulefree 1.4.1; weights by the learning rate: Pun, Buchholz and
        Gower 2025, arXiv:2511.07767v1.
    """

    whole = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        schedule: Callable[[int], float] | None = None,
        weights: str = "schedulet",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options, schedule, weights)

    def _move(self, batches: Batches, lrs: list[kernels.Number], shares: Tensor) -> None:
        for batch, moves in plan(batches, lrs, shares):
            move_(batch, batch.grads, lrs[batch.group_index], moves, batch.group["weight_decay"])


class ScheduleFreeAdamW(_ScheduleFree):
    """AdamW with an average of its points in place of a schedule, or beside one.

    As ``ScheduleFreeSGD`` with the first of ``betas``, b1, as momentum, and in place of its d::

        v <- b2 v + (1 - b2) g^2
        m <- i m + (1 - i) g, with i = inner_momentum; 0 keeps no m
        d  = (m / (1 - i^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay y

    where g is the gradient at y, and t counts the steps of the parameter.

    Args:
        params: Parameters, or groups of them.
        lr: Step size; 1 to 10 times what AdamW takes.
        betas: How near y lies to x, in (0, 1), and the share of v that is kept, in [0, 1).
        eps: Added to the denominator.
        inner_momentum: Share of m that is kept, in [0, 1).
        schedule: As in ``ScheduleFreeSGD``.
        weights: As in ``ScheduleFreeSGD``.
        weight_decay: Factor of y that is taken off at every step, times lr.
        maximize: Whether to climb.

    Raises:
        ValueError: "schedulet_next" is asked for without a schedule, or an option is out of its range.

    Source:
        Defazio et al. 2024, arXiv:2405.15682, as in schedulefree 1.4.1; ``inner_momentum`` as in its later versions.
    """

    shared = ("inner_momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2.5e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        inner_momentum: float = 0.0,
        schedule: Callable[[int], float] | None = None,
        weights: str = "schedulet",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "inner_momentum": inner_momentum}
        super().__init__(params, {**options, "weight_decay": weight_decay, "maximize": maximize}, schedule, weights)

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of y - z and v, and of m where there is one."""
        with_average = self.param_groups[0]["inner_momentum"] > 0
        return ("apart", "square", "grad_average") if with_average else ("apart", "square")

    def _move(self, batches: Batches, lrs: list[kernels.Number], shares: Tensor) -> None:
        # The step size is in d already.
        for batch, moves in plan(batches, [1.0] * len(lrs), shares):
            move_(batch, self._steps(batch, lrs[batch.group_index]), 1.0, moves)

    def _steps(self, batch: Batch, lr: kernels.Number) -> list[Tensor]:
        """Lr d of each tensor; brings the moments up to date."""
        group = batch.group
        steps = [torch.zeros_like(p) for p in batch.params]
        averages = batch.state.get("grad_average") or [torch.zeros_like(p) for p in batch.params]
        betas = (group["inner_momentum"], group["betas"][1])
        # What the kernel would do to a parameter at 0 with the opposite lr.
        kernels.adam_(
            batch, batch.grads, averages, batch.state["square"], params=steps, lr=-lr, betas=betas, eps=group["eps"]
        )
        if group["weight_decay"]:
            kernels.add_(steps, batch.params, lr * group["weight_decay"])
        return steps
