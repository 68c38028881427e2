"""A patient's body as smooth surfaces, and how to paint it.

Coordinates are the patient's own, in mm: x to the right, y to the front, z to the head; the origin lies before the
spine at the height of the diaphragm. ``atlas`` gives an average adult, ``Patient`` how one differs from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

from medmom.phantom import atlas
from medmom.phantom.shapes import KEEP, STEP, Canvas, domes, meet, outline, smooth_course, waves


@dataclass(frozen=True, eq=False)
class Patient:
    """How one patient differs from the tables.

    Attributes:
        rng: Source of the organs' own variation; used up while the body is painted.
        hu: CT number by tissue.
        fat: Thickness under the skin in mm.
        breath: How far the organs below the diaphragm lie higher, in mm.
        tops: Highest points (x, y, z) of the right and the left dome of the diaphragm.
        size: Scale of the body along x, y and z.
    """

    rng: np.random.Generator
    hu: dict[str, float]
    fat: float
    breath: float
    tops: np.ndarray
    size: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Patient:
        """Draws a patient, without contrast or in one of two phases of it."""
        phase, dose = rng.integers(3), rng.uniform(0.75, 1.15)
        hu = {
            name: row[0] + (dose * row[phase] if phase else 0) + rng.normal(0, 4) for name, row in atlas.TISSUES.items()
        }
        breath = rng.normal(0, 9)
        tops = np.array([(62, 4, 20 + breath), (-62, 4, 8 + breath)]) + rng.normal(0, 4, (2, 3))
        size = rng.normal(0.97, 0.02) * np.exp(rng.normal(0, 0.025, 3))
        return cls(rng, hu, rng.uniform(7, 28), breath, tops, size)

    def course(self, nodes: ArrayLike, *, jitter: float) -> np.ndarray:
        """Moves, bends and thickens a tube as this patient has it, shape (rows, 4); ``jitter`` is in mm."""
        rows = np.array(nodes, dtype=np.float64)
        rows[:, :3] += self.rng.normal(0, jitter, 3) + self.rng.normal(0, jitter / 2, (len(rows), 3))
        rows[:, 2] += self.breath * np.exp(-(((rows[:, 2] + 60) / 90) ** 2))
        rows[:, 3] *= np.exp(self.rng.normal(0, 0.07))
        return smooth_course(rows)


def cross_sections(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the body cavity and to the muscles around it."""
    table = np.array(atlas.OUTLINES, dtype=np.float64)
    heights = np.clip(points[2], table[0, 0], table[-1, 0])
    # A curve read off every millimetre costs a tenth of one evaluated everywhere.
    grid = np.arange(table[0, 0], table[-1, 0] + 1)
    axes = PchipInterpolator(table[:, 0], table[:, 1:])(grid).T
    wide, deep, muscle_wide, muscle_deep = (np.interp(heights, grid, axis).astype(np.float32) for axis in axes)
    centred = points - np.array([[0], [4], [0]], dtype=np.float32)
    return outline(centred, wide, deep, power=2.5), outline(centred, muscle_wide, muscle_deep, power=2.3)


def fat_thickness(points: np.ndarray, patient: Patient) -> np.ndarray:
    """Fat under the skin in mm: more at the belly than at the chest, more in front than behind."""
    x, y, z = points
    return np.asarray(patient.fat * (1 + 0.35 * np.tanh(-z / 120)) * (1 + 0.25 * np.sin(np.arctan2(y, np.abs(x) + 1))))


def paint_body(canvas: Canvas, patient: Patient) -> None:
    """Paints the whole body, from the skin inwards."""
    cavity, muscle = cross_sections(canvas.points)
    diaphragm = domes(canvas.points, patient.tops)
    belly = np.maximum(cavity + 2, diaphragm + 3)
    canvas.paint(muscle - fat_thickness(canvas.points, patient), patient.hu["fat"])
    canvas.paint(muscle, patient.hu["muscle"] - 20 + 16 * waves(canvas.points, patient.rng, 40))
    canvas.paint(cavity, patient.hu["fat"] + 12)
    _paint_ribs_and_hips(canvas, patient, cavity)
    _paint_spine(canvas, patient)
    _paint_organs(canvas, patient, belly)
    _paint_stomach(canvas, patient, belly)
    _paint_liver(canvas, patient, belly)
    _paint_colon(canvas, patient, belly)
    canvas.paint(np.maximum(np.maximum(cavity, diaphragm), -4 - diaphragm), patient.hu["muscle"], KEEP)
    _paint_lungs(canvas, patient, cavity, diaphragm)
    _paint_heart_and_vessels(canvas, patient, np.maximum(cavity + 6, 3 - diaphragm))


def _paint_ribs_and_hips(canvas: Canvas, patient: Patient, cavity: np.ndarray) -> None:
    x, y, z = canvas.points
    shell, pitch = cavity - 6, patient.rng.uniform(25, 30)
    band = np.mod(z + 0.45 * y, pitch) - pitch / 2
    costal_arch = 0.62 * np.maximum(y + 80, 0) - 95
    ribs = meet(np.hypot(shell * 1.2, 0.8 * band) - 5.5, costal_arch - z, round_mm=2)
    canvas.paint(ribs, np.where(y > 60, 150.0, 620.0))  # cartilage in front
    breastbone = np.maximum(np.maximum(np.abs(shell) - 5, np.abs(x) - 16), np.maximum(5 - z, -y))
    canvas.paint(breastbone, 260)
    canvas.paint(np.hypot((np.abs(x) - 34) / 1.25, y + 82) - 19, patient.hu["muscle"])  # along the spine
    crest = z + 195 + (y + 15) ** 2 / 60
    canvas.paint(meet(np.abs(shell) - 5, crest, 46 - np.abs(x), round_mm=3), 430)


def _paint_spine(canvas: Canvas, patient: Patient) -> None:
    x, y, z = canvas.points
    pitch = patient.rng.uniform(30, 35)
    level = np.abs(np.mod(z, pitch) - pitch / 2)
    canal = np.hypot(x, y + 75)
    spinous = np.maximum(np.maximum(np.abs(x) - 5, np.abs(y + 90) - 13), level - 9)
    transverse = np.maximum(np.hypot(y + 72 + 0.15 * np.abs(x), level) - 6, np.abs(x) - 34)
    body = np.hypot(x / 1.2, y + 52) - 17 + 2.5 * np.cos(2 * np.pi * z / pitch)
    canvas.paint(np.minimum(np.minimum(spinous, transverse), canal - 13), 420)
    canvas.paint(body, 480)
    canvas.paint(body + 4, patient.hu["marrow"] + 25 * waves(canvas.points, patient.rng, 25))
    canvas.paint(np.maximum(body, pitch / 2 - 3.5 - level), 85)  # discs
    canvas.paint(canal - 8, 25)


def _paint_organs(canvas: Canvas, patient: Patient, belly: np.ndarray) -> None:
    """Organs with CT numbers like the liver's, and loops of small bowel that mimic the colon."""
    for tissue, nodes in atlas.ORGANS:
        distance, at, _ = canvas.tube(patient.course(nodes, jitter=4.0))
        canvas.paint(np.maximum(distance, belly[at]), patient.hu[tissue], at=at)
    t = np.arange(18.0)
    side, front = 58 * np.sin(2.4 * t), 24 + 30 * np.sin(1.7 * t + 1)
    loops = np.stack([side, front, -140 - 6.5 * t, 14 + 2 * np.sin(5 * t)], axis=1)
    distance, at, nearest = canvas.tube(patient.course(loops, jitter=6.0))
    distance = np.maximum(distance, belly[at])
    canvas.paint(distance, patient.hu["bowel"], at=at)
    pockets = np.maximum(distance + 4, 15 * (0.8 - np.sin(nearest / 7)))
    canvas.paint(pockets, -850, at=at)


def _paint_stomach(canvas: Canvas, patient: Patient, belly: np.ndarray) -> None:
    distance, at, _ = canvas.tube(patient.course(atlas.STOMACH, jitter=4.0))
    distance = np.maximum(distance, belly[at])
    gas_from = patient.rng.uniform(12, 40)
    canvas.paint(distance, patient.hu["wall"], at=at)
    canvas.paint(distance + 5, patient.hu["stomach"], at=at)
    canvas.paint(np.maximum(distance + 5, gas_from - canvas.points[1, at]), -920, at=at)


def _paint_liver(canvas: Canvas, patient: Patient, belly: np.ndarray) -> None:
    """A wedge under the right dome, thin towards the left, with vessels, gall bladder and at times cysts."""
    x, y, z = canvas.points
    rng, hu = patient.rng, patient.hu
    lowest, reach = patient.tops[0, 2] - 128 + rng.normal(0, 10), rng.normal(11, 7)
    below = -0.5 * (x - 108) - 0.24 * y - 0.83 * (z - lowest)
    behind = -0.74 * (x - reach) - 0.67 * (y + 26)
    liver = meet(belly, below, behind, round_mm=16) - 1 + 1.5 * waves(canvas.points, rng, 70)
    canvas.paint(liver, hu["liver"] + 4 * waves(canvas.points, rng, 30), atlas.LIVER)
    for nodes in atlas.LIVER_VESSELS:
        distance, at, _ = canvas.tube(patient.course(nodes, jitter=2.0))
        canvas.paint(np.maximum(distance, liver[at] + 3), hu["vein"] - 5, KEEP, at)
    for _ in range(rng.integers(0, 3)):
        centre, radius = rng.uniform((40, -30, -70), (95, 40, -25)), rng.uniform(5, 14)
        distance, at, _ = canvas.tube(np.array([[*centre, radius]]))
        canvas.paint(np.maximum(distance, liver[at] + 3), hu["bile"] + 8, KEEP, at)
    bladder = ((46, 22, lowest + 40, 9), (50, 40, lowest + 22, 14), (52, 52, lowest + 8, 15), (53, 58, lowest, 11))
    distance, at, _ = canvas.tube(patient.course(bladder, jitter=3.0))
    canvas.paint(distance, hu["bile"], at=at)


def _paint_colon(canvas: Canvas, patient: Patient, belly: np.ndarray) -> None:
    """A pouched tube around the belly: wall, stool, and gas on top, more of it where the colon lies in front."""
    rng = patient.rng
    nodes = np.array(atlas.COLON_COURSE, dtype=np.float64)
    nodes[4:8, 2] += rng.normal(-4, 12) * np.array([0.5, 1, 1, 0.6])  # how low its middle hangs
    course = patient.course(nodes, jitter=3.5)
    along = STEP * np.arange(len(course))
    course[:, 3] *= 1 + 0.12 * np.cos(2 * np.pi * along / rng.uniform(36, 46) + rng.uniform(0, 6))
    distance, at, nearest = canvas.tube(course)
    distance, points = np.maximum(distance, belly[at]), canvas.points[:, at]
    canvas.paint(distance, patient.hu["wall"], atlas.COLON, at)
    stool = 5 + 45 * np.minimum(waves(points, rng, 24), 0.8) - 30 * (waves(points, rng, 15) > 1.3)
    canvas.paint(distance + 4, stool, KEEP, at)
    fill = 0.45 - course[:, 1] / 55 + 0.7 * waves(course[:, :3].T, rng, 110)
    surface = (course[:, 1] + np.clip(fill, -1.2, 1.2) * course[:, 3])[nearest]
    canvas.paint(np.maximum(distance + 4, surface - points[1]), -930, KEEP, at)


def _paint_lungs(canvas: Canvas, patient: Patient, cavity: np.ndarray, diaphragm: np.ndarray) -> None:
    """Both lungs, denser behind, with vessels that thin out from the middle of the chest."""
    x, y, z = canvas.points
    rng = patient.rng
    middle = 21 + 5 * np.tanh((-y - 20) / 12) - 9 * np.tanh((y - 45) / 12) + 8 * np.tanh((20 - z) / 30)
    lungs = meet(cavity + 1, 2 - diaphragm, middle - np.abs(x - 2), round_mm=9)
    canvas.paint(lungs, rng.normal(-855, 18) - 0.45 * y + 14 * waves(canvas.points, rng, 60), atlas.LUNGS)
    at = np.flatnonzero(lungs < -3)
    x, y, z = points = canvas.points[:, at]
    hilum = ((np.abs(x) - 30) ** 2 + (y + 5) ** 2 + (z - 70) ** 2) / 85**2
    for wavelength, width in ((85, 0.22), (50, 0.18)):
        # Two smooth fields vanish together along lines: branches without a tree.
        crossing = np.hypot(waves(points, rng, wavelength), waves(points, rng, wavelength))
        canvas.hu[at] += 620 * np.exp(-((crossing / width) ** 2) - hilum)


def _paint_heart_and_vessels(canvas: Canvas, patient: Patient, chest: np.ndarray) -> None:
    distance, at, _ = canvas.tube(patient.course(atlas.HEART, jitter=3.0))
    distance = np.maximum(distance, chest[at])
    canvas.paint(distance, patient.hu["fat"] + 10, at=at)
    canvas.paint(distance + 5, patient.hu["heart"], at=at)
    for tissue, nodes in atlas.VESSELS:
        distance, at, _ = canvas.tube(patient.course(nodes, jitter=1.5))
        canvas.paint(distance, patient.hu[tissue], at=at)
    for airway in atlas.AIRWAYS:
        distance, at, _ = canvas.tube(patient.course(airway, jitter=0.5))
        canvas.paint(distance - 2, 20, at=at)
        canvas.paint(distance, -990, at=at)
