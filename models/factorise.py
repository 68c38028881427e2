"""Networks with low-rank layers, from dense ones and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from medmom.models.low_rank import Gradients, LowRankConv, LowRankLayer, LowRankLinear, Ranks

__all__ = [
    "compact",
    "count_dense",
    "count_parameters",
    "list_ranks",
    "rank_limit",
    "set_dense",
    "to_dense",
    "to_low_rank",
    "with_ranks",
]

LOWEST_RANK = 2
"""With fewer directions a layer has hardly a choice."""

NARROWEST = 8
"""Layers with fewer features in or out stay dense: there is nothing to save, and the first and last are among them."""

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def to_low_rank(
    network: nn.Module,
    share: float,
    *,
    gradients: Gradients = "factors",
    room: int = 1,
    keep_norm: bool = False,
) -> nn.Module:
    """Factors the weights of a network's linear layers and convolutions, in place, by truncated SVD.

    A layer stays dense where its factors would be as many numbers as its weight, or it has fewer than ``NARROWEST``
    features in or out; so do grouped and transposed convolutions, and those that pad with something else than zeros.

    Args:
        network: Any; its weights decide those of the result.
        share: Of the full rank, in (0, 1): a layer's rank, and the largest that a low-rank rule may give it.
        gradients: See ``LowRankLayer``; ``"tangent"`` for the low-rank rules of ``medmom.optim``.
        room: Storage as a multiple of the largest rank, as the rule's ``room`` says; at most the full rank.
        keep_norm: Whether each weight keeps its Frobenius norm; for weights drawn at random.

    Returns:
        The same network.

    Raises:
        ValueError: The share lies outside its range, or no layer is large enough.
    """
    if not 0 < share < 1:
        raise ValueError(f"low_rank is {share}; give a share of the full rank above 0 and below 1.")
    found = {name: limit for name, layer in network.named_modules() if (limit := rank_limit(layer, share))}
    if not found:
        raise ValueError(
            f"low_rank {share}: no layer of this {type(network).__name__} would have fewer weights; give a smaller "
            "share, or leave it dense."
        )
    for name, rank in found.items():
        dense: Any = network.get_submodule(name)
        rows, columns = _shape(dense)
        layer = _layer(dense, rank, storage=min(room * rank, rows, columns), gradients=gradients)
        layer.set_matrix(dense.weight.detach().flatten(1), keep_norm=keep_norm)
        _replace(network, dense, layer)
    return network


def to_dense(network: nn.Module) -> nn.Module:
    """Multiplies the factors of every low-rank layer out, in place: the same function with ordinary layers.

    Args:
        network: Any.

    Returns:
        The same network.
    """
    for layer in _low_rank_layers(network).values():
        _replace(network, layer, _dense(layer))
    return network


def compact(network: nn.Module) -> nn.Module:
    """Cuts the storage of every low-rank layer down to its rank, in place; the function stays to the bit.

    Args:
        network: Any; no optimizer may know its parameters any more.

    Returns:
        The same network.
    """
    for layer in _low_rank_layers(network).values():
        r = layer.rank
        for name, part in (("u", layer.u[:, :r]), ("s", layer.s[:r, :r]), ("v", layer.v[:, :r])):
            setattr(layer, name, nn.Parameter(part.detach().clone(), requires_grad=layer.s.requires_grad))
        layer.ranks = nn.Parameter(layer.ranks.detach().new_tensor([r, min(LOWEST_RANK, r), r]), requires_grad=False)
    return network


def with_ranks(network: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Gives layers empty factors of these ranks, in place, to load weights into.

    Args:
        network: Dense.
        ranks: By the name of the layer, as ``list_ranks`` has them.

    Returns:
        The same network.

    Raises:
        ValueError: There is no such layer, or it cannot have that rank.
    """
    modules = dict(network.named_modules())
    for name, rank in ranks.items():
        dense = modules.get(name)
        if dense is None or not _is_plain(dense):
            raise ValueError(f"{name} is no linear layer or convolution of {type(network).__name__}")
        layer = _layer(dense, rank, storage=rank, gradients="factors")
        _replace(network, dense, layer)
    return network


def set_dense(network: nn.Module, dense: nn.Module) -> None:
    """Gives a network the weights of a dense one of the same layers: low-rank layers take their nearest.

    Args:
        network: Changed in place; its low-rank layers have their highest rank afterwards.
        dense: Left alone.
    """
    layers, theirs = _low_rank_layers(network), dense.state_dict()
    for name, layer in layers.items():
        layer.set_matrix(theirs.pop(f"{name}.weight").flatten(1))
    own = network.state_dict()
    factors = {f"{name}.{part}" for name in layers for part in ("u", "s", "v", "ranks")}
    network.load_state_dict({**{key: own[key] for key in factors}, **theirs})


def list_ranks(network: nn.Module) -> dict[str, Ranks]:
    """Rank and sizes of every low-rank layer, by its name; empty for a dense network."""
    return {name: layer.sizes for name, layer in _low_rank_layers(network).items()}


def count_parameters(network: nn.Module) -> int:
    """Parameters of a network; the whole numbers of its low-rank layers are none."""
    return sum(p.numel() for p in network.parameters() if p.is_floating_point())


def count_dense(network: nn.Module) -> int:
    """Parameters that the network would have with ordinary layers in the place of its low-rank ones."""
    layers = _low_rank_layers(network).values()
    factors = sum(p.numel() for layer in layers for p in (layer.u, layer.s, layer.v))
    weights = sum(layer.sizes.rows * layer.sizes.columns for layer in layers)
    return count_parameters(network) - factors + weights


def rank_limit(layer: Any, share: float) -> int:
    """Rank that a share of the full one is in a dense layer; 0 where it had better stay dense."""
    if not _is_plain(layer):
        return 0
    rows, columns = _shape(layer)
    rank = max(LOWEST_RANK, round(share * min(rows, columns)))
    is_wide = min(rows, layer.weight.shape[1]) >= NARROWEST
    return rank if is_wide and Ranks(rank, rows, columns).num_parameters < rows * columns else 0


def _low_rank_layers(network: nn.Module) -> dict[str, LowRankLayer]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LowRankLayer)}


def _is_plain(layer: Any) -> bool:
    if type(layer) is nn.Linear:
        return True
    if type(layer) not in _CONVOLUTIONS.values():
        return False
    return bool(layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str))


def _shape(dense: Any) -> tuple[int, int]:
    """Rows and columns of the weight as a matrix."""
    return len(dense.weight), dense.weight[0].numel()


def _layer(dense: Any, rank: int, *, storage: int, gradients: Gradients) -> LowRankLayer:
    """A low-rank layer in the place of a dense one, with its bias and without its weight."""
    options = {
        "lowest": min(LOWEST_RANK, rank),
        "storage": storage,
        "bias": dense.bias is not None,
        "gradients": gradients,
    }
    layer: LowRankLayer
    if type(dense) is nn.Linear:
        layer = LowRankLinear(dense.in_features, dense.out_features, rank, **options)
    else:
        layer = LowRankConv(
            dense.in_channels,
            dense.out_channels,
            dense.kernel_size,
            rank,
            stride=dense.stride,
            padding=dense.padding,
            dilation=dense.dilation,
            **options,
        )
    layer = layer.to(dense.weight.device, dense.weight.dtype).train(dense.training)
    for factor in (layer.u, layer.s, layer.v):
        factor.requires_grad_(dense.weight.requires_grad)
    layer.bias = dense.bias
    return layer


def _dense(layer: LowRankLayer) -> nn.Module:
    has_bias = layer.bias is not None
    dense: Any
    # On the meta device first weights are not drawn: the caller's random numbers must not notice.
    with torch.device("meta"):
        if isinstance(layer, LowRankConv):
            place = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            kind = _CONVOLUTIONS[len(layer.kernel_size)]
            dense = kind(layer.in_channels, layer.out_channels, layer.kernel_size, bias=has_bias, **place)
        else:
            dense = nn.Linear(len(layer.v), len(layer.u), bias=has_bias)
    weight: Any = layer.weight
    dense.weight = nn.Parameter(weight, requires_grad=layer.u.requires_grad)
    dense.bias = layer.bias
    return dense.train(layer.training)  # type: ignore[no-any-return]


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a layer in the place of another one, wherever that is."""
    if network is old:
        raise ValueError(f"a {type(old).__name__} alone cannot be replaced in place; put it into an nn.Sequential.")
    for parent in network.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
