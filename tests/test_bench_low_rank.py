"""The benchmarks of low rank measure what they say they measure, and write their pages."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medmom.models.factorise import list_ranks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
dice, step = (import_module(name) for name in ("bench_low_rank", "bench_low_rank_step"))
# Not on the path for the other tests.
sys.path.pop(0)


def results() -> dict[tuple[str, int, str], Any]:
    """Every setting loses a Dice point to the one before it and has a tenth less parameters."""
    return {
        ("mom3d_xs", seed, arm): dice.Result(
            {"anterior": 0.8, "mean": 0.8 - 0.01 * place + 0.002 * seed}, 1000 - 100 * place
        )
        for seed in (0, 1)
        for place, arm in enumerate(dice.ARMS)
    }


def test_page_compares_each_setting_with_dense_of_the_same_seed(tmp_path: Path) -> None:
    options = Namespace(
        folder=Path("crops"), runs=Path("done"), presets=["mom3d_xs"], seeds=[0, 1], steps=600, batch=2, share=0.45
    )
    text = "\n".join(dice.page(results(), options, ["crops", "--seeds", "0", "1", "--runs", "done"]))
    assert "bench_low_rank.py FOLDER --seeds 0 1 --runs RUNS" in text
    assert "| dense, HeavyBall | 1 000 | 100% | 0.800 ± 0.000 | 0.801 ± 0.001 |  |" in text
    assert "| low rank, LowRankAdam | 800 | 80% | 0.800 ± 0.000 | 0.781 ± 0.001 | -0.020 |" in text
    dice.plot(results(), options, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_settings_are_words_that_a_recipe_takes() -> None:
    from medmom.recipe_file import RecipeFile, recipe_path

    for arm in dice.ARMS.values():
        RecipeFile(recipe_path("hippocampus"), [*arm.words, "--model.low_rank", "0.45"]).build()


def test_a_scored_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "mom3d_xs-dense--heavyball-seed0" / "validation"
    run.mkdir(parents=True)
    content = {"classes": {"anterior": {"dice": {"mean": 0.9}}}, "mean": {"dice": {"mean": 0.9}}}
    (run / "scores.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(dice, "medmom", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(dice, "load_package", lambda _: Namespace(network=nn.Linear(3, 4)))
    found = dice.train_and_score(Namespace(runs=tmp_path), "mom3d_xs", 0, dice.DENSE)
    assert found == dice.Result({"anterior": 0.9, "mean": 0.9}, 16)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    words = ["--presets", "mom3d_xs", "--patch", "16", "--batch", "1", "--rounds", "1", "--out"]
    parsed: Namespace = step.ready(step.parser(), [*words, str(tmp_path_factory.mktemp("bench"))])
    return parsed


def test_rows_are_one_network_dense_and_of_low_rank(options: Namespace) -> None:
    rows = step.contenders("mom3d_xs", 0.25, options)
    assert not list_ranks(rows["dense, HeavyBall"].network)
    ranks = list_ranks(rows["LowRankHeavyBall"].network)
    assert ranks and all(list_ranks(rows[name].network) == ranks for name in rows if not name.startswith("dense"))
    layer = rows["LowRankHeavyBall, K = 10"].network.encoder.stages[3].entry.conv2
    assert layer.u.shape[1] == 2 * layer.rank  # room to widen


def test_bytes_are_those_of_weights_gradients_and_state() -> None:
    layer = nn.Linear(10, 10, bias=False)
    contender = step.Contender(layer, torch.optim.SGD(layer.parameters(), momentum=0.9))
    assert step.held(contender) == 400
    layer(torch.ones(1, 10)).sum().backward()
    contender.optimizer.step()
    assert step.held(contender) == 1200


@pytest.mark.slow
def test_time_and_memory_of_a_small_size(options: Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--presets", "mom3d_xs", "--patch", "16", "--batch", "1", "--rounds", "1", "--out", str(options.out)]
    words += ["--predict-presets", "mom3d_xs", "mom3d_xw", "--predict-patch", "16"]
    page = step.main(words).read_text(encoding="utf-8")
    assert "| dense, HeavyBall |" in page
    assert all(page.count(f"| {preset} |") == 3 for preset in ("mom3d_xs", "mom3d_xw"))
    assert "of 640 817 parameters" in capsys.readouterr().out
