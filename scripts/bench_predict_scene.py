# mypy: disable-error-code="no-untyped-call"
"""A CT phantom of any size, painted slab by slab, and networks that find organs in it."""

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from medmom.data.preparation import Preparation
from medmom.labels import Labels
from medmom.models import mom3d_xs
from medmom.package import save_package

AIR, TISSUE, NOISE = -1000.0, 40.0, 4.0
"""CT numbers around and inside the body, and the noise's standard deviation."""

PREPARATION = {"intensity": "ct", "clip": (-200.0, 1400.0), "mean": 400.0, "std": 400.0}
"""How the networks of the benchmark see the phantom; the spacing is the case's."""


@dataclass(frozen=True)
class Size:
    """What is segmented.

    Attributes:
        shape: Voxels of the scan.
        spacing: Its voxel edges in mm.
        working: Edge of the voxels that the network sees, mm.
        window: Edge of a window in them.
        organs: In the scan.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    working: float = 1.5
    window: int = 96
    organs: int = 103

    def small(self) -> "Size":
        """A scan of the same kind that takes seconds."""
        shape = (56, 48, 40 + self.shape[2] // 40)
        return Size(shape, self.spacing, working=1.5, window=32, organs=12)


SIZES = {
    "tall": Size((512, 512, 824), (0.77, 0.77, 1.0), organs=24),
    "usual": Size((512, 512, 280), (0.77, 0.77, 2.0)),
    "reference": Size((512, 512, 200), (0.77, 0.77, 2.0), organs=24),
}


@dataclass(frozen=True)
class Body:
    """An elliptic cylinder along z with ellipsoids in it.

    Attributes:
        half: Half axes of the cylinder in x and y, mm.
        centres: Of the organs, shape (N, 3), mm from the middle of the grid.
        radii: Half axes of the organs, shape (N, 3), mm.
        hu: CT number of each organ, shape (N,).
    """

    half: tuple[float, float]
    centres: np.ndarray
    radii: np.ndarray
    hu: np.ndarray


def make_body(size: Sequence[float], num_organs: int, *, seed: int = 0) -> Body:
    """Fills a body with organs of about one size that do not touch.

    Args:
        size: Of the grid in mm, along x, y and z.
        num_organs: At least 1.
        seed: Another one gives other places and shapes.
    """
    rng = np.random.default_rng(seed)
    half = (0.42 * size[0], 0.32 * size[1])
    box = np.array([2 * half[0], 2 * half[1], 0.96 * size[2]])
    edge = float(np.cbrt(box.prod() / num_organs))
    while len(cells := _cells(box, half, edge)) < num_organs:
        edge *= 0.97
    chosen = rng.permutation(len(cells))[:num_organs]
    radii = edge * rng.uniform(0.28, 0.42, (num_organs, 3))
    # Steps of the golden ratio: the first 2, 24 or 103 organs are as far apart in intensity as can be.
    hu = 120 + 1200 * (np.arange(1, num_organs + 1) * 0.6180339887498949 % 1)
    return Body(half, cells[chosen] + edge * rng.uniform(-0.06, 0.06, (num_organs, 3)), radii, hu)


def _cells(box: np.ndarray, half: tuple[float, float], edge: float) -> np.ndarray:
    """Middles of the cubes of a lattice that lie within the cylinder, shape (N, 3)."""
    counts = np.maximum(1, np.floor(box / edge)).astype(int)
    cells = (np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(-1, 3) + 0.5) * box / counts
    cells = cells - box / 2
    inner = [max(axis - 0.45 * edge, 0.1 * axis) for axis in half]
    inside: np.ndarray = (cells[:, 0] / inner[0]) ** 2 + (cells[:, 1] / inner[1]) ** 2 <= 1
    return cells[inside]


def paint(
    body: Body, shape: Sequence[int], spacing: Sequence[float], *, seed: int = 0, thickness: int = 8
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gives the scan in slabs along z, the noise of each from its own seed.

    Args:
        body: What is scanned; its middle is that of the grid.
        shape: Voxels along x, y and z.
        spacing: Voxel edges in mm.
        seed: Of the noise.
        thickness: Planes of a slab.

    Yields:
        CT numbers, int16 (X, Y, planes), and the organs' numbers from 1 on, uint8 of the same shape.
    """
    axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True)]
    x, y = axes[0][:, None, None], axes[1][None, :, None]
    outline = (x / body.half[0]) ** 2 + (y / body.half[1]) ** 2 <= 1
    for start in range(0, shape[2], thickness):
        z = axes[2][None, None, start : start + thickness]
        hu = np.where(np.broadcast_to(outline, (*shape[:2], z.size)), np.float32(TISSUE), np.float32(AIR))
        label = np.zeros(hu.shape, dtype=np.uint8)
        for number, (centre, radius, value) in enumerate(zip(body.centres, body.radii, body.hu, strict=True), 1):
            place = tuple(
                slice(*np.searchsorted(axis, (c - r, c + r)))
                for axis, c, r in zip((axes[0], axes[1], z.ravel()), centre, radius, strict=True)
            )
            points = (x[place[0]], y[:, place[1]], z[:, :, place[2]])
            inside = sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre, radius, strict=True)) <= 1
            hu[place][inside], label[place][inside] = value, number
        hu += np.random.default_rng([seed, start]).normal(0, NOISE, hu.shape).astype(np.float32)
        yield np.clip(np.rint(hu), -1024, 3071).astype(np.int16), label


def write_phantom(path: Path, body: Body, shape: Sequence[int], spacing: Sequence[float], *, seed: int = 0) -> None:
    """Writes the scan as .nii.gz, stored RAS, without ever holding it whole; a file that is there stays."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner")
    header.set_xyzt_units("mm")
    header["magic"], header["vox_offset"] = b"n+1", 352
    header.set_slope_inter(1, 0)
    draft = path.with_suffix(".draft")
    with gzip.open(draft, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4))
        for image, _ in paint(body, shape, spacing, seed=seed):
            file.write(image.tobytes(order="F"))
    draft.replace(path)


def fit_network(num_classes: int, *, spacing: float, window: int, seed: int = 0) -> nn.Module:
    """Gives mom3d_xs with random weights and a last convolution that tells the organs apart by intensity.

    Fitted in closed form on the features of a phantom, so that labels are regions and not speckle, the same on every
    machine, without training: class k has the logit m_k S^-1 f - m_k S^-1 m_k / 2 for features f, class means m_k and
    the covariance S within the classes (linear discriminants of equal priors).

    Args:
        num_classes: Background included.
        spacing: Of the working grid, mm.
        window: Edge of a window in voxels.
        seed: Of weights and phantom.

    Returns:
        The network in evaluation mode.
    """
    torch.manual_seed(seed)
    network = mom3d_xs(1, num_classes, deep_supervision=False).eval()
    # Random weights of a transposed convolution draw a chequerboard; zeros take as long to multiply with.
    nn.init.zeros_(network.decoder.stages[0].upsample.weight)
    shape = (window * 5 // 3,) * 3
    body = make_body([n * spacing for n in shape], num_classes - 1, seed=seed + 1)
    slabs = list(paint(body, shape, (spacing,) * 3, seed=seed + 1))
    image, label = (np.concatenate([slab[kind] for slab in slabs], axis=2) for kind in (0, 1))
    features: list[Tensor] = []
    network.heads[0].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0][0].flatten(1).double()))
    found = []
    with torch.inference_mode():
        for start in np.linspace(0, shape[0] - window, 4).astype(int):
            cut = (slice(start, start + window),) * 3
            network(_standardised(torch.from_numpy(image[cut]).float())[None, None])
            found.append(torch.from_numpy(label[cut]).flatten().long())
    network.heads[0]._forward_pre_hooks.clear()
    _set_discriminants(network.heads[0], torch.cat(features, dim=1).T, torch.cat(found))
    return network


def _set_discriminants(head: nn.Module, features: Tensor, label: Tensor) -> None:
    """Sets a convolution of kernel 1 to the linear discriminants of features (N, C) with classes ``label`` (N,)."""
    count, width = head.weight.shape[:2]
    sizes = torch.bincount(label, minlength=count).clamp(min=1)[:, None]
    means = torch.zeros(count, width, dtype=features.dtype).index_add(0, label, features) / sizes
    within = features - means[label]
    covariance = within.T @ within / len(within) + 1e-4 * torch.eye(width, dtype=features.dtype)
    weights = torch.linalg.solve(covariance, means.T).T
    with torch.no_grad():
        head.weight.copy_(weights.reshape(head.weight.shape))
        head.bias.copy_(-(weights * means).sum(dim=1) / 2)


def _standardised(hu: Tensor) -> Tensor:
    low, high = PREPARATION["clip"]  # type: ignore[misc]
    return (hu.clip(low, high) - PREPARATION["mean"]) / PREPARATION["std"]


def cut_head(network: nn.Module, num_classes: int) -> nn.Module:
    """Gives a network of the first classes alone: the same weights, fewer rows of the last convolution."""
    small = mom3d_xs(1, num_classes, deep_supervision=False)
    wanted = small.state_dict()
    tensors = network.state_dict()
    small.load_state_dict({name: tensor[: len(wanted[name])] for name, tensor in tensors.items()})
    return small.eval()


def save_model(folder: Path, network: nn.Module, num_classes: int, *, spacing: float, window: int) -> Path:
    """Writes the package of a network; one that is there is replaced."""
    names = ("background", *(f"organ_{number:03d}" for number in range(1, num_classes)))
    save_package(
        folder,
        cut_head(network, num_classes),
        labels=Labels(names, tuple(range(num_classes))),
        preparation=Preparation((spacing,) * 3, **PREPARATION),  # type: ignore[arg-type]
        patch=(window,) * 3,
        channels=("CT",),
        recipe={},
    )
    return folder
