from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_net_in_out
from monai.data import MetaTensor, decollate_batch
from PIL import Image
from tiny import LABELS, save_image, save_tiny

from medmom.classes import Classes
from medmom.cleanup import Cleanup, apply
from medmom.data.files import read_image
from medmom.data.preparation import Preparation, restore, working_geometry
from medmom.errors import MedmomError
from medmom.export import monai_bundle
from medmom.export.monai_bundle import export_monai_bundle
from medmom.export.transforms import Prepared, Restored, find_images
from medmom.inference.predict import predict
from medmom.labels import Labels
from medmom.models import MomentumResNet, MomentumUNet
from medmom.package import load_package, save_package
from medmom.package_files import read_description, write_files

PICTURES = Preparation(None, "unit", size=(24, 20), colour="grey")
CT = Preparation((1.5, 1.0, 2.0), "ct", (-2.0, 2.5), 0.1, 1.3)
SLICES = Preparation((1.0, 1.0, 2.0), "zscore", plane="coronal")


def flat_network(in_channels: int = 1) -> MomentumUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plan: dict[str, Any] = {"channels": (4, 6), "blocks": (1, 2)}
        return MomentumUNet(in_channels, 3, **plan, kernels=[[3, 3]] * 2, strides=[[1, 1], [2, 2]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_monai_bundle(model, tmp_path_factory.mktemp("bundles") / "tiny")


def read_config(bundle: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def run_in_process(bundle: Path, images: Path, out: Path) -> None:
    """What the bundle's evaluator does, without the package that MONAI's evaluator needs."""
    changes = {"bundle_root": str(bundle), "dataset_dir": str(images), "output_dir": str(out), "device": "cpu"}
    config = str(bundle / "configs" / "inference.json")
    workflow = ConfigWorkflow(config, workflow_type="infer", logging_file=False, **changes)
    workflow.initialize()
    part: Callable[[str], Any] = workflow.parser.get_parsed_content
    network = part("network").eval()
    network.load_state_dict(torch.load(part("checkpoint"), weights_only=True))
    for batch in part("dataloader"):
        with torch.no_grad():
            batch["pred"] = part("inferer")(batch["image"], network)
        for item in decollate_batch(batch):
            part("postprocessing")(item)


def assert_same_labels(found: Path, wanted: Path) -> None:
    """What predict writes besides label maps is not looked at."""
    names = sorted(path.name for path in wanted.iterdir() if path.suffix in (".gz", ".png"))
    assert names and sorted(path.name for path in found.iterdir()) == names
    for name in names:
        if name.endswith(".png"):
            ours, theirs = (np.asarray(Image.open(folder / name)) for folder in (found, wanted))
        else:
            one, other = nib.load(found / name), nib.load(wanted / name)
            np.testing.assert_array_equal(one.affine, other.affine)
            assert one.header == other.header
            ours, theirs = np.asarray(one.dataobj), np.asarray(other.dataobj)
        np.testing.assert_array_equal(ours, theirs)
        assert len(np.unique(ours)) > 1


def turned_affine() -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * [0.9, 1.7, 1.2]
    affine[:3, 3] = [-31.5, 80.25, 7.125]
    return affine


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    for seed, size in enumerate([(31, 22), (20, 43)]):
        pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"frame {seed}.png")
    return folder


def volumes(folder: Path) -> Path:
    save_image(folder / "upright.v1.nii.gz", (20, 18, 9))
    return save_image(folder / "turned.nii.gz", (9, 21, 7), affine=turned_affine(), seed=1).parent


def two_channels(folder: Path) -> Path:
    for k in range(2):
        save_image(folder / f"case_000{k}.nii.gz", (12, 10, 18), seed=k)
    return folder


@pytest.mark.parametrize(
    ("write", "package"),
    [
        (volumes, {}),
        (volumes, {"preparation": CT}),
        (two_channels, {"channels": ("FLAIR", "T1")}),
        (volumes, {"preparation": SLICES, "patch": (16, 16), "network": flat_network()}),
        (
            write_pictures,
            {"preparation": PICTURES, "patch": (16, 12), "network": flat_network(), "channels": ("grey",)},
        ),
    ],
    ids=["volumes", "ct", "two channels", "slices", "pictures"],
)
def test_bundle_gives_the_labels_of_predict(
    write: Callable[[Path], Path], package: dict[str, Any], tmp_path: Path
) -> None:
    model, images = save_tiny(tmp_path / "model", **package), write(tmp_path / "in")
    predict(model, [images], tmp_path / "wanted", device="cpu", quiet=True)
    run_in_process(export_monai_bundle(model, tmp_path / "bundle"), images, tmp_path / "found")
    assert_same_labels(tmp_path / "found", tmp_path / "wanted")


def test_bundle_cleans_up_as_the_package_says(model: Path, tmp_path: Path) -> None:
    cleanup = Cleanup(("body",), (("head", 1.5),))
    description = read_description(model / "model.json")
    cleaned = {**description, "cleanup": cleanup.as_dict()}
    write_files(tmp_path / "model", cleaned, (model / "model.safetensors").read_bytes())
    assert load_package(tmp_path / "model").cleanup == cleanup
    images = volumes(tmp_path / "in")
    for name, package in (("wanted", tmp_path / "model"), ("plain", model)):
        predict(package, [images], tmp_path / name, device="cpu", quiet=True)
    run_in_process(export_monai_bundle(tmp_path / "model", tmp_path / "bundle"), images, tmp_path / "found")
    assert_same_labels(tmp_path / "found", tmp_path / "wanted")
    with pytest.raises(AssertionError):
        assert_same_labels(tmp_path / "found", tmp_path / "plain")


@pytest.mark.peers
def test_monai_runs_the_bundle_from_the_command_line(model: Path, bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("fire")
    pytest.importorskip("ignite")
    image = volumes(tmp_path / "in") / "turned.nii.gz"
    predict(model, [image], tmp_path / "wanted", device="cpu", quiet=True)
    words = ["--config_file", "configs/inference.json", "--bundle_root", ".", "--device", "cpu"]
    words += ["--dataset_dir", str(image), "--output_dir", str(tmp_path / "found")]
    command = [sys.executable, "-m", "monai.bundle", "run", *words]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_labels(tmp_path / "found", tmp_path / "wanted")


@pytest.mark.peers
def test_bundle_has_what_monais_tools_ask_for(bundle: Path) -> None:
    pytest.importorskip("ignite")
    changes = {"bundle_root": str(bundle), "dataset_dir": str(bundle / "image.nii.gz")}
    config = str(bundle / "configs" / "inference.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workflow = ConfigWorkflow(config, workflow_type="infer", logging_file=False, **changes)
        workflow.initialize()
        assert workflow.check_properties() == []


def test_monai_finds_the_network_as_the_metadata_tell(bundle: Path) -> None:
    metadata, config = (str(bundle / "configs" / f"{name}.json") for name in ("metadata", "inference"))
    verify_net_in_out("network_def", meta_file=metadata, config_file=config, device="cpu")


def test_weights_are_plain_tensors(model: Path, bundle: Path) -> None:
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    wanted = load_package(model).network.state_dict()
    assert state.keys() == wanted.keys()
    assert all(type(value) is torch.Tensor and torch.equal(value, wanted[key]) for key, value in state.items())


def test_bundle_has_the_files_of_the_specification(bundle: Path) -> None:
    found = sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file())
    names = ["inference.json", "metadata.json"]
    assert found == ["LICENSE", *(f"configs/{name}" for name in names), "docs/README.md", "models/model.pt"]
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name], "no draft is left"
    assert "for its owner to state" in (bundle / "LICENSE").read_text()
    assert f"# {bundle.name}" in (bundle / "docs" / "README.md").read_text()


def test_metadata_are_complete(model: Path, bundle: Path) -> None:
    metadata = read_config(bundle, "metadata")
    needed = ["version", "changelog", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"]
    needed += ["task", "description", "authors", "copyright", "data_source", "data_type", "image_classes"]
    needed += ["label_classes", "pred_classes", "eval_metrics", "intended_use", "references", "network_data_format"]
    assert set(needed) <= metadata.keys()
    assert all(metadata[key] for key in needed if key not in ("eval_metrics", "references"))
    assert {"medmom", "pytorch-ignite"} <= metadata["required_packages_version"].keys()
    assert metadata["intended_use"].startswith("Research only")
    assert metadata["medmom"]["package_sha256"] == load_package(model).checksum
    ends = metadata["network_data_format"]
    keys = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def"}
    for tensor in (ends["inputs"]["image"], ends["outputs"]["pred"]):
        assert keys <= tensor.keys() and tensor["spatial_shape"] == [16, 16, 16]
    assert ends["inputs"]["image"]["channel_def"] == {"0": "MRI"}
    assert ends["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "head", "2": "body"}
    assert "4 is body" in metadata["label_classes"]


def test_value_range_is_that_of_prepared_images(tmp_path: Path) -> None:
    bundle = export_monai_bundle(save_tiny(tmp_path / "model", preparation=CT), tmp_path / "bundle")
    image = read_config(bundle, "metadata")["network_data_format"]["inputs"]["image"]
    assert (image["modality"], image["format"]) == ("CT", "hounsfield")
    assert image["value_range"] == pytest.approx([-2.1 / 1.3, 2.4 / 1.3])


def test_configuration_evaluates_four_expressions_and_imports_nothing(bundle: Path) -> None:
    config = read_config(bundle, "inference")
    texts = [text for text in monai_bundle._texts(config) if text.startswith("$")]
    checkpoint, output = "$@bundle_root + '/models/model.pt'", "$@bundle_root + '/eval'"
    assert sorted(texts) == sorted([checkpoint, output, "$@network_def.to(@device)", "$@evaluator.run()"])
    assert "imports" not in config


@pytest.mark.parametrize("name", ["$import os", "@device", "%configs/x.json", "a @::b"])
@pytest.mark.parametrize("place", ["labels", "channels"])
def test_name_that_monai_would_run_is_refused(name: str, place: str, tmp_path: Path) -> None:
    labels = Labels(("background", name, "body"), (0, 1, 4)) if place == "labels" else LABELS
    save_package(
        tmp_path / "model",
        flat_network(),
        labels=labels,
        preparation=SLICES,
        patch=(16, 16),
        channels=(name,) if place == "channels" else ("MRI",),
        recipe={},
    )
    with pytest.raises(MedmomError, match="would be run, or followed as a reference") as caught:
        export_monai_bundle(tmp_path / "model", tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_classifier_is_refused(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"channels": (4, 6), "blocks": (1, 2), "kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}
    told: dict[str, Any] = {"classes": Classes(("a", "b")), "preparation": PICTURES, "patch": (16, 16)}
    save_package(tmp_path / "model", MomentumResNet(1, 2, **plan), channels=("grey",), recipe={}, **told)
    with pytest.raises(MedmomError, match=r"classifies whole images; .* Take --to onnx\."):
        export_monai_bundle(tmp_path / "model", tmp_path / "bundle")


def test_existing_folder_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(MedmomError, match="exists and is not an empty folder"):
            export_monai_bundle(model, out)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert (export_monai_bundle(model, tmp_path / "empty") / "models" / "model.pt").is_file()


def test_nothing_is_left_where_writing_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MedmomError, match=r"bundle: cannot be written \(No space left"):
        export_monai_bundle(model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_restored_labels_are_cleaned_up_as_the_package_says(tmp_path: Path) -> None:
    image = read_image(save_image(tmp_path / "case.nii.gz", (20, 18, 9)))
    cleanup, preparation = Cleanup(("body",), (("head", 1.0),)), Preparation((1.5, 1.5, 2.0), "zscore")
    working = working_geometry(preparation, image.geometry)
    logits = torch.randn(3, *working.shape, generator=torch.Generator().manual_seed(0))
    fields = {"spacing": [1.5, 1.5, 2.0], "intensity": "zscore"}
    items = Prepared("image", fields, ["MRI"], 3)({"image": str(image.path)})
    found = Restored("pred", fields, LABELS.as_dict(), cleanup.as_dict())({**items, "pred": logits})["pred"]
    plain = LABELS.to_values(restore(logits.numpy(), working, image.geometry))
    wanted = apply(plain.copy(), image.geometry, LABELS, cleanup)
    assert not np.array_equal(wanted, plain)
    assert isinstance(found, MetaTensor) and found.shape == (1, 20, 18, 9)
    np.testing.assert_array_equal(found[0].numpy(), wanted)
    np.testing.assert_array_equal(found.affine.numpy(), image.geometry.affine)
    logits[0, 3, 3, 3] = torch.nan
    with pytest.raises(MedmomError, match="output is not finite"):
        Restored("pred", fields, LABELS.as_dict())({**items, "pred": logits})


def test_image_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    picture = write_pictures(tmp_path / "in") / "frame 0.png"
    fields = {"spacing": [1.0, 1.0, 1.0], "intensity": "zscore"}
    with pytest.raises(MedmomError, match=r"frame 0\.png: a picture, the model was made for volumes"):
        Prepared("image", fields, ["MRI"], 3)({"image": str(picture)})
    with pytest.raises(MedmomError, match="number of image channels is 3, the model takes 1"):
        Prepared("image", fields, ["MRI"], 2)({"image": str(picture)})
    coarse = save_image(tmp_path / "coarse.nii.gz", (8, 8, 8), affine=np.diag([900.0, 900, 900, 1]))
    with pytest.raises(MedmomError, match="at the model's spacing"):
        Prepared("image", {**fields, "spacing": [0.5] * 3}, ["MRI"], 3)({"image": [str(coarse)]})


def test_images_are_found_as_by_predict(tmp_path: Path) -> None:
    folder = two_channels(tmp_path / "in")
    (item,) = find_images(str(folder), 2)
    assert item == {"image": [str(folder / f"case_000{k}.nii.gz") for k in range(2)], "name": "case"}
    assert [item["name"] for item in find_images([folder / "case_0001.nii.gz"], 1)] == ["case_0001"]
