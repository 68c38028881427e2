"""Trained folders of nnU-Net v2 become packages that predict the same, or are refused in one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunet_folders import (
    CONVOLUTIONS,
    DECODER,
    KERNELS,
    PATCHES,
    STRIDES,
    architecture,
    host_state,
    make_dataset,
    make_plans,
    save_folder,
    stir,
)
from test_checkpoint import Call
from torch import Tensor, nn

from medmom.describe import describe_model
from medmom.errors import MedmomError
from medmom.export.steps import processing_steps
from medmom.inference.predictor import Predictor, Settings
from medmom.models import MomentumUNet, PlainUNet, from_host, from_plain_host
from medmom.models.convert import _plain_host_names
from medmom.nnunet import import_nnunet
from medmom.package import load_package

KINDS = ("PlainConvUNet", "ResidualEncoderUNet")


def trained(root: Path, kind: str = "PlainConvUNet", axes: int = 3, *, folds: int = 1, **checkpoint: Any) -> Path:
    states = [host_state(kind, axes, seed=fold) for fold in range(folds)]
    return save_folder(root, states, make_plans(kind, axes), **checkpoint)


def window(axes: int, channels: int = 1) -> Tensor:
    """In nnU-Net's order of axes, (z, y, x)."""
    return torch.randn(1, channels, *PATCHES[axes], generator=torch.Generator().manual_seed(0))


def turned(image: Tensor) -> Tensor:
    return image.permute(0, 1, *range(image.ndim - 1, 1, -1))


def scan(path: Path, shape: tuple[int, ...] = (24, 16, 8)) -> Path:
    """A CT whose stored axes point to the patient's back, right and feet, on the spacing of the plans."""
    values = np.random.default_rng(0).normal(90, 60, size=shape).astype(np.float32)
    affine = np.array([[0, -1.25, 0, 9.0], [-1.5, 0, 0, 4], [0, 0, -2.5, 1], [0, 0, 0, 1]])
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_package_gives_the_logits_of_its_weights_on_turned_axes(kind: str, axes: int, tmp_path: Path) -> None:
    folder = trained(tmp_path, kind, axes)
    assert import_nnunet(folder, tmp_path / "organs") == [tmp_path / "organs"]
    package = load_package(tmp_path / "organs")
    assert isinstance(package.network, PlainUNet if kind == "PlainConvUNet" else MomentumUNet)
    assert package.patch == tuple(reversed(PATCHES[axes]))
    reference = (from_plain_host if kind == "PlainConvUNet" else from_host)(host_state(kind, axes)).eval()
    with torch.no_grad():
        expected, found = reference(window(axes)), package.network(turned(window(axes)))
    torch.testing.assert_close(turned(found), expected, rtol=0, atol=1e-5)


def test_every_fold_becomes_a_package_of_its_own(tmp_path: Path) -> None:
    folder = trained(tmp_path, folds=3)
    (folder / "fold_2" / "checkpoint_final.pth").rename(folder / "fold_2" / "checkpoint_best.pth")
    (folder / "fold_3").mkdir()
    out = tmp_path / "with a space" / "organs"
    assert import_nnunet(folder, out) == [out / "fold_0", out / "fold_1", out / "fold_2"]
    sums = {load_package(path).checksum for path in out.iterdir()}
    assert len(sums) == 3
    assert load_package(out / "fold_2").recipe["nnunet"]["checkpoint"] == "checkpoint_best.pth"
    assert not list(out.parent.glob(".draft*"))
    with pytest.raises(MedmomError, match="exists and is not an empty folder"):
        import_nnunet(folder, out)
    assert import_nnunet(folder, tmp_path / "two", folds=["2", "0"]) == [
        tmp_path / "two" / "fold_2",
        tmp_path / "two" / "fold_0",
    ]
    assert import_nnunet(folder, tmp_path / "one", folds=["1"]) == [tmp_path / "one"]


def test_no_package_is_left_where_one_fold_is_damaged(tmp_path: Path) -> None:
    folder = trained(tmp_path, folds=2)
    content = (folder / "fold_1" / "checkpoint_final.pth").read_bytes()
    (folder / "fold_1" / "checkpoint_final.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(MedmomError, match=r"fold_1.*not a sound checkpoint"):
        import_nnunet(folder, tmp_path / "organs")
    assert [path.name for path in tmp_path.iterdir()] == ["Dataset007_Organs"]


def test_fold_all_counts_where_there_is_no_other(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    (folder / "fold_0").rename(folder / "fold_all")
    import_nnunet(folder, tmp_path / "organs")
    assert load_package(tmp_path / "organs").recipe["data"]["fold"] == "all"


def test_recipe_tells_the_origin_and_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="medmom"):
        import_nnunet(trained(tmp_path), tmp_path / "organs")
    recipe = load_package(tmp_path / "organs").recipe
    assert recipe["data"]["folder"] == "Dataset007_Organs"
    told = recipe["nnunet"]
    assert (told["configuration"], told["trainer"], told["network"]) == ("3d_fullres", "nnUNetTrainer", "PlainConvUNet")
    assert len(told["notes"]) == 4
    assert [record.message for record in caplog.records][1:] == told["notes"]
    text = describe_model(tmp_path / "organs")
    assert "PlainUNet" in text
    assert "voxels of 1.5 x 1.25 x 2.5 mm, outer edges kept, axes xyz as stored" in text


@pytest.mark.parametrize(
    ("axes", "theirs", "ours"), [(3, (0, 1, 2), (0, 1, 2)), (3, (0,), (2,)), (3, (1, 2), (0, 1)), (2, (0,), (1,))]
)
def test_mirrored_axes_come_in_our_order(
    axes: int, theirs: tuple[int, ...], ours: tuple[int, ...], tmp_path: Path
) -> None:
    folder = trained(tmp_path, axes=axes, inference_allowed_mirroring_axes=theirs)
    import_nnunet(folder, tmp_path / "organs")
    assert Predictor(tmp_path / "organs", device="cpu", settings=Settings(tta=True)).mirrors == ours


def test_training_without_mirroring_allows_no_mirror_images(tmp_path: Path) -> None:
    folder = trained(
        tmp_path, inference_allowed_mirroring_axes=None, trainer_name="nnUNetTrainer_250epochs_NoMirroring"
    )
    import_nnunet(folder, tmp_path / "organs")
    with pytest.raises(MedmomError, match="trained without mirroring"):
        Predictor(tmp_path / "organs", device="cpu", settings=Settings(tta=True))


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_is_that_of_the_network_on_the_stored_axes(kind: str, tmp_path: Path) -> None:
    import_nnunet(trained(tmp_path, kind), tmp_path / "organs")
    path = scan(tmp_path / "scan.nii.gz")
    label = Predictor(tmp_path / "organs", device="cpu", settings=Settings(skip_air=False))(path, quiet=True).label
    values = np.asarray(nib.load(path).dataobj, dtype=np.float32)
    prepared = (np.clip(values, -150, 250) - 90) / 40
    reference = (from_plain_host if kind == "PlainConvUNet" else from_host)(host_state(kind)).eval()
    with torch.no_grad():
        logits = reference(torch.from_numpy(prepared.transpose(2, 1, 0).copy())[None, None])
    expected = logits[0].argmax(0).numpy().transpose(2, 1, 0)
    assert len(np.unique(expected)) == 3
    assert (label == expected).mean() > 0.999


def test_slices_run_along_the_axis_that_the_plans_name_first(tmp_path: Path) -> None:
    plans = {**make_plans(axes=2), "transpose_forward": [2, 0, 1]}
    state = host_state(axes=2)
    import_nnunet(save_folder(tmp_path, [state], plans), tmp_path / "organs")
    path = tmp_path / "scan.nii.gz"
    values = np.random.default_rng(0).normal(90, 60, size=(5, 24, 16)).astype(np.float32)
    image = nib.Nifti1Image(values, np.diag([4.0, 1.5, 1.25, 1]))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    label = Predictor(tmp_path / "organs", device="cpu", settings=Settings(skip_air=False))(path, quiet=True).label
    slices = torch.from_numpy((np.clip(values, -150, 250) - 90) / 40)[:, None]
    with torch.no_grad():
        # A slice there has the axes (z, y).
        expected = from_plain_host(state).eval()(slices.transpose(2, 3)).argmax(1).transpose(1, 2)
    assert (label == expected.numpy()).mean() > 0.999


@pytest.mark.parametrize("name", ["nnUNetTrainerBN", "nnUNetTrainerSwinUNETR", "Primus_M_Trainer", "", 7, None])
def test_trainers_that_may_build_another_network_are_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="none of nnU-Net's own"):
        import_nnunet(trained(tmp_path, trainer_name=name), tmp_path / "organs")


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainer",
        "nnUNetTrainer_DASegOrd0_NoMirroring",
        "nnUNetTrainerDA5_10epochs",
        "nnUNetTrainer_onlyMirror01_1500ep",
        "nnUNetTrainerVanillaAdam3en4",
        "nnUNetTrainerTopk10LossLS01",
        "nnUNetTrainerCELoss_5epochs",
        "nnUNetTrainerBenchmark_5epochs_noDataLoading",
        "nnUNetTrainer_probabilisticOversampling_033",
    ],
)
def test_trainers_that_change_the_training_alone_are_known(name: str, tmp_path: Path) -> None:
    import_nnunet(trained(tmp_path, axes=2, trainer_name=name), tmp_path / "organs")
    assert load_package(tmp_path / "organs").recipe["nnunet"]["trainer"] == name


def test_checkpoint_with_foreign_content_is_refused_by_its_name(tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    folder = trained(tmp_path, logging={"a": Call(Path.touch, marker)})
    with pytest.raises(
        MedmomError, match=r"checkpoint_final.pth: holds pathlib\.Path\.touch|holds .*pathlib"
    ) as caught:
        import_nnunet(folder, tmp_path / "organs")
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not (tmp_path / "organs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.stages.0.0.convs.0.conv.weight": None}, "is missing in the state"),
        ({"encoder.stages.2.0.convs.1.conv.bias": torch.zeros(9)}, "has shape"),
        ({"decoder.seg_layers.1.bias": torch.tensor([0.0, torch.nan, 0.0])}, "a value that is not finite"),
        ({"decoder.seg_layers.1.bias": torch.tensor([0, 1, 0])}, r"no tensor of floating-point .*torch\.int64"),
        ({"decoder.seg_layers.1.bias": torch.zeros(0)}, r"shape \[0\]"),
        ({"decoder.seg_layers.1.bias": torch.zeros(3).to_sparse()}, "no tensor of floating-point"),
        ({"decoder.seg_layers.1.bias": torch.zeros(1).expand(10**9)}, r"shape \[1000000000\]"),
        ({"encoder.stages.1.0.convs.0.conv.weight": torch.zeros(10**5, 4, 1, 1, 1)}, "has shape"),
    ],
)
def test_weights_that_are_not_those_of_the_network_are_refused(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state = {key: value for key, value in host_state().items() if "all_modules" not in key and "decoder.enc" not in key}
    for key, value in changes.items():
        state.pop(key)
        if value is not None:
            state[key] = value
    with pytest.raises(MedmomError, match=message) as caught:
        import_nnunet(save_folder(tmp_path, [state], make_plans()), tmp_path / "organs")
    assert "checkpoint_final.pth: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_whose_numbers_are_not_in_the_file_are_refused(tmp_path: Path) -> None:
    plans, wide = make_plans(), [64, 64, 64]
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = wide
    with torch.device("meta"):
        network = PlainUNet(
            1,
            3,
            channels=wide,
            convolutions=CONVOLUTIONS,
            decoder_convolutions=DECODER[::-1],
            kernels=KERNELS[3],
            strides=STRIDES[3],
        )
    one, names = torch.zeros(1), _plain_host_names(network)
    state = {names[key]: one.expand(value.shape) for key, value in network.state_dict().items()}
    with pytest.raises(MedmomError, match="no tensor of floating-point numbers that lie in the file"):
        import_nnunet(save_folder(tmp_path, [state], plans), tmp_path / "organs")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("kernel_sizes", [[3, 3, 3]] * 3, r"the weights have kernels \[\[3, 3, 1\]"),
        ("strides", [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "the weights have strides"),
        ("features_per_stage", [4, 6, 10], r"have channels \[4, 6, 8\], plans.json and dataset.json say \[4, 6, 10\]"),
        ("n_conv_per_stage", [2, 2, 2], "the weights have convolutions"),
        ("n_conv_per_stage_decoder", [2, 1], "the weights have decoder_convolutions"),
    ],
)
def test_weights_that_are_not_those_of_the_plans_are_refused(
    part: str, value: Any, message: str, tmp_path: Path
) -> None:
    plans = make_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"][part] = value
    with pytest.raises(MedmomError, match=message):
        import_nnunet(save_folder(tmp_path, [host_state()], plans), tmp_path / "organs")


def test_weights_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    for kind, other in (KINDS, KINDS[::-1]):
        folder = save_folder(tmp_path / kind, [host_state(other)], make_plans(kind))
        with pytest.raises(MedmomError, match=r"plain convolutions in the encoder|the stem of a residual encoder"):
            import_nnunet(folder, tmp_path / "organs")


@pytest.mark.parametrize(
    ("dataset", "plans", "message"),
    [
        (make_dataset(labels={"background": 0, "liver": 1}), make_plans(), "the weights have out_channels 3"),
        (make_dataset(2), make_plans(num_channels=2), "the weights have in_channels 1"),
        (make_dataset(), make_plans(patch_size=[8, 16, 22]), "does not take patches of 22 x 16 x 8 voxels"),
    ],
)
def test_weights_that_do_not_fit_the_data_are_refused(
    dataset: dict[str, Any], plans: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MedmomError, match=message):
        import_nnunet(save_folder(tmp_path, [host_state()], plans, dataset), tmp_path / "organs")


@pytest.mark.parametrize("axes", [(3,), (-1,), "xy", {0: 1}, ("a",), (0.5,)])
def test_mirror_axes_that_are_none_are_refused(axes: Any, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="inference_allowed_mirroring_axes is"):
        import_nnunet(trained(tmp_path, inference_allowed_mirroring_axes=axes), tmp_path / "organs")


def test_other_configuration_than_the_trained_one_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    with pytest.raises(MedmomError, match="trained in the configuration 3d_fullres, not in 2d"):
        import_nnunet(folder, tmp_path / "organs", configuration="2d")
    import_nnunet(folder, tmp_path / "organs", configuration="3d_fullres")


@pytest.mark.parametrize("started", [None, 7, {}, {"configuration": 7}])
def test_folder_names_the_configuration_where_the_checkpoint_does_not(started: Any, tmp_path: Path) -> None:
    import_nnunet(trained(tmp_path, init_args=started), tmp_path / "organs")
    assert load_package(tmp_path / "organs").recipe["nnunet"]["configuration"] == "3d_fullres"


def test_folders_that_are_no_trained_one_name_what_may_be_meant(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    for given, message in {
        folder.parent: f"Give the folder of one configuration, such as {folder}",
        folder / "fold_0": f"Give the folder of the configuration, {folder}",
        tmp_path / "nowhere": r"nowhere.plans\.json: there is no such file",
        folder / "plans.json": "there is no such file",
    }.items():
        with pytest.raises(MedmomError, match=message):
            import_nnunet(given, tmp_path / "organs")
    with pytest.raises(MedmomError, match=r"fold_7: neither .* Trained folds are 0\."):
        import_nnunet(folder, tmp_path / "organs", folds=["7"])
    (folder / "fold_0" / "checkpoint_final.pth").rename(folder / "fold_0" / "checkpoint_latest.pth")
    with pytest.raises(MedmomError, match="Train it to its end first"):
        import_nnunet(folder, tmp_path / "organs")


def test_output_with_other_files_is_left_alone(tmp_path: Path) -> None:
    folder, out = trained(tmp_path, folds=2), tmp_path / "organs"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    for folds in (["0"], ["0", "1"]):
        with pytest.raises(MedmomError, match="ame another"):
            import_nnunet(folder, out, folds=folds)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def host(kind: str, axes: int) -> nn.Module:
    """The network that plans describe, made by the package that nnU-Net makes it with."""
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    arguments = architecture(kind, axes)
    parts = {"conv_op": f"Conv{axes}d", "norm_op": f"InstanceNorm{axes}d", "nonlin": "LeakyReLU"}
    arguments |= {key: getattr(nn, name) for key, name in parts.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = getattr(architectures, kind)(input_channels=2, num_classes=3, **arguments)
        stir(network)
    return network.eval()


@pytest.mark.peers
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_nnunet_give_their_logits_here(kind: str, axes: int, tmp_path: Path) -> None:
    theirs = host(kind, axes)
    folder = save_folder(tmp_path, [theirs.state_dict()], make_plans(kind, axes, num_channels=2), make_dataset(2))
    import_nnunet(folder, tmp_path / "organs")
    ours = load_package(tmp_path / "organs").network
    with torch.no_grad():
        expected, found = theirs(window(axes, 2)), ours(turned(window(axes, 2)))
    torch.testing.assert_close(turned(found), expected, rtol=0, atol=1e-5)


def test_folder_is_only_read(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    import_nnunet(folder, tmp_path / "organs")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert json.loads((folder / "plans.json").read_text(encoding="utf-8")) == make_plans()


def test_steps_before_the_network_are_told_to_whoever_exports_it(tmp_path: Path) -> None:
    plans = make_plans(normalization_schemes=["ZScoreNormalization"])
    import_nnunet(save_folder(tmp_path, [host_state()], plans), tmp_path / "organs")
    steps = processing_steps(load_package(tmp_path / "organs"))
    assert "the smallest box with all voxels of the image that are not 0" in steps["intensity"]["rule"]
    assert steps["working_grid"]["rule"].startswith("Axes are those of the file, neither flipped nor rotated, in the o")
    assert "The same axes, centre and extent" in steps["working_grid"]["rule"]
    assert steps["working_grid"]["orientation"] is None
