"""What is exported for evaluation computes the network's logits, whatever memory it was trained with."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from tiny import save_tiny
from torch import Tensor
from unets import AXES, MEMORIES, PAIRS, VARIANTS, loss_of, make_image, make_unet

from medmom.export.monai_bundle import export_monai_bundle
from medmom.models import MomentumUNet, to_low_rank
from medmom.package import load_package

OPSET = 17


@cache
def trained(variant: str, axes: str = "2-D") -> MomentumUNet:
    """A network after a few steps, in evaluation."""
    network = make_unet(axes, **VARIANTS[variant])
    # A bias before a normalisation learns nothing.
    learning = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    before = [parameter.detach().clone() for parameter in learning]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(network(make_image(network, cells=2, seed=step))))
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(learning, before, strict=True))
    return network.eval()


def logits(network: MomentumUNet, image: Tensor) -> Tensor:
    with torch.no_grad():
        return network(image)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("variant", "memory"), [("host", "plain"), *(p for p in PAIRS if p[0] in ("host", "carry"))])
def test_exported_program_gives_the_logits(variant: str, memory: str) -> None:
    network = trained(variant)
    network.memory = memory
    image = make_image(network)
    program = torch.export.export(network, (image,))
    other = make_image(network, seed=2)
    torch.testing.assert_close(program.module()(other), logits(network, other), rtol=0, atol=1e-6)


def to_onnx(network: MomentumUNet, image: Tensor, path: Path) -> onnx.ModelProto:
    """The network as TorchScript's exporter writes it, for any batch and any size."""
    axes = {index: f"axis {index}" for index in range(image.ndim) if index != 1}
    with warnings.catch_warnings():
        # Remarks of the exporter on itself, and of what it traces on instance normalisation inside torch.
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean", module=r"torch\.nn")
        warnings.filterwarnings("ignore", "ONNX export mode is set to TrainingMode.EVAL, but operator 'instance_norm'")
        torch.onnx.export(
            network, (image,), path, dynamo=False, opset_version=OPSET, input_names=["image"],
            output_names=["logits"], dynamic_axes={"image": axes, "logits": axes},
        )  # fmt: skip
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model


def run_onnx(model: onnx.ModelProto, image: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"image": image.numpy()})
    return torch.from_numpy(result)


CASES = [
    *((variant, "2-D", "plain") for variant in VARIANTS),
    *(("host", "2-D", memory) for memory in MEMORIES[1:]),
    *(("host", axes, "reversible") for axes in AXES if axes != "2-D"),
    ("all at once", "flat", "hybrid"),
]


@pytest.mark.parametrize(("variant", "axes", "memory"), CASES)
def test_onnx_gives_the_logits(variant: str, axes: str, memory: str, tmp_path: Path) -> None:
    network = trained(variant, axes)
    network.memory = memory
    image = make_image(network, cells=2)
    model = to_onnx(network, image, tmp_path / "network.onnx")
    torch.testing.assert_close(run_onnx(model, image), logits(network, image), rtol=0, atol=1e-4)
    # Another batch of another size, of which the exporter saw nothing.
    image = make_image(network, batch=1, cells=4, seed=2)
    torch.testing.assert_close(run_onnx(model, image), logits(network, image), rtol=0, atol=1e-4)


def test_onnx_holds_nothing_but_common_operators(tmp_path: Path) -> None:
    network = trained("host")
    model = to_onnx(network, make_image(network), tmp_path / "network.onnx")
    layers = {"Conv", "ConvTranspose", "InstanceNormalization", "LeakyRelu", "AveragePool"}
    assert {node.op_type for node in model.graph.node} <= layers | {"Add", "Sub", "Mul", "Concat", "Constant"}
    assert {opset.domain for opset in model.opset_import} == {""}


def test_bundle_of_a_low_rank_model_holds_a_dense_network_of_the_same_logits(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"channels": (8, 16), "blocks": (1, 2), "kernels": [[3, 3, 3]] * 2}
    network = MomentumUNet(1, 3, **plan, strides=[[1, 1, 1], [2, 2, 2]])
    to_low_rank(network, 0.3, room=2)
    model = save_tiny(tmp_path / "model", network=network)
    bundle = export_monai_bundle(model, tmp_path / "bundle")
    config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))["network_def"]
    assert config.pop("_target_") == "medmom.models.MomentumUNet"
    dense = MomentumUNet(**config).eval()
    dense.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    image = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(dense, image), load_package(model).network(image), rtol=0, atol=1e-5)
