from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor, nn

from medmom.checkpoint import read_saved
from medmom.errors import MedmomError
from medmom.models import from_host, to_dense
from medmom.package import load_package, package_folder

WRAPPERS = ("_orig_mod", "backbone", "model", "module", "network", "unet")
"""Words that wrappers, Lightning and networks with a network in them put before the name of a weight."""

PLACES = ("network_weights", "state_dict", "model_state_dict", "model")
"""Where a file that is no state_dict itself keeps one: nnU-Net's, Lightning's, and two that are common."""

HOST_WORDS = ("encoder.stem.convs.", ".transpconvs.", ".seg_layers.", ".all_modules.")
"""Parts of names that only networks of nnU-Net have."""


class Weights(NamedTuple):
    """Weights of another network.

    Attributes:
        tensors: By the names that networks of medmom have for them, without wrappers; kernels in the order (x, y, z).
        arguments: What is known of that network, as its ``arguments``.
    """

    tensors: dict[str, Tensor]
    arguments: Mapping[str, Any]


def read_weights(path: Path, network: nn.Module) -> Weights:
    """Reads the weights of a model package or checkpoint, without running anything in it.

    Args:
        path: A run folder or model package; or a ``state_dict`` as ``safetensors`` or of ``torch.save``, by itself or
            as nnU-Net v2 and Lightning keep it.
        network: Which is to have them; where it can take those of torchvision's ResNet-50, these are known too.

    Returns:
        The weights, on the CPU; of a package's low-rank layers multiplied out. Those of nnU-Net's residual-encoder
        U-Net and of torchvision have names and axes of ours, see ``medmom.models.convert.from_host``.

    Raises:
        MedmomError: There is no such file, it is damaged or would have to run code, it holds no weights, factors of
            low-rank layers outside a package, or the weights of a network of nnU-Net that has no equal here.
    """
    try:
        is_package = path.is_dir() or package_folder(path) is not None
        if not is_package:
            with path.open("rb") as file:
                content = _saved_tensors(path) if path.suffix == ".safetensors" else read_saved(file, path)
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check path and permissions.") from None
    if is_package:
        theirs: Any = to_dense(load_package(path).network)
        return Weights(_by_plain_name(theirs.state_dict()), theirs.arguments)
    tensors = _by_plain_name(_tensors(path, content))
    _check_dense(path, tensors)
    if any(word in name for name in tensors for word in HOST_WORDS):
        return _of_host(path, tensors, _plans(content))
    if hasattr(network, "load_torchvision") and "layer1.0.conv1.weight" in tensors:
        own = {plain_name(name) for name in network.state_dict()}
        # Images there are (y, x).
        turned = {f"encoder.{name}": (name, _turned(value, (1, 0))) for name, value in tensors.items()}
        return Weights({ours if ours in own else name: value for ours, (name, value) in turned.items()}, {})
    return Weights(tensors, {})


def plain_name(name: str) -> str:
    """Gives the name of a weight without the words that wrappers put before it."""
    words = name.split(".")
    while len(words) > 1 and words[0] in WRAPPERS:
        words = words[1:]
    return ".".join(words)


def _saved_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError):
        raise MedmomError(f"{path}: not a sound safetensors file. Copy it again from its source.") from None
    return tensors


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """Tensors by name, wherever in the file they are."""
    if isinstance(content, Mapping):
        for candidate in (*(content.get(place) for place in PLACES), content):
            items = candidate.items() if isinstance(candidate, Mapping) else ()
            found = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
            if found:
                return found
    raise MedmomError(
        f"{path}: no weights in it, neither as a state_dict nor under {', '.join(PLACES[:-1])} or {PLACES[-1]}. Give "
        "the state_dict of a network."
    )


def _by_plain_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without wrappers; of two of one name the first."""
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain.setdefault(plain_name(name), value)
    return plain


def _check_dense(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses factors: they do not tell the edges of a kernel, and half of a network would be left out unnoticed."""
    layers = [name.removesuffix(".ranks") for name in tensors if name.endswith(".ranks")]
    factored = [layer for layer in layers if all(f"{layer}.{part}" in tensors for part in ("u", "s", "v"))]
    if factored:
        raise MedmomError(
            f"{path}: {len(factored)} layers are factors of a low rank ({factored[0]}), without the edges of their "
            "kernels. Give the run folder, or its model package, which has them."
        )


def _of_host(path: Path, tensors: Mapping[str, Tensor], plans: Mapping[str, Any]) -> Weights:
    try:
        host = from_host(tensors)
    except ValueError as error:
        raise MedmomError(f"{path}: {error}") from None
    num_axes = len(host.divisor)
    order = plans.get("transpose_forward")
    if num_axes == 2 or not isinstance(order, list | tuple) or sorted(map(str, order)) != ["0", "1", "2"]:
        order = range(num_axes)
    # Axis i of the host is axis order[i] of (z, y, x); a slice has the two that are left, the later one first here.
    axes = [list(order).index(num_axes - 1 - axis) for axis in range(num_axes)]
    return Weights({name: _turned(value, axes) for name, value in host.state_dict().items()}, host.arguments)


def _plans(content: Any) -> Mapping[str, Any]:
    """Plans of an nnU-Net checkpoint; empty where it has none."""
    for key in ("init_args", "plans"):
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _turned(value: Tensor, axes: Sequence[int]) -> Tensor:
    """A kernel with its spatial axes in this order; other weights as they are."""
    return value.permute(0, 1, *(2 + axis for axis in axes)) if value.ndim == 2 + len(axes) else value
