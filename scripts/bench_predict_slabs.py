# mypy: disable-error-code="no-untyped-call"
"""Logits of a whole scan, kept in a file and brought back to its grid in several ways."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from medmom.data.case import Case
from medmom.data.files import read_images
from medmom.data.preparation import prepare, restore, working_geometry
from medmom.inference.restore import Restorer
from medmom.inference.stream import StreamPlan, stream_logits
from medmom.package import load_package


class Streamed:
    """Logits of a scan on the working grid, in a file, to be restored in many ways.

    Args:
        model: Package.
        image: Scan.
        path: The file; it is removed at the end.
        device: That the network runs on.
        overlap: Of the windows.
    """

    def __init__(self, model: Path, image: Path, path: Path, device: torch.device, *, overlap: float) -> None:
        self._package, self._image, self._path = load_package(model), image, path
        self._device, self._overlap = device, overlap

    def __enter__(self) -> "Streamed":
        """Runs the network once."""
        volume = read_images([self._image])
        self.own = volume.geometry
        self.working = working_geometry(self._package.preparation, self.own)
        case = prepare(Case("scan", volume.array, None, self.own, ()), self._package.preparation)
        del volume
        shape = (self._package.labels.num_channels, *self.working.shape)
        self.logits = np.memmap(self._path, np.float32, "w+", shape=shape)
        plan = StreamPlan(self._package.patch, self._overlap, axis=2, batch=1, dtype=torch.float32, on_device=False)
        network = self._package.network.to(self._device)
        with torch.inference_mode():
            for place, logits in stream_logits(network, case.image, plan, device=self._device):
                self.logits[..., place] = logits.numpy()
        return self

    def __exit__(self, *error: object) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)

    def slabs(self, height: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Gives the logits again, so many planes at once."""
        for start in range(0, self.working.shape[2], height):
            place = slice(start, min(start + height, self.working.shape[2]))
            yield place, torch.from_numpy(np.ascontiguousarray(self.logits[..., place]))

    def label(self, height: int) -> np.ndarray:
        """Restores the logits so many planes at once."""
        restorer = Restorer(self.working, self.own, len(self.logits), axis=2)
        for place, logits in self.slabs(height):
            restorer.push(place, logits)
        return restorer.finish()

    def equal_to_reference(self, label: np.ndarray) -> float:
        """Share of voxels that equal those of 16-bit logits, restored class by class."""
        half = np.memmap(self._path.with_suffix(".f16"), np.float16, "w+", shape=self.logits.shape)
        for kept, logits in zip(half, self.logits, strict=True):
            kept[...] = logits
        share = float(np.mean(restore(half, self.working, self.own) == label))
        self._path.with_suffix(".f16").unlink()
        return share
