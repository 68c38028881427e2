"""An exported file and the JSON file beside it are enough to do what predict does."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from tiny import save_image, save_tiny

from medmom import models
from medmom.classes import Classes
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.export import onnx as room
from medmom.export.onnx import export_onnx
from medmom.inference.class_inputs import find_class_inputs
from medmom.inference.class_predictor import ClassPredictor
from medmom.inference.predict import predict
from medmom.package import load_package, save_package

Floats = NDArray[np.float32]

CT = Preparation((1.5, 1.0, 2.0), "ct", (-2.0, 2.5), 0.1, 1.3)
PICTURES = Preparation(None, "unit", size=(20, 18), colour="grey")
FLAT: dict[str, Any] = {"channels": (4, 6), "blocks": (1, 2), "kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}


def save_classifier(folder: Path, kind: str = "MomentumResNet", **options: Any) -> Path:
    about = {key: options.pop(key) for key in ("slices", "temperature") if key in options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(models, kind)(1, 3, **FLAT, **options)
    save_package(
        folder,
        network,
        classes=Classes(("liver", "lung", "none")),
        preparation=PICTURES,
        patch=(16, 22),
        channels=("grey",),
        recipe={},
        **about,
    )
    return folder


def save_segmenter(folder: Path, kind: str, **options: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(models, kind)(1, 3, **options)
    return save_tiny(folder, preparation=PICTURES, patch=(16, 16), network=network, channels=("grey",))


def save_low_rank(folder: Path) -> Path:
    network = models.MomentumUNet(1, 3, **{**FLAT, "channels": (8, 16)})
    models.to_low_rank(network, 0.5)
    return save_tiny(folder, preparation=PICTURES, patch=(16, 16), network=network, channels=("grey",))


def run(path: Path, image: NDArray[Any]) -> Floats:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": np.asarray(image, np.float32)})
    return np.asarray(logits)


def told(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    return about


MADE: dict[str, Callable[[Path], Path]] = {
    "unet": save_tiny,
    "unet, learned gates": lambda folder: save_segmenter(folder, "MomentumUNet", **FLAT, gating="channel"),
    "unet, reversible": lambda folder: save_segmenter(
        folder, "MomentumUNet", **{**FLAT, "blocks": (1, 3)}, memory="reversible"
    ),
    "unet, low rank": save_low_rank,
    "resnet": save_classifier,
    "resnet, batch norm": lambda folder: save_classifier(folder, norm="batch"),
    "slices": lambda folder: save_classifier(folder, "SliceClassifier", slices=5),
    "slices, attention": lambda folder: save_classifier(folder, "SliceClassifier", slices=5, pooling="attention"),
}


@pytest.mark.parametrize("name", MADE)
def test_file_gives_the_networks_logits_for_any_batch(name: str, tmp_path: Path) -> None:
    model = MADE[name](tmp_path / "model")
    path = export_onnx(model, tmp_path / "out")
    assert path == tmp_path / "out" / "model.onnx"
    package = load_package(model)
    for batch in (1, 3):
        slices = () if package.slices is None else (2 * batch,)
        image = torch.randn(batch, 1, *package.patch, *slices, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            wanted = package.network(image).numpy()
        np.testing.assert_allclose(run(path, image.numpy()), wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TransNetR", "Paper2D"])
def test_networks_of_the_paper_are_exported_too(kind: str, tmp_path: Path) -> None:
    network = getattr(models, kind)(3, 3)
    preparation, channels = Preparation(None, "unit", size=(256, 256), colour="rgb"), ("red", "green", "blue")
    package = {"preparation": preparation, "patch": network.divisor, "channels": channels, "network": network}
    model = save_tiny(tmp_path / "model", **package)
    path = export_onnx(model, tmp_path / "out")
    assert told(path)["check"]["largest_difference"] <= told(path)["check"]["allowed_difference"]


def test_json_file_says_what_the_file_is(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    path = export_onnx(model, tmp_path / "liver.onnx")
    about = told(path)
    assert about["schema"] == 1 and about["task"] == "segmentation"
    assert about["package_sha256"] == load_package(model).checksum
    assert about["onnx"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert about["onnx"]["input"] == {"name": "image", "dtype": "float32", "shape": ["batch", 1, 16, 16, 16]}
    assert about["onnx"]["output"] == {"name": "logits", "dtype": "float32", "shape": ["batch", 3, 16, 16, 16]}
    assert 0 <= about["check"]["largest_difference"] <= 1e-4 < about["check"]["largest_logit"]
    assert {"medmom", "torch", "onnx", "onnxruntime"} <= about["versions"].keys()
    written = onnx.load(path)
    assert [opset.version for opset in written.opset_import] == [about["onnx"]["opset"]]
    shape = [axis.dim_param or axis.dim_value for axis in written.graph.input[0].type.tensor_type.shape.dim]
    assert shape == about["onnx"]["input"]["shape"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["liver.onnx", "liver.onnx.json", "model"]


def test_shape_names_the_slices_of_a_classifier(tmp_path: Path) -> None:
    path = export_onnx(save_classifier(tmp_path / "model", "SliceClassifier", slices=5), tmp_path)
    about = told(path)
    assert about["onnx"]["input"]["shape"] == ["batch", 1, 16, 22, "slices"]
    assert about["onnx"]["output"]["shape"] == ["batch", 3]
    assert about["steps"]["whole_image"]["slices"] == 5


# What is told is enough: a twin that knows the JSON file and nothing of this project.


def upright(path: Path) -> tuple[Floats, NDArray[Any], nib.Nifti1Image]:
    """Voxels with axes turned to RAS, their edges, and the file."""
    file = nib.load(path)
    turned = nib.as_closest_canonical(file)
    return turned.get_fdata(dtype=np.float32), np.linalg.norm(turned.affine[:3, :3], axis=0), file


def sampled(image: NDArray[Any], shape: Any, scale: Any, *, order: int) -> Floats:
    """Values on a grid about the same centre whose voxels are ``scale`` times as large, the border's outside."""
    axes = [
        (n - 1) / 2 + factor * (np.arange(count) - (count - 1) / 2)
        for n, count, factor in zip(image.shape, shape, scale, strict=True)
    ]
    places = np.meshgrid(*axes, indexing="ij")
    return np.asarray(ndimage.map_coordinates(image.astype(float), places, order=order, mode="nearest"), np.float32)


def starts(size: int, edge: int, step: int) -> Iterator[int]:
    yield from range(0, size - edge, step)
    yield size - edge


def blended(path: Path, image: Floats, windows: dict[str, Any]) -> Floats:
    edges, steps = windows["size_voxels"], windows["step_voxels"]
    missing = [max(0, edge - n) for edge, n in zip(edges, image.shape, strict=True)]
    padded = np.pad(image, [(m // 2, m - m // 2) for m in missing])
    weight = np.ones(edges)
    for axis, edge in enumerate(edges):
        distance = np.arange(edge) - (edge - 1) / 2
        bell = np.exp(-(distance**2) / (2 * (windows["sigma_of_edge"] * edge) ** 2))
        weight = weight * bell.reshape([-1 if k == axis else 1 for k in range(len(edges))])
    weight = np.maximum(weight, windows["smallest_weight"])
    total, parts = np.zeros(padded.shape), []
    all_starts = [starts(n, edge, step) for n, edge, step in zip(padded.shape, edges, steps, strict=True)]
    for place in itertools.product(*all_starts):
        window = tuple(slice(start, start + edge) for start, edge in zip(place, edges, strict=True))
        parts.append((window, weight * run(path, padded[window][None, None])[0]))
        total[window] += weight
    sums = np.zeros((len(parts[0][1]), *padded.shape))
    for window, logits in parts:
        sums[(slice(None), *window)] += logits
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, image.shape, strict=True))
    return np.asarray((sums / total)[(slice(None), *inside)], np.float32)


def test_segmentation_can_be_done_from_the_two_files_alone(tmp_path: Path) -> None:
    affine = np.array([[0, -0.9, 0, 4], [0, 0, 1.7, -7], [-1.2, 0, 0, 11], [0, 0, 0, 1.0]])
    image = save_image(tmp_path / "case.nii.gz", (21, 30, 11), affine=affine)
    model = save_tiny(tmp_path / "model", preparation=CT)
    predict(model, [image], tmp_path / "wanted.nii.gz", device="cpu", quiet=True)
    path = export_onnx(model, tmp_path / "out")
    steps = told(path)["steps"]

    own, edges, file = upright(image)
    numbers, spacing = steps["intensity"], steps["working_grid"]["spacing_mm"]
    scaled = (np.clip(own, *numbers["clip"]) - numbers["mean"]) / numbers["std"]
    shape = np.maximum(1, np.round(np.array(own.shape) * edges / spacing)).astype(int)
    prepared = np.clip(sampled(scaled, shape, spacing / edges, order=3), scaled.min(), scaled.max())
    logits = blended(path, prepared, steps["windows"])
    back = np.stack([sampled(each, own.shape, edges / spacing, order=1) for each in logits])
    values = np.array([each["value"] for each in steps["labels"]["classes"]])
    label = nib.Nifti1Image(values[back.argmax(axis=0)].astype(np.uint8), nib.as_closest_canonical(file).affine)
    turned = label.as_reoriented(
        nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.io_orientation(file.affine)
        )
    )
    wanted = nib.load(tmp_path / "wanted.nii.gz")
    np.testing.assert_allclose(turned.affine, wanted.affine, atol=1e-5)
    found, predicted = np.asarray(turned.dataobj), np.asarray(wanted.dataobj)
    assert len(np.unique(predicted)) > 1
    assert (found == predicted).mean() >= 0.999


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_classification_can_be_done_from_the_two_files_alone(temperature: float, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (26, 33, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    model = save_classifier(tmp_path / "model", temperature=temperature)
    predictor = ClassPredictor(model, device="cpu")
    (case,) = find_class_inputs([tmp_path / "frame.png"], 1)
    (outcome,) = predictor.classify([predictor.read(case)])
    path = export_onnx(model, tmp_path / "out")
    steps = told(path)["steps"]

    grey = np.tensordot(pixels, [0.299, 0.587, 0.114], axes=1).T.astype(np.float32) / 255
    size, patch = steps["working_grid"]["size_voxels"], steps["whole_image"]["size_voxels"]
    scale = np.array(grey.shape) / size
    seen = np.clip(sampled(grey, size, scale, order=3), grey.min(), grey.max())
    cut = (seen.shape[0] - patch[0]) // 2
    inside = seen[cut : cut + patch[0]]
    missing = patch[1] - inside.shape[1]
    filled = np.pad(inside, [(0, 0), (missing // 2, missing - missing // 2)], constant_values=inside.min())
    logits = run(path, filled[None, None])[0] / steps["probabilities"]["temperature"]
    found = np.exp(logits) / np.exp(logits).sum()
    assert outcome.probabilities == pytest.approx(found.tolist(), abs=1e-4)
    assert [each["name"] for each in steps["classes"]] == ["liver", "lung", "none"]


# Nothing but whole files that are right


def test_file_with_other_logits_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, write = save_tiny(tmp_path / "model"), room._write

    def spoilt(package: Any, path: Path) -> None:
        kept = {key: value.clone() for key, value in package.network.state_dict().items()}
        with torch.no_grad():
            package.network.heads[0].weight[0] += 0.01
        write(package, path)
        package.network.load_state_dict(kept)

    monkeypatch.setattr(room, "_write", spoilt)
    with pytest.raises(MedmomError, match=r"logits of the ONNX file differ by .* Nothing was written"):
        export_onnx(model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    model = save_tiny(tmp_path / "model")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MedmomError, match=r"cannot be written \(No space left"):
        export_onnx(model, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(MedmomError, match="cannot be written"):
        export_onnx(model, tmp_path / "file" / "below")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.json"])
def test_existing_file_is_left_alone(name: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "run" / "model")
    (tmp_path / name).write_text("mine")
    with pytest.raises(MedmomError, match=rf"{name}: exists\. Remove it"):
        export_onnx(model, tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "run"]


@pytest.mark.parametrize("missing", [["onnx"], ["onnxruntime"], ["onnx", "onnxruntime"]])
def test_missing_package_is_named_with_its_extra(
    missing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(MedmomError, match=rf"^{' and '.join(missing)}: not installed.* pip install 'medmom\[export\]'"):
        export_onnx(save_tiny(tmp_path / "model"), tmp_path / "out")


def test_damaged_package_is_not_exported(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(MedmomError, match="checksum"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
