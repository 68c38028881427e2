"""Computing a block a second time in the backward pass, as if it had run only once.

The second time it has to see the same random numbers and the same precision, and must leave its buffers alone.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint


def is_traced() -> bool:
    """Whether operations are being noted by the older exporter, for which a size is a tensor and not to be judged."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_exported() -> bool:
    """Whether the network is being written down for another runtime."""
    return torch.compiler.is_exporting() or is_traced()


def is_recorded() -> bool:
    """Whether gradients will be asked for; a network that is exported runs straight on."""
    return torch.is_grad_enabled() and not is_exported()


def checkpointed(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Result of a module that keeps its inputs alone and computes everything else again in the backward pass.

    Args:
        function: A module or a method of one, called with ``tensors``.
        tensors: Its inputs; None is handed on.

    Returns:
        What it gives.
    """
    if not is_recorded():
        return function(*tensors)
    module: nn.Module = getattr(function, "__self__", function)  # type: ignore[arg-type]
    if next(module.buffers(), None) is None:
        return checkpoint(function, *tensors, use_reentrant=False)
    return _checkpointed_with_buffers(function, module, *tensors)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _checkpointed_with_buffers(function: Callable[..., Any], module: nn.Module, *tensors: Tensor | None) -> Any:
    # Not compiled: the compiler knows no contexts of a checkpoint.
    return checkpoint(
        function, *tensors, use_reentrant=False, context_fn=lambda: (nullcontext(), FrozenBuffers(module))
    )


class FrozenBuffers:
    """Context in which a module leaves its buffers alone, such as running statistics, which the first run has updated.

    It can be entered again: a graph that is kept computes its checkpoints once for every backward pass.

    Args:
        module: Works on copies for the time being.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = [part for part in module.modules() if part._buffers]
        self._kept: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        """Puts copies in place."""
        self._kept = [dict(part._buffers) for part in self._owners]
        for part, buffers in zip(self._owners, self._kept, strict=True):
            part._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})

    def __exit__(self, *_: object) -> None:
        """Puts the buffers back."""
        for part, buffers in zip(self._owners, self._kept, strict=True):
            part._buffers.update(buffers)


@contextmanager
def stand_ins(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Puts others of the same values in the place of parameters, whose own hooks then see a gradient only once.

    Args:
        module: Works on the others for the time being.
        parameters: Which of its parameters.

    Yields:
        The others, in the same order.
    """
    others = {parameter: nn.Parameter(parameter.detach()) for parameter in parameters}
    owners = [part for part in module.modules() if part._parameters]
    kept = [dict(part._parameters) for part in owners]
    for part, own in zip(owners, kept, strict=True):
        part._parameters.update({name: p if p is None else others.get(p, p) for name, p in own.items()})
    try:
        yield list(others.values())
    finally:
        for part, own in zip(owners, kept, strict=True):
            part._parameters.update(own)


class Precision(NamedTuple):
    """Autocast as it was on the way forward."""

    device_type: str
    dtype: torch.dtype
    is_low: bool

    @classmethod
    def now(cls, device_type: str) -> "Precision":
        """What holds for a kind of device at this moment."""
        if not torch.amp.is_autocast_available(device_type):
            return cls(device_type, torch.float32, False)
        is_on = torch.is_autocast_enabled(device_type)
        return cls(device_type, torch.get_autocast_dtype(device_type), is_on)

    def again(self) -> Any:
        """A context with the same precision.

        Casts of weights are not cached: one made without gradients would be taken up later and lose them.
        """
        if not torch.amp.is_autocast_available(self.device_type):
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, enabled=self.is_low, cache_enabled=False)


class Draws:
    """State of the random numbers before a block, kept only if the block drew some.

    Args:
        device: Where the block computes.

    Raises:
        RuntimeError: The blocks drop values, and the random numbers of this device cannot be had again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: tuple[Tensor, ...] | None = _random_state(device)

    def end(self) -> None:
        """Forgets the state where nothing was drawn since."""
        before, now = self._before or (), _random_state(self._device)
        if all(torch.equal(a, b) for a, b in zip(before, now, strict=True)):
            self._before = None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draws the same numbers once more, and leaves the generators where they were."""
        if self._before is None:
            yield
            return
        now = _random_state(self._device)
        _set_random_state(self._device, self._before)
        try:
            yield
        finally:
            _set_random_state(self._device, now)


def check_replay(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Refuses blocks that drop values on a device whose random numbers cannot be drawn again.

    Raises:
        RuntimeError: There is such a block.
    """
    if device.type == "cpu" or _generators(device) is not None:
        return
    if any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for b in blocks for part in b.modules()):
        raise RuntimeError(
            f"The stage drops values, and random numbers of device {device.type} cannot be drawn again in the "
            "backward pass; take memory plain, or leave the dropout out."
        )


def _generators(device: torch.device) -> Any:
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        return None
    return module if hasattr(module, "get_rng_state") else None


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    state = (torch.get_rng_state(),)
    module = None if device.type == "cpu" else _generators(device)
    return state if module is None else (*state, module.get_rng_state(device))


def _set_random_state(device: torch.device, state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        _generators(device).set_rng_state(state[1], device)
