from __future__ import annotations

from pathlib import Path

import torch

from medmom.errors import MedmomError
from medmom.labels import Labels
from medmom.network import job_of
from medmom.recipe_file import RecipeFile
from medmom.sheet import write_sheet
from medmom.train import JOBS

CASES, DRAWS = 6, 5
"""Rows and columns of a sheet."""


def draw_patches(recipe: RecipeFile, out: Path, *, quiet: bool = False) -> Path:
    """Draws what the network of a recipe is fed: some training cases, a few random patches of each.

    Args:
        recipe: With its data folder; cases are found, split and prepared as for training.
        out: The PNG.
        quiet: Whether to leave out progress bars.

    Returns:
        ``out``.

    Raises:
        MedmomError: The recipe or the data is not usable, or the picture cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise MedmomError(f"{out}: a sheet is a PNG picture. Name it {out.with_suffix('.png').name}.")
    job = JOBS[job_of(recipe.build())].start(recipe, Path("unused"), torch.device("cpu"), quiet=quiet)
    built, run = recipe.build(), job.run
    num_cases = min(CASES, len(run.train))
    places = [k * len(run.train) // num_cases for k in range(num_cases)]
    samples = [sample for k in places for sample in job.samples(built, k, range(DRAWS * k, DRAWS * (k + 1)))]
    write_sheet(
        samples,
        out,
        title=f"{recipe.path.stem}: training patches {' x '.join(map(str, built.data.patch))}",
        labels=run.table if isinstance(run.table, Labels) else None,
        intensity=built.preparation.intensity,
        is_scan=not job.shows_pictures(),
    )
    return out
