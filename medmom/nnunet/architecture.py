"""The network that plans of nnU-Net v2 describe, in our order of axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmom.errors import MedmomError

BLOCKS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
"""Networks that are known, and what their stages count."""

OLD = "UNet_class_name"
"""Field of plans before version 2.4, which had no ``architecture``."""

MOST_STAGES = 32
"""Far more than any image can be halved."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a network.

    Attributes:
        kind: ``PlainConvUNet`` or ``ResidualEncoderUNet``.
        sizes: Arguments of ours that the plans fix, by name; edges and strides by axis (x, y, z).
    """

    kind: str
    sizes: dict[str, Any]


def read_architecture(path: Path, options: Mapping[str, Any]) -> Architecture:
    """Reads the network of a configuration.

    Args:
        path: Of the plans, for messages.
        options: The configuration, inherited fields included.

    Raises:
        MedmomError: It is another network than a plain or a residual-encoder U-Net with instance normalisation and
            leaky ReLU; the part that differs is named.
        KeyError: A field is missing.
        TypeError: A field is of another type.
        ValueError: A field has another length than the others.
    """
    if "architecture" in options:
        name = options["architecture"]["network_class_name"]
        # What is not said is left out there.
        fields = {"conv_bias": False, "norm_op": None, "nonlin": None, **options["architecture"]["arch_kwargs"]}
    else:
        name, fields = options[OLD], _of_old_plans(options)
    kind = str(name).rpartition(".")[2]
    if kind not in BLOCKS:
        raise MedmomError(f"{path}: the network is a {name}; known are {' and '.join(BLOCKS)}. Predict with nnU-Net.")
    num_axes, num_stages = len(options["patch_size"]), fields["n_stages"]
    if type(num_stages) is not int or not 2 <= num_stages <= MOST_STAGES:
        raise ValueError(f"n_stages is {num_stages!r:.40}")
    sizes = {
        "channels": _by_stage(fields.pop("features_per_stage"), num_stages),
        "kernels": _by_axis(fields.pop("kernel_sizes"), num_stages, num_axes),
        "strides": _by_axis(fields.pop("strides"), num_stages, num_axes),
    }
    counts = _by_stage(fields.pop(BLOCKS[kind]), num_stages)
    # There the decoder is told from the bottleneck up.
    decoder = _by_stage(fields.pop("n_conv_per_stage_decoder"), num_stages - 1)[::-1]
    if kind == "PlainConvUNet":
        sizes |= {"convolutions": counts, "decoder_convolutions": decoder}
    else:
        sizes |= {"blocks": counts}
    _refuse_parts(path, fields, num_axes)
    return Architecture(kind, sizes)


def _of_old_plans(options: Mapping[str, Any]) -> dict[str, Any]:
    counts = options["n_conv_per_stage_encoder"]
    first, most = options["UNet_base_num_features"], options["unet_max_num_features"]
    fields = {
        "n_stages": len(counts),
        "features_per_stage": [min(first * 2**stage, most) for stage in range(len(counts))],
        "kernel_sizes": options["conv_kernel_sizes"],
        "strides": options["pool_op_kernel_sizes"],
        "n_conv_per_stage_decoder": options["n_conv_per_stage_decoder"],
    }
    return {**fields, **dict.fromkeys(BLOCKS.values(), counts)}


def _by_stage(value: Any, num_stages: int) -> list[int]:
    values = [value] * num_stages if isinstance(value, int) else list(value)
    if len(values) != num_stages or any(type(number) is not int or number < 1 for number in values):
        raise ValueError(f"{values} for {num_stages} stages")
    return values


def _by_axis(value: Any, num_stages: int, num_axes: int) -> list[list[int]]:
    """Edges of every stage, turned from (z, y, x) to (x, y, z)."""
    values = [value] * num_stages if isinstance(value, int) else list(value)
    if len(values) != num_stages:
        raise ValueError(f"{values} for {num_stages} stages")
    return [_by_stage(edges, num_axes)[::-1] for edges in values]


def _refuse_parts(path: Path, fields: Mapping[str, Any], num_axes: int) -> None:
    """Refuses parts that our networks do not have; weights do not show all of them."""
    usual: dict[str, tuple[Any, ...]] = {
        "n_stages": (fields["n_stages"],),
        "conv_op": (f"Conv{num_axes}d",),
        "conv_bias": (True,),
        "norm_op": (f"InstanceNorm{num_axes}d",),
        "norm_op_kwargs": ({"eps": 1e-5, "affine": True}, {"affine": True}),
        "nonlin": ("LeakyReLU",),
        "nonlin_kwargs": ({"inplace": True}, {"inplace": False}, {}, None),
        "dropout_op_kwargs": (fields.get("dropout_op_kwargs"),),
        "block": (None, "BasicBlockD"),
        **dict.fromkeys(BLOCKS.values(), (fields.get("n_conv_per_stage"), fields.get("n_blocks_per_stage"))),
    }
    for key, value in fields.items():
        plain = value.rpartition(".")[2] if isinstance(value, str) else value
        if isinstance(plain, dict):
            plain = {name: part for name, part in plain.items() if (name, part) != ("negative_slope", 0.01)}
        if plain not in usual.get(key, (None, False)):
            raise MedmomError(f"{path}: the network has {key} {value}, which has no equal here. Predict with nnU-Net.")
