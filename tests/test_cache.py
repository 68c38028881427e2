from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from meanwhile import before_each
from tiny_cases import CT, LABELS, prepare_case, stored_label, write_case

from medmom.data import cache, transforms
from medmom.data.cache import CaseCache, PreparedCase
from medmom.data.case import read_case
from medmom.data.casefiles import CaseFiles
from medmom.data.preparation import Preparation, fit_preparation, prepare
from medmom.errors import MedmomError
from medmom.labels import IGNORE, Labels


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that were read from their sources, in order."""
    names: list[str] = []

    def counted(files: CaseFiles, labels: Labels) -> Any:
        names.append(files.name)
        return read_case(files, labels)

    monkeypatch.setattr(cache, "read_case", counted)
    monkeypatch.setattr(transforms, "read_case", counted)
    return names


@pytest.fixture
def files(tmp_path: Path) -> CaseFiles:
    return write_case(tmp_path / "data", "a")


def arrays_of(prepared: PreparedCase) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prepared.entry.folder.iterdir()}


def test_a_prepared_case_equals_prepare_of_what_is_read(tmp_path: Path, files: CaseFiles) -> None:
    preparation = Preparation((2.0, 1.5, 1.0), "zscore")
    case, _, _ = prepare_case(tmp_path, files, preparation).open()
    wanted = prepare(read_case(files, LABELS), preparation)
    np.testing.assert_array_equal(case.image, wanted.image)
    np.testing.assert_array_equal(case.label, wanted.label)
    assert case.geometry.is_close(wanted.geometry, tolerance=0)
    assert (case.name, case.annotated) == ("a", (True, True, True))
    assert (case.image.dtype, case.label.dtype) == (np.float32, np.uint8)  # type: ignore[union-attr]


def test_a_second_time_reads_and_does_not_build(tmp_path: Path, files: CaseFiles, built: list[str]) -> None:
    first = prepare_case(tmp_path, files)
    before = arrays_of(first)
    assert built == ["a"]
    second = prepare_case(tmp_path, files)
    assert built == ["a"]
    assert second == first
    assert arrays_of(second) == before


def test_a_survey_is_kept_too(tmp_path: Path, files: CaseFiles, built: list[str]) -> None:
    first, second = (CaseCache(tmp_path / "cache", LABELS, quiet=True).survey([files])["a"] for _ in range(2))
    assert built == ["a"]
    assert first.counts == second.counts
    np.testing.assert_array_equal(first.foreground, second.foreground)


def test_cases_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    cases = [write_case(tmp_path, name) for name in ("b", "c", "a")]
    prepared = CaseCache(tmp_path / "cache", LABELS, quiet=True).prepare(cases, CT)
    assert [case.name for case in prepared] == ["b", "c", "a"]
    assert [case.open()[0].name for case in prepared] == ["b", "c", "a"]


@pytest.mark.parametrize("name", ["image", "label", "affine", "annotated", "foreground", "anywhere"])
def test_a_changed_byte_is_found_and_the_entry_rebuilt(
    name: str, tmp_path: Path, files: CaseFiles, built: list[str]
) -> None:
    prepared = prepare_case(tmp_path, files)
    before = arrays_of(prepared)
    path = prepared.entry.folder / f"{name}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not prepared.entry.is_sound()
    assert arrays_of(prepare_case(tmp_path, files)) == before
    assert built == ["a", "a"]


@pytest.mark.parametrize("text", ["", "{", "null", "3", "[]", "{}", '"x"', '{"image": 3}', '{"other": "abc"}', "\x00"])
def test_a_faulty_index_is_rebuilt(text: str, tmp_path: Path, files: CaseFiles, built: list[str]) -> None:
    prepared = prepare_case(tmp_path, files)
    before = arrays_of(prepared)
    (prepared.entry.folder / "index.json").write_text(text)
    assert arrays_of(prepare_case(tmp_path, files)) == before
    assert built == ["a", "a"]


@pytest.mark.parametrize("name", ["image.npy", "index.json"])
def test_a_missing_array_is_rebuilt(name: str, tmp_path: Path, files: CaseFiles) -> None:
    prepared = prepare_case(tmp_path, files)
    before = arrays_of(prepared)
    (prepared.entry.folder / name).unlink()
    assert arrays_of(prepare_case(tmp_path, files)) == before


def test_a_truncated_array_is_rebuilt(tmp_path: Path, files: CaseFiles) -> None:
    prepared = prepare_case(tmp_path, files)
    before = arrays_of(prepared)
    path = prepared.entry.folder / "image.npy"
    path.write_bytes(path.read_bytes()[:50])
    assert arrays_of(prepare_case(tmp_path, files)) == before


@pytest.mark.parametrize("which", ["image", "label"])
def test_a_touched_source_gives_another_entry(which: str, tmp_path: Path, files: CaseFiles) -> None:
    first = prepare_case(tmp_path, files)
    path = files.images[0] if which == "image" else files.label
    assert path is not None
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert prepare_case(tmp_path, files).entry != first.entry


def test_a_changed_source_is_never_served_from_the_cache(tmp_path: Path, files: CaseFiles) -> None:
    prepare_case(tmp_path, files)
    write_case(tmp_path / "data", "a", label=np.flip(stored_label(), 1).copy())
    case, _, _ = prepare_case(tmp_path, files).open()
    np.testing.assert_array_equal(case.label, prepare(read_case(files, LABELS), CT).label)


def test_another_half_of_a_pair_gives_another_entry(tmp_path: Path) -> None:
    single = write_case(tmp_path / "data", "a")
    nib.save(nib.Nifti1Pair(np.arange(1680, dtype=np.float32).reshape(14, 12, 10), np.eye(4)), tmp_path / "pair.hdr")
    pair = CaseFiles("a", (tmp_path / "pair.hdr",), single.label, "a")
    first = prepare_case(tmp_path, pair)
    os.utime(tmp_path / "pair.img", ns=(0, 1))
    assert prepare_case(tmp_path, pair).entry != first.entry


@pytest.mark.parametrize(
    "other",
    [
        Preparation((1.0, 1.0, 2.0), "ct", (-1000.0, 1000.0), 0.0, 100.0),
        Preparation((1.0, 1.0, 1.0), "ct", (-1000.0, 1000.0), 1.0, 100.0),
        Preparation((1.0, 1.0, 1.0), "zscore"),
        Preparation(None, "zscore"),
    ],
)
def test_another_preparation_gives_another_entry(other: Preparation, tmp_path: Path, files: CaseFiles) -> None:
    assert prepare_case(tmp_path, files, other).entry != prepare_case(tmp_path, files).entry


def test_other_labels_or_annotated_classes_give_another_entry(tmp_path: Path, files: CaseFiles) -> None:
    first = prepare_case(tmp_path, files).entry
    renamed = Labels(("background", "lung", "tumour"), LABELS.values, LABELS.ignore)
    (other,) = CaseCache(tmp_path / "cache", renamed, quiet=True).prepare([files], CT)
    assert other.entry != first
    partial = CaseFiles("a", files.images, files.label, "a", annotated=("liver",))
    prepared = prepare_case(tmp_path, partial)
    assert prepared.entry != first
    assert prepared.open()[0].annotated == (True, True, False)


def test_another_layout_gives_another_entry(tmp_path: Path, files: CaseFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_case(tmp_path, files)
    monkeypatch.setattr(cache, "LAYOUT", cache.LAYOUT + 1)
    assert prepare_case(tmp_path, files).entry != first.entry


def test_a_half_written_draft_is_never_used(
    tmp_path: Path, files: CaseFiles, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_case(tmp_path / "elsewhere", files)
    save = np.save

    def fail(path: Path, array: np.ndarray, **options: Any) -> None:
        save(path, array, **options)
        if path.stem == "label":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fail)
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)  # as if the process were gone at once
        with pytest.raises(KeyboardInterrupt):
            prepare_case(tmp_path, files)
    folder = tmp_path / "cache" / "cases"
    (draft,) = folder.iterdir()
    assert draft.name.startswith(".draft-")
    assert arrays_of(prepare_case(tmp_path, files)) == arrays_of(whole)
    assert built == ["a"] * 3


def test_a_failed_build_leaves_nothing(tmp_path: Path, files: CaseFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, array: np.ndarray, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(MedmomError, match=r"cases: the cache cannot be written \(No space left on device\); .*--data"):
        prepare_case(tmp_path, files)
    assert list((tmp_path / "cache" / "cases").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path, files: CaseFiles) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(MedmomError, match=r"the cache cannot be written \(.+\); .* --data\.cache\.$"):
        prepare_case(tmp_path, files)


def inode(prepared: PreparedCase) -> int:
    return prepared.entry.folder.stat().st_ino


def test_an_entry_that_another_run_finished_first_is_kept(
    tmp_path: Path, files: CaseFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = before_each(monkeypatch, transforms, "read_case", lambda: inode(prepare_case(tmp_path, files)))
    prepared = prepare_case(tmp_path, files)
    assert inode(prepared) == others[0]
    assert [path.name for path in prepared.entry.folder.parent.iterdir()] == [prepared.entry.folder.name]


@pytest.mark.parametrize("damaged", [False, True])
def test_two_runs_that_write_an_entry_at_once_both_go_on(
    tmp_path: Path, files: CaseFiles, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """The other run's entry appears between this one's last look and its rename."""
    folder = prepare_case(tmp_path, files).entry.folder
    (folder / "image.npy").write_bytes(b"damaged")
    if not damaged:
        shutil.rmtree(folder)
    others = before_each(monkeypatch, Path, "rename", lambda: inode(prepare_case(tmp_path, files)))
    mine = prepare_case(tmp_path, files)
    assert mine.entry.is_sound()
    assert inode(mine) == others[0]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_same_scan_under_two_names_is_built_without_quarrel(tmp_path: Path, files: CaseFiles) -> None:
    twins = [CaseFiles(f"twin {k}", files.images, files.label, "a") for k in range(8)]
    prepared = CaseCache(tmp_path / "cache", LABELS, quiet=True).prepare(twins, CT)
    assert len({case.entry for case in prepared}) == 1
    assert len({case.fingerprint for case in prepared}) == 1
    assert prepared[0].entry.is_sound()


def test_another_scan_has_another_fingerprint(tmp_path: Path, files: CaseFiles) -> None:
    other = write_case(tmp_path, "other name")
    copy = CaseFiles("copy", (Path(shutil.copy(files.images[0], tmp_path / "copy.nii.gz")),), files.label, "copy")
    first, second, third = (prepare_case(tmp_path, each).fingerprint for each in (files, other, copy))
    assert first != second
    assert first == third  # the same voxels under another path


def test_a_missing_source_is_named(tmp_path: Path, files: CaseFiles) -> None:
    files.images[0].unlink()
    with pytest.raises(MedmomError, match=r"a\.nii\.gz: No such file"):
        prepare_case(tmp_path, files)


def test_a_faulty_source_is_refused_and_leaves_no_entry(tmp_path: Path) -> None:
    files = write_case(tmp_path, "bad", label=np.full((4, 4, 4), 7, np.uint8))
    with pytest.raises(MedmomError, match=r"bad-label\.nii\.gz: label value 7"):
        prepare_case(tmp_path, files)
    assert list(tmp_path.glob("cache/cases/*")) == []


def test_a_case_without_label_is_refused(tmp_path: Path, files: CaseFiles) -> None:
    with pytest.raises(MedmomError, match="case a has no label"):
        prepare_case(tmp_path, CaseFiles("a", files.images, None, "a"))


def test_a_case_of_which_nothing_counts_is_refused(tmp_path: Path) -> None:
    files = write_case(tmp_path, "blank", label=np.full((4, 4, 4), 9, np.uint8))
    with pytest.raises(MedmomError, match="case blank: every voxel of its label is to be ignored"):
        prepare_case(tmp_path, files)


def test_every_class_has_an_equal_share_of_foreground_places(tmp_path: Path, files: CaseFiles) -> None:
    case, foreground, _ = prepare_case(tmp_path, files).open()
    assert case.label is not None
    channels, counts = np.unique(case.label.reshape(-1)[foreground], return_counts=True)
    assert channels.tolist() == [1, 2]
    assert counts[0] == counts[1]
    places, times = np.unique(foreground[case.label.reshape(-1)[foreground] == 2], return_counts=True)
    assert len(places) == 8  # each voxel of the tumour, as often as the others
    assert times.max() - times.min() <= 1


def test_places_of_many_voxels_are_bounded(tmp_path: Path, files: CaseFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "NUM_LOCATIONS", 50)
    case, foreground, anywhere = prepare_case(tmp_path, files).open()
    assert case.label is not None
    assert np.unique(case.label.reshape(-1)[foreground], return_counts=True)[1].tolist() == [25, 25]
    assert len(anywhere) == len(set(anywhere.tolist())) == 50


def test_ignored_voxels_are_never_drawn(tmp_path: Path, files: CaseFiles) -> None:
    case, foreground, anywhere = prepare_case(tmp_path, files).open()
    assert case.label is not None
    label = case.label.reshape(-1)
    assert IGNORE in label
    assert IGNORE not in label[foreground]
    assert sorted(anywhere) == np.flatnonzero(label != IGNORE).tolist()


def test_without_foreground_places_are_anywhere(tmp_path: Path) -> None:
    files = write_case(tmp_path, "empty", label=np.zeros((4, 4, 4), np.uint8))
    _, foreground, anywhere = prepare_case(tmp_path, files).open()
    assert sorted(foreground) == sorted(anywhere) == list(range(64))


def test_arrays_are_mapped_and_not_read(tmp_path: Path, files: CaseFiles) -> None:
    prepared = prepare_case(tmp_path, files)
    case, _, _ = prepared.open()
    assert isinstance(case.image, np.memmap)
    assert isinstance(case.label, np.memmap)
    case.image[:] = 7  # copy-on-write: what a transform does stays in memory
    assert prepared.entry.is_sound()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by Linux's /proc")
def test_many_cases_do_not_use_up_file_descriptors(tmp_path: Path, files: CaseFiles) -> None:
    prepared = prepare_case(tmp_path, files)
    cases = [PreparedCase(f"case {k}", prepared.entry) for k in range(300)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    for case in cases:
        case.open()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 5


def test_a_survey_counts_classes_and_leaves_out_what_is_ignored(tmp_path: Path) -> None:
    label = stored_label()
    image = np.where(label == 4, 80, np.where(label == 1, 50, -900)).astype(np.float32)
    files = write_case(tmp_path, "a", image=image, label=label)
    survey = CaseCache(tmp_path / "cache", LABELS, quiet=True).survey([files])["a"]
    assert survey.counts == ((label == 0).sum(), (label == 1).sum(), 8)
    values, counts = np.unique(survey.foreground, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {50: (label == 1).sum(), 80: 8}
    assert survey.stratum == "1,2"


def test_unannotated_classes_are_no_part_of_a_survey(tmp_path: Path) -> None:
    files = write_case(tmp_path, "a", annotated=("tumour",))
    survey = CaseCache(tmp_path / "cache", LABELS, quiet=True).survey([files])["a"]
    assert survey.counts[1:] == (0, 8)
    assert survey.stratum == "2"


def test_ct_numbers_are_fitted_on_the_foreground_of_a_survey(tmp_path: Path) -> None:
    label = stored_label()
    image = np.full(label.shape, -1000, np.float32)  # air around does not count
    place = label > 0
    image[place] = np.random.default_rng(0).normal(60, 20, place.sum())
    files = write_case(tmp_path, "a", image=image, label=label)
    survey = CaseCache(tmp_path / "cache", LABELS, quiet=True).survey([files])["a"]
    fitted = fit_preparation(Preparation((1.0, 1.0, 1.0), "ct"), [survey.foreground])
    wanted = image[(label == 1) | (label == 4)].astype(np.float64)
    low, high = np.percentile(wanted, (0.5, 99.5))
    assert fitted.clip == pytest.approx((low, high))
    assert fitted.mean == pytest.approx(np.clip(wanted, low, high).mean())
    assert fitted.std == pytest.approx(np.clip(wanted, low, high).std())
    case, _, _ = prepare_case(tmp_path, files, fitted).open()
    assert case.label is not None
    inside = case.image[0][(case.label == 1) | (case.label == 2)]
    assert (inside.mean(), inside.std()) == pytest.approx((0, 1), abs=1e-4)


def test_an_entry_is_plain_arrays_with_their_checksums(tmp_path: Path, files: CaseFiles) -> None:
    folder = prepare_case(tmp_path, files).entry.folder
    index = json.loads((folder / "index.json").read_text())
    assert sorted(f"{name}.npy" for name in index) == sorted(path.name for path in folder.glob("*.npy"))
    assert all(np.load(path, allow_pickle=False) is not None for path in folder.glob("*.npy"))
