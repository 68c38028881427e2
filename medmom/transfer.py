from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medmom.errors import MedmomError
from medmom.models.factorise import list_ranks, set_dense, to_dense
from medmom.weights import plain_name, read_weights

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
"""Ends of the names of statistics, whose absence is no news."""

ABSENT = "not in the file"


@dataclass(frozen=True)
class Transfer:
    """What a network was given of a file.

    Attributes:
        source: The file or package.
        taken: Names of the network's tensors that were taken, in its order.
        left: Names of those that stayed as they were, running statistics left out, each with the reason.
        unused: Names of weights in the file that have no place in the network.
        share: Of the network's parameters, in [0, 1], that were taken; of low-rank layers those of the dense weight.
        notes: What else should be known, a line each.
    """

    source: Path
    taken: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    share: float
    notes: tuple[str, ...] = ()


def initialise_from(network: nn.Module, path: str | Path) -> Transfer:
    """Gives a network the weights of another one, by name, where their shapes agree.

    Where the first convolution was trained with another number of image channels, each channel begins with their
    mean, scaled so that an image whose channels are all equal has the same features.

    Low-rank layers take the nearest weight of their highest rank, by truncated SVD; what is told of them has the names
    and shapes of the dense network.

    Args:
        network: Changed in place once everything has been read and checked; on the meta device only checked.
        path: A run folder, model package or checkpoint, see ``medmom.weights.read_weights``.

    Returns:
        What was taken and what was not.

    Raises:
        MedmomError: The file is not usable, holds values that are not finite, or no convolution or linear layer of it
            fits into the network.
    """
    path = Path(path)
    if list_ranks(network):
        dense = to_dense(copy.deepcopy(network))
        transfer = initialise_from(dense, path)
        set_dense(network, dense)
        return transfer
    given, there = read_weights(path, network)
    own, fresh, notes = network.state_dict(), {}, []
    left: list[tuple[str, str]] = []
    stem = next((name for name, tensor in own.items() if tensor.ndim > 3), "")
    for name, wanted in own.items():
        value = given.get(plain_name(name))
        if name == stem and value is not None and _has_other_channels(value, wanted):
            notes.append(f"{name}: {value.shape[1]} image channels there, {wanted.shape[1]} here, the mean in each")
            value = value.double().mean(dim=1, keepdim=True).expand_as(wanted) * (value.shape[1] / wanted.shape[1])
        reason = ABSENT if value is None else _misfit(name, value, wanted)
        if value is not None and not reason:
            fresh[name] = value.to(wanted.dtype)
        elif not name.endswith(RUNNING):
            left.append((name, reason))
    _check(path, network, given, fresh, left)
    with torch.no_grad():
        for name, value in fresh.items():
            own[name].copy_(value)
    places = {plain_name(name) for name in own}
    unused = tuple(name for name in given if name not in places and not name.endswith(RUNNING))
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    share = sum(size for name, size in sizes.items() if name in fresh) / sum(sizes.values())
    notes += _differences(there, getattr(network, "arguments", {}))
    return Transfer(path, tuple(fresh), tuple(left), unused, share, tuple(notes))


def describe(transfer: Transfer) -> str:
    """Tells what was taken in a few lines: the counts, a line for each part of the network, and the notes."""
    names = [*transfer.taken, *(name for name, _ in transfer.left)]
    # Never "all" by rounding.
    share = "all" if transfer.share == 1 else f"{min(transfer.share, 0.9999):.2%}"
    lines = [f"{transfer.source}: {len(transfer.taken)} of {len(names)} tensors taken, {share} of the parameters."]
    reasons = dict(transfer.left)
    for part in dict.fromkeys(_part(name) for name in names):
        own = [name for name in names if _part(name) == part]
        missing = [name for name in own if name in reasons]
        text = "; ".join(_why(missing, reasons))
        lines.append(f"  {part}: {len(own) - len(missing)} of {len(own)}{': ' if text else ''}{text}")
    if transfer.unused:
        lines.append(f"  in the file alone: {len(transfer.unused)} ({_some(transfer.unused)})")
    return "\n".join([*lines, *(f"  {note}" for note in transfer.notes)])


def _part(name: str) -> str:
    return plain_name(name).split(".", maxsplit=1)[0]


def _why(names: Sequence[str], reasons: Mapping[str, str]) -> Iterator[str]:
    """Reasons of tensors that stayed as they were, with the first names of each; after two only their number."""
    every = list(dict.fromkeys(reasons[name] for name in names))
    for reason in every[:2]:
        yield f"{reason} ({_some([name for name in names if reasons[name] == reason])})"
    rest = sum(reasons[name] in every[2:] for name in names)
    if rest:
        yield f"others for {rest}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{', '.join(names[:2])}{more}"


def _has_other_channels(value: Tensor, wanted: Tensor) -> bool:
    if value.ndim != wanted.ndim or value.shape[1] in (0, wanted.shape[1]) or not value.is_floating_point():
        return False
    return value.shape[0] == wanted.shape[0] and value.shape[2:] == wanted.shape[2:]


def _misfit(name: str, value: Tensor, wanted: Tensor) -> str:
    """Why a weight of the file does not fit; empty if it does."""
    is_dense = value.layout == torch.strided and value.device.type == "cpu"
    if not is_dense or value.is_floating_point() != wanted.is_floating_point():
        return "of another kind of number there"
    if value.shape == wanted.shape:
        return ""
    if _part(name) in ("head", "heads") and value.shape[1:] == wanted.shape[1:]:
        return f"{len(value)} classes there, {len(wanted)} here"
    there, here = (" x ".join(map(str, tensor.shape)) or "one number" for tensor in (value, wanted))
    return f"{there} there, {here} here"


def _check(
    path: Path,
    network: nn.Module,
    given: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    left: Sequence[tuple[str, str]],
) -> None:
    for name, value in fresh.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise MedmomError(f"{path}: {name} holds values that are not finite numbers. Take another checkpoint.")
    if not any(value.ndim > 1 for value in fresh.values()):
        fact = f"it has {next(iter(given))}, the network {next(iter(network.state_dict()))}"
        fact = next((f"{name}: {reason}" for name, reason in left if reason != ABSENT), fact)
        raise MedmomError(
            f"{path}: no layer among its {len(given)} tensors fits into this {type(network).__name__} ({fact}). Take "
            "the preset, patch and spacing that it was trained with, or leave model.init_from out."
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """What the same weights do otherwise in the network that they go to."""
    if "gate" in there and there["gate"] != here.get("gate", there["gate"]):
        mend = "" if there["gate"] else "; medmom.ramp.GateRamp raises it while it trains on"
        yield f"gate: trained at {there['gate']:g}, here {here['gate']:g}{mend}"
    if "norm" in there and there["norm"] != here.get("norm", there["norm"]):
        yield f"norm: trained with {there['norm']}, here {here['norm']}; features differ until it has trained on"
