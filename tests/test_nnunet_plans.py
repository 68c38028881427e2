"""Plans of nnU-Net v2 are read as they are meant, or refused by what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nnunet_folders import BLOCKS, CHANNELS, CONVOLUTIONS, CT, DECODER, KERNELS, STRIDES, make_dataset, make_plans

from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.labels import Labels
from medmom.nnunet.plans import Plan, read_plan

Table = dict[str, Any]


def write(folder: Path, plans: Any = None, dataset: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in {"plans.json": plans or make_plans(), "dataset.json": dataset or make_dataset()}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def read(folder: Path, plans: Any = None, dataset: Any = None, *, name: str = "3d_fullres") -> Plan:
    return read_plan(write(folder, plans, dataset), name)


def options(plans: Table) -> Table:
    found: Table = next(iter(plans["configurations"].values()))
    return found


def turned(edges: list[list[int]]) -> list[list[int]]:
    return [by_axis[::-1] for by_axis in edges]


def test_configuration_is_told_in_our_order_of_axes(tmp_path: Path) -> None:
    plan = read(tmp_path)
    assert (plan.dataset, plan.configuration, plan.patch) == ("Dataset007_Organs", "3d_fullres", (24, 16, 8))
    assert plan.preparation == Preparation(
        (1.5, 1.25, 2.5), "ct", (-150.0, 250.0), 90.0, 40.0, axes="stored", exact="extent"
    )
    assert plan.labels == Labels(("background", "liver", "spleen"), (0, 1, 2))
    assert plan.channels == ("CT 0",)
    assert plan.architecture.kind == "PlainConvUNet"
    assert plan.architecture.sizes == {
        "channels": CHANNELS,
        "kernels": turned(KERNELS[3]),
        "strides": turned(STRIDES[3]),
        "convolutions": CONVOLUTIONS,
        "decoder_convolutions": DECODER[::-1],
    }
    assert len(plan.notes) == 4


def test_residual_encoder_is_told_by_its_blocks(tmp_path: Path) -> None:
    sizes = read(tmp_path, make_plans("ResidualEncoderUNet")).architecture.sizes
    assert sizes["blocks"] == BLOCKS
    assert "decoder_convolutions" not in sizes


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_plans_of_the_first_versions_say_the_same(kind: str, tmp_path: Path) -> None:
    plans, older = make_plans(kind), make_plans(kind)
    arguments = options(older).pop("architecture")["arch_kwargs"]
    arguments["features_per_stage"] = options(plans)["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 10]
    options(older).update(
        UNet_class_name=kind,
        UNet_base_num_features=4,
        unet_max_num_features=10,
        conv_kernel_sizes=arguments["kernel_sizes"],
        pool_op_kernel_sizes=arguments["strides"],
        n_conv_per_stage_encoder=arguments.get("n_conv_per_stage") or arguments["n_blocks_per_stage"],
        n_conv_per_stage_decoder=arguments["n_conv_per_stage_decoder"],
    )
    for name in ("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_probabilities"):
        del options(older)[name]
    older["foreground_intensity_properties_by_modality"] = older.pop("foreground_intensity_properties_per_channel")
    assert read(tmp_path, older) == read(tmp_path, plans)


def test_one_number_stands_for_all_stages(tmp_path: Path) -> None:
    plans = make_plans()
    options(plans)["architecture"]["arch_kwargs"].update(kernel_sizes=3, n_conv_per_stage=2, n_conv_per_stage_decoder=1)
    sizes = read(tmp_path, plans).architecture.sizes
    assert sizes["kernels"] == [[3, 3, 3]] * 3
    assert (sizes["convolutions"], sizes["decoder_convolutions"]) == ([2, 2, 2], [1, 1])


def test_configuration_inherits(tmp_path: Path) -> None:
    plans = make_plans()
    plans["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres", "spacing": [5, 4, 3]}
    assert read(tmp_path, plans, name="3d_lowres").preparation.spacing == (3.0, 4.0, 5.0)
    plans["configurations"]["3d_lowres"]["inherits_from"] = "3d_lowres"
    with pytest.raises(MedmomError, match="inherits from itself"):
        read(tmp_path, plans, name="3d_lowres")


@pytest.mark.parametrize(("order", "plane"), [([0, 1, 2], "axial"), ([1, 0, 2], "coronal"), ([2, 0, 1], "sagittal")])
def test_first_axis_of_the_plans_is_that_of_the_slices(order: list[int], plane: str, tmp_path: Path) -> None:
    plans = {**make_plans(axes=2), "transpose_forward": order}
    preparation = read(tmp_path, plans, name="2d").preparation
    assert (preparation.plane, preparation.axes, preparation.spacing) == (plane, "stored", (1.5, 1.25))


def test_reader_that_turns_images_is_the_patients_axes(tmp_path: Path) -> None:
    plans = {**make_plans(), "image_reader_writer": "NibabelIOWithReorient"}
    assert read(tmp_path, plans).preparation.axes == "patient"


@pytest.mark.parametrize(
    ("scheme", "mask", "expected"),
    [
        ("ZScoreNormalization", False, ("zscore", "box")),
        ("ZScoreNormalization", True, ("zscore", "mask")),
        ("RGBTo01Normalization", False, ("unit", "image")),
    ],
)
def test_intensities(scheme: str, mask: bool, expected: tuple[str, str], tmp_path: Path) -> None:
    plans = make_plans(num_channels=2, normalization_schemes=[scheme] * 2, use_mask_for_norm=[mask] * 2)
    preparation = read(tmp_path, plans, make_dataset(2)).preparation
    assert (preparation.intensity, preparation.within) == expected


def test_images_may_stay_as_they_are(tmp_path: Path) -> None:
    plans = make_plans(resampling_fn_data="no_resampling_data_or_seg_to_shape")
    assert read(tmp_path, plans).preparation.spacing is None


def test_labels_come_in_the_order_of_their_values(tmp_path: Path) -> None:
    labels = {"spleen": 2, "ignore": 3, "liver": [1], "background": 0}
    found = read(tmp_path, dataset=make_dataset(labels=labels)).labels
    assert found == Labels(("background", "liver", "spleen"), (0, 1, 2), 3)


def network(**changes: Any) -> Callable[[Table], None]:
    return lambda plans: options(plans)["architecture"]["arch_kwargs"].update(changes)


def configuration(**changes: Any) -> Callable[[Table], None]:
    return lambda plans: options(plans).update(changes)


def without(name: str) -> Callable[[Table], Any]:
    return lambda plans: options(plans).pop(name)


def change(**changes: Any) -> Callable[[Table], None]:
    return lambda plans: plans.update(changes)


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (network(nonlin="torch.nn.ReLU"), "nonlin torch.nn.ReLU, which has no equal"),
        (network(nonlin_kwargs={"negative_slope": 0.2}), "nonlin_kwargs"),
        (network(norm_op="torch.nn.modules.batchnorm.BatchNorm3d"), "norm_op torch.nn.modules.batchnorm.BatchNorm3d"),
        (network(norm_op_kwargs={"eps": 1e-3, "affine": True}), "norm_op_kwargs"),
        (network(dropout_op="torch.nn.Dropout3d"), "dropout_op torch.nn.Dropout3d"),
        (network(conv_bias=False), "conv_bias False"),
        (network(conv_op="torch.nn.modules.conv.Conv2d"), "conv_op torch.nn.modules.conv.Conv2d"),
        (network(nonlin_first=True), "nonlin_first True"),
        (network(squeeze_excitation=True), "squeeze_excitation True"),
        (network(n_stages=4), "for 4 stages"),
        (network(n_stages=10**9), "n_stages is 1000000000"),
        (network(strides=[[1, 1]] * 3), "for 3 stages"),
        (network(features_per_stage=[4, 6.5, 8]), r"6\.5"),
        (configuration(architecture={"network_class_name": "a.Primus", "arch_kwargs": {}}), r"network is a a\.Primus"),
        (configuration(patch_size=[64]), "patch_size has 1 edges"),
        (configuration(patch_size=[8, 16, -1]), "no list of whole numbers above 0"),
        (configuration(patch_size="8"), "no list of whole numbers above 0"),
        (configuration(spacing=[1.0, 1.0]), "2 numbers of spacing, 3 of patch_size"),
        (configuration(spacing=[1.0, 1.0, 0.0]), r"preparation\.spacing .* each above 0"),
        (configuration(spacing=[1.0, 1.0, float("nan")]), "nan is no finite number"),
        (configuration(spacing=[1.0, 1.0, 10**400]), "not as nnU-Net v2 writes it"),
        (configuration(spacing=None), "not as nnU-Net v2 writes it"),
        (configuration(previous_stage="3d_lowres"), "3d_fullres is the second stage of a cascade"),
        (configuration(preprocessor_name="OwnPreprocessor"), "preprocessor_name is OwnPreprocessor"),
        (configuration(resampling_fn_data="resample_torch_fornnunet"), "resampled by resample_torch_fornnunet"),
        (configuration(resampling_fn_data_kwargs={"order": 1}), "of order 1"),
        (configuration(resampling_fn_probabilities="own"), "resampling_fn_probabilities is own"),
        (configuration(normalization_schemes=["NoNormalization"]), "normalised by NoNormalization"),
        (configuration(normalization_schemes=["RescaleTo01Normalization"]), "normalised by RescaleTo01Normalization"),
        (configuration(normalization_schemes=[]), "0 normalization_schemes"),
        (without("patch_size"), "the field 'patch_size' is missing"),
        (without("architecture"), "the field 'UNet_class_name' is missing"),
        (without("spacing"), "the field 'spacing' is missing"),
        (change(label_manager="Own"), "label_manager is Own"),
        (change(image_reader_writer="Tiff3DIO"), "images are read by Tiff3DIO"),
        (change(transpose_forward=[0, 2, 1]), r"transpose_forward is \[0, 2, 1\]"),
        (change(transpose_forward=None), "not as nnU-Net v2 writes it"),
        (change(foreground_intensity_properties_per_channel={}), "the field '0' is missing"),
        (
            change(foreground_intensity_properties_per_channel={"0": {**CT, "percentile_00_5": 300.0}}),
            "lower bound first",
        ),
        (change(foreground_intensity_properties_per_channel={"0": {**CT, "mean": "x"}}), "'x' is no finite number"),
        (change(configurations={"2d": {}}), "no configuration '3d_fullres'; there are 2d"),
        (change(configurations={"3d_fullres": 7}), "not as nnU-Net v2 writes it"),
        (change(configurations={"3d_fullres": {"inherits_from": "x"}}), "the field 'x' is missing"),
    ],
)
def test_plans_that_have_no_equal_are_refused_by_name(
    mutate: Callable[[Table], Any], message: str, tmp_path: Path
) -> None:
    plans = make_plans()
    mutate(plans)
    with pytest.raises(MedmomError, match=message) as caught:
        read(tmp_path, plans)
    assert str(caught.value).startswith(str(tmp_path / "plans.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization_schemes": ["CTNormalization", "ZScoreNormalization"]}, r"\(CTNormalization, ZScoreNormali"),
        (
            {"normalization_schemes": ["ZScoreNormalization"] * 2, "use_mask_for_norm": [True, False]},
            "ZScoreNormalization within a mask",
        ),
    ],
)
def test_channels_of_different_kinds_are_refused(changes: Table, message: str, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=message):
        read(tmp_path, make_plans(num_channels=2, **changes), make_dataset(2))


def test_channels_of_ct_with_ranges_of_their_own_are_refused(tmp_path: Path) -> None:
    plans = make_plans(num_channels=2)
    plans["foreground_intensity_properties_per_channel"]["1"]["mean"] = 0.0
    with pytest.raises(MedmomError, match="2 channels of CT have ranges of their own"):
        read(tmp_path, plans, make_dataset(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": {"background": 0, "tumour": [1, 2], "core": 2}}, "the class tumour is a region of several labels"),
        ({"labels": {"background": 0, "liver": 2}}, r"label values \[0, 2\] are not 0, 1, 2"),
        ({"labels": {"0": "background", "1": "liver"}}, "the label '0' has the value 'background'"),
        ({"labels": {"background": 0}}, "2 to 255 classes"),
        ({"labels": ["background"]}, "not as nnU-Net v2 writes it"),
        ({"channel_names": {"1": "CT"}}, "channels 1 are not numbered from 0"),
        ({"channel_names": {"x": "CT"}}, "not as nnU-Net v2 writes it"),
        ({"channel_names": {}}, "are not numbered from 0"),
    ],
)
def test_data_that_have_no_equal_are_refused(fields: Table, message: str, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=message) as caught:
        read(tmp_path, dataset=make_dataset(**fields))
    assert str(caught.value).startswith(str(tmp_path / "dataset.json"))


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "7", "\x00", "[" * 100_000])
def test_files_that_are_no_table_are_refused(name: str, content: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(MedmomError, match=f"{name}: (not a readable JSON file|holds no table)"):
        read_plan(tmp_path, "3d_fullres")


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    (write(tmp_path) / name).unlink()
    with pytest.raises(MedmomError, match=f"{name}: there is no such file"):
        read_plan(tmp_path, "3d_fullres")
