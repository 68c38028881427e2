"""Checkpoints of nnU-Net v2, read without running anything that they hold."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from medmom.errors import MedmomError

_CODES = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "b1": "?"}
"""Numpy's kinds of numbers that are read, and struct's letters for them."""


class _ForeignError(Exception):
    """A kind of content that is not allowed; its text names it."""


class _NumberKind:
    """Stands in for numpy.dtype: a kind of number and nothing else.

    Numpy's own takes its layout from the file, and with a false one its scalars read memory as objects.
    """

    def __init__(self, code: str, align: object = False, copy: object = True) -> None:
        if code not in _CODES:
            raise _ForeignError(f"numpy.dtype({code!r})")
        self.code = _CODES[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise _ForeignError(f"numpy.dtype of byte order {state[1]!r}")


def _number(kind: _NumberKind, content: bytes) -> float | int | bool:
    """Stands in for numpy's scalars and gives Python's."""
    number: float | int | bool = struct.unpack(f"<{kind.code}", content)[0]
    return number


# Numpy 2 moved its scalars to another module.
_ALLOWED: list[Any] = [
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    (_NumberKind, "numpy.dtype"),
]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint as nnU-Net v2 saves it.

    It holds ``network_weights``, ``optimizer_state``, ``grad_scaler_state``, ``logging``, ``_best_ema``,
    ``current_epoch``, ``init_args`` (plans, configuration, fold, dataset_json), ``trainer_name`` and
    ``inference_allowed_mirroring_axes``. Beside torch's own tensors and plain types it may hold numpy's scalars, which
    come back as Python's numbers; numpy itself does not take part. The allow list is torch's for the whole process:
    no other thread should read checkpoints meanwhile.

    Args:
        path: ``checkpoint_final.pth`` or ``checkpoint_best.pth`` of a fold.

    Returns:
        Its content, tensors on the CPU; ``network_weights`` is a dictionary of tensors.

    Raises:
        MedmomError: There is no such file, it is damaged, holds something else than numbers, texts and tensors (each
            foreign class or function is named; none is called), or no network's weights.
    """
    try:
        with path.open("rb") as file:
            content = read_saved(file, path)
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check path and permissions.") from error
    weights = content.get("network_weights") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise MedmomError(f"{path}: no network_weights in it. Give checkpoint_final.pth of a fold of nnU-Net v2.")
    return dict(content)


def read_saved(file: IO[bytes], path: Path) -> Any:
    """Reads what ``torch.save`` wrote, of numbers, numpy's scalars, texts and tensors.

    Args:
        file: Open for bytes.
        path: Its name, for messages.

    Returns:
        Its content, tensors on the CPU.

    Raises:
        MedmomError: It is damaged, or holds something else (each foreign class or function is named; none is called).
    """
    with _allow_list(), warnings.catch_warnings():
        # Torch warns of pickle protocols that it then refuses.
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's reader raises many kinds on what is no checkpoint
            foreign = [str(error)] if isinstance(error, _ForeignError) else _foreign(file)
    if foreign:
        raise MedmomError(
            f"{path}: holds {', '.join(foreign)}, neither number nor text nor tensor; to read it could run code. "
            "Ask its author for the weights alone."
        )
    raise MedmomError(f"{path}: not a sound checkpoint of torch.save. Copy it again from its source.")


@contextmanager
def _allow_list() -> Iterator[None]:
    """Lets torch read what is allowed here, and not what other libraries have allowed it."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(_ALLOWED)
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _foreign(file: IO[bytes]) -> list[str]:
    """Names of the classes and functions in the file that are not allowed; none where it cannot be taken apart."""
    try:
        file.seek(0)
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # a damaged file raises as many kinds here
        return []
