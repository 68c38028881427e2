"""Probabilities as files, one a class, written slab by slab."""

from __future__ import annotations

import io
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np
from PIL import Image

from medmom.data.files import Volume
from medmom.data.nifti import grid_header
from medmom.errors import MedmomError
from medmom.labels import Labels

CHUNK = 1 << 24
"""Bytes of a class that are put in order at once."""


def probability_path(folder: str | Path, case: str, name: str, *, is_picture: bool = False) -> Path:
    """Gives the file of a class: ``<case>_<class>.nii.gz``, of a picture ``.png``.

    What a file name cannot hold everywhere, all but letters, digits, ``.``, ``-`` and ``_``, becomes ``_``.
    """
    safe = re.sub(r"[^\w.-]+", "_", name)
    return Path(folder) / f"{case}_{safe}{'.png' if is_picture else '.nii.gz'}"


class SlabFiles:
    """Writes numbers from 0 to 1 for each voxel of an image, slab by slab, to several files; all of them or none.

    NIfTI has no float16. So whole steps are stored, with the step as scale factor in the header (``scl_slope``), which
    every reader of NIfTI applies: 1/255 in a byte, which is wrong by at most 1/510, or 1/65535 in two. Affine, codes,
    voxel edges and units are the image's. A picture's are grey PNGs of 8 or 16 bits, upright as the image.

    Slabs come in rising or in falling order along any one axis. Rising along the last, they are compressed as they
    come. Else they wait uncompressed in one file beside the target, for as long as it takes to put them in order.
    A context manager: files appear at its end, or not at all where an error leaves it.

    Args:
        paths: Of the files, in one folder, which is made if missing.
        like: The image.
        kind: Type of the stored steps.

    Attributes:
        paths: Where the files will be.
    """

    def __init__(self, paths: Sequence[Path], like: Volume, *, kind: Literal["uint8", "uint16"] = "uint8") -> None:
        self.paths = tuple(paths)
        self._like, self._dtype = like, np.dtype(kind)
        self._highest = int(np.iinfo(self._dtype).max)
        token = secrets.token_hex(8)
        self._parts = [path.with_name(f".{token}_{channel}.part") for channel, path in enumerate(self.paths)]
        self._waiting = self.paths[0].with_name(f".{token}.part")
        self._axis: int | None = None
        self._rises = True
        self._slabs: list[slice] = []
        self._packers: list[Any] = []

    def __enter__(self) -> Self:
        """Gives itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Lets the files appear, or takes away what there is of them."""
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, place: slice, values: np.ndarray) -> None:
        """Adds a slab.

        Args:
            place: Its place along the axis that is cut.
            values: In [0, 1], shape (files, X, Y, Z) with one axis cut to ``place``; (X, Y, Z) of one file.

        Raises:
            MedmomError: The place cannot be written; nothing is left there.
            ValueError: The slab does not fit the grid, or is not the next one.
        """
        is_first = self._axis is None
        values = values[None] if values.ndim == 3 else values
        self._check_slab(place, values)
        self._slabs.append(place)
        with self._on_disk(self.paths[0]):
            if is_first:
                self.paths[0].parent.mkdir(parents=True, exist_ok=True)
                if self._axis == 2 and self._rises and not self._like.is_picture:
                    self._packers = [_packer() for _ in self.paths]
            for channel, of_file in enumerate(values):
                steps = np.rint(of_file.T * np.float32(self._highest)).astype(self._dtype).tobytes()
                if self._packers:
                    head = self._header() if is_first else b""
                    _append(self._parts[channel], self._packers[channel].compress(head + steps))
                else:
                    _append(self._waiting, steps)

    def close(self) -> None:
        """Completes the files and gives them their names, the last step of all.

        Raises:
            MedmomError: The place cannot be written; nothing is left there.
            ValueError: Slabs are missing.
        """
        try:
            if self._axis is None or self._covered != self._like.geometry.shape[self._axis]:
                raise ValueError(f"slabs {self._slabs} do not cover a grid {self._like.geometry.shape}")
            for channel, (path, part) in enumerate(zip(self.paths, self._parts, strict=True)):
                with self._on_disk(path):
                    self._complete(channel, part)
            self._rename()
        finally:
            self.abort()

    def abort(self) -> None:
        """Takes away what has no name yet; after ``close`` nothing."""
        for part in (*self._parts, self._waiting):
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _rename(self) -> None:
        for channel, (path, part) in enumerate(zip(self.paths, self._parts, strict=True)):
            try:
                with self._on_disk(path):
                    part.replace(path)
            except MedmomError:
                for done in self.paths[:channel]:
                    done.unlink(missing_ok=True)
                raise

    @contextmanager
    def _on_disk(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            raise MedmomError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error

    @property
    def _covered(self) -> int:
        return sum(place.stop - place.start for place in self._slabs)

    def _check_slab(self, place: slice, values: np.ndarray) -> None:
        shape = self._like.geometry.shape
        if self._axis is None:
            # A slab that is the whole may be cut along any axis.
            cut = [axis for axis in range(3) if values.shape[1 + axis] != shape[axis]]
            self._axis, self._rises = cut[0] if cut else 2, place.start == 0
        is_next = place.start == self._covered if self._rises else place.stop == shape[self._axis] - self._covered
        if not is_next or values.shape != (len(self.paths), *self._slab_shape(place)):
            raise ValueError(f"slab {values.shape} at {place} after {self._slabs[-1:]} of a grid {shape}")

    def _slab_shape(self, place: slice) -> list[int]:
        size = place.stop - place.start
        return [size if axis == self._axis else n for axis, n in enumerate(self._like.geometry.shape)]

    def _complete(self, channel: int, part: Path) -> None:
        if self._packers:
            _append(part, self._packers[channel].flush(), last=True)
        elif self._like.is_picture:
            (plane,) = self._in_order(channel)
            stream = io.BytesIO()
            Image.fromarray(plane[0]).save(stream, format="PNG")
            _append(part, stream.getvalue(), last=True)
        else:
            packer = _packer()
            _append(part, packer.compress(self._header()))
            for chunk in self._in_order(channel):
                _append(part, packer.compress(chunk.tobytes()))
            _append(part, packer.flush(), last=True)

    def _in_order(self, channel: int) -> Iterator[np.ndarray]:
        """Reads a class from the waiting slabs, in chunks (Z, Y, X) along the last axis of the grid."""
        width, height, depth = self._like.geometry.shape
        thickness = max(1, CHUNK // (width * height * self._dtype.itemsize))
        with self._waiting.open("rb") as stream:
            for start in range(0, depth, thickness):
                chunk = np.empty((min(thickness, depth - start), height, width), dtype=self._dtype)
                self._fill(chunk, start, stream, channel)
                yield chunk

    def _fill(self, chunk: np.ndarray, start: int, stream: BinaryIO, channel: int) -> None:
        """Copies to a chunk what each slab holds of it: slab after slab and class after class lie in the file."""
        offset, stop = 0, start + len(chunk)
        for place in self._slabs:
            width, height, depth = self._slab_shape(place)
            plane = width * height * self._dtype.itemsize
            # Planes of the slab that the chunk has, in the slab's own count, and where the chunk has them.
            shift = place.start if self._axis == 2 else 0
            low, high = max(start - shift, 0), min(stop - shift, depth)
            if low < high:
                stream.seek(offset + (channel * depth + low) * plane)
                found = np.frombuffer(stream.read((high - low) * plane), dtype=self._dtype)
                target = [slice(low + shift - start, high + shift - start), slice(None), slice(None)]
                if self._axis != 2:
                    target[2 - (self._axis or 0)] = place
                chunk[tuple(target)] = found.reshape(high - low, height, width)
            offset += len(self.paths) * depth * plane

    def _header(self) -> bytes:
        header = grid_header(self._like.header, self._like.geometry.shape, self._dtype)
        header.set_slope_inter(1 / self._highest, 0)
        stream = io.BytesIO()
        header.write_to(stream)
        return stream.getvalue()


class ProbabilityFiles(SlabFiles):
    """Writes the probability of each class, background included, to a file of its own, see ``SlabFiles``.

    Args:
        folder: Where; made if missing.
        case: First part of the names, see ``probability_path``.
        labels: The classes, by channel.
        like: The image.
        kind: Type of the stored steps.

    Attributes:
        paths: Where the file of each class will be, by channel.

    Raises:
        MedmomError: Two classes would have one file, which is so too where their names differ by case only.
    """

    def __init__(
        self, folder: str | Path, case: str, labels: Labels, like: Volume, *, kind: Literal["uint8", "uint16"] = "uint8"
    ) -> None:
        paths = [probability_path(folder, case, name, is_picture=like.is_picture) for name in labels.names]
        _check_apart(paths, labels)
        super().__init__(paths, like, kind=kind)


def _check_apart(paths: Sequence[Path], labels: Labels) -> None:
    seen: dict[str, str] = {}
    for path, name in zip(paths, labels.names, strict=True):
        # Some disks do not tell upper from lower case.
        other = seen.setdefault(path.name.casefold(), name)
        if other != name:
            raise MedmomError(f"{path}: the file of class {name!r} and of {other!r}. Rename one of the classes.")


def _packer() -> Any:
    """Packs as gzip at level 1, without a time: the same bytes each time."""
    return zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS | 16)


def _append(path: Path, data: bytes, *, last: bool = False) -> None:
    # Opened anew each time: of many classes, more files would be open than some systems allow.
    if data or last:
        with path.open("ab") as stream:
            stream.write(data)
            if last:
                stream.flush()
                os.fsync(stream.fileno())
