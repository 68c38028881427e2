from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medmom.labels import IGNORE, Labels
from medmom.tasks.losses import DiceCrossEntropy
from medmom.tasks.segmentation import SegmentationTask, dice_by_class

LABELS = Labels(("background", "liver", "tumour"), (0, 1, 2))
ALL = torch.ones(1, 3, dtype=torch.bool)


def row(*values: int) -> Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize(
    ("prediction", "reference", "wanted"),
    [
        (row(1, 1, 2, 0), row(1, 1, 2, 0), [1.0, 1.0]),
        (row(1, 1, 0, 0), row(1, 0, 0, 0), [2 / 3, torch.nan]),  # in neither map: nan
        (row(0, 0, 0, 0), row(1, 0, 2, 2), [0.0, 0.0]),  # missed: 0
        (row(1, 0, 2, 2), row(0, 0, 0, 0), [0.0, 0.0]),  # invented: 0
        (row(1, 1, 2, 2), row(1, IGNORE, IGNORE, 2), [1.0, 1.0]),
        (row(2, 2, 2, 2), row(IGNORE, IGNORE, IGNORE, IGNORE), [torch.nan, torch.nan]),
    ],
)
def test_dice_of_each_class(prediction: Tensor, reference: Tensor, wanted: list[float]) -> None:
    for kind in (torch.uint8, torch.float32):  # a label map's type does not matter
        score = dice_by_class(prediction, reference.to(kind), ALL)
        torch.testing.assert_close(score, torch.tensor([wanted]), equal_nan=True)


def test_a_class_that_was_not_looked_for_has_no_dice() -> None:
    annotated = torch.tensor([[True, True, False], [True, False, True]])
    prediction = torch.tensor([[1, 2], [1, 2]])
    score = dice_by_class(prediction, torch.tensor([[1, 0], [0, 2]]), annotated)
    torch.testing.assert_close(score, torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), equal_nan=True)


def test_dice_equals_a_count_on_random_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, reference = (torch.randint(0, 3, (2, 5, 6, 7), generator=generator) for _ in range(2))
    score = dice_by_class(prediction, reference, ALL.expand(2, -1))
    for case in range(2):
        for k in (1, 2):
            found, wanted = set((prediction[case] == k).nonzero()), set((reference[case] == k).nonzero())
            both = ((prediction[case] == k) & (reference[case] == k)).sum().item()
            assert score[case, k - 1].item() == pytest.approx(2 * both / (len(found) + len(wanted)))


class Fixed(nn.Module):
    """Gives the logits that stand in its image; deep supervision while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Any:
        logits = self.scale * image
        return [logits, logits[..., ::2]] if self.training else logits


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def task_with_log() -> tuple[SegmentationTask, dict[str, float]]:
    task = SegmentationTask(
        Fixed(), loss=DiceCrossEntropy(), labels=LABELS, inferer=lambda image, network: network(image), optimizer=sgd
    )
    logged: dict[str, float] = {}
    task.log = lambda name, value, **options: logged.update({name: float(torch.as_tensor(value).detach())})  # type: ignore[method-assign]
    return task, logged


def whole_case(prediction: Tensor, reference: Tensor, annotated: Tensor = ALL) -> dict[str, Any]:
    image = nn.functional.one_hot(prediction, 3).movedim(-1, 1).float()
    return {"image": image, "label": reference[:, None].to(torch.uint8), "annotated": annotated, "case": ["a"]}


def validate(task: SegmentationTask, *cases: dict[str, Any]) -> None:
    task.eval()
    for number, case in enumerate(cases):
        task.validation_step(case, number)
    task.on_validation_epoch_end()


def test_validation_logs_the_mean_over_cases_then_classes() -> None:
    task, logged = task_with_log()
    first = whole_case(row(1, 1, 0, 2), row(1, 1, 0, 2))
    second = whole_case(row(1, 0, 0, 0), row(0, 0, 0, 0))  # liver invented, no tumour in either map
    validate(task, first, second)
    # By cases first: liver (1 + 0) / 2, tumour 1; a mean of all three scores would give 2/3.
    assert logged == pytest.approx({"val_dice_liver": 0.5, "val_dice_tumour": 1.0, "val_dice": 0.75})


def test_a_class_that_no_case_scores_is_not_logged_and_does_not_count() -> None:
    task, logged = task_with_log()
    validate(task, whole_case(row(1, 1, 2), row(1, 0, 0), torch.tensor([[True, True, False]])))
    assert logged == pytest.approx({"val_dice_liver": 2 / 3, "val_dice": 2 / 3})


def test_a_fold_in_which_nothing_can_be_scored_logs_zero() -> None:
    task, logged = task_with_log()
    validate(task, whole_case(row(0, 0), row(0, 0)))
    assert logged == {"val_dice": 0.0}


def test_a_validation_starts_from_nothing() -> None:
    task, logged = task_with_log()
    validate(task, whole_case(row(0, 0), row(1, 2)))
    assert logged["val_dice"] == 0
    validate(task, whole_case(row(1, 2), row(1, 2)))
    assert logged["val_dice"] == 1


def test_a_training_step_gives_the_loss_of_all_outputs() -> None:
    task, logged = task_with_log()
    batch = whole_case(row(1, 1, 0, 2), row(1, 0, IGNORE, 2))
    task.train()
    loss = task.training_step(batch, 0)
    wanted = DiceCrossEntropy()([batch["image"], batch["image"][..., ::2]], batch["label"], batch["annotated"])
    torch.testing.assert_close(loss, wanted)
    assert loss.requires_grad
    assert logged == {"train_loss": pytest.approx(wanted.item())}
