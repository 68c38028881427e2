"""A run that is stopped anywhere and resumed ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import rows, tiny_recipe, write_recipe, write_scans

from medmom.callbacks import CurveFile
from medmom.cli import main
from medmom.errors import MedmomError
from medmom.recipe_file import RecipeFile
from medmom.train import resume, train

ROOT = Path(__file__).resolve().parent.parent


class StopError(Exception):
    """A run that is cut off."""


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def cut_off(monkeypatch: pytest.MonkeyPatch, epoch: int, error: BaseException, *, before_row: bool = True) -> None:
    """Makes training stop in the middle of an epoch's last callbacks, before the checkpoint."""
    write = CurveFile.on_train_epoch_end

    def on_train_epoch_end(self: CurveFile, trainer: Any, module: Any) -> None:
        if trainer.current_epoch < epoch or not before_row:
            write(self, trainer, module)
        if trainer.current_epoch == epoch:
            raise error

    monkeypatch.setattr(CurveFile, "on_train_epoch_end", on_train_epoch_end)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lists the epochs that are trained from here on."""
    epochs: list[int] = []
    write = CurveFile.on_train_epoch_end

    def on_train_epoch_end(self: CurveFile, trainer: Any, module: Any) -> None:
        epochs.append(trainer.current_epoch)
        write(self, trainer, module)

    monkeypatch.setattr(CurveFile, "on_train_epoch_end", on_train_epoch_end)
    return epochs


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of three epochs; its folder's parent holds scans and cache for others."""
    folder = tmp_path_factory.mktemp("straight")
    train(tiny_recipe(folder, epochs=3, picture_every=3), folder / "run", device="cpu", quiet=True)
    return folder / "run"


@pytest.mark.parametrize(("epoch", "before_row"), [(0, True), (1, False)])
def test_run_that_fails_goes_on_to_the_same_end(
    epoch: int, before_row: bool, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = straight.parent / f"failed-{epoch}-{before_row}"
    with monkeypatch.context() as patch, pytest.raises(StopError):
        cut_off(patch, epoch, StopError(), before_row=before_row)
        train(tiny_recipe(straight.parent, epochs=3, picture_every=3), run, device="cpu", quiet=True)
    assert not (run / "model").exists()
    (run / "last.ckpt.draft").write_bytes(b"half a checkpoint")
    with monkeypatch.context() as patch:
        trained = watch(patch)
        resume(run, device="cpu", quiet=True)
    # It goes on, and does not merely begin anew: what it had done stays done.
    assert trained == list(range(epoch, 3))
    assert weights(run) == weights(straight)
    assert (run / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()
    assert sorted(p.name for p in run.iterdir()) == sorted(
        [p.name for p in straight.iterdir()] + (["last.ckpt.draft"] if (run / "last.ckpt.draft").exists() else [])
    )


def test_run_that_lost_only_its_package_gets_it_again(straight: Path) -> None:
    run = straight.parent / "unpacked"
    train(tiny_recipe(straight.parent, epochs=3, picture_every=3), run, device="cpu", quiet=True)
    for path in (run / "model").iterdir():
        path.unlink()
    (run / "model").rmdir()
    resume(run, device="cpu", quiet=True)
    assert weights(run) == weights(straight)
    assert len(rows(run / "metrics.csv")) == 3


def test_best_weights_are_kept_over_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("--training.keep", "best", "--optimizer.init_args.lr", "0.3")
    settings = {"epochs": 3, "steps_per_epoch": 1, "schedule": "constant", "picture_every": 3}
    train(tiny_recipe(tmp_path, *overrides, **settings), tmp_path / "a", device="cpu", quiet=True)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        cut_off(patch, 1, StopError())
        train(tiny_recipe(tmp_path, *overrides, **settings), tmp_path / "b", device="cpu", quiet=True)
    resume(tmp_path / "b", device="cpu", quiet=True)
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


def test_timed_run_keeps_its_plan_when_it_is_resumed(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = iter([(3, 2)])
    monkeypatch.setattr("medmom.train.epochs_in", lambda *_, **__: next(plans))
    run = straight.parent / "timed"
    with monkeypatch.context() as patch, pytest.raises(StopError):
        cut_off(patch, 1, StopError())
        timed = tiny_recipe(straight.parent, "--training.max_minutes", "5", epochs=90, picture_every=3)
        train(timed, run, device="cpu", quiet=True)
    resume(run, device="cpu", quiet=True)
    # The plan is that of the straight run.
    assert weights(run) == weights(straight)
    assert (run / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores further interrupts once it saw one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_command_says_so_and_can_be_resumed(
    straight: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = straight.parent / "interrupted"
    recipe = write_recipe(straight.parent / "tiny.yaml", straight.parent / "scans", epochs=3, picture_every=3)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        cut_off(patch, 1, KeyboardInterrupt())
        main(["train", str(recipe), "--out", str(run), "--device", "cpu", "--quiet"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "medmom: stopped.\n"
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(run), "--device", "cpu", "--quiet"])
    assert ended.value.code == 0
    assert weights(run) == weights(straight)


def broken(straight: Path, name: str, files: Callable[[Path], object]) -> str:
    run = straight.parent / name
    run.mkdir()
    for file in ("recipe.yaml", "split.json", "last.ckpt"):
        (run / file).write_bytes((straight / file).read_bytes())
    files(run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(MedmomError) as caught:
        resume(run, device="cpu", quiet=True)
    assert all(path.read_bytes() == content for path, content in before.items())
    return str(caught.value)


def test_folder_without_a_run_is_not_resumed(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"no recipe\.yaml and split\.json"):
        resume(tmp_path, device="cpu", quiet=True)
    assert list(tmp_path.iterdir()) == []
    assert "no recipe.yaml" in broken(straight, "no-recipe", lambda run: (run / "recipe.yaml").unlink())


def test_damaged_checkpoint_is_named(straight: Path) -> None:
    message = broken(straight, "bad-checkpoint", lambda run: (run / "last.ckpt").write_bytes(b"PK\x03\x04 nothing"))
    assert "last.ckpt: not a sound checkpoint; delete it" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"labels": {}}'])
def test_damaged_split_is_named(content: str, straight: Path) -> None:
    assert "split.json" in broken(
        straight, f"bad-split-{content}", lambda run: (run / "split.json").write_text(content)
    )


def test_scan_that_is_gone_is_named(straight: Path) -> None:
    def move(run: Path) -> None:
        split = json.loads((run / "split.json").read_text())
        split["train"][0]["images"] = [str(run / "moved.nii.gz")]
        (run / "split.json").write_text(json.dumps(split))

    message = broken(straight, "moved", move)
    assert "moved.nii.gz: no longer there" in message
    assert "put it back" in message


def wait(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    limit = time.monotonic() + 90
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.01)


def kill_when(run: Path, arguments: list[str], ready: Callable[[], bool], delay: float) -> None:
    """Starts ``medmom train`` in a process of its own and kills it, as ``kill -9`` does."""
    command = [sys.executable, "-m", "medmom", "train", *arguments, "--out", str(run), "--device", "cpu", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            wait(process, ready)
            time.sleep(delay)
            assert process.poll() is None
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model").exists()


def num_rows(run: Path) -> int:
    return len(rows(run / "metrics.csv")) if (run / "metrics.csv").exists() else 0


def check_killed_run(
    folder: Path, overrides: list[str], ready: Callable[[Path], bool], *, delay: float = 0.0, **training: object
) -> None:
    scans = write_scans(folder / "scans")
    recipe = write_recipe(folder / "tiny.yaml", scans, picture_every=100, **training)
    run = folder / "killed"
    kill_when(run, [str(recipe), *overrides], lambda: ready(run), delay)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(run), "--device", "cpu", "--quiet"])
    assert ended.value.code == 0
    # What the run stored is all that the straight one gets: its plan, if the run was timed.
    train(RecipeFile(run / "recipe.yaml"), folder / "straight", device="cpu", quiet=True)
    assert weights(run) == weights(folder / "straight")
    assert (run / "metrics.csv").read_bytes() == (folder / "straight" / "metrics.csv").read_bytes()
    epochs = [row["epoch"] for row in rows(run / "metrics.csv")]
    assert epochs == [str(epoch) for epoch in range(len(epochs))]


MOMO = ["--optimizer=medmom.optim.MoMo", "--optimizer.init_args.lr=0.1"]
REVERSIBLE = ["--model.memory=reversible"]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], MOMO, REVERSIBLE], ids=["HeavyBall", "MoMo", "reversible"])
@pytest.mark.parametrize("delay", [0.0, 0.3], ids=["between-epochs", "within-an-epoch"])
def test_killed_run_resumes_to_the_same_weights(overrides: list[str], delay: float, tmp_path: Path) -> None:
    check_killed_run(
        tmp_path, overrides, lambda run: num_rows(run) >= 3, delay=delay, epochs=8, steps_per_epoch=8
    )  # fmt: skip


@pytest.mark.slow
def test_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    def started(run: Path) -> bool:
        return (run / "tensorboard").exists()

    check_killed_run(tmp_path, [], started, delay=0.2, epochs=2, steps_per_epoch=30)
    assert len(rows(tmp_path / "killed" / "metrics.csv")) == 2


@pytest.mark.slow
def test_killed_timed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    timed = ["--training.max_minutes", "0.4"]
    check_killed_run(tmp_path, timed, lambda run: num_rows(run) >= 2, delay=0.2, epochs=1000, steps_per_epoch=250)
