from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from encoders import BLOCKS, CHANNELS, MEMORIES, VELOCITIES, make_encoder, make_image, stages_of
from torch import Tensor, nn

from medmom.models.blocks import NormAct, ResidualBlock, initialise
from medmom.models.encoder import MomentumEncoder
from medmom.models.gates import residual_weight
from medmom.models.presets import SIZES, mom2d_m, mom3d_m


@pytest.mark.parametrize("block", ["postact", "preact"])
@pytest.mark.parametrize("velocity", VELOCITIES)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_features_of_every_stage_come_first_stage_first(spatial_dims: int, velocity: str, block: str) -> None:
    features = make_encoder(spatial_dims, velocity=velocity, block=block)(make_image(spatial_dims, 8))
    edges = [[8] * spatial_dims, [4] * spatial_dims, [2] * spatial_dims, [2] * (spatial_dims - 1) + [1]]
    if spatial_dims == 2:
        assert [list(feature.shape[2:]) for feature in features] == edges
    assert [feature.shape[1] for feature in features] == list(CHANNELS)


def test_stem_may_have_a_stride() -> None:
    encoder = make_encoder(stem_stride=[2, 2])
    assert [feature.shape[-1] for feature in encoder(make_image())] == [8, 4, 2, 1]


def test_kernels_and_strides_may_differ_by_axis() -> None:
    encoder = make_encoder(kernels=[[3, 1], [3, 3], [3, 3], [3, 3]], strides=[[1, 1], [2, 1], [2, 2], [1, 1]])
    shapes = [tuple(feature.shape[2:]) for feature in encoder(make_image())]
    assert shapes == [(16, 16), (8, 16), (4, 8), (4, 8)]


def test_keys_are_those_of_the_host_and_options_only_add() -> None:
    host = set(make_encoder().state_dict())
    assert {"stem.conv.weight", "stages.1.entry.conv1.weight", "stages.1.momentum.blocks.0.conv1.weight"} <= host
    assert set(make_encoder(velocity="learned").state_dict()) > host
    assert set(make_encoder(velocity="carry").state_dict()) - host == {
        f"stages.{i}.carry.conv.weight" for i in (1, 2, 3)
    }
    learned = set(make_encoder(gating="block").state_dict()) - host
    assert learned == {f"stages.{s}.momentum.rho.{i}" for s in (1, 2, 3) for i in range(BLOCKS[s] - 1)}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_memory_changes_no_key(velocity: str, memory: str) -> None:
    encoder = make_encoder(velocity=velocity, gate=7 / 8)
    other = make_encoder(velocity=velocity, gate=7 / 8, memory=memory, seed=1)
    other.load_state_dict(encoder.state_dict())
    for found, expected in zip(other(make_image()), encoder(make_image()), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if memory == "exact" else 1e-5)


@pytest.mark.parametrize(
    ("norm", "kind"), [("instance", nn.InstanceNorm2d), ("group", nn.GroupNorm), ("batch", nn.BatchNorm2d)]
)
@pytest.mark.parametrize("block", ["postact", "preact"])
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_every_norm_of_the_encoder_is_of_its_kind(velocity: str, block: str, norm: str, kind: type) -> None:
    encoder = make_encoder(norm=norm, block=block, velocity=velocity)
    kinds = {
        type(part) for part in encoder.modules() if "Norm" in type(part).__name__ and not isinstance(part, NormAct)
    }
    assert {kind} == {found for found in kinds if found.__module__.startswith("torch.")}


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (8, 1), (16, 2), (20, 2), (32, 4), (320, 40), (12, 1)])
def test_groups_have_eight_channels_or_the_next_more(channels: int, groups: int) -> None:
    norm = make_encoder(norm="group", channels=[channels] * 4).stem.norm
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups


def test_stages_of_preactivation_blocks_end_in_norm_and_activation() -> None:
    encoder = make_encoder(block="preact")
    assert [stage.finish is None for stage in stages_of(encoder)] == [True, False, False, False]
    assert all(stage.finish is None for stage in stages_of(make_encoder()))
    stage = stages_of(encoder)[2]
    x = torch.randn(1, CHANNELS[1], 8, 8)
    features, velocity = stage.momentum.flow(stage.entry(x))
    assert stage.finish is not None and velocity is not None
    found, moved = stage(x)
    assert moved is not None
    assert torch.equal(found, nn.functional.leaky_relu(stage.finish.norm(features), 0.01))
    assert torch.equal(moved, velocity)


def test_unknown_words_are_refused_with_the_known_ones() -> None:
    for name, known in {
        "velocity": "zero, learned, carry",
        "block": "postact, preact",
        "norm": "instance, group, batch",
        "memory": "plain, checkpoint, reversible, hybrid, exact",
    }.items():
        options: dict[str, Any] = {name: "fast"}
        with pytest.raises(ValueError, match=f"{name} is 'fast'; it is one of {known}"):
            make_encoder(**options)


# Velocity


def naive(encoder: MomentumEncoder, image: Tensor) -> list[Tensor]:
    """The encoder by its formula, for blocks that end in an activation."""
    g = encoder.gate
    x, v = encoder.stem(image), None
    features = []
    for stage in stages_of(encoder):
        coupling, blocks = stage.momentum.coupling, stage.momentum.blocks
        entry = stage.entry
        if stage.velocity == "carry":
            v0 = residual_weight(coupling, g, 1) * entry.norm2(entry.conv2(act(entry.norm1(entry.conv1(x)))))
            if stage.carry is not None and v is not None:
                pooled = nn.functional.avg_pool2d(v, [a // b for a, b in zip(v.shape[2:], v0.shape[2:], strict=True)])
                v0 = v0 + g * nn.functional.conv2d(pooled, stage.carry.conv.weight)  # type: ignore[arg-type]
            x, v = act(entry.shortcut(x) + v0), v0
        else:
            x = entry(x)
            v = None if stage.start is None else stage.start.norm(stage.start.conv(x))
        c = residual_weight(coupling, g, max(1, len(blocks)))
        for block in blocks:
            step = c * (block(x) - x)
            v = step if v is None else g * v + step
            x = x + v
        features.append(x)
    return features


def act(x: Tensor) -> Tensor:
    return nn.functional.leaky_relu(x, 0.01)


@pytest.mark.parametrize("coupling", ["normalised", "ema"])
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_encoder_equals_its_formula(velocity: str, coupling: str) -> None:
    encoder = make_encoder(velocity=velocity, coupling=coupling, gate=0.8).double()
    image = make_image().double()
    for found, expected in zip(encoder(image), naive(encoder, image), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_nothing_is_carried_at_the_start() -> None:
    encoder = make_encoder(velocity="carry")
    initialise(encoder)
    assert stages_of(encoder)[0].carry is None
    for stage in stages_of(encoder)[1:]:
        assert stage.carry is not None
        assert not stage.carry.conv.weight.any()  # type: ignore[operator]
        assert stage.carry.conv.bias is None


def test_learned_velocity_is_zero_at_the_start_and_can_be_learned() -> None:
    encoder = make_encoder(velocity="learned")
    initialise(encoder)
    assert [stage.start is None for stage in stages_of(encoder)] == [True, False, False, False]
    torch.stack([feature.sum() for feature in encoder(make_image())]).sum().backward()  # type: ignore[no-untyped-call]
    for stage, width in zip(stages_of(encoder)[1:], CHANNELS[1:], strict=True):
        assert stage.start is not None
        assert not stage.start(torch.randn(1, width, 4, 4)).any()
        assert all(p.grad is not None and p.grad.any() for p in stage.start.zero_at_start())


@pytest.mark.parametrize("velocity", ["learned", "carry"])
def test_velocity_that_starts_at_zero_gives_the_encoder_without(velocity: str) -> None:
    # With carry, the entry block's branch is the first velocity, and with gate 0 it is forgotten.
    gate = 0.0 if velocity == "carry" else 0.9
    host, encoder = make_encoder(gate=gate), make_encoder(gate=gate, velocity=velocity)
    for stage in stages_of(encoder):
        for part in (stage.start, stage.carry):
            for parameter in [] if part is None else part.zero_at_start():
                nn.init.zeros_(parameter)
    encoder.load_state_dict(host.state_dict(), strict=False)
    for found, expected in zip(encoder(make_image()), host(make_image()), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("coupling", ["normalised", "ema"])
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_gate_zero_gives_the_host_whatever_the_velocity(velocity: str, coupling: str) -> None:
    encoder = make_encoder(velocity=velocity, coupling=coupling, gate=0)
    x = encoder.stem(make_image())
    for stage, feature in zip(stages_of(encoder), encoder(make_image()), strict=True):
        x = nn.Sequential(stage.entry, *stage.momentum.blocks)(x)
        torch.testing.assert_close(feature, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "carried"), [("mom3d_m", 227_328), ("mom2d_m", 698_368)])
def test_carrying_costs_the_published_parameters(name: str, carried: int) -> None:
    preset = {"mom3d_m": mom3d_m, "mom2d_m": mom2d_m}[name]
    with torch.device("meta"):
        zero, carry = (preset(1, 3, velocity=velocity) for velocity in ("zero", "carry"))
    count = [sum(parameter.numel() for parameter in network.parameters()) for network in (zero, carry)]
    assert count[1] - count[0] == carried
    assert carried == sum(above * width for above, width in pairwise(SIZES[name].channels))


@pytest.mark.parametrize(("gating", "gates"), [("fixed", 0), ("block", 20), ("channel", 4992)])
def test_gates_cost_the_published_parameters(gating: str, gates: int) -> None:
    with torch.device("meta"):
        network = mom3d_m(1, 3, gating=gating)  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in network.parameters()) == 102_350_575 + gates


@pytest.mark.parametrize("memory", ["plain", *MEMORIES])
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_carried_velocity_brings_gradients_to_the_stage_above(velocity: str, memory: str) -> None:
    encoder = make_encoder(velocity=velocity, gate=7 / 8, memory=memory)
    above, stage = stages_of(encoder)[2:]
    x, moved = above(torch.randn(1, CHANNELS[1], 8, 8))
    assert moved is not None
    stage(x.detach(), moved)[0].square().sum().backward()
    reached = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in above.momentum.parameters()]
    assert any(reached) == (velocity == "carry")


def test_carried_velocity_passes_through_a_stage_without_momentum_blocks() -> None:
    encoder = make_encoder(velocity="carry", blocks=(1, 1, 1, 3), gate=0.8)
    _, moved = stages_of(encoder)[0](encoder.stem(make_image()), None)
    assert moved is not None and moved.any()
    encoder(make_image())[-1].square().sum().backward()
    for stage in stages_of(encoder)[1:]:
        assert stage.carry is not None
        assert all(p.grad is not None and p.grad.any() for p in stage.carry.parameters())


@pytest.mark.parametrize("velocity", ["zero", "learned"])
def test_velocity_of_the_stage_above_is_taken_up_only_where_it_is_carried(velocity: str) -> None:
    stage = stages_of(make_encoder(velocity=velocity))[2]
    x = torch.randn(1, CHANNELS[1], 8, 8)
    assert torch.equal(stage(x)[0], stage(x, torch.randn_like(x))[0])


def test_zero_at_the_start_makes_every_block_its_shortcut() -> None:
    for block in ("postact", "preact"):
        encoder = make_encoder(block=block, gate=0.9)
        initialise(encoder)
        stage = stages_of(encoder)[3]
        x = torch.randn(1, 8, 4, 4).abs()
        torch.testing.assert_close(stage.momentum(x), x, rtol=0, atol=0)
        assert isinstance(stage.entry, ResidualBlock)


def test_one_channel_of_gates_a_stage_wide() -> None:
    encoder = make_encoder(gating="channel")
    shapes = [tuple(stage.momentum.learned_gates().shape) for stage in stages_of(encoder)]
    assert shapes == [(0, 1), (1, 6), (2, 8), (3, 8)]
