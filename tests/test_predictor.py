from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tiny import LABELS, save_image, save_tiny
from tiny_road import save_model

from medmom.cleanup import Cleanup
from medmom.data.files import read_image, read_label
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.inference import predictor as room
from medmom.inference.predict import predict
from medmom.inference.predictor import Predictor, Settings
from medmom.package import load_package

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0] * [0.9, 1.7, 1.2]
OBLIQUE[:3, 3] = [-31.5, 80.25, 7.125]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return save_image(tmp_path / "scan.nii.gz", (21, 18, 13), affine=OBLIQUE)


def written(model: Path, scan: Path) -> np.ndarray:
    """The label map that the command writes."""
    out = scan.parent / "by_command.nii.gz"
    predict(model, [scan], out, device="cpu", quiet=True)
    return read_label(out).array


# One image, however it is given


def test_path_nibabel_image_and_array_give_what_the_command_writes(model: Path, scan: Path) -> None:
    wanted = written(model, scan)
    predictor, image = Predictor(model, device="cpu"), nib.load(scan)
    assert len(np.unique(wanted)) > 1
    given: list[tuple[Any, ...]] = [
        (scan,),
        (str(scan),),
        ([scan],),
        (image,),
        (read_image(scan),),
        (np.asarray(image.dataobj), image.affine),
        (np.asarray(image.dataobj)[None], image.affine),
    ]
    for arguments in given:
        found = predictor(*arguments, quiet=True)
        np.testing.assert_array_equal(found.label, wanted)
        assert found.label.dtype == np.uint8


def test_prediction_is_a_nibabel_image_in_place(model: Path, scan: Path, tmp_path: Path) -> None:
    image = nib.load(scan)
    image.set_sform(image.affine, code=2)
    found = Predictor(model, device="cpu")(image, quiet=True)
    nifti = found.nifti()
    np.testing.assert_allclose(nifti.affine, image.affine, atol=1e-6)
    assert int(nifti.header["sform_code"]) == 2
    np.testing.assert_array_equal(np.asarray(nifti.dataobj), found.label)
    found.save(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(read_label(tmp_path / "labels.nii.gz").array, found.label)


def test_prediction_has_statistics_confidence_and_seconds(model: Path, scan: Path) -> None:
    found = Predictor(model, device="cpu")(scan, quiet=True)
    assert list(found.statistics) == list(LABELS.foreground)
    for name in LABELS.foreground:
        count = int((found.label == LABELS.value(name)).sum())
        assert found.statistics[name]["voxels"] == count
        assert count == 0 or 1 / 3 <= found.statistics[name]["mean_confidence"] <= 1
    assert {"read", "network", "restore"} <= found.seconds.keys()


def test_channels_of_an_array_come_first(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", channels=("FLAIR", "T1"))
    array = np.random.default_rng(0).normal(size=(2, 12, 10, 8))
    paths = []
    for k, channel in enumerate(array):
        paths.append(tmp_path / f"a_000{k}.nii.gz")
        nib.save(nib.Nifti1Image(channel.astype(np.float32), np.eye(4)), paths[-1])
    predictor = Predictor(model, device="cpu")
    found = predictor(array.astype(np.float32), np.eye(4), quiet=True)
    np.testing.assert_array_equal(found.label, predictor(paths, quiet=True).label)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((np.zeros((4, 4, 4)),), "an array has no place in space. Give its affine"),
        ((np.zeros((4, 4)), np.eye(4)), r"shape \(4, 4\) and type float64 is no image"),
        ((np.zeros((4, 4, 4), complex), np.eye(4)), "type complex128 is no image"),
        ((np.zeros((4, 4, 4)), np.eye(4)), "every voxel is 0, the image shows nothing"),
        ((np.arange(64.0).reshape(4, 4, 4), np.eye(3)), r"affine of shape \(3, 3\)"),
        ((np.arange(64.0).reshape(4, 4, 4), np.diag([1.0, 0, 1, 1])), "has no inverse"),
        ((np.where(np.arange(64).reshape(4, 4, 4) == 7, np.nan, 1), np.eye(4)), "NaN"),
        ((nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), np.eye(4)), "an affine is given besides"),
        ((3,), "an array has no place"),
    ],
)
def test_what_is_no_image_is_refused(arguments: tuple[Any, ...], told: str, model: Path) -> None:
    with pytest.raises(MedmomError, match=told):
        Predictor(model, device="cpu")(*arguments, quiet=True)


def test_given_array_is_left_as_it_is(model: Path) -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, (12, 10, 8)).astype(np.int16)
    before = array.copy()
    Predictor(model, device="cpu")(array, np.eye(4), quiet=True)
    np.testing.assert_array_equal(array, before)


# Memory


def test_budget_without_room_for_the_image_reads_it_again(
    model: Path, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = written(model, scan)
    asked = []

    def plan(*arguments: Any, image_bytes: int = 0, **options: Any) -> Any:
        asked.append(image_bytes)
        if image_bytes == 0:
            raise MedmomError("--max-ram 1GiB: too little.")
        return original(*arguments, **{**options, "max_ram": None})

    original = room.plan_stream
    monkeypatch.setattr(room, "plan_stream", plan)
    predictor = Predictor(model, device="cpu", settings=Settings(max_ram=2**30))
    given = predictor.read([scan])
    assert given.again == (scan,)
    assert given.image.array.size == 0
    found = predictor.segment(given)
    np.testing.assert_array_equal(found.label, wanted)
    assert found.image.array.shape == (1, 21, 18, 13)
    assert asked == [0, -4 * 21 * 18 * 13]
    with pytest.raises(MedmomError, match=r"^image: --max-ram 1GiB: too little"):
        predictor(nib.load(scan).get_fdata(), OBLIQUE, quiet=True)


def test_budget_that_no_plan_keeps_names_one_that_does(model: Path, scan: Path) -> None:
    with pytest.raises(MedmomError, match=r"scan\.nii\.gz: --max-ram .*needs at least .* Give --max-ram [0-9.]+GiB"):
        Predictor(model, device="cpu", settings=Settings(max_ram=2**20))(scan, quiet=True)


def test_step_down_on_the_device_happens_once(model: Path, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = written(model, scan)
    predictor = Predictor(model, device="cpu")
    given = predictor.read([scan])
    large = replace(given.plan[0], batch=4, on_device=True)
    given, seen = replace(given, plan=(large, "")), []

    def stream(*arguments: Any, **options: Any) -> Any:
        plan = arguments[2]
        seen.append((plan.batch, plan.on_device))
        if plan.batch > 1:
            raise room.torch.OutOfMemoryError("too much")
        return original(*arguments, **options)

    original = room.stream_logits
    monkeypatch.setattr(room, "stream_logits", stream)
    np.testing.assert_array_equal(predictor.segment(given).label, wanted)
    assert seen == [(4, True), (1, False)]

    def never(*_: Any, **__: Any) -> Any:
        raise room.torch.OutOfMemoryError("too much")

    monkeypatch.setattr(room, "stream_logits", never)
    with pytest.raises(MedmomError, match=r"scan\.nii\.gz: memory is too small for the .* voxels"):
        predictor.segment(given)


# What can change a label


def test_cleanup_of_the_package_is_applied(scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = load_package(save_tiny(tmp_path / "model"))
    cleaned = replace(package, cleanup=Cleanup(largest=(LABELS.foreground[0],)))
    plain = Predictor(tmp_path / "model", device="cpu")
    monkeypatch.setattr(room, "load_package", lambda _: cleaned)
    clean = Predictor(tmp_path / "model", device="cpu")
    value = LABELS.value(LABELS.foreground[0])
    before, after = (predictor(scan, quiet=True).label == value for predictor in (plain, clean))
    assert 0 < after.sum() < before.sum()
    assert before[after].all()
    assert plain.choices()["cleanup"] is None
    assert clean.choices()["cleanup"] == cleaned.cleanup.as_dict() if cleaned.cleanup else False


def test_choices_tell_all_that_can_change_a_label(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", recipe={"data": {"mirror": [0, 1]}})
    found = Predictor(model, device="cpu", settings=Settings(overlap=0.25, tta=True, skip_air=False)).choices()
    assert found == {"overlap": 0.25, "mirrors": [0, 1], "skip_air": False, "cleanup": None}


def test_air_is_skipped_in_a_ct_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ct = Preparation((1.0, 1.0, 1.0), "ct", clip=(-1000.0, 1000.0), mean=0.0, std=500.0)
    model = save_tiny(tmp_path / "model", preparation=ct)
    array = np.full((48, 16, 16), -1000.0)
    array[:12] = np.random.default_rng(0).normal(0, 100, (12, 16, 16))
    bodies: list[Any] = []

    def stream(*arguments: Any, **options: Any) -> Any:
        bodies.append(options["body"])
        return original(*arguments, **options)

    original = room.stream_logits
    monkeypatch.setattr(room, "stream_logits", stream)
    for skip_air in (True, False):
        Predictor(model, device="cpu", settings=Settings(skip_air=skip_air))(array, np.eye(4), quiet=True)
    assert bodies[0] is not None and not bodies[0][-16:].any() and bodies[0][:12].all()
    assert bodies[1] is None


def test_image_whose_header_makes_it_a_thousand_times_larger_is_refused(tmp_path: Path) -> None:
    predictor = Predictor(save_tiny(tmp_path / "model"))
    edges = np.array(predictor.package.preparation.spacing)
    image = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32)
    predictor(image, np.diag([*(9 * edges), 1.0]), quiet=True)
    with pytest.raises(
        MedmomError, match=r"4 x 4 x 4 voxels of .* mm would be 44 x 44 x 44 voxels .*check the spacing"
    ):
        predictor(image, np.diag([*(11 * edges), 1.0]), quiet=True)
