"""Dense and grouped sums, and the stacks that a generation holds: equal to one another, and never out of date."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dylo_moe.spread import _FILLED, Spread
from dylo_moe.sums import Sums, add_dense, add_grouped
from harness.measure import intra_op_threads

D_IN, D_OUT, RANKS = 7, 11, (2, 3, 2, 5)
EXPERTS = len(RANKS)


def make_sums(dtype: torch.dtype = torch.float64) -> Sums:
    torch.manual_seed(0)
    shrinks = [torch.randn(rank, D_IN, dtype=dtype) for rank in RANKS]
    expands = [torch.randn(D_OUT, rank, dtype=dtype) for rank in RANKS]
    return Sums(tuple((e, 0.5 + e, rank) for e, rank in enumerate(RANKS)), shrinks, expands)


def top_k(batch: int, length: int, k: int) -> torch.Tensor:
    weights = torch.rand(batch, length, EXPERTS, dtype=torch.float64) + 0.1
    return weights * torch.zeros_like(weights).scatter(-1, weights.topk(k).indices, 1.0)


def by_definition(y, x, w, sums: Sums) -> torch.Tensor:
    for (column, scaling, _), shrink, expand in zip(sums.signature, sums.shrinks, sums.expands, strict=True):
        y = y + w[..., column : column + 1] * scaling * (x @ shrink.t() @ expand.t())
    return y


@pytest.mark.parametrize("add", [add_dense, add_grouped])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("grows", [False, True], ids=["without a graph", "with a graph"])
@pytest.mark.parametrize(("shape", "broadcast"), [((2, 40), (2, 40)), ((2, 40), (1, 1)), ((2, 5), (2, 1)), ((1, 1), (1, 1))])
@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_both_ways_equal_the_definition(add, stacked, grows, shape, broadcast, k):
    sums = make_sums().stacked() if stacked else make_sums()
    x, y, w = torch.randn(*shape, D_IN).double(), torch.randn(*shape, D_OUT).double(), top_k(*broadcast, k)
    with torch.set_grad_enabled(grows):
        got = add(y.clone(), x, Spread(w, shape, {}), sums)
    torch.testing.assert_close(got, by_definition(y, x, w, sums), rtol=1e-13, atol=1e-13)


def test_an_expert_that_no_token_uses_and_one_of_many_chunks(monkeypatch):
    monkeypatch.setattr("dylo_moe.spread._CHUNK", 8)
    w = torch.zeros(1, 40, EXPERTS, dtype=torch.float64)
    w[:, :37, 2], w[:, 35:, 0] = 0.5, -2.0
    x, y, sums = torch.randn(1, 40, D_IN).double(), torch.randn(1, 40, D_OUT).double(), make_sums()
    spread = Spread(w, (1, 40), {})
    assert sorted(len(chunk.tokens) for chunk in spread.chunks(sums.signature)) == [5, 37]
    with torch.no_grad():
        got = add_grouped(y.clone(), x, spread, sums)
    torch.testing.assert_close(got, by_definition(y, x, w, sums), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("tokens", [1, 6])
def test_grouped_gradients_equal_finite_differences(tokens):
    sums, w = make_sums(), top_k(1, tokens, 2)
    x, y = (torch.randn(1, tokens, d).double().requires_grad_() for d in (D_IN, D_OUT))
    weights = [tensor.requires_grad_() for tensor in (*sums.shrinks, *sums.expands)]
    assert torch.autograd.gradcheck(lambda y, x, *_: add_grouped(y, x, Spread(w, (1, tokens), {}), sums), (y, x, *weights))


def test_bfloat16_result_of_float32_experts_is_rounded_once():
    sums = make_sums(torch.float32)
    x, y, w = torch.randn(1, 30, D_IN), torch.randn(1, 30, D_OUT).bfloat16(), top_k(1, 30, 2).float()
    exact = by_definition(y.float(), x, w, sums)
    for add in (add_dense, add_grouped):
        got = add(y.clone(), x, Spread(w, (1, 30), {}), sums)
        assert got.dtype == torch.bfloat16
        assert (got.float() - exact).abs().max() <= 2**-8 * exact.abs().max()


def wide_sums(experts: int, width: int = 512, rank: int = 16) -> Sums:
    one = [torch.ones(rank, width)] * experts, [torch.ones(width, rank)] * experts
    return Sums(tuple((e, 1.0, rank) for e in range(experts)), *one)


def spread_over(experts: int, tokens: int, k: int) -> Spread:
    weights = torch.rand(1, tokens, experts)
    return Spread(weights * torch.zeros_like(weights).scatter(-1, weights.topk(k).indices, 1.0), (1, tokens), {})


@pytest.mark.parametrize(
    ("experts", "tokens", "k", "grouped"),
    [(8, 1024, 1, True), (8, 1024, 8, False), (32, 1024, 2, True), (128, 1024, 2, True), (2, 1024, 2, False)]
    + [(64, 1, 1, True), (4, 1, 4, False), (128, 256, 1, True), (4, 16, 2, False)],
)
def test_the_way_is_chosen_by_work(experts, tokens, k, grouped):
    assert wide_sums(experts).cheaper_grouped(spread_over(experts, tokens, k)) is grouped


def test_a_call_costs_more_in_several_threads():
    for threads, grouped in ((1, True), (2, False)):
        with intra_op_threads(threads):
            assert wide_sums(8).cheaper_grouped(spread_over(8, 512, 1)) is grouped


def test_work_of_top_k_does_not_grow_with_the_number_of_experts():
    def work(experts: int) -> float:
        """In that of the pairs alone."""
        sums, spread = wide_sums(experts), spread_over(experts, 512, 2)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            add_grouped(torch.zeros(1, 512, 512), torch.ones(1, 512, 512), spread, sums)
        return counter.get_total_flops() / (512 * 2 * 2 * 16 * (512 + 512))

    assert all(1 <= work(experts) <= _FILLED for experts in (8, 64, 256))


def test_experts_of_one_rank_with_about_as_many_tokens_take_one_product():
    """Four, three and three of rank 2, one of one token, and one of another rank."""
    signature = ((0, 1.0, 2), (1, 2.0, 2), (2, 0.5, 2), (3, 1.0, 2), (4, 1.0, 3))
    used = {0: (0, 1, 2), 1: (3, 4, 5, 6), 2: (5, 6, 7), 3: (7,), 4: (0, 1, 2)}
    w = torch.zeros(1, 8, 5, dtype=torch.float64)
    for expert, tokens in used.items():
        w[0, list(tokens), expert] = torch.randn(len(tokens), dtype=torch.float64)
    spread = Spread(w, (1, 8), {})
    assert spread.groups(signature) == [[4], [1, 0, 2], [3]]
    shrinks = [torch.randn(rank, D_IN).double() for _, _, rank in signature]
    sums = Sums(signature, shrinks, [torch.randn(D_OUT, rank).double() for _, _, rank in signature])
    x, y = torch.randn(1, 8, D_IN).double(), torch.randn(1, 8, D_OUT).double()
    with torch.no_grad():
        got = add_grouped(y.clone(), x, spread, sums)
    torch.testing.assert_close(got, by_definition(y, x, w, sums), rtol=1e-13, atol=1e-13)


def test_layouts_do_not_pile_up_while_scalings_change(monkeypatch):
    monkeypatch.setattr("dylo_moe.spread._MOST_LAYOUTS", 4)
    layouts: dict = {}
    for step in range(20):
        Spread(torch.ones(1, 1, 2), (1, 3), layouts).factors(((0, float(step), 2), (1, 1.0, 2)))
        assert len(layouts) <= 4
