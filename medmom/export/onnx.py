from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medmom.data.atomic import write_json
from medmom.errors import MedmomError
from medmom.export.steps import processing_steps
from medmom.labels import Labels
from medmom.models import SliceClassifier, to_dense
from medmom.package import Package, load_package, software_versions

OPSET = 17
"""Version of ONNX's operators."""

SCHEMA = 1
"""Number of the layout of the JSON file; raise it when a field changes its meaning."""

TOLERANCE = 1e-4
"""How far logits of the file may be from the network's, as a share of the largest logit where that is above 1."""

LARGEST = 2**31 - 2**24
"""Bytes of weights that one ONNX file can hold."""


def export_onnx(model: str | Path, out: str | Path) -> Path:
    """Writes a model's network as an ONNX file, and beside it a JSON file with all that comes before and after it.

    The input ``image`` is float32 (batch, channels, *window), prepared as the JSON file says; the output ``logits``
    is float32 (batch, classes, *window), of a classifier (batch, classes). Batch, and slices of a classifier that
    sees slices, may have any number; the window is that of the model. Weights of low rank are multiplied
    out. ``model.onnx.json`` has the rules and numbers of ``processing_steps``, the checksums and the difference found.

    Before the files get their names the ONNX file is run by onnxruntime on random input, and its logits are compared
    with the network's.

    Args:
        model: A run folder or model package.
        out: The file, ending in ``.onnx``, or a folder, in which it is called ``model.onnx``. Nothing is replaced.

    Returns:
        The ONNX file.

    Raises:
        MedmomError: There is no sound model, onnx or onnxruntime is not installed, the output exists or cannot be
            written, or the logits differ.
    """
    _check_installed()
    package = load_package(model)
    # A copy: what is written is compared with the network as it was.
    dense = replace(package, network=to_dense(copy.deepcopy(package.network)))
    path = Path(out) if Path(out).suffix.lower() == ".onnx" else Path(out) / "model.onnx"
    sidecar = path.with_name(f"{path.name}.json")
    for place in (path, sidecar):
        if place.exists():
            raise MedmomError(f"{place}: exists. Remove it, or name another output.")
    size = sum(value.numel() * value.element_size() for value in dense.network.state_dict().values())
    if size > LARGEST:
        raise MedmomError(
            f"{model}: {size / 2**30:.1f} GiB of weights, one ONNX file holds less than 2. Export a bundle."
        )
    part = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(dense, part)
        found = _compared(package, part)
        content = part.read_bytes()
        write_json(sidecar, _about(package, path.name, content, found))
        try:
            part.replace(path)
        except OSError:
            sidecar.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise MedmomError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise MedmomError(
            f"{' and '.join(missing)}: not installed, and the export to ONNX needs it. pip install 'medmom[export]'"
        )


def _example(package: Package, batch: int) -> Tensor:
    """Random input; other numbers of slices for other batches."""
    slices = () if package.slices is None else (package.slices + batch - 1,)
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, len(package.channels), *package.patch, *slices, generator=generator)


class _MeanOfSlices(nn.Module):
    """A classifier that counts all slices of a volume the same, for any number of them.

    Traced as it is, it would divide by the number of slices that the exporter saw.
    """

    def __init__(self, network: SliceClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.slice_logits(image).mean(dim=1)


def _write(package: Package, path: Path) -> None:
    network: Any = package.network
    if hasattr(network, "memory"):
        # What is kept for the backward pass changes no logit, and nothing of it belongs into the file.
        network.memory = "plain"
    if isinstance(network, SliceClassifier) and network.attention is None:
        network = _MeanOfSlices(network).eval()
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    if package.slices is not None:
        axes["image"][2 + len(package.patch)] = "slices"
    with warnings.catch_warnings(), torch.no_grad(), _attention_step_by_step():
        # Remarks of the exporter on itself and on what it traces inside torch; the logits are compared afterwards.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (_example(package, 1),),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes=axes,
        )


@contextmanager
def _attention_step_by_step() -> Iterator[None]:
    """Without torch's fused layers of transformers, which ONNX has no name for."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _compared(package: Package, path: Path) -> dict[str, Any]:
    """Runs file and network on random input; refuses a file whose logits differ."""
    import onnx  # noqa: PLC0415
    import onnxruntime  # noqa: PLC0415

    onnx.checker.check_model(path, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # Another batch than the one it was traced with.
    image = _example(package, 2)
    with torch.inference_mode():
        wanted = package.network(image)
    (answer,) = session.run(None, {"image": image.numpy()})
    found = torch.from_numpy(answer)
    largest = float(wanted.abs().max())
    difference = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    allowed = TOLERANCE * max(1.0, largest)
    if not difference <= allowed:
        raise MedmomError(
            f"{package.folder}: logits of the ONNX file differ by {difference:.2g} from the network's, {allowed:.2g} "
            "is allowed. Nothing was written; export a monai-bundle instead."
        )
    return {
        "rule": "Standard normal input, onnxruntime on the CPU against the network.",
        "input_shape": list(image.shape),
        "largest_difference": difference,
        "largest_logit": largest,
        "allowed_difference": allowed,
    }


def _about(package: Package, name: str, content: bytes, found: dict[str, Any]) -> dict[str, Any]:
    is_of_voxels = isinstance(package.table, Labels)
    spatial = [*package.patch, *([] if package.slices is None else ["slices"])]
    versions = {key: importlib.metadata.version(key) for key in ("onnx", "onnxruntime")}
    return {
        "schema": SCHEMA,
        "task": "segmentation" if is_of_voxels else "classification",
        "intended_use": "Research only; not a medical device.",
        "network": type(package.network).__name__,
        "package_sha256": package.checksum,
        "onnx": {
            "file": name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "opset": OPSET,
            "input": {
                "name": "image",
                "dtype": "float32",
                "shape": ["batch", len(package.channels), *spatial],
            },
            "output": {
                "name": "logits",
                "dtype": "float32",
                "shape": ["batch", package.table.num_channels, *(package.patch if is_of_voxels else [])],
            },
        },
        "check": found,
        "steps": processing_steps(package),
        "versions": {**software_versions(), **versions},
        "trained_with": package.versions,
    }
