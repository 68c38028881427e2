"""Layers of low rank against the dense layers of the weight that their factors multiply out to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from stages import saved_bytes
from torch import Tensor, nn
from torch.nn import functional

from medmom.models import LowRankConv, LowRankLinear
from medmom.models.low_rank import Gradients, LowRankLayer, Ranks

RANK, STORAGE = 3, 5
GRADIENTS: tuple[Gradients, ...] = ("factors", "tangent")
CONVOLVE: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class Place(NamedTuple):
    """A layer by what comes into it, its kernel and its options."""

    shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})


PLACES = {
    "linear": Place((4, 9)),
    "linear of tokens": Place((2, 3, 9)),
    "linear of one": Place((9,)),
    "1-D": Place((2, 4, 8), (3,), {"padding": (1,), "bias": False}),
    "2-D": Place((2, 4, 6, 7), (3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "2-D pointwise": Place((2, 9, 3, 4), (1, 1), {"bias": False}),
    "2-D dilated": Place((1, 4, 7, 6), (3, 3), {"dilation": (2, 1), "padding": (2, 1)}),
    "3-D": Place((2, 4, 5, 4, 3), (3, 1, 2), {"stride": (1, 2, 1), "padding": (1, 0, 1), "dilation": (1, 1, 2)}),
}


def make(place: Place, gradients: Gradients = "factors", *, dtype: torch.dtype = torch.float64) -> Any:
    """A layer of 7 features out whose rank lies below its storage, and random input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(place.shape, generator=generator, dtype=torch.float64)
    options = {"storage": STORAGE, "gradients": gradients, **place.options}
    layer: LowRankLayer
    if place.kernel:
        layer = LowRankConv(place.shape[1], 7, place.kernel, RANK, **options)
    else:
        layer = LowRankLinear(place.shape[-1], 7, RANK, **options)
    layer.double().set_matrix(torch.randn(7, len(layer.v), generator=generator, dtype=torch.float64))
    with torch.no_grad():  # in training S is not diagonal
        layer.s[:RANK, :RANK] = torch.randn(RANK, RANK, generator=generator, dtype=torch.float64)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -1, 1, generator)
    return layer.to(dtype), x.to(dtype)


def dense(layer: LowRankLayer, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """What torch's own layer gives with this weight."""
    if not isinstance(layer, LowRankConv):
        return functional.linear(x, matrix, bias)
    weight = matrix.reshape(-1, layer.in_channels, *layer.kernel_size)
    y: Tensor = CONVOLVE[len(layer.kernel_size)](x, weight, bias, layer.stride, layer.padding, layer.dilation)
    return y


def loss_of(y: Tensor) -> Tensor:
    return (y.sin() * torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()


def cut(layer: LowRankLayer, rank: int) -> None:
    """Lowers the rank as a rule does: zeros beyond it."""
    with torch.no_grad():
        for factor in (layer.u, layer.s, layer.v):
            factor[:, rank:] = 0
        layer.s[rank:] = 0
        layer.ranks[0] = rank


# Output and gradients


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_layer_is_the_dense_one_of_its_weight(place: Place, gradients: Gradients) -> None:
    layer, x = make(place, gradients)
    used = (layer.u[:, :RANK], layer.s[:RANK, :RANK], layer.v[:, :RANK])
    u, s, v = (factor.detach().clone().requires_grad_() for factor in used)
    weight = u @ s @ v.T
    weight.retain_grad()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    x_dense = x.clone().requires_grad_()
    expected = dense(layer, x_dense, weight, bias)
    torch.autograd.backward(loss_of(expected))

    x.requires_grad_()
    found = layer(x)
    torch.autograd.backward(loss_of(found))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, x_dense.grad, rtol=0, atol=1e-12)
    if bias is not None:
        torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=0, atol=1e-12)
    full = weight.grad
    assert full is not None
    wanted = (u.grad, s.grad, v.grad) if gradients == "factors" else (full @ v, u.T @ full @ v, full.T @ u)
    for factor, grad in zip((layer.u, layer.s, layer.v), wanted, strict=True):
        assert grad is not None
        torch.testing.assert_close(factor.grad[: len(grad), :RANK], grad, rtol=0, atol=1e-11)
    assert layer.ranks.grad is None


@pytest.mark.parametrize("name", ["linear of tokens", "2-D"])
def test_gradients_of_the_factors_are_those_of_differences(name: str) -> None:
    layer, x = make(PLACES[name])
    inputs = (x.requires_grad_(), layer.u, layer.s, layer.v, layer.bias)

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        given = dict(zip(("u", "s", "v", "bias"), factors, strict=True))
        y: Tensor = torch.func.functional_call(layer, given, (x,))
        return y

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("name", ["linear", "2-D"])
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_what_lies_beyond_the_rank_is_neither_used_nor_moved(name: str, gradients: Gradients) -> None:
    layer, x = make(PLACES[name], gradients)
    expected = layer(x)
    with torch.no_grad():
        for factor in (layer.u, layer.s, layer.v):
            factor[:, RANK:] = torch.nan
        layer.s[RANK:] = torch.nan
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.autograd.backward(loss_of(found))
    for factor in (layer.u, layer.s, layer.v):
        assert factor.grad[:, RANK:].abs().max() == 0
        assert factor.grad[:RANK, :RANK].abs().min() > 0
    assert layer.s.grad[RANK:].abs().max() == 0


def test_input_without_gradient_and_frozen_factors_are_left_alone() -> None:
    for name in ("linear", "2-D"):
        layer, x = make(PLACES[name])
        for part in (layer.u, layer.v, layer.bias):
            part.requires_grad_(False)
        torch.autograd.backward(loss_of(layer(x)))
        assert x.grad is layer.u.grad is layer.v.grad is layer.bias.grad is None
        assert layer.s.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["linear of tokens", "2-D pointwise"])
def test_backward_keeps_the_input_and_as_many_features_as_the_rank(name: str) -> None:
    layer, x = make(PLACES[name])
    # Both have 9 features in, and keep the size of the image.
    assert saved_bytes(layer, x.requires_grad_()) == x.nbytes * (9 + RANK) // 9


def test_empty_batch_goes_through() -> None:
    for name in ("linear", "2-D"):
        layer, x = make(PLACES[name])
        y = layer(x[:0].requires_grad_())
        torch.autograd.backward(loss_of(y))
        assert len(y) == 0
        assert layer.u.grad.abs().max() == 0


# Precision


@pytest.mark.parametrize("name", ["linear of tokens", "2-D"])
def test_autocast_computes_in_its_precision_and_gives_gradients_in_that_of_the_factors(name: str) -> None:
    layer, x = make(PLACES[name], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.03, atol=0.05)
    torch.autograd.backward(loss_of(y))
    found = [p.grad.clone() for p in (layer.u, layer.s, layer.v, layer.bias)]
    layer.zero_grad()
    torch.autograd.backward(loss_of(layer(x)))
    for grad, p in zip(found, (layer.u, layer.s, layer.v, layer.bias), strict=True):
        assert grad.dtype == torch.float32
        assert (grad - p.grad).norm() < 0.05 * p.grad.norm()


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_parameters_in_half_precision_have_whole_ranks_and_half_gradients(gradients: Gradients) -> None:
    layer, x = make(PLACES["2-D"], gradients, dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).double()
    assert (layer.ranks.dtype, layer.u.dtype, layer.rank) == (torch.int64, torch.bfloat16, RANK)
    y, expected = layer(x), wide(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
    torch.autograd.backward([loss_of(y), loss_of(expected)])
    for p, q in zip(layer.parameters(), wide.parameters(), strict=True):
        if q.grad is not None:
            assert p.grad.dtype == torch.bfloat16
            assert (p.grad.double() - q.grad).norm() < 0.05 * q.grad.norm()


# The rank


def in_place(layer: Any) -> Any:
    cut(layer, 2)
    return layer


def loaded(layer: Any, *, assign: bool = False) -> Any:
    twin = copy.deepcopy(layer)
    cut(twin, 2)
    layer.load_state_dict(twin.state_dict(), assign=assign)
    return layer


def loaded_copy(layer: Any) -> Any:
    """A copy has other tensors: nothing may be concluded from what was read of the first ones."""
    other = copy.deepcopy(layer)
    cut(layer, 2)
    other.load_state_dict(layer.state_dict())
    return other


def from_meta(layer: Any) -> Any:
    """Without memory in between."""
    state = {key: value.clone() for key, value in in_place(layer).state_dict().items()}
    empty = layer.to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    return empty


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": in_place,
    "load": loaded,
    "assign": lambda layer: loaded(layer, assign=True),
    "copy": loaded_copy,
    "meta": from_meta,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_rank_is_the_one_that_was_written_last(write: Callable[[Any], Any]) -> None:
    layer, x = make(PLACES["linear"])
    assert layer.rank == RANK
    changed = write(layer)
    assert changed.rank == 2
    assert changed.sizes == Ranks(2, 7, 9)
    torch.testing.assert_close(changed(x), dense(changed, x, changed.matrix(), changed.bias), rtol=0, atol=1e-12)


def test_ranks_given_for_one_call_hold_for_this_call() -> None:
    layer, x = make(PLACES["linear"])
    expected = layer(x)
    # Wider than the factors' zeros: only a call that reads its own ranks uses what lies beyond the first.
    narrow = layer.ranks.detach().clone()
    narrow[0] = 1
    first = torch.func.functional_call(layer, {"ranks": narrow}, (x,))
    assert (first - expected).abs().max() > 1e-3
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_copy_on_the_meta_device_has_the_rank_that_was_written_last() -> None:
    layer, _ = make(PLACES["linear"])
    assert layer.rank == RANK
    cut(layer, 2)
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in layer.parameters()}
    twin = copy.deepcopy(layer, empty)
    assert twin.u.is_meta
    assert twin.rank == 2
    assert twin(torch.empty(4, 9, device="meta", dtype=torch.float64)).shape == (4, 7)


def test_layer_made_in_inference_mode_runs() -> None:
    with torch.inference_mode():
        layer, x = make(PLACES["linear"])
        assert layer(x).shape == (4, 7)
        cut(layer, 2)
        assert layer.rank == 2
        assert copy.deepcopy(layer).rank == 2


def test_parameters_of_a_layer_come_in_the_order_by_which_rules_find_them() -> None:
    layer, _ = make(PLACES["2-D"])
    assert [name for name, _ in layer.named_parameters()] == ["u", "s", "v", "ranks", "bias"]
    assert layer.ranks.tolist() == [RANK, 1, RANK]
    assert not layer.ranks.requires_grad


@pytest.mark.parametrize("name", ["linear", "2-D"])
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_compiled_layer_is_one_graph_that_outlives_a_change_of_rank(name: str, gradients: Gradients) -> None:
    layer, x = make(PLACES[name], gradients)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for rank in (3, 2, 1):
        cut(layer, rank)
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            y = run(x)
            torch.autograd.backward(loss_of(y))
            results.append([y.detach(), layer.u.grad, layer.s.grad, layer.v.grad])
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)
    assert len(graphs) == 1


# Weights taken over


@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_factors_of_a_matrix_are_its_nearest_of_that_rank(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layer = LowRankLinear(shape[1], shape[0], 2, highest=RANK, storage=STORAGE).double()
    for factor in (layer.u, layer.s, layer.v):  # as if a rule had widened the bases
        nn.init.ones_(factor)
    layer.set_matrix(matrix)
    u, values, vt = torch.linalg.svd(matrix)
    torch.testing.assert_close(layer.matrix(), u[:, :RANK] * values[:RANK] @ vt[:RANK], rtol=0, atol=1e-13)
    assert (matrix - layer.matrix()).norm() == pytest.approx(float(values[RANK:].norm()), rel=1e-12)
    assert layer.ranks.tolist() == [RANK, 1, RANK]
    one = torch.eye(RANK, dtype=torch.float64)
    for basis in (layer.u, layer.v):
        torch.testing.assert_close(basis[:, :RANK].T @ basis[:, :RANK], one, rtol=0, atol=1e-13)
        assert basis[:, RANK:].abs().max() == 0
    torch.testing.assert_close(layer.s[:RANK, :RANK], torch.diag(values[:RANK]), rtol=0, atol=1e-13)


def test_norm_can_be_kept() -> None:
    matrix = torch.randn(7, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    near, scaled = (LowRankLinear(9, 7, RANK).double() for _ in range(2))
    near.set_matrix(matrix)
    scaled.set_matrix(matrix, keep_norm=True)
    assert scaled.matrix().norm() == pytest.approx(float(matrix.norm()), rel=1e-12)
    ratio = matrix.norm() / near.matrix().norm()
    torch.testing.assert_close(scaled.matrix(), ratio * near.matrix(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_weight_of_zeros_has_bases_to_start_from(keep_norm: bool) -> None:
    layer = LowRankLinear(9, 7, RANK, storage=STORAGE)
    layer.set_matrix(torch.zeros(7, 9), keep_norm=keep_norm)
    assert layer.matrix().abs().max() == 0
    for basis in (layer.u, layer.v):
        torch.testing.assert_close(basis[:, :RANK].T @ basis[:, :RANK], torch.eye(RANK))


def test_weight_of_half_precision_factors_is_rounded_once() -> None:
    matrix = torch.randn(40, 50, generator=torch.Generator().manual_seed(3))
    layer = LowRankLinear(50, 40, 20).bfloat16()
    layer.set_matrix(matrix.bfloat16())
    exact = layer.u.double() @ layer.s.double() @ layer.v.double().T
    torch.testing.assert_close(layer.matrix().double(), exact, rtol=2**-8, atol=1e-6)
    assert layer.matrix().dtype == torch.bfloat16


# Faults


@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (0, {}, r"rank 0, lowest 1, highest 0, storage 0 for a matrix of 7 x 9: they must rise from 1 to 7 "),
        (8, {}, "rank 8, lowest 1, highest 8, storage 8 for a matrix of 7 x 9"),
        (3, {"lowest": 4}, "rank 3, lowest 4, .* in the order lowest, rank, highest, storage"),
        (3, {"lowest": 0}, "lowest 0"),
        (3, {"highest": 2}, "highest 2"),
        (3, {"highest": 5, "storage": 4}, "highest 5, storage 4"),
        (3, {"storage": 8}, "storage 8"),
        (3, {"gradients": "dense"}, "gradients is 'dense'; it is one of factors, tangent"),
    ],
)
def test_ranks_out_of_order_are_refused(rank: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankLinear(9, 7, rank, **options)


@pytest.mark.parametrize("shape", [(6, 9), (7, 8), (8, 10), (7, 9, 1)])
def test_matrix_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    layer, _ = make(PLACES["linear"])
    before = layer.matrix()
    with pytest.raises(ValueError, match=r"weight of shape \[.*\] for factors of 7 x 9"):
        layer.set_matrix(torch.ones(shape))
    torch.testing.assert_close(layer.matrix(), before, rtol=0, atol=0)


def test_printed_layer_tells_its_sizes() -> None:
    layer, _ = make(PLACES["2-D"], "tangent")
    assert repr(layer) == "LowRankConv(rank=3, rows=7, columns=24, gradients=tangent)"
