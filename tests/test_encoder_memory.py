from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import BLOCKS, CHANNELS, MEMORIES, VELOCITIES, make_encoder, make_image, stages_of
from stages import difference, saved_bytes
from torch import Tensor

from medmom.models.encoder import MomentumEncoder
from medmom.models.unet import MomentumUNet


def gradients(encoder: MomentumEncoder, image: Tensor) -> dict[str, Tensor]:
    image = image.clone().requires_grad_()
    loss = torch.stack([(feature.square() + feature).mean() for feature in encoder(image)]).sum()
    named = {**dict(encoder.named_parameters()), "image": image}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(named[name]) if g is None else g for name, g in zip(named, found, strict=True)}


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
@pytest.mark.parametrize("block", ["postact", "preact"])
@pytest.mark.parametrize("velocity", VELOCITIES)
@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "hybrid"])
def test_gradients_of_every_memory_are_those_of_plain(memory: str, velocity: str, block: str, norm: str) -> None:
    encoder = make_encoder(velocity=velocity, block=block, norm=norm, gating="channel").double()
    image = make_image().double()
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    expected = gradients(encoder, image)
    plain = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder.load_state_dict(start)
    encoder.memory = memory
    assert difference(gradients(encoder, image), expected) <= 1e-10
    for name, value in encoder.named_buffers():
        torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("memory", MEMORIES)
def test_gradients_of_every_memory_hold_in_three_dimensions(memory: str) -> None:
    encoder = make_encoder(3, velocity="carry", gate=7 / 8).double()
    image = make_image(3, 8).double()
    expected = gradients(encoder, image)
    encoder.memory = memory
    assert difference(gradients(encoder, image), expected) <= (1e-3 if memory == "exact" else 1e-10)


@pytest.mark.parametrize("velocity", VELOCITIES)
def test_gradients_of_exact_are_near_those_of_plain(velocity: str) -> None:
    encoder = make_encoder(velocity=velocity, gate=7 / 8, norm="group").double()
    expected = gradients(encoder, make_image().double())
    encoder.memory = "exact"
    # A sign that a rounding turns in a leaky ReLU is worth more than the rounding.
    assert difference(gradients(encoder, make_image().double()), expected) <= 1e-3


MEANING = {
    "plain": ("plain", "plain", False),
    "checkpoint": ("checkpoint", "checkpoint", True),
    "reversible": ("reversible", "plain", False),
    "hybrid": ("reversible", "checkpoint", True),
    "exact": ("exact", "plain", False),
}


@pytest.mark.parametrize("before", MEANING)
@pytest.mark.parametrize("memory", MEANING)
def test_memory_means_what_it_says_in_every_stage(memory: str, before: str) -> None:
    encoder = make_encoder(gate=7 / 8, memory=before)
    encoder.memory = memory
    deep, shallow, is_checkpointed = MEANING[memory]
    assert encoder.memory == memory
    assert [stage.momentum.memory for stage in stages_of(encoder)] == [shallow, shallow, deep, deep]
    assert {stage.is_checkpointed for stage in stages_of(encoder)} == {is_checkpointed}


@pytest.mark.parametrize("velocity", VELOCITIES)
def test_bytes_kept_fall_from_plain_over_reversible_to_hybrid(velocity: str) -> None:
    encoder = make_encoder(velocity=velocity, gate=7 / 8, blocks=(1, 5, 5, 5))
    image = make_image().requires_grad_()
    kept = {}
    for memory in MEANING:
        encoder.memory = memory
        kept[memory] = saved_bytes(encoder, image)
    assert kept["plain"] > kept["exact"] > kept["reversible"] > kept["hybrid"]
    assert kept["plain"] > kept["checkpoint"] > kept["hybrid"]


@pytest.mark.parametrize("block", ["postact", "preact"])
def test_checkpoint_keeps_what_goes_into_stem_and_blocks_and_no_more(block: str) -> None:
    encoder = make_encoder(gate=7 / 8, block=block, memory="checkpoint")
    image = make_image().requires_grad_()
    sizes = [feature[:1, :1].numel() * 2 * 4 for feature in encoder(image)]
    inputs = image.nbytes + sizes[0] * CHANNELS[0]
    for size, width, depth in zip(sizes, CHANNELS, BLOCKS, strict=True):
        # Into every momentum block, and out of the last one, which is what the next stage is given.
        inputs += size * width * (depth if block == "postact" or depth == 1 else depth + 1)
    assert saved_bytes(encoder, image) <= inputs * 1.01


@pytest.mark.parametrize("memory", ["reversible", "hybrid", "exact"])
def test_encoder_without_a_deep_stage_refuses_inversion(memory: str) -> None:
    message = f"memory {memory} needs a stage of two momentum blocks or more .* take memory plain or checkpoint"
    with pytest.raises(ValueError, match=message):
        make_encoder(blocks=(1, 2, 2, 1), gate=7 / 8, memory=memory)
    make_encoder(blocks=(1, 2, 2, 1), gate=7 / 8, memory="checkpoint")


@pytest.mark.parametrize("options", [{"gate": 0.0}, {"gate": 0.2}, {"blocks": (1, 1, 3, 9), "gate": 0.5}])
def test_memory_that_one_stage_refuses_changes_none(options: dict[str, Any]) -> None:
    encoder = make_encoder(**options, memory="checkpoint")
    before = [stage.momentum.memory for stage in stages_of(encoder)]
    for memory in ("reversible", "hybrid", "fast", *([] if options["gate"] == 0.5 else ["exact"])):
        with pytest.raises(ValueError, match=r"memory|gate"):
            encoder.memory = memory
        assert encoder.memory == "checkpoint"
        assert [stage.momentum.memory for stage in stages_of(encoder)] == before
        assert all(stage.is_checkpointed for stage in stages_of(encoder))


@pytest.mark.parametrize("memory", ["reversible", "hybrid", "exact"])
def test_gate_that_one_stage_refuses_changes_none(memory: str) -> None:
    encoder = make_encoder(blocks=(1, 2, 3, 9), gate=7 / 8, memory=memory)
    for gate in (0.0, 0.3, 1.1):
        with pytest.raises(ValueError, match="gate"):
            encoder.gate = gate
        assert encoder.gate == 7 / 8
        assert {stage.momentum.gate for stage in stages_of(encoder)} == {7 / 8}
    encoder.gate = 1
    assert {stage.momentum.gate for stage in stages_of(encoder)} == {1.0}


def test_batch_normalisation_of_a_deep_stage_alone_is_refused_by_exact() -> None:
    with pytest.raises(ValueError, match="take group normalisation"):
        make_encoder(norm="batch", gate=7 / 8, memory="exact")


@pytest.mark.parametrize("memory", ["plain", *MEMORIES])
def test_second_backward_gives_the_same_again(memory: str) -> None:
    encoder = make_encoder(gate=7 / 8, memory=memory)
    loss = torch.stack([feature.square().mean() for feature in encoder(make_image())]).sum()
    first = torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(encoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("memory", MEMORIES)
def test_without_gradients_every_memory_gives_the_bits_of_plain(memory: str) -> None:
    encoder = make_encoder(gate=7 / 8, velocity="carry").eval()
    with torch.no_grad():
        expected = encoder(make_image())
        encoder.memory = memory
        assert all(torch.equal(a, b) for a, b in zip(encoder(make_image()), expected, strict=True))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("velocity", VELOCITIES)
@pytest.mark.parametrize("block", ["postact", "preact"])
def test_network_trains_a_step_in_every_memory_under_autocast(block: str, velocity: str, memory: str) -> None:
    torch.manual_seed(0)
    network = MomentumUNet(
        2,
        3,
        channels=CHANNELS,
        blocks=BLOCKS,
        kernels=[[3, 3]] * 4,
        strides=[[1, 1], *[[2, 2]] * 2, [1, 1]],
        gate=7 / 8,
        velocity=velocity,  # type: ignore[arg-type]
        block=block,  # type: ignore[arg-type]
        memory=memory,  # type: ignore[arg-type]
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack([logits.float().square().mean() for logits in network(make_image())]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
