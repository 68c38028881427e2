"""The measurements of optimizers count what they say they count, and write their pages."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medmom import optim
from medmom.optim.low_rank import LowRankRule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
bench, rules, robustness, slices = (
    import_module(name) for name in ("bench_optim", "bench_rules", "repro_lr_robustness", "repro_slices")
)
# Not on the path for the other tests.
sys.path.pop(0)


def options(**changes: Any) -> Namespace:
    given = {"device": torch.device("cpu"), "compile": False, "pairs": 2, "weight_decay": 0.0, "with_loss": False}
    return Namespace(**{**given, "memory": 8.0, **changes})


def contender(name: str, num_bytes: int = 20, bar: float | None = 1.1) -> Any:
    return rules.Contender(f"**{name}**", f"medmom.optim.{name}", num_bytes, bar)


def test_every_rule_has_a_row() -> None:
    # What low-rank rules do is not told by dense parameters; bench_low_rank_step.py times them.
    dense = {name for name in optim.__all__ if not issubclass(getattr(optim, name), LowRankRule)}
    assert {one.path.rpartition(".")[2] for one in rules.CONTENDERS if one.is_ours} == dense


def test_rows_have_names_of_their_own() -> None:
    names = [one.name for one in rules.CONTENDERS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("name", "tensors", "count"), [("resnet50", 161, 25_557_032), ("mom3d_m", 264, 102_350_575)])
def test_shapes_are_those_of_the_network(name: str, tensors: int, count: int) -> None:
    shapes = rules.SHAPES[name]()
    assert (len(shapes), sum(prod(shape) for shape in shapes)) == (tensors, count)


def test_brackets_with_a_slow_base_do_not_count() -> None:
    good, slow_before, slow_after = bench.Bracket(10, 30, 11), bench.Bracket(17, 20, 10), bench.Bracket(10, 20, 17)
    found = bench.quiet({"a": [good, slow_before], "b": [slow_after, good]})
    assert found == {"a": [good], "b": [good]}


def test_row_is_the_median_bracket() -> None:
    brackets = [bench.Bracket(10, 20, 10), bench.Bracket(8, 24, 12), bench.Bracket(10, 90, 10)]
    assert bench.row_of(brackets) == (24, 2.4, 3)
    assert bench.row_of([]) is None


def test_contenders_share_memory_as_far_as_there_is_room() -> None:
    many = [contender("QHM"), contender("QHM"), contender("MoMoAdam", 44), contender("QHM")]
    # A buffer of 2^28 numbers takes 1 GiB.
    expected = {1.0: [[20], [20], [44], [20]], 4.0: [[20, 20], [44], [20]], 8.0: [[20, 20, 44, 20]]}
    for limit, sizes in expected.items():
        assert [[one.num_bytes for one in batch] for batch in bench.batches(many, 2**28, limit)] == sizes


@pytest.mark.parametrize(("ratio", "verdict"), [(1.2, "1.1: yes"), (1.22, "1.1: no")])
def test_bar_may_be_missed_by_a_tenth(ratio: float, verdict: str) -> None:
    row = bench.Row(3.0, ratio, 2)
    line = bench.line_of(contender("QHM"), row, 1.1, options())
    assert line == ["**QHM**", "3.00", f"{ratio:.2f}", verdict, "20", f"{ratio * 28 / 20:.2f}"]


def test_bars_are_for_eager_rules_on_a_cpu_and_compiled_ones_on_a_gpu() -> None:
    gpu, peer = torch.device("cuda"), rules.Contender("peer", "torch.optim.SGD", 20)
    assert bench.bar_of(contender("QHM"), "resnet50", options()) == 1.1
    assert bench.bar_of(contender("QHM"), "small", options()) is None
    assert bench.bar_of(contender("QHM"), "resnet50", options(compile=True)) is None
    assert bench.bar_of(contender("QHM"), "resnet50", options(device=gpu, compile=True)) == 1.2
    assert bench.bar_of(peer, "resnet50", options(device=gpu, compile=True)) is None


def test_rule_that_needs_the_loss_is_given_it() -> None:
    params = rules.parameters([(3, 2), (4,)], torch.device("cpu"), 0)
    before = [p.detach().clone() for p in params]
    for name in ("MoMo", "HeavyBall"):
        for with_loss in (False, True):
            contender(name).step(params, options(with_loss=with_loss))()
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_contender_that_fails_is_a_note_and_the_others_are_timed() -> None:
    params = rules.parameters([(3, 2), (4,)], torch.device("cpu"), 0)
    absent = rules.Contender("absent", "no_such_package.Rule", 20)
    rows, notes = bench.measure([absent, contender("HeavyBall")], params, options())
    assert list(rows) == ["**HeavyBall**"] and rows["**HeavyBall**"].num_brackets >= 2
    assert notes == ["absent: not installed (no_such_package)."]


def test_page_has_a_table_for_each_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--shapes", "small", "--rules", "HeavyBall", "--pairs", "2", "--out", str(tmp_path)]
    path = bench.main(given)
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "benchmarks" / "optim.md"
    assert "## small: 6 tensors, 0.02 M parameters" in text and "| **HeavyBall** (Nesterov) |" in text
    assert "python scripts/bench_optim.py --shapes small --rules HeavyBall --pairs 2" in text
    assert str(tmp_path) not in text and "1 thread(s)" in text and "momo-opt " in text
    assert text.splitlines()[-1] in capsys.readouterr().out


def test_row_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rules", "nonsense"])
    assert "--rules nonsense: no row is called so; there are torch AdamW, fused" in capsys.readouterr().err


@pytest.mark.parametrize("script", [bench, robustness])
def test_help_teaches_and_names_the_defaults(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert "python scripts/" in text and "runs/bench)" in text


def test_slice_is_cut_or_filled_around_its_middle() -> None:
    width, height = slices.SIZE
    image = np.arange((width - 3) * (height + 4)).reshape(width - 3, height + 4)
    found = slices.fitted(image, -1)
    assert found.shape == slices.SIZE
    assert (found[[0, -2, -1]] == -1).all()
    assert (found[1:-2] == image[:, 2:-2]).all()


def test_every_slice_comes_once_before_any_comes_again() -> None:
    found = list(slices.batches_of(10, 3, 7, seed=1))
    assert len(found) == 7
    assert all(len(set(torch.cat(found[i : i + 3]).tolist())) == 9 for i in (0, 3))
    assert all(torch.equal(a, b) for a, b in zip(found, slices.batches_of(10, 3, 7, seed=1), strict=True))
    assert not torch.equal(found[0], next(slices.batches_of(10, 3, 7, seed=2)))


def made(count: int) -> Any:
    """Bright squares of two classes."""
    labels = torch.zeros(count, 1, *slices.SIZE, dtype=torch.long)
    labels[:, :, 8:16, 8:24], labels[:, :, 16:24, 8:24] = 1, 2
    return slices.Slices(labels.float() + 0.1 * torch.randn(labels.shape), labels, count)


def trained(make_optimizer: Callable[[list[nn.Parameter]], Any], steps: int = 8) -> Any:
    torch.manual_seed(0)
    return slices.train(make_optimizer, (made(8), made(4)), steps=steps, batch=4, seed=0)


def test_training_lowers_the_loss() -> None:
    outcome = trained(optim.MoMo)
    assert outcome.steps == 8 and not outcome.is_diverged
    assert outcome.validation < outcome.first and 0 <= outcome.dice <= 1


def test_loss_that_is_not_finite_ends_the_run() -> None:
    class Spoiler(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.fill_(inf)

    outcome = trained(lambda params: Spoiler(params, 0.1))
    assert outcome.is_diverged and outcome.steps == 1 and outcome.train == inf


def test_two_point_rules_are_judged_at_their_average(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []

    class Watched(torch.optim.SGD):
        evaluating = True

        def train(self) -> None:
            self.evaluating = False

        def eval(self) -> None:
            self.evaluating = True

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            modes.append(self.evaluating)

    kept: list[Watched] = []
    original = slices.validate

    def validate(*given: Any) -> Any:
        modes.append(kept[0].evaluating)
        return original(*given)

    monkeypatch.setattr(slices, "validate", validate)

    def make(params: list[nn.Parameter]) -> Watched:
        kept.append(Watched(params, 0.1))
        return kept[0]

    trained(make, steps=2)
    assert modes == [False, False, True]


def outcome(loss: float, dice: float = 0.5) -> Any:
    return slices.Outcome(2.0, loss, loss, dice, 9, 1.0)


def curve(rule: str, losses: list[float], seed: int = 0) -> list[Any]:
    return [robustness.Run(rule, lr, seed, outcome(x)) for lr, x in zip(robustness.RATES, losses, strict=True)]


def test_divergence_is_a_loss_that_is_not_finite_or_ends_above_its_start() -> None:
    assert outcome(inf).is_diverged and outcome(2.1).is_diverged and not outcome(1.9).is_diverged
    losses = robustness.by_rate(curve("MoMo", [1, 0.49, 0.5, 0.4, 0.4, 0.4, 0.49, 1, 1, 1, 1, 3, inf]), "MoMo", "train")
    assert list(losses.values())[-2:] == [inf, inf]
    assert robustness.reach(losses) == robustness.RATES[1:7]


def test_curve_is_the_median_over_seeds() -> None:
    runs = [run for seed, loss in enumerate((0.3, inf, 0.5)) for run in curve("MoMo", [loss] * 13, seed)]
    assert set(robustness.by_rate(runs, "MoMo", "train").values()) == {0.5}
    assert set(robustness.by_rate(runs, "MoMo", "dice").values()) == {0.5}


def test_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_now: list[int] = []

    def train(make_optimizer: Any, data: Any, *, steps: int, batch: int, seed: int) -> Any:
        assert make_optimizer([nn.Parameter(torch.ones(2))]).param_groups[0]["lr"] in robustness.RATES
        made_now.append(seed)
        return outcome(inf if seed else 0.5)

    monkeypatch.setattr(robustness, "train", train)
    data, path = (made(3), made(2)), tmp_path / "runs.json"
    given = Namespace(steps=5, batch=2, seeds=[0], rules=["MoMo", "Adam"], rates=robustness.RATES)
    robustness.run_missing(path, data, given)
    assert made_now == [0] * 26
    given.seeds = [0, 1]
    runs = robustness.run_missing(path, data, given)
    assert made_now == [0] * 26 + [1] * 26 and len(runs) == 52
    assert robustness.run_missing(path, data, given) == runs and len(made_now) == 52
    given.steps = 6
    with pytest.raises(SystemExit, match="remove it or take other --results"):
        robustness.run_missing(path, data, given)


def test_page_and_figure_show_every_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, seed: int, **__: Any) -> Any:
        return outcome(0.4)

    monkeypatch.setattr(robustness, "train", train)
    monkeypatch.setattr(robustness, "load", lambda *_: (made(3), made(2)))
    kept = ["--results", str(tmp_path / "runs.json")]
    path = robustness.main(["--data", str(tmp_path), "--seeds", "0", "--out", str(tmp_path), *kept])
    text = path.read_text(encoding="utf-8")
    assert all(f"| {rule} | 0.400 (0.001) | 0.500 | 0.001 to 1000, 6.0 | none |" in text for rule in robustness.RULES)
    assert "--data FOLDER --seeds 0\n" in text and str(tmp_path) not in text
    assert (tmp_path / "images/lr_robustness.png").stat().st_size > 5000
