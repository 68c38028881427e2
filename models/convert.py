"""Weights of the host, nnU-Net's residual-encoder U-Net, as a momentum network, and back; and of its plain U-Net.

At gate 0 a ``MomentumUNet`` is the host, weight by weight, so that a trained host becomes a momentum network without
an error; from there a ramp leads to another gate. nnU-Net's plain U-Net becomes a ``PlainUNet``. Names of the hosts
are those of the package dynamic-network-architectures, which nnU-Net v2 saves.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medmom.models.gates import Coupling
from medmom.models.momentum import MomentumStage
from medmom.models.plain import PlainUNet
from medmom.models.unet import MomentumUNet

_WRAPPERS = ("module", "_orig_mod")
"""Words that wrappers put into a key: of data parallelism, of a compiled network."""

_STRANGERS = (
    ("encoder.stages.", ".convs.", "plain convolutions in the encoder"),
    ("encoder.stages.", ".conv3.", "bottleneck blocks"),
    ("encoder.stages.", ".squeeze_excitation.", "squeeze and excitation"),
    ("encoder.stem.", ".convs.1.", "two convolutions in the stem"),
    ("decoder.stages.", ".convs.1.", "two convolutions in a decoder stage"),
    ("decoder.stages.", ".blocks.", "residual blocks in the decoder"),
    ("", ".running_mean", "batch normalisation"),
    ("", ".all_modules.2.", "dropout, or an activation before the normalisation"),
)
"""Start of a key, part of it, and what a network with such a key has."""

_CONVERTIBLE = {"block": "postact", "gating": "fixed", "norm": "instance", "velocity": "zero"}
"""Options of ours for which the host has one equal."""

_PLAIN_STRANGERS = (
    ("encoder.stem.", "", "the stem of a residual encoder"),
    ("encoder.stages.", ".blocks.", "residual blocks in the encoder"),
    ("decoder.stages.", ".blocks.", "residual blocks in the decoder"),
    ("", ".running_mean", "batch normalisation"),
    ("", ".all_modules.2.", "dropout, or an activation before the normalisation"),
)
"""The same of nnU-Net's plain U-Net."""

_MEND = (
    "What converts is nnU-Net's residual-encoder U-Net: basic blocks, instance normalisation, one convolution in the "
    "stem and in every stage of the decoder."
)
_PLAIN_MEND = "What converts is nnU-Net's plain U-Net: stacked convolutions with instance normalisation."


def from_host(
    state: Mapping[str, Tensor], *, coupling: Coupling = "normalised", deep_supervision: bool = True
) -> MomentumUNet:
    """Momentum network with gate 0 that gives the logits of a trained residual-encoder U-Net.

    Sizes follow from the shapes of the weights, strides from those of the transposed convolutions. What weights do
    not show is taken as nnU-Net plans it: instance normalisation with eps 1e-5, leaky ReLU of slope 0.01, no stride
    in the first stage. Axes stay in the host's order: nnU-Net's images are (z, y, x).

    Args:
        state: Its ``state_dict``, ``network_weights`` of an nnU-Net v2 checkpoint; left alone. Prefixes of compiled
            and of data-parallel networks are known, and so are the second names of the same weights that the host
            has (``decoder.encoder``, ``all_modules``), which may be absent.
        coupling: Weight of the residuals once the gate is raised, see ``residual_weight``; at gate 0 all are equal.
        deep_supervision: In training, give logits at every resolution. Heads below the full resolution that the
            state lacks start at 0.

    Returns:
        The network, its weights copied, in training mode on the CPU.

    Raises:
        ValueError: The state is not one of such a network; the first key that does not fit is named.

    Source:
        Isensee et al. 2024, arXiv 2404.09556 (the host). Sander et al. 2021, arXiv 2102.07870, on what follows: a
        ResNet trained at gate 0 and evaluated at another one loses up to 2.5 points of accuracy on CIFAR-10 (at gate
        0.4 about 0.5, at 0.6 about 1, at 0.8 about 1.5, at 1 about 2.5), and 20 epochs of refitting bring it back to
        within 0.4 points (read off a figure).
    """
    host = _plain_names(state, _STRANGERS, _MEND)
    arguments = _arguments(host)
    # First weights are drawn and thrown away: the caller's random numbers must not notice.
    with torch.random.fork_rng(devices=[]):
        network = MomentumUNet(**arguments, gate=0.0, coupling=coupling, deep_supervision=deep_supervision)
    _load(network, host, _host_names(network), "residual-encoder", _MEND)
    return network


def from_plain_host(state: Mapping[str, Tensor], *, deep_supervision: bool = True) -> PlainUNet:
    """Network that gives the logits of nnU-Net's plain U-Net.

    What weights do not show is taken as for ``from_host``, and so is the order of axes.

    Args:
        state: Its ``state_dict``, as for ``from_host``.
        deep_supervision: As for ``from_host``.

    Returns:
        The network, its weights copied, in training mode on the CPU.

    Raises:
        ValueError: The state is not one of such a network; the first key that does not fit is named.
    """
    host = _plain_names(state, _PLAIN_STRANGERS, _PLAIN_MEND)
    arguments = _plain_arguments(host)
    with torch.random.fork_rng(devices=[]):
        network = PlainUNet(**arguments, deep_supervision=deep_supervision)
    _load(network, host, _plain_host_names(network), "plain", _PLAIN_MEND)
    return network


def to_host(network: MomentumUNet) -> dict[str, Tensor]:
    """Weights of a momentum network at gate 0 under the host's names.

    Args:
        network: Fixed gate 0, post-activation blocks, zero velocity, instance normalisation.

    Returns:
        A ``state_dict`` that the host of the same sizes loads strictly: every weight under each of the names that it
        has there. The tensors are those of the network, not copies.

    Raises:
        ValueError: The network computes what the host cannot.
    """
    for option, legal in _CONVERTIBLE.items():
        value = network.arguments[option]
        if value != legal:
            raise ValueError(f"{option} is {value!r}, which the host has not; it has {legal!r}.")
    for name, stage in network.named_modules():
        if isinstance(stage, MomentumStage) and len(stage.blocks) and stage.gate:
            raise ValueError(
                f"{name} has gate {stage.gate:g}; the host has no momentum, and its logits would be others. "
                "Set the gate to 0 and refit, or keep the momentum network."
            )
    own = network.state_dict()
    return {name: own[key] for key, known in _host_names(network).items() for name in _all_names(known)}


def _load(network: nn.Module, host: dict[str, Tensor], names: Mapping[str, str], kind: str, mend: str) -> None:
    """Gives a network the host's weights, by the host's names of its own; absent lower heads become 0."""
    own = network.state_dict()
    lower = {name for key, name in names.items() if key.startswith("heads.") and not key.startswith("heads.0.")}
    if not lower & host.keys():
        host.update({name: torch.zeros_like(own[key]) for key, name in names.items() if name in lower})
    for key, name in names.items():
        if name not in host:
            raise ValueError(f"{name} is missing in the state. {mend}")
        if host[name].shape != own[key].shape:
            here, there = (list(tensor.shape) for tensor in (host[name], own[key]))
            raise ValueError(f"{name} has shape {here}; after the other weights it would have {there}. {mend}")
    known = set(names.values())
    for name in host:
        if name not in known:
            raise ValueError(f"{name} is a weight the {kind} U-Net does not have. {mend}")
    network.load_state_dict({key: host[name] for key, name in names.items()})


def _plain_names(
    state: Mapping[str, Tensor], strangers: Sequence[tuple[str, str, str]], mend: str
) -> dict[str, Tensor]:
    """Every weight once, under the name that says where it is, without wrappers."""
    host: dict[str, Tensor] = {}
    for key, value in state.items():
        words = [word for word in key.split(".") if word not in _WRAPPERS]
        name = ".".join(words[1:] if words[:2] == ["decoder", "encoder"] else words)
        for start, part, fact in strangers:
            if name.startswith(start) and part in name:
                raise ValueError(f"{key}: {fact}. {mend}")
        name = name.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} is {type(value).__name__}, not a tensor. Give the network's state_dict alone.")
        if name in host and not torch.equal(host[name], value):
            raise ValueError(f"{key} differs from {name}, which is the same weight. Save the network anew.")
        host[name] = value
    return host


def _arguments(host: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of the network that has these weights, for ``MomentumUNet``."""
    stem = _weight(host, "encoder.stem.convs.0.conv.weight", _MEND)
    stages = range(_count(host, "encoder.stages."))
    entries = [_weight(host, f"encoder.stages.{s}.blocks.0.conv1.conv.weight", _MEND) for s in stages]
    return {
        "in_channels": stem.shape[1],
        "blocks": [_count(host, f"encoder.stages.{s}.blocks.") for s in stages],
        **_stages(host, entries, _MEND),
    }


def _plain_arguments(host: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same for ``PlainUNet``."""
    # A network has one stage at least: without any, its first weight is what is missing.
    stages = range(max(1, _count(host, "encoder.stages.")))
    entries = [_weight(host, f"encoder.stages.{s}.0.convs.0.conv.weight", _PLAIN_MEND) for s in stages]
    return {
        "in_channels": entries[0].shape[1],
        "convolutions": [_count(host, f"encoder.stages.{s}.0.convs.") for s in stages],
        "decoder_convolutions": [_count(host, f"decoder.stages.{t}.convs.") for t in reversed(stages[:-1])],
        **_stages(host, entries, _PLAIN_MEND),
    }


def _stages(host: Mapping[str, Tensor], entries: Sequence[Tensor], mend: str) -> dict[str, Any]:
    """What both kinds of network show alike, from the first convolution of each stage on."""
    last = len(entries) - 2
    upward = [_weight(host, f"decoder.transpconvs.{t}.weight", mend) for t in range(last + 1)]
    head = _weight(host, f"decoder.seg_layers.{max(0, last)}.weight", mend)
    return {
        "out_channels": head.shape[0],
        "channels": [weight.shape[0] for weight in entries],
        "kernels": [list(weight.shape[2:]) for weight in entries],
        "strides": [[1] * (head.ndim - 2), *(list(weight.shape[2:]) for weight in reversed(upward))],
    }


def _weight(host: Mapping[str, Tensor], name: str, mend: str) -> Tensor:
    """Weight of a convolution from which sizes are read."""
    if name not in host:
        raise ValueError(f"{name} is missing in the state. {mend}")
    if host[name].ndim not in (4, 5):
        raise ValueError(f"{name} has shape {list(host[name].shape)}, not one of a 2-D or 3-D convolution. {mend}")
    return host[name]


def _count(host: Mapping[str, Tensor], start: str) -> int:
    return len({name.removeprefix(start).split(".")[0] for name in host if name.startswith(start)})


def _host_names(network: MomentumUNet) -> dict[str, str]:
    """The host's name of every weight, by ours."""
    strides, last = network.arguments["strides"], len(network.heads) - 1
    names = {}
    for key in network.state_dict():
        match key.split("."):
            case ["encoder", "stem", *rest]:
                words = ["encoder.stem.convs.0", *rest]
            case ["encoder", "stages", stage, "entry", "shortcut", *rest]:
                # The host's shortcut is a list, and pooling stands before the convolution.
                words = [f"encoder.stages.{stage}.blocks.0.skip.{int(max(strides[int(stage)]) > 1)}", *rest]
            case ["encoder", "stages", stage, "entry", part, *rest]:
                words = [f"encoder.stages.{stage}.blocks.0.{_inner(part)}", *rest]
            case ["encoder", "stages", stage, "momentum", "blocks", block, part, *rest]:
                words = [f"encoder.stages.{stage}.blocks.{int(block) + 1}.{_inner(part)}", *rest]
            case ["decoder", "stages", stage, "upsample", *rest]:
                words = [f"decoder.transpconvs.{last - int(stage)}", *rest]
            case ["decoder", "stages", stage, "fuse", *rest]:
                words = [f"decoder.stages.{last - int(stage)}.convs.0", *rest]
            case ["heads", head, *rest]:
                words = [f"decoder.seg_layers.{last - int(head)}", *rest]
            case _:
                raise ValueError(f"{key} has no place in the host. Build the network without it.")
        names[key] = ".".join(words)
    return names


def _plain_host_names(network: PlainUNet) -> dict[str, str]:
    """The host's name of every weight of a plain network, by ours."""
    last = len(network.heads) - 1
    names = {}
    for key in network.state_dict():
        match key.split("."):
            case ["encoder", stage, *rest]:
                words = ["encoder.stages", stage, "0.convs", *rest]
            case ["upsample", stage, *rest]:
                words = ["decoder.transpconvs", str(last - int(stage)), *rest]
            case ["decoder", stage, *rest]:
                words = ["decoder.stages", str(last - int(stage)), "convs", *rest]
            case [_, head, *rest]:
                words = ["decoder.seg_layers", str(last - int(head)), *rest]
        names[key] = ".".join(words)
    return names


def _inner(part: str) -> str:
    """``conv1`` of a block is ``conv1.conv`` in the host, ``norm1`` is ``conv1.norm``."""
    return f"conv{part[-1]}.{part[:-1]}"


def _all_names(name: str) -> Iterator[str]:
    """Every name under which the host keeps a weight: its decoder holds the encoder, its layers stand in lists."""
    for place in (name, f"decoder.{name}") if name.startswith("encoder.") else (name,):
        yield place
        for layer, number in ((".conv.", ".all_modules.0."), (".norm.", ".all_modules.1.")):
            if layer in place:
                yield place.replace(layer, number)
