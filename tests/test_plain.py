"""nnU-Net's plain U-Net, ours and the package's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunet_folders import CHANNELS, CONVOLUTIONS, DECODER, KERNELS, STRIDES, host_state, stir
from torch import Tensor, nn

from medmom.models import PlainUNet, from_plain_host
from medmom.models.convert import _all_names, _plain_host_names


def make(axes: int = 3, **changes: Any) -> PlainUNet:
    arguments: dict[str, Any] = {
        "channels": CHANNELS,
        "convolutions": CONVOLUTIONS,
        "decoder_convolutions": DECODER[::-1],
        "kernels": KERNELS[axes],
        "strides": STRIDES[axes],
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PlainUNet(2, 3, **arguments)
        stir(network)
    return network.eval()


def image(network: PlainUNet, channels: int = 2) -> Tensor:
    return torch.randn(2, channels, *[2 * step for step in network.divisor], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("axes", [2, 3])
def test_network_gives_logits_of_every_resolution_in_training_and_of_the_first_after(axes: int) -> None:
    network = make(axes)
    given = image(network)
    logits = network(given)
    assert logits.shape == (2, 3, *given.shape[2:])
    first, second = network.train()(given)
    torch.testing.assert_close(first, logits, rtol=0, atol=0)
    assert [edge * step for edge, step in zip(second.shape[2:], STRIDES[axes][1], strict=True)] == [*given.shape[2:]]
    assert isinstance(make(axes, deep_supervision=False).train()(given), Tensor)


@pytest.mark.parametrize("axes", [2, 3])
def test_arguments_build_the_same_network_anew(axes: int) -> None:
    network = make(axes)
    again = PlainUNet(**network.arguments)
    again.load_state_dict(network.state_dict())
    assert again.arguments == network.arguments
    torch.testing.assert_close(again.eval()(image(network)), network(image(network)), rtol=0, atol=0)


def test_every_weight_learns() -> None:
    network = make().train()
    sum(logits.square().mean() for logits in network(image(network))).backward()
    # Before an instance normalisation a bias has no effect.
    named = [(name, p) for name, p in network.named_parameters() if not name.endswith("conv.bias")]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for _, parameter in named)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_convolutions": [1]}, "3 stages need 2 numbers"),
        ({"decoder_convolutions": [1, 0]}, "each 1 or more"),
        ({"convolutions": [1, 2]}, "one of each for every stage"),
        ({"kernels": [[2, 3, 3]] * 3}, "must be odd"),
        ({"strides": [[2, 1, 1]] * 3}, "first stage has stride"),
    ],
)
def test_sizes_that_make_no_network_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="background and one class make 2"):
        PlainUNet(1, 1, **{key: value for key, value in make().arguments.items() if "_channels" not in key})


def test_images_that_do_not_fit_are_refused() -> None:
    network = make(2)
    with pytest.raises(ValueError, match="3 x 4 is not divisible by 2 x 4; the next size is 4 x 4"):
        network(torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="one voxel at the bottleneck"):
        network(torch.zeros(1, 2, *network.divisor))
    with pytest.raises(ValueError, match="2 in the place of channels"):
        network(image(network, channels=1))


@pytest.mark.parametrize("axes", [2, 3])
def test_host_comes_back_from_its_names(axes: int) -> None:
    network = make(axes)
    names = _plain_host_names(network)
    state = {name: value for key, value in network.state_dict().items() for name in _all_names(names[key])}
    again = from_plain_host({f"module._orig_mod.{key}": value for key, value in state.items()})
    assert again.arguments == network.arguments
    torch.testing.assert_close(again.eval()(image(network)), network(image(network)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.stages.0.0.convs.0.conv.weight": None}, "is missing in the state"),
        ({"encoder.stages.1.0.convs.0.norm.bias": None}, r"^encoder.stages.1.0.convs.0.norm.bias is missing"),
        ({"encoder.stem.convs.0.conv.weight": torch.zeros(1)}, "the stem of a residual encoder"),
        ({"encoder.stages.0.0.convs.0.norm.running_mean": torch.zeros(4)}, "batch normalisation"),
        ({"decoder.stages.1.convs.0.norm.bias": torch.zeros(5)}, "has shape"),
        ({"decoder.more.weight": torch.zeros(5)}, "decoder.more.weight is a weight the plain U-Net does not have"),
        ({"encoder.stages.0.0.convs.0.conv.weight": torch.zeros(4)}, "not one of a 2-D or 3-D convolution"),
    ],
)
def test_states_of_other_networks_are_refused(changes: dict[str, Tensor | None], message: str) -> None:
    state = {key: value for key, value in host_state().items() if "all_modules" not in key and "decoder.enc" not in key}
    for key, value in changes.items():
        state.pop(key, None)
        if value is not None:
            state[key] = value
    with pytest.raises(ValueError, match=message):
        from_plain_host(state)


def test_an_empty_state_is_refused() -> None:
    with pytest.raises(ValueError, match="is missing in the state"):
        from_plain_host({})


def host(axes: int, *, deep_supervision: bool) -> nn.Module:
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = architectures.PlainConvUNet(
            input_channels=2,
            n_stages=3,
            features_per_stage=CHANNELS,
            conv_op=getattr(nn, f"Conv{axes}d"),
            kernel_sizes=KERNELS[axes],
            strides=STRIDES[axes],
            n_conv_per_stage=CONVOLUTIONS,
            num_classes=3,
            n_conv_per_stage_decoder=DECODER,
            conv_bias=True,
            norm_op=getattr(nn, f"InstanceNorm{axes}d"),
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=deep_supervision,
        )
        stir(network)
    return network


@pytest.mark.peers
@pytest.mark.parametrize("axes", [2, 3])
def test_plain_host_gives_its_logits_here(axes: int) -> None:
    theirs = host(axes, deep_supervision=False).eval()
    ours = from_plain_host(theirs.state_dict()).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(image(ours)), theirs(image(ours)), rtol=0, atol=1e-5)


@pytest.mark.peers
def test_plain_host_gives_its_logits_of_every_resolution_here() -> None:
    theirs = host(3, deep_supervision=True).train()
    ours = from_plain_host(theirs.state_dict()).train()
    for found, expected in zip(ours(image(ours)), theirs(image(ours)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
