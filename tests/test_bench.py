"""The benchmarks measure what they say they measure, and write their pages."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medmom.models.momentum import MomentumStage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
deep, measure, memory, networks, page, stages, step, times = (
    import_module(f"bench_{name}")
    for name in ("deep", "measure", "memory", "networks", "page", "stages", "step", "times")
)
# Not on the path for the other tests.
sys.path.pop(0)

UNIT = 4 * 2 * 3**3
"""Bytes of the features of these tests."""

TINY = ["--channels", "4", "--size", "4", "--rounds", "1", "--network-channels", "2", "4", "--network-size", "8"]


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Hoarder(nn.Module):
    """Keeps a copy where autograd does not see it."""

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = x.detach() * 2
        return x + 1


def trial(module: nn.Module, amp: str = "off") -> Any:
    x, cotangent = torch.randn(2, 1, 2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return measure.Trial(module, x, cotangent, amp)


def contender(name: str, depth: int) -> Any:
    return next(made for made in stages.stage_contenders(depth, 2, 0.9) if made.name == name)


@pytest.mark.parametrize(
    ("function", "units"),
    [
        (lambda x: x + 1, 0),  # nothing is needed: neither the input nor the output is held
        (lambda x: x.exp(), 1),  # its result
        (lambda x: x.exp().exp().exp(), 3),
        (lambda x: x * x, 1),  # its input, which the trial lets go
        (lambda x: x.exp().view(-1).view_as(x).exp(), 2),  # views take nothing
    ],
)
def test_kept_bytes_are_those_that_the_backward_pass_needs(function: Callable[[Tensor], Tensor], units: int) -> None:
    use = measure.memory_use(trial(Function(function)))
    assert use.kept == use.saved == units * UNIT


def test_bytes_hidden_in_an_attribute_are_kept_but_not_saved() -> None:
    hoarder = trial(Hoarder())
    for _ in range(2):
        use = measure.memory_use(hoarder)
        assert (use.kept, use.saved) == (UNIT, 0)


def test_peak_counts_what_is_let_go_again() -> None:
    def wasteful(x: Tensor) -> Tensor:
        with torch.no_grad():
            torch.zeros(1000)
        return x

    assert 4000 <= measure.memory_use(trial(Function(wasteful))).peak < 4000 + 4 * UNIT


def test_parameters_are_not_counted() -> None:
    module = nn.Linear(3, 3)
    use = measure.memory_use(trial(module))
    assert use.kept == use.saved == UNIT


@pytest.mark.parametrize(("name", "seal"), [("reversible", 0), ("exact, gate 1", 32)])
def test_invertible_stages_keep_two_features_at_every_depth(name: str, seal: int) -> None:
    for depth in (2, 5):
        assert measure.memory_use(trial(contender(name, depth).build())).kept == 2 * UNIT + seal


def test_storing_stages_keep_more_with_depth() -> None:
    for name, units in {"plain": 5, "checkpoint": 1}.items():
        for depth in (2, 5):
            kept = measure.memory_use(trial(contender(name, depth).build())).kept
            assert units * depth * UNIT <= kept <= units * depth * UNIT + 100 * depth, name


def test_gradient_error_is_small_for_all_of_ours_and_large_for_a_wrong_one() -> None:
    for made in stages.stage_contenders(3, 2, 0.9):
        if made.like == "plain":
            assert measure.gradient_error(trial(made.build()), made.twin()).typical < 1e-4, made.name
    right, wrong = contender("plain", 3), contender("exact, gate 1", 3)
    assert measure.gradient_error(trial(right.build()), wrong.twin()).typical > 1e-3


@pytest.mark.peers
@pytest.mark.parametrize("name", ["momentumnet", "memcnn", "revtorch"])
@pytest.mark.filterwarnings("ignore::FutureWarning:memcnn", "ignore::UserWarning:memcnn")
def test_peers_keep_the_same_at_every_depth_and_have_right_gradients(name: str) -> None:
    pytest.importorskip(name)
    uses = []
    for depth in (2, 4):
        made = contender(name, depth)
        peer = trial(made.build())
        uses.append(measure.memory_use(peer))
        assert uses[-1].kept > uses[-1].saved
        assert measure.gradient_error(peer, made.twin()).typical < 1e-4
    assert uses[0].kept == uses[1].kept


def test_coupling_is_inverted_by_subtraction() -> None:
    made = contender("additive coupling, stored", 1)
    coupled = made.build()
    x = torch.randn(1, 2, 3, 3, 3)
    f, g = coupled.steps
    y1, y2 = coupled(x).chunk(2, dim=1)
    x2 = y2 - g(y1)
    torch.testing.assert_close(torch.cat((y1 - f(x2), x2), dim=1), x, rtol=0, atol=1e-5)


def test_every_round_runs_every_step_and_begins_with_the_next() -> None:
    seen: list[str] = []
    steps = {name: lambda name=name: seen.append(name) for name in "abc"}
    found = times.interleaved(steps, 3, torch.device("cpu"))
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(durations) for name, durations in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratio_is_of_medians_and_pairs_share_their_noise() -> None:
    base = [1.0, 5.0, 2.0, 9.0, 3.0]
    assert times.ratio_of_medians([2 * value for value in base], base) == (2, 2, 2)
    value, low, high = times.ratio_of_medians([3.0, 4.0, 5.0, 4.0, 4.0], base)
    assert value == 4 / 3
    assert low < value < high


def test_contender_that_is_absent_or_fails_has_its_reason_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "momentumnet", None)
    made = [one for one in stages.stage_contenders(2, 2, 0.9) if one.name.startswith(("plain", "momentumnet"))]
    illegal = stages.Contender("illegal", "plain", lambda: MomentumStage([nn.Identity()], 0.9, memory="reversible"))
    absent = stages.Contender("absent", "plain", lambda: import_module("no_such_package"))
    x = torch.randn(1, 2, 3, 3, 3)
    options = Namespace(amp="off", rounds=1, depths=[2])
    results = memory.measure([*made, illegal, absent], x, torch.randn_like(x), options)
    text = memory.tables("stage", {name: {2: result} for name, result in results.items()}, options)
    assert "| momentumnet | none [1] |" in text and "| absent | none [3] |" in text
    assert "not installed (no_such_package)" in text
    assert "ValueError: memory reversible needs two blocks or more" in text
    assert results["momentumnet"].failure and not results["plain"].failure


def test_memory_page_has_tables_plot_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = memory.main([*TINY, "--depths", "2", "3", "--out", str(tmp_path)])
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "benchmarks" / "memory.md"
    assert (path.parent / "../images/memory.png").stat().st_size > 5000
    assert f"torch {torch.__version__}" in text and "1 thread(s)" in text
    assert "python scripts/bench_memory.py --channels 4" in text and str(tmp_path) not in text
    assert "Kept by reversible at 3 blocks equals that at 2: yes" in text
    assert "Kept by reversible at 3 blocks" in capsys.readouterr().out
    assert "| hybrid |" in text and "| revtorch |" in text


@pytest.mark.parametrize(("kept", "share", "slower", "answers"), [(7, 0.1, 1.2, "yyy"), (8, 0.2, 1.5, "nnn")])
def test_verdict_says_no_where_a_goal_is_missed(kept: int, share: float, slower: float, answers: str) -> None:
    def result(kept: int) -> Any:
        ratio = times.Ratio(slower, slower, slower)
        return memory.Result(use=measure.Use(kept, kept, kept), time=ratio, share=share)

    lines = memory.acceptance({2: result(7), 16: result(kept)})
    assert [line.split(": ")[1][0] for line in lines] == list(answers)
    failed, *rest = memory.acceptance({2: result(7), 32: memory.Result(failure="why")})
    assert failed == "Reversible did not run at 32 blocks: why"
    assert not any("equals" in line for line in rest), "one depth says nothing about depth"


def step_bench(*arguments: str) -> Any:
    given = ["--preset", "mom3d_xs", "--patch", "16", "--pairs", "1", *arguments]
    return step.Bench(step.ready(step.parser(), given))


def test_network_without_momentum_is_the_one_with_gate_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    original = step.loss_of

    def noted(logits: Tensor, labels: Tensor) -> Any:
        loss = original(logits, labels)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(step, "loss_of", noted)
    bench = step_bench("--peers")
    with torch.no_grad():
        for parameter in bench.network.parameters():
            # Branches begin at 0, which would hide the momentum.
            if not parameter.any():
                parameter.fill_(0.5)
    for run in bench.steps.values():
        run()
    assert list(bench.steps) == ["mom3d_xs, gate 0.9", "mom3d_xs, gate 0", "mom3d_xs, no momentum"]
    assert losses[1] == losses[2] != losses[0]


def test_switched_network_has_momentum_again() -> None:
    bench = step_bench("--peers")
    momentum, _, bare = bench.steps.values()
    stage = bench.network.encoder.stages[1]
    bare()
    assert isinstance(stage.momentum, networks.Chain)
    momentum()
    assert isinstance(stage.momentum, MomentumStage) and stage.momentum.gate == 0.9


def test_loss_is_lower_for_the_right_labels() -> None:
    labels = torch.randint(0, 3, (1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    right = 9.0 * nn.functional.one_hot(labels, 3).movedim(-1, 1)
    assert math.isclose(step.loss_of(right, labels).item(), -1, abs_tol=0.05)
    assert step.loss_of(right, (labels + 1) % 3) > 5


def test_step_page_names_what_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.architectures.unet", None)
    given = ["--preset", "mom3d_xs", "--patch", "16", "--pairs", "2", "--out", str(tmp_path)]
    text = step.main(given).read_text(encoding="utf-8")
    assert "| mom3d_xs, gate 0.9 | 640 817 |" in text and "| DynUNet | 284 403 |" in text
    assert "ResidualEncoderUNet: not installed" in text
    assert "mom3d_xs, gate 0.9 takes 1.03 of no momentum or less: " in text
    assert (tmp_path / "images/step.png").is_file()


@pytest.mark.peers
def test_host_has_as_many_parameters() -> None:
    pytest.importorskip("dynamic_network_architectures")
    counts = step_bench("--peers", "ResidualEncoderUNet").num_parameters
    assert counts["ResidualEncoderUNet"] == counts["mom3d_xs, gate 0"] == 640_817


@pytest.mark.parametrize(("bound", "found"), [(0, 0), (63, 0), (64, 64), (100, 96), (160, 160), (999, 160)])
def test_search_finds_the_largest_patch(bound: int, found: int) -> None:
    tried: list[int] = []

    def fits(edge: int) -> bool:
        tried.append(edge)
        return edge <= bound

    assert deep.largest_patch(fits, 32, 160) == found
    assert min(tried) >= 64, "one step would leave one voxel at the bottleneck"


def test_bits_come_back_in_exact_and_not_in_reversible() -> None:
    options = Namespace(device=torch.device("cpu"), batch=1, amp="off", seed=0)
    options.exact_preset, options.exact_patch = "mom3d_xs", 16
    exact, reversible = (networks.compare_bits(memory, 7 / 8, options) for memory in ("exact", "reversible"))
    assert exact == ["6 of 6", "0.0e+00", "nothing"]
    equal, worst, raised = reversible
    assert equal != "6 of 6" and 0 < float(worst) < 1e-4 and raised == "nothing"


def test_deep_page_has_memory_largest_patch_and_bits(tmp_path: Path) -> None:
    rows = ["mom3d_xs:plain:0", "mom3d_xs:hybrid:0.9", "mom3d_xs:exact:0.9"]
    sizes = ["--patch", "16", "--rounds", "1", "--largest", "24", "--limit", "0.02"]
    exact = ["--exact-preset", "mom3d_xs", "--exact-patch", "16"]
    given = ["--device", "cpu", "--amp", "off", "--rows", *rows[:2], *sizes, *exact, "--out", str(tmp_path)]
    text = deep.main(given).read_text(encoding="utf-8")
    plain, hybrid = (next(x for x in text.splitlines() if x.startswith(f"| mom3d_xs {name}")) for name in ("pl", "hy"))
    assert float(plain.split("|")[3]) > 2 * float(hybrid.split("|")[3])
    assert "24^3 (the largest tried is 24)" in hybrid
    assert "| exact, gate 0.875 | none | 6 of 6 | 0.0e+00 | nothing |" in text
    with pytest.raises(SystemExit):
        deep.main(["--device", "cpu", "--rows", rows[2]])


@pytest.mark.parametrize("script", [memory, step, deep])
def test_help_teaches_and_names_the_defaults(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert "python scripts/bench_" in text and "(default: runs/bench)" in text


@pytest.mark.parametrize("device", ["nonsense", "cuda"])
def test_device_that_is_not_there_is_named(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        deep.main(["--device", device])
    assert f"--device {device}: " in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kept_bytes_on_a_gpu_are_those_on_the_cpu() -> None:
    x, cotangent = torch.randn(2, 1, 8, 16, 16, 16)
    stage = MomentumStage([stages.ResidualBlock(8, 8, [3] * 3) for _ in range(3)], 0.9, memory="reversible")
    here = measure.memory_use(measure.Trial(stage, x, cotangent))
    there = measure.Trial(stage.cuda(), x.cuda(), cotangent.cuda())
    there.step()
    assert measure.memory_use(there).kept == here.kept
