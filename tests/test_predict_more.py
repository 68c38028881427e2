"""The commands beyond NIfTI and one model: ensembles, entropy, DICOM in and out, models of nnU-Net, summaries."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_files import affine_of, example_voxels, write_series
from nnunet_folders import host_state, make_plans, save_folder
from tiny import LABELS, save_image, save_tiny, tiny_network
from tiny_road import run, save_model

SHAPE = (14, 12, 11)


def another(folder: Path, seed: int) -> Path:
    network = tiny_network(1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return save_tiny(folder, network=network, data={"mirror": [0]})


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [another(tmp_path / f"model_{seed}", seed) for seed in range(3)]


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return save_image(tmp_path / "scan.nii.gz", SHAPE, seed=1)


def sidecar(path: Path) -> dict[str, object]:
    return dict(json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text()))


def test_models_are_averaged_and_named(models: list[Path], scan: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "x.nii.gz", ("--probabilities", "uint16", "--entropy", "--quiet")
    words = [word for model in models[1:] for word in ("--with", model)]
    assert run("predict", models[0], scan, "--out", out, *words, *options) == 0
    found = np.stack([nib.load(tmp_path / f"x_{n.replace(' ', '_')}.nii.gz").get_fdata() for n in LABELS.names])
    singles = []
    for k, model in enumerate(models):
        single = tmp_path / f"single_{k}.nii.gz"
        assert run("predict", model, scan, "--out", single, *options) == 0
        names = [f"single_{k}_{name.replace(' ', '_')}.nii.gz" for name in LABELS.names]
        singles.append(np.stack([nib.load(tmp_path / name).get_fdata() for name in names]))
    # A single model blends logits and not probabilities: between windows, and between voxels, they differ a little.
    assert np.abs(found - np.mean(singles, axis=0)).mean() < 0.03
    assert all(np.abs(found - single).max() > 0.02 for single in singles)
    entropy = nib.load(tmp_path / "x_entropy.nii.gz").get_fdata()
    p = np.clip(found, 1e-9, 1)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(axis=0) / np.log(len(p)), atol=0.003)
    told = sidecar(out)
    assert isinstance(told["model"], dict)
    assert [member["path"] for member in told["model"]["members"]] == [str(model) for model in models]
    assert set(told["also"]) >= {"x_entropy.nii.gz"}  # type: ignore[call-overload]


def test_other_ensemble_is_another_model(
    models: list[Path], scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Options may stand anywhere.
    command = ("predict", models[0], "--skip-existing", scan, "--out", tmp_path / "x.nii.gz", "--quiet")
    for words, is_there in (
        (["--with", models[1]], False),
        (["--with", models[1]], True),
        (["--with", models[2]], False),
        ([], False),
    ):
        capsys.readouterr()
        assert run(*command, *words) == 0
        assert ("already" in capsys.readouterr().out) is is_there


def test_validation_cases_are_not_for_ensembles(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--fold", "validation", "--with", models[1], "--out", tmp_path / "out")
    assert run("predict", models[0], *words) == 2
    assert "validation cases of one model are training cases of another" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--entropy", "--dicom-seg", "--reference-series=x", "--with=x"])
def test_new_options_are_refused_by_a_classifier(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", classes=True)
    assert run("predict", model, tmp_path, "--out", tmp_path / "x.csv", option) == 2
    assert f"{option.split('=', maxsplit=1)[0]}: {model} classifies" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", ["LPS", "RSA"])
def test_series_is_segmented_in_place(orientation: str, models: list[Path], tmp_path: Path) -> None:
    hd = pytest.importorskip("highdicom")
    voxels, affine = example_voxels(SHAPE), affine_of(orientation, tilt=20)
    write_series(tmp_path / "study" / "ct", voxels, affine)
    out = tmp_path / "out"
    assert run("predict", models[0], tmp_path / "study" / "ct", "--out", out, "--dicom-seg", "--quiet") == 0
    label = nib.load(out / "ct.nii.gz")
    world = label.affine @ [*(np.array(label.shape) - 1), 1]
    corners = [affine @ [x, y, z, 1] for x in (0, SHAPE[0] - 1) for y in (0, SHAPE[1] - 1) for z in (0, SHAPE[2] - 1)]
    assert min(np.abs(world - corner).max() for corner in corners) < 1e-3
    found = hd.seg.segread(out / "ct_seg.dcm")
    volume = found.get_volume(combine_segments=True)
    # Slices without a segment are left out of the file.
    index = np.indices(volume.array.shape).reshape(3, -1)
    world = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine @ np.vstack([index, np.ones(index.shape[1])])
    places = np.rint(np.linalg.inv(label.affine) @ world)[:3].astype(int)
    in_file = np.zeros(label.shape, bool)
    in_file[tuple(places)] = volume.array.ravel() > 0
    assert in_file.any()
    np.testing.assert_array_equal(in_file, np.asarray(label.dataobj) > 0)


def test_converted_scan_takes_the_series_it_was_made_from(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("highdicom")
    voxels, affine = example_voxels(SHAPE), affine_of("LPS")
    write_series(tmp_path / "ct", voxels, affine)
    write_series(tmp_path / "other", voxels, affine_of("LPS", (1.0, 1.5, 2.5)))
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(voxels, affine)), tmp_path / "scan.nii.gz")
    command = ("predict", models[0], tmp_path / "scan.nii.gz", "--out", tmp_path / "x.nii.gz", "--quiet")
    assert run(*command, "--dicom-seg") == 2
    assert "a DICOM-SEG lies on a DICOM series, and this is none" in capsys.readouterr().err
    assert run(*command, "--reference-series", tmp_path / "other") == 2
    assert f"{tmp_path / 'other'}: another grid than" in capsys.readouterr().err
    assert not (tmp_path / "x.nii.gz").exists()
    assert run(*command, "--reference-series", tmp_path / "ct") == 0
    assert (tmp_path / "x_seg.dcm").is_file()


def test_model_of_nnunet_is_imported_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_folder(tmp_path, [host_state(seed=0), host_state(seed=1)], make_plans())
    assert run("import", "nnunet", folder, "--out", tmp_path / "models") == 0
    told = capsys.readouterr().out
    assert f"Next: medmom predict {tmp_path / 'models' / 'fold_0'} IMAGES --out LABELS --with" in told
    first, second = (tmp_path / "models" / f"fold_{k}" for k in range(2))
    scan = save_image(tmp_path / "scan.nii.gz", SHAPE, seed=1)
    assert run("predict", first, scan, "--out", tmp_path / "x.nii.gz", "--with", second, "--quiet") == 0
    assert nib.load(tmp_path / "x.nii.gz").shape == SHAPE
    assert run("import", "nnunet", tmp_path / "nothing", "--out", tmp_path / "more") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_scores_are_written_for_tools_of_nnunet(models: list[Path], scan: Path, tmp_path: Path) -> None:
    out, summary = tmp_path / "out", tmp_path / "summary.json"
    assert run("predict", models[0], scan, "--out", out, "--quiet") == 0
    (tmp_path / "references").mkdir()
    reference = tmp_path / "references" / "scan.nii.gz"
    reference.write_bytes((out / "scan.nii.gz").read_bytes())
    assert run("evaluate", out, tmp_path / "references", "--summary", summary, "--quiet") == 0
    told = json.loads(summary.read_text())
    assert set(told) == {"foreground_mean", "mean", "metric_per_case"}
    assert {row["Dice"] for row in told["mean"].values() if row["Dice"] == row["Dice"]} == {1.0}


def test_label_maps_do_not_go_among_the_slices(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_series(tmp_path / "ct", example_voxels(SHAPE), affine_of("LPS"))
    assert run("predict", models[0], tmp_path / "ct", "--out", tmp_path / "ct") == 2
    assert "the folder of the input ct" in capsys.readouterr().err
