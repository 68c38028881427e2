"""What this process takes of the memory now, at most, and for one window."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medmom.inference.ensemble import Ensemble
from medmom.inference.stream import window_logits

if sys.platform != "win32":
    import resource

STATUS = Path("/proc/self/status")
"""Linux alone has it."""

INTERVAL_S = 5e-4
"""Between two looks at the memory while a window runs."""

_measured: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()


def resident() -> int:
    """Gives the bytes of RAM that this process takes now; where the system does not tell, the most it ever took."""
    return _status("VmRSS") or peak()


def peak() -> int:
    """Gives the bytes of RAM that this process took at most so far; 0 where the system does not tell."""
    told = _status("VmHWM")
    if told is not None or sys.platform == "win32":
        return told or 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def window_bytes(
    network: nn.Module, channels: int, patch: Sequence[int], *, device: torch.device, mirrors: Sequence[int] = ()
) -> int:
    """Gives the bytes that one window takes while it runs through the network, itself and its logits included.

    Measured once for a network and a window: one of zeros runs, and the memory is looked at. Where it cannot be
    looked at, or the window does not fit on the GPU, a bound from the sizes of all layers' outputs.

    Args:
        network: In evaluation mode, on ``device``. The members of an ensemble run one after the other: the largest
            counts.
        channels: Of the image.
        patch: Voxels of a window, two or three axes.
        device: Of the network.
        mirrors: Axes along which windows are mirrored.
    """
    known = _measured.setdefault(network, {})
    key = (channels, tuple(patch), str(device), len(mirrors) > 0)
    if key not in known:
        window = torch.zeros(1, channels, *patch)
        # Two passes take as much as eight, which follow each other.
        some = tuple(mirrors[:1])
        if device.type == "cuda":
            known[key] = _on_cuda(network, window, device, some)
        elif _status("VmHWM") is None:
            known[key] = _bound(network, window)
        else:
            known[key] = _on_cpu(network, window, some)
    return known[key]


def _status(name: str) -> int | None:
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


@torch.inference_mode()
def _on_cpu(network: nn.Module, window: Tensor, mirrors: Sequence[int]) -> int:
    before, highest = peak(), [resident()]
    with _watched(highest):
        window_logits(network, window, mirrors)
    # A peak above all before is the system's own figure; else what was seen while the window ran.
    most = peak() if peak() > before else max(highest)
    # Against the end and not the start: what the first run loads stays, and is no part of a window.
    return max(window.nbytes, most - resident() + window.nbytes)


@contextlib.contextmanager
def _watched(highest: list[int]) -> Iterator[None]:
    """Looks at the memory again and again, in a thread of its own."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(INTERVAL_S):
            highest[0] = max(highest[0], resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@torch.inference_mode()
def _on_cuda(network: nn.Module, window: Tensor, device: torch.device, mirrors: Sequence[int]) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        window_logits(network, window.to(device), mirrors)
    except torch.OutOfMemoryError:
        return _bound(network, window)
    return torch.cuda.max_memory_allocated(device) - before


@torch.inference_mode()
def _bound(network: nn.Module, window: Tensor) -> int:
    """Twice the bytes of all layers' outputs: as if all were kept, and each copied once; of the largest member."""
    if isinstance(network, Ensemble):
        members = zip(network.members, network.channels, strict=True)
        return max(_bound(member, window[:, channels]) for member, channels in members)
    sizes: list[int] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    hollow = copy.deepcopy(network).to("meta")
    for module in hollow.modules():
        if not any(module.children()):
            module.register_forward_hook(note)
    window_logits(hollow, window.to("meta"))
    return 2 * (sum(sizes) + window.nbytes)
