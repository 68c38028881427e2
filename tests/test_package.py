from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import LABELS, MRI, save_tiny, tiny_network

from medmom import models, package_files
from medmom.classes import Classes
from medmom.cleanup import Cleanup
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.inference.novelty import Novelty
from medmom.package import is_classifier, load_package, save_package


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes the description and makes its checksum right again, as somebody with ill will could."""
    path = folder / "model.json"
    description = {**json.loads(path.read_text()), **changes}
    del description["sha256"]
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    description["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def test_package_gives_back_what_was_saved(tmp_path: Path) -> None:
    network = tiny_network(2).eval()
    preparation = Preparation((0.5, 0.75, 3.0), "ct", (-160.5, 240.25), 1 / 3, np.pi)
    recipe = {"data": {"folder": Path("a/ü"), "lr": np.float32(0.5), 10: "ten", 9: "nine"}}
    save_package(
        tmp_path / "model",
        network,
        labels=LABELS,
        preparation=preparation,
        patch=(8, 16, 8),
        channels=("FLAIR", "T1"),
        recipe=recipe,
    )
    loaded = load_package(tmp_path / "model")
    image = torch.randn(1, 2, 8, 16, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.network(image), network(image), rtol=0, atol=0)
    assert not loaded.network.training
    assert loaded.labels == LABELS
    assert loaded.preparation == preparation
    assert (loaded.patch, loaded.channels) == ((8, 16, 8), ("FLAIR", "T1"))
    assert loaded.recipe == {"data": {"folder": "a/ü", "lr": 0.5, "10": "ten", "9": "nine"}}
    assert {"medmom", "torch", "monai", "numpy", "python"} <= loaded.versions.keys()
    assert loaded.versions["torch"] == torch.__version__


CLASSES = Classes(("liver", "lung, left", "ä"))
UNIT = Preparation(None, "unit", size=(16, 16), plane="coronal", colour="grey")


def tiny_classifier(out_channels: int = 3, kind: str = "MomentumResNet", **options: Any) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plan = {"channels": (4, 6), "blocks": (1, 2), "kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}
        network: torch.nn.Module = getattr(models, kind)(1, out_channels, **plan, **options)
        return network.eval()


def tiny_novelty() -> Novelty:
    rng = np.random.default_rng(0)
    means, whitening = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 6), (3, 6, 6)))
    thresholds = np.array([1 / 3, 0.5, 2], np.float32)
    return Novelty(means, whitening, thresholds, (0.0, 1.0), tuple((k - 0.1, k + np.pi) for k in range(6)), 0.7)


def save_classifier(folder: Path, network: torch.nn.Module | None = None, **changes: Any) -> Path:
    told = {"classes": CLASSES, "temperature": 1.7, "novelty": tiny_novelty(), "slices": None, **changes}
    network = network or tiny_classifier()
    save_package(folder, network, preparation=UNIT, patch=(16, 16), channels=("grey",), recipe={}, **told)
    return folder


@pytest.mark.parametrize(("kind", "slices"), [("MomentumResNet", None), ("SliceClassifier", 9)])
@pytest.mark.parametrize("has_novelty", [True, False])
def test_classifier_survives_the_package(kind: str, slices: int | None, has_novelty: bool, tmp_path: Path) -> None:
    network = tiny_classifier(kind=kind, **({"pooling": "attention"} if slices else {}))
    novelty = tiny_novelty() if has_novelty else None
    folder = save_classifier(tmp_path / "model", network, novelty=novelty, slices=slices)
    loaded = load_package(folder)
    image = torch.randn(1, 1, 16, 16, *([5] if slices else []), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.network(image), network(image), rtol=0, atol=0)
    assert (loaded.classes, loaded.temperature, loaded.slices) == (CLASSES, 1.7, slices)
    assert (loaded.preparation, loaded.patch, loaded.folder) == (UNIT, (16, 16), folder)
    assert loaded.network.state_dict().keys() == network.state_dict().keys()
    assert (loaded.novelty is not None) == has_novelty
    if loaded.novelty is not None and novelty is not None:
        assert loaded.novelty.as_dict() == novelty.as_dict()
        np.testing.assert_array_equal(loaded.novelty.means, novelty.means)
        np.testing.assert_array_equal(loaded.novelty.whitening, novelty.whitening)


def test_classes_of_several_at_once_stay_so(tmp_path: Path) -> None:
    classes = Classes(("one",), is_multilabel=True)
    folder = save_classifier(tmp_path / "model", tiny_classifier(1), classes=classes)
    assert load_package(folder).classes == classes


def test_every_changed_byte_of_a_classifier_is_refused(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model")
    for name, step in (("model.json", 7), ("model.safetensors", 997)):
        content = (folder / name).read_bytes()
        for position in range(0, len(content), step):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            (folder / name).write_bytes(changed)
            with pytest.raises(MedmomError, match="checksum"):
                load_package(folder)
        (folder / name).write_bytes(content)


def test_each_kind_of_package_names_the_command_of_the_other(sound: Path, tmp_path: Path) -> None:
    classifier = save_classifier(tmp_path / "model")
    assert (is_classifier(sound.parent), is_classifier(classifier)) == (False, True)
    with pytest.raises(MedmomError, match=r"model: the model classifies whole images \(liver, .*--out classes\.csv"):
        _ = load_package(classifier).labels
    with pytest.raises(MedmomError, match=r"model: the model draws label maps \(head, body\).*--out FOLDER"):
        _ = load_package(sound).classes


def test_network_must_do_what_the_table_says(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(ValueError, match="a MomentumUNet for classes of images"):
        save_classifier(tmp_path / "other", models.mom2d_xs(1, 3), novelty=None)
    with pytest.raises(ValueError, match="a MomentumResNet for labels of voxels"):
        save_tiny(tmp_path / "other", network=tiny_classifier())  # type: ignore[arg-type]
    for tables in ({}, {"labels": LABELS}):
        with pytest.raises(ValueError, match="either labels or classes"):
            save_classifier(tmp_path / "other", **{"classes": CLASSES if tables else None, **tables})
    rewrite(copy, classes=CLASSES.as_dict(), temperature=1.0)
    with pytest.raises(MedmomError, match=r"does not fit together .*a MomentumUNet for classes of images"):
        load_package(copy)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"temperature": 0.0}, "a temperature of 0.0"),
        ({"temperature": float("nan")}, "a temperature of nan"),
        ({"temperature": float("inf")}, "a temperature of inf"),
        ({"classes": Classes(("a", "b"))}, "for 1 image channels and 2 classes"),
    ],
)
def test_classifier_that_does_not_fit_is_not_written(change: dict[str, Any], fact: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=fact):
        save_classifier(tmp_path / "model", **change)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "change",
    [{"temperature": -1}, {"temperature": None}, {"novelty": {}}, {"novelty": 3}, {"slices": "all"}, {"classes": None}],
)
def test_malformed_classifier_is_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model")
    rewrite(folder, **change)
    with pytest.raises(MedmomError, match=r"does not fit together|is missing") as caught:
        load_package(folder)
    assert "\n" not in str(caught.value)


def test_package_for_label_maps_has_the_fields_it_always_had(sound: Path, copy: Path) -> None:
    description = json.loads((sound / "model.json").read_text())
    written = {"channels", "labels", "network", "patch", "preparation", "recipe", "schema", "sha256"}
    assert description.keys() == written | {"spatial_dims", "versions", "weights_sha256"}
    # Before pictures there was no size, plane or colour.
    old = {key: description["preparation"][key] for key in ("spacing", "intensity", "clip", "mean", "std")}
    rewrite(copy, preparation=old)
    assert load_package(copy).preparation == MRI


@pytest.mark.parametrize("preset", ["mom2d_xs", "mom3d_xs"])
def test_presets_survive_the_package(preset: str, tmp_path: Path) -> None:
    network = getattr(models, preset)(1, 3)
    save_package(
        tmp_path / "model",
        network,
        labels=LABELS,
        preparation=MRI,
        patch=[32] * len(network.divisor),
        channels=("MRI",),
        recipe={},
    )
    loaded = load_package(tmp_path / "model").network
    assert loaded.arguments == network.arguments
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    assert json.loads((tmp_path / "model" / "model.json").read_text())["spatial_dims"] == len(network.divisor)


def test_package_is_found_from_run_folder_package_and_file(sound: Path) -> None:
    checksums = {load_package(path).checksum for path in (sound.parent, sound, sound / "model.json", str(sound))}
    assert len(checksums) == 1


def test_package_holds_plain_tensors_and_json_alone(sound: Path) -> None:
    assert sorted(path.name for path in sound.iterdir()) == ["model.json", "model.safetensors"]
    assert safetensors.torch.load_file(sound / "model.safetensors").keys() == tiny_network().state_dict().keys()


def test_every_changed_byte_of_the_description_is_refused(copy: Path) -> None:
    path = copy / "model.json"
    content = path.read_bytes()
    for position in range(0, len(content), 3):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(MedmomError, match=r"model\.json: the content does not match its own checksum"):
            load_package(copy)


def test_every_changed_byte_of_the_weights_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    content = path.read_bytes()
    for position in [*range(16), *np.linspace(16, len(content) - 1, 50, dtype=int)]:
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(MedmomError, match=r"model\.safetensors: the weights do not match their checksum"):
            load_package(copy)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_package_is_refused(name: str, keep: int, copy: Path) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:keep])
    with pytest.raises(MedmomError, match=rf"{name}: .*checksum"):
        load_package(copy)


@pytest.mark.parametrize("addition", [b" ", b"\n", b"\0"])
@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_appended_byte_is_refused(name: str, addition: bytes, copy: Path) -> None:
    (copy / name).write_bytes((copy / name).read_bytes() + addition)
    with pytest.raises(MedmomError, match="checksum"):
        load_package(copy)


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(MedmomError, match=r"model\.safetensors: cannot be read"):
        load_package(copy)


def test_folder_without_package_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"neither model\.json nor model/model\.json"):
        load_package(tmp_path)
    with pytest.raises(MedmomError, match="there is no such folder"):
        load_package(tmp_path / "absent")
    with pytest.raises(MedmomError, match="cannot be read"):
        load_package(tmp_path / ("a" * 300))
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(MedmomError, match="has not ended"):
        load_package(tmp_path)


@pytest.mark.parametrize("name", ["os.system", "system", "nn", "MomentumUNet2", "plan_kernels_and_strides", "mom3d_m"])
def test_network_is_built_from_a_known_class_alone(name: str, copy: Path) -> None:
    arguments = tiny_network().arguments
    rewrite(copy, network={"name": name, "arguments": arguments})
    with pytest.raises(MedmomError, match=f"no network '{name}'.*update medmom"):
        load_package(copy)


def test_network_of_another_shape_is_refused(copy: Path) -> None:
    rewrite(copy, network={"name": "MomentumUNet", "arguments": tiny_network(out_channels=5).arguments})
    with pytest.raises(MedmomError, match=r"does not fit together.*size mismatch") as caught:
        load_package(copy)
    assert "\n" not in str(caught.value)


def test_network_with_other_layers_is_refused(copy: Path) -> None:
    arguments = {**tiny_network().arguments, "blocks": [1, 4]}
    rewrite(copy, network={"name": "MomentumUNet", "arguments": arguments})
    with pytest.raises(MedmomError, match=r"does not fit together.*Missing key"):
        load_package(copy)


def test_labels_and_channels_must_fit_the_network(copy: Path) -> None:
    with pytest.raises(ValueError, match="from 2 to 3 channels, for 1 image channels and 3 labels"):
        save_tiny(copy, network=tiny_network(2))
    rewrite(copy, labels={"names": ["background", "liver"], "values": [0, 1], "ignore": None})
    with pytest.raises(MedmomError, match="from 1 to 3 channels, for 1 image channels and 2 labels"):
        load_package(copy)


def test_unknown_layout_asks_for_an_update(copy: Path) -> None:
    rewrite(copy, schema=2)
    with pytest.raises(MedmomError, match=r"layout 2 .* reads layout 1\. Update medmom"):
        load_package(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": None},
        {"preparation": {"spacing": [1, 1, 1], "intensity": "zscore", "gamma": 2}},
        {"network": {"name": "MomentumUNet", "arguments": {"depth": 3}}},
        {"network": "MomentumUNet"},
        {"network": {}},
        {"patch": "large"},
    ],
)
def test_malformed_description_is_refused_in_one_line(change: dict[str, Any], copy: Path) -> None:
    rewrite(copy, **change)
    with pytest.raises(MedmomError, match=r"does not fit together|is missing"):
        load_package(copy)


def test_newer_package_replaces_the_older(copy: Path) -> None:
    before = load_package(copy).checksum
    save_tiny(copy, network=tiny_network(seed=1))
    after = load_package(copy)
    assert after.checksum != before
    assert torch.equal(next(after.network.parameters()), next(tiny_network(seed=1).parameters()))
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


def test_failed_write_leaves_the_older_package(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_package(copy).checksum

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package_files.os, "fsync", full)
    with pytest.raises(MedmomError, match=r"cannot be written \(No space left on device\)"):
        save_tiny(copy, network=tiny_network(seed=1))
    assert load_package(copy).checksum == before
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


def test_failed_rename_brings_the_older_package_back(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_package(copy).checksum
    rename = Path.rename

    def stubborn(self: Path, target: Path) -> Path:
        if self.name.startswith(".draft"):
            raise OSError(5, os.strerror(5))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stubborn)
    with pytest.raises(MedmomError, match="cannot be written"):
        save_tiny(copy, network=tiny_network(seed=1))
    assert load_package(copy).checksum == before
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


def test_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "case.nii.gz").write_bytes(b"precious")
    with pytest.raises(MedmomError, match="holds other files than a model package"):
        save_tiny(tmp_path / "scans")
    assert (tmp_path / "scans" / "case.nii.gz").read_bytes() == b"precious"


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MedmomError, match="cannot be written"):
        save_tiny(tmp_path / "file" / "model")


def test_foreign_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Conv3d is not a network of medmom\.models"):
        save_tiny(tmp_path / "model", network=torch.nn.Conv3d(1, 3, 3))  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


def test_loading_leaves_random_numbers_alone(sound: Path) -> None:
    before = torch.get_rng_state()
    load_package(sound)
    assert torch.equal(torch.get_rng_state(), before)


CLEANUP = {"largest": ["head"], "smoothing": {"body": 1.5}}


def test_package_without_a_cleanup_has_no_word_of_it(sound: Path) -> None:
    assert "cleanup" not in json.loads((sound / "model.json").read_text())
    package = load_package(sound)
    assert package.cleanup is None
    assert package.raw_checksum == package.checksum


def test_cleanup_is_read_and_the_checksum_without_it_known(sound: Path, copy: Path) -> None:
    rewrite(copy, cleanup=CLEANUP)
    package = load_package(copy)
    assert package.cleanup == Cleanup(("head",), (("body", 1.5),))
    assert package.raw_checksum == load_package(sound).checksum != package.checksum


@pytest.mark.parametrize(
    "cleanup",
    [
        {"largest": ["tail"], "smoothing": {}},
        {"largest": ["background"], "smoothing": {}},
        {"largest": [], "smoothing": {"body": -1}},
        {"largest": ["head"]},
        {**CLEANUP, "holes": []},
        {"largest": None, "smoothing": {}},
        "largest",
        [1],
        0,
    ],
)
def test_malformed_cleanup_is_refused_in_one_line(cleanup: Any, copy: Path) -> None:
    rewrite(copy, cleanup=cleanup)
    with pytest.raises(MedmomError, match=r"does not fit together|is missing") as caught:
        load_package(copy)
    assert "\n" not in str(caught.value)


def test_classifier_with_a_cleanup_is_refused(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model")
    rewrite(folder, cleanup=CLEANUP)
    with pytest.raises(MedmomError, match="a cleanup of label maps for classes of images"):
        load_package(folder)


def test_package_whose_replacement_was_cut_off_is_found(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "run" / "model")
    model.rename(tmp_path / "run" / ".old-1234abcd")
    for path in (tmp_path / "run", model):
        with pytest.raises(MedmomError, match=r"one whose replacement was cut off lies in .*\.old-1234abcd\. Rename"):
            load_package(path)


def test_network_that_is_larger_than_its_weights_is_refused_without_its_memory(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model")
    network = json.loads((folder / "model.json").read_text())["network"]
    huge = [count * 10**5 for count in network["arguments"]["channels"]]
    rewrite(folder, network={**network, "arguments": {**network["arguments"], "channels": huge}})
    with pytest.raises(MedmomError, match=r"does not fit together \(.*size mismatch"):
        load_package(folder)
