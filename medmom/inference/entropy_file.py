"""The entropy of probabilities as a file, written slab by slab."""

from __future__ import annotations

from pathlib import Path

from medmom.data.files import Volume
from medmom.inference.probability_files import SlabFiles, probability_path


def entropy_path(folder: str | Path, case: str, *, is_picture: bool = False) -> Path:
    """Gives the file of the entropy: ``<case>_entropy.nii.gz``, of a picture ``.png``."""
    return probability_path(folder, case, "entropy", is_picture=is_picture)


class EntropyFile(SlabFiles):
    """Writes the entropy of the probabilities at each voxel, 0 (sure) to 1 (all classes equal), see ``SlabFiles``.

    Args:
        folder: Where; made if missing.
        case: First part of the name, see ``entropy_path``.
        like: The image.
    """

    def __init__(self, folder: str | Path, case: str, like: Volume) -> None:
        super().__init__([entropy_path(folder, case, is_picture=like.is_picture)], like)
