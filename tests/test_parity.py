"""The presets with gate 0 are the networks that others know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_unet import peer_state
from torch import nn

from medmom.models import MomentumUNet, mom2d_m, mom2d_s, mom3d_m, mom3d_s, mom3d_sr, plan_kernels_and_strides

pytestmark = pytest.mark.peers

CASES: dict[str, tuple[Any, tuple[int, ...], tuple[Sequence[int], Sequence[float]] | None]] = {
    "mom2d_s": (mom2d_s, (32, 64), None),
    "mom2d_m": (mom2d_m, (64, 128), None),
    "mom3d_s": (mom3d_s, (16, 16, 24), None),
    "mom3d_sr, as planned for thick slices": (mom3d_sr, (32, 32, 4), ((64, 64, 16), (0.5, 0.5, 2.0))),
    "mom3d_m": (mom3d_m, (32, 32, 64), None),
}


def host(network: MomentumUNet) -> nn.Module:
    """The reference network of the same shape with the same weights."""
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    shape = network.arguments
    is_flat = len(network.divisor) == 2
    with torch.device("meta"):
        reference: nn.Module = architectures.ResidualEncoderUNet(
            shape["in_channels"],
            len(shape["channels"]),
            shape["channels"],
            nn.Conv2d if is_flat else nn.Conv3d,
            shape["kernels"],
            shape["strides"],
            shape["blocks"],
            shape["out_channels"],
            [1] * (len(shape["channels"]) - 1),
            conv_bias=True,
            norm_op=nn.InstanceNorm2d if is_flat else nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=True,
        )
    ours = peer_state(network)
    # The reference lists its layers under several names.
    names = {key: re.sub(r"^decoder\.encoder\.", "encoder.", key) for key in reference.state_dict()}
    names = {key: re.sub(r"skip\.[01]\.", "shortcut.", name) for key, name in names.items()}
    for number, layer in enumerate(("conv", "norm")):
        names = {key: name.replace(f"all_modules.{number}", layer) for key, name in names.items()}
    assert set(names.values()) == set(ours)
    reference.load_state_dict({key: ours[name] for key, name in names.items()}, assign=True)
    return reference


@pytest.mark.parametrize("name", CASES)
def test_preset_with_gate_zero_gives_the_logits_of_the_host(name: str) -> None:
    preset, size, plan = CASES[name]
    stages = len(preset(1, 3).arguments["channels"]) if plan is None else 4
    kernels, strides = (None, None) if plan is None else plan_kernels_and_strides(*plan, stages)
    torch.manual_seed(0)
    network = preset(1, 3, gate=0, kernels=kernels, strides=strides)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        image = torch.randn(1, 1, *size)
        for ours, theirs in zip(network(image), host(network)(image), strict=True):
            assert ours.std() > 0.1
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
