"""The host's weights become a momentum network, and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medmom.models import MomentumUNet
from medmom.models.convert import from_host, to_host
from medmom.models.momentum import MomentumStage

SIZES: dict[str, dict[str, Any]] = {
    "2-D": {"kernels": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 2]]},
    "2-D anisotropic": {"kernels": [[3, 1], [3, 3], [5, 3]], "strides": [[1, 1], [2, 1], [2, 2]]},
    "3-D": {"kernels": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]},
    "3-D anisotropic": {"kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 1]]},
    "equal channels": {
        "channels": [4, 6, 6],
        "kernels": [[3, 3]] * 3,
        "strides": [[1, 1], [2, 2], [2, 1]],
    },
    "no stride": {"kernels": [[3, 3]] * 3, "strides": [[1, 1], [1, 1], [2, 2]]},
}


def stir(network: nn.Module) -> None:
    """Gives every weight a value of its own, the norms' and the running statistics too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in (*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())):
            value.add_(torch.rand(value.shape, generator=generator), alpha=0.2)


def tiny(name: str = "2-D", **changes: Any) -> MomentumUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arguments = {"channels": [4, 6, 8], "blocks": [1, 3, 2], "gate": 0.0, **SIZES[name], **changes}
        network = MomentumUNet(2, 3, **arguments)
    stir(network)
    return network.eval()


def image(divisor: tuple[int, ...]) -> Tensor:
    return torch.randn(2, 2, *[2 * step for step in divisor], generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours: MomentumUNet, theirs: nn.Module, *, atol: float = 1e-5) -> None:
    with torch.no_grad():
        found, expected = ours(image(ours.divisor)), theirs(image(ours.divisor))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SIZES)
def test_network_comes_back_from_the_host_as_it_was(name: str) -> None:
    network = tiny(name)
    again = from_host(to_host(network))
    assert again.arguments == network.arguments
    assert_same_logits(again.eval(), network, atol=0)


def test_host_has_every_weight_under_all_its_names() -> None:
    state = to_host(tiny())
    assert {
        "encoder.stem.convs.0.conv.weight",
        "encoder.stem.convs.0.all_modules.0.weight",
        "decoder.encoder.stem.convs.0.all_modules.1.bias",
        "encoder.stages.1.blocks.0.skip.1.conv.weight",
        "encoder.stages.1.blocks.2.conv1.conv.bias",
        "decoder.encoder.stages.1.blocks.2.conv2.all_modules.1.weight",
        "decoder.transpconvs.0.weight",
        "decoder.stages.1.convs.0.norm.weight",
        "decoder.seg_layers.1.bias",
    } <= set(state)
    assert "encoder.stages.0.blocks.0.skip.0.conv.weight" not in state
    assert state["encoder.stages.1.blocks.0.skip.1.conv.weight"].shape == (6, 4, 1, 1)
    assert "encoder.stages.1.blocks.0.skip.0.conv.weight" in to_host(tiny("no stride"))
    # The decoder of the host begins at the bottleneck.
    assert state["decoder.transpconvs.0.weight"].shape[:2] == (8, 6)
    assert state["decoder.seg_layers.1.weight"].shape[:2] == (3, 4)


def test_converted_network_starts_at_gate_zero_and_takes_the_coupling_for_later() -> None:
    network = from_host(to_host(tiny()), coupling="ema", deep_supervision=False)
    stages = [part for part in network.modules() if isinstance(part, MomentumStage)]
    assert {(stage.gate, stage.coupling) for stage in stages} == {(0.0, "ema")}
    assert network.arguments["gate"] == 0
    assert isinstance(network.train()(image(network.divisor)), Tensor)


def test_conversion_copies_and_draws_nothing() -> None:
    network = tiny()
    state = to_host(network)
    before = torch.random.get_rng_state()
    again = from_host(state)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert all(value.count_nonzero() for value in state.values())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_known(prefix: str) -> None:
    network = tiny()
    state = {f"{prefix}{key}": value for key, value in to_host(network).items()}
    assert_same_logits(from_host(state).eval(), network, atol=0)


@pytest.mark.parametrize("absent", [("decoder.encoder.", ".all_modules."), ("decoder.encoder.", ".conv.", ".norm.")])
def test_second_names_may_be_absent(absent: tuple[str, ...]) -> None:
    network = tiny()
    state = {key: value for key, value in to_host(network).items() if not any(part in key for part in absent)}
    assert_same_logits(from_host(state).eval(), network, atol=0)


def test_absent_heads_of_lower_resolutions_start_at_zero() -> None:
    network = tiny()
    state = {key: value for key, value in to_host(network).items() if not key.startswith("decoder.seg_layers.0.")}
    again = from_host(state)
    assert [head.get_parameter("weight").any().item() for head in again.heads] == [True, False]
    assert_same_logits(again.eval(), network, atol=0)


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("encoder.stages.0.blocks.0.", "encoder.stages.0.0.convs.0.", r"stages.0.0.convs.0.*: plain convolutions in"),
        ("blocks.0.conv2.", "blocks.0.conv3.", r"encoder.stages.0.blocks.0.conv3.*: bottleneck blocks"),
        ("blocks.0.conv2.", "blocks.0.squeeze_excitation.", r"blocks.0.squeeze_excitation.*: squeeze and excitation"),
        ("encoder.stem.convs.0.", "encoder.stem.convs.1.", r"encoder.stem.convs.1.*: two convolutions in the stem"),
        ("decoder.stages.1.convs.0.", "decoder.stages.1.convs.1.", r"decoder.stages.1.convs.1.*: two convolutions"),
        ("decoder.stages.0.convs.", "decoder.stages.0.blocks.", r"decoder.stages.0.blocks.*: residual blocks in the"),
        ("norm.weight", "norm.running_mean", r"encoder.stem.convs.0.norm.running_mean: batch normalisation"),
        (
            "stem.convs.0.all_modules.1.",
            "stem.convs.0.all_modules.2.",
            r"encoder.stem.convs.0.all_modules.2.*: dropout",
        ),
        ("encoder.stem.", "conv_blocks_context.", r"^encoder.stem.convs.0.conv.weight is missing"),
        ("stages.1.blocks.1.conv2", "stages.1.blocks.1.tail", r"stages.1.blocks.1.conv2.conv.weight is missing"),
        ("decoder.transpconvs.0.", "decoder.up.0.", r"^decoder.transpconvs.0.weight is missing"),
        ("skip.1.", "skip.0.", r"^encoder.stages.1.blocks.0.skip.1.conv.weight is missing"),
    ],
)
def test_other_networks_are_refused_with_the_key(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_host(renamed(to_host(tiny()), old, new))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decoder.extra.weight", torch.ones(1), "^decoder.extra.weight is a weight the residual-encoder U-Net does"),
        (
            "encoder.stem.convs.0.conv.bias",
            torch.ones(5),
            r"all_modules.0.bias differs from encoder.stem.convs.0.conv.bias",
        ),
        ("encoder.stem.convs.0.conv.weight", {"a": 1}, r"conv.weight is dict, not a tensor. Give the network's state"),
    ],
)
def test_what_does_not_belong_is_refused_with_the_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_host({**to_host(tiny()), key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("encoder.stem.convs.0.conv.weight", torch.ones(5, 2, 3, 3), r"has shape \[5, 2, 3, 3\].* \[4, 2, 3, 3\]"),
        ("encoder.stem.convs.0.conv.weight", torch.ones(4, 2, 3), r"has shape \[4, 2, 3\], not one of a 2-D or 3-D"),
        ("decoder.stages.1.convs.0.conv.weight", torch.ones(4, 8, 1, 3), r"stages.1.convs.0.conv.weight has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_key(key: str, value: Tensor, message: str) -> None:
    state = {
        k: v for k, v in to_host(tiny()).items() if not k.startswith("decoder.encoder.") and "all_modules" not in k
    }
    with pytest.raises(ValueError, match=message):
        from_host({**state, key: value})


def test_what_the_host_cannot_compute_does_not_become_one() -> None:
    network = tiny(gate=0.9)
    with pytest.raises(ValueError, match=r"encoder.stages.1.momentum has gate 0.9; .*Set the gate to 0 and refit"):
        to_host(network)


@pytest.mark.parametrize(
    ("option", "value"),
    [("block", "preact"), ("norm", "group"), ("norm", "batch"), ("velocity", "carry"), ("gating", "block")],
)
def test_options_that_the_host_has_not_do_not_become_one(option: str, value: str) -> None:
    network = tiny(channels=[8, 8, 8], gate=0.9, **{option: value})
    with pytest.raises(ValueError, match=f"^{option} is '{value}', which the host has not; it has '"):
        to_host(network)


def host(name: str, *, deep_supervision: bool = True) -> nn.Module:
    """The reference network with weights of its own."""
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    size = {"channels": [4, 6, 8], **SIZES[name]}
    axes = len(size["kernels"][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = architectures.ResidualEncoderUNet(
            input_channels=2,
            n_stages=3,
            features_per_stage=size["channels"],
            conv_op=getattr(nn, f"Conv{axes}d"),
            kernel_sizes=size["kernels"],
            strides=size["strides"],
            n_blocks_per_stage=[1, 3, 2],
            num_classes=3,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=getattr(nn, f"InstanceNorm{axes}d"),
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=deep_supervision,
        )
    stir(network)
    return network.eval()


@pytest.mark.peers
@pytest.mark.parametrize("name", SIZES)
def test_converted_host_gives_its_logits(name: str) -> None:
    theirs = host(name, deep_supervision=False)
    ours = from_host(theirs.state_dict())
    assert ours.arguments["strides"] == SIZES[name]["strides"]
    assert ours.arguments["kernels"] == SIZES[name]["kernels"]
    assert_same_logits(ours.eval(), theirs)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["2-D", "3-D anisotropic"])
def test_converted_host_gives_its_logits_of_every_resolution(name: str) -> None:
    theirs = host(name)
    ours = from_host(theirs.state_dict())
    for found, expected in zip(ours(image(ours.divisor)), theirs(image(ours.divisor)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("name", SIZES)
def test_host_loads_a_converted_network_strictly(name: str) -> None:
    ours, theirs = tiny(name), host(name, deep_supervision=False)
    theirs.load_state_dict(to_host(ours), strict=True)
    assert_same_logits(ours, theirs)


@pytest.mark.peers
@pytest.mark.parametrize(("wrap", "prefix"), [(torch.compile, "_orig_mod."), (nn.DataParallel, "module.")])
def test_wrapped_host_is_converted(wrap: Callable[[nn.Module], nn.Module], prefix: str) -> None:
    theirs = host("2-D", deep_supervision=False)
    # Compiled at the first call, which never comes: the prefix is there at once.
    state = wrap(theirs).state_dict()
    assert all(key.startswith(prefix) for key in state)
    assert_same_logits(from_host(state).eval(), theirs)


@pytest.mark.peers
def test_plain_host_is_refused() -> None:
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    plain = architectures.PlainConvUNet(
        1, 2, [4, 6], nn.Conv2d, 3, [1, 2], 2, 2, 2, conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^encoder.stages.0.0.convs.0.*: plain convolutions in the encoder"):
        from_host(plain.state_dict())
