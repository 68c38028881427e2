"""Scans of drawn patients: arrays for the tests, a folder of files for the demo."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import Labels
from medmom.phantom.anatomy import Patient, cross_sections, fat_thickness, paint_body
from medmom.phantom.atlas import COLON, LIVER, LUNGS
from medmom.phantom.shapes import Canvas, waves

LABELS = Labels(("background", "liver", "lungs", "colon"), (0, LIVER, LUNGS, COLON))
FIELD_OF_VIEW = (384.0, 324.0)
ORIENTATIONS = ("RAS", "LAS", "LPS", "RPI", "PIR", "ASL")
FILE_ENDING = ".nii.gz"


def make_phantom(
    seed: int | Sequence[int],
    *,
    shape: Sequence[int],
    spacing: Sequence[float],
    orientation: str = "RAS",
    tilt: Sequence[float] = (0.0, 0.0, 0.0),
) -> tuple[np.ndarray, np.ndarray, Geometry]:
    """Scans one synthetic patient from the upper chest to the hips.

    The seed alone draws the patient and where he lies, the grid only samples him: the same seed on another grid,
    in another orientation, shows the same body with other noise. A field of view of about 384 x 324 x 384 mm holds
    it; what lies outside is cut off.

    Args:
        seed: One number or several, not negative.
        shape: Number of voxels to the right, to the front and to the head.
        spacing: Voxel edges in mm, in the same order.
        orientation: How the axes of the result lie, such as ``"LPS"``.
        tilt: Turn of the grid about the world's axes x, y, z, in degrees.

    Returns:
        CT numbers (``int16``, HU), label with the values of ``LABELS`` (``uint8``), both with axes as
        ``orientation`` says, and their grid.
    """
    drawn, scanned = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    patient = Patient.draw(drawn)
    origin = np.array([drawn.normal(0, 8), drawn.normal(-140, 8), drawn.uniform(-500, 100)])
    centre = origin + drawn.normal((0, -5, -48), (3, 3, 8))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() * np.array(spacing)
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    geometry = Geometry(tuple(shape), affine).reoriented(orientation)
    image, label = _scan(patient, origin, geometry, scanned)
    return image, label, geometry


def _scan(
    patient: Patient, origin: np.ndarray, geometry: Geometry, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What a scanner with its table and its noise sees of a patient lying at ``origin``."""
    index = np.indices(geometry.shape, dtype=np.float32).reshape(3, -1)
    world = (geometry.affine[:3, :3] @ index + (geometry.affine[:3, 3] - origin)[:, None]).astype(np.float32)
    turn = Rotation.from_euler("xyz", patient.rng.normal(0, (1.5, 1.5, 3.0)), degrees=True).as_matrix()
    points = ((turn.T / patient.size[:, None]) @ world).astype(np.float32)
    points += 3.5 * np.stack([waves(points, patient.rng, 170) for _ in range(3)])
    edge = float(np.mean(geometry.spacing))

    scene = Canvas(world, edge=edge, hu=np.full(world.shape[1], -1000, dtype=np.float32))
    table = np.abs(np.hypot(world[0], world[1] - 480) - (598 + patient.fat)) - 9
    scene.paint(np.maximum(table, np.abs(world[0]) - 205), -760)
    skin = cross_sections(points)[1] - fat_thickness(points, patient)
    near = np.flatnonzero(skin < edge)
    body = Canvas(points[:, near], edge=edge, hu=scene.hu[near])
    paint_body(body, patient)
    scene.hu[near], scene.label[near] = body.hu, body.label

    noise = gaussian_filter(rng.standard_normal(geometry.shape, dtype=np.float32), 0.6)
    image = scene.hu.reshape(geometry.shape) + noise * (rng.uniform(15, 25) / noise.std())
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16), scene.label.reshape(geometry.shape)


def make_phantoms(folder: Path, *, num_cases: int, seed: int = 0) -> None:
    """Writes a folder of synthetic scans that differ in body, grid, orientation and contrast.

    The folder holds ``images/``, ``labels/``, ``dataset.json`` and ``cases.csv`` (columns file, patient; one scan a
    patient). Case k is the same whatever ``num_cases`` is.

    Args:
        folder: New or without scans; made where missing.
        num_cases: At least 1.
        seed: Another one gives other patients.

    Raises:
        MedmomError: The folder holds scans already or cannot be written, or ``num_cases`` is below 1.
    """
    if num_cases < 1:
        raise MedmomError(f"num_cases is {num_cases}: ask for 1 phantom or more.")
    if any((folder / name).exists() for name in ("images", "labels", "dataset.json", "cases.csv")):
        raise MedmomError(f"{folder}: holds a data set already. Name another folder.")
    try:
        _write_phantoms(folder, num_cases, seed)
    except OSError as error:
        raise MedmomError(f"{folder}: cannot be written ({error.strerror}). Name another folder.") from error


def _write_phantoms(folder: Path, num_cases: int, seed: int) -> None:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    files = [f"phantom_{number:03d}{FILE_ENDING}" for number in range(num_cases)]
    for number, file in enumerate(files):
        rng = np.random.default_rng([seed, number, 2])
        edge, thickness = rng.uniform(4.5, 6.0), rng.uniform(5.0, 8.0)
        spacing = np.round([edge, edge, thickness], 2)
        shape = np.ceil(np.array([*FIELD_OF_VIEW, rng.uniform(345, 400)]) / spacing).astype(int)
        image, label, geometry = make_phantom(
            [seed, number],
            shape=shape.tolist(),
            spacing=spacing.tolist(),
            orientation=str(rng.choice(ORIENTATIONS)),
            tilt=rng.normal(0, 3, 3).tolist(),
        )
        _write(folder / "images" / file, image, geometry)
        _write(folder / "labels" / file, label, geometry)
    _write_tables(folder, files)


def _write(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    nifti = nib.Nifti1Image(array, geometry.affine)
    nifti.set_sform(geometry.affine, code="scanner")
    nifti.set_qform(geometry.affine, code="scanner")
    nifti.header.set_xyzt_units("mm")
    nib.save(nifti, path)


def _write_tables(folder: Path, files: Sequence[str]) -> None:
    dataset = {
        "name": "phantoms",
        "description": "Synthetic CT of chest and abdomen; no patient was scanned",
        "channel_names": {"0": "CT"},
        "labels": dict(zip(LABELS.names, LABELS.values, strict=True)),
        "numTraining": len(files),
        "file_ending": FILE_ENDING,
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=2) + "\n", encoding="utf-8")
    with (folder / "cases.csv").open("w", newline="", encoding="utf-8") as table:
        rows = csv.writer(table)
        rows.writerow(["file", "patient"])
        rows.writerows([file, f"patient_{number:03d}"] for number, file in enumerate(files))
