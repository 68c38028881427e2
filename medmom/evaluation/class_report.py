"""What the report on classified images shows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmom.data.files import is_image
from medmom.errors import MedmomError
from medmom.evaluation.class_pictures import draw_confusion, draw_reliability, draw_roc, thumbnail
from medmom.evaluation.class_tables import DEFINITION_TITLES, counted, headline, score_rows, summary_rows
from medmom.evaluation.curves import DPI, Theme
from medmom.evaluation.tables import without_folders

logger = logging.getLogger(__name__)

CLASS_KEYS = (
    *("classes", "is_multilabel", "definitions", "num_cases", "num_failed", "num_flagged", "without_reference"),
    *("summary", "classes_scores", "bootstrap", "confusion", "reliability", "roc", "cases"),
)
"""What scores of classification hold, as far as the report needs it."""

SCREEN_DPI = 100
MAX_CARDS = 12
MAX_ROWS = 200


def class_page(scores: Mapping[str, Any], scores_path: Path, images: Path | None) -> dict[str, Any]:
    """All that the template shows of the scores.

    Args:
        scores: What ``evaluate_classes`` gives.
        scores_path: Their file; heat maps are looked for beside it, where they no longer lie beside the table.
        images: Folder with the images, searched by file name through all its folders; None takes the scores' paths.

    Raises:
        MedmomError: There is no image in ``images``.
    """
    return {
        "kind": "Classification",
        "headline": headline(scores),
        "summary": summary_rows(scores),
        "counted": counted(scores),
        "classes": score_rows(scores),
        "pictures": _pictures(scores),
        "mistakes": _mistakes(scores, _explained(scores, scores_path), None if images is None else _Shelf(images)),
        "flagged": [_case_row(case) for case in scores["cases"] if case["flag"]][:MAX_ROWS],
        "has_patients": any(case["patient"] != case["name"] for case in scores["cases"]),
        "titles": DEFINITION_TITLES,
    }


def _pictures(scores: Mapping[str, Any]) -> dict[str, Any]:
    is_multilabel = scores["is_multilabel"]
    confusion = None if is_multilabel else _themed(lambda theme: draw_confusion(scores, theme))
    if confusion is not None:
        # The width in a PNG's header.
        confusion["width"] = int.from_bytes(confusion["light"][16:20], "big") * SCREEN_DPI // DPI
    found = scores["reliability"]
    return {
        "confusion": confusion,
        "reliability": _themed(lambda theme: draw_reliability(found, theme, is_multilabel=is_multilabel))
        if found["after"]
        else None,
        "roc": _themed(lambda theme: draw_roc(scores, theme)) if any(scores["roc"].values()) else None,
        "num_curves": sum(curve is not None for curve in scores["roc"].values()),
    }


def _themed(draw: Callable[[Theme], bytes | None]) -> dict[str, Any]:
    return {"light": draw("light"), "dark": draw("dark")}


def _case_row(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case as texts."""
    mistake = case["mistake"]
    given = "not predicted" if case["predicted"] is None else ", ".join(case["predicted"]) or "none"
    return {
        "name": case["name"],
        "patient": case["patient"],
        "reference": ", ".join(case["reference"]) or "none",
        "given": given,
        "probability": f"{mistake['probability']:.3f}" if mistake else "",
        "mistake": mistake["class"] if mistake else "",
        "remark": without_folders(case["error"] or case["flag"]),
    }


def _mistakes(scores: Mapping[str, Any], heat: Path | None, shelf: _Shelf | None) -> dict[str, Any]:
    """Wrong cases, those that failed first and then the most confident; pictures of the latter."""
    wrong = [case for case in scores["cases"] if not case["right"]]
    predicted = sorted((case for case in wrong if case["mistake"]), key=lambda case: (-_doubt(case), case["name"]))
    cards = [_card(case, heat, shelf) for case in predicted[:MAX_CARDS]]
    rows = [case for case in wrong if not case["mistake"]] + predicted
    return {
        "num": len(wrong),
        "rows": [_case_row(case) for case in rows[:MAX_ROWS]],
        "cards": cards if any(card["png"] or card["heat"] for card in cards) else [],
        "has_heat": any(card["heat"] for card in cards),
    }


def _doubt(case: Mapping[str, Any]) -> float:
    """How far the wrong decision's probability lies from the truth."""
    mistake = case["mistake"]
    value = float(mistake["probability"])
    return 1 - value if mistake["class"] in case["reference"] else value


def _card(case: Mapping[str, Any], heat: Path | None, shelf: _Shelf | None) -> dict[str, Any]:
    paths = [Path(path) for path in case["image"]]
    if shelf is not None:
        paths = [shelf.find(path) for path in paths]
    png, problem = _thumbnail(paths, case.get("item"), case["name"])
    overlay = None
    # The name of a case is no path to anywhere else.
    if heat is not None and Path(case["name"]).name == case["name"] and (heat / f"{case['name']}.png").is_file():
        overlay, _ = _thumbnail([heat / f"{case['name']}.png"], None, case["name"])
    return _case_row(case) | {"png": png, "problem": problem, "heat": overlay}


def _thumbnail(paths: Sequence[Path], item: int | None, name: str) -> tuple[bytes | None, str]:
    """A small picture, or None and why there is none."""
    if not paths or not all(path.is_file() for path in paths):
        return None, "The image was not found."
    try:
        return thumbnail(paths, item), ""
    except MedmomError as error:
        logger.warning("%s: no picture (%s)", name, error)
        return None, "The image cannot be read."


def _explained(scores: Mapping[str, Any], scores_path: Path) -> Path | None:
    """The folder of heat maps of the table that was scored."""
    table = Path(str(scores.get("table") or "classes.csv"))
    places = [folder / f"{table.stem}_explain" for folder in (table.parent, scores_path.parent)]
    return next((place for place in places if place.is_dir()), None)


class _Shelf:
    """Images of a folder and of all folders in it, by name."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            if is_image(path) or path.suffix == ".npz":
                self._files.setdefault(path.name, []).append(path)
        if not self._files:
            raise MedmomError(f"{folder}: there is no image in this folder. Give the folder of the images.")

    def find(self, path: Path) -> Path:
        """The file of this name; of several, the one whose folder has the same name. Else the path itself."""
        found = self._files.get(path.name, [])
        if len(found) > 1:
            found = [other for other in found if other.parent.name == path.parent.name]
        return found[0] if len(found) == 1 else path
