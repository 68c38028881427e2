import json
from typing import Any

import pytest
import torch
from torch import Tensor

from medmom.models.joint import JointLogits, JointMomentumUNet
from medmom.models.resnet import ClassificationHead
from medmom.models.unet import MomentumUNet

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "2-D": {"kernels": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 2]]},
    "2-D anisotropic": {"kernels": [[3, 1], [3, 3], [3, 3]], "strides": [[1, 1], [2, 1], [2, 2]]},
    "3-D": {"kernels": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]},
    "3-D anisotropic": {"kernels": [[3, 3, 1], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [2, 2, 1], [2, 2, 2]]},
}
MEMORIES = ("plain", "checkpoint", "reversible", "hybrid", "exact")


def tiny(name: str = "2-D", **changes: Any) -> JointMomentumUNet:
    """A network none of whose layers is at its start of 0."""
    arguments = {"channels": [4, 6, 16], "blocks": [1, 3, 3], "gate": 0.875, **ARCHITECTURES[name], **changes}
    torch.manual_seed(0)
    network = JointMomentumUNet(2, 3, 5, **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def images(network: JointMomentumUNet, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 2, *[2 * divisor for divisor in network.divisor])


def loss_of(logits: JointLogits) -> Any:
    return sum((part.square().sum() for part in logits.segmentation), logits.classification.square().sum())


def step(network: JointMomentumUNet, image: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, gradients and buffers of a training step, from one seed."""
    torch.manual_seed(2)
    logits = network(image)
    loss_of(logits).backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(network.parameters()))
    return [*logits.segmentation, logits.classification], gradients, list(network.buffers())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_segmentation_is_that_of_the_unet_and_the_image_has_a_logit_a_class(name: str) -> None:
    network = tiny(name)
    image = images(network, batch=3)
    training, unet = network(image), network.unet(image)
    assert [part.shape for part in training.segmentation] == [part.shape for part in unet]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(training.segmentation, unet, strict=True))
    network.eval()
    evaluation = network(image)
    assert torch.equal(evaluation.segmentation, network.unet(image))
    assert evaluation.segmentation.shape == (3, 3, *image.shape[2:])
    assert training.classification.shape == evaluation.classification.shape == (3, 5)


def test_classification_is_the_head_on_the_bottleneck() -> None:
    network = tiny(block="preact").eval()
    image = images(network)
    assert isinstance(network.head, ClassificationHead)
    assert torch.equal(network(image).classification, network.head(network.unet.encoder(image)[-1]))


def test_every_option_reaches_the_unet() -> None:
    options: dict[str, Any] = {"channels": [4, 16], "blocks": [2, 3], "kernels": [[3, 3]] * 2, "gate": 0.8}
    options |= {"strides": [[1, 1], [2, 2]], "norm": "batch", "memory": "hybrid", "deep_supervision": False}
    options |= {"coupling": "ema", "gating": "channel", "velocity": "carry", "block": "preact"}
    ours, alone = JointMomentumUNet(2, 3, 5, **options).unet, MomentumUNet(2, 3, **options)
    assert str(ours) == str(alone)
    assert ours.arguments == alone.arguments


def test_without_deep_supervision_training_gives_full_logits() -> None:
    network, supervised = tiny(deep_supervision=False), tiny()
    assert torch.equal(network(images(network)).segmentation, supervised(images(network)).segmentation[0])


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in ARCHITECTURES), ("2-D", {"gating": "channel", "velocity": "carry", "block": "preact"})],
)
def test_every_parameter_has_a_gradient(name: str, changes: dict[str, Any]) -> None:
    network = tiny(name, **changes)
    loss_of(network(images(network))).backward()
    for key, parameter in network.named_parameters():
        # The decoder's instance normalisation takes a bias before it out again.
        if not key.endswith("fuse.conv.bias"):
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 1e-6, key


def test_classification_alone_trains_encoder_and_head() -> None:
    network = tiny()
    loss: Any = network(images(network)).classification.square().sum()
    loss.backward()
    trained = {
        key.split(".")[1 if key.startswith("unet.") else 0]
        for key, p in network.named_parameters()
        if p.grad is not None
    }
    assert trained == {"encoder", "head"}


@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "hybrid"])
@pytest.mark.parametrize("changes", [{}, {"norm": "batch"}, {"block": "preact", "velocity": "carry"}])
def test_memory_changes_neither_logits_nor_gradients_nor_running_statistics(
    memory: str, changes: dict[str, Any]
) -> None:
    expected, actual = tiny(**changes).double(), tiny(**changes).double()
    actual.memory = memory
    torch.testing.assert_close(
        step(actual, images(actual).double()), step(expected, images(expected).double()), rtol=1e-10, atol=1e-10
    )


def test_exact_memory_has_the_gradients_of_its_rounded_state() -> None:
    expected, actual = tiny().double(), tiny(memory="exact").double()
    torch.testing.assert_close(
        step(actual, images(actual).double()), step(expected, images(expected).double()), rtol=1e-3, atol=1e-3
    )


def test_keys_do_not_depend_on_memory_and_those_of_the_unet_are_its_own() -> None:
    keys = [list(tiny(memory=memory).state_dict()) for memory in MEMORIES]
    assert all(others == keys[0] for others in keys)
    arguments = {"channels": [4, 6, 16], "blocks": [1, 3, 3], "norm": "group", **ARCHITECTURES["2-D"]}
    alone = MomentumUNet(2, 3, **arguments)
    assert [key for key in keys[0] if key.startswith("unet.")] == [f"unet.{key}" for key in alone.state_dict()]
    tiny().unet.load_state_dict(alone.state_dict())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_arguments_rebuild_the_network_through_json(name: str) -> None:
    network = tiny(name, gate=0.7, coupling="ema", norm="batch", dropout=0.3, deep_supervision=False).eval()
    network.gate, network.memory = 0.8, "hybrid"
    again = JointMomentumUNet(**json.loads(json.dumps(network.arguments))).eval()
    assert again.arguments == network.arguments
    assert (again.gate, again.memory, again.divisor) == (0.8, "hybrid", network.divisor)
    assert again.head.dropout.p == 0.3
    again.load_state_dict(network.state_dict())
    for ours, theirs in zip(again(images(network)), network(images(network)), strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_acts_on_classification_in_training_alone() -> None:
    dropping, whole = tiny(dropout=0.5), tiny(dropout=0)
    image = images(whole)
    once, twice = dropping(image), dropping(image)
    assert torch.equal(once.segmentation[0], twice.segmentation[0])
    assert not torch.equal(once.classification, twice.classification)
    assert torch.equal(dropping.eval()(image).classification, whole(image).classification)


def test_with_group_norm_batch_mates_and_image_are_left_alone() -> None:
    network = tiny().eval()
    image = images(network)
    before = image.clone()
    together = network(image)
    assert torch.equal(image, before)
    for alone, both in zip(network(image[:1]), together, strict=True):
        torch.testing.assert_close(alone, both[:1], rtol=0, atol=1e-5)


def test_exported_program_gives_both_logits() -> None:
    network = tiny(memory="hybrid").eval()
    program = torch.export.export(network, (images(network),))
    for exported, expected in zip(program.module()(images(network)), network(images(network)), strict=True):
        torch.testing.assert_close(exported, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((96, 90), "^96 x 90 is not divisible by 4; the next size is 96 x 92.$"),
        ((4, 4), "^4 x 4 leaves one voxel at the bottleneck.*next size is 8 x 8.$"),
        ((8, 8, 8), r"has shape \(1, 2, 8, 8, 8\).*the network takes \(batch, 2, x, y\)"),
    ],
)
def test_illegal_image_is_refused_as_by_the_unet(size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(1, 2, *size))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "instance"}, "norm is 'instance'.*the same mean in every image.*take group or batch"),
        ({"dropout": 1}, "dropout is 1; it is 0 or more and below 1"),
        ({"blocks": [1, 3]}, "3 channels, 2 blocks, 3 kernels, 3 strides"),
        ({"memory": "exact", "norm": "batch"}, "batch normalisation.*take group normalisation, or memory reversible"),
        ({"memory": "reversible", "gate": 0}, "gate 0 forgets the velocity.*take gate 0.177 or more"),
        ({"gate": 1, "coupling": "ema"}, "gate 1 with coupling ema"),
    ],
)
def test_arguments_that_make_no_network_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_image_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="0 classes; it needs 1 or more"):
        JointMomentumUNet(1, 2, 0, channels=[4, 6], blocks=[1, 1], kernels=[[3, 3]] * 2, strides=[[1, 1], [2, 2]])
