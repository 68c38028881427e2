from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from tiny import LABELS, save_tiny

from medmom.cli import main
from medmom.data.files import read_geometry, stem
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.inference.predict import predict

ODD = ROOT.parent / "shared" / "data" / "odd-inputs"

# Files of which either is right, and what was chosen (the reasons stand at medmom.data.files.read_image).
CHOSEN = {
    "formats/shear.nii.gz": "refuse",
    "formats/wm.mgz": "refuse",
    "formats/scaled+tlrc.HEAD": "refuse",
    "formats/air.hdr.gz": "predict",
    "formats/air2.hdr.gz": "predict",
    "formats/test.mgz": "refuse",
    "formats/small.mnc": "refuse",
    "formats/tiny.mnc": "refuse",
    "formats/minc2_baddim.mnc": "refuse",
    "formats/phantom_EPI_asc_CLEAR_2_1.PAR": "refuse",
    "dicom/two-slices-only": "predict",
    "derived/zeros.nii.gz": "refuse",
    "derived/constant.nii.gz": "refuse",
    "derived/single_slice.nii.gz": "predict",
    "derived/two_d.nii.gz": "predict",
    "derived/zero_pixdim.nii.gz": "refuse",
    "derived/qform_sform_both_zero.nii.gz": "predict",
    "derived/qform_sform_conflict.nii.gz": "refuse",
    "derived/sheared.nii.gz": "refuse",
    "derived/analyze75.hdr": "refuse",
    "derived/not_gzipped.nii.gz": "equals base",
    "derived/gzipped.nii": "equals base",
}

# Seconds each, and predicted alone above.
LARGE = ("orientations/", "formats/labels256", "formats/avg152T1")


def manifest() -> dict[str, str]:
    """What is expected of each entry, with the optional readers installed."""
    if not (ODD / "manifest.csv").is_file():
        return {}
    with (ODD / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["path"]: row["expect"] for row in csv.DictReader(file)}
    expected = {path: CHOSEN[path] if expect == "either" else expect for path, expect in rows.items()}
    return {path: "predict" if expect == "extra" else expect for path, expect in expected.items()}


def entries(*expectations: str) -> list[str]:
    return [path for path, expect in manifest().items() if expect in expectations] or ["nothing here"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("odd") / "model", preparation=Preparation((4.0, 4.0, 4.0), "zscore"))


@pytest.fixture(scope="module")
def odd(shared_data: Path) -> Path:
    if not (shared_data / "odd-inputs" / "manifest.csv").is_file():
        pytest.skip("no odd inputs beside the checkout")
    return shared_data / "odd-inputs"


def in_ras(path: Path) -> np.ndarray:
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


@pytest.fixture(scope="module")
def base(model: Path, odd: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    out = tmp_path_factory.mktemp("base") / "base.nii.gz"
    predict(model, [odd / "derived" / "base.nii.gz"], out, quiet=True)
    assert len(np.unique(in_ras(out))) == LABELS.num_channels, "every class must appear, or agreement says little"
    return in_ras(out)


@pytest.fixture(scope="module")
def brain(model: Path, odd: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    out = tmp_path_factory.mktemp("brain") / "brain.nii.gz"
    predict(model, [odd / "orientations" / "RAS.nii.gz"], out, quiet=True)
    return in_ras(out)


def check_on_own_grid(written: Path, source: Path) -> None:
    ours = nib.load(written)
    if source.is_dir() or source.suffix in (".dcm", ".nrrd", ".mha"):
        theirs = nib.Nifti1Image(np.empty(read_geometry(source).shape, np.int8), read_geometry(source).affine)
    else:
        theirs = nib.load(source)
    shape = theirs.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    assert ours.shape == shape
    # Of a position of 500 mm single precision leaves out 1.5e-5 mm.
    np.testing.assert_allclose(ours.affine, theirs.affine, rtol=0, atol=2e-5)
    assert ours.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(ours.dataobj))) <= set(LABELS.values)


@pytest.mark.parametrize("path", [path for path in entries("predict", "equals base") if "orientations" not in path])
def test_odd_file_is_predicted_on_its_own_grid(
    path: str, model: Path, odd: Path, base: np.ndarray, tmp_path: Path
) -> None:
    (outcome,) = predict(model, [odd / path], tmp_path, quiet=True).outcomes
    assert outcome.prediction == tmp_path / f"{stem(odd / path)}.nii.gz"
    # nibabel does not open these two; their grid is that of the base.
    is_misnamed = path in ("derived/not_gzipped.nii.gz", "derived/gzipped.nii")
    check_on_own_grid(outcome.prediction, odd / ("derived/base.nii.gz" if is_misnamed else path))
    if manifest()[path] == "equals base":
        assert (in_ras(outcome.prediction) == base).mean() >= 0.999


@pytest.mark.parametrize("path", entries("refuse"))
def test_unusable_file_is_refused_in_one_line(path: str, model: Path, odd: Path, tmp_path: Path) -> None:
    with pytest.raises(MedmomError) as caught:
        predict(model, [odd / path], tmp_path / "out", quiet=True)
    message = str(caught.value)
    assert "\n" not in message
    first = (odd / path).parent if path.startswith("dicom/ge-tilt") else odd / path
    assert message.startswith(f"{first}: "), "the file comes first, or the folder of its series"
    assert message.count(". ") >= 1, "a fact, then a mend"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "SAL", "AIL", "IRP"])
def test_brain_is_segmented_alike_in_some_orientations(
    code: str, model: Path, odd: Path, brain: np.ndarray, tmp_path: Path
) -> None:
    path = odd / "orientations" / f"{code}.nii.gz"
    predict(model, [path], tmp_path / "out.nii.gz", quiet=True)
    check_on_own_grid(tmp_path / "out.nii.gz", path)
    assert (in_ras(tmp_path / "out.nii.gz") == brain).mean() >= 0.999


@pytest.mark.slow
def test_brain_is_segmented_alike_in_all_orientations(
    model: Path, odd: Path, brain: np.ndarray, tmp_path: Path
) -> None:
    outcomes = predict(model, [odd / "orientations"], tmp_path, quiet=True).outcomes
    assert len(outcomes) == 48
    for outcome in outcomes:
        assert outcome.prediction is not None, outcome.error
        check_on_own_grid(outcome.prediction, outcome.case.images[0])
        assert (in_ras(outcome.prediction) == brain).mean() >= 0.999


@pytest.mark.parametrize("path", entries("companion", "reference", "inspect"))
def test_file_that_is_no_scan_by_itself_never_ends_in_a_traceback(
    path: str, model: Path, odd: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.nii.gz"
    try:
        predict(model, [odd / path], out, quiet=True)
    except MedmomError as error:
        assert str(error).startswith(f"{odd / path}: ")
        assert "\n" not in str(error)
        assert not list(tmp_path.iterdir())
    else:
        check_on_own_grid(out, odd / path)


def test_every_expectation_of_the_collection_is_tested(odd: Path) -> None:
    tested = {"predict", "equals base", "refuse", "companion", "reference", "inspect"}
    assert set(manifest().values()) == tested
    assert all((odd / path).exists() for path in manifest())
    assert set(CHOSEN) <= set(manifest())


def link_all(odd: Path, folder: Path) -> dict[str, str]:
    """Links every small file and every series of the collection under a name of its own; gives path by link."""
    links: dict[str, str] = {}
    linked = set()
    for number, path in enumerate(path for path in manifest() if not path.startswith(LARGE)):
        source = (odd / path).parent if path.startswith("dicom/ge-tilt") else odd / path
        if source not in linked and manifest()[path] in ("predict", "equals base", "refuse"):
            linked.add(source)
            link = folder / f"{number:03d}-{source.name}"
            link.symlink_to(source)
            for half in source.parent.glob(f"{source.name.split('.')[0]}.img*"):
                (folder / f"{number:03d}-{half.name}").symlink_to(half)
            links[str(link)] = path
    return links


def test_whole_collection_in_one_call_gives_each_file_what_it_deserves(
    model: Path, odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    links = link_all(odd, folder)
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(model), *links, "--out", str(tmp_path / "out"), "--quiet"])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    refused = [line.split(": ")[1] for line in lines if line.startswith("medmom: ")]
    assert len(refused) == len(lines), "every line is ours"
    assert sorted(refused) == sorted(link for link, path in links.items() if manifest()[path] == "refuse")
    for link in set(links) - set(refused):
        assert (tmp_path / "out" / f"{stem(link)}.nii.gz").is_file()
        assert (tmp_path / "out" / f"{stem(link)}.json").is_file()
    for link in refused:
        assert not list((tmp_path / "out").glob(f"{stem(link)}.*"))
