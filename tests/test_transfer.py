"""Networks begin with the weights of others, and tell which of them they took."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_checkpoint import Call, save
from test_convert import SIZES, host, stir, tiny
from tiny import save_tiny, tiny_network
from torch import Tensor, nn

from medmom.errors import MedmomError
from medmom.models import JointMomentumUNet, MomentumResNet, MomentumUNet, Paper2D, SliceClassifier, TransNetR
from medmom.models.convert import to_host
from medmom.network import build_network, plan_memory
from medmom.recipe_file import RecipeFile
from medmom.transfer import Transfer, describe, initialise_from

ROOT = Path(__file__).resolve().parent.parent
FLAT: dict[str, Any] = {
    "channels": [4, 6, 8],
    "blocks": [1, 3, 2],
    "kernels": [[3, 3]] * 3,
    "strides": [[1, 1], [2, 2], [2, 2]],
}


def unet(in_channels: int = 2, out_channels: int = 3, **changes: Any) -> MomentumUNet:
    network = MomentumUNet(in_channels, out_channels, **{**FLAT, **changes})
    stir(network)
    return network.eval()


def classifier(in_channels: int = 2, **changes: Any) -> MomentumResNet:
    return MomentumResNet(in_channels, 4, **{**FLAT, **changes}).eval()


def picture(channels: int = 2) -> Tensor:
    return torch.randn(1, channels, 16, 8, generator=torch.Generator().manual_seed(0))


def assert_same(ours: nn.Module, theirs: nn.Module, image: Tensor | None = None, *, atol: float = 0.0) -> None:
    image = picture() if image is None else image
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=atol)


def parts(transfer: Transfer) -> dict[str, tuple[int, int]]:
    """How many tensors of each part were taken, and how many there are."""
    lines = re.findall(r"^  (\w+): (\d+) of (\d+)", describe(transfer), flags=re.MULTILINE)
    return {part: (int(taken), int(total)) for part, taken, total in lines}


@pytest.mark.parametrize("place", ["run", "run/model", "run/model/model.safetensors", "run/model/model.json"])
def test_package_is_taken_whole(place: str, tmp_path: Path) -> None:
    theirs, ours = tiny_network(seed=1).eval(), tiny_network(seed=2).eval()
    save_tiny(tmp_path / "run" / "model", network=theirs)
    transfer = initialise_from(ours, tmp_path / place)
    assert_same(ours, theirs, torch.randn(1, 1, 8, 8, 8))
    assert (transfer.left, transfer.unused, transfer.share, transfer.notes) == ((), (), 1, ())
    assert transfer.taken == tuple(ours.state_dict())
    assert describe(transfer).split("\n")[0].endswith(f"{place}: 47 of 47 tensors taken, all of the parameters.")


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "network.", "module.", "model.", "_orig_mod.", "network._orig_mod.", "unet."])
def test_checkpoint_is_taken_whatever_wraps_its_names(suffix: str, prefix: str, tmp_path: Path) -> None:
    theirs, ours, path = unet(), unet(), tmp_path / f"weights.{suffix}"
    state = {f"{prefix}{name}": value.clone() for name, value in theirs.state_dict().items()}
    safetensors.torch.save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    assert initialise_from(ours, path).share == 1
    assert_same(ours, theirs)


@pytest.mark.parametrize("place", ["state_dict", "model_state_dict", "model", "network_weights"])
def test_weights_are_found_among_what_a_training_leaves(place: str, tmp_path: Path) -> None:
    theirs, ours = unet(), unet()
    optimizer = torch.optim.AdamW(theirs.parameters())
    content = {"epoch": 3, "optimizer": optimizer.state_dict(), place: theirs.state_dict(), "best": np.float64(0.5)}
    torch.save(content, tmp_path / "last.ckpt")
    transfer = initialise_from(ours, tmp_path / "last.ckpt")
    assert (transfer.share, transfer.unused) == (1, ())
    assert_same(ours, theirs)


def test_encoder_of_a_segmentation_becomes_a_classifier_s_and_back(tmp_path: Path) -> None:
    segmenter, ours, back = unet(), classifier(), unet()
    torch.save(segmenter.state_dict(), tmp_path / "a.pt")
    transfer = initialise_from(ours, tmp_path / "a.pt")
    num_tensors = len(segmenter.encoder.state_dict())
    assert parts(transfer) == {"encoder": (num_tensors, num_tensors), "head": (0, 4)}
    assert all(name.startswith(("decoder.", "heads.")) for name in transfer.unused)
    assert f"in the file alone: {len(transfer.unused)} (decoder.stages.0.upsample.weight, " in describe(transfer)
    for name, value in ours.encoder.state_dict().items():
        assert torch.equal(value, segmenter.encoder.state_dict()[name])
    torch.save(ours.state_dict(), tmp_path / "b.pt")
    assert parts(initialise_from(back, tmp_path / "b.pt"))["encoder"] == (num_tensors, num_tensors)
    assert torch.equal(back.encoder.stem.conv.weight, segmenter.encoder.stem.conv.weight)


def test_slices_and_joint_networks_share_names_with_the_plain_ones(tmp_path: Path) -> None:
    torch.save(classifier().state_dict(), tmp_path / "a.pt")
    by_slice = SliceClassifier(2, 4, pooling="attention", **FLAT)
    transfer = initialise_from(by_slice, tmp_path / "a.pt")
    assert {part: taken == total for part, (taken, total) in parts(transfer).items()} == {
        "encoder": True, "head": True, "attention": False,
    }  # fmt: skip
    joint = JointMomentumUNet(2, 3, 4, **FLAT)
    torch.save(joint.state_dict(), tmp_path / "joint.pt")
    assert initialise_from(unet(), tmp_path / "joint.pt").share == 1


def test_other_number_of_classes_leaves_the_heads_alone(tmp_path: Path) -> None:
    theirs, ours = unet(out_channels=5), unet()
    before = ours.heads[0].weight.clone()
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    transfer = initialise_from(ours, tmp_path / "a.pt")
    assert parts(transfer)["heads"] == (0, 4)
    assert "  heads: 0 of 4: 5 classes there, 3 here (heads.0.weight, heads.0.bias and 2 more)" in describe(transfer)
    assert torch.equal(ours.heads[0].weight, before)
    assert dict(transfer.left)["heads.0.bias"] == "5 classes there, 3 here"


def test_share_is_of_the_parameters(tmp_path: Path) -> None:
    theirs, ours = unet(out_channels=5), unet()
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    heads, total = (sum(p.numel() for p in part.parameters()) for part in (ours.heads, ours))
    transfer = initialise_from(ours, tmp_path / "a.pt")
    assert transfer.share == pytest.approx(1 - heads / total)
    assert f"{1 - heads / total:.2%} of the parameters" in describe(transfer)


def test_other_shapes_are_named_with_both(tmp_path: Path) -> None:
    torch.save(unet(kernels=[[3, 3], [3, 1], [3, 3]]).state_dict(), tmp_path / "a.pt")
    transfer = initialise_from(unet(), tmp_path / "a.pt")
    assert dict(transfer.left)["encoder.stages.1.entry.conv1.weight"] == "6 x 4 x 3 x 1 there, 6 x 4 x 3 x 3 here"
    (line,) = (line for line in describe(transfer).split("\n") if line.startswith("  encoder"))
    assert line.endswith("6 x 6 x 3 x 1 there, 6 x 6 x 3 x 3 here (encoder.stages.1.entry.conv2.weight, "
                         "encoder.stages.1.momentum.blocks.0.conv1.weight and 3 more)")  # fmt: skip


@pytest.mark.parametrize(("there", "here"), [(3, 1), (1, 3), (3, 4)])
def test_other_image_channels_have_the_features_of_equal_channels(there: int, here: int, tmp_path: Path) -> None:
    theirs, ours = unet(there), unet(here)
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    transfer = initialise_from(ours, tmp_path / "a.pt")
    assert transfer.share == 1
    assert transfer.notes == (f"encoder.stem.conv.weight: {there} image channels there, {here} here, the mean in each",)
    grey = picture(1)
    with torch.inference_mode():
        found, expected = ours(grey.expand(-1, here, -1, -1)), theirs(grey.expand(-1, there, -1, -1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_another_gate_or_norm_is_told(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", network=tiny_network())
    ours = MomentumResNet(
        1, 3, channels=(4, 6), blocks=(1, 3), kernels=[[3, 3, 3]] * 2, strides=[[1, 1, 1], [2, 2, 2]], gate=1.0
    )
    assert initialise_from(ours, tmp_path / "model").notes == (
        "gate: trained at 0.9, here 1",
        "norm: trained with instance, here group; features differ until it has trained on",
    )


def of_nnunet(image: Tensor, order: tuple[int, ...]) -> Tensor:
    """Image (B, C, x, y, z) as nnU-Net's network sees it: (z, y, x), then in the order of its plans."""
    reversed_axes = image.permute(0, 1, *reversed(range(2, image.ndim)))
    return reversed_axes.permute(0, 1, *(2 + axis for axis in order))


def to_xyz(logits: Tensor, order: tuple[int, ...]) -> Tensor:
    back = logits.permute(0, 1, *(2 + order.index(axis) for axis in range(len(order))))
    return back.permute(0, 1, *reversed(range(2, back.ndim)))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_kernels_of_the_host_are_turned_to_our_axes(order: tuple[int, ...], tmp_path: Path) -> None:
    theirs = tiny("3-D anisotropic")
    plans = {"plans": {"transpose_forward": list(order)}}
    path = save(tmp_path / "checkpoint_final.pth", to_host(theirs), init_args=plans)
    # Axis a of ours is the axis of the host at which its plans have 2 - a.
    turned: dict[str, Any] = {
        key: [[edges[order.index(2 - axis)] for axis in range(3)] for edges in theirs.arguments[key]]
        for key in ("kernels", "strides")
    }
    ours = MomentumUNet(2, 3, channels=[4, 6, 8], blocks=[1, 3, 2], gate=0.0, **turned).eval()
    transfer = initialise_from(ours, path)
    assert (transfer.share, transfer.unused, transfer.notes) == (1, (), ())
    image = torch.randn(2, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = to_xyz(theirs(of_nnunet(image, order)), order)
        torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_slices_of_the_host_are_turned_to_our_axes(prefix: str, tmp_path: Path) -> None:
    theirs = tiny("2-D anisotropic")
    state = {f"{prefix}{name}": value.clone() for name, value in to_host(theirs).items()}
    path = save(tmp_path / "a.pth", state, init_args={"plans": {"transpose_forward": [1, 0, 2]}})
    turned: dict[str, Any] = {key: [edges[::-1] for edges in theirs.arguments[key]] for key in ("kernels", "strides")}
    ours = MomentumUNet(2, 3, channels=[4, 6, 8], blocks=[1, 3, 2], gate=0.0, **turned).eval()
    assert initialise_from(ours, path).share == 1
    image = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image.mT).mT, rtol=0, atol=1e-5)


def test_host_gives_its_encoder_to_a_classifier_and_its_gate_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", to_host(tiny()))
    transfer = initialise_from(classifier(), path)
    assert parts(transfer)["encoder"] == (len(tiny().encoder.state_dict()),) * 2
    assert transfer.notes[0] == "gate: trained at 0, here 0.9; medmom.ramp.GateRamp raises it while it trains on"


def test_networks_of_nnunet_without_an_equal_are_refused_by_what_they_have(tmp_path: Path) -> None:
    state = {name.replace("blocks.0.", "0.convs.0."): value for name, value in to_host(tiny()).items()}
    with pytest.raises(MedmomError, match=r"a.pth: encoder.stages.0.0.convs.0.*: plain convolutions in the encoder"):
        initialise_from(unet(), save(tmp_path / "a.pth", state))


def test_resnet_of_torchvision_gives_its_features(tmp_path: Path) -> None:
    theirs, ours = TransNetR(3, 2).double().eval(), TransNetR(3, 2).double().eval()
    theirs.encoder.bn1.running_mean.normal_()
    state = {name: value for name, value in theirs.encoder.state_dict().items() if not name.endswith("tracked")}
    torch.save({**state, "layer4.0.conv1.weight": torch.ones(1), "fc.bias": torch.ones(2)}, tmp_path / "resnet50.pth")
    transfer = initialise_from(ours, tmp_path / "resnet50.pth")
    found, total = parts(transfer)["encoder"]
    assert found == total
    assert transfer.unused == ("layer4.0.conv1.weight", "fc.bias")
    image = torch.randn(1, 3, 64, 32, generator=torch.Generator().manual_seed(0)).double()
    with torch.inference_mode():
        for found_, expected in zip(ours.encoder(image), theirs.encoder(image.mT), strict=True):
            torch.testing.assert_close(found_, expected.mT)


def test_statistics_that_are_missing_are_no_news(tmp_path: Path) -> None:
    theirs, ours = classifier(norm="batch"), classifier(norm="batch")
    state = {name: value for name, value in theirs.state_dict().items() if "running" not in name}
    torch.save({name: value for name, value in state.items() if "tracked" not in name}, tmp_path / "a.pt")
    transfer = initialise_from(ours, tmp_path / "a.pt")
    assert (transfer.left, transfer.share) == ((), 1)
    torch.save(theirs.state_dict(), tmp_path / "b.pt")
    assert initialise_from(classifier(), tmp_path / "b.pt").unused == ()
    ours.load_state_dict(classifier(norm="batch").state_dict())
    theirs.encoder.stem.norm.running_mean.fill_(3)
    torch.save(theirs.state_dict(), tmp_path / "b.pt")
    assert "encoder.stem.norm.running_mean" in initialise_from(ours, tmp_path / "b.pt").taken
    assert ours.encoder.stem.norm.running_mean.eq(3).all()


def test_on_the_meta_device_it_is_only_checked(tmp_path: Path) -> None:
    torch.save(unet().state_dict(), tmp_path / "a.pt")
    with torch.device("meta"):
        network = MomentumUNet(2, 3, **FLAT)
    assert initialise_from(network, tmp_path / "a.pt").share == 1
    assert all(parameter.is_meta for parameter in network.parameters())


def test_precision_of_the_network_stays(tmp_path: Path) -> None:
    torch.save({name: value.half() for name, value in unet().state_dict().items()}, tmp_path / "a.pt")
    ours = unet().to(memory_format=torch.channels_last)
    assert initialise_from(ours, tmp_path / "a.pt").share == 1
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert ours.encoder.stages[1].entry.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def broken(name: str, value: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    state = unet().state_dict()
    return {**state, name: value(state[name])}


STEM = "encoder.stem.conv.weight"
FAULTS: dict[str, tuple[Any, str]] = {
    "list": ([1, 2], r"no weights in it, neither as a state_dict nor under network_weights, state_dict, .* or model\."),
    "empty": ({"state_dict": {}, "epoch": 3}, "no weights in it"),
    "numbers": ({"a": 1.0, 3: torch.ones(1)}, "no weights in it"),
    "other": (
        nn.Linear(2, 2).state_dict(),
        r"no layer among its 2 tensors fits into this MomentumUNet \(it has weight",
    ),
    "wider": (
        MomentumUNet(2, 3, **{**FLAT, "channels": [5, 7, 9]}).state_dict(),
        r"no layer among its \d+ tensors fits .*\(encoder.stem.conv.weight: 5 x 2 x 3 x 3 there, 4 x 2 x 3 x 3 here\)"
        ". Take the preset, patch and spacing that it was trained with",
    ),
    # Norms and biases alone have the shapes of a network of other axes.
    "deep": (tiny("3-D").state_dict(), r"no layer among its \d+ tensors fits"),
    "nan": (broken(STEM, lambda value: value / 0), f"{STEM} holds values that are not finite numbers"),
    "too large": (broken(STEM, lambda value: value.double() * 1e300), f"{STEM} holds values that are not finite"),
    "code": ({"state_dict": Call(os.system, "true")}, r"holds (posix|nt)\.system, neither number nor text nor tensor"),
    "module": (unet(), r"holds .*medmom\.models\.unet\.MomentumUNet.*Ask its author for the weights alone"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_of_no_use_is_refused_in_one_line_and_changes_nothing(name: str, tmp_path: Path) -> None:
    content, fact = FAULTS[name]
    torch.save(content, tmp_path / "a.pt")
    network = unet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(MedmomError, match=rf"a\.pt: {fact}") as caught:
        initialise_from(network, tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("a.pt", b"", "not a sound checkpoint of torch.save"),
        ("a.ckpt", b"PK\3\4 and then nothing", "not a sound checkpoint of torch.save"),
        ("a.safetensors", b"", "not a sound safetensors file"),
        ("a.safetensors", b"\xff" * 64, "not a sound safetensors file"),
        ("a.safetensors", safetensors.torch.save({"a": torch.ones(9)})[:-1], "not a sound safetensors file"),
        ("a.safetensors", safetensors.torch.save({}), "no weights in it"),
    ],
)
def test_damaged_files_are_refused(name: str, content: bytes, fact: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MedmomError, match=rf"{name}: {fact}"):
        initialise_from(unet(), tmp_path / name)


def test_numbers_of_another_kind_are_not_taken(tmp_path: Path) -> None:
    state = broken(STEM, lambda value: value.to(torch.complex64))
    state["encoder.stem.conv.bias"] = state["encoder.stem.conv.bias"].to_sparse()
    torch.save(state, tmp_path / "a.pt")
    transfer = initialise_from(unet(), tmp_path / "a.pt")
    assert [name for name, _ in transfer.left] == [STEM, "encoder.stem.conv.bias"]
    assert {reason for _, reason in transfer.left} == {"of another kind of number there"}


def test_folders_and_absent_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"no model package: neither model.json nor model/model.json is there"):
        initialise_from(unet(), tmp_path)
    with pytest.raises(MedmomError, match=r"none.pt: cannot be read \(No such file or directory\)"):
        initialise_from(unet(), tmp_path / "none.pt")
    save_tiny(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(MedmomError, match=r"the weights do not match their checksum"):
        initialise_from(unet(), weights)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"model": unet().state_dict(), "more": Call(os.mkdir, str(tmp_path / "trace"))}, tmp_path / "a.pt")
    with pytest.raises(MedmomError, match=r"holds (posix|nt)\.mkdir"):
        initialise_from(unet(), tmp_path / "a.pt")
    assert not (tmp_path / "trace").exists()


def blocks(kind: str) -> list[str]:
    page = (ROOT / "docs" / "transfer.md").read_text(encoding="utf-8")
    found = re.findall(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL)
    assert found
    return found


def test_python_examples_of_the_page_run_and_print_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    for code in blocks("python"):
        exec(compile(code, "transfer.md", "exec"), {})
    page = (ROOT / "docs" / "transfer.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out.rstrip().split("\n")
    told = [line[4:] for line in page.split("\n") if re.match(r"    (liver\.pt:|  \w)", line)]
    assert [re.sub(r"^.*/", "", printed[0]), *printed[1:]] == told


def test_recipe_of_the_page_makes_its_network(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "paper.yaml").write_text(block)
    recipe = RecipeFile(tmp_path / "paper.yaml").build()
    with torch.device("meta"):
        network = build_network(recipe, 3, 2)
        assert network(torch.empty(1, 3, *recipe.data.patch)).shape == (1, 2, 256, 256)
    assert (type(network), recipe.loss.dice.smooth_nr) == (Paper2D, 1.0)
    assert plan_memory(recipe, 3, 2, torch.device("cpu")) == "plain"


@pytest.mark.peers
@pytest.mark.parametrize("name", SIZES)
def test_trained_host_gives_its_logits(name: str, tmp_path: Path) -> None:
    theirs = host(name, deep_supervision=False)
    path = save(tmp_path / "checkpoint_final.pth", theirs.state_dict())
    turned: dict[str, Any] = {key: [edges[::-1] for edges in SIZES[name][key]] for key in ("kernels", "strides")}
    channels = SIZES[name].get("channels", [4, 6, 8])
    ours = MomentumUNet(2, 3, channels=channels, blocks=[1, 3, 2], gate=0.0, **turned).eval()
    assert initialise_from(ours, path).share == 1
    image = torch.randn(1, 2, *[2 * step for step in ours.divisor], generator=torch.Generator().manual_seed(0))
    order = tuple(range(image.ndim - 2))
    with torch.inference_mode():
        expected = to_xyz(theirs(of_nnunet(image, order)), order)
        torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-5)
