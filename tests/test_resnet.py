import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medmom.models.blocks import NormAct, initialise
from medmom.models.encoder import MomentumEncoder
from medmom.models.resnet import ClassificationHead, MomentumResNet

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "2-D": {"kernels": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 2]]},
    "2-D with a stride in the stem": {
        "kernels": [[3, 3]] * 3,
        "strides": [[1, 1], [2, 2], [2, 2]],
        "stem_stride": [2, 2],
    },
    "2-D anisotropic": {"kernels": [[3, 1], [3, 3], [3, 3]], "strides": [[1, 1], [2, 1], [2, 2]]},
    "3-D": {"kernels": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]},
    "3-D anisotropic": {
        "kernels": [[3, 3, 1], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [2, 2, 1], [2, 2, 2]],
        "stem_stride": [2, 2, 1],
    },
}
SIZES: dict[str, tuple[int, list[int], list[int], int | None, int]] = {
    "cls2d_xs": (2, [16, 32, 64, 128], [3, 3, 3, 3], 2, 1_095_659),
    "cls2d_s": (2, [64, 128, 256, 512], [3, 3, 3, 3], None, 17_450_891),
    "cls3d_s": (3, [32, 64, 128, 256], [1, 3, 3, 3], None, 12_885_131),
}


def tiny(name: str = "2-D", **changes: Any) -> MomentumResNet:
    """A network none of whose layers is at its start of 0."""
    arguments = {"channels": [4, 6, 16], "blocks": [1, 3, 3], "gate": 0.875, **ARCHITECTURES[name], **changes}
    torch.manual_seed(0)
    network = MomentumResNet(2, 5, **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def images(network: MomentumResNet, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 2, *[2 * divisor for divisor in network.divisor])


def step(network: MomentumResNet, image: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, gradients and buffers of a training step, from one seed."""
    torch.manual_seed(2)
    logits = network(image)
    logits.square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(network.parameters()))
    return logits, gradients, list(network.buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_image_has_a_logit_a_class(name: str, training: bool) -> None:
    network = tiny(name).train(training)
    assert network(images(network, batch=3)).shape == (3, 5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_features_are_the_image_divided_by_the_divisor(name: str) -> None:
    network = tiny(name)
    assert network.encoder(images(network))[-1].shape == (2, 16, *[2] * len(network.divisor))


def test_every_option_reaches_the_encoder() -> None:
    options: dict[str, Any] = {"channels": [4, 16], "blocks": [2, 3], "kernels": [[3, 3]] * 2, "gate": 0.8}
    options |= {"strides": [[1, 1], [2, 2]], "stem_stride": [2, 2], "norm": "batch", "memory": "hybrid"}
    options |= {"coupling": "ema", "gating": "channel", "velocity": "carry", "block": "preact"}
    assert str(MomentumResNet(2, 5, **options).encoder) == str(MomentumEncoder(2, **options))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_build_and_have_their_parameters(name: str) -> None:
    axes, channels, blocks, stem, num_parameters = SIZES[name]
    with torch.device("meta"):
        network = MomentumResNet(
            1,
            11,
            channels=channels,
            blocks=blocks,
            kernels=[[3] * axes] * 4,
            strides=[[1] * axes] + [[2] * axes] * 3,
            stem_stride=None if stem is None else [stem] * axes,
        )
        assert network(torch.zeros(2, 1, *[32] * axes)).shape == (2, 11)
    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in ARCHITECTURES),
        ("2-D", {"gating": "channel", "velocity": "carry"}),
        ("2-D", {"gating": "block", "velocity": "learned", "block": "preact"}),
    ],
)
def test_every_parameter_has_a_gradient(name: str, changes: dict[str, Any]) -> None:
    network = tiny(name, **changes)
    network(images(network)).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 1e-6, key


def test_gradients_are_those_of_finite_differences() -> None:
    network = tiny("2-D anisotropic").double().eval()
    assert torch.autograd.gradcheck(network, images(network, batch=1).double().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "hybrid"])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(
    "changes", [{}, {"block": "preact", "velocity": "carry"}, {"gating": "channel", "velocity": "learned"}]
)
def test_memory_changes_neither_logits_nor_gradients_nor_running_statistics(
    memory: str, norm: str, changes: dict[str, Any]
) -> None:
    expected, actual = tiny(norm=norm, **changes).double(), tiny(norm=norm, **changes).double()
    actual.memory = memory
    torch.testing.assert_close(
        step(actual, images(actual).double()), step(expected, images(expected).double()), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("changes", [{}, {"block": "preact", "velocity": "carry"}])
def test_exact_memory_has_the_gradients_of_its_rounded_state(changes: dict[str, Any]) -> None:
    expected, actual = tiny(**changes).double(), tiny(**changes, memory="exact").double()
    torch.testing.assert_close(
        step(actual, images(actual).double()), step(expected, images(expected).double()), rtol=1e-3, atol=1e-4
    )


def test_keys_do_not_depend_on_memory_gate_or_coupling() -> None:
    keys = [list(tiny(memory=m).state_dict()) for m in ("plain", "checkpoint", "reversible", "hybrid", "exact")]
    keys += [list(tiny(gate=0, coupling="ema").state_dict())]
    assert all(others == keys[0] for others in keys)
    assert {"encoder.stem.conv.weight", "encoder.stages.1.momentum.blocks.0.conv1.weight"} <= set(keys[0])
    assert {"head.norm.weight", "head.linear.weight", "head.linear.bias"} <= set(keys[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_arguments_rebuild_the_network_through_json(name: str) -> None:
    network = tiny(name, gate=0.7, coupling="ema", norm="batch", velocity="carry", dropout=0.3).eval()
    network.gate, network.memory = 0.8, "hybrid"
    again = MomentumResNet(**json.loads(json.dumps(network.arguments))).eval()
    assert again.arguments == network.arguments
    assert (again.gate, again.memory, again.divisor) == (0.8, "hybrid", network.divisor)
    assert again.head.dropout.p == 0.3
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(images(network)), network(images(network)))


def test_gate_reaches_every_stage() -> None:
    network, other = tiny(gate=0.5).eval(), tiny(gate=0.875).eval()
    image = images(network)
    assert not torch.allclose(network(image), other(image))
    network.gate = 0.875
    assert torch.equal(network(image), other(image))


def test_dropout_acts_in_training_alone() -> None:
    dropping, whole = tiny(dropout=0.5), tiny(dropout=0)
    image = images(whole)
    assert not torch.equal(dropping(image), dropping(image))
    assert torch.equal(dropping.eval()(image), whole(image))
    assert torch.equal(dropping(image), dropping(image))


def test_head_is_a_layer_normalisation_and_a_matrix_of_the_means() -> None:
    torch.manual_seed(0)
    head = ClassificationHead(6, 3).double().eval()
    features = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    means = features.flatten(2).mean(2)
    centred = means - means.mean(1, keepdim=True)
    scaled = centred / (means.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(head(features), scaled @ head.linear.weight.T + head.linear.bias)


@pytest.mark.parametrize("training", [True, False])
def test_with_group_norm_batch_mates_and_image_are_left_alone(training: bool) -> None:
    network = tiny(dropout=0).train(training)
    image = images(network)
    before = image.clone()
    together = network(image)
    assert torch.equal(image, before)
    torch.testing.assert_close(network(image[:1]), together[:1], rtol=0, atol=1e-5)


def test_with_batch_norm_batch_mates_count_in_training_alone() -> None:
    network = tiny(norm="batch", dropout=0)
    image = images(network)
    assert not torch.allclose(network(image[:1]), network(image)[:1], atol=1e-3)
    network.eval()
    torch.testing.assert_close(network(image[:1]), network(image)[:1], rtol=0, atol=1e-5)


def test_memory_format_does_not_change_the_logits() -> None:
    network = tiny("3-D").eval()
    expected = network(images(network))
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    torch.testing.assert_close(network(images(network)), expected, rtol=0, atol=1e-5)


def test_exported_program_gives_the_logits() -> None:
    network = tiny(memory="reversible").eval()
    program = torch.export.export(network, (images(network),))
    torch.testing.assert_close(program.module()(images(network)), network(images(network)), rtol=0, atol=1e-6)


def test_a_few_steps_tell_coarse_texture_from_fine() -> None:
    network = tiny(memory="reversible")
    torch.manual_seed(3)
    fine = torch.randn(4, 2, 16, 16)
    coarse = torch.randn(4, 2, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    image, classes = torch.cat([fine, coarse]), torch.tensor([0] * 4 + [1] * 4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        loss: Any = functional.cross_entropy(network(image), classes)
        loss.backward()
        optimizer.step()
    assert torch.equal(network.eval()(image).argmax(1), classes)


def spread(encoder: MomentumEncoder, image: Tensor, *, within: NormAct | None = None) -> float:
    """Standard deviation between images of the means over space, of the last features or behind a normalisation."""
    seen: list[Tensor] = []
    if within is not None:
        within.register_forward_hook(lambda module, inputs, output: seen.append(module.norm(inputs[0])))
    with torch.no_grad():
        last = encoder(image)[-1]
    return (seen[0] if seen else last).flatten(2).mean(2).std(0).mean().item()


def unlike_images() -> Tensor:
    """Noise, a ramp, a few bright points, an edge."""
    torch.manual_seed(5)
    noise, points = torch.randn(16, 16), (torch.randn(16, 16) > 1.5).float()
    return torch.stack([noise, torch.linspace(-1, 1, 16).expand(16, 16), points, 3 * torch.eye(16)])[:, None]


def encoder(norm: str, block: str) -> MomentumEncoder:
    """That of a classifier, or what it would be with instance normalisation; the same weights for every norm."""
    arguments: dict[str, Any] = {"channels": [16, 32], "blocks": [2, 3], "norm": norm, "block": block}
    arguments.update({key: by_stage[:2] for key, by_stage in ARCHITECTURES["2-D"].items()})
    torch.manual_seed(0)
    found = MomentumEncoder(1, **arguments) if norm == "instance" else MomentumResNet(1, 2, **arguments).encoder
    torch.manual_seed(0)
    initialise(found)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return found


@pytest.mark.parametrize("block", ["postact", "preact"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_features_of_unlike_images_differ_as_instance_norm_would_not_let_them(norm: str, block: str) -> None:
    image = unlike_images()
    kept = spread(encoder(norm, block), image)
    assert kept > 0.05
    assert spread(encoder("instance", block), image) < kept / 2


@pytest.mark.parametrize(("norm", "low", "high"), [("instance", 0, 1e-6), ("group", 0.05, 9), ("batch", 0.05, 9)])
def test_means_behind_the_last_normalisation_are_erased_by_instance_norm_alone(
    norm: str, low: float, high: float
) -> None:
    found = encoder(norm, "preact")
    last: Any = found.stages[-1]
    assert low <= spread(found, unlike_images(), within=last.finish) < high


def test_instance_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm is 'instance'.*the same mean in every image.*take group or batch"):
        tiny(norm="instance")


def test_divisor_is_the_product_of_all_strides() -> None:
    assert [tiny(name).divisor for name in ARCHITECTURES] == [(4, 4), (8, 8), (4, 2), (4, 4, 4), (8, 8, 2)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("2-D with a stride in the stem", (28, 28), "^28 x 28 is not divisible by 8; the next size is 32 x 32.$"),
        ("3-D anisotropic", (8, 7, 3), "^8 x 7 x 3 is not divisible by 8 x 8 x 2; the next size is 8 x 8 x 4.$"),
        ("2-D", (0, 8), "^0 x 8 is not divisible by 4; the next size is 4 x 8.$"),
    ],
)
def test_illegal_size_is_refused_with_the_next_legal_one(
    name: str, size: tuple[int, ...], message: str, training: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(name).train(training)(torch.zeros(2, 2, *size))


def test_one_voxel_in_the_last_stage_is_enough_for_group_norm() -> None:
    assert tiny()(torch.randn(1, 2, 4, 4)).isfinite().all()


def test_batch_norm_refuses_to_train_on_one_value_a_channel() -> None:
    network = tiny(norm="batch")
    with pytest.raises(
        ValueError, match=r"one image of 4 x 4 leaves one value.*two images or more, the next size 8 x 8"
    ):
        network(torch.randn(1, 2, 4, 4))
    assert network(torch.randn(2, 2, 4, 4)).shape == (2, 5)
    assert network.eval()(torch.randn(1, 2, 4, 4)).shape == (1, 5)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 8, 8), (1, 2, 8, 8, 8)])
def test_other_channels_or_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"has shape \(.*the network takes \(batch, 2, x, y\)"):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [1, 3]}, "3 channels, 2 blocks, 3 kernels, 3 strides"),
        ({"strides": [[2, 2]] * 3}, "first stage has stride 2 x 2"),
        ({"stem_stride": [2]}, r"stem_stride is \[2\]; it needs 2 axes of 1 or more"),
        ({"stem_stride": [0, 2]}, r"stem_stride is \[0, 2\]; it needs 2 axes of 1 or more"),
        ({"dropout": 1}, "dropout is 1; it is 0 or more and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1; it is 0 or more and below 1"),
        ({"norm": "layer"}, "norm is 'layer'; it is one of"),
        ({"memory": "auto"}, "memory is 'auto'; it is one of plain"),
        ({"memory": "exact", "norm": "batch"}, "batch normalisation.*take group normalisation, or memory reversible"),
        ({"memory": "exact", "gate": 0.9}, "the nearest is 0.875"),
        ({"memory": "reversible", "gate": 0}, "gate 0 forgets the velocity.*take gate 0.177 or more"),
        ({"memory": "hybrid", "blocks": [1, 2, 2]}, "memory hybrid needs a stage of two.*take memory plain or checkp"),
        ({"gate": 1, "coupling": "ema"}, "gate 1 with coupling ema"),
    ],
)
def test_arguments_that_make_no_network_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_head_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="0 classes; it needs 1 or more"):
        MomentumResNet(1, 0, channels=[4, 6], blocks=[1, 1], kernels=[[3, 3]] * 2, strides=[[1, 1], [2, 2]])
