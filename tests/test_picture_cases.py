from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save_image
from tiny_pictures import exif

from medmom.data.case import find_cases, read_case
from medmom.data.casefiles import CaseFiles
from medmom.data.files import read_image, read_label
from medmom.data.inspect import Inspection, format_inspection, inspect_folder
from medmom.data.layouts import read_layout
from medmom.errors import MedmomError
from medmom.evaluation.overlay import Shown, cut_picture, draw_planes, read_planes
from medmom.evaluation.report import write_report
from medmom.evaluation.scores import evaluate, format_scores
from medmom.inference.inputs import find_inputs
from medmom.inference.outputs import plan_outputs, write_prediction
from medmom.labels import Labels

LABELS = Labels(("background", "polyp"), (0, 1))
DATASET = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "polyp": 1}}
SIZE = (24, 16)
"""Columns and rows."""


def colours(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def disc(radius: int = 5, value: int = 255) -> np.ndarray:
    rows, columns = np.indices(SIZE[::-1])
    return np.where((rows - 7) ** 2 + (columns - 12) ** 2 < radius**2, value, 0).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def make(folder: Path, *, dataset: object = DATASET, masks: str = "masks", suffix: str = ".jpg") -> Path:
    for k in range(3):
        save(folder / f"images/frame_{k:04d}{suffix}", colours(k))
        save(folder / f"{masks}/frame_{k:04d}.png", disc(4 + k))
    if dataset:
        (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


@pytest.mark.parametrize("masks", ["masks", "labels"])
def test_images_and_masks_of_other_suffixes_are_paired(masks: str, tmp_path: Path) -> None:
    folder = find_cases(make(tmp_path, masks=masks))
    assert [case.name for case in folder.cases] == ["frame_0000", "frame_0001", "frame_0002"]
    assert folder.cases[1].images == (tmp_path / "images/frame_0001.jpg",)
    assert folder.cases[1].label == tmp_path / masks / "frame_0001.png"
    assert folder.channels == ("R", "G", "B")
    assert folder.unused == ()


def test_case_has_three_channels_and_class_numbers(tmp_path: Path) -> None:
    folder = find_cases(make(tmp_path))
    case = read_case(folder.cases[0], folder.labels)
    assert case.image.shape == (3, *SIZE, 1)
    assert case.label is not None
    np.testing.assert_array_equal(case.label[..., 0].T, disc(4) == 255)


def test_labels_without_pictures_give_way_to_masks(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/frame_0000.txt").write_text("0 0.5 0.5 0.1 0.1")
    assert find_cases(tmp_path).cases[0].label == tmp_path / "masks/frame_0000.png"


def test_two_folders_of_label_maps_are_refused(tmp_path: Path) -> None:
    make(make(tmp_path), masks="labels")
    with pytest.raises(MedmomError, match="masks: labels beside it holds label maps too"):
        find_cases(tmp_path)


@pytest.mark.parametrize("is_grey", [True, False])
def test_pictures_without_dataset_json_have_plain_labels(is_grey: bool, tmp_path: Path) -> None:
    make(tmp_path, dataset=None)
    if is_grey:
        for path in (tmp_path / "images").iterdir():
            save(path, colours(0)[..., 0])
    layout = read_layout(tmp_path)
    assert layout.dataset.labels == Labels(("background", "foreground"), (0, 1))
    assert layout.dataset.channels == (("grey",) if is_grey else ("R", "G", "B"))
    assert layout.notes[0].startswith("no dataset.json: black (0) in masks is background")


def test_first_picture_that_can_be_read_says_the_channels(tmp_path: Path) -> None:
    make(tmp_path, dataset=None, suffix=".png")
    (tmp_path / "images/frame_0000.png").write_bytes(b"")
    save(tmp_path / "images/frame_0001.png", colours(0)[..., 0])
    assert read_layout(tmp_path).dataset.channels == ("grey",)


def test_volumes_without_dataset_json_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.nii.gz")
    save(tmp_path / "images/b.png", colours(0))
    with pytest.raises(MedmomError, match=r"dataset\.json: no such file"):
        find_cases(tmp_path)


def test_raw_folder_of_nnunet_has_one_colour_file_a_case(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"imagesTr/{name}_0000.png", colours(0))
        save(tmp_path / f"labelsTr/{name}.png", disc(value=1))
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET))
    cases = find_cases(tmp_path).cases
    assert [(case.name, [path.name for path in case.images]) for case in cases] == [
        ("a", ["a_0000.png"]),
        ("b", ["b_0000.png"]),
    ]
    assert [case.label is not None for case in cases] == [True, True]


def test_raw_folder_of_nnunet_with_a_file_a_channel_names_the_missing_one(tmp_path: Path) -> None:
    for channel in (0, 2):
        save(tmp_path / f"imagesTr/a_{channel:04d}.png", colours(0)[..., channel])
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET))
    (case,) = find_cases(tmp_path).cases
    assert [path.name for path in case.images] == ["a_0000.png", "a_0001.png", "a_0002.png"]


def names(cases: list[CaseFiles]) -> list[tuple[str, int]]:
    return [(case.name, len(case.images)) for case in cases]


def test_folder_of_pictures_and_volumes_is_one_list_of_inputs(tmp_path: Path) -> None:
    save(tmp_path / "a.png", colours(0))
    save_image(tmp_path / "b.nii.gz")
    assert names(find_inputs([tmp_path], 1)) == [("a", 1), ("b", 1)]
    assert names(find_inputs([f"{tmp_path}/*.png"], 3)) == [("a", 1)]


@pytest.mark.parametrize("num_channels", [1, 3])
def test_frames_of_a_film_are_cases_of_their_own(num_channels: int, tmp_path: Path) -> None:
    for film in "ab":
        for k in range(3):
            save(tmp_path / f"{film}_{k:04d}.png", colours(k))
    assert len(find_inputs([tmp_path], num_channels)) == 6


def test_grey_files_of_three_channels_are_one_case(tmp_path: Path) -> None:
    for k in range(3):
        save(tmp_path / f"a_{k:04d}.png", colours(0)[..., k])
    assert names(find_inputs([tmp_path], 3)) == [("a", 3)]
    assert names(find_inputs([tmp_path / "a_0001.png"], 3)) == [("a_0001", 1)]


def test_colour_files_with_channel_number_lose_it(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}_0000.png", colours(0))
    assert names(find_inputs([tmp_path], 3)) == [("a", 1), ("b", 1)]


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(MedmomError, match="no NIfTI image and no picture in this folder"):
        find_inputs([tmp_path], 3)


def test_predictions_have_the_kind_of_their_images(tmp_path: Path) -> None:
    save(tmp_path / "in/a.jpg", colours(0))
    save_image(tmp_path / "in/b.nii.gz")
    outputs = plan_outputs(find_inputs([tmp_path / "in"], 1), tmp_path / "out")
    assert [path.name for path in outputs.predictions] == ["a.png", "b.nii.gz"]


@pytest.mark.parametrize(
    ("image", "out", "text"),
    [
        ("a.jpg", "m.nii.gz", r"label maps are written as \.png for a picture such as a\.jpg"),
        ("a.nii.gz", "m.png", r"label maps are written as \.nii\.gz or \.nii for a NIfTI image such as a\.nii\.gz"),
        ("a.jpg", "m.jpg", r"label maps are written as \.nii\.gz or \.nii, of pictures as \.png"),
        ("a.jpg", "m.tif", r"label maps are written as \.nii\.gz or \.nii, of pictures as \.png"),
    ],
)
def test_output_of_another_kind_is_refused(image: str, out: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / image
    _ = save_image(path) if image.endswith(".gz") else save(path, colours(0))
    with pytest.raises(MedmomError, match=rf"{out}: {text}"):
        plan_outputs(find_inputs([path], 1), tmp_path / out)
    assert not (tmp_path / out).exists()


def predict_discs(folder: Path, out: Path, radius: int) -> None:
    """Writes what predict would, of a model that finds a disc everywhere."""
    cases = find_inputs([folder / "images"], 3)
    for case, path in zip(cases, plan_outputs(cases, out).predictions, strict=True):
        label = disc(radius, 1).T[..., None]
        write_prediction(path, label, LABELS, read_image(case.images[0]), {"labels": LABELS.as_dict(), "model": "m"})


def test_written_masks_score_against_black_and_white_references(tmp_path: Path) -> None:
    predict_discs(make(tmp_path / "data"), tmp_path / "out", radius=5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:2] == ["frame_0000.json", "frame_0000.png"]
    scores = evaluate(tmp_path / "out", tmp_path / "data")
    dice = [case["scores"]["polyp"]["dice"] for case in scores["cases"]]
    sizes = [int((disc(radius) > 0).sum()) for radius in (4, 5, 6)]
    assert dice == pytest.approx([2 * min(size, sizes[1]) / (size + sizes[1]) for size in sizes])
    assert scores["cases"][1]["scores"]["polyp"]["hd95_mm"] == 0
    assert scores["cases"][0]["scores"]["polyp"]["hd95_mm"] == pytest.approx(1, abs=0.5)


def test_distances_of_pictures_are_said_to_be_in_pixels(tmp_path: Path) -> None:
    predict_discs(make(tmp_path / "data"), tmp_path / "out", radius=5)
    scores = evaluate(tmp_path / "out", tmp_path / "data/masks")
    assert scores["distance_unit"] == "pixels"
    assert "in pixels" in scores["definitions"]["hd95_mm"]
    assert "within 2 pixels" in scores["definitions"]["nsd"]
    assert "hd95_mm and the tolerance of nsd are in pixels" in format_scores(scores)


def test_missed_picture_scores_the_diagonal_in_pixels(tmp_path: Path) -> None:
    predict_discs(make(tmp_path / "data"), tmp_path / "out", radius=5)
    (tmp_path / "out/frame_0002.png").unlink()
    missed = evaluate(tmp_path / "out", tmp_path / "data")["cases"][2]
    assert missed["missing"]
    assert missed["scores"]["polyp"]["hd95_mm"] == pytest.approx(np.hypot(SIZE[0] - 1, SIZE[1] - 1))


def test_masks_without_class_names_score_whatever_their_white(tmp_path: Path) -> None:
    save(tmp_path / "found/a.png", disc(5, 1))
    save(tmp_path / "drawn/a.png", disc(5, 255))
    scores = evaluate(tmp_path / "found", tmp_path / "drawn")
    assert scores["classes"]["1"]["dice"]["mean"] == 1
    assert list(scores["classes"]) == ["1"]


def test_prediction_of_another_size_is_one_line(tmp_path: Path) -> None:
    predict_discs(make(tmp_path / "data"), tmp_path / "out", radius=5)
    wrong = save(tmp_path / "out/frame_0001.png", disc()[:-2])
    reference = tmp_path / "data/masks/frame_0001.png"
    with pytest.raises(MedmomError) as caught:
        evaluate(tmp_path / "out", tmp_path / "data")
    assert str(caught.value) == f"{wrong}: 24x14 pixels, but {reference} has 24x16. Save both at one size."


def test_grey_edges_of_a_reference_are_refused_in_evaluation(tmp_path: Path) -> None:
    predict_discs(make(tmp_path / "data"), tmp_path / "out", radius=5)
    mask = disc()
    mask[0, 0] = 100
    save(tmp_path / "data/masks/frame_0001.png", mask)
    with pytest.raises(MedmomError, match=r"frame_0001\.png: 1 pixels are neither black nor white, such as 100"):
        evaluate(tmp_path / "out", tmp_path / "data")


SHOWN = Shown(LABELS, LABELS, ("polyp",))


def test_picture_is_shown_upright_whole_and_in_its_colours(tmp_path: Path) -> None:
    pixels = colours(0)
    pixels[0, 0], pixels[0, 1] = 0, 255
    image = save(tmp_path / "a.png", pixels)
    (plane,) = read_planes(image, save(tmp_path / "p.png", disc(3, 1)), save(tmp_path / "r.png", disc(5)), SHOWN)
    np.testing.assert_allclose(plane.image, pixels / 255, atol=1e-6)
    np.testing.assert_array_equal(plane.prediction, disc(3, 1))
    np.testing.assert_array_equal(plane.reference, disc(5, 1))
    assert (plane.letters, plane.size) == ("", SIZE)
    with Image.open(tmp_path / "a.png") as _:
        assert draw_planes([plane], LABELS).startswith(b"\x89PNG")


def test_turned_picture_is_shown_upright(tmp_path: Path) -> None:
    Image.fromarray(colours(0)).save(tmp_path / "a.jpg", exif=exif(6))
    mask = save(tmp_path / "m.png", np.rot90(disc(5, 1), -1))
    (plane,) = read_planes(tmp_path / "a.jpg", mask, mask, SHOWN)
    assert plane.image.shape == (*SIZE, 3)
    np.testing.assert_array_equal(plane.reference, np.rot90(disc(5, 1), -1))


def test_grey_picture_on_any_scale_is_shown_from_black_to_white() -> None:
    image = np.linspace(-2, 3, 12, dtype=np.float32).reshape(1, 4, 3, 1)
    empty = np.zeros((4, 3, 1), np.uint8)
    plane = cut_picture(image, empty, empty)
    assert plane.image.shape == (3, 4, 3)
    assert (plane.image.min(), plane.image.max()) == (0, 1)


def test_report_holds_pictures_of_pictures(tmp_path: Path) -> None:
    predict_discs(make(tmp_path / "data"), tmp_path / "out", radius=5)
    scores = evaluate(tmp_path / "out", tmp_path / "data")
    (tmp_path / "out/scores.json").write_text(json.dumps(scores))
    write_report(tmp_path / "out", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert text.count("data:image/png;base64") == 3
    assert "in pixels" in text


def faults(inspection: Inspection) -> list[str]:
    return [fault.text for fault in inspection.faults]


def test_inspection_tells_size_colour_bits_and_share(tmp_path: Path) -> None:
    inspection = inspect_folder(make(tmp_path, suffix=".png"))
    text = format_inspection(inspection)
    assert faults(inspection) == []
    row = next(line for line in text.splitlines() if line.startswith("frame_0001")).split()
    share = 100 * float((disc(5) > 0).mean())
    assert row[:5] == ["frame_0001", "-", "24x16", "colour", "8"]
    assert row[-1] == f"{share:.3g}"
    assert "polyp %" in text
    assert "volumes in ml" not in text


def test_inspection_proposes_a_size_and_a_patch_of_two_edges(tmp_path: Path) -> None:
    for k, (columns, rows) in enumerate([(640, 480), (600, 480), (700, 500)]):
        save(tmp_path / f"images/a{k}.png", colours(k, (columns, rows)))
        save(tmp_path / f"masks/a{k}.png", np.pad(disc(), ((0, rows - SIZE[1]), (0, columns - SIZE[0]))))
    inspection = inspect_folder(tmp_path)
    assert inspection.proposal
    preparation = inspection.proposal.preparation
    assert (preparation.spacing, preparation.intensity, preparation.colour) == (None, "unit", "own")
    assert preparation.size == inspection.proposal.patches[0].patch
    for plan in inspection.proposal.patches:
        assert np.prod(plan.patch) <= plan.budget
        assert all(edge % 16 == 0 for edge in plan.patch)
    text = format_inspection(inspection)
    assert "the median picture has 640 x 480 pixels (they range from 600 x 480 to 700 x 500)" in text
    assert "preparation.size and data.patch: [" in text
    assert "why colour: no pictures are grey" in text
    assert "preparation.spacing" not in text


def test_small_pictures_keep_their_size(tmp_path: Path) -> None:
    inspection = inspect_folder(make(tmp_path))
    assert inspection.proposal
    assert inspection.proposal.patches[0].patch == (24, 16)


def test_inspection_names_every_fault(tmp_path: Path) -> None:
    make(tmp_path, suffix=".png")
    save(tmp_path / "images/frame_0003.png", colours(0)[..., 0])
    save(tmp_path / "masks/frame_0003.png", disc()[:-1])
    save(tmp_path / "images/frame_0004.png", colours(4))
    save(tmp_path / "masks/frame_0004.png", np.zeros_like(disc()))
    save(tmp_path / "masks/frame_0009.png", disc())
    (tmp_path / "images/frame_0000.png").write_bytes(b"")
    edged = disc()
    edged[0] = 8
    save(tmp_path / "masks/frame_0001.png", edged)
    found = faults(inspect_folder(tmp_path))
    expected = [
        "images/frame_0000.png: the file is empty",
        "masks/frame_0001.png: 24 pixels are neither black nor white, such as 8",
        "images/frame_0003.png: the picture is grey, but the channels are R, G, B. Set preparation.colour to rgb",
        "masks/frame_0003.png: 24x15 pixels, but",
        "masks/frame_0004.png: no voxel of any annotated class (polyp)",
        "masks/frame_0009.png: a label map without an image",
    ]
    assert len(found) == len(expected)
    for text, start in zip(found, expected, strict=True):
        assert text.startswith(str(tmp_path / start)), text


def test_mixed_colours_are_proposed_as_rgb(tmp_path: Path) -> None:
    make(tmp_path, suffix=".png")
    save(tmp_path / "images/frame_0000.png", colours(0)[..., 0])
    inspection = inspect_folder(tmp_path)
    assert inspection.proposal
    assert inspection.proposal.preparation.colour == "rgb"
    assert "colour: 1 of the 3 pictures are grey" in format_inspection(inspection)


def test_real_polyps_are_found_and_read(shared_data: Path) -> None:
    folder = shared_data / "polyps-kvasir-seg/public"
    if not folder.is_dir():
        pytest.skip("no polyps beside the checkout")
    found = find_cases(folder, group="near_duplicate_group")
    assert len(found.cases) == 850
    assert found.notes == found.unused == ()
    fractions = {row["name"]: float(row["polyp_fraction"]) for row in read_layout(folder).rows.values()}
    for case in found.cases[::170]:
        assert read_image(case.images[0]).array.shape == (3, 352, 352, 1)
        assert case.label is not None
        label = read_label(case.label, found.labels).array
        assert float(label.mean()) == pytest.approx(fractions[case.name], abs=1e-4)
