"""Momentum stages of a few weights, and what is compared of two of them, for the tests of the stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medmom.models.blocks import Norm, PreActivationBranch, ResidualBlock, convolution
from medmom.models.momentum import MomentumStage

CHANNELS = 3


class SmoothBlock(nn.Module):
    """A block without kinks: where a leaky ReLU sees a rounding turn a sign, gradients differ by far more than it."""

    def __init__(self, spatial_dims: int = 2, *, is_branch: bool = False) -> None:
        super().__init__()
        self.is_branch = is_branch
        self.conv1 = convolution(CHANNELS, CHANNELS, [3] * spatial_dims)
        self.norm = nn.GroupNorm(1, CHANNELS)
        self.conv2 = convolution(CHANNELS, CHANNELS, [3] * spatial_dims)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv2(torch.tanh(self.norm(self.conv1(x))))
        return residual if self.is_branch else x + residual


class Halving(nn.Module):
    """Gives ``-x / 2``: the smallest block, whose residual is known."""

    is_branch = True

    def forward(self, x: Tensor) -> Tensor:
        return -x / 2


def make_blocks(
    num_blocks: int, kind: str = "postact", *, spatial_dims: int = 2, norm: Norm = "instance", seed: int = 0
) -> list[nn.Module]:
    """Blocks with random weights, none of them zero at the start."""
    kernel = [3] * spatial_dims
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind.startswith("smooth"):
            return [SmoothBlock(spatial_dims, is_branch=kind == "smooth branch") for _ in range(num_blocks)]
        if kind == "preact":
            return [PreActivationBranch(CHANNELS, kernel, norm=norm) for _ in range(num_blocks)]
        return [ResidualBlock(CHANNELS, CHANNELS, kernel, norm=norm) for _ in range(num_blocks)]


def make_stage(
    num_blocks: int,
    gate: float,
    kind: str = "postact",
    *,
    spatial_dims: int = 2,
    norm: Norm = "instance",
    **options: Any,
) -> MomentumStage:
    """A stage of them; learned gates differ from one another."""
    blocks = make_blocks(num_blocks, kind, spatial_dims=spatial_dims, norm=norm)
    stage = MomentumStage(blocks, gate, channels=CHANNELS, **options)
    for index, rho in enumerate(stage.rho):
        with torch.no_grad():
            rho.add_(torch.linspace(-0.3, 0.4, rho.numel()) + 0.1 * index)
    return stage


def make_inputs(
    spatial_dims: int = 2, *, has_velocity: bool = True, edge: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Features, and a velocity where one is asked for."""
    generator = torch.Generator().manual_seed(7)
    x, velocity = torch.randn(2, 2, CHANNELS, *range(edge, edge + spatial_dims), generator=generator).to(dtype)
    return x, 0.5 * velocity if has_velocity else None


def gradients(
    stage: MomentumStage, x: Tensor, velocity: Tensor | None = None, *, on: str = "both"
) -> dict[str, Tensor]:
    """Gradients of a loss on features, velocity or both by all parameters and inputs."""
    inputs = {"x": x.detach().clone().requires_grad_()}
    if velocity is not None:
        inputs["velocity"] = velocity.detach().clone().requires_grad_()
    features, moved = stage.flow(*inputs.values())
    assert moved is not None
    generator = torch.Generator().manual_seed(8)
    weights = torch.randn(2, *x.shape, generator=generator).to(features)
    on_features, on_velocity = (
        (output.square() + output * weight).sum()
        for output, weight in zip((features, moved.to(features.dtype)), weights, strict=True)
    )
    loss = {"features": on_features, "velocity": on_velocity, "both": on_features + on_velocity}[on]
    named = dict(stage.named_parameters()) | inputs
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(named[name]) if g is None else g for name, g in zip(named, found, strict=True)}


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all gradients together, in shares of the norm of the expected ones."""
    assert found.keys() == expected.keys()
    apart = sum((found[name].double() - expected[name].double()).square().sum() for name in found)
    return float((apart / sum(grad.double().square().sum() for grad in expected.values())) ** 0.5)


def gate_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The same of the gates alone, which the others would outweigh."""
    names = [name for name in expected if name.startswith("rho")]
    return difference({name: found[name] for name in names}, {name: expected[name] for name in names}) if names else 0.0


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a module keeps for its backward pass, its parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    # The tensors are held, so that no two of them come to lie at one address.
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)
    del output
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
