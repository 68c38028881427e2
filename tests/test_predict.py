from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import LABELS, save_image, save_tiny, tiny_network
from tiny_road import save_model

from medmom.data.case import Case
from medmom.data.files import read_image, write_label
from medmom.data.preparation import prepare, restore
from medmom.errors import MedmomError
from medmom.inference.inputs import find_inputs
from medmom.inference.predict import predict
from medmom.inference.predictor import Given, Prediction, Predictor, Settings
from medmom.inference.stream import num_windows
from medmom.inference.windows import sliding_window

LISTS = ["cases.json", "run.json", "statistics.csv", "statistics.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def pair_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("pair") / "model", channels=("FLAIR", "T1"))


def oblique_affine() -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * [0.9, 1.7, 1.2]
    affine[:3, 3] = [-31.5, 80.25, 7.125]
    return affine


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# What is predicted


def test_prediction_lies_on_the_images_own_grid(model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "case.nii.gz", (9, 14, 7), affine=oblique_affine())
    source = nib.load(image)
    source.set_sform(source.affine, code=2)
    source.set_qform(source.affine, code=1)
    nib.save(source, image)
    (outcome,) = predict(model, [image], tmp_path / "out" / "seg.nii.gz", quiet=True).outcomes
    assert outcome.prediction == tmp_path / "out" / "seg.nii.gz"
    written = nib.load(outcome.prediction)
    assert written.shape == (9, 14, 7)
    np.testing.assert_array_equal(written.affine, nib.load(image).affine)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (2, 1)
    assert written.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(written.dataobj))) <= set(LABELS.values)
    assert len(np.unique(np.asarray(written.dataobj))) > 1


def test_prediction_is_the_networks_answer_on_the_prepared_case(model: Path, tmp_path: Path) -> None:
    volume = read_image(save_image(tmp_path / "case.nii.gz", (16, 10, 7)))
    predictor = Predictor(model, device="cpu")
    case = prepare(Case("", volume.array, None, volume.geometry, ()), predictor.package.preparation)
    assert max(case.geometry.shape) == 16, "one window sees the whole case"
    before = [(16 - n) // 2 for n in case.geometry.shape]
    place = (..., *[slice(start, start + n) for start, n in zip(before, case.geometry.shape, strict=True)])
    window = torch.zeros(1, 1, 16, 16, 16)
    window[place] = torch.from_numpy(case.image)
    with torch.inference_mode():
        logits = tiny_network().eval()(window)[place][0].numpy()
    expected = LABELS.to_values(restore(logits, case.geometry, volume.geometry))
    np.testing.assert_array_equal(predictor(volume, quiet=True).label, expected)


@pytest.mark.parametrize("shape", [(3, 3, 3), (20, 18, 1), (1, 21, 17), (40, 2, 3), (2, 1, 2), (17, 16, 33)])
def test_small_and_thin_images_are_predicted(shape: tuple[int, ...], model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "case.nii.gz", shape)
    predict(model, [image], tmp_path / "seg.nii.gz", quiet=True)
    assert nib.load(tmp_path / "seg.nii.gz").shape == shape


def test_windows_of_two_edges_run_slice_by_slice() -> None:
    image, seen = torch.randn(1, 2, 12, 8, 5), []

    def network(window: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(window.shape))
        return window.cumsum(dim=2)

    found = sliding_window((12, 8))(image, network)
    torch.testing.assert_close(found, image.cumsum(dim=2))
    assert seen == [(1, 2, 12, 8)] * num_windows(image.shape[2:], (12, 8), 0.5)
    assert num_windows((30, 8, 5), (12, 8), 0.5) == 5 * num_windows((30, 8, 1), (12, 8), 0.5) == 5 * 4


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(3, 4, 5), (8, 8, 8), (9, 16, 30)])
def test_windows_are_counted_as_they_are_run(shape: tuple[int, ...], overlap: float) -> None:
    seen = []
    windows = sliding_window((8, 8, 16), overlap=overlap)
    windows(torch.zeros(1, 1, *shape), lambda window: seen.append(window.shape) or window)
    assert len(seen) == num_windows(shape, (8, 8, 16), overlap)
    assert set(seen) == {(1, 1, 8, 8, 16)}


def test_windows_are_blended_by_a_gaussian() -> None:
    answers = iter([0.0, 1.0])
    blended = sliding_window((8, 8, 8))(torch.zeros(1, 1, 12, 8, 8), lambda window: window + next(answers))
    weight = torch.exp(-((torch.arange(8) - 3.5) ** 2) / 2)
    # The first half of the second window lies on the second half of the first.
    expected = weight[:4] / (weight[:4] + weight[4:])
    torch.testing.assert_close(blended[0, 0, :, 3, 4], torch.cat([torch.zeros(4), expected, torch.ones(4)]))


@pytest.mark.parametrize(("patch", "mirror", "axes"), [((16, 16, 16), [0, 2], (0, 2)), ((16, 16, 16), [1], (1,))])
def test_mirrored_image_gives_the_mirrored_label_map_under_tta(
    patch: tuple[int, ...], mirror: list[int], axes: tuple[int, ...], tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", patch=patch, data={"mirror": mirror})
    # The edges of the working grid and the size of a window: nothing is resampled, nothing blended.
    volume = read_image(save_image(tmp_path / "case.nii.gz", (16, 16, 16), affine=np.eye(4)))
    plain, tta = Predictor(model, device="cpu"), Predictor(model, device="cpu", settings=Settings(tta=True))
    assert (plain.mirrors, tta.mirrors) == ((), axes)
    turned = replace(volume, array=np.flip(volume.array, [1 + axis for axis in axes]).copy())
    assert (tta(turned, quiet=True).label == np.flip(tta(volume, quiet=True).label, axes)).mean() > 0.999
    assert (plain(turned, quiet=True).label == np.flip(plain(volume, quiet=True).label, axes)).mean() < 0.99


@pytest.mark.parametrize("data", [{"mirror": []}, {"mirror": [0, 1, 2], "augment": False}, {}])
def test_tta_is_refused_where_training_did_not_mirror(data: dict[str, Any], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", data=data)
    with pytest.raises(MedmomError, match=r"trained without mirroring \(data.mirror\).* Leave out --tta"):
        Predictor(model, device="cpu", settings=Settings(tta=True))


def test_third_axis_of_slices_is_not_mirrored(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", recipe={"data": {"mirror": [0, 1, 2]}})
    assert Predictor(model, device="cpu", settings=Settings(tta=True)).mirrors == (0, 1)


def test_cases_do_not_touch_each_other(model: Path, tmp_path: Path) -> None:
    images = [save_image(tmp_path / "in" / f"{k}.nii.gz", (11 + k, 9, 8), seed=k) for k in range(3)]
    predict(model, images, tmp_path / "ahead", quiet=True)
    predict(model, images[::-1], tmp_path / "back", quiet=True)
    for k in range(3):
        assert (tmp_path / "ahead" / f"{k}.nii.gz").read_bytes() == (tmp_path / "back" / f"{k}.nii.gz").read_bytes()


def test_channels_may_lie_in_one_file_or_in_several(pair_model: Path, tmp_path: Path) -> None:
    parts = [save_image(tmp_path / "in" / f"a_000{k}.nii.gz", seed=k) for k in range(2)]
    both = np.stack([nib.load(part).get_fdata(dtype=np.float32) for part in parts], axis=-1)
    nib.save(nib.Nifti1Image(both, nib.load(parts[0]).affine), tmp_path / "whole.nii.gz")
    (outcome,) = predict(pair_model, [tmp_path / "in"], tmp_path / "out", quiet=True).outcomes
    assert outcome.case.name == "a"
    predict(pair_model, [tmp_path / "whole.nii.gz"], tmp_path / "seg.nii.gz", quiet=True)
    np.testing.assert_array_equal(
        nib.load(tmp_path / "out" / "a.nii.gz").get_fdata(), nib.load(tmp_path / "seg.nii.gz").get_fdata()
    )


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_network_that_gives_no_numbers_is_named(broken: float, tmp_path: Path) -> None:
    network = tiny_network()
    with torch.no_grad():
        next(network.parameters()).fill_(broken)
    model = save_tiny(tmp_path / "model", network=network)
    with pytest.raises(MedmomError, match=r"case\.nii\.gz: the network's output is not finite"):
        predict(model, [save_image(tmp_path / "case.nii.gz")], tmp_path / "seg.nii.gz", quiet=True)


def test_absurd_working_grid_is_refused_before_memory_is_asked_for(model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "case.nii.gz", (9, 9, 9), affine=np.diag([900.0, 900.0, 900.0, 1.0]))
    with pytest.raises(MedmomError, match=r"8100 x 8100 x 8100 voxels at the model's spacing"):
        predict(model, [image], tmp_path / "seg.nii.gz", quiet=True)


# What is written


def test_folder_gets_sidecars_and_a_list(model: Path, tmp_path: Path) -> None:
    images = [save_image(tmp_path / "in" / name, seed=k) for k, name in enumerate(["b.nii", "a.v1.nii.gz"])]
    predict(model.parent, [tmp_path / "in"], tmp_path / "out", quiet=True)
    assert files_below(tmp_path / "out") == ["a.v1.json", "a.v1.nii.gz", "b.json", "b.nii.gz", *LISTS]
    listed = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert listed["labels"] == LABELS.as_dict()
    assert listed["model"]["checksum"] == Predictor(model).package.checksum
    assert listed["model"]["evaluation"] == {"nsd_tolerance": 1.0}
    assert [case["name"] for case in listed["cases"]] == ["a.v1", "b"]
    assert listed["cases"][1] == {
        "name": "b",
        "image": [str(images[0])],
        "prediction": "b.nii.gz",
        "patient": "b",
        "annotated": None,
        "reference": None,
        "error": None,
    }
    sidecar = json.loads((tmp_path / "out" / "b.json").read_text())
    assert sidecar["image"] == [str(images[0])]
    assert sidecar["labels"] == LABELS.as_dict()
    assert {"medmom", "torch"} <= sidecar["versions"].keys()


def test_failing_case_does_not_stop_the_others(model: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"")
    save_image(tmp_path / "in" / "c.nii.gz", (6, 6, 6, 2))
    save_image(tmp_path / "in" / "d.nii.gz")
    outcomes = predict(model, [tmp_path / "in", tmp_path / "absent.nii.gz"], tmp_path / "out", quiet=True).outcomes
    assert [outcome.prediction is not None for outcome in outcomes] == [True, False, False, True, False]
    errors = [outcome.error or "" for outcome in outcomes]
    assert "b.nii.gz: the file is empty" in errors[1]
    assert "c.nii.gz: the number of image channels is 2, the model takes 1 (MRI)" in errors[2]
    assert "absent.nii.gz: no such file" in errors[4]
    listed = json.loads((tmp_path / "out" / "cases.json").read_text())["cases"]
    assert [case["error"] or "" for case in listed] == errors
    assert [case["prediction"] for case in listed] == ["a.nii.gz", None, None, "d.nii.gz", None]
    assert files_below(tmp_path / "out") == sorted(["a.json", "a.nii.gz", "d.json", "d.nii.gz", *LISTS])


@pytest.mark.parametrize("out", ["out/seg.nii.gz", "out"])
def test_single_case_that_fails_leaves_nothing_behind(out: str, model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "case.nii.gz", (6, 6, 6, 3))
    with pytest.raises(
        MedmomError, match=r"case\.nii\.gz: the number of image channels is 3, the model takes 1 \(MRI\)"
    ):
        predict(model, [image], tmp_path / out, quiet=True)
    assert files_below(tmp_path) == ["case.nii.gz"]


def test_run_that_is_cut_short_lists_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        save_image(tmp_path / "in" / f"{name}.nii.gz")
    segment = Predictor.segment

    def interrupted(self: Predictor, given: Given, **options: Any) -> Prediction:
        if given.image.path.name.startswith("b"):
            raise KeyboardInterrupt
        return segment(self, given, **options)

    monkeypatch.setattr(Predictor, "segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(model, [tmp_path / "in"], tmp_path / "out", quiet=True)
    listed = json.loads((tmp_path / "out" / "cases.json").read_text())["cases"]
    assert [case["prediction"] for case in listed] == ["a.nii.gz", None, None]
    assert all("not reached" in case["error"] for case in listed[1:])


def test_later_run_replaces_an_earlier_ones_predictions(model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "in" / "a.nii.gz")
    other = save_tiny(tmp_path / "other", network=tiny_network(seed=5))
    predict(model, [image], tmp_path / "out", quiet=True)
    first = (tmp_path / "out" / "a.nii.gz").read_bytes()
    predict(other, [image], tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() != first


def test_disk_that_fills_up_leaves_no_sidecar(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = save_image(tmp_path / "a.nii.gz")

    def full(*args: object) -> None:
        raise MedmomError("seg.nii.gz: cannot be written (No space left on device).")

    monkeypatch.setattr("medmom.inference.outputs.write_label", full)
    with pytest.raises(MedmomError, match="No space left"):
        predict(model, [image], tmp_path / "seg.nii.gz", quiet=True)
    assert files_below(tmp_path) == ["a.nii.gz"]


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_run_says_nothing(
    quiet: bool, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save_image(tmp_path / "in" / "a.nii.gz")
    save_image(tmp_path / "in" / "b.nii.gz")
    predict(model, [tmp_path / "in"], tmp_path / "out", quiet=quiet)
    out, err = capfd.readouterr()
    assert out == ""
    assert (err == "") == quiet
    assert caplog.text == ""


# What is never written over


@pytest.mark.parametrize("kind", ["same", "roundabout", "symlink", "hardlink"])
def test_input_is_never_replaced(kind: str, model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "case.nii.gz")
    before = image.read_bytes()
    (tmp_path / "sub").mkdir()
    out = {"same": image, "roundabout": tmp_path / "sub" / ".." / "case.nii.gz"}.get(kind, tmp_path / "out.nii.gz")
    if kind == "symlink":
        out.symlink_to(image)
    if kind == "hardlink":
        out.hardlink_to(image)
    with pytest.raises(MedmomError, match=r"would replace the input .*case\.nii\.gz"):
        predict(model, [image], out, quiet=True)
    assert image.read_bytes() == before
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("name", ["case.nii.gz", "case.nii"])
def test_folder_of_the_inputs_is_no_output_folder(name: str, model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "in" / name)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for out in (tmp_path / "in", tmp_path / "link"):
        with pytest.raises(MedmomError, match="the folder of the input"):
            predict(model, [image], out, quiet=True)
    assert files_below(tmp_path / "in") == [name]


@pytest.mark.parametrize("name", ["a.nii.gz", "a.json", "cases.json"])
def test_file_of_somebody_else_is_not_replaced(name: str, model: Path, tmp_path: Path) -> None:
    image = read_image(save_image(tmp_path / "in" / "a.nii.gz"))
    (tmp_path / "labels").mkdir()
    path = tmp_path / "labels" / name
    if name == "a.nii.gz":
        write_label(path, np.zeros(image.geometry.shape, np.uint8), LABELS, image)
    else:
        path.write_text('{"labels": {"liver": 1}}')
    before = path.read_bytes()
    with pytest.raises(MedmomError, match=rf"{name}: exists and was not written by medmom predict"):
        predict(model, [tmp_path / "in"], tmp_path / "labels", quiet=True)
    assert files_below(tmp_path / "labels") == [name]
    assert path.read_bytes() == before


@pytest.mark.parametrize("out", ["file/out", "file/seg.nii.gz", "file"])
def test_output_below_a_file_is_refused_before_any_work(
    out: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = save_image(tmp_path / "case.nii.gz")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Predictor, "read", None)
    with pytest.raises(MedmomError, match=r"file.*(cannot be written|this is a file)"):
        predict(model, [image], tmp_path / out, quiet=True)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody may write")
def test_read_only_place_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="cannot be written"):
        predict(model, [save_image(tmp_path / "case.nii.gz")], Path("/proc/medmom/out"), quiet=True)


def test_one_file_for_several_images_is_refused(model: Path, tmp_path: Path) -> None:
    images = [save_image(tmp_path / f"{name}.nii.gz") for name in "ab"]
    with pytest.raises(MedmomError, match=r"seg\.nii\.gz: one file for 2 images"):
        predict(model, images, tmp_path / "seg.nii.gz", quiet=True)


@pytest.mark.parametrize("name", ["seg.nrrd", "seg.hdr", "seg.img", "seg.png", "seg.mha", "seg.gz"])
def test_output_of_another_format_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=rf"{name}: label maps are written as \.nii\.gz or \.nii"):
        predict(model, [save_image(tmp_path / "case.nii.gz")], tmp_path / name, quiet=True)


def test_case_named_like_the_list_is_refused(model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "in" / "cases.nii.gz")
    with pytest.raises(MedmomError, match="cannot be named 'cases'"):
        predict(model, [image], tmp_path / "out", quiet=True)


# Which inputs are meant


def names(inputs: Sequence[str | Path], num_channels: int = 1) -> list[tuple[str, int]]:
    return [(case.name, len(case.images)) for case in find_inputs(inputs, num_channels)]


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_folder_stands_for_its_images(tmp_path: Path) -> None:
    touch(tmp_path, "b.nii.gz", "a.NII", "c.hdr", "c.img", "dataset.json", "._b.nii.gz", "deeper/d.nii.gz", "x.txt")
    assert names([tmp_path]) == [("a", 1), ("b", 1), ("c", 1)]


def test_globs_are_expanded_and_repetitions_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a1.nii.gz", "a2.nii.gz", "b.nii.gz", "odd[1].nii.gz")
    monkeypatch.chdir(tmp_path)
    assert names(["b.nii.gz", "a?.nii.gz", tmp_path, "./b.nii.gz"]) == [("b", 1), ("a1", 1), ("a2", 1), ("odd[1]", 1)]
    assert names(["odd[1].nii.gz"]) == [("odd[1]", 1)]
    with pytest.raises(MedmomError, match=r"z\*\.nii: no file matches"):
        find_inputs(["z*.nii"], 1)


def test_two_links_to_one_file_are_two_cases(tmp_path: Path) -> None:
    touch(tmp_path, "store/x.nii.gz")
    for name in "ab":
        (tmp_path / f"{name}.nii.gz").symlink_to(tmp_path / "store" / "x.nii.gz")
    assert names([tmp_path]) == [("a", 1), ("b", 1)]


def test_broken_link_in_a_folder_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    assert names([tmp_path]) == [("a", 1)]


@pytest.mark.parametrize(
    ("files", "num_channels"),
    [
        (["x/a.nii.gz", "y/a.nii.gz"], 1),
        (["a.nii", "a.nii.gz"], 1),
        (["a_0000.nii", "a_0000.nii.gz"], 1),
        (["x/a_0000.nii", "x/a_0001.nii", "y/a.nii"], 2),
    ],
)
def test_two_inputs_of_one_name_are_both_named(files: list[str], num_channels: int, tmp_path: Path) -> None:
    touch(tmp_path, *files)
    with pytest.raises(MedmomError, match=f"{files[-1]}: .*{files[0]} has the same name a"):
        find_inputs([tmp_path / file for file in files], num_channels)


def test_folder_without_images_says_where_there_are_some(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTs/a.nii.gz", "series/1.dcm")
    with pytest.raises(MedmomError, match=r"no NIfTI image and no picture in this folder\. Give .*imagesTs"):
        find_inputs([tmp_path], 1)
    with pytest.raises(MedmomError, match="DICOM"):
        find_inputs([tmp_path / "series"], 1)


def test_path_that_cannot_be_asked_for_is_refused(model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.nii.gz")
    with pytest.raises(MedmomError, match=r"aaa: cannot be read \(File name too long\)"):
        predict(model, ["a" * 300], tmp_path / "out", quiet=True)
    with pytest.raises(MedmomError, match=r"bbb: cannot be written \(File name too long\)"):
        predict(model, [image], tmp_path / ("b" * 300), quiet=True)


def test_nothing_given_is_refused() -> None:
    with pytest.raises(MedmomError, match="no input is given"):
        find_inputs([], 1)


@pytest.mark.parametrize(
    ("files", "num_channels", "expected"),
    [
        (["a_0000", "a_0001", "b_0000", "b_0001"], 2, [("a", 2), ("b", 2)]),
        (["a_0000", "a_0001", "whole"], 2, [("a", 2), ("whole", 1)]),
        (["BRATS_0001", "BRATS_0002"], 2, [("BRATS_0001", 1), ("BRATS_0002", 1)]),
        (["a_0000"], 2, [("a_0000", 1)]),
        (["a_0000", "a_0001", "a_0002"], 2, [("a", 3)]),
        (["a_0000", "b_0000"], 1, [("a", 1), ("b", 1)]),
        (["a_0000", "plain"], 1, [("a_0000", 1), ("plain", 1)]),
        (["p_0000", "p_0001", "p_0002"], 1, [("p_0000", 1), ("p_0001", 1), ("p_0002", 1)]),
        (["p_0001", "p_0002"], 1, [("p_0001", 1), ("p_0002", 1)]),
        (["a_0000", "a_0001", "b_0000", "b_0001"], 1, [("a", 2), ("b", 2)]),
        (["a_00000", "a_000"], 1, [("a_000", 1), ("a_00000", 1)]),
    ],
)
def test_channel_files_make_one_case(
    files: list[str], num_channels: int, expected: list[tuple[str, int]], tmp_path: Path
) -> None:
    touch(tmp_path, *(f"{name}.nii.gz" for name in files))
    assert names([tmp_path], num_channels) == expected


def test_missing_channel_file_is_named(pair_model: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "in" / "a_0000.nii.gz")
    save_image(tmp_path / "in" / "a_0002.nii.gz")
    with pytest.raises(MedmomError, match=r"a_0001\.nii\.gz: no such file"):
        predict(pair_model, [tmp_path / "in"], tmp_path / "out", quiet=True)


def test_channel_alone_says_what_the_model_takes(pair_model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "in" / "a_0000.nii.gz")
    with pytest.raises(
        MedmomError, match=r"a_0000\.nii\.gz: the number of image channels is 1, the model takes 2 \(FLAIR, T1\)"
    ):
        predict(pair_model, [image], tmp_path / "out", quiet=True)


def split_of(run: Path, data: Path, images: Sequence[Path], **more: object) -> None:
    entries = [
        {"name": path.name.split(".")[0], "images": [str(path)], "label": str(data / "labels" / path.name), **more}
        for path in images
    ]
    (run / "split.json").write_text(
        json.dumps({"fold": 0, "folds": 5, "seed": 0, "folder": str(data), "train": [], "validation": entries})
    )


def test_validation_fold_is_predicted_with_what_is_known_of_it(tmp_path: Path) -> None:
    run = save_tiny(tmp_path / "run" / "model").parent
    images = [save_image(tmp_path / "data" / "images" / f"{name}.nii.gz") for name in "ab"]
    split_of(run, tmp_path / "data", images, group="p7", annotated=["head"])
    predict(run, [], tmp_path / "out", fold="validation", quiet=True)
    listed = json.loads((tmp_path / "out" / "cases.json").read_text())["cases"]
    assert [case["name"] for case in listed] == ["a", "b"]
    assert {case["patient"] for case in listed} == {"p7"}
    assert listed[0]["annotated"] == ["head"]
    assert listed[0]["reference"] == str(tmp_path / "data" / "labels" / "a.nii.gz")


def test_fold_is_refused_where_there_is_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"split\.json: there is no such file"):
        predict(model, [], tmp_path / "out", fold="validation", quiet=True)
    with pytest.raises(MedmomError, match="fold training: unknown"):
        predict(model, [], tmp_path / "out", fold="training", quiet=True)
    with pytest.raises(MedmomError, match="an input besides --fold"):
        predict(model, ["a.nii.gz"], tmp_path / "out", fold="validation", quiet=True)
    run = save_tiny(tmp_path / "run" / "model").parent
    (run / "split.json").write_text('{"folder": ".", "validation": [{"image": "a"}]}')
    with pytest.raises(MedmomError, match="not as medmom train writes it"):
        predict(run, [], tmp_path / "out", fold="validation", quiet=True)


# Model and device


def test_changed_package_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(MedmomError, match="do not match their checksum"):
        predict(model, [save_image(tmp_path / "a.nii.gz")], tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_device_that_is_not_there_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MedmomError, match="device cuda"):
        predict(model, [save_image(tmp_path / "a.nii.gz")], tmp_path / "out", device="cuda", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overlap", [-0.1, 1.0, float("nan")])
def test_overlap_outside_its_range_is_refused(overlap: float) -> None:
    with pytest.raises(MedmomError, match="overlap"):
        Settings(overlap=overlap)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_agree(model: Path, tmp_path: Path) -> None:
    volume = read_image(save_image(tmp_path / "case.nii.gz", (40, 30, 20)))
    cpu, gpu = (Predictor(model, device=device)(volume, quiet=True).label for device in ("cpu", "cuda"))
    assert (cpu == gpu).mean() > 0.999
