"""The dense sum whose backward is written out, judged by the plain sum under autograd and by finite differences."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dylo_moe.errors import RoutingError
from dylo_moe.gradients import add_lean
from dylo_moe.spread import Spread
from dylo_moe.sums import Sums, add_dense
from harness.measure import LiveBytes

D_IN, D_OUT, EXPERTS = 7, 11, 3
MIXED, EQUAL = (2, 3, 5), (4, 4, 4)
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def make(ranks=MIXED, dtype=torch.float64, shape=(2, 6), broadcast=None, x_dtype=None):
    """result, x, weights and the sums, all of which learn; result is no leaf, as in a layer."""
    torch.manual_seed(0)
    shrinks = [torch.randn(rank, D_IN).to(dtype).requires_grad_() for rank in ranks]
    expands = [torch.randn(D_OUT, rank).to(dtype).requires_grad_() for rank in ranks]
    sums = Sums(tuple((e, 0.5 + e, rank) for e, rank in enumerate(ranks)), shrinks, expands)
    result, x = (torch.randn(*shape, width).to(x_dtype or dtype).requires_grad_() for width in (D_OUT, D_IN))
    weights = torch.rand(*(broadcast or shape), EXPERTS).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return result, x, weights, sums


def summed(add, result: Tensor, x: Tensor, weights: Tensor, sums: Sums) -> Tensor:
    x = x.to(sums.dtype) if add is add_dense else x
    return add(result * 1, x, Spread(weights, x.shape[:2], {}), sums)


def gradients(add, parts, *, autocast=None) -> list[Tensor | None]:
    """The sum, and its gradients for whatever learns."""
    with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        got = summed(add, *parts)
    learning = [part for part in tensors_of(parts) if part.requires_grad]
    upstream = torch.linspace(-1, 1, got.numel()).to(got.dtype).view_as(got)
    return [got.detach(), *torch.autograd.grad(got, learning, upstream)]


def tensors_of(parts) -> tuple[Tensor, ...]:
    return (*parts[:3], *parts[3].shrinks, *parts[3].expands)


def freeze(parts, which: str) -> None:
    result, x, weights, sums = parts
    frozen = {
        "nothing": [],
        "result": [result],
        "x": [x],
        "weights": [weights],
        "one expert": [sums.shrinks[1], sums.expands[1]],
        "all A": sums.shrinks,
        "all B": sums.expands,
        "experts": [*sums.shrinks, *sums.expands],
        "all but B": [result, x, weights, *sums.shrinks],
        "all but x": [result, weights, *sums.shrinks, *sums.expands],
    }
    for part in frozen[which]:
        part.requires_grad_(False)


@pytest.mark.parametrize("ranks", [MIXED, EQUAL])
@pytest.mark.parametrize(
    ("shape", "broadcast"), [((2, 6), (2, 6)), ((2, 6), (1, 1)), ((2, 6), (2, 1)), ((2, 6), (1, 6)), ((1, 1), (1, 1))]
)
def test_sum_and_gradients_are_those_of_the_plain_path(ranks, shape, broadcast):
    parts = make(ranks, shape=shape, broadcast=broadcast)
    for got, want in zip(gradients(add_lean, parts), gradients(add_dense, parts), strict=True):
        torch.testing.assert_close(got, want, **FLOAT64)


FROZEN = ["nothing", "result", "x", "weights", "one expert", "all A", "all B", "experts", "all but B", "all but x"]


@pytest.mark.parametrize("which", FROZEN)
def test_what_is_frozen_changes_no_other_gradient(which):
    parts = make()
    freeze(parts, which)
    for got, want in zip(gradients(add_lean, parts), gradients(add_dense, parts), strict=True):
        torch.testing.assert_close(got, want, **FLOAT64)


def test_gradients_equal_finite_differences():
    parts = make(shape=(1, 3))
    assert torch.autograd.gradcheck(lambda *_: summed(add_lean, *parts), tensors_of(parts))


def test_second_derivatives_equal_finite_differences():
    parts = make((1, 2, 1), shape=(1, 2))
    assert torch.autograd.gradgradcheck(lambda *_: summed(add_lean, *parts), tensors_of(parts))


def test_a_second_derivative_without_the_input_is_refused():
    parts = make()
    freeze(parts, "experts")
    with pytest.raises(RoutingError, match="second derivative"):
        torch.autograd.grad(summed(add_lean, *parts).sum(), [parts[2]], create_graph=True)


@pytest.mark.parametrize(
    ("dtype", "x_dtype", "autocast"),
    [
        (torch.float32, None, None),
        (torch.bfloat16, None, None),
        (torch.float16, None, None),
        (torch.float32, torch.bfloat16, None),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float64, None, torch.bfloat16),
    ],
    ids=str,
)
def test_gradients_have_the_dtypes_and_the_precision_of_the_plain_path(dtype, x_dtype, autocast):
    parts, exact = make(EQUAL, dtype, x_dtype=x_dtype), make(EQUAL)
    for mine, theirs in zip(tensors_of(parts), tensors_of(exact), strict=True):
        theirs.data.copy_(mine.data)
    lean, plain_path = (gradients(add, parts, autocast=autocast) for add in (add_lean, add_dense))
    found = zip(lean, plain_path, gradients(add_dense, exact), strict=True)
    for got, plain, want in found:
        error, of_plain = ((value.double() - want).abs().max() for value in (got, plain))
        assert got.dtype == plain.dtype
        assert error <= 2 * of_plain + torch.finfo(got.dtype).eps * want.abs().max()


def test_a_view_and_a_leaf_are_not_overwritten():
    _, x, weights, sums = make()
    behind = torch.randn(2, 6, D_OUT, dtype=torch.float64).requires_grad_()
    for result in (behind, (behind * 1).view(2, 6, D_OUT)):
        before = result.detach().clone()
        got = add_lean(result, x, Spread(weights, (2, 6), {}), sums)
        torch.testing.assert_close(got, add_dense(before.clone(), x, Spread(weights, (2, 6), {}), sums), **FLOAT64)
        assert torch.equal(result, before)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), behind)[0], torch.ones_like(behind), **FLOAT64)


def test_a_parameter_that_changes_before_backward_is_an_error_and_no_wrong_gradient():
    parts = make()
    got = summed(add_lean, *parts)
    with torch.no_grad():
        parts[3].shrinks[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got.sum().backward()


@pytest.mark.parametrize(("dtype", "x_dtype"), [(torch.float32, None), (torch.float32, torch.bfloat16)], ids=str)
def test_the_graph_keeps_the_hidden_states_and_the_factors_alone(dtype, x_dtype):
    def kept(add) -> int:
        parts = make(EQUAL, dtype, shape=(1, 50), x_dtype=x_dtype)
        with LiveBytes() as live:
            got = summed(add, *parts)
            return live.now - got.untyped_storage().nbytes()

    hidden, layout = 50 * sum(EQUAL) * 4, sum(EQUAL) * (8 + 4)  # the layout: a column and a scaling for each stacked row
    assert kept(add_lean) <= 2 * hidden + layout < kept(add_dense)


def test_shapes_are_worked_out_on_the_device_meta():
    parts = [part.to("meta") for part in make(dtype=torch.float32)[:3]]
    sums = make(dtype=torch.float32)[3]
    sums = replace(sums, shrinks=[a.to("meta") for a in sums.shrinks], expands=[b.to("meta") for b in sums.expands])
    got = summed(add_lean, *parts, sums)
    assert (got.device.type, got.shape) == ("meta", (2, 6, D_OUT))
