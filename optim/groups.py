"""Parameter groups for any optimizer, ours or torch's: what decays, how fast a layer learns, what stands still.

Parts of a network are named as in its ``state_dict``: ``encoder`` is all that lies under it, ``encoder.stages.0`` one
stage, and ``*`` in the place of a whole part is any one: ``encoder.stages.*.momentum``. Nothing else is special.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from medmom.optim.low_rank import layers_in

NORMALISATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
OPENED = (nn.Sequential, nn.ModuleList)


def parameter_groups(
    network: nn.Module,
    *,
    weight_decay: float,
    lr: float | None = None,
    decay_norms: bool = False,
    layer_decay: float = 1.0,
    layers: Sequence[str | Sequence[str]] | None = None,
    frozen: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Groups in which weights decay, and biases, normalisations and learned gates do not.

    No decay acts on parameters of one axis or none, on those called ``bias``, and on those of torch's normalisations.
    The first rule covers nearly all: it needs no list of types, and so knows the normalisations of other packages too.
    The others find normalisations over several axes and biases in the shape of an image.

    With ``layer_decay`` below 1 a layer learns at ``lr`` x ``layer_decay`` ^ (layers between it and the end), as suits
    a network whose first layers were trained before. A parameter that has two names counts under its first.

    The factors of a low-rank weight lie in one group, in their order, and behind them the whole numbers that say how
    many of their columns are in use: so a low-rank rule finds them. Where all factors stand still, these leave too.

    Args:
        network: Its trainable parameters each come into exactly one group; those without gradient into none, but for
            the whole numbers behind factors.
        weight_decay: Of the weights.
        lr: Of the last layer, and of all where ``layer_decay`` is 1; None leaves it to the optimizer.
        decay_norms: Whether the scales of torch's normalisations decay like weights.
        layer_decay: Factor of the learning rate from a layer to the one before it, in (0, 1].
        layers: From input to output: a name, or the names of what lies side by side; the longest name that fits
            decides. None: what ``list_layers`` gives.
        frozen: Names of what is left out of all groups; see ``freeze``.

    Returns:
        For each group that is not empty ``params``, ``weight_decay``, ``lr`` where it was given, and a ``name``:
        ``decay`` or ``no_decay``, by layer ``encoder.stem.decay`` and so on, from input to output.

    Raises:
        ValueError: A name fits no parameter, a parameter lies in no layer, an option is out of its range or needs
            another, or nothing is left to train.

    Source:
        Howard & Ruder 2018, arXiv:1801.06146 (rates by layer).
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; it must lie in (0, 1].")
    if layer_decay < 1 and lr is None:
        raise ValueError(f"layer_decay {layer_decay} needs a learning rate to act on; give lr.")
    left_out, undecayed = _named(network, frozen), _undecayed(network, decay_norms=decay_norms)
    ordered = _checked(network, list_layers(network) if layers is None else layers) if layer_decay < 1 else []
    labels = ["+".join(layer) + "." for layer in ordered] or [""]
    rates = [layer_decay**n for n in reversed(range(len(labels)))]
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for name, together in _belonging(network):
        trained = [p for p in together if p.requires_grad and id(p) not in left_out]
        if not trained:
            continue
        place, kind = _place(name, ordered), "no_decay" if id(together[0]) in undecayed else "decay"
        if (place, kind) not in groups:
            options = {"name": labels[place] + kind, "weight_decay": weight_decay if kind == "decay" else 0.0}
            rate = {} if lr is None else {"lr": lr * rates[place]}
            groups[place, kind] = {"params": [], **options, **rate}
        groups[place, kind]["params"] += [*trained, *(p for p in together if _is_whole(p))]
    if not groups:
        raise ValueError("nothing is left to train: every parameter is frozen. Freeze fewer.")
    return [groups[key] for key in sorted(groups)]


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Stops the training of parts of a network: their parameters get no gradients any more.

    Running statistics of batch normalisations in them go on, unless these modules are in evaluation mode.

    Args:
        network: Changed in place.
        patterns: Names of its parts.

    Raises:
        ValueError: A name fits no parameter.
    """
    found = _named(network, patterns)
    for parameter in network.parameters():
        if id(parameter) in found:
            parameter.requires_grad_(False)


def list_layers(network: nn.Module) -> list[tuple[str, ...]]:
    """Layers from input to output, as names of what lies side by side in them.

    In a network with an ``encoder`` of ``stem`` and ``stages``, like those of medmom, they are the stem, the encoder's
    stages, those of a ``decoder`` from the deepest up, and all the rest, its heads, as the last one.

    In any other they are its children in the order in which it has them, where an ``nn.Sequential`` or
    ``nn.ModuleList`` stands for what it holds; an only child stands for its own children. Parameters of the network
    itself go with the first layer.

    Args:
        network: Any.

    Returns:
        Names of modules and parameters.
    """
    for path, module in network.named_modules():
        if path.split(".")[-1] == "encoder" and {"stem", "stages"} <= {name for name, _ in module.named_children()}:
            return _of_encoder_network(network, path)
    return _in_order(network, "")


def _of_encoder_network(network: nn.Module, encoder: str) -> list[tuple[str, ...]]:
    names, decoder = _names(network), f"{encoder.removesuffix('encoder')}decoder"
    before = [f"{encoder}.stem", *(f"{encoder}.stages.{stage}" for stage in _under(names, f"{encoder}.stages"))]
    before += [f"{decoder}.stages.{stage}" for stage in reversed(_under(names, f"{decoder}.stages"))]
    heads = [_apart(name, encoder) for name in names if not any(_fits(layer, name) for layer in before)]
    return [*((layer,) for layer in before), *([tuple(dict.fromkeys(heads))] if heads else [])]


def _in_order(module: nn.Module, prefix: str) -> list[tuple[str, ...]]:
    children = {f"{prefix}{name}": child for name, child in module.named_children() if _names(child)}
    own = tuple(f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False))
    if len(children) == 1 and not own:
        path, only = next(iter(children.items()))
        if any(_names(part) for part in only.children()):
            return _in_order(only, f"{path}.")
    layers: list[tuple[str, ...]] = []
    for path, child in children.items():
        parts = [name for name, part in child.named_children() if _names(part)] if type(child) in OPENED else []
        layers += [(f"{path}.{part}",) for part in parts] or [(path,)]
    first, *others = layers or [()]
    return [own + first, *others]


def _belonging(network: nn.Module) -> list[tuple[str, list[nn.Parameter]]]:
    """Each parameter by itself, but the factors of a low-rank weight with the whole numbers behind them."""
    found: list[tuple[str, list[nn.Parameter]]] = []
    for name, parameter in network.named_parameters():
        factors = [p for _, alone in found[-3:] for p in alone]
        if _is_whole(parameter) and _are_factors([*factors, parameter]):
            found[-3:] = [(found[-3][0], [*factors, parameter])]
        else:
            found.append((name, [parameter]))
    return found


def _are_factors(parameters: Sequence[nn.Parameter]) -> bool:
    try:
        return bool(layers_in(parameters))
    except ValueError:
        return False


def _is_whole(parameter: nn.Parameter) -> bool:
    return not (parameter.is_floating_point() or parameter.is_complex())


def _checked(network: nn.Module, layers: Sequence[str | Sequence[str]]) -> list[tuple[str, ...]]:
    ordered = [(layer,) if isinstance(layer, str) else tuple(layer) for layer in layers]
    _named(network, [name for layer in ordered for name in layer])
    return ordered


def _place(name: str, layers: list[tuple[str, ...]]) -> int:
    """Which layer a parameter lies in; 0 where there are none."""
    fitting = [
        (pattern.count("."), place) for place, layer in enumerate(layers) for pattern in layer if _fits(pattern, name)
    ]
    if layers and not fitting:
        raise ValueError(f"{name} lies in none of the {len(layers)} layers; name the layer that it belongs to.")
    return max(fitting)[1] if layers else 0


def _undecayed(network: nn.Module, *, decay_norms: bool) -> set[int]:
    found = {id(p) for name, p in network.named_parameters() if p.ndim <= 1 or name.split(".")[-1] == "bias"}
    for module in network.modules():
        if isinstance(module, NORMALISATIONS):
            found |= {id(p) for p in module.parameters(recurse=False)}
            found -= {id(module.weight)} if decay_norms else set()
    return found


def _named(network: nn.Module, patterns: Sequence[str]) -> set[int]:
    """Identities of the parameters that fit one of the patterns, by any of their names."""
    found: set[int] = set()
    for pattern in patterns:
        fitting = {id(p) for name, p in network.named_parameters(remove_duplicate=False) if _fits(pattern, name)}
        if not fitting:
            raise ValueError(_no_such(pattern, _names(network)))
        found |= fitting
    return found


def _no_such(pattern: str, names: list[str]) -> str:
    parts = pattern.split(".")
    above = next(stem for n in range(len(parts), -1, -1) if _under(names, stem := ".".join(parts[:n])))
    where = f"under {above} " if above else ""
    return f"{pattern!r} names no parameter; {where}take one of {', '.join(_under(names, above))}."


def _under(names: list[str], pattern: str) -> list[str]:
    """The next parts of the names that fit a pattern and go on behind it, each once; of all names where it is empty."""
    depth = len(pattern.split(".")) if pattern else 0
    going_on = [name.split(".") for name in names if not pattern or _fits(pattern, name)]
    return list(dict.fromkeys(parts[depth] for parts in going_on if len(parts) > depth))


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern names the parameter or a module above it."""
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) <= len(parts) and all(a in ("*", b) for a, b in zip(wanted, parts, strict=False))


def _apart(name: str, path: str) -> str:
    """The name of the largest part that holds a parameter and not the module at ``path``."""
    parts, others = name.split("."), path.split(".")
    shared = next((n for n, (a, b) in enumerate(zip(parts, others, strict=False)) if a != b), len(others))
    return ".".join(parts[: shared + 1])


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(remove_duplicate=False)]
