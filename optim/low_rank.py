"""What the low-rank rules share: which parameters are the factors of one weight, and how their bases move."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from medmom.optim.batches import PLAIN, WIDER, Batches
from medmom.optim.engine import MomentumOptimizer
from medmom.optim.tangent import (
    Factors,
    Tangent,
    decompose,
    kept_rank,
    move,
    polish,
    project,
    transport,
    truncate,
    turn,
    widen,
)

Group = dict[str, Any]

AGREEMENT = 0.2
"""How far the gradient of S may be from what that of U says of it, relative to itself: rounding of half precision."""


class Layer(NamedTuple):
    """Parameters that are the factors of one weight ``U S V^T``.

    Attributes:
        u: Shape (n, storage).
        s: Shape (storage, storage).
        v: Shape (m, storage).
        ranks: Whole numbers: rank, lowest, highest.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    ranks: Tensor

    @property
    def rank(self) -> int:
        """Columns of the factors in use."""
        return int(self.ranks[0])

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest rank."""
        lowest, highest = self.ranks[1:].tolist()
        return lowest, highest


def layers_in(params: Sequence[Tensor]) -> list[Layer]:
    """Finds the low-rank layers among parameters: a parameter of three whole numbers stands right behind U, S and V.

    Args:
        params: In the order in which a network has them.

    Raises:
        ValueError: Whole numbers stand behind something else.
    """
    layers = []
    for place, ranks in enumerate(params):
        if ranks.is_floating_point() or ranks.is_complex():
            continue
        u, s, v = params[place - 3 : place] if place >= 3 else [ranks] * 3
        shapes = [tuple(p.shape) for p in (u, s, v)]
        storage = u.shape[-1] if u.ndim == 2 else 0
        if not (v.ndim == 2 and shapes[1] == (storage, storage) and v.shape[1] == storage and ranks.shape == (3,)):
            raise ValueError(
                f"a parameter of whole numbers of shape {list(ranks.shape)} stands behind parameters of the shapes "
                f"{shapes}; a low-rank rule takes U, S, V and ranks of a layer one after the other, as "
                "network.parameters() has them."
            )
        if any(p.dtype.is_complex or type(p) not in PLAIN for p in (u, s, v)):
            raise ValueError("low-rank rules take whole, real factors: use DistributedDataParallel to share the work.")
        layers.append(Layer(u, s, v, ranks))
    return layers


class LowRankRule(MomentumOptimizer):
    """Momentum for weights ``W = U S V^T`` that follows W and not its factors; other parameters go the plain way.

    The factors' map is badly scaled where S has small values: momentum on U, S and V then stalls or diverges, though
    the weight itself could move well. Two ways round it:

    - ``local_steps`` 0: at every step the gradient and the momentum are directions in the tangent space at W
      (``medmom.optim.tangent``); W moves, is truncated, and the momentum is projected onto the next tangent space.
    - ``local_steps`` K: the bases are widened by the directions of one gradient, S alone is trained for the other
      K - 1 steps in them, then W is truncated. With K = 1 the gradient that widens also trains. The momentum is an
      r x r matrix in the same bases and turns with them. A layer whose storage is full cannot widen: give it ``room``.

    With K the network is up to twice as wide between these moments. ``eval()`` truncates at once: call it before
    scores, checkpoints and packages; the next step begins a new cycle by itself.

    The rank of a layer is the least one whose relative error in the Frobenius norm stays below ``tolerance``, within
    the layer's own bounds. As this is asked again and again, no singular value that is kept falls below ``tolerance``
    times the norm for long, and 1 / tolerance^2 bounds the rank.

    Factors are float32 at least: those of half-precision parameters have a wider twin in the state. A layer whose
    gradient or step is not finite is left alone, and counted in ``skipped``. With ``torch.distributed`` initialised
    process 0 hands its factors on whenever the bases have changed.

    Attributes:
        moment: Name of the state that is averaged gradient.
    """

    moment: ClassVar[str]

    @abstractmethod
    def update_dense(self, batches: Batches) -> None:
        """Takes the plain step of all parameters that are no factors."""

    @abstractmethod
    def train_core(self, group: Group, state: dict[str, Any], s: Tensor, grad: Tensor) -> Tensor:
        """Takes one step of S in fixed bases: gives it anew, and changes the moments in ``state`` in place.

        Args:
            group: Options.
            state: Of S: ``step``, and moments in the shape of ``s``.
            s: Shape (r, r).
            grad: Of S, in the same bases.
        """

    @abstractmethod
    def tangent_step(
        self, group: Group, state: dict[str, Any], at: Factors, grad: Tangent, moment: Tangent
    ) -> tuple[Factors, Tangent, Tangent]:
        """Gives the matrix to move from, the step in the tangent space there, and the new moment.

        Args:
            group: Options.
            state: Of S: ``step``, and whatever numbers the rule keeps.
            at: The weight.
            grad: Its gradient.
            moment: The averaged gradient so far.
        """

    @property
    def room(self) -> int:
        """Storage that the rule wants of a layer's factors, as a multiple of the highest rank."""
        return 2 if any(group["local_steps"] for group in self.param_groups) else 1

    def apart(self) -> frozenset[int]:
        """Identities of the factors."""
        return frozenset(id(p) for _, layer in self._layers() for p in layer)

    def update(self, batches: Batches, loss: Tensor | None) -> None:
        """Takes one step of everything."""
        self.update_dense(batches)
        for group, layer in self._layers():
            given = [p.grad is not None for p in layer[:3]]
            if any(given) and not all(given):
                raise RuntimeError(
                    f"{type(self).__name__}: of the factors U, S and V of a layer of shape {len(layer.u)} x "
                    f"{len(layer.v)} only some have a gradient; they move together: freeze all of them or none."
                )
            if all(given):
                self._step_layer(group, layer)

    def train(self) -> bool:
        """Makes ready to train; the next step widens the bases by itself.

        Returns:
            Whether the network is another one between steps than after ``eval()``: not with ``local_steps`` 0.
        """
        return any(group["local_steps"] for group in self.param_groups)

    @torch.no_grad()
    def eval(self) -> None:
        """Truncates what is still wide, so that the network is the one that counts; changes no other."""
        for group, layer in self._layers():
            state = self.state.get(layer.s, {})
            if int(state.get("place", 0)):
                self._truncate(group, layer)

    def report(self) -> dict[str, Tensor]:
        """Beside ``skipped``, the mean rank of the low-rank layers, where there are any."""
        ranks = [layer.ranks[0] for _, layer in self._layers()]
        mean = {"rank": torch.stack(ranks).float().mean()} if ranks else {}
        return {**super().report(), **mean}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, low-rank layers with all of their factors.

        Args:
            param_group: ``params`` and the options in which the group differs from the defaults.

        Raises:
            ValueError: An option is out of its range, or factors are not where they belong.
        """
        options = {**self.defaults, **param_group}
        if not 0 <= options["tolerance"] < 1:
            raise ValueError(f"{type(self).__name__}: tolerance is {options['tolerance']}; it must lie in [0, 1).")
        if options["local_steps"] < 0 or options["local_steps"] != int(options["local_steps"]):
            raise ValueError(f"{type(self).__name__}: local_steps is {options['local_steps']}; give 0, 1, 2 or more.")
        super().add_param_group(param_group)
        layers_in(self.param_groups[-1]["params"])

    def _layers(self) -> Iterator[tuple[Group, Layer]]:
        return ((group, layer) for group in self.param_groups for layer in layers_in(group["params"]))

    def _step_layer(self, group: Group, layer: Layer) -> None:
        state = self.state[layer.s]
        sign = -1 if group["maximize"] else 1
        r = layer.rank
        gv, gtu = (sign * _wide(p.grad)[:, :r] for p in (layer.u, layer.v) if p.grad is not None)
        if not bool(gv.isfinite().all() & gtu.isfinite().all()):
            self._skip()
            return
        at = self._factors(layer)
        if "step" not in state:
            _check_kind(layer, at, sign * gv)
            state.update({name: torch.zeros((), device=layer.s.device) for name in ("step", "place")})
        if group["local_steps"]:
            self._step_core(group, layer, at, gv, gtu)
        else:
            self._step_tangent(group, layer, at, gv, gtu)

    def _step_tangent(self, group: Group, layer: Layer, at: Factors, gv: Tensor, gtu: Tensor) -> None:
        self.state[layer.s]["step"] += 1
        moment = self._moment(layer, len(at.s))
        start, step, moment = self.tangent_step(group, self.state[layer.s], at, project(at, gv, gtu), moment)
        if not bool(step.square_norm().isfinite()):
            self._skip()
            return
        moved = move(start, step)
        new = truncate(moved, kept_rank(moved.s.diagonal(), group["tolerance"], *layer.bounds))
        carried = transport(moment, at, new)
        for p, part in zip((layer.s, layer.u, layer.v), carried, strict=True):
            _fill(self.state[p][self.moment], part)
        self._put(layer, new)

    def _step_core(self, group: Group, layer: Layer, at: Factors, gv: Tensor, gtu: Tensor) -> None:
        state = self.state[layer.s]
        grad = at.u.T @ gv
        widens = int(state["place"]) == 0
        if widens:
            u, v = widen(at, gv, gtu, layer.s.shape[0])
            left, right = u.T @ at.u, v.T @ at.v
            # Of the gradient no more is known in the new bases than its part in the tangent space.
            grad = left @ (gtu.T @ v) + (u.T @ gv) @ right.T - turn(grad, left, right)
            self._turn_moments(state, left, right)
            at = Factors(u, turn(at.s, left, right), v)
        if not widens or group["local_steps"] == 1:
            r = len(at.s)
            state["step"] += 1
            trained = {name: self._core(layer, name)[:r, :r] for name in self.cores()}
            at = at._replace(s=self.train_core(group, {**state, **trained}, at.s, grad))
        if not bool(at.s.isfinite().all()):
            self._skip()
            return
        self._put(layer, at, has_new_bases=widens)
        state["place"] += 1
        if int(state["place"]) >= group["local_steps"]:
            self._truncate(group, layer)

    def _skip(self) -> None:
        """Counts a layer that is left alone: a decomposition of what is not finite would stop the training."""
        self._totals("skipped")["skipped"] += 1

    def _truncate(self, group: Group, layer: Layer) -> None:
        """Ends a cycle: to the rank that the tolerance asks for, in the bases of the singular vectors."""
        at, state = self._factors(layer), self.state[layer.s]
        p, values, qt = decompose(at.s)
        rank = kept_rank(values, group["tolerance"], *layer.bounds)
        left, right = p.T[:rank], qt[:rank]
        self._turn_moments(state, left, right)
        self._put(layer, Factors(polish(at.u @ left.T), torch.diag(values[:rank]), polish(at.v @ right.T)))
        state["place"].zero_()

    def cores(self) -> tuple[str, ...]:
        """Names of the moments that are matrices in the bases of S."""
        return (self.moment,)

    def turned(self, name: str, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """A moment of S in other bases."""
        return turn(core, left, right)

    def _turn_moments(self, state: dict[str, Any], left: Tensor, right: Tensor) -> None:
        for name in self.cores():
            if name in state:
                r = left.shape[1]
                _fill(state[name], self.turned(name, state[name][:r, :r], left, right))

    def _core(self, layer: Layer, name: str) -> Tensor:
        state = self.state[layer.s]
        if name not in state:
            state[name] = torch.zeros_like(_wide(layer.s))
        found: Tensor = state[name]
        return found

    def _moment(self, layer: Layer, rank: int) -> Tangent:
        for p in (layer.u, layer.v):
            if self.moment not in self.state[p]:
                self.state[p][self.moment] = torch.zeros_like(_wide(p))
        b, c = (self.state[p][self.moment][:, :rank] for p in (layer.u, layer.v))
        return Tangent(self._core(layer, self.moment)[:rank, :rank], b, c)

    def _factors(self, layer: Layer) -> Factors:
        r = layer.rank
        u, s, v = (self._precise(p) for p in layer[:3])
        return Factors(u[:, :r], s[:r, :r], v[:, :r])

    def _precise(self, p: Tensor) -> Tensor:
        """A factor, or the wider twin of one in half precision."""
        if p.dtype not in WIDER:
            return p
        twin: Tensor = self.state[p].setdefault("factor", _wide(p))
        if not torch.equal(twin.to(p.dtype), p):
            twin.copy_(p)  # somebody else gave the factor another value
        return twin

    def _put(self, layer: Layer, new: Factors, *, has_new_bases: bool = True) -> None:
        for p, part in zip(layer[:3], new, strict=True):
            if has_new_bases or p is layer.s:
                precise = self._precise(p)
                _fill(precise, part)
                if precise is not p:
                    p.copy_(precise)
        if has_new_bases:
            layer.ranks[0] = len(new.s)
            self._agree(layer)

    def _agree(self, layer: Layer) -> None:
        """Hands on what process 0 has: another processor may have found the same bases with other signs."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        names = ("factor", *self.cores())
        states = [self.state[p][name] for p in layer[:3] for name in names if name in self.state[p]]
        for tensor in (*layer, *states):
            dist.broadcast(tensor, src=0)


def _check_kind(layer: Layer, at: Factors, gv: Tensor) -> None:
    """Refuses gradients of the factors themselves: they do not say where the weight should move."""
    if layer.s.grad is None:
        return
    r = len(at.s)
    found, expected = _wide(layer.s.grad)[:r, :r], at.u.T @ gv
    if bool((found - expected).norm() > AGREEMENT * found.norm()):
        raise RuntimeError(
            "low-rank rules want the gradients G V and G^T U of a layer's weight, and these are those of its factors: "
            'make the layers with gradients="tangent".'
        )


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: QR and SVD know nothing narrower."""
    return tensor.detach().to(WIDER.get(tensor.dtype, tensor.dtype))


def _fill(target: Tensor, part: Tensor) -> None:
    """Writes into the first rows and columns, and zeros elsewhere."""
    part = part.clone() if part.untyped_storage().data_ptr() == target.untyped_storage().data_ptr() else part
    target.zero_()
    target[: part.shape[0], : part.shape[1]] = part
