from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medmom.errors import MedmomError
from medmom.evaluation.curves import read_curves
from medmom.evaluation.overlay import Shown, draw_planes, read_planes
from medmom.evaluation.report import write_report
from medmom.evaluation.scores import evaluate
from medmom.labels import Labels

LABELS = Labels(("background", "liver", "colon"), (0, 1, 2))
SHAPE = (24, 20, 10)
AFFINE = np.array([[-2.0, 0, 0, 5], [0, 2, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1]])
# Elements that fetch, run or send something, were they there.
ACTIVE = {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video", "a", "svg"}
FETCHING = {"src", "srcset", "href", "data", "action", "poster", "background", "cite"}


class Page(HTMLParser):
    """A report as a browser takes it apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.styles = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in FETCHING]
        self.styles += " ".join(value or "" for name, value in attrs if name == "style")
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["style"]:
            self.styles += data
        self.text += data

    @property
    def pictures(self) -> list[bytes]:
        head = "data:image/png;base64,"
        return [base64.b64decode(text.removeprefix(head), validate=True) for text in self.addresses]


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with scores of four cases, one of them missed."""
    folder = tmp_path_factory.mktemp("runs") / "liver-1"
    rng = np.random.default_rng(0)
    cases = []
    for k in range(4):
        reference = np.zeros(SHAPE, np.uint8)
        reference[4:14, 5:15, 2:8], reference[16:20, 5:10, 3:7] = 1, 2
        prediction = np.roll(reference, k, 0)
        image = (rng.normal(0, 20, SHAPE) + 100 * reference).astype(np.float32)
        image_path = save(folder / "scans" / f"case{k}.nii.gz", image)
        reference_path = save(folder / "drawn" / f"case{k}.nii.gz", reference)
        if k < 3:
            save(folder / "predictions" / f"case{k}.nii.gz", prediction)
        cases.append({"name": f"case{k}", "patient": f"p{k // 2}", "image": [str(image_path)],
                      "prediction": f"case{k}.nii.gz" if k < 3 else None, "reference": str(reference_path),
                      "error": None if k < 3 else "scan is truncated"})  # fmt: skip
    listed = {"labels": LABELS.as_dict(), "model": {"name": "mom3d_xs"}, "cases": cases}
    (folder / "predictions" / "cases.json").write_text(json.dumps(listed))
    scores = evaluate(folder / "predictions")
    (folder / "predictions" / "scores.json").write_text(json.dumps(scores))
    header = "epoch,step,train_loss,val_dice,val_dice_liver,val_dice_colon,lr\n"
    rows = [f"{k // 10},{k},{1 / (k + 1):.3f},,,,0.01\n" for k in range(60)]
    rows += ["5,59,,0.8,0.9,0.7,\n", "3,30,,0.6,0.7,0.5,\n"]
    (folder / "metrics.csv").write_text(header + "".join(rows))
    (folder / "recipe.yaml").write_text("model: {preset: mom3d_xs}\n")
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    write_report(run, run / "report.html")
    return Page(run / "report.html")


def test_a_report_needs_no_address_and_no_script(page: Page) -> None:
    assert not ACTIVE & set(page.tags)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page.source)
    assert "http" not in rest
    assert "//" not in rest


def test_every_picture_of_a_report_decodes(page: Page) -> None:
    # Three overlays, and the curves for a light and a dark page.
    assert len(page.pictures) == 5
    for picture in page.pictures:
        with Image.open(io.BytesIO(picture)) as image:
            image.load()
            assert image.width > 1000


def test_a_report_shows_scores_cases_definitions_and_recipe(run: Path, page: Page) -> None:
    scores = json.loads((run / "predictions" / "scores.json").read_text())
    mean = scores["mean"]["dice"]
    for text in (
        "liver-1",
        f"{mean['mean']:.3f}",
        f"{mean['low']:.3f} – {mean['high']:.3f}",
        "4 cases of 2 patients",
        "1 without a prediction, counted as missed",
        "scan is truncated",
        "Training",
        "preset: mom3d_xs",
        *scores["definitions"].values(),
    ):
        assert text in page.text, text
    order = [page.text.index(f"case{k}", page.text.index("worst first")) for k in (3, 2, 1, 0)]
    assert order == sorted(order)


def test_a_report_is_made_of_a_scores_file_alone_too(run: Path, tmp_path: Path) -> None:
    write_report(run / "predictions" / "scores.json", tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert len(page.pictures) == 3
    assert "liver-1: predictions" in page.text


def test_names_that_look_like_markup_are_shown_as_text(run: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    scores = json.loads((run / "predictions" / "scores.json").read_text())
    for key in ("classes", "num_both_empty"):
        scores[key] = {evil if name == "colon" else name: value for name, value in scores[key].items()}
    for key in ("labels", "reference_labels"):
        scores[key]["names"][2] = evil
    for case in scores["cases"]:
        case["scores"] = {evil if name == "colon" else name: value for name, value in case["scores"].items()}
        case.update(name=f"{case['name']}{evil}", patient='"><img src=x onerror=alert(1)>')
    scores["cases"][3]["error"] = scores["notes"] = scores["model"]["name"] = evil
    scores["notes"] = [evil]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert not ACTIVE & set(page.tags)
    assert len(page.pictures) == 3
    assert evil in page.text


def test_without_images_there_are_tables_and_a_line_says_so(run: Path, tmp_path: Path) -> None:
    scores = json.loads((run / "predictions" / "scores.json").read_text())
    for case in scores["cases"]:
        case["image"] = None
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    write_report(tmp_path / "scores.json", tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.pictures == []
    assert "the images were not found" in page.text
    write_report(tmp_path / "scores.json", tmp_path / "report.html", images=run / "scans")
    assert len(Page(tmp_path / "report.html").pictures) == 3


def test_an_image_on_another_grid_is_left_out_with_its_reason(run: Path, tmp_path: Path) -> None:
    scores = json.loads((run / "predictions" / "scores.json").read_text())
    wrong = save(tmp_path / "secret-folder" / "scan.nii.gz", np.arange(27, dtype=np.float32).reshape(3, 3, 3))
    scores["cases"][0]["image"] = str(wrong)
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    write_report(tmp_path / "scores.json", tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert len(page.pictures) == 2
    assert re.search(r"No picture of case0: .*another grid than scan.nii.gz", page.text)
    assert "secret-folder" not in page.source


def test_without_scores_there_are_curves_and_a_line_says_so(run: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text((run / "metrics.csv").read_text())
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert len(page.pictures) == 2
    assert "No scores here yet" in page.text


def test_curves_are_read_from_sparse_rows(run: Path) -> None:
    curves = read_curves(run / "metrics.csv")
    assert curves.loss is not None
    assert curves.loss[1].shape == (60,)
    assert {name: values.tolist() for name, (_, values) in curves.class_dice.items()} == {
        "liver": [0.7, 0.9],
        "colon": [0.5, 0.7],
    }
    assert curves.lr is not None


def test_planes_lie_in_radiological_convention(run: Path) -> None:
    """The brightest voxel lies at the patient's right, anterior and superior end."""
    image = np.zeros(SHAPE, np.float32)
    image[0, -1, -1] = 1000  # The first axis runs from right to left.
    path = save(run / "marked" / "scan.nii.gz", image)
    label = np.zeros(SHAPE, np.uint8)
    label[0, -1, -1] = 1
    drawn = save(run / "marked" / "label.nii.gz", label)
    planes = read_planes(path, drawn, drawn, Shown(LABELS, LABELS, ("liver",)))
    assert [plane.name for plane in planes] == ["axial", "coronal", "sagittal"]
    for plane in planes:
        assert plane.image[0, 0] == 1000
        assert plane.reference[0, 0] == plane.prediction[0, 0] == 1
        assert plane.letters[0] in "RA"
    axial, coronal, sagittal = planes
    assert axial.letters[0] + axial.letters[2] == "RA"
    assert coronal.letters[0] + coronal.letters[2] == "RS"
    assert sagittal.letters[0] + sagittal.letters[2] == "AS"
    assert coronal.size == (coronal.image.shape[1] * 2.0, coronal.image.shape[0] * 4.0)


def test_a_drawing_keeps_proportions_in_mm(run: Path) -> None:
    files = [run / name / "case0.nii.gz" for name in ("scans", "predictions", "drawn")]
    planes = read_planes(*files, Shown(LABELS, LABELS, ("liver", "colon")))
    with Image.open(io.BytesIO(draw_planes(planes, LABELS))) as image:
        tallest = max(plane.size[1] for plane in planes)
        widest = sum(plane.size[0] for plane in planes)
        assert image.height / image.width >= 0.9 * tallest / (1.1 * widest)
        assert image.height <= image.width


def test_a_single_slice_is_drawn_alone(tmp_path: Path) -> None:
    label = np.zeros((12, 12, 1), np.uint8)
    label[3:8, 4:9] = 2
    drawn = save(tmp_path / "label.nii.gz", label)
    scan = save(tmp_path / "scan.nii.gz", np.arange(144, dtype=np.float32).reshape(12, 12, 1))
    planes = read_planes(scan, drawn, drawn, Shown(LABELS, LABELS, ("colon",)))
    assert [plane.name for plane in planes] == ["axial"]
    assert draw_planes(planes, LABELS).startswith(b"\x89PNG")


def nothing(folder: Path) -> Path:
    return folder


def other_json(folder: Path) -> Path:
    (folder / "scores.json").write_text('{"cases": []}')
    return folder / "scores.json"


def missing(folder: Path) -> Path:
    return folder / "nowhere"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (nothing, "holds neither scores.json nor metrics.csv"),
        (other_json, 'scores.json: has no "labels"'),
        (missing, "nowhere: there is no such run folder"),
    ],
)
def test_what_holds_no_scores_is_refused(tmp_path: Path, fault: Any, message: str) -> None:
    with pytest.raises(MedmomError, match=message):
        write_report(fault(tmp_path), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_report_never_replaces_its_scores(run: Path) -> None:
    path = run / "predictions" / "scores.json"
    with pytest.raises(MedmomError, match="would replace the scores"):
        write_report(path, path)


def test_an_image_folder_without_images_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="there is no image in this folder"):
        write_report(run, tmp_path / "report.html", images=tmp_path)
