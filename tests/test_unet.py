import json
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medmom.models import MomentumUNet
from medmom.models.blocks import ResidualBlock

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "2-D": {"kernels": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 2]]},
    "2-D anisotropic": {"kernels": [[3, 1], [3, 3], [3, 3]], "strides": [[1, 1], [2, 1], [2, 2]]},
    "3-D": {"kernels": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]},
    "3-D anisotropic": {"kernels": [[3, 3, 1], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [2, 2, 1], [2, 2, 2]]},
}


def tiny(name: str = "2-D", **changes: Any) -> MomentumUNet:
    arguments = {"channels": [4, 6, 8], "blocks": [1, 3, 3], **ARCHITECTURES[name], **changes}
    torch.manual_seed(0)
    network = MomentumUNet(2, 3, **arguments)
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            nn.init.uniform_(block.norm2.weight, 0.5, 1.5)  # type: ignore[arg-type]
    return network


def images(network: MomentumUNet, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 2, *[2 * divisor for divisor in network.divisor])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_gives_logits_of_every_resolution_full_first(name: str) -> None:
    network = tiny(name)
    image = images(network)
    full, half = network(image)
    stride = ARCHITECTURES[name]["strides"][1]
    assert full.shape == (2, 3, *image.shape[2:])
    assert half.shape == (2, 3, *(edge // step for edge, step in zip(image.shape[2:], stride, strict=True)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluation_gives_the_full_logits_of_training(name: str) -> None:
    network = tiny(name)
    image = images(network)
    assert torch.equal(network.eval()(image), network.train()(image)[0])


def test_without_deep_supervision_training_gives_full_logits_of_the_same_weights() -> None:
    supervised, plain = tiny(), tiny(deep_supervision=False)
    assert list(plain.state_dict()) == list(supervised.state_dict())
    assert torch.equal(plain(images(plain)), supervised(images(plain))[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_a_gradient(name: str) -> None:
    network = tiny(name)
    sum(logits.square().sum() for logits in network(images(network))).backward()
    for key, parameter in network.named_parameters():
        # A bias before a normalisation is taken out again by it.
        if not (key.endswith("conv.bias") or key.endswith(("conv1.bias", "conv2.bias"))):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-6, key


def test_gradients_are_those_of_finite_differences() -> None:
    network = tiny("2-D anisotropic").double().eval()
    assert torch.autograd.gradcheck(network, images(network, batch=1).double().requires_grad_(), fast_mode=True)


def test_memory_format_does_not_change_the_logits() -> None:
    network = tiny("3-D").eval()
    expected = network(images(network))
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    torch.testing.assert_close(network(images(network)), expected, rtol=0, atol=1e-5)


def test_image_and_its_batch_mates_are_left_alone() -> None:
    network = tiny().eval()
    image = images(network)
    before = image.clone()
    together = network(image)
    assert torch.equal(image, before)
    torch.testing.assert_close(network(image[:1]), together[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_arguments_rebuild_the_network_through_json(name: str) -> None:
    network = tiny(name, gate=0.7, coupling="ema", deep_supervision=False).eval()
    again = MomentumUNet(**json.loads(json.dumps(network.arguments))).eval()
    assert again.arguments == network.arguments
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(images(network)), network(images(network)))


def test_keys_do_not_depend_on_gate_or_coupling() -> None:
    keys = [list(tiny(gate=g, coupling=c).state_dict()) for g, c in [(0, "ema"), (0.9, "ema"), (1, "normalised")]]
    assert keys[0] == keys[1] == keys[2]
    assert {"encoder.stem.conv.weight", "encoder.stages.1.entry.shortcut.conv.weight"} <= set(keys[0])
    assert {"encoder.stages.1.momentum.blocks.1.norm2.weight", "decoder.stages.0.upsample.weight"} <= set(keys[0])
    assert {"decoder.stages.1.fuse.norm.bias", "heads.1.weight"} <= set(keys[0])


def test_network_starts_as_the_host() -> None:
    torch.manual_seed(0)
    network = MomentumUNet(1, 2, channels=[32, 48], blocks=[1, 3], **two_stages())
    for key, parameter in network.named_parameters():
        if key.endswith("bias") or "norm2" in key:
            assert parameter.count_nonzero() == 0, key
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), key
    weight = network.encoder.stages[1].entry.conv2.weight  # type: ignore[union-attr]
    assert weight.std().item() == pytest.approx(sqrt(2 / (1 + 0.01**2) / (48 * 9)), rel=0.02)  # type: ignore[operator]


def two_stages() -> dict[str, Any]:
    return {"kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}


def test_divisor_is_the_product_of_the_strides() -> None:
    assert [tiny(name).divisor for name in ARCHITECTURES] == [(4, 4), (4, 2), (4, 4, 4), (4, 4, 2)]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("2-D", (96, 90), "^96 x 90 is not divisible by 4; the next size is 96 x 92.$"),
        ("3-D anisotropic", (8, 7, 3), "^8 x 7 x 3 is not divisible by 4 x 4 x 2; the next size is 8 x 8 x 4.$"),
        ("2-D", (0, 8), "^0 x 8 is not divisible by 4; the next size is 4 x 8.$"),
        ("3-D anisotropic", (4, 4, 2), "^4 x 4 x 2 leaves one voxel at the bottleneck.*next size is 8 x 8 x 4.$"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_illegal_size_is_refused_with_the_next_legal_one(
    name: str, size: tuple[int, ...], message: str, training: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(name).train(training)(torch.zeros(2, 2, *size))


def test_one_voxel_on_one_axis_is_enough() -> None:
    assert tiny().eval()(torch.randn(1, 2, 4, 8)).shape == (1, 3, 4, 8)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 8, 8), (1, 2, 8, 8, 8)])
def test_other_channels_or_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"has shape \(.*the network takes \(batch, 2, x, y\)"):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [1, 3]}, "3 channels, 2 blocks, 3 kernels, 3 strides"),
        ({"blocks": [1, 0, 3]}, "must be 1 or more"),
        ({"kernels": [[3, 3, 3]] * 3}, "same 2 or 3 axes"),
        ({"kernels": [[3, 2]] * 3}, "must be odd"),
        ({"strides": [[2, 2]] * 3}, "first stage has stride 2 x 2"),
        ({"gate": 2}, "gate is 2"),
        ({"coupling": "other"}, "one of normalised, ema"),
    ],
)
def test_arguments_that_make_no_network_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_single_stage_and_single_class_are_refused() -> None:
    with pytest.raises(ValueError, match="2 or more stages"):
        MomentumUNet(1, 2, channels=[4], blocks=[1], kernels=[[3, 3]], strides=[[1, 1]])
    with pytest.raises(ValueError, match="out_channels is 1"):
        MomentumUNet(1, 1, channels=[4, 6], blocks=[1, 1], **two_stages())


def peer_state(network: MomentumUNet) -> dict[str, Tensor]:
    """Our weights under dynamic-network-architectures' names."""
    last = len(network.heads) - 1
    state = {}
    for key, value in network.state_dict().items():
        words = key.split(".")
        number = int(words[2]) if words[1] == "stages" else 0
        match words:
            case ["encoder", "stem", *rest]:
                name = ["encoder.stem.convs.0", *rest]
            case ["encoder", "stages", stage, "entry", *rest]:
                name = [f"encoder.stages.{stage}.blocks.0", *rest]
            case ["encoder", "stages", stage, "momentum", "blocks", block, *rest]:
                name = [f"encoder.stages.{stage}.blocks.{int(block) + 1}", *rest]
            case ["decoder", "stages", _, "upsample", *rest]:
                name = [f"decoder.transpconvs.{last - number}", *rest]
            case ["decoder", "stages", _, "fuse", *rest]:
                name = [f"decoder.stages.{last - number}.convs.0", *rest]
            case ["heads", head, *rest]:
                name = [f"decoder.seg_layers.{last - int(head)}", *rest]
        for part, whole in {"conv1": "conv1.conv", "norm1": "conv1.norm", "conv2": "conv2.conv"}.items():
            name = [whole if word == part else word for word in name]
        name = ["conv2.norm" if word == "norm2" else word for word in name]
        state[".".join(name)] = value
    return state


@pytest.mark.peers
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("coupling", ["normalised", "ema"])
def test_gate_zero_gives_the_logits_of_the_host(name: str, coupling: str) -> None:
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    network = tiny(name, gate=0, coupling=coupling)
    spatial_dims = len(network.divisor)
    host = architectures.ResidualEncoderUNet(
        2,
        3,
        [4, 6, 8],
        {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims],
        ARCHITECTURES[name]["kernels"],
        ARCHITECTURES[name]["strides"],
        [1, 3, 3],
        3,
        1,
        conv_bias=True,
        norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[spatial_dims],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    state, used = peer_state(network), set()
    with torch.no_grad():
        for key, parameter in host.named_parameters():
            place = key.replace("decoder.encoder.", "encoder.")
            place = place.replace("skip.1.", "shortcut.").replace("skip.0.", "shortcut.")
            parameter.copy_(state[place])
            used.add(place)
    assert used == set(state)
    for ours, theirs in zip(network(images(network)), host(images(network)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
