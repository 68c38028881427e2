from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from medmom.optim.batches import WIDER, Batches, alike, flat, local, over_processes

# Each option must lie in [0, limit), one by one where it is a tuple.
LIMITS = {
    **dict.fromkeys(("lr", "weight_decay", "eps"), math.inf),
    **dict.fromkeys(("momentum", "inner_momentum", "beta", "betas"), 1.0),
}


class MomentumOptimizer(Optimizer):
    """A rule is its ``update``; all that users may expect of every rule is kept here.

    A rule names its state, writes ``update`` in flat lists of tensors and keeps nothing on ``self``. Its options are
    keyword arguments, handed on as ``defaults``; ``maximize`` is one of them.

    A parameter without a gradient is left alone; its state is started with its first gradient. Where the loss is NaN
    or infinite, nothing moves and no state changes, but the first parameter's state counts it in ``skipped``; off the
    CPU the device decides this without being waited for, except at a step that starts some state. Gradients are not
    searched for NaN. State of half-precision parameters is float32, also after loading. With ``torch.distributed``
    initialised, the loss is averaged over the processes, so all of them must step together.

    Attributes:
        buffers: State shaped like the parameter, zeros unless ``start`` says otherwise.
        scalars: State of one number a parameter, 0 at first. ``step``, the count of its updates, is always there.
        totals: State of one number for the whole optimizer, 0 at first; kept with the first parameter.
        shared: Options that must be the same in all groups.
        reported: Which totals ``report`` gives, beside ``skipped``.
        needs_loss: Whether ``step`` must be given the loss, by its closure or by ``loss=``. A trainer reads it to
            know for which rules the value of its closure must be the true loss of the step.
        fused: Whether ``update`` is but one of torch's fused kernels, which are given ``found_inf`` and take
            all tensors of a group at once.
        whole: Whether ``update`` passes over its tensors but once, so that a CPU is better given long ones in one
            piece.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    scalars: ClassVar[tuple[str, ...]] = ()
    totals: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    reported: ClassVar[tuple[str, ...]] = ()
    needs_loss: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    def update(self, batches: Batches, loss: Tensor | None) -> None:
        """Takes one step: changes parameters and state in place.

        Args:
            batches: What to change; may be walked over several times.
            loss: Mean over processes, 0-dim, negated where the groups maximize; None where none was given.
        """
        raise NotImplementedError

    def start(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """First values of the buffers that do not start at zero, from the flat parameter and its first gradient."""
        return {}

    def apart(self) -> frozenset[int]:
        """Identities of the parameters that ``update`` moves by itself: they come in no batch and get no state."""
        return frozenset()

    def check_ready(self) -> None:
        """Refuses a step where the rule cannot take one now; asked before the closure is called."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """Takes one step.

        Args:
            closure: Clears the gradients, computes the loss and its gradients, and returns the loss.
            loss: The loss at which the gradients were taken, where all that has been done already.

        Returns:
            What the closure returned, else ``loss``.

        Raises:
            ValueError: Both were given, or the loss is not one number.
            RuntimeError: The rule needs the loss and got none, or a gradient is sparse, or a rule with two points
                stands at the other one.
        """
        self.check_ready()
        if closure is not None:
            with torch.enable_grad():
                found = closure()
            # Lightning's manual optimization always puts in a closure, which returns nothing.
            if found is not None and loss is not None:
                raise ValueError("step takes the loss from a closure or as loss=, not both.")
            loss = loss if found is None else found
        batches, value = self._prepare(loss, closed=closure is not None, compiling=torch.compiler.is_compiling())
        if batches is None:
            return loss
        numbers = [*batches.scalars.values(), list(batches.totals.values())]
        before = batches.copies(numbers)
        if batches.scalars["step"]:
            torch._foreach_add_(batches.scalars["step"], 1)
        self.update(batches, value)
        batches.settle(numbers, before)
        if batches.finite is not None:
            batches.totals["skipped"].add_(~batches.finite)
        return loss

    @torch.compiler.disable
    def _prepare(self, loss: Any, *, closed: bool, compiling: bool) -> tuple[Batches | None, Tensor | None]:
        """All of a step that is not mathematics; no batches where there is nothing to do."""
        name = type(self).__name__
        present = [
            (i, p, self.state[p]) for i, g in enumerate(self.param_groups) for p in g["params"] if p.grad is not None
        ]
        if loss is None and self.needs_loss and (present or not closed):
            raise RuntimeError(
                f"{name} needs the loss of the step and got none: call step(closure) or step(loss=loss), and with a "
                "gradient scaler scaler.step(optimizer, loss=loss)."
            )
        if any(p.grad.layout != torch.strided for _, p, _ in present):
            raise RuntimeError(f"{name} takes no sparse gradients: make them dense, as with Embedding(sparse=False).")
        if loss is None and not present:
            return None, None
        skipped = self._totals("skipped")["skipped"]
        value = None if loss is None else self._value(loss, skipped)
        if not present:
            return None, value
        finite = None if value is None else value.isfinite()
        apart = self.apart()
        if apart:
            present = [entry for entry in present if id(entry[1]) not in apart]
        waits = apart or any(self._missing(state) for *_, state in present)
        if finite is not None and (waits or _is_near(finite)):
            if not finite:
                skipped += 1
                return None, value
            finite = None
        totals = self._totals("skipped", *self.totals)
        groups = self.param_groups
        if compiling:
            groups = [{**g, "lr": _as_tensor(g["lr"], skipped)} for g in groups]
        fused = self.fused and not compiling
        batches = Batches(groups, self.buffers, totals, finite, fused=fused, whole=self.whole or compiling)
        for index, p, state in present:
            batches.add(index, p, self._tensors(groups[index], p, state), state["step"])
        batches.scalars = {name: [state[name] for *_, state in present] for name in ("step", *self.scalars)}
        return batches, value

    def _value(self, loss: Any, home: Tensor) -> Tensor:
        """The loss to be made small: one number, the mean over processes, of the type and on the device of ``home``."""
        value = loss.detach() if isinstance(loss, Tensor) else torch.full_like(home, float(loss))
        if value.numel() != 1:
            raise ValueError(f"the loss has shape {tuple(value.shape)}; it must be one number: take its mean.")
        value = over_processes(value.to(home).reshape(1, 1), [1.0]).reshape(())
        return -value if self.param_groups[0]["maximize"] else value

    def _totals(self, *names: str) -> dict[str, Tensor]:
        home = self._home()
        for name in names:
            if name not in self.state[home]:
                self.state[home][name] = _number(name, home)
        return {name: self.state[home][name] for name in names}

    def _home(self) -> Tensor:
        """The parameter with which the state of the whole optimizer is kept."""
        home: Tensor = next(p for group in self.param_groups for p in group["params"])
        return home

    def _missing(self, state: dict[str, Any]) -> list[str]:
        return [name for name in ("step", *self.buffers, *self.scalars) if name not in state]

    def _tensors(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> list[Tensor]:
        """Parameter, gradient and buffers, started where they are missing, flat and in one order."""
        assert p.grad is not None
        param, missing = local(p), self._missing(state)
        if not missing and param is p and not p.is_complex() and p.is_contiguous():
            others = [p.grad, *[state[name] for name in self.buffers]]
            # Nearly every parameter of nearly every step: the rest of this function takes as long as a small update.
            if all([t.is_contiguous() for t in others]):  # noqa: C419  a list is quicker than a generator
                return [p.view(-1), *[t if t.ndim == 1 else t.view(-1) for t in others]]
        dense = param.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(param)
        like = param if dense else torch.empty_like(param, memory_format=torch.contiguous_format)
        real = torch.view_as_real(param) if param.is_complex() else param
        line, grad = flat(param, like) if dense else real, flat(local(p.grad).resolve_conj(), like)
        for name in missing:
            state[name] = torch.zeros_like(p, dtype=_wide(p)) if name in self.buffers else _number(name, p)
        for held in (local(state[name]) for name in self.buffers):
            if not alike(held, like):
                held.data = torch.empty_like(like, dtype=held.dtype).copy_(held)
        buffers = {name: flat(local(state[name]), like) for name in self.buffers}
        if missing:
            first = -grad if group["maximize"] else grad
            dtype = _wide(p).to_real()
            for name, value in self.start(group, line.reshape(-1).to(dtype), first.to(dtype)).items():
                buffers[name].copy_(value)
        return [line, grad, *buffers.values()]

    def report(self) -> dict[str, Tensor]:
        """Numbers that are worth logging after a step, 0-dim and on their devices; none before the first step."""
        home = self.state.get(self._home(), {})
        return {name: home[name] for name in ("skipped", *self.reported) if name in home}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state that ``state_dict`` gave; it is copied to each parameter's device and keeps its width.

        Args:
            state_dict: What ``state_dict`` of the same rule over the same parameters gave.
        """
        given: dict[str, Any] = {}
        # torch casts state to the type of its parameter; what the other hooks leave of the given state is not cast.
        hook = self.register_load_state_dict_pre_hook(lambda _, seen: given.update(seen))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        places = [place for group in given["param_groups"] for place in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for place, p in zip(places, params, strict=True):
            for name, value in given["state"].get(place, {}).items():
                dtype = _wide(p) if name in self.buffers else _number(name, p).dtype
                self.state[p][name] = value.detach().to(p.device, dtype, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Gives options that an older checkpoint does not know their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name in self.defaults.keys() - {"differentiable"}:  # which torch puts there
                group.setdefault(name, self.defaults[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters.

        Args:
            param_group: ``params`` and the options in which the group differs from the defaults.

        Raises:
            ValueError: An option is out of its range, or differs where all groups must agree.
        """
        rule, options = type(self).__name__, {**self.defaults, **param_group}
        for name in LIMITS.keys() & options.keys():
            given = options[name] if isinstance(options[name], tuple | list) else (options[name],)
            if not all(0 <= value < LIMITS[name] for value in given):
                raise ValueError(f"{rule}: {name} is {options[name]}; it must lie in [0, {LIMITS[name]:g}).")
        for name in self.shared if self.param_groups else ():
            if options[name] != self.param_groups[0][name]:
                raise ValueError(
                    f"{rule}: {name} is {options[name]} in one group and {self.param_groups[0][name]} in another; "
                    "give it once, for all groups."
                )
        super().add_param_group(param_group)


def _wide(p: Tensor) -> torch.dtype:
    return WIDER.get(p.dtype, p.dtype)


def _number(name: str, p: Tensor) -> Tensor:
    dtype = torch.float32 if name == "step" else _wide(p).to_real()
    return torch.zeros((), dtype=dtype, device=p.device)


def _as_tensor(value: float | Tensor, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(like, value)


def _is_near(value: Tensor) -> bool:
    """Whether Python can read the value without waiting for a device."""
    return value.device.type == "cpu"
