from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import save_tiny

from medmom.data.cache import CaseCache
from medmom.data.case import Case, CaseFiles, read_case
from medmom.data.files import read_image, read_label, write_label
from medmom.data.preparation import Preparation, prepare, restore
from medmom.data.transforms import PrepareCased, to_sample
from medmom.geometry import Geometry
from medmom.inference.predictor import Predictor
from medmom.labels import Labels

LABELS = Labels(("background", "organ"), (0, 3))
ORIENTATIONS = [
    "".join(code) for order in itertools.permutations(["RL", "AP", "SI"]) for code in itertools.product(*order)
]


def oblique_grid(seed: int, size: int = 36) -> Geometry:
    """A random rotated grid of about ``size`` voxels along each axis, each edge between 0.4 and 4 mm."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.exp(rng.uniform(np.log(0.4), np.log(4), size=3))
    affine[:3, 3] = rng.normal(scale=100, size=3)
    return Geometry(tuple(rng.integers(size - 2, size + 3, size=3)), affine)


def upright_grid(orientation: str) -> Geometry:
    affine = np.diag([0.9, 1.3, 2.1, 1.0])
    affine[:3, 3] = [-40.5, 12.0, 77.25]
    base = Geometry((34, 30, 32), affine)
    return base.reoriented(orientation)


def ellipsoid(geometry: Geometry, seed: int) -> np.ndarray:
    """A tilted ellipsoid off the centre, so that it shows when the grid is turned or mirrored."""
    rng = np.random.default_rng(seed)
    shape = np.array(geometry.shape)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    tilt, _ = np.linalg.qr(np.eye(3) + 0.3 * rng.normal(size=(3, 3)))
    centre = (shape - 1) / 2 + rng.uniform(-1.5, 1.5, size=3)
    radii = shape * rng.uniform(0.34, 0.42, size=3)
    return np.asarray((((index - centre) @ tilt / radii) ** 2).sum(axis=-1) < 1)


def centre_mm(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.asarray(affine[:3, :3] @ np.argwhere(mask).mean(axis=0) + affine[:3, 3])


def moved(mask: np.ndarray, affine: np.ndarray, organ: np.ndarray, own: np.ndarray) -> float:
    """How far the centre of mass lies from the organ's in the world, in voxels of the own grid."""
    apart = centre_mm(mask, affine) - centre_mm(organ, own)
    return float(np.abs(np.linalg.solve(own[:3, :3], apart)).max())


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def save(path: Path, array: np.ndarray, geometry: Geometry) -> Path:
    nib.save(nib.Nifti1Image(array, geometry.affine), path)
    return path


def check_round_trip(geometry: Geometry, factor: np.ndarray, seed: int, folder: Path) -> None:
    """From file to working grid and back to a file: same grid, and the ellipsoid where it was, in mm.

    Args:
        geometry: Grid of the case.
        factor: Working spacing over the case's own, by working axis.
        seed: Of the ellipsoid.
        folder: For the files.
    """
    organ = ellipsoid(geometry, seed)
    noise = np.random.default_rng(seed).normal(size=organ.shape)
    image_path = save(folder / "image.nii", (organ * 100 + noise).astype(np.float32), geometry)
    label_path = save(folder / "label.nii", organ.astype(np.uint8) * 3, geometry)
    case = read_case(CaseFiles("case", (image_path,), label_path, "case"), LABELS)
    assert case.label is not None
    spacing = np.array(case.geometry.reoriented("RAS").spacing) * factor
    prepared = prepare(case, Preparation(tuple(spacing), "zscore"))
    working = prepared.geometry
    assert working.orientation == "RAS"
    np.testing.assert_allclose(working.spacing, spacing, rtol=1e-4)
    assert prepared.image.shape == (1, *working.shape)
    assert prepared.label is not None

    # The image and the label lie where they lay, in mm: neither may move with the other.
    bright = prepared.image[0] > (prepared.image.min() + prepared.image.max()) / 2
    for mask in (prepared.label == 1, bright):
        assert moved(mask, working.affine, organ, geometry.affine) < 0.2

    logits = np.stack([prepared.label == 0, prepared.label == 1]).astype(np.float32)
    restored = restore(logits, working, case.geometry)
    like = read_image(image_path)
    write_label(folder / "out.nii", LABELS.to_values(restored), LABELS, like)
    written = nib.load(folder / "out.nii")
    assert written.shape == geometry.shape
    np.testing.assert_allclose(written.affine, nib.load(image_path).affine, rtol=0, atol=1e-6)
    back = read_label(folder / "out.nii").array == 3
    assert dice(back, organ) >= 0.97
    assert moved(back, written.affine, organ, geometry.affine) < 0.2


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_organ_stays_in_place_in_every_orientation(orientation: str, tmp_path: Path) -> None:
    seed = ORIENTATIONS.index(orientation)
    check_round_trip(upright_grid(orientation), np.random.default_rng(seed).uniform(0.7, 1.5, size=3), seed, tmp_path)


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_organ_stays_in_place_on_oblique_anisotropic_grids(start: int, tmp_path: Path) -> None:
    for seed in range(start, start + 20):
        factor = np.random.default_rng(1000 + seed).uniform(0.7, 1.5, size=3)
        check_round_trip(oblique_grid(seed), factor, seed, tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_organ_stays_in_place_at_one_and_a_half_voxels_along_every_axis(seed: int, tmp_path: Path) -> None:
    check_round_trip(oblique_grid(seed, size=48), np.full(3, 1.5), seed, tmp_path)


def test_own_spacing_is_given_back_voxel_for_voxel() -> None:
    for orientation in ORIENTATIONS:
        geometry = upright_grid(orientation)
        organ = ellipsoid(geometry, 7).astype(np.uint8)
        case = prepare(Case("", organ[None].astype(np.float32), organ, geometry, ()), Preparation(None, "zscore"))
        logits = np.stack([case.label == 0, case.label == 1]).astype(np.float32)
        np.testing.assert_array_equal(restore(logits, case.geometry, geometry), organ)


CT = Preparation((1.1, 0.9, 2.5), "ct", (-160.0, 240.0), 40.5, 77.25)
MRI = Preparation((1.1, 0.9, 2.5), "zscore")


@pytest.mark.parametrize("preparation", [CT, MRI], ids=["ct", "mri"])
@pytest.mark.parametrize("grid", ["oblique", "LAS", "ASL"])
def test_training_and_inference_prepare_the_same_bits(grid: str, preparation: Preparation, tmp_path: Path) -> None:
    geometry = oblique_grid(5) if grid == "oblique" else upright_grid(grid)
    organ = ellipsoid(geometry, 1)
    noise = np.random.default_rng(1).normal(scale=50, size=organ.shape)
    image = save(tmp_path / "image.nii.gz", (organ * 150 + noise).astype(np.int16), geometry)
    label = save(tmp_path / "label.nii.gz", organ.astype(np.uint8) * 3, geometry)
    files = CaseFiles("case", (image,), label, "case")

    (cached,) = CaseCache(tmp_path / "cache", LABELS, quiet=True).prepare([files], preparation)
    trained, _, _ = cached.open()
    piped = PrepareCased(preparation)(to_sample(read_case(files, LABELS)))
    seen = what_the_network_sees(image, preparation, trained.geometry.shape, tmp_path)

    np.testing.assert_array_equal(np.asarray(piped["image"]), np.asarray(trained.image))
    np.testing.assert_array_equal(np.asarray(piped["label"][0]), np.asarray(trained.label))
    np.testing.assert_array_equal(np.asarray(piped["image"].affine), trained.geometry.affine)
    np.testing.assert_array_equal(seen, np.asarray(trained.image))
    assert seen.dtype == trained.image.dtype == np.float32


def what_the_network_sees(image: Path, preparation: Preparation, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    """The only window of predict, without the padding to the size of a window."""
    patch = [4 * -(-n // 4) for n in shape]
    predictor = Predictor(save_tiny(folder / "model", preparation=preparation, patch=patch), device="cpu")
    windows: list[torch.Tensor] = []
    hook = predictor.package.network.register_forward_pre_hook(lambda _, args: windows.append(args[0].clone()))
    predictor(image, quiet=True)
    hook.remove()
    (window,) = windows
    starts = [(p - n) // 2 for p, n in zip(patch, shape, strict=True)]
    place = tuple(slice(start, start + n) for start, n in zip(starts, shape, strict=True))
    return window[(0, slice(None), *place)].numpy()
