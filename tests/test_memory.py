"""A network's memory changes what is kept for the backward pass, and nothing else."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from stages import difference, saved_bytes
from torch import Tensor
from unets import AXES, MEMORIES, PAIRS, VARIANTS, gradients, loss_of, make_image, make_unet, memories_of

from medmom.models import MomentumUNet

INVERTED = ("reversible", "hybrid", "exact")
# Of all gradients together; rounding to whole units moves a few leaky ReLUs over their kink.
TOLERANCE = {"checkpoint": 0.0, "reversible": 1e-5, "hybrid": 1e-5, "exact": 1e-3}


def in_memory(network: MomentumUNet, memory: str) -> MomentumUNet:
    """A copy with another memory."""
    other = copy.deepcopy(network)
    other.memory = memory
    return other


def check(network: MomentumUNet, memory: str, image: Tensor) -> None:
    other = in_memory(network, memory)
    for ours, plain in zip(other(image), network(image), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 if memory == "exact" else 0)
    assert difference(gradients(other, image), gradients(network, image)) <= TOLERANCE[memory]


@pytest.mark.parametrize(("variant", "memory"), PAIRS)
def test_memory_changes_neither_logits_nor_gradients(variant: str, memory: str) -> None:
    network = make_unet(**VARIANTS[variant])
    check(network, memory, make_image(network))


@pytest.mark.parametrize("axes", [name for name in AXES if name != "2-D"])
@pytest.mark.parametrize("variant", ["host", "all at once"])
def test_memory_changes_nothing_on_any_axes(axes: str, variant: str) -> None:
    network = make_unet(axes, **VARIANTS[variant])
    for memory in memories_of(variant, besides=("plain",)):
        check(network, memory, make_image(network, batch=1 if "3" in axes else 2, cells=2))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory", ["reversible", "hybrid"])
def test_gradients_agree_to_ten_digits_in_double_precision(variant: str, memory: str) -> None:
    network = make_unet(**VARIANTS[variant]).double()
    image = make_image(network).double()
    found, expected = gradients(in_memory(network, memory), image), gradients(network, image)
    assert difference(found, expected) <= 1e-10
    gates = [name for name in expected if "rho" in name]
    assert len(gates) == (4 if "gating" in VARIANTS[variant] else 0)
    for name in gates:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("memory", INVERTED)
def test_image_has_the_gradient_of_the_plain_network(memory: str) -> None:
    network = make_unet()
    image = make_image(network).requires_grad_()
    (plain,) = torch.autograd.grad(loss_of(network(image)), image)
    (found,) = torch.autograd.grad(loss_of(in_memory(network, memory)(image)), image)
    assert difference({"image": found}, {"image": plain}) <= TOLERANCE[memory]


@pytest.mark.parametrize("memory", MEMORIES)
def test_memory_format_does_not_change_the_gradients(memory: str) -> None:
    for axes, layout in (("2-D", torch.channels_last), ("3-D", torch.channels_last_3d)):
        network = make_unet(axes, memory=memory)
        image = make_image(network, cells=2)
        expected = gradients(network, image)
        network.to(memory_format=layout)  # type: ignore[call-overload]
        found = gradients(network, image.to(memory_format=layout))
        assert difference(found, expected) <= max(1e-5, TOLERANCE.get(memory, 0))


def train(memories: list[str], **changes: Any) -> dict[str, Tensor]:
    """Weights after a step in each memory, one after the other."""
    network = make_unet(**changes)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step, memory in enumerate(memories):
        network.memory = memory
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(network(make_image(network, seed=step))))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("variant", ["host", "all at once"])
def test_memory_can_be_changed_between_two_steps(variant: str) -> None:
    changing = [*memories_of(variant), "plain", "hybrid"]
    plain = train(["plain"] * len(changing), **VARIANTS[variant])
    assert difference(train(changing, **VARIANTS[variant]), plain) <= 1e-4
    assert difference(train(changing[:-1], **VARIANTS[variant]), plain) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_one_memory_suit_every_other(variant: str) -> None:
    state = make_unet(seed=1, **VARIANTS[variant]).state_dict()
    image = make_image(make_unet())
    with torch.no_grad():
        expected = [t.clone() for t in _loaded(state, "plain", variant)(image)]
        for memory in memories_of(variant):
            network = _loaded(state, memory, variant)
            assert list(network.state_dict()) == list(state)
            # Without gradients every memory is the plain loop, to the bit.
            assert all(torch.equal(a, b) for a, b in zip(network(image), expected, strict=True))


def _loaded(state: dict[str, Tensor], memory: str, variant: str) -> MomentumUNet:
    network = make_unet(**VARIANTS[variant], memory=memory)
    network.load_state_dict(state)
    return network


@pytest.mark.parametrize(("variant", "memory"), PAIRS)
def test_arguments_rebuild_the_network_with_its_memory(variant: str, memory: str) -> None:
    network = make_unet(**VARIANTS[variant])
    network.memory = memory
    again = MomentumUNet(**json.loads(json.dumps(network.arguments)))
    assert again.memory == memory
    assert again.arguments == network.arguments
    again.load_state_dict(network.state_dict())
    image = make_image(network)
    assert all(torch.equal(a, b) for a, b in zip(again(image), network(image), strict=True))


def test_arguments_tell_the_gate_that_was_set_last() -> None:
    network = make_unet(memory="reversible")
    network.gate = 0.95
    assert (network.arguments["gate"], network.arguments["memory"]) == (0.95, "reversible")
    expected = make_unet(gate=0.95)
    assert difference(gradients(network, make_image(network)), gradients(expected, make_image(network))) <= 1e-5


@pytest.mark.parametrize("memory", MEMORIES[:-1])
def test_running_statistics_are_updated_once(memory: str) -> None:
    network = make_unet(norm="batch", velocity="learned", block="preact")
    other = in_memory(network, memory)
    gradients(network, make_image(network))
    gradients(other, make_image(network))
    plain, found = dict(network.named_buffers()), dict(other.named_buffers())
    assert {int(b) for name, b in found.items() if name.endswith("num_batches_tracked")} == {1}
    for name, expected in plain.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("variant", "memory"), [pair for pair in PAIRS if pair[0] in ("host", "batch", "carry")])
def test_backward_pass_can_be_run_again(variant: str, memory: str) -> None:
    network = make_unet(**VARIANTS[variant], memory=memory)
    loss = loss_of(network(make_image(network)))
    first, second = (torch.autograd.grad(loss, list(network.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("memory", INVERTED)
def test_second_derivative_is_refused(memory: str) -> None:
    network = make_unet(memory=memory)
    grads = torch.autograd.grad(loss_of(network(make_image(network))), list(network.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(torch.stack([grad.square().sum() for grad in grads]).sum())


@pytest.mark.parametrize("memory", MEMORIES)
def test_frozen_weights_are_left_alone(memory: str) -> None:
    for frozen in ("stages.1.momentum.blocks.0.", "momentum", "encoder"):
        network = make_unet(memory=memory)
        expected = gradients(network, make_image(network))
        network.zero_grad(set_to_none=True)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(frozen not in name)
        found = gradients(network, make_image(network))
        assert found.keys() == {name for name in expected if frozen not in name}
        assert all(torch.equal(found[name], expected[name]) for name in found)


def kept(memory: str, depth: int, **changes: Any) -> int:
    network = make_unet(channels=[8, 8, 8], blocks=[depth] * 3, gate=1, memory=memory, **changes)
    return saved_bytes(network, make_image(network, batch=1, cells=8))


@pytest.mark.parametrize("block", ["postact", "preact"])
def test_deep_network_keeps_least_in_hybrid_and_most_in_plain(block: str) -> None:
    plain, checkpoint, reversible, hybrid, exact = (kept(memory, 17, block=block) for memory in MEMORIES)
    assert hybrid < reversible <= exact < plain
    assert hybrid < checkpoint < plain
    assert hybrid < 0.15 * plain


@pytest.mark.parametrize("memory", INVERTED)
def test_what_an_inverted_network_keeps_does_not_grow_with_depth(memory: str) -> None:
    assert kept(memory, 17) == kept(memory, 5) == kept(memory, 3)
    assert kept("plain", 17) > 2 * kept("plain", 5)


@pytest.mark.parametrize("depths", [(1, 2, 6), (6, 1, 2), (2, 6, 1)])
def test_checkpointed_parts_keep_their_inputs_alone(depths: tuple[int, ...]) -> None:
    channels = 8
    network = make_unet(channels=[channels] * 3, blocks=depths)
    image = make_image(network, batch=1)
    features = [channels * 4 * image[0, 0].numel() // 4**stage for stage in range(3)]
    # What goes into stem and first entry block, and what decoder stages give to the heads.
    rest = 4 * image.numel() + features[0] + sum(features[:-1])
    inputs = sum(depth * size for depth, size in zip(depths, features, strict=True))
    assert saved_bytes(in_memory(network, "checkpoint"), image) == rest + inputs
    # A deep stage keeps features and velocity at its end; one of two blocks has as many inputs.
    ends = sum(min(depth, 2) * size for depth, size in zip(depths, features, strict=True))
    assert saved_bytes(in_memory(network, "hybrid"), image) == rest + ends


@pytest.mark.parametrize("memory", MEMORIES)
def test_illegal_patch_is_refused_in_every_memory(memory: str) -> None:
    network = make_unet(memory=memory)
    with pytest.raises(ValueError, match=r"^16 x 18 is not divisible by 4; the next size is 16 x 20\.$"):
        network(torch.zeros(1, 2, 16, 18))


@pytest.mark.parametrize("memory", INVERTED)
def test_network_without_two_momentum_blocks_in_a_stage_is_not_inverted(memory: str) -> None:
    message = f"^memory {memory} needs a stage of two momentum blocks.*plain or checkpoint.$"
    with pytest.raises(ValueError, match=message):
        make_unet(blocks=[1, 2, 2], memory=memory)
    network = make_unet(blocks=[2, 1, 2])
    with pytest.raises(ValueError, match=message):
        network.memory = memory
    assert network.memory == "plain"
    assert make_unet(blocks=[1, 2, 3], memory=memory).memory == memory


@pytest.mark.parametrize(
    ("changes", "memory", "message"),
    [
        ({}, "auto", "memory is 'auto'; it is one of plain, checkpoint, reversible, hybrid, exact"),
        ({"gate": 0.0}, "reversible", "gate 0 forgets the velocity.*take gate .* or more, or memory plain"),
        ({"gate": 0.0}, "hybrid", "gate 0 forgets the velocity"),
        ({"gate": 0.0}, "exact", "gate 0 forgets the velocity"),
        ({"gate": 0.5, "blocks": [1, 3, 7]}, "hybrid", "gate 0.5 over 6 blocks loses 6 bits.*0.562.*gate 1.*exact"),
        ({"gate": 0.9}, "exact", "needs a gate of 1/2, 3/4, 7/8, 15/16 or 1, not 0.9; the nearest is 0.875"),
        ({"gating": "block"}, "exact", "exact needs a fixed gate.*take reversible"),
        ({"norm": "batch"}, "exact", "exact cannot run batch normalisation.*take group"),
    ],
)
def test_memory_that_does_not_suit_is_refused_and_changes_nothing(
    changes: dict[str, Any], memory: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_unet(**changes, memory=memory)
    network = make_unet(**changes, memory="checkpoint")
    before = repr(network)
    with pytest.raises(ValueError, match=message):
        network.memory = memory
    assert (network.memory, repr(network)) == ("checkpoint", before)


@pytest.mark.parametrize(
    ("changes", "gate", "message"),
    [
        ({"memory": "reversible", "blocks": [1, 3, 7]}, 0.5, "smallest legal gate is 0.562"),
        ({"memory": "hybrid"}, 0.0, "gate 0 forgets"),
        ({"memory": "exact"}, 0.9, "the nearest is 0.875"),
        ({"gating": "channel"}, 0.9, "gating channel learns the gate"),
        ({"coupling": "ema"}, 1.0, "gate 1 with coupling ema"),
    ],
)
def test_gate_that_does_not_suit_is_refused_and_changes_nothing(
    changes: dict[str, Any], gate: float, message: str
) -> None:
    network = make_unet(**changes)
    before = repr(network)
    with pytest.raises(ValueError, match=message):
        network.gate = gate
    assert (network.gate, repr(network)) == (0.875, before)
