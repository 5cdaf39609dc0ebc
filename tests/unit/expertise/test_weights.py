"""Angles between deltas and overlaps of subspaces equal what the whole matrices give."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from dylo_moe.expertise.weights import compare_weights, delta_products, delta_spaces, subspace_overlaps, without_effect
from dylo_moe.formats import Checkpoint, Expert, GatesState, GateState, LoraPair

IN, OUT = 12, 9
MODULES = ("model.layers.0.q_proj", "model.layers.1.q_proj")


def pair(rank=3, seed=0, alpha=4.0, **more) -> LoraPair:
    made = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, IN, generator=made), torch.randn(OUT, rank, generator=made), alpha, **more)


def delta(pair: LoraPair) -> np.ndarray:
    return (pair.scaling * pair.lora_B.double() @ pair.lora_A.double()).numpy()


def checkpoint(*experts: dict[str, LoraPair] | Expert, router=None) -> Checkpoint:
    made = [e if isinstance(e, Expert) else Expert(f"expert_{i}", e) for i, e in enumerate(experts)]
    return Checkpoint(Path("."), "bag", None, tuple(made), router)


def explicit_cosines(experts: list[dict[str, LoraPair]]) -> np.ndarray:
    zero = np.zeros((OUT, IN))
    vectors = [np.concatenate([(delta(e[m]) if m in e else zero).ravel() for m in MODULES]) for e in experts]
    return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in vectors] for a in vectors])


def test_cosines_equal_those_of_the_whole_deltas():
    """Mixed ranks, scalings and modules, rank above the width, and an expert that adapts only one of the modules."""
    experts = [
        {MODULES[0]: pair(2, 1), MODULES[1]: pair(3, 2, alpha=1.0)},
        {MODULES[0]: pair(4, 3, use_rslora=True), MODULES[1]: pair(IN + 5, 4)},
        {MODULES[1]: pair(3, 2, alpha=-9.0)},
    ]
    found = compare_weights(checkpoint(*experts))
    np.testing.assert_allclose(found.cosine, explicit_cosines(experts), atol=1e-12)
    norms = [np.sqrt(sum(np.sum(delta(p) ** 2) for p in expert.values())) for expert in experts]
    np.testing.assert_allclose(found.norms, norms, rtol=1e-12)
    assert found.by_module[MODULES[1]][0, 2] == pytest.approx(-1.0)
    assert np.isnan(found.by_module[MODULES[0]][0, 2])
    assert found.reasons == {}


def test_products_equal_traces_of_the_whole_deltas():
    pairs = [pair(2, 1), None, pair(5, 2, alpha=-3.0)]
    found = delta_products(pairs)
    assert found[0, 2] == pytest.approx(np.trace(delta(pairs[0]).T @ delta(pairs[2])))
    assert found[2, 2] == pytest.approx(np.sum(delta(pairs[2]) ** 2))
    assert not found[1].any() and not found[:, 1].any()


def test_equal_experts_have_cosine_one_also_when_factored_differently():
    one = pair(3, 1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(9)))[0]
    other = LoraPair(turn.T @ one.lora_A, one.lora_B @ turn, one.alpha)
    found = compare_weights(checkpoint({MODULES[0]: one}, {MODULES[0]: other}))
    np.testing.assert_allclose(found.cosine, 1.0, atol=1e-6)
    np.testing.assert_allclose([found.reads, found.writes], 1.0, atol=1e-6)


def test_orthogonal_experts_have_cosine_and_overlap_zero():
    A, B = torch.zeros(2, 2, IN), torch.zeros(2, OUT, 2)
    for expert in range(2):
        A[expert, 0, 2 * expert] = A[expert, 1, 2 * expert + 1] = 1.0
        B[expert, 2 * expert, 0] = B[expert, 2 * expert + 1, 1] = 1.0
    found = compare_weights(checkpoint(*({MODULES[0]: LoraPair(A[e], B[e], 2.0)} for e in range(2))))
    np.testing.assert_allclose([found.cosine, found.reads, found.writes], [np.eye(2)] * 3, atol=1e-12)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e3])
def test_scaling_an_expert_changes_norms_and_no_angle(factor):
    experts = [{MODULES[0]: pair(2, seed)} for seed in range(2)]
    scaled = [experts[0], {MODULES[0]: LoraPair(experts[1][MODULES[0]].lora_A * factor, experts[1][MODULES[0]].lora_B, 4.0)}]
    before, after = compare_weights(checkpoint(*experts)), compare_weights(checkpoint(*scaled))
    for name in ("cosine", "reads", "writes"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), atol=1e-6)
    assert after.norms[1] == pytest.approx(factor * before.norms[1], rel=1e-6)


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    one, other = pair(2, 1), pair(4, 2)
    for side, space in enumerate((lambda p: delta(p), lambda p: delta(p).T)):
        bases = [delta_spaces(p)[side] for p in (one, other)]
        columns = [np.linalg.svd(space(p))[0][:, : p.rank] for p in (one, other)]
        wanted = np.mean(np.cos(scipy.linalg.subspace_angles(*columns)) ** 2)
        assert subspace_overlaps(bases)[0, 1] == pytest.approx(wanted)


def test_space_has_no_more_dimensions_than_the_delta():
    """A rank of 3 on paper, of which one row repeats another: what is read has two dimensions, whatever B has."""
    one = pair(3, 1)
    lora_A = one.lora_A.clone()
    lora_A[2] = lora_A[1]
    out_space, in_space = delta_spaces(LoraPair(lora_A, one.lora_B, 4.0))
    assert out_space.shape == (OUT, 2) and in_space.shape == (IN, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_compared_in_64_bits(dtype):
    half = [LoraPair(p.lora_A.to(dtype), p.lora_B.to(dtype), p.alpha) for p in (pair(2, 1), pair(2, 2))]
    found = compare_weights(checkpoint(*({MODULES[0]: p} for p in half)))
    np.testing.assert_allclose(found.cosine, explicit_cosines([{MODULES[0]: p} for p in half]), atol=1e-12)
    assert not np.isnan(found.reads).any()


def test_expert_without_effect_is_found_and_has_no_angle():
    zero = LoraPair(pair().lora_A, torch.zeros(OUT, 3), 4.0)
    found = compare_weights(checkpoint({MODULES[0]: pair()}, {MODULES[0]: zero}))
    assert np.isnan(found.cosine).tolist() == [[False, True], [True, True]]
    assert found.norms[1] == 0 and found.reasons == {}
    assert without_effect(checkpoint({MODULES[0]: pair()}, {MODULES[0]: zero})) == [1]


def not_sums() -> dict[str, Expert]:
    plain = {MODULES[0]: pair(3, 5)}
    zero_delta = LoraPair(pair().lora_A, torch.zeros(OUT, 3), 4.0, magnitude=torch.ones(OUT))
    return {
        "DoRA": Expert("odd", {MODULES[0]: zero_delta}),
        "LoRA has biases": Expert("odd", {MODULES[0]: pair(bias=torch.ones(OUT))}),
        "whole modules": Expert("odd", plain, replaced={"lm_head": {"weight": torch.ones(2, 2)}}),
        "biases of its own": Expert("odd", plain, biases={"model.norm": torch.ones(2)}),
    }


@pytest.mark.parametrize("kind", not_sums())
def test_expert_that_is_more_than_a_sum_of_deltas_is_not_compared(kind):
    made = checkpoint({MODULES[0]: pair(3, 1)}, not_sums()[kind], {MODULES[0]: pair(3, 2)})
    found = compare_weights(made)
    assert kind in found.reasons["odd"] and len(found.reasons) == 1
    for array in (found.cosine, found.reads, found.writes):
        assert np.isnan(array).tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    assert np.isnan(found.norms).tolist() == [False, True, False]
    assert without_effect(made) == []


def test_mixed_whole_mlps_are_not_compared():
    gates = GatesState({"model.layers.0.mlp": GateState(torch.ones(2, IN))}, "softmax", 2, level="feed_forward")
    found = compare_weights(checkpoint({MODULES[0]: pair()}, {MODULES[0]: pair(3, 1)}, router=gates))
    assert set(found.reasons) == {"expert_0", "expert_1"} and "whole MLPs" in found.reasons["expert_0"]
    assert np.isnan(found.cosine).all()
