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

from medmom.data.atomic import write_json
from medmom.errors import MedmomError
from medmom.evaluation.calibration import probabilities
from medmom.evaluation.class_pictures import draw_confusion, draw_roc, thumbnail
from medmom.evaluation.class_scores import evaluate_classes
from medmom.evaluation.curves import read_curves
from medmom.evaluation.report import write_report

# Elements that fetch, run or send something, were they there.
ACTIVE = {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video", "a", "svg"}
FETCHING = {"src", "srcset", "href", "data", "action", "poster", "background", "cite"}
NAMES = ("chest", "head", "pelvis")


class Page(HTMLParser):
    """A report as a browser takes it apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: dict[str, list[bytes]] = {}
        self.addresses: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in FETCHING]
        if tag == "img":
            found = dict(attrs)
            png = base64.b64decode((found["src"] or "").removeprefix("data:image/png;base64,"), validate=True)
            self.pictures.setdefault(found["alt"] or "", []).append(png)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def make_scores(
    folder: Path, *, names: tuple[str, ...] = NAMES, is_multilabel: bool = False, num: int = 24
) -> dict[str, Any]:
    """Scores of a table in ``folder``: pictures, of which some are mistakes, one failed, one flagged."""
    rng = np.random.default_rng(0)
    true = np.arange(num) % len(names)
    logits = rng.normal(0, 1, (num, len(names))) + 2 * np.eye(len(names))[true]
    logits[4] = 6 * np.eye(len(names))[0]
    given = probabilities(logits, 1.3, is_multilabel=is_multilabel)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    cases, lines = [], [",".join(["case", "flag", *(f"p_{name}" for name in names)])]
    for k in range(num):
        path = folder / "pictures" / f"{k}.png"
        Image.fromarray(rng.integers(0, 255, (20, 30), np.uint8)).save(path)
        error = f"{path}: cut off. Fetch it again." if k == 7 else None
        cases.append({"name": f"case{k}", "image": [str(path)], "patient": f"p{k // 2}", "reference": [names[true[k]]],
                      "logits": None if error else logits[k].tolist(), "error": error})  # fmt: skip
        if not error:
            lines.append(",".join([f"case{k}", "blank image" if k == 3 else "", *(f"{p:.6f}" for p in given[k])]))
    (folder / "classes.csv").write_text("\n".join(lines) + "\n")
    classes = {"names": list(names), "is_multilabel": is_multilabel}
    write_json(folder / "classes.json", {"classes": classes, "temperature": 1.3, "cases": cases, "fold": "validation"})
    scores = evaluate_classes(folder, progress=False)
    write_json(folder / "scores.json", scores)
    return scores


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with scores of its validation cases, heat maps, curves and a recipe."""
    folder = tmp_path_factory.mktemp("runs") / "regions-1"
    make_scores(folder / "validation")
    (folder / "validation" / "classes_explain").mkdir()
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40).astype(np.uint8)).save(
        folder / "validation" / "classes_explain" / "case4.png"
    )
    rows = [f"{k // 10},{k},{1 / (k + 1):.3f},,,0.01\n" for k in range(30)]
    rows += ["2,29,,0.8,0.9,\n", "1,15,,0.6,0.7,\n"]
    (folder / "metrics.csv").write_text("epoch,step,train_loss,val_balanced_accuracy,val_auroc,lr\n" + "".join(rows))
    (folder / "recipe.yaml").write_text("model: {preset: cls2d_xs}\n")
    return folder


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, which take most of the time."""
    nothing = {"confusion": None, "reliability": None, "roc": None, "num_curves": 0}
    monkeypatch.setattr("medmom.evaluation.class_report._pictures", lambda scores: nothing)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    write_report(run, run / "report.html")
    return Page(run / "report.html")


def test_a_report_on_classes_needs_no_address_and_no_script(page: Page) -> None:
    assert not ACTIVE & set(page.tags)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page.source)
    assert not re.search(r"http|//|url\(|@import", rest)


def test_it_shows_scores_with_intervals_definitions_mistakes_and_recipe(run: Path, page: Page) -> None:
    scores = json.loads((run / "validation" / "scores.json").read_text())
    summary = scores["summary"]
    for text in (
        "Classification report",
        "regions-1",
        "24 cases of 12 patients",
        "1 not predicted, counted as wrong",
        *(f"{found['value']:.3f}" for found in summary.values()),
        *(f"{found['low']:.3f} – {found['high']:.3f}" for found in summary.values()),
        "cross-fitted",
        "7.png: cut off. Fetch it again.",
        "blank image",
        "macro mean",
        "preset: cls2d_xs",
        *scores["definitions"].values(),
    ):
        assert text in page.text, text


def test_its_pictures_decode_and_have_a_dark_twin(page: Page) -> None:
    for name in (
        "Confusion matrix",
        "ROC curve of each class",
        "Learning curves: loss, validation scores, learning rate",
    ):
        (picture,) = page.pictures[name]
        with Image.open(io.BytesIO(picture)) as image:
            image.load()
            assert image.width > 500
    assert page.tags.count("source") == 4


def test_mistakes_are_shown_the_most_confident_first_with_heat_maps(page: Page) -> None:
    order = [name for name in page.pictures if re.fullmatch(r"case\d+", name)]
    assert order[0] == "case4"
    assert "case7" not in order
    assert [name for name in page.pictures if name.startswith("Heat map")] == ["Heat map of case4"]
    place = page.text.index("Mistakes, the most confident first")
    assert page.text.index("case7", place) > page.text.index("case4", place)


def test_a_report_tells_no_folder(run: Path, page: Page) -> None:
    assert str(run.parent) not in page.source


@pytest.mark.usefixtures("plain")
def test_names_that_look_like_markup_are_shown_as_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    text = json.dumps(make_scores(tmp_path)).replace("chest", evil).replace("case4", f"4{evil}").replace("blank", evil)
    (tmp_path / "scores.json").write_text(text)
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert not ACTIVE & set(page.tags)
    assert evil in page.text


@pytest.mark.usefixtures("plain")
def test_images_that_moved_are_found_by_name(tmp_path: Path) -> None:
    make_scores(tmp_path / "a")
    (tmp_path / "b" / "deep").mkdir(parents=True)
    moved = (tmp_path / "a" / "pictures").rename(tmp_path / "b" / "deep" / "pictures")
    write_report(tmp_path / "a", tmp_path / "report.html")
    assert "case4" not in Page(tmp_path / "report.html").pictures
    write_report(tmp_path / "a", tmp_path / "report.html", images=moved.parent.parent)
    assert "case4" in Page(tmp_path / "report.html").pictures
    (tmp_path / "empty").mkdir()
    with pytest.raises(MedmomError, match="there is no image in this folder"):
        write_report(tmp_path / "a", tmp_path / "report.html", images=tmp_path / "empty")


@pytest.mark.usefixtures("plain")
def test_an_image_that_cannot_be_read_leaves_a_line_in_its_place(tmp_path: Path) -> None:
    make_scores(tmp_path)
    (tmp_path / "pictures" / "4.png").write_bytes(b"no picture")
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "case4" not in page.pictures
    assert "The image cannot be read." in page.text


@pytest.mark.usefixtures("plain")
def test_a_case_named_like_a_path_shows_no_picture_from_there(tmp_path: Path) -> None:
    scores = make_scores(tmp_path)
    (tmp_path / "classes_explain").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "secret.png")
    next(case for case in scores["cases"] if case["name"] == "case4")["name"] = "../secret"
    write_json(tmp_path / "scores.json", scores)
    write_report(tmp_path, tmp_path / "report.html")
    assert not [name for name in Page(tmp_path / "report.html").pictures if name.startswith("Heat map")]


def test_multilabel_scores_have_no_matrix_and_name_the_worst_decision(tmp_path: Path) -> None:
    make_scores(tmp_path, is_multilabel=True)
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "Confusion matrix" not in page.pictures
    assert "Worst decision" in page.text
    assert "any number an image" in page.text


def test_where_nothing_was_predicted_there_is_still_a_report(tmp_path: Path) -> None:
    names = {"names": list(NAMES), "is_multilabel": False}
    cases = [{"name": f"c{k}", "image": [], "reference": [NAMES[k]], "error": "cut off"} for k in range(3)]
    (tmp_path / "classes.csv").write_text("case,p_chest,p_head,p_pelvis\n")
    write_json(tmp_path / "classes.json", {"classes": names, "cases": cases})
    write_json(tmp_path / "scores.json", evaluate_classes(tmp_path, progress=False))
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert list(page.pictures) == ["Confusion matrix"]
    assert page.text.count("cut off") == 3


def test_a_run_without_scores_has_its_curves_and_its_kind(run: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text((run / "metrics.csv").read_text())
    (tmp_path / "split.json").write_text(json.dumps({"classes": {"names": list(NAMES), "is_multilabel": False}}))
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "Classification report" in page.text
    assert "No scores here yet" in page.text
    assert len(page.pictures) == 1


def test_validation_scores_of_classification_are_read_as_curves(run: Path) -> None:
    curves = read_curves(run / "metrics.csv")
    assert {name: values.tolist() for name, (_, values) in curves.scores.items()} == {
        "balanced accuracy": [0.6, 0.8],
        "macro AUROC": [0.7, 0.9],
    }
    assert curves.dice is None


def test_scores_without_a_part_are_refused(tmp_path: Path) -> None:
    scores = make_scores(tmp_path)
    del scores["reliability"]
    write_json(tmp_path / "scores.json", scores)
    with pytest.raises(MedmomError, match=r'scores\.json: has no "reliability"'):
        write_report(tmp_path, tmp_path / "report.html")


@pytest.mark.parametrize("num_classes", [2, 30])
def test_matrix_and_curves_are_drawn_for_few_and_many_classes(tmp_path: Path, num_classes: int) -> None:
    names = tuple(f"a class with a rather long name {k}" for k in range(num_classes))
    scores = make_scores(tmp_path, names=names, num=3 * num_classes)
    for picture in (draw_confusion(scores, "light"), draw_roc(scores, "dark")):
        assert picture is not None
        with Image.open(io.BytesIO(picture)) as image:
            # Names at the left and below are not cut: the outermost pixels are empty.
            alpha = np.asarray(image)[..., 3]
        assert not alpha[:, 0].any()
        assert not alpha[-1].any()


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def test_a_picture_keeps_its_orientation_colours_and_proportions(tmp_path: Path) -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:10, :10] = (200, 100, 0)
    Image.fromarray(picture).save(tmp_path / "a.png")
    shown = pixels(thumbnail([tmp_path / "a.png"]))
    assert shown.shape == (160, 320, 3)
    assert shown[5, 5].tolist() == [200, 100, 0]
    assert not shown[-40:].any()


def test_a_volume_is_shown_by_its_middle_axial_slice_as_radiologists_look_at_it(tmp_path: Path) -> None:
    """Bright are the patient's right and anterior side; the first axis of the file runs from right to left."""
    array = np.zeros((20, 10, 6), np.float32)
    array[:10, 5:, 3] = 500
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    affine[0, 3] = 19
    nib.save(nib.Nifti1Image(array[::-1], np.diag([1.0, 2, 3, 1])), tmp_path / "mirrored.nii.gz")
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "scan.nii.gz")
    shown = pixels(thumbnail([tmp_path / "scan.nii.gz"]))
    assert shown.shape == (320, 320)
    # Radiological convention: the right side at the left, anterior above.
    assert shown[80, 80] == 255
    assert not shown[:, 200:].any()
    assert not shown[200:].any()
    np.testing.assert_array_equal(shown, pixels(thumbnail([tmp_path / "mirrored.nii.gz"])))
