"""Folders as nnU-Net v2 leaves them after training, with small networks, for the tests of taking them over."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from test_checkpoint import save
from torch import Tensor, nn

from medmom.models import MomentumUNet, PlainUNet
from medmom.models.convert import _all_names, _plain_host_names, to_host

CT = {"mean": 90.0, "std": 40.0, "percentile_00_5": -150.0, "percentile_99_5": 250.0, "max": 900.0, "median": 80.0}
# Axes are (z, y, x) here, as nnU-Net has them.
KERNELS = {2: [[3, 3], [5, 3], [3, 3]], 3: [[1, 3, 3], [3, 3, 3], [3, 5, 3]]}
STRIDES = {2: [[1, 1], [2, 2], [1, 2]], 3: [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}
PATCHES = {2: [16, 24], 3: [8, 16, 24]}
CHANNELS, CONVOLUTIONS, DECODER = [4, 6, 8], [2, 1, 2], [1, 2]
BLOCKS = [1, 3, 2]


def architecture(kind: str, axes: int) -> dict[str, Any]:
    """Arguments of a network as plans have them."""
    counts = (
        {"n_conv_per_stage": CONVOLUTIONS, "n_conv_per_stage_decoder": DECODER}
        if kind == "PlainConvUNet"
        else {"n_blocks_per_stage": BLOCKS, "n_conv_per_stage_decoder": [1, 1]}
    )
    return {
        "n_stages": 3,
        "features_per_stage": CHANNELS,
        "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
        "kernel_sizes": KERNELS[axes],
        "strides": STRIDES[axes],
        **counts,
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def make_plans(kind: str = "PlainConvUNet", axes: int = 3, *, num_channels: int = 1, **options: Any) -> dict[str, Any]:
    """What plans.json holds; options change the configuration, which is ``2d`` or ``3d_fullres``."""
    resampling = {"order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCHES[axes],
        "median_image_size_in_voxels": [30.0] * axes,
        "spacing": [2.5, 1.25, 1.5][-axes:],
        "normalization_schemes": ["CTNormalization"] * num_channels,
        "use_mask_for_norm": [False] * num_channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resampling},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **resampling},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **resampling},
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
            "arch_kwargs": architecture(kind, axes),
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": True,
        **options,
    }
    return copy.deepcopy(
        {
            "dataset_name": "Dataset007_Organs",
            "plans_name": "nnUNetPlans",
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {"2d" if axes == 2 else "3d_fullres": configuration},
            "experiment_planner_used": "ExperimentPlanner",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {str(number): dict(CT) for number in range(num_channels)},
        }
    )


def make_dataset(num_channels: int = 1, **fields: Any) -> dict[str, Any]:
    """What dataset.json holds."""
    return {
        "channel_names": {str(number): f"CT {number}" for number in range(num_channels)},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 20,
        "file_ending": ".nii.gz",
        **fields,
    }


def host_state(
    kind: str = "PlainConvUNet", axes: int = 3, *, num_channels: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """Weights under nnU-Net's names, of a network whose axes are (z, y, x)."""
    shape: dict[str, Any] = {"channels": CHANNELS, "kernels": KERNELS[axes], "strides": STRIDES[axes]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: PlainUNet | MomentumUNet
        if kind == "PlainConvUNet":
            network = PlainUNet(num_channels, 3, convolutions=CONVOLUTIONS, decoder_convolutions=DECODER[::-1], **shape)
        else:
            network = MomentumUNet(num_channels, 3, blocks=BLOCKS, gate=0.0, **shape)
        stir(network)
    if isinstance(network, MomentumUNet):
        return to_host(network)
    names = _plain_host_names(network)
    return {name: value for key, value in network.state_dict().items() for name in _all_names(names[key])}


def stir(network: nn.Module) -> None:
    """Leaves no weight at 0 or 1."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def save_folder(
    root: Path,
    states: Sequence[Mapping[str, Tensor]],
    plans: dict[str, Any],
    dataset: dict[str, Any] | None = None,
    *,
    name: str = "checkpoint_final.pth",
    **checkpoint: Any,
) -> Path:
    """Writes a trained folder, one fold a state, and gives its path."""
    configuration = next(iter(plans["configurations"]))
    folder = root / "Dataset007_Organs" / f"nnUNetTrainer__nnUNetPlans__{configuration}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset or make_dataset()), encoding="utf-8")
    for fold, state in enumerate(states):
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        told = {"plans": plans, "configuration": configuration, "fold": fold, "device": torch.device("cpu")}
        save(folder / f"fold_{fold}" / name, dict(state), **{"init_args": told, **checkpoint})
    return folder
