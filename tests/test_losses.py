from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medmom.labels import IGNORE
from medmom.tasks.losses import DiceCrossEntropy, merge_unannotated

SMOOTH = 1e-5


def random_batch(*, batch: int = 3, classes: int = 4, size: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels (some to be ignored) and flags that say every class is annotated."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, size, size + 1, size - 1)
    logits = 2 * torch.randn(batch, classes, *shape[1:], generator=generator)
    label = torch.randint(0, classes, (batch, 1, *shape[1:]), generator=generator).to(torch.uint8)
    label[torch.rand(label.shape, generator=generator) < 0.1] = IGNORE
    return logits, label, torch.ones(batch, classes, dtype=torch.bool)


def as_read(label: Tensor, annotated: Tensor) -> Tensor:
    """Labels as a case has them: what was not looked for is background."""
    label = label.clone()
    for case, k in annotated.logical_not().nonzero().tolist():
        label[case][label[case] == k] = 0
    return label


def naive(logits: Tensor, label: Tensor, annotated: Tensor, *, batch_dice: bool) -> Tensor:
    """Voxel by voxel and class by class, in double precision."""
    probabilities = logits.double().softmax(dim=1)
    for case, seen in enumerate(annotated):
        for k in range(1, len(seen)):
            if not seen[k]:
                probabilities[case, 0] += probabilities[case, k]
                probabilities[case, k] = 0
    counts = label[:, 0] != IGNORE
    entropies = [
        -probabilities[(case, int(label[case, 0, x, y, z]), x, y, z)].log()
        for case, x, y, z in counts.nonzero().tolist()
    ]
    groups = [list(range(len(label)))] if batch_dice else [[case] for case in range(len(label))]
    dice = []
    for group in groups:
        for k in range(1, logits.shape[1]):
            if not annotated[group, k].any():
                continue
            found = torch.stack([probabilities[case, k][counts[case]].sum() for case in group]).sum()
            wanted = sum(float((label[case, 0] == k).sum()) for case in group)
            both = torch.stack([probabilities[case, k][label[case, 0] == k].sum() for case in group]).sum()
            dice.append(1 - (2 * both + SMOOTH) / (found + wanted + SMOOTH))
    return torch.stack(dice).mean() + torch.stack(entropies).mean()


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_loss_equals_its_definition(batch_dice: bool, partial: bool, classes: int) -> None:
    logits, label, annotated = random_batch(classes=classes)
    if partial:
        annotated[1:, 1] = classes == 2  # of two classes one stays, in some cases
        annotated[0, [1, -1]] = False
        label = as_read(label, annotated)
    loss = DiceCrossEntropy(batch_dice=batch_dice)(logits, label, annotated)
    assert loss.item() == pytest.approx(naive(logits, label, annotated, batch_dice=batch_dice).item(), rel=1e-5)


def test_two_classes_with_smooth_one_are_one_logit_with_a_sigmoid() -> None:
    logits, label, annotated = random_batch(classes=2)
    label = torch.where(label == IGNORE, 0, label)
    target, difference = label[:, 0].double(), (logits[:, 1] - logits[:, 0]).double()
    p = difference.sigmoid()
    dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(difference, target) + dice
    assert DiceCrossEntropy(smooth=1.0)(logits, label, annotated).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.equal(logits.argmax(dim=1) == 1, p > 0.5)
    assert DiceCrossEntropy()(logits, label, annotated).item() != pytest.approx(wanted.item(), rel=1e-6)


def test_batch_dice_differs_from_dice_of_each_patch() -> None:
    batch = random_batch()
    assert DiceCrossEntropy()(*batch).item() != pytest.approx(DiceCrossEntropy(batch_dice=False)(*batch).item())


def test_parts_have_the_weights_that_were_asked_for() -> None:
    batch = random_batch()
    dice = DiceCrossEntropy(cross_entropy_weight=0)(*batch)
    entropy = DiceCrossEntropy(dice_weight=0)(*batch)
    both = DiceCrossEntropy(dice_weight=0.5, cross_entropy_weight=2)(*batch)
    torch.testing.assert_close(both, 0.5 * dice + 2 * entropy)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_perfect_logits_cost_nothing(batch_dice: bool) -> None:
    _, label, annotated = random_batch()
    right = torch.nn.functional.one_hot(label[:, 0].clamp(max=3).long(), 4).movedim(-1, 1)
    assert DiceCrossEntropy(batch_dice=batch_dice)(50.0 * right, label, annotated).item() == pytest.approx(0, abs=1e-6)


def test_ignored_voxels_change_nothing() -> None:
    logits, label, annotated = random_batch()
    ignored = (label == IGNORE).expand_as(logits)
    other = torch.where(ignored, 100 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)), logits)
    loss = DiceCrossEntropy()
    torch.testing.assert_close(loss(other, label, annotated), loss(logits, label, annotated), rtol=0, atol=0)


@pytest.mark.parametrize("partial", [False, True])
def test_ignored_voxels_have_no_gradient(partial: bool) -> None:
    logits, label, annotated = random_batch()
    if partial:
        annotated[:, 3] = False
        label = as_read(label, annotated)
    logits.requires_grad_()
    DiceCrossEntropy()(logits, label, annotated).backward()
    assert logits.grad is not None
    ignored = (label == IGNORE).expand_as(logits)
    assert not logits.grad[ignored].any()
    assert logits.grad[~ignored].all()


@pytest.mark.parametrize("batch_dice", [True, False])
def test_nothing_to_count_costs_nothing(batch_dice: bool) -> None:
    logits, label, annotated = random_batch()
    logits.requires_grad_()
    loss = DiceCrossEntropy(batch_dice=batch_dice)([logits, logits[..., ::2]], label.fill_(IGNORE), annotated)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_nothing_annotated_leaves_a_finite_loss() -> None:
    logits, label, annotated = random_batch()
    annotated[:, 1:] = False
    loss = DiceCrossEntropy()(logits.requires_grad_(), torch.where(label == IGNORE, label, 0), annotated)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)  # every class is background then
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def summed(logits: Tensor, hidden: list[int]) -> Tensor:
    """Logits of a network that has no class ``hidden``: its weight stands in the background."""
    kept = [k for k in range(1, logits.shape[1]) if k not in hidden]
    background = logits[:, [0, *hidden]].exp().sum(dim=1, keepdim=True).log()
    return torch.cat([background, logits[:, kept]], dim=1)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("hidden", [[1], [3], [1, 3]])
def test_unannotated_classes_learn_as_part_of_the_background(hidden: list[int], batch_dice: bool) -> None:
    logits, label, annotated = random_batch()
    kept = [k for k in range(4) if k not in hidden]
    annotated[:, hidden] = False
    label = as_read(label, annotated)
    loss = DiceCrossEntropy(batch_dice=batch_dice)
    first, second = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = loss(first, label, annotated)
    smaller = label.clone()
    for new, old in enumerate(kept):
        smaller[label == old] = new
    theirs = loss(summed(second, hidden), smaller, annotated[:, kept])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-7)


def test_probability_may_move_between_background_and_unannotated_classes() -> None:
    logits, label, annotated = random_batch()
    annotated[:, 2] = False
    label = as_read(label, annotated)
    moved = logits.clone()
    total = torch.logaddexp(logits[:, 0], logits[:, 2])
    moved[:, 0], moved[:, 2] = total - 7, total + torch.log1p(-torch.exp(torch.tensor(-7.0)))
    loss = DiceCrossEntropy()
    torch.testing.assert_close(loss(moved, label, annotated), loss(logits, label, annotated), rtol=1e-5, atol=1e-6)


def test_merging_one_case_leaves_the_others_alone() -> None:
    logits, _, annotated = random_batch()
    annotated[1, 2:] = False
    merged, plain = merge_unannotated(logits, annotated).softmax(dim=1), logits.softmax(dim=1)
    torch.testing.assert_close(merged[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(merged[1, 0], plain[1, 0] + plain[1, 2] + plain[1, 3])
    torch.testing.assert_close(merged[1, 1], plain[1, 1])
    assert not merged[1, 2:].any()


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    logits, label, annotated = random_batch()
    annotated[:, 2] = False
    label = as_read(label, annotated)
    loss = DiceCrossEntropy()
    # Single precision keeps 1/128 of a logit there; an unannotated class must not become likely.
    torch.testing.assert_close(
        loss(logits - 2.0**17, label, annotated), loss(logits, label, annotated), rtol=1e-3, atol=0
    )


def test_lower_outputs_weigh_half_as_much_each_and_the_lowest_next_to_nothing() -> None:
    logits, label, annotated = random_batch(size=8)
    outputs = [
        torch.nn.functional.interpolate(logits, size=size) for size in ((8, 9, 7), (4, 5, 4), (2, 3, 2), (1, 1, 1))
    ]
    loss = DiceCrossEntropy()
    alone = []
    for output in outputs:
        shrunk = torch.nn.functional.interpolate(label.float(), size=output.shape[2:], mode="nearest-exact")
        alone.append(loss(output, shrunk, annotated))
    weights = [1, 1 / 2, 1 / 4, 1e-6]
    wanted = sum(weight * each for weight, each in zip(weights, alone, strict=True)) / sum(weights)
    torch.testing.assert_close(loss(outputs, label, annotated), wanted)


def test_every_output_has_a_gradient() -> None:
    logits, label, annotated = random_batch()
    outputs = [logits.clone().requires_grad_(), logits[..., ::2].clone().requires_grad_()]
    DiceCrossEntropy()(outputs, label, annotated).backward()
    assert all(output.grad is not None and output.grad.any() for output in outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("partial", [False, True])
def test_half_precision_logits_are_computed_in_single_precision(dtype: torch.dtype, partial: bool) -> None:
    logits, label, annotated = random_batch(size=12)
    if partial:
        annotated[0, 1] = False
        label = as_read(label, annotated)
    half = logits.to(dtype)
    loss = DiceCrossEntropy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss(half, label, annotated)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, loss(half.float(), label, annotated), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("partial", [False, True])
def test_large_logits_stay_finite(scale: float, partial: bool) -> None:
    logits, label, annotated = random_batch()
    if partial:
        annotated[:, 2] = False
        label = as_read(label, annotated)
    logits = (scale * logits).requires_grad_()
    loss = DiceCrossEntropy()(logits, label, annotated)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_labels_may_be_of_any_type(dtype: torch.dtype) -> None:
    logits, label, annotated = random_batch()
    loss = DiceCrossEntropy()
    assert loss(logits, label.to(dtype), annotated).item() == loss(logits, label, annotated).item()


def test_loss_works_in_two_dimensions() -> None:
    logits, label, annotated = random_batch()
    flat = DiceCrossEntropy()(logits[..., 0], label[..., 0], annotated)
    deep = DiceCrossEntropy()(logits[..., :1], label[..., :1], annotated)
    torch.testing.assert_close(flat, deep)
