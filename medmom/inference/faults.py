"""Why a case came to nothing, in a line that names its file."""

from __future__ import annotations

from medmom.data.casefiles import CaseFiles
from medmom.errors import MedmomError


def fault_of(case: CaseFiles, error: Exception) -> MedmomError:
    """Gives the error to tell of a case: its own where it has its words, else one that names the first file.

    Args:
        case: What failed.
        error: Why; memory that does not suffice, or a disk that does not, has no words for a user.
    """
    if isinstance(error, MedmomError):
        return error
    if isinstance(error, MemoryError):
        return MedmomError(f"{case.images[0]}: memory is too small for it. Crop the image.")
    return MedmomError(f"{case.images[0]}: {error}. Check the disk.")
