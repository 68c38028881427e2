"""The task that tells what a whole image is."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from class_networks import tiny_3d, tiny_slices
from torch import Tensor, distributed, nn

from medmom.classes import Classes
from medmom.errors import MedmomError
from medmom.models import MomentumUNet, from_host, to_host
from medmom.models.encoder import MomentumEncoder
from medmom.models.resnet import ClassificationHead
from medmom.tasks import classification
from medmom.tasks.class_losses import ClassificationLoss
from medmom.tasks.classification import ClassificationTask, mix_images, score_logits
from medmom.tasks.losses import DiceCrossEntropy

ORGANS = Classes(("liver", "lung", "colon"))
FINDINGS = Classes(("cyst", "stone", "mass"), is_multilabel=True)
sgd = partial(torch.optim.SGD, lr=0.1)


class Fixed(nn.Module):
    """Gives the logits that stand in its image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        return self.scale * image[:, :, 0]


def make_task(classes: Classes = ORGANS, network: nn.Module | None = None, **options: Any) -> ClassificationTask:
    options = {"loss": ClassificationLoss(), "optimizer": sgd, **options}
    return ClassificationTask(network or Fixed(), classes=classes, **options)


def with_log(task: ClassificationTask) -> dict[str, float]:
    logged: dict[str, float] = {}
    task.log = lambda name, value, **options: logged.update({name: float(torch.as_tensor(value).detach())})  # type: ignore[method-assign]
    return logged


def one_hot(*classes: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(classes), 3).float()


def batch(logits: Tensor, target: Tensor, *cases: str) -> dict[str, Any]:
    return {"image": logits[..., None], "target": target, "case": list(cases) or [f"c{n}" for n in range(len(logits))]}


def validate(task: ClassificationTask, *batches: dict[str, Any]) -> dict[str, float]:
    logged = with_log(task)
    task.eval()
    for number, each in enumerate(batches):
        task.validation_step(each, number)
    task.on_validation_epoch_end()
    return logged


def test_scores_of_one_class_an_image_are_those_counted_by_hand() -> None:
    # Four of liver, one of lung, no colon: three livers found, one taken for colon, the lung found.
    target = one_hot(0, 0, 0, 0, 1)
    logits = 3.0 * one_hot(0, 0, 0, 2, 1)
    logits[4, 0] = 1  # so that liver ranks the lung above the one it missed
    found = score_logits(logits, target, is_multilabel=False)
    assert found == pytest.approx(
        {
            "accuracy": 4 / 5,
            "balanced_accuracy": (3 / 4 + 1) / 2,
            "f1": (6 / 7 + 1) / 2,  # colon is invented once, and has no F1 of its own
            "auroc": (3 / 4 + 1) / 2,
        }
    )


def twin_auroc(scores: Tensor, truth: Tensor) -> float:
    """Share of pairs in the right order; ties are half right."""
    pairs = [(p, n) for p in scores[truth == 1].tolist() for n in scores[truth == 0].tolist()]
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)


def twin_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Precision at each positive in the order of scores without ties, in the mean."""
    ordered = truth[scores.argsort(descending=True)].tolist()
    hits = [sum(ordered[: place + 1]) / (place + 1) for place, is_hit in enumerate(ordered) if is_hit]
    return sum(hits) / len(hits)


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(30, 3), one_hot(*torch.randint(0, 3, (30,)).tolist())
    p = logits.softmax(dim=1)
    wanted = sum(twin_auroc(p[:, k], target[:, k]) for k in range(3)) / 3
    assert score_logits(logits, target, is_multilabel=False)["auroc"] == pytest.approx(wanted, abs=1e-6)


def test_scores_of_any_number_of_classes_are_those_counted_by_hand() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(30, 3), (torch.rand(30, 3) < 0.4).float()
    target[:, 2] = 0  # never there: no score
    found = score_logits(logits, target, is_multilabel=True)
    auroc = [twin_auroc(logits[:, k], target[:, k]) for k in (0, 1)]
    auprc = [twin_average_precision(logits[:, k], target[:, k]) for k in (0, 1)]
    f1 = []
    for k in (0, 1):
        right = ((logits[:, k] > 0) & (target[:, k] == 1)).sum().item()
        f1.append(2 * right / ((logits[:, k] > 0).sum() + target[:, k].sum()).item())
    wanted = {"auroc": sum(auroc) / 2, "auprc": sum(auprc) / 2, "f1": sum(f1) / 2}
    assert found == pytest.approx(wanted, abs=1e-6)


def test_sure_logits_do_not_tie() -> None:
    logits = torch.tensor([[20.0, -20, -20], [19.0, -20, -20], [18.0, -20, -20]])
    found = score_logits(logits, torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]), is_multilabel=True)
    assert found["auroc"] == 1


@pytest.mark.parametrize("num_images", [1, 4])
def test_one_class_alone_has_no_auroc_and_a_monitor(num_images: int) -> None:
    logged = validate(make_task(), batch(3 * one_hot(*[1] * num_images), one_hot(*[1] * num_images)))
    assert set(logged) == {"val_loss", "val_accuracy", "val_balanced_accuracy", "val_f1"}
    assert logged["val_balanced_accuracy"] == 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_findings_that_are_all_there_or_none_score_chance(value: float) -> None:
    logged = validate(make_task(FINDINGS), batch(torch.randn(4, 3), torch.full((4, 3), value)))
    assert logged["val_auroc"] == 0.5
    assert "val_auprc" not in logged
    assert ("val_f1" in logged) == (value == 1)


def test_a_single_finding_is_scored() -> None:
    logits, target = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [0.0]])
    logged = validate(make_task(Classes(("cyst",), is_multilabel=True)), batch(logits, target))
    assert (logged["val_auroc"], logged["val_auprc"], logged["val_f1"]) == (1, 1, 1)


def test_a_logit_that_is_no_number_finds_nothing() -> None:
    logits, target = torch.tensor([[1.0, math.nan, 0], [1, 0, 0]]), one_hot(1, 0)
    assert score_logits(logits, target, is_multilabel=False)["accuracy"] == 0.5
    assert score_logits(logits, target, is_multilabel=True)["f1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("classes", [ORGANS, FINDINGS])
def test_the_monitor_of_a_run_that_diverged_is_a_number(classes: Classes, value: float) -> None:
    task = make_task(classes)
    logged = validate(task, batch(torch.full((3, 3), value), one_hot(0, 1, 2)))
    assert 0 <= logged[task.monitor] <= 0.5
    assert not math.isfinite(logged["val_loss"])


@pytest.mark.parametrize(("classes", "monitor"), [(ORGANS, "val_balanced_accuracy"), (FINDINGS, "val_auroc")])
def test_the_monitor_is_logged(classes: Classes, monitor: str) -> None:
    task = make_task(classes)
    assert task.monitor == monitor
    assert monitor in validate(task, batch(torch.randn(3, 3), one_hot(0, 1, 2)))


def test_validation_is_scored_over_all_batches_together() -> None:
    logits, target = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), one_hot(0, 0, 0, 0, 0, 1)
    whole = validate(make_task(weights=[1, 2, 3]), batch(logits, target))
    parts = validate(make_task(weights=[1, 2, 3]), batch(logits[:4], target[:4]), batch(logits[4:], target[4:]))
    assert parts == pytest.approx(whole)
    wanted = nn.functional.cross_entropy(logits, target.argmax(1), weight=torch.tensor([1.0, 2, 3]))
    assert whole["val_loss"] == pytest.approx(wanted.item())


def test_a_validation_starts_from_nothing_and_stays_to_be_asked() -> None:
    task = make_task(network=Fixed().bfloat16())
    assert task.last_validation is None
    validate(task, batch(torch.zeros(1, 3), one_hot(0), "old"))
    first = batch(one_hot(0, 1).bfloat16(), one_hot(0, 1), "a", "b")
    validate(task, first, batch(one_hot(2).bfloat16(), one_hot(1), "c"))
    last = task.last_validation
    assert last is not None and last.cases == ("a", "b", "c")
    assert last.logits.dtype == last.target.dtype == torch.float32
    assert torch.equal(last.logits, one_hot(0, 1, 2)) and torch.equal(last.target, one_hot(0, 1, 1))


def test_a_training_step_gives_the_loss() -> None:
    task = make_task(weights=[1, 2, 3], loss=ClassificationLoss(label_smoothing=0.1))
    logged = with_log(task)
    logits, target = torch.randn(4, 3), one_hot(0, 1, 2, 2)
    loss = task.training_step(batch(logits, target), 0)
    wanted = nn.functional.cross_entropy(
        logits, target.argmax(1), weight=torch.tensor([1.0, 2, 3]), label_smoothing=0.1
    )
    torch.testing.assert_close(loss, wanted)
    assert loss.requires_grad
    assert task._micro_losses == [loss]  # for rules that need it
    assert logged == {"train_loss": pytest.approx(wanted.item())}


def test_the_loss_is_told_what_the_classes_are() -> None:
    losses = {classes: make_task(classes).loss for classes in (ORGANS, FINDINGS)}
    assert [loss.is_multilabel for loss in losses.values()] == [False, True]


def test_a_loss_of_torch_will_do() -> None:
    task, image = make_task(loss=nn.CrossEntropyLoss()), torch.randn(3, 3)
    with_log(task)
    wanted = nn.functional.cross_entropy(image, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(task.training_step(batch(image, one_hot(0, 1, 2)), 0), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": DiceCrossEntropy()}, "^loss DiceCrossEntropy: no loss of whole images; take .*ClassificationLoss.$"),
        ({"loss": nn.CrossEntropyLoss(), "weights": [1, 1, 1]}, "CrossEntropyLoss takes no class weights; set data.b"),
        ({"weights": [1, 1]}, "^2 class weights for 3 classes; give one for each.$"),
        ({"weights": [1, 1, 0]}, "give a number above 0 for each class"),
    ],
)
def test_a_loss_that_does_not_suit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MedmomError, match=message):
        make_task(**options)


# Mixing


def test_mixing_is_a_sum_of_two_images_and_their_targets() -> None:
    torch.manual_seed(0)
    image, target = torch.randn(5, 1, 2, 2), one_hot(0, 1, 2, 0, 1)
    given = image.clone(), target.clone()
    state = torch.get_rng_state()
    mixed, shares = mix_images(image, target, 0.4)
    torch.set_rng_state(state)
    share, partners = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(5)
    torch.testing.assert_close(mixed, share * image + (1 - share) * image[partners])
    torch.testing.assert_close(shares, share * target + (1 - share) * target[partners])
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(5))
    assert not torch.equal(mixed, image)
    assert torch.equal(image, given[0]) and torch.equal(target, given[1])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_those_of_the_beta_distribution(alpha: float) -> None:
    torch.manual_seed(0)
    image, target = torch.tensor([[0.0], [1.0]]), torch.eye(2)
    # Of two images, each mixed with itself or the other: what was mixed tells the share.
    shares = [mixed for _ in range(1500) if 0 < (mixed := mix_images(image, target, alpha)[0][0].item())]
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.04)
    variance = sum((share - 0.5) ** 2 for share in shares) / len(shares)
    assert variance == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_mixing_keeps_the_precision_of_images() -> None:
    image, target = mix_images(torch.randn(2, 1, 2, 2).half(), torch.eye(2), 0.4)
    assert (image.dtype, target.dtype) == (torch.float16, torch.float32)


def test_only_training_mixes_and_only_where_it_is_asked_to() -> None:
    logits, target = torch.randn(4, 3), one_hot(0, 1, 2, 0)
    mixing, plain = make_task(mixup=0.4), make_task()
    assert validate(mixing, batch(logits, target)) == validate(plain, batch(logits, target))
    losses = []
    for task in (mixing, plain):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        losses.append(task.training_step(batch(logits, target), 0).item())
        assert torch.equal(before, torch.get_rng_state()) == (task is plain)
    assert losses[0] != losses[1]


# Normalisation before means


class Erased(nn.Module):
    """A host's encoder, as nnU-Net trains it, under a classifier's head."""

    def __init__(self, encoder: MomentumEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.InstanceNorm3d(6)
        self.head = ClassificationHead(6, 3)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.encoder(image)[-1]))
        return logits


def host_encoder() -> MomentumEncoder:
    """Of a network made from a trained host's weights."""
    sizes: dict[str, Any] = {"channels": [4, 6], "blocks": [1, 2], "kernels": [[3] * 3] * 2}
    torch.manual_seed(0)
    host = to_host(MomentumUNet(1, 2, **sizes, strides=[[1] * 3, [2] * 3], gate=0.0))
    return from_host(host).encoder


def test_a_network_that_erases_what_its_head_reads_is_refused() -> None:
    network, unlike = Erased(host_encoder()).eval(), torch.stack([torch.randn(1, 8, 8, 8), torch.ones(1, 8, 8, 8)])
    with torch.no_grad():
        means = network.norm(network.encoder(unlike)[-1]).mean(dim=(2, 3, 4))
        logits = network(unlike)
    # So it is: every image has the same logits.
    torch.testing.assert_close(means, torch.zeros(2, 6), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-2)
    message = r"^Erased: its last normalisation, norm, is one of each channel.*take group normalisation.*or batch norm"
    with pytest.raises(MedmomError, match=message):
        make_task(network=network)


@pytest.mark.parametrize(
    ("last", "is_refused"),
    [
        (nn.InstanceNorm3d(6, affine=True), True),
        (nn.LazyInstanceNorm3d(), True),
        (nn.GroupNorm(6, 6), True),
        (nn.GroupNorm(2, 6), False),
        (nn.BatchNorm3d(6), False),
    ],
)
def test_the_last_normalisation_decides(last: nn.Module, is_refused: bool) -> None:
    encoder = host_encoder()  # with instance normalisations inside
    network = nn.Sequential(encoder, last, ClassificationHead(6, 3))
    if not is_refused:
        make_task(network=network)
        return
    with pytest.raises(MedmomError, match="the same mean in every image"):
        make_task(network=network)


def test_a_host_with_a_head_alone_is_refused() -> None:
    network = nn.Sequential(host_encoder(), ClassificationHead(6, 3))
    with pytest.raises(MedmomError, match=r"last normalisation, 0.stages.1.momentum.blocks.0.norm2, is one of each"):
        make_task(network=network)


def test_networks_for_classes_are_taken() -> None:
    for network in (tiny_3d(3), tiny_3d(3, norm="batch"), tiny_slices(3), tiny_slices(3, block="preact")):
        assert make_task(network=network).network is network


# Several processes


def validate_in_group(rank: int, world: int, store: Path) -> ClassificationTask:
    """What each process knows after a validation of five cases, of which one fills up a batch."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        task, names = make_task(), ["one", "leber_zwei", "drei", "vier", "fünf"]
        logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        own = [0, 1, 2, 3, 4, 0] if world == 1 else [[0, 2, 4], [1, 3, 0]][rank]
        logged = validate(
            task, batch(logits[own], one_hot(*[(0, 1, 2, 0, 1)[n] for n in own]), *(names[n] for n in own))
        )
        wanted = validate(make_task(), batch(logits, one_hot(0, 1, 2, 0, 1), *names))
        assert logged == pytest.approx(wanted)
        last = task.last_validation
        assert last is not None and sorted(last.cases) == sorted(names)
        for name, row in zip(last.cases, last.logits, strict=True):
            assert torch.equal(row, logits[names.index(name)])
        return task
    finally:
        distributed.destroy_process_group()


def work(rank: int, world: int, store: Path) -> None:
    torch.set_num_threads(1)
    validate_in_group(rank, world, store)


def test_one_process_of_a_group_scores_each_case_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    gather = classification.gather_all_tensors
    monkeypatch.setattr(classification, "gather_all_tensors", lambda part: calls.append(part.shape) or gather(part))
    validate_in_group(0, 1, tmp_path / "store")
    assert (6, 3) in calls


@pytest.mark.slow
def test_two_processes_score_all_cases_once(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (2, tmp_path / "store"), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
