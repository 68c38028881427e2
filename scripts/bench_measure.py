# mypy: disable-error-code="no-untyped-call"
"""Memory of a step, and the error of its gradients."""

import gc
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20

CELL = 512
"""Bytes that a scalar takes on a GPU."""

PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Autocast types by the name they have as an option."""


class Use(NamedTuple):
    """Memory of one step in bytes, without parameters and inputs.

    Attributes:
        kept: Held between the forward and the backward pass, wherever it hides; the output is let go, the loss apart.
        saved: Of it, what autograd holds as saved tensors, each storage counted once.
        peak: Most held at any time of the step, gradients included.
    """

    kept: int
    saved: int
    peak: int


class Trial:
    """A module and what it is run on: ``sum(module(x) * cotangent)`` is the loss.

    Args:
        module: In training.
        source: ``x``; a copy is handed to the module, which may then let go of it.
        cotangent: Of the shape of the module's output; the gradient that comes back to it.
        amp: Autocast, a name of ``PRECISIONS``.
    """

    def __init__(self, module: nn.Module, source: Tensor, cotangent: Tensor, amp: str = "off") -> None:
        self.module, self.amp = module.train(), amp
        self.source, self._cotangent = source.detach().requires_grad_(), cotangent

    @property
    def outside(self) -> list[Tensor]:
        """What exists before the step and is not counted: parameters, buffers, input, cotangent."""
        return [*self.module.parameters(), *self.module.buffers(), self.source, self._cotangent]

    def loss(self) -> Tensor:
        """The forward pass."""
        with torch.autocast(self.source.device.type, PRECISIONS[self.amp], enabled=self.amp != "off"):
            output = self.module(self.source.clone())
        loss: Tensor = (output.to(self._cotangent.dtype) * self._cotangent).sum()
        return loss

    def step(self) -> None:
        """Forward and backward pass, from no gradients."""
        forget_gradients(self.outside)
        self.loss().backward()

    def gradients(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Of the source and of some parameters, in float64 on the CPU."""
        self.step()
        sources = [self.source, *parameters]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in sources]
        forget_gradients(self.outside)
        return [grad.double().cpu() for grad in grads]


def forget_gradients(tensors: Iterable[Tensor]) -> None:
    """Sets every ``grad`` to None."""
    for tensor in tensors:
        tensor.grad = None


class Watch(TorchDispatchMode):
    """Follows every storage that operations make on a CPU, whoever holds it, and sees when it is let go.

    Memory that an operation takes for itself and gives back before it ends is not seen.

    Args:
        outside: Tensors that are not counted.

    Attributes:
        peak: Most bytes alive after any operation.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self._outside = {StorageWeakRef(tensor.untyped_storage()) for tensor in outside}
        self._alive: set[StorageWeakRef] = set()
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and notes what it made."""
        result = func(*args, **(kwargs or {}))
        made = {StorageWeakRef(leaf.untyped_storage()) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        self._alive |= made - self._outside
        self.peak = max(self.peak, self.held())
        return result

    def held(self) -> int:
        """Bytes alive now."""
        sizes = {ref: _size(ref) for ref in self._alive}
        self._alive = {ref for ref, size in sizes.items() if size is not None}
        return sum(size for size in sizes.values() if size is not None)


def _size(ref: StorageWeakRef) -> int | None:
    # Asked anew each time: a storage may have been resized behind the back of every operation.
    storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return None if storage is None else storage.nbytes()


def memory_use(trial: Trial) -> Use:
    """Memory of one step; on a GPU as its allocator counts it, on a CPU by ``Watch``.

    Args:
        trial: Its gradients are None afterwards. On a GPU it should not have run before: what a module keeps on
            itself from step to step would not be seen a second time.
    """
    forget_gradients(trial.outside)
    kept, peak = _on_gpu(trial) if trial.source.is_cuda else _on_cpu(trial)
    forget_gradients(trial.outside)
    return Use(kept, _saved_bytes(trial), peak)


def _on_cpu(trial: Trial) -> tuple[int, int]:
    with Watch(trial.outside) as watch:
        loss = trial.loss()
        gc.collect(1)
        kept = watch.held() - loss.untyped_storage().nbytes()
        loss.backward()
    return kept, watch.peak


def _on_gpu(trial: Trial) -> tuple[int, int]:
    device = trial.source.device
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = trial.loss()
    gc.collect(1)
    kept = torch.cuda.memory_allocated(device) - before - CELL
    loss.backward()
    torch.cuda.synchronize(device)
    return kept, torch.cuda.max_memory_allocated(device) - before


def _saved_bytes(trial: Trial) -> int:
    outside = {StorageWeakRef(tensor.untyped_storage()) for tensor in trial.outside}
    sizes: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        ref = StorageWeakRef(tensor.untyped_storage())
        if ref not in outside:
            sizes[ref] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        trial.loss()
    return sum(sizes.values())


class GradientError(NamedTuple):
    """Of all gradients of a trial, relative to their size.

    Attributes:
        total: Norm of all errors over the norm of all gradients.
        typical: Median over all elements of the error over the root mean square of its tensor. One leaky ReLU whose
            sign rounding flips moves the total to 1e-3, and this one little.
    """

    total: float
    typical: float

    def __str__(self) -> str:
        return f"{self.total:.1e}, median {self.typical:.1e}"


def gradient_error(trial: Trial, twin: nn.Module) -> GradientError:
    """Error of all gradients of a trial against ordinary backpropagation in float64.

    Args:
        trial: What is looked at.
        twin: The same function with stored activations, over the very same parameters.
    """
    double = deepcopy(twin).double()
    exact = Trial(double, trial.source.double(), trial._cotangent.double()).gradients(double.parameters())
    pairs = list(zip(trial.gradients(twin.parameters()), exact, strict=True))
    wrong, size = (sum(float(t.square().sum()) for t in ts) for ts in ([a - b for a, b in pairs], exact))
    elements = [((a - b).abs() / b.square().mean().sqrt()).flatten() for a, b in pairs]
    return GradientError((wrong / size) ** 0.5, float(torch.cat(elements).nanmedian()))
