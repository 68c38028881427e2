from __future__ import annotations

import base64
import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from medmom import __version__
from medmom.data.files import read_json, write_text
from medmom.errors import MedmomError
from medmom.evaluation.class_report import CLASS_KEYS, class_page
from medmom.evaluation.curves import Theme, draw_curves, read_curves
from medmom.evaluation.listing import files_by_case, parse_labels
from medmom.evaluation.overlay import Shown, draw_planes, read_planes
from medmom.evaluation.tables import DEFINITION_TITLES, case_rows, class_rows, headline, ranked, strip, without_folders
from medmom.labels import Labels

logger = logging.getLogger(__name__)

CLASSIFICATION = "classification"
SCORES_PLACES = (
    *("scores.json", "predictions/scores.json", "validation/scores.json"),
    # Beside a table of classes.
    *("validation_scores.json", "classes_scores.json"),
)
SCORES_KEYS = ("labels", "cases", "classes", "mean", "num_cases", "num_missing", "num_both_empty", "definitions")
IMAGE_FOLDERS = ("images", "imagesTr", "imagesTs")


def write_report(source: Path, out: Path, *, images: Path | None = None) -> None:
    """Writes one HTML file that holds all it shows: tables, pictures, curves, definitions.

    Args:
        source: A run folder, a folder with ``scores.json`` in it, or that file. Of a run folder the
            scores are the first found of ``scores.json``, ``predictions/scores.json``, ``validation/scores.json`` and
            of classes ``validation_scores.json`` and ``classes_scores.json``; without any, the report has the curves
            alone and says so.
        out: The HTML file.
        images: Folder with the scans by case name; None takes the paths that the scores give.

    Raises:
        MedmomError: There is nothing to report, a file cannot be read, or ``out`` not be written.
    """
    run = _find(Path(source))
    if run.scores_path is not None and Path(out).resolve() == run.scores_path.resolve():
        raise MedmomError(f"{out}: the report would replace the scores it is made from. Give another output.")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = _data_url
    template = environment.get_template("class_report.html" if run.is_classification else "report.html")
    write_text(out, template.render(_page(run, None if images is None else Path(images))))


@dataclass(frozen=True)
class _Run:
    """What a report is made from."""

    name: str
    folder: Path | None
    scores_path: Path | None
    scores: Mapping[str, Any] | None

    @property
    def is_classification(self) -> bool:
        """Whether whole images were classified; of a run without scores, its split says so."""
        if self.scores is not None:
            return self.scores.get("kind") == CLASSIFICATION
        split = None if self.folder is None else self.folder / "split.json"
        content = read_json(split) if split is not None and split.is_file() else None
        return isinstance(content, dict) and bool(content.get("classes"))


def _find(source: Path) -> _Run:
    if source.is_file():
        return _Run(_title(source.parent), None, source, _read_scores(source))
    if not source.is_dir():
        raise MedmomError(f"{source}: there is no such run folder or scores file. Give one of the two.")
    path = next((source / place for place in SCORES_PLACES if (source / place).is_file()), None)
    if path is None and not (source / "metrics.csv").is_file():
        raise MedmomError(
            f"{source}: holds neither scores.json nor metrics.csv. Give a run folder, or scores that evaluate wrote."
        )
    return _Run(_title(source), source, path, None if path is None else _read_scores(path))


def _title(folder: Path) -> str:
    place = folder.resolve()
    inside_a_run = place.name in {Path(text).parent.name for text in SCORES_PLACES} - {""}
    return (f"{place.parent.name}: {place.name}" if inside_a_run else place.name) or "scores"


def _read_scores(path: Path) -> Mapping[str, Any]:
    scores = read_json(path)
    is_table = isinstance(scores, dict)
    wanted = CLASS_KEYS if is_table and scores.get("kind") == CLASSIFICATION else SCORES_KEYS
    missing = [key for key in wanted if key not in scores] if is_table else list(wanted)
    if missing:
        raise MedmomError(f'{path}: has no "{missing[0]}". Give the scores.json that evaluate wrote.')
    return scores  # type: ignore[no-any-return]


def _page(run: _Run, images: Path | None) -> dict[str, Any]:
    """All that the template shows."""
    page: dict[str, Any] = {
        "kind": "Classification" if run.is_classification else "Segmentation",
        "title": run.name,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "version": __version__,
        "scores": None,
        "curves": _curves(run),
        "ranks": _ranks(run),
        "recipe": _recipe(run),
    }
    if run.scores is None:
        return page
    scores = run.scores
    page |= {"scores": scores, "about": _about(scores)}
    if run.is_classification:
        assert run.scores_path is not None
        return page | class_page(scores, run.scores_path, images)
    labels = Labels.from_dict(scores["labels"])
    return page | {
        "headline": headline(scores),
        "classes": class_rows(scores, labels),
        "strip": strip(scores, labels),
        "cases": case_rows(scores),
        "has_patients": any(case["patient"] != case["name"] for case in scores["cases"]),
        "class_names": labels.foreground,
        "titles": DEFINITION_TITLES,
        "pictures": _pictures(scores, labels, images),
    }


def _about(scores: Mapping[str, Any]) -> dict[str, str]:
    """Model and versions, as names and short texts."""
    model = scores.get("model")
    table = dict(model) if isinstance(model, dict) else {"name": model}
    path = table.get("path")
    if isinstance(path, str):
        table["path"] = Path(path).name
    table = {f"model {key}": value for key, value in table.items()}
    table |= {f"{name} (evaluation)": value for name, value in scores.get("versions", {}).items()}
    return {name: str(value) for name, value in table.items() if isinstance(value, str | int | float)}


def _recipe(run: _Run) -> str | None:
    path = None if run.folder is None else run.folder / "recipe.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path is not None and path.is_file() else None


def _curves(run: _Run) -> dict[str, Any] | None:
    """The learning curves, for a light and a dark page, with their legend."""
    path = None if run.folder is None else run.folder / "metrics.csv"
    if run.folder is None or path is None or not path.is_file():
        return None
    curves = read_curves(path)
    labels = _run_labels(run)
    colours = {} if labels is None else {name: labels.colour(name) for name in labels.foreground}
    themes: tuple[Theme, Theme] = ("light", "dark")
    light, dark = (draw_curves(curves, colours, theme) for theme in themes)
    legend = [{"name": name, "colour": colours[name]} for name in curves.class_dice if name in colours]
    return None if light is None else {"light": light, "dark": dark, "legend": legend}


def _ranks(run: _Run) -> bytes | None:
    """The picture of the ranks of a network of low rank, as its training drew it."""
    path = None if run.folder is None else run.folder / "pictures" / "ranks.png"
    return path.read_bytes() if path is not None and path.is_file() else None


def _run_labels(run: _Run) -> Labels | None:
    split = None if run.folder is None else run.folder / "split.json"
    if split is not None and split.is_file():
        content = read_json(split)
        return parse_labels(content.get("labels")) if isinstance(content, dict) else None
    return None if run.scores is None else parse_labels(run.scores.get("labels"))


def _pictures(scores: Mapping[str, Any], labels: Labels, images: Path | None) -> dict[str, Any]:
    """Overlays of the best, the median and the worst case that has a prediction, and what is not shown."""
    cases = ranked(scores)
    reference_labels = Labels.from_dict(scores.get("reference_labels") or scores["labels"])
    files = {} if images is None else _image_files(images)
    drawn, problems = [], []
    for title, case in _best_median_worst(cases):
        image = _image(case, files)
        if image is None:
            continue
        try:
            shown = Shown(labels, reference_labels, tuple(case["scores"]))
            planes = read_planes(image, Path(case["prediction"]), Path(case["reference"]), shown)
        except MedmomError as error:
            logger.warning("%s: no picture (%s)", case["name"], error)
            problems.append(f"{case['name']}: {without_folders(str(error))}")
            continue
        dice = [
            {"name": name, "colour": labels.colour(name), "dice": found["dice"]}
            for name, found in case["scores"].items()
        ]
        drawn.append({"title": title, "name": case["name"], "dice": dice, "png": draw_planes(planes, labels)})
    present = {row["name"] for case in drawn for row in case["dice"]}
    legend = [{"name": name, "colour": labels.colour(name)} for name in labels.foreground if name in present]
    return {"cases": drawn, "problems": problems, "legend": legend, "has_predictions": bool(cases)}


def _best_median_worst(cases: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Picks from cases in descending order; of fewer than three, those that there are."""
    if len(cases) < 3:
        return list(zip(("Best", "Worst") if len(cases) == 2 else ("Only",), cases, strict=False))
    return [("Best", cases[0]), ("Median", cases[len(cases) // 2]), ("Worst", cases[-1])]


def _image_files(folder: Path) -> dict[str, Path]:
    """Scans by case name; of nnU-Net's files, the first channel."""
    files: dict[str, Path] = {}
    for place in (folder, *(folder / name for name in IMAGE_FOLDERS)):
        found = files_by_case(place) if place == folder or place.is_dir() else {}
        files |= {name.removesuffix("_0000"): path for name, path in found.items()} | found
    if not files:
        raise MedmomError(f"{folder}: there is no image in this folder. Give the folder of the scans.")
    return files


def _image(case: Mapping[str, Any], files: Mapping[str, Path]) -> Path | None:
    if case["name"] in files:
        return files[case["name"]]
    path = case.get("image")
    return Path(path) if path and Path(path).is_file() else None


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
