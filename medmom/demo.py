from __future__ import annotations

import logging
import time
from pathlib import Path

from medmom.data.atomic import write_json
from medmom.errors import MedmomError
from medmom.evaluation.report import write_report
from medmom.evaluation.scores import evaluate, format_scores
from medmom.inference.predict import predict
from medmom.phantom import make_phantoms
from medmom.recipe_file import RecipeFile, recipe_path
from medmom.train import train

logger = logging.getLogger(__name__)

NUM_TRAINING, NUM_UNSEEN = 20, 8


def run_demo(out: Path, *, minutes: float, device: str = "auto", quiet: bool = False) -> Path:
    """Goes the whole road on made-up scans: phantoms, training, prediction, scores, report.

    Args:
        out: A new folder; ``phantoms/`` is trained on, ``unseen/`` is scored, ``demo/`` is the run folder.
        minutes: Time for the training.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        quiet: Whether to leave out progress bars.

    Returns:
        The report.

    Raises:
        MedmomError: ``out`` is there already or cannot be written, or the time is too short.
    """
    if out.exists():
        raise MedmomError(f"{out}: already there; name a new folder with --out.")
    started = time.monotonic()
    logger.info("1 of 5  Making %d phantoms to learn from and %d unseen ones.", NUM_TRAINING, NUM_UNSEEN)
    make_phantoms(out / "phantoms", num_cases=NUM_TRAINING, seed=0)
    make_phantoms(out / "unseen", num_cases=NUM_UNSEEN, seed=1)
    logger.info("2 of 5  Training mom3d_xs for %g minutes.", minutes)
    recipe = RecipeFile(recipe_path("demo"), ["--training.max_minutes", str(minutes)])
    recipe.set("data.folder", str(out / "phantoms"))
    recipe.set("data.cache", str(out / "cache"))
    run = out / "demo"
    train(recipe, run, device=device, quiet=quiet)
    logger.info("3 of 5  Segmenting the unseen phantoms, each on its own grid.")
    predict(run, [str(out / "unseen" / "images")], run / "predictions", device=device, quiet=quiet)
    logger.info("4 of 5  Scoring.")
    scores = evaluate(run / "predictions", out / "unseen" / "labels", progress=not quiet)
    write_json(run / "predictions" / "scores.json", scores)
    logger.info("%s", format_scores(scores))
    logger.info("5 of 5  Writing the report.")
    write_report(run, run / "report.html", images=None)
    logger.info("Done in %.1f minutes.", (time.monotonic() - started) / 60)
    return run / "report.html"
