from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medmom.errors import MedmomError
from medmom.tasks.class_losses import ClassificationLoss

WEIGHTS = torch.tensor([0.3, 1.0, 1.2, 2.5])


def numbers(num_images: int = 6, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Logits and the class of each image."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_images, num_classes, generator=generator)
    return logits, torch.randint(num_classes, (num_images,), generator=generator)


def one_hot(classes: Tensor) -> Tensor:
    return functional.one_hot(classes, 4).float()


def make_loss(
    smoothing: float = 0.0, weights: Tensor | None = None, *, is_multilabel: bool = False
) -> ClassificationLoss:
    loss = ClassificationLoss(label_smoothing=smoothing)
    loss.set_weights(weights)
    loss.is_multilabel = is_multilabel
    return loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_on_hard_targets_it_is_torchs_cross_entropy(smoothing: float, weights: Tensor | None) -> None:
    logits, classes = numbers()
    logits.requires_grad_()
    found = make_loss(smoothing, weights)(logits, one_hot(classes))
    wanted = functional.cross_entropy(logits, classes, weight=weights, label_smoothing=smoothing)
    torch.testing.assert_close(found, wanted)
    (ours,), (theirs,) = (torch.autograd.grad(value, logits) for value in (found, wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_on_soft_targets_without_weights_it_is_torchs_cross_entropy(smoothing: float) -> None:
    logits, _ = numbers()
    target = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    wanted = functional.cross_entropy(logits, target, label_smoothing=smoothing)
    torch.testing.assert_close(make_loss(smoothing)(logits, target), wanted)


def test_a_mixed_image_weighs_what_its_parts_weigh() -> None:
    logits, classes = numbers(1)
    first, second = one_hot(classes), one_hot((classes + 1) % 4)
    loss = make_loss(0.1, WEIGHTS)
    one, other = ((WEIGHTS * target).sum() for target in (first, second))
    wanted = (0.3 * one * loss(logits, first) + 0.7 * other * loss(logits, second)) / (0.3 * one + 0.7 * other)
    torch.testing.assert_close(loss(logits, 0.3 * first + 0.7 * second), wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_for_any_number_of_classes_it_is_the_formula(smoothing: float, weights: Tensor | None) -> None:
    logits, _ = numbers()
    target = (torch.rand(6, 4, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    smooth, p = (1 - smoothing) * target + smoothing / 2, logits.double().sigmoid()
    by_class = -(smooth * p.log() + (1 - smooth) * (1 - p).log()).mean(dim=0)
    w = torch.ones(4) if weights is None else weights
    found = make_loss(smoothing, weights, is_multilabel=True)(logits, target)
    torch.testing.assert_close(found.double(), (w * by_class).sum() / w.sum(), rtol=1e-5, atol=1e-6)


def test_for_any_number_of_classes_it_is_torchs_binary_cross_entropy() -> None:
    logits, classes = numbers()
    wanted = functional.binary_cross_entropy_with_logits(logits, one_hot(classes))
    torch.testing.assert_close(make_loss(is_multilabel=True)(logits, one_hot(classes)), wanted)


@pytest.mark.parametrize("is_multilabel", [False, True])
def test_only_ratios_of_weights_matter(is_multilabel: bool) -> None:
    logits, classes = numbers()
    found = [
        make_loss(0.1, weights, is_multilabel=is_multilabel)(logits, one_hot(classes))
        for weights in (WEIGHTS, 1000 * WEIGHTS)
    ]
    torch.testing.assert_close(*found)


def test_all_one_weights_are_none() -> None:
    logits, classes = numbers()
    found = make_loss(weights=torch.ones(4))(logits, one_hot(classes))
    torch.testing.assert_close(found, make_loss()(logits, one_hot(classes)))


@pytest.mark.parametrize("is_multilabel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_logits_of_low_precision_have_a_finite_loss_and_gradient(
    dtype: torch.dtype, is_multilabel: bool
) -> None:
    largest = torch.finfo(torch.float16).max
    logits = torch.tensor([[largest, -largest], [-largest, largest]]).to(dtype).requires_grad_()
    loss = make_loss(0.1, is_multilabel=is_multilabel)(logits, torch.eye(2).flip(0).to(dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_low_precision_costs_nothing_but_the_rounding_of_logits() -> None:
    logits, classes = numbers()
    half = logits.half()
    torch.testing.assert_close(
        make_loss(0.1)(half, one_hot(classes)), make_loss(0.1)(half.float(), one_hot(classes)), rtol=0, atol=0
    )


def test_weights_are_not_saved_but_move_with_the_loss() -> None:
    loss = make_loss(weights=WEIGHTS)
    assert loss.state_dict() == {}
    assert loss.to("meta").weights.device.type == "meta"  # type: ignore[union-attr]


def test_weights_are_a_copy() -> None:
    given = WEIGHTS.clone()
    loss = make_loss(weights=given)
    given.zero_()
    assert torch.equal(loss.weights, WEIGHTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_multilabel", [False, True])
def test_it_is_planned_without_values(is_multilabel: bool) -> None:
    loss = copy.deepcopy(make_loss(0.1, WEIGHTS, is_multilabel=is_multilabel)).to("meta")
    logits = torch.empty(2, 4, device="meta", requires_grad=True)
    loss(logits, torch.empty(2, 4, device="meta")).backward()
    assert logits.grad is not None


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_a_smoothing_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(MedmomError, match=r"^loss.label_smoothing .*: give a number from 0 to below 1.$"):
        ClassificationLoss(label_smoothing=smoothing)


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], [[1.0]]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(MedmomError, match="give a number above 0 for each class"):
        ClassificationLoss().set_weights(weights)
