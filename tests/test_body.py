"""The body mask holds the whole body: windows are spared, labels stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_network
from torch import Tensor, nn

from medmom.data.case import Case
from medmom.data.preparation import AXES, Preparation, prepare
from medmom.inference.body import body_mask
from medmom.inference.stream import StreamPlan, stream_logits, window_starts
from medmom.phantom import LABELS, make_phantom

CT = Preparation((4.0, 4.0, 4.0), "ct", clip=(-1000.0, 400.0), mean=-50.0, std=200.0)
PATCH = (8, 8, 8)


def in_units(hu: np.ndarray, preparation: Preparation = CT) -> np.ndarray:
    assert preparation.clip is not None
    assert preparation.mean is not None
    return ((np.clip(hu, *preparation.clip) - preparation.mean) / preparation.std).astype(np.float32)[None]


def air(shape: tuple[int, ...] = (64, 48, 40)) -> np.ndarray:
    rng = np.random.default_rng(0)
    return -1000 + 25 * rng.normal(size=shape)


def phantom(seed: int, preparation: Preparation = CT) -> tuple[np.ndarray, np.ndarray]:
    """Prepared image and label of a patient in plenty of air."""
    image, label, geometry = make_phantom(seed, shape=(96, 80, 40), spacing=(6.0, 6.0, 8.0), orientation="LPS")
    case = prepare(Case("a", image[None].astype(np.float32), label, geometry, ()), preparation)
    assert case.label is not None
    return case.image, case.label


def test_margin_and_body_are_in_the_mask() -> None:
    hu = air()
    hu[20:40, 15:30, 5:30] = 40
    mask = body_mask(in_units(hu), CT)
    assert mask is not None
    assert mask.shape == hu.shape
    assert mask.dtype == bool
    assert mask[18:42, 13:32, 3:32].all()
    # 10 mm are 2.5 voxels; cells of four voxels make them 11 at most.
    assert not mask[:8].any()
    assert not mask[52:].any()


@pytest.mark.parametrize("corner", [(0, 0, 0), (49, 36, 31)])
def test_a_body_at_the_border_is_not_lost(corner: tuple[int, int, int]) -> None:
    hu = air((61, 47, 41))
    place = tuple(slice(start, start + 12) for start in corner)
    hu[place] = 40
    mask = body_mask(in_units(hu), CT)
    assert mask is not None
    assert mask[place].all()


def test_both_legs_stay() -> None:
    hu = air()
    hu[8:20, 15:30] = 40
    hu[44:56, 15:30] = 40
    mask = body_mask(in_units(hu), CT)
    assert mask is not None
    assert mask[8:20, 15:30].all()
    assert mask[44:56, 15:30].all()
    assert not mask[:, 44:].any()


def test_a_hand_stays_and_a_speck_does_not() -> None:
    hu = air((128, 64, 64))
    hu[10:60, 10:54, 5:60] = 40
    hu[100:106, 20:40, 20:30] = 40
    hu[120, 60, 10] = 400
    mask = body_mask(in_units(hu), CT)
    assert mask is not None
    assert mask[100:106, 20:40, 20:30].all()
    assert not mask[112:].any()


@pytest.mark.parametrize("plane", list(AXES))
def test_lungs_that_the_image_cuts_open_belong_to_the_body(plane: str) -> None:
    hu = air((72, 64, 48))
    hu[30:72, 20:50, 5:40] = 40  # cut by the right border
    hu[40:72, 26:44, 5:40] = -900  # an open lung
    preparation = replace(CT, plane=plane)
    turned = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}[plane]
    mask = body_mask(in_units(hu).transpose(0, *(1 + axis for axis in turned)), preparation)
    assert mask is not None
    mask = mask.transpose(np.argsort(turned))
    assert mask[40:72, 26:44, 5:40].all()
    assert not mask[:16].any()


def test_odd_sizes_are_covered_to_the_last_voxel() -> None:
    hu = air((33, 30, 31))
    hu[30:, 27:, 28:] = 40
    mask = body_mask(in_units(hu), CT)
    assert mask is not None
    assert mask[32, 29, 30]


@pytest.mark.parametrize("level", [-1000, 40])
def test_without_body_or_without_air_there_is_no_mask(level: float) -> None:
    assert body_mask(in_units(np.full((20, 20, 20), level)), CT) is None


@pytest.mark.parametrize(
    "preparation",
    [
        Preparation((4.0, 4.0, 4.0), "zscore"),
        Preparation(None, "unit"),
        replace(CT, clip=(-160.0, 240.0)),
        replace(CT, clip=(-1000.0, -500.0)),
        replace(CT, spacing=None),
        Preparation((4.0, 4.0, 4.0), "ct"),
    ],
)
def test_where_air_cannot_be_told_there_is_no_mask(preparation: Preparation) -> None:
    hu = air()
    hu[20:40, 15:30, 5:30] = 40
    assert body_mask(in_units(hu), preparation) is None


def test_the_grids_own_spacing_serves_where_the_preparation_has_none() -> None:
    hu = air()
    hu[20:40, 15:30, 5:30] = 40
    preparation = replace(CT, spacing=None)
    found = body_mask(in_units(hu), preparation, spacing=(4.0, 4.0, 4.0))
    np.testing.assert_array_equal(found, body_mask(in_units(hu), CT))


@pytest.mark.parametrize("low", [-1000.0, -400.0, -260.0])
def test_fat_belongs_to_the_body_whatever_the_clip(low: float) -> None:
    preparation = replace(CT, clip=(low, 300.0))
    hu = air()
    hu[20:40, 15:30, 5:30] = -110 + 20 * np.random.default_rng(1).normal(size=(20, 15, 25))
    mask = body_mask(in_units(hu, preparation), preparation)
    assert mask is not None
    assert mask[20:40, 15:30, 5:30].all()
    assert not mask[:8].any()


def test_a_tenth_of_a_second_channel_counts_too() -> None:
    hu = air()
    empty = in_units(hu)
    hu[20:40, 15:30, 5:30] = 40
    mask = body_mask(np.concatenate([empty, in_units(hu)]), CT)
    assert mask is not None
    assert mask[20:40, 15:30, 5:30].all()


class Tissues(nn.Module):
    """Tells fat and soft tissue by the mean of a voxel's surroundings; all else is background."""

    def forward(self, window: Tensor) -> Tensor:
        mean = nn.functional.avg_pool3d(window, 3, stride=1, padding=1, count_include_pad=False)
        hu = mean * 200 - 50
        return torch.cat([torch.full_like(hu, 2.0), 6 - (hu + 100).abs() / 20, 6 - (hu - 60).abs() / 20], dim=1)


def label_map(network: nn.Module, image: np.ndarray, body: np.ndarray | None) -> tuple[Tensor, int]:
    """Labels, and the number of windows that ran."""
    count = []
    handle = network.register_forward_hook(lambda *_: count.append(1))
    plan = StreamPlan(PATCH, 0.25, 2, 1, torch.float32, on_device=False)
    parts = stream_logits(network, image, plan, device=torch.device("cpu"), body=body)
    label = torch.cat([logits.argmax(dim=0) for _, logits in parts], dim=2)
    handle.remove()
    return label, len(count)


@pytest.mark.parametrize(("seed", "low"), [(0, -1000.0), (1, -300.0)])
def test_labels_stay_and_windows_are_spared(seed: int, low: float) -> None:
    preparation = replace(CT, clip=(low, 400.0), spacing=(8.0, 8.0, 8.0))
    image, label = phantom(seed, preparation)
    mask = body_mask(image, preparation)
    assert mask is not None
    assert mask[label > 0].all()
    expected, num_windows = label_map(Tissues(), image, None)
    found, num_run = label_map(Tissues(), image, mask)
    assert (expected > 0).float().mean() > 0.05
    assert torch.equal(found, expected)
    assert num_run < 0.9 * num_windows


@pytest.mark.slow
def test_labels_of_a_trained_network_stay() -> None:
    preparation = replace(CT, spacing=(8.0, 8.0, 8.0))
    cases = [phantom(seed, preparation) for seed in range(5)]
    network = tiny_network(1, 4)
    loss, rng = nn.CrossEntropyLoss(), np.random.default_rng(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    # With fewer steps it still takes some air for organs, which skipping would mend.
    for step in range(400):
        image, label = cases[step % 4]
        # Every other one about an organ.
        centre = rng.choice(np.argwhere(label > 0)) if step % 2 else rng.integers(0, label.shape)
        corner = [int(np.clip(at - 8, 0, size - 16)) for at, size in zip(centre, label.shape, strict=True)]
        place = tuple(slice(start, start + 16) for start in corner)
        channels = torch.from_numpy(np.searchsorted(LABELS.values, label[place])).long()
        optimizer.zero_grad()
        logits = network(torch.from_numpy(image[(slice(None), *place)])[None])[0]
        loss(logits, channels[None]).backward()
        optimizer.step()
    image, label = cases[4]
    mask = body_mask(image, preparation)
    assert mask is not None
    assert mask[label > 0].all()
    expected, num_windows = label_map(network.eval(), image, None)
    found, num_run = label_map(network, image, mask)
    assert (expected > 0).float().mean() > 0.01
    assert torch.equal(found, expected), f"{int((found != expected).sum())} voxels"
    assert num_run < 0.9 * num_windows


def test_every_window_with_a_voxel_of_an_organ_runs() -> None:
    image, label = phantom(5)
    mask = body_mask(image, CT)
    assert mask is not None
    xs, ys, zs = window_starts(label.shape, PATCH, 0.5)
    for x in xs:
        for y in ys:
            for z in zs:
                place = (slice(x, x + 8), slice(y, y + 8), slice(z, z + 8))
                assert mask[place].any() or not label[place].any()
