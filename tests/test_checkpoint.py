"""Checkpoints of nnU-Net v2 are read, and nothing in them is run."""

from __future__ import annotations

import collections
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_convert import assert_same_logits, host
from torch import Tensor, nn

from medmom.checkpoint import read_checkpoint
from medmom.errors import MedmomError
from medmom.models import MomentumUNet
from medmom.models.convert import from_host, to_host


def save(path: Path, network_weights: Any, **more: Any) -> Path:
    """Writes what nnU-Net v2 writes at the end of a training."""
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=np.float64(0.01), momentum=0.99, nesterov=True)
    layer(torch.ones(1)).sum().backward()
    optimizer.step()
    losses = [np.mean([np.array(-0.25, dtype=np.float32)]), np.mean(np.array([-0.5], dtype=np.float32))]
    checkpoint = {
        "network_weights": network_weights,
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
        "logging": {
            "mean_fg_dice": [np.nanmean([0.5, np.nan])],
            "dice_per_class_or_region": [[np.float32(0.75), np.float64(0.5)]],
            "train_losses": losses,
            "lrs": [0.01],
            "epoch_end_timestamps": [1.5e9],
        },
        "_best_ema": np.float64(0.8125),
        "current_epoch": 1000,
        "init_args": {
            "plans": {"configurations": {"3d_fullres": {"patch_size": [8, 8], "spacing": [1.0, 0.5]}}},
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": {"labels": {"background": 0, "organ": 1}},
            "unpack_dataset": True,
            "device": torch.device("cuda"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
        **more,
    }
    torch.save(checkpoint, path)
    return path


def tiny_host() -> tuple[MomentumUNet, dict[str, Tensor]]:
    network = MomentumUNet(
        1, 2, channels=[4, 6], blocks=[1, 3], kernels=[[3, 3]] * 2, strides=[[1, 1], [2, 2]], gate=0.0
    )
    return network.eval(), to_host(network)


def test_checkpoint_becomes_a_momentum_network(tmp_path: Path) -> None:
    network, weights = tiny_host()
    checkpoint = read_checkpoint(save(tmp_path / "checkpoint_final.pth", collections.OrderedDict(weights)))
    again = from_host(checkpoint["network_weights"]).eval()
    image = torch.randn(1, 1, 4, 4)
    torch.testing.assert_close(again(image), network(image), rtol=0, atol=0)


@pytest.mark.peers
def test_checkpoint_of_the_host_gives_its_logits(tmp_path: Path) -> None:
    theirs = host("3-D anisotropic", deep_supervision=False)
    path = save(tmp_path / "checkpoint_final.pth", theirs.state_dict())
    assert_same_logits(from_host(read_checkpoint(path)["network_weights"]).eval(), theirs)


def test_numbers_of_numpy_come_back_as_pythons(tmp_path: Path) -> None:
    numbers = [np.float16(0.5), np.int8(-3), np.int16(-300), np.int32(70000), np.int64(2**40), np.uint8(200)]
    read = read_checkpoint(save(tmp_path / "a.pth", {}, numbers=[*numbers, np.bool_(True)]))
    assert read["logging"]["mean_fg_dice"] == [0.5]
    assert read["logging"]["dice_per_class_or_region"] == [[0.75, 0.5]]
    assert read["logging"]["train_losses"] == [-0.25, -0.5]
    assert read["_best_ema"] == 0.8125
    assert read["optimizer_state"]["param_groups"][0]["lr"] == 0.01
    assert read["numbers"] == [0.5, -3, -300, 70000, 2**40, 200, True]
    assert {type(number) for number in read["numbers"]} == {float, int, bool}
    assert read["init_args"]["device"] == torch.device("cuda")
    assert read["inference_allowed_mirroring_axes"] == (0, 1)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_both_modules_of_numpys_scalars_are_known(module: str, tmp_path: Path) -> None:
    written = save(tmp_path / "written.pth", {"w": torch.arange(3.0)})
    path = tmp_path / "read.pth"
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                content, count = re.subn(rb"cnumpy\.(_core|core)\.multiarray\n", f"c{module}\n".encode(), content)
                assert count == 1
            target.writestr(name, content)
    assert read_checkpoint(path)["_best_ema"] == 0.8125


class Own:
    pass


class Call:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Own(), r"test_checkpoint\.Own"),
        (Call(eval, "print()"), r"builtins\.eval"),
        (Call(os.system, "echo"), r"(posix|nt)\.system"),
        (Call(getattr, "text", "upper"), r"builtins\.getattr"),
        (collections.deque([1]), r"collections\.deque"),
        (np.zeros(2), r"numpy\._core\.multiarray\._reconstruct, numpy\.ndarray"),
        (Call(np.dtype, "V8"), r"numpy\.dtype\('V8'\)"),
        (np.str_("text"), r"numpy\.dtype\('U4'\)"),
        (np.array(3.0, dtype=">f4").dtype, r"numpy\.dtype of byte order '>'"),
        (Path("plans.json"), r"pathlib\.\w+"),
    ],
)
def test_foreign_content_is_refused_by_name(content: Any, name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint_final.pth", {}, more=content)
    with pytest.raises(MedmomError, match=rf"checkpoint_final.pth: holds {name}, neither number nor text nor tensor"):
        read_checkpoint(path)


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_nothing_in_a_checkpoint_is_run(options: dict[str, Any], tmp_path: Path) -> None:
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    torch.save({"network_weights": {}, "more": Call(os.mkdir, str(trace))}, path, **options)
    with pytest.raises(MedmomError, match=r"a.pth: (holds (posix|nt)\.mkdir,|not a sound checkpoint)"):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.fixture
def allowed_elsewhere() -> Iterator[None]:
    with torch.serialization.safe_globals([Own, (eval, "numpy.core.multiarray.scalar")]):
        yield


@pytest.mark.usefixtures("allowed_elsewhere")
def test_what_others_allow_torch_is_refused_here_and_stays_theirs(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(MedmomError, match=r"holds test_checkpoint\.Own"):
        read_checkpoint(save(tmp_path / "a.pth", {}, more=Own()))
    assert read_checkpoint(save(tmp_path / "b.pth", {}))["_best_ema"] == 0.8125
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "head"])
def test_damaged_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {"w": torch.zeros(1000)})
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[:-200], "head": whole[:100]}[kind])
    with pytest.raises(MedmomError, match=r"a.pth: not a sound checkpoint of torch.save. Copy it again"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [[1], {"state_dict": {}}, {"network_weights": {"w": 1}}, torch.zeros(1)])
def test_other_checkpoints_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(MedmomError, match=r"a.pth: no network_weights in it. Give checkpoint_final.pth"):
        read_checkpoint(tmp_path / "a.pth")


def test_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"none.pth: cannot be read \(No such file or directory\)"):
        read_checkpoint(tmp_path / "none.pth")
