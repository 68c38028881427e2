import inspect
import json
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from unets import MEMORIES

from medmom import models
from medmom.models import MomentumUNet, mom3d_m, plan_kernels_and_strides, presets
from medmom.models.blocks import ResidualBlock
from medmom.models.gates import LOW_PRECISION_BITS, lost_bits
from medmom.models.resnet import MomentumResNet

Network = MomentumUNet | MomentumResNet

PRESETS = [name for name in presets.__all__ if name != "plan_kernels_and_strides"]
COUNTS = {  # parameters with one channel and three classes: all, encoder
    "cls2d_s": (17_446_787, 17_444_224),
    "cls2d_xs": (1_094_627, 1_093_984),
    "cls3d_s": (12_883_075, 12_881_792),
    "mom2d_m": (105_918_322, 92_110_400),
    "mom2d_s": (14_784_364, 12_714_560),
    "mom2d_xs": (1_236_388, 1_094_096),
    "mom3d_deep": (84_031_031, 76_732_880),
    "mom3d_m": (102_350_575, 90_296_576),
    "mom3d_s": (14_388_649, 12_881_792),
    "mom3d_sr": (25_895_593, 24_388_736),
    "mom3d_xs": (640_817, 550_432),
    "mom3d_xw": (3_382_737, 3_068_896),
}
KINDS = {MomentumUNet: presets.Options, MomentumResNet: presets.ClassifierOptions}


def on_meta(name: str, *arguments: int, **keywords: Any) -> Any:
    """The preset without memory for its weights."""
    with torch.device("meta"):
        return getattr(models, name)(*arguments, **keywords)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def narrow(network: Network) -> Network:
    """The same network with few channels, and residual branches that are not zero."""
    torch.manual_seed(0)
    thin = type(network)(**network.arguments | {"channels": [3] * len(network.arguments["channels"])})
    for block in thin.modules():
        if isinstance(block, ResidualBlock):
            nn.init.uniform_(block.norm2.weight, 0.5, 1.5)  # type: ignore[arg-type]
    return thin.eval()


def flattened(plan: Sequence[Sequence[int]]) -> list[list[int]]:
    """The last axis left alone in the first two stages."""
    return [[*by_axis[:-1], 1] if stage < 2 else list(by_axis) for stage, by_axis in enumerate(plan)]


def test_every_public_function_of_the_room_is_offered() -> None:
    public = {
        name
        for name, value in vars(presets).items()
        if inspect.isfunction(value) and value.__module__ == presets.__name__ and not name.startswith("_")
    }
    assert public == set(presets.__all__) <= set(models.__all__)


@pytest.mark.parametrize("kind", KINDS)
def test_presets_take_every_option_of_their_network(kind: type[Network]) -> None:
    shape = {"self", "in_channels", "out_channels", "channels", "blocks", "kernels", "strides"}
    assert set(KINDS[kind].__annotations__) == set(inspect.signature(kind.__init__).parameters) - shape


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_as_many_as_specified(name: str) -> None:
    network = on_meta(name, 1, 3)
    assert (count(network), count(network.encoder)) == COUNTS[name]
    (told,) = re.findall(r"([\d.]+) M parameters with one channel", getattr(models, name).__doc__)
    assert count(network) / 1e6 == pytest.approx(float(told), abs=0.06)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("anisotropic", "coupling"), [(False, "normalised"), (True, "ema")])
def test_changing_the_gate_changes_the_logits(name: str, anisotropic: bool, coupling: str) -> None:
    plain = on_meta(name, 1, 3).arguments
    plan = {key: flattened(plain[key]) if anisotropic else plain[key] for key in ("kernels", "strides")}
    options: dict[str, Any] = {"coupling": coupling, "memory": "plain", **plan}
    low, high = (narrow(on_meta(name, 1, 3, gate=gate, **options)) for gate in (0.3, 0.8))
    image = torch.randn(1, 1, 2 * low.divisor[0], *low.divisor[1:])
    with torch.inference_mode():
        difference = (low(image) - high(image)).abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("name", PRESETS)
def test_preset_passes_its_arguments_on(name: str) -> None:
    plain = on_meta(name, 1, 2).arguments
    plan = {key: flattened(plain[key]) for key in ("kernels", "strides")}
    changes = {"gate": 0.8, "coupling": "ema", "gating": "block", "velocity": "carry", "block": "preact", **plan}
    changes |= {"norm": "batch", "memory": "checkpoint"}
    changes |= {"dropout": 0.5, "stem_stride": [3] * len(plan["strides"][0])} if "dropout" in plain else {}
    changes |= {"deep_supervision": False} if "deep_supervision" in plain else {}
    changed = on_meta(name, 4, 5, **changes).arguments
    assert changed == plain | changes | {"in_channels": 4, "out_channels": 5}
    assert json.loads(json.dumps(changed)) == changed


@pytest.mark.parametrize("name", PRESETS)
def test_preset_suits_every_memory(name: str) -> None:
    network = on_meta(name, 1, 2)
    assert network.memory == ("hybrid" if name == "mom3d_deep" else "plain")
    deepest = max(network.arguments["blocks"]) - 1
    assert lost_bits(network.gate, deepest) <= LOW_PRECISION_BITS
    for memory in MEMORIES:
        assert on_meta(name, 1, 2, gate=0.875, memory=memory).memory == memory


@pytest.mark.parametrize("name", PRESETS)
def test_plan_of_another_depth_is_refused(name: str) -> None:
    axes = len(on_meta(name, 1, 2).divisor)
    with pytest.raises(ValueError, match="one of each for every stage"):
        on_meta(name, 1, 2, strides=[[1] * axes, [2] * axes])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("key", ["kernels", "strides"])
def test_plan_of_other_axes_is_refused(name: str, key: str) -> None:
    plan = on_meta(name, 1, 2).arguments[key]
    axes = len(plan[0])
    other = [by_axis[:1] * (5 - axes) for by_axis in plan]
    with pytest.raises(ValueError, match=rf"^{name} has {axes} axes.*take a preset of {5 - axes}-D\.$"):
        on_meta(name, 1, 2, **{key: other})


CUBE, FLAT = (3, 3, 3), (3, 3, 1)
WHOLE, HALF, IN_PLANE = (1, 1, 1), (2, 2, 2), (2, 2, 1)


@pytest.mark.parametrize(
    ("patch", "spacing", "kernels", "strides"),
    [
        pytest.param((128, 128, 128), (0.77, 0.77, 1.0), [CUBE] * 6, [WHOLE] + [HALF] * 5, id="liver"),
        pytest.param((160, 192, 80), (0.79, 0.79, 1.24), [CUBE] * 6, [WHOLE, *[HALF] * 4, IN_PLANE], id="lung"),
        pytest.param(
            (160, 192, 56), (0.78, 0.78, 3.0), [FLAT] + [CUBE] * 5, [WHOLE, IN_PLANE, *[HALF] * 3, IN_PLANE], id="colon"
        ),
        pytest.param((40, 56, 40), (1.0, 1.0, 1.0), [CUBE] * 4, [WHOLE] + [HALF] * 3, id="hippocampus"),
        pytest.param(
            (56, 192, 160), (3.0, 0.78, 0.78), [(1, 3, 3), *[CUBE] * 5],
            [WHOLE, (1, 2, 2), *[HALF] * 3, (1, 2, 2)], id="colon, other axes first",
        ),
        pytest.param((64, 64, 8), (1.0, 1.0, 1.0), [CUBE] * 5, [WHOLE, HALF, *[IN_PLANE] * 3], id="slab"),
        pytest.param((256, 256), (0.5, 0.5), [(3, 3)] * 5, [(1, 1)] + [(2, 2)] * 4, id="2-D"),
        pytest.param(
            (20, 320, 320), (8.0, 0.5, 0.5), [(1, 3, 3)] * 4 + [CUBE], [WHOLE] + [(1, 2, 2)] * 4, id="thick slices"
        ),
    ],
)  # fmt: skip
def test_plan_is_that_of_nnunet(
    patch: Sequence[int], spacing: Sequence[float], kernels: Sequence[Any], strides: Sequence[Any]
) -> None:
    assert plan_kernels_and_strides(patch, spacing, len(strides)) == (tuple(kernels), tuple(strides))


@pytest.mark.parametrize(
    ("patch", "spacing", "millions"),
    [((160, 192, 80), (0.79, 0.79, 1.24), 101.94), ((160, 192, 56), (0.78, 0.78, 3.0), 101.86)],
    ids=["lung", "colon"],
)
def test_planned_network_has_the_published_size(
    patch: Sequence[int], spacing: Sequence[float], millions: float
) -> None:
    kernels, strides = plan_kernels_and_strides(patch, spacing, 6)
    with torch.device("meta"):
        network = mom3d_m(1, 3, kernels=kernels, strides=strides)
        assert network.eval()(torch.zeros(1, 1, *patch)).shape == (1, 3, *patch)
    assert count(network) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("spacing", list(product((0.5, 1.0, 1.9, 4.0), repeat=3)))
def test_plan_of_a_patch_is_that_of_the_next_size_it_divides(spacing: Sequence[float]) -> None:
    patch = (45, 61, 77)
    kernels, strides = plan_kernels_and_strides(patch, spacing, 3)
    divisors = [a * b * c for a, b, c in zip(*strides, strict=True)]
    padded = [-(-edge // divisor) * divisor for edge, divisor in zip(patch, divisors, strict=True)]
    assert plan_kernels_and_strides(padded, spacing, 3) == (kernels, strides)
    assert min(edge // divisor for edge, divisor in zip(padded, divisors, strict=True)) >= 4


def test_axis_alone_is_halved_from_twelve_on() -> None:
    assert plan_kernels_and_strides((12, 6), (1.0, 1.0), 2)[1] == ((1, 1), (2, 1))
    with pytest.raises(ValueError, match="carries 1 stages"):
        plan_kernels_and_strides((11, 6), (1.0, 1.0), 2)


def test_patch_too_small_for_its_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="24 x 24 x 16 carries 3 stages, the network has 4; take a larger patch"):
        plan_kernels_and_strides((24, 24, 16), (1.0, 1.0, 1.0), 4)


@pytest.mark.parametrize(("patch", "spacing"), [((8, 8), (1.0, 1.0, 1.0)), ((8, 8), (1.0, 0.0)), ((0, 8), (1.0, 1.0))])
def test_patch_and_spacing_that_do_not_match_are_refused(patch: Sequence[int], spacing: Sequence[float]) -> None:
    with pytest.raises(ValueError, match="one positive number an axis"):
        plan_kernels_and_strides(patch, spacing, 1)
