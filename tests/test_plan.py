from __future__ import annotations

import numpy as np
import pytest

from medmom.data.plan import BUDGETS, choose_intensity, choose_spacing, plan_patch, propose
from medmom.geometry import Geometry


def test_spacing_is_the_median() -> None:
    spacings = np.array([[0.7, 0.7, 1.0], [0.8, 0.8, 1.0], [0.9, 0.9, 5.0]])
    spacing, reason = choose_spacing(spacings, np.full((3, 3), 100.0))
    assert spacing == (0.8, 0.8, 1.0)
    assert "median of 3 cases" in reason


def test_coarse_axis_takes_its_tenth_percentile() -> None:
    spacings = np.array([[0.8, 0.8, edge] for edge in np.linspace(2, 6, 11)])
    spacing, reason = choose_spacing(spacings, np.tile([512, 512, 100], (11, 1)))
    assert spacing == (0.8, 0.8, 2.4)
    assert "axis S" in reason


def test_coarse_axis_never_becomes_finer_than_the_others() -> None:
    spacings = np.array([[1.0, 1.0, edge] for edge in (0.2, 0.2, 4.0, 4.0, 4.0)])
    assert choose_spacing(spacings, np.tile([512, 512, 100], (5, 1)))[0] == (1.0, 1.0, 1.0)


def test_coarse_axis_with_many_voxels_keeps_its_median() -> None:
    spacings = np.array([[0.8, 0.8, edge] for edge in np.linspace(2, 6, 11)])
    assert choose_spacing(spacings, np.tile([512, 512, 400], (11, 1)))[0] == (0.8, 0.8, 4.0)


@pytest.mark.parametrize(
    ("spacing", "shape", "patch", "num_stages"),
    [
        # nnU-Net's own plan of the decathlon's hippocampus, and of its liver within the same number of voxels.
        ((1.0, 1.0, 1.0), (36, 50, 35), (40, 56, 40), 4),
        ((0.77, 0.77, 1.0), (512, 512, 482), (128, 128, 128), 6),
    ],
)
def test_patch_is_that_of_nnunet(
    spacing: tuple[float, ...], shape: tuple[int, ...], patch: tuple[int, ...], num_stages: int
) -> None:
    plan = plan_patch(spacing, shape, device="gpu")
    assert (plan.patch, plan.num_stages) == (patch, num_stages)


@pytest.mark.parametrize("device", sorted(BUDGETS))
@pytest.mark.parametrize("seed", range(20))
def test_patch_keeps_the_budget_and_is_no_larger_than_the_padded_case(device: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spacing, shape = rng.uniform(0.3, 6, 3), rng.integers(3, 600, 3)
    plan = plan_patch(spacing, shape, device=device)
    assert np.prod(plan.patch) <= plan.budget
    assert (np.array(plan.patch) < shape + 2 ** (plan.num_stages - 1)).all()
    assert 1 <= plan.num_stages <= BUDGETS[device][1]


def test_coarse_axis_is_halved_later() -> None:
    plan = plan_patch((0.78, 0.78, 3.0), (512, 512, 150), device="gpu")
    assert plan.patch[2] < min(plan.patch[:2])
    assert plan.patch[0] % 32 == 0


def test_only_axis_left_to_halve_needs_twelve_voxels() -> None:
    assert plan_patch((1.0, 1.0, 1.0), (8, 6, 6), device="cpu").num_stages == 1
    assert plan_patch((1.0, 1.0, 1.0), (12, 6, 6), device="cpu").num_stages == 2


def test_ct_is_clipped_at_percentiles_of_the_foreground() -> None:
    foreground = [np.arange(0, 501.0), np.arange(501, 1001.0)]
    preparation, reason = choose_intensity((1.0, 1.0, 1.0), ["CT"], foreground)
    assert preparation.intensity == "ct"
    assert preparation.clip == pytest.approx((5, 995))
    assert preparation.mean == pytest.approx(500)
    assert "percentile" in reason


def test_mri_has_a_z_score_and_ct_under_another_name_a_hint() -> None:
    preparation, reason = choose_intensity((1.0, 1.0, 1.0), ["T1", "CT"], [np.array([5.0, 900.0])])
    assert preparation.intensity == "zscore"
    assert "name the channel CT" not in reason
    assert "name the channel CT" in choose_intensity((1.0, 1.0, 1.0), ["scan"], [np.array([-900.0])])[1]


def test_ct_without_foreground_leaves_the_limits_open() -> None:
    preparation, reason = choose_intensity((1.0, 1.0, 1.0), ["ct"], [np.zeros(0)])
    assert preparation.clip is None
    assert "no labelled foreground" in reason


def test_proposal_is_in_the_axis_order_of_the_working_grid() -> None:
    sagittal = Geometry((20, 200, 300), np.array([[0, 0, -0.5, 0], [0, -0.5, 0, 0], [4.0, 0, 0, 0], [0, 0, 0, 1]]))
    proposal = propose([sagittal] * 3, ["MRI"], [np.ones(3)])
    assert proposal.preparation.spacing == (0.5, 0.5, 4.0)
    assert proposal.shape == (300, 200, 20)
    assert [plan.device for plan in proposal.patches] == ["cpu", "gpu"]
    assert len(proposal.reasons) == 3
