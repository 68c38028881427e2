import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from medmom import models
from medmom.models import slices
from medmom.models.cost import measure_cost
from medmom.models.resnet import MomentumResNet
from medmom.models.slices import GatedAttention, SliceClassifier

POOLINGS = ["mean", "attention"]
SIZES: dict[str, Any] = {
    "channels": [4, 6, 16],
    "blocks": [1, 3, 3],
    "kernels": [[3, 3]] * 3,
    "strides": [[1, 1], [2, 2], [2, 2]],
    "gate": 0.875,
}


def stir(network: torch.nn.Module) -> None:
    """Leaves no layer at its start of 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def tiny(pooling: str = "attention", **changes: Any) -> SliceClassifier:
    torch.manual_seed(0)
    network = SliceClassifier(2, 5, **{**SIZES, "pooling": pooling, **changes})
    stir(network)
    return network


def volume(num_slices: int = 3, batch: int = 2, edges: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.randn(batch, 2, *edges, num_slices, generator=torch.Generator().manual_seed(1))


def twin(network: SliceClassifier) -> MomentumResNet:
    """The network for pictures with the same weights."""
    picture = MomentumResNet(2, 5, **SIZES)
    own = network.state_dict()
    picture.load_state_dict({key: own[key] for key in picture.state_dict()})
    return picture.train(network.training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_slices", [1, 3, 40])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_volume_has_a_logit_a_class(pooling: str, num_slices: int, training: bool) -> None:
    network, image = tiny(pooling).train(training), volume(num_slices)
    with torch.no_grad():
        assert network(image).shape == (2, 5)
        assert network.slice_logits(image).shape == (2, num_slices, 5)
        assert network.slice_weights(image).shape == (2, num_slices)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_of_slices_are_those_of_the_network_for_pictures(pooling: str) -> None:
    network, image = tiny(pooling).eval(), volume(4)
    picture = twin(network)
    expected = torch.stack([picture(image[..., number]) for number in range(4)], dim=1)
    torch.testing.assert_close(network.slice_logits(image), expected, rtol=0, atol=1e-5)


def test_mean_pooling_is_the_mean_of_the_slices_logits() -> None:
    network, image = tiny("mean").eval(), volume()
    torch.testing.assert_close(network(image), network.slice_logits(image).mean(dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_are_the_weighted_sum_of_the_slices(pooling: str) -> None:
    network, image = tiny(pooling).eval(), volume(5)
    weights = network.slice_weights(image)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    expected = (weights[..., None] * network.slice_logits(image)).sum(dim=1)
    torch.testing.assert_close(network(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_look_gives_what_three_give(pooling: str) -> None:
    network, image = tiny(pooling).eval(), volume()
    found = network.by_slice(image)
    assert torch.equal(found.volume, network(image))
    assert torch.equal(found.slices, network.slice_logits(image))
    assert torch.equal(found.weights, network.slice_weights(image))


def test_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    attention = GatedAttention(6).double()
    features = torch.randn(2, 4, 6, dtype=torch.float64)
    rows = []
    for bag in features:
        scores = []
        for h in bag:
            signal = torch.tanh(attention.signal.weight @ h + attention.signal.bias)
            gate = 1 / (1 + torch.exp(-(attention.gate.weight @ h + attention.gate.bias)))
            scores.append((attention.score.weight[0] * signal * gate).sum())
        exponentials = torch.stack(scores).exp()
        rows.append(exponentials / exponentials.sum())
    torch.testing.assert_close(attention(features), torch.stack(rows))


def test_attention_starts_as_the_mean_and_learns_otherwise() -> None:
    torch.manual_seed(0)
    network, image = SliceClassifier(2, 5, **SIZES, pooling="attention"), volume()
    torch.testing.assert_close(network.slice_weights(image), torch.full((2, 3), 1 / 3))
    network(image).square().sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert network.slice_weights(image).std() > 0


@pytest.mark.parametrize("pooling", POOLINGS)
def test_order_of_slices_does_not_matter(pooling: str) -> None:
    network, image = tiny(pooling).eval(), volume(4)
    torch.testing.assert_close(network(image.flip(-1)), network(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_volumes_of_a_batch_do_not_see_each_other(pooling: str) -> None:
    network, image = tiny(pooling, dropout=0), volume(4)
    before = image.clone()
    torch.testing.assert_close(network(image[1:]), network(image)[1:], rtol=0, atol=1e-5)
    assert torch.equal(image, before)


@pytest.mark.parametrize(("batch", "largest"), [(1, 16), (5, 15), (20, 20)])
def test_without_gradients_a_few_slices_are_looked_at_together(batch: int, largest: int) -> None:
    network, image = tiny().eval(), volume(40, batch=batch, edges=(4, 4))
    seen: list[int] = []
    network.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    together = network(image)
    assert seen == [40 * batch]
    seen.clear()
    with torch.no_grad():
        apart = network(image)
    assert max(seen) == largest and sum(seen) == 40 * batch
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


def test_without_gradients_memory_does_not_grow_with_the_slices() -> None:
    network = tiny().eval()
    live: list[int] = []
    network.encoder.stages[0].register_forward_hook(lambda module, inputs, output: live.append(output[0].nbytes))
    with torch.no_grad():
        network(volume(400, batch=1))
    assert max(live) == slices.SLICES_AT_ONCE * 4 * 8 * 8 * 4


def test_in_training_batch_norm_sees_all_slices_with_gradients_or_without() -> None:
    image = volume(40)
    found = []
    for is_recorded in (True, False):
        network = tiny(norm="batch", dropout=0)
        with torch.set_grad_enabled(is_recorded):
            found.append((network(image), *(buffer.clone() for buffer in network.buffers())))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("changes", [{}, {"gating": "channel", "velocity": "carry"}, {"block": "preact"}])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_parameter_has_a_gradient(pooling: str, changes: dict[str, Any]) -> None:
    network = tiny(pooling, **changes)
    network(volume()).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 1e-7, key


def test_gradients_are_those_of_finite_differences() -> None:
    network = tiny().double().eval()
    image = volume(2, batch=1, edges=(4, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(network, image, fast_mode=True)


def step(network: SliceClassifier, image: Tensor) -> list[Tensor]:
    """Logits, gradients and buffers of a training step, from one seed."""
    torch.manual_seed(2)
    logits = network(image)
    logits.square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(network.parameters()))
    return [logits, *gradients, *network.buffers()]


@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "hybrid"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_memory_changes_neither_logits_nor_gradients_nor_running_statistics(memory: str, norm: str) -> None:
    expected, actual = tiny(norm=norm).double(), tiny(norm=norm).double()
    actual.memory = memory
    image = volume().double()
    torch.testing.assert_close(step(actual, image), step(expected, image), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_arguments_rebuild_the_network_through_json(pooling: str) -> None:
    network = tiny(pooling, gate=0.7, coupling="ema", norm="batch", velocity="carry", dropout=0.3, stem_stride=[2, 1])
    network.gate, network.memory = 0.8, "hybrid"
    again = SliceClassifier(**json.loads(json.dumps(network.eval().arguments))).eval()
    assert again.arguments == network.arguments
    assert again.arguments["pooling"] == pooling
    assert (again.gate, again.memory, again.divisor) == (0.8, "hybrid", (8, 4))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(volume()), network(volume()))


def test_arguments_of_a_preset_and_a_pooling_make_the_network() -> None:
    with torch.device("meta"):
        network = SliceClassifier(**models.cls2d_xs(1, 11).arguments, pooling="attention")
        assert network(torch.zeros(2, 1, 32, 32, 7)).shape == (2, 11)
    assert network.divisor == (16, 16)


def test_keys_are_those_of_the_network_for_pictures_and_of_attention() -> None:
    own, picture = set(tiny().state_dict()), set(MomentumResNet(2, 5, **SIZES).state_dict())
    assert picture == set(tiny("mean").state_dict()) < own
    assert {key.split(".")[0] for key in own - picture} == {"attention"}


def test_first_weights_are_those_of_the_network_for_pictures() -> None:
    torch.manual_seed(3)
    network = SliceClassifier(2, 5, **SIZES, pooling="attention")
    torch.manual_seed(3)
    for key, value in MomentumResNet(2, 5, **SIZES).state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key


@pytest.mark.parametrize("pooling", POOLINGS)
def test_cost_is_planned_without_values(pooling: str) -> None:
    network = tiny(pooling)
    cost = measure_cost(network, (2, 2, 16, 16, 6), mixed=torch.bfloat16, memories=("plain", "checkpoint"))
    assert cost.activations["checkpoint"].peak < cost.activations["plain"].peak
    # All but the attention is what a network for pictures does to each of six.
    assert cost.flops >= 5.9 * measure_cost(twin(network), (2, 2, 16, 16), memories=()).flops
    assert cost.num_parameters == sum(parameter.numel() for parameter in network.parameters())


def test_head_sees_one_vector_a_volume() -> None:
    network, seen = tiny().eval(), []
    network.head.linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    network(volume())
    assert seen == [(2, 16)]


def test_exported_program_gives_the_logits() -> None:
    network = tiny(memory="reversible").eval()
    program = torch.export.export(network, (volume(20),))
    torch.testing.assert_close(program.module()(volume(20)), network(volume(20)), rtol=0, atol=1e-5)


def test_copies_are_whole() -> None:
    network = tiny().eval()
    again = copy.deepcopy(network)
    again.gate = 0.5
    assert (network.gate, again.gate) == (0.875, 0.5)
    assert not torch.equal(again(volume()), network(volume()))


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (2, 1, 8, 8, 3), (2, 2, 8, 8, 0), (2, 2, 8, 8, 3, 1)])
def test_other_axes_or_channels_or_no_slice_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"has shape \(.*takes \(batch, 2, x, y, slices\), with one slice or more"):
        tiny()(torch.zeros(shape))


def test_illegal_size_is_refused_with_the_next_legal_one() -> None:
    with pytest.raises(ValueError, match=r"^8 x 7 is not divisible by 4; the next size is 8 x 8.$"):
        tiny()(torch.zeros(1, 2, 8, 7, 3))


def test_batch_norm_refuses_to_train_on_one_value_a_channel() -> None:
    network = tiny(norm="batch")
    with pytest.raises(ValueError, match=r"one image of 4 x 4 leaves one value.*two images or more"):
        network(torch.randn(1, 2, 4, 4, 1))
    assert network(torch.randn(1, 2, 4, 4, 2)).shape == (1, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "instance"}, r"norm is 'instance'.*the same mean in every image.*take group or batch"),
        ({"pooling": "max"}, "pooling is 'max'; it is one of mean, attention"),
        ({"kernels": [[3, 3, 3]] * 3, "strides": [[1] * 3, [2] * 3, [2] * 3]}, "a slice has 2. Take a 2-D network"),
        ({"dropout": 1}, "dropout is 1; it is 0 or more and below 1"),
        ({"memory": "reversible", "gate": 0}, "gate 0 forgets the velocity"),
    ],
)
def test_arguments_that_make_no_network_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
