"""Laws of one routed Linear: y = W x + b + sum_e w_e delta_e(x), as harness/oracles/mixture.py defines it.

Each is asked of one layer of every kind (q_proj, down_proj, ...), alone, through `layer.mix(x, weights)`.
T rows of tokens and inputs I, outputs O, experts E.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from harness.bench import Bench
from harness.compare import UNIT_ROUNDOFF, as_float64, assert_within, dot_bound, is_of_torchao, twice_the_loop
from harness.oracles import mixture
from harness.outcome import NotApplicable
from harness.workings import Workings, workings

ROWS, TOKENS = 3, 5


@dataclass(frozen=True)
class Case:
    """One layer, an input x (3, 5, I) and weights (3, 5, E) in the layer's dtype, and their float64 twins."""

    name: str
    layer: nn.Module
    oracle: mixture.Layer
    x: Tensor
    weights: Tensor

    def mixed(self, weights: Tensor | None = None) -> np.ndarray:
        return self._shaped(mixture.mix(self.oracle, *self._flat(weights)))

    def bound(self, weights: Tensor | None = None) -> np.ndarray:
        """Dot-product bound of the layer's output, (3, 5, O)."""
        absolute = mixture.mix_of_absolutes(self.oracle, *self._flat(weights))
        return self._shaped(dot_bound(self.oracle.longest_sum, self.x.dtype, absolute))

    def effect(self, weights: Tensor | None = None) -> float:
        return float(np.abs(self.mixed(weights) - self._shaped(mixture.base_output(self.oracle, self._flat(None)[0]))).max())

    def _flat(self, weights: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        weights = self.weights if weights is None else weights
        return as_float64(self.x).reshape(ROWS * TOKENS, -1), as_float64(weights).reshape(ROWS * TOKENS, -1)

    def _shaped(self, flat: np.ndarray) -> np.ndarray:
        return flat.reshape(ROWS, TOKENS, -1)


def check_equals_oracle(bench: Bench) -> None:
    """The layer's output is W x + b + sum_e w_e s_e B_e A_e x; with DoRA or lora_bias, what their equations say in that sum.

    Reason: this sum is what a LoRA mixture of experts is; stock PEFT, handed the weights, returns the plain sum of all experts.
    Tolerance: the dot-product bound (Higham 2002, 3.1) for the longest chain of roundings, over the oracle's absolute values.
    """
    for case in _cases(bench):
        got = case.layer.mix(case.x, case.weights)
        assert_within(got, case.mixed(), case.bound(), effect=case.effect(), what=case.name)


def check_zero_weights_equal_base(bench: Bench) -> None:
    """With all weights zero the layer is the base layer.

    Reason: an expert that nobody asked for must not leak into the base model (vLLM #42008 was that).
    Tolerance: the dot-product bound of the base layer's own product.
    """
    for case in _cases(bench):
        nothing = torch.zeros_like(case.weights)
        got = case.layer.mix(case.x, nothing)
        assert_within(got, case.mixed(nothing), case.bound(nothing), effect=case.effect(), what=case.name)


def check_one_hot_equals_stock_peft(bench: Bench) -> None:
    """With one expert at weight 1 the layer is that adapter in stock PEFT, loaded from the checkpoint's own files.

    Reason: experts are published and trained as PEFT adapters; PEFT reads them with code that shares nothing with the
    judge, so scale, rank-stabilised scale, orientation and key names are confirmed independently.
    Tolerance: twice the dot-product bound, because each of the two may be off by it.
    """
    w = workings(bench)
    for case in _cases(bench):
        for expert in _some(w.experts):
            if case.name in w.reference.experts[expert]:
                _compare_with_peft(w, case, expert)


def _compare_with_peft(w: Workings, case: Case, expert: int) -> None:
    __tracebackhide__ = True
    alone = torch.zeros_like(case.weights)
    alone[..., expert] = 1
    want = w.peft(expert).get_base_model().get_submodule(case.name)(case.x)
    got = case.layer.mix(case.x, alone)
    what = f"{case.name}, expert {expert}"
    assert_within(got, want, 2 * case.bound(alone), effect=case.effect(alone), what=what)


def check_equal_experts(bench: Bench) -> None:
    """If all experts are one expert, any weights that sum to 1 give that expert.

    Reason: the weights must be used as weights, once each: a sum, a mean or a renormalisation would show.
    Tolerance: the dot-product bound of the oracle on the copied experts.
    """
    w = workings(bench)
    w.need_experts(2)
    model = w.load(w.variant_for_weights([w.reference.experts[0]] * w.experts))
    for case in _cases(bench):
        if case.name not in w.reference.experts[0]:
            continue
        oracle = case.oracle.reordered([0] * w.experts)
        same = replace(case, oracle=oracle, layer=model.routed_layers()[case.name])
        got = same.layer.mix(same.x, same.weights)
        alone = torch.zeros_like(case.weights)
        alone[..., 0] = 1
        allowed = same.bound() + 2 * w.experts * UNIT_ROUNDOFF[torch.float32] * np.abs(same.mixed(alone)).max()
        assert_within(got, same.mixed(alone), allowed, effect=case.effect(alone), what=case.name)


def check_permutation(bench: Bench) -> None:
    """Permuting the experts on disk and the weights alike changes nothing.

    Reason: PEFT's X-LoRA reloads its experts in the order of their names as text, so that from the eleventh on they are permuted.
    Tolerance: the dot-product bound; the order of summation may differ.
    """
    w = workings(bench)
    w.need_experts(2)
    order = np.roll(np.arange(w.experts), 1).tolist()
    model = w.load(w.variant([w.reference.experts[e] for e in order], w.permuted_router(order)))
    for case in _cases(bench):
        got = model.routed_layers()[case.name].mix(case.x, case.weights[..., order])
        wrong = np.abs(case.mixed(case.weights[..., order]) - case.mixed()).max()
        assert_within(got, case.mixed(), case.bound(), effect=wrong, what=case.name)


def check_linear_in_weights(bench: Bench) -> None:
    """The experts' part is linear in the weights: half of u and a quarter of v give half of u's part and a quarter of v's.

    Reason: a layer that renormalises, clips or takes the top k of what it is given is not the layer that was trained.
    Tolerance: the dot-product bounds of the three outputs; halves and quarters are exact.
    """
    for case in _cases(bench):
        u, v = case.weights, case.weights.roll(1, dims=1)
        both = u / 2 + v / 4
        base = as_float64(case.layer.mix(case.x, torch.zeros_like(u)))
        of_u, of_v, of_both = (as_float64(case.layer.mix(case.x, part)) - base for part in (u, v, both))
        bound = case.bound(both) + case.bound(u) / 2 + case.bound(v) / 4 + 2 * case.bound(torch.zeros_like(u))
        assert_within(of_both, of_u / 2 + of_v / 4, bound, effect=case.effect(), what=case.name)


def check_constant_weights_equal_merged(bench: Bench) -> None:
    """For weights that are the same for every token, the layer is one Linear with the experts merged into its weight.

    Reason: users ship merged models; what was evaluated unmerged must be what they ship.
    Tolerance: the dot-product bound.
    """
    for case in _cases(bench):
        constant = case.weights[:1, :1].expand_as(case.weights)
        weight, bias = mixture.merged(case.oracle, as_float64(constant[0, 0]))
        want = as_float64(case.x) @ weight.T + bias
        got = case.layer.mix(case.x, constant)
        assert_within(got, want, case.bound(constant), effect=case.effect(constant), what=case.name)


def check_rows_independent(bench: Bench) -> None:
    """Every row of a batch, with its own weights, gives what it gives alone.

    Reason: a decoder batches unrelated prompts; per-row weights that leak make scores depend on the batch size.
    Tolerance: twice the dot-product bound, because each of the two may be off by it.
    """
    for case in _cases(bench):
        together = case.layer.mix(case.x, case.weights)
        alone = torch.cat([case.layer.mix(case.x[r : r + 1], case.weights[r : r + 1]) for r in range(ROWS)])
        assert_within(together, alone, 2 * case.bound(), effect=case.effect(), what=case.name)


def check_gradients_equal_oracle(bench: Bench) -> None:
    """The gradients for x, the weights, and every expert's A and B are the oracle's, in float64.

    Reason: a forward pass that is right can train wrongly: a detached weight, a gradient summed over the wrong axis.
    Tolerance: the float64 dot-product bound, over the oracle's gradients of absolute values.
    """
    w = workings(bench)
    w.need_experts()
    w.need_sums("the norm of a magnitude is a constant in training, and gradients are judged of the whole model")
    _need_plain_base(w)
    model = w.load(dtype="float64")
    for case in _cases(bench, torch.float64):
        _compare_gradients(replace(case, layer=model.routed_layers()[case.name]), w.expert_names(model))


def _need_plain_base(w: Workings) -> None:
    layers = w.need_method(w.model, "routed_layers")().values()
    weights = [getattr(layer.base_layer, "weight", None) for layer in layers]
    if any(weight is None or is_of_torchao(weight) or not weight.is_floating_point() for weight in weights):
        raise NotApplicable("the base layer is quantised: its kernel decides what is rounded where")


def _compare_gradients(case: Case, names: Sequence[str]) -> None:
    __tracebackhide__ = True
    x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    parameters = _parameters(case.layer, names)
    with torch.enable_grad():
        y = case.layer.mix(x, weights)
        grad_y = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found = torch.autograd.grad(y, [x, weights, *parameters.values()], grad_y.to(y.device))
    flat = [as_float64(t).reshape(ROWS * TOKENS, -1) for t in (x, weights, grad_y)]
    exact = _by_name(mixture.gradients(case.oracle, *flat), names)
    largest = _by_name(mixture.gradients(replace(mixture.absolutes(case.oracle), bias=None), *map(np.abs, flat)), names)
    terms = case.oracle.longest_sum + case.oracle.weight.shape[0] + ROWS * TOKENS
    for name, got in zip(["x", "weights", *parameters], found, strict=True):
        bound = dot_bound(terms, torch.float64, largest[name])
        what = f"{case.name}, gradient of {name}"
        assert_within(as_float64(got).reshape(exact[name].shape), exact[name], bound, effect=exact[name], what=what)


def check_half_precision_error_at_most_twice_loop(bench: Bench) -> None:
    """In bfloat16 and float16 the layer's error is at most twice that of a plain loop over the experts.

    Reason: stacking experts must not cost accuracy; flash-attention is held to the same rule (tests/test_flash_attn.py).
    Tolerance: twice the loop's error against float64 on the same rounded values, the largest and the root mean square, plus
    a rounding: the largest alone hides an error that is spread evenly.
    """
    w = workings(bench)
    w.need_experts()
    w.need_sums("no published loop says what is rounded where with a magnitude")
    _need_plain_base(w)
    for dtype in (torch.bfloat16, torch.float16):
        model = w.load(dtype=str(dtype).removeprefix("torch."))
        for case in _cases(bench, dtype):
            _compare_with_loop(replace(case, layer=model.routed_layers()[case.name]), w.expert_names(model))


def _compare_with_loop(case: Case, names: Sequence[str]) -> None:
    __tracebackhide__ = True
    held = [name for name in names if name in case.layer.lora_A]
    rounded = case.layer.base_layer.weight
    weight = as_float64(rounded if case.oracle.weight.shape == tuple(rounded.shape) and not _is_conv(case) else rounded.T)
    bias = getattr(case.layer.base_layer, "bias", None)
    biases = [getattr(case.layer.lora_B[name], "bias", None) for name in held]
    exact = mixture.Layer(
        weight,
        None if bias is None else as_float64(bias),
        tuple(as_float64(case.layer.lora_A[name].weight) for name in held),
        tuple(as_float64(case.layer.lora_B[name].weight) for name in held),
        tuple(case.layer.scaling[name] for name in held),
        biases=tuple(None if bias is None else as_float64(bias) for bias in biases) if any(b is not None for b in biases) else (),
    )
    columns = [index for index, name in enumerate(names) if name in held]
    twin = replace(case, oracle=exact)
    loop = _plain_loop(case, held, columns)
    want = twin.mixed(case.weights[..., columns])
    bound = twice_the_loop(loop, want, case.x.dtype)
    got, what = case.layer.mix(case.x, case.weights), f"{case.name} in {case.x.dtype}"
    assert_within(got, want, bound, what=what)
    allowed = 2 * _rms(as_float64(loop) - want) + UNIT_ROUNDOFF[case.x.dtype] * _rms(want)
    assert_within(_rms(as_float64(got) - want), 0.0, allowed, what=f"{what}, root mean square error")


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _is_conv(case: Case) -> bool:
    return type(case.layer.base_layer).__name__ == "Conv1D"


def _plain_loop(case: Case, held: list[str], columns: list[int]) -> Tensor:
    y, dtype = case.layer.base_layer(case.x), case.x.dtype
    for column, name in zip(columns, held, strict=True):
        hidden = case.x @ case.layer.lora_A[name].weight.to(dtype).T
        bias = getattr(case.layer.lora_B[name], "bias", None)
        raised = hidden @ case.layer.lora_B[name].weight.to(dtype).T
        delta = case.layer.scaling[name] * (raised if bias is None else raised + bias.to(dtype))
        y = y + case.weights[..., column, None] * delta
    return y


@torch.no_grad()
def _cases(bench: Bench, dtype: torch.dtype | None = None) -> Iterator[Case]:
    """One layer of every kind, with inputs of their own."""
    w = workings(bench)
    w.need_experts()
    w.need_units_to_be_linears()
    layers = w.need_method(w.model, "routed_layers")()
    by_kind = {name.rpartition(".")[2] + ("" if w.experts else name): name for name in w.layers_alone()}
    rng = bench.rng(3)
    for name in by_kind.values():
        w.need_method(layers[name], "mix")
        oracle = w.reference.layer(name)
        x = torch.from_numpy(rng.standard_normal((ROWS, TOKENS, oracle.weight.shape[1])))
        weights = torch.from_numpy(rng.dirichlet(np.ones(w.experts), size=(ROWS, TOKENS)))
        x, weights = (t.to(dtype or w.dtype).to(bench.device) for t in (x, weights))
        with torch.no_grad():
            yield Case(name, layers[name], oracle, x, weights)


def _some(experts: int) -> list[int]:
    """The first, the last, and one between; loading every one of many experts in PEFT would tell nothing more."""
    return sorted({0, experts // 2, experts - 1})


def _parameters(layer: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    held = [name for name in names if name in layer.lora_A]
    pairs = {f"A of {name}": layer.lora_A[name].weight.requires_grad_() for name in held}
    return pairs | {f"B of {name}": layer.lora_B[name].weight.requires_grad_() for name in held}


def _by_name(gradients: mixture.Gradients, names: Sequence[str]) -> dict[str, np.ndarray]:
    pairs = {f"A of {name}": grad for name, grad in zip(names, gradients.lora_A, strict=True)}
    pairs |= {f"B of {name}": grad for name, grad in zip(names, gradients.lora_B, strict=True)}
    return {"x": gradients.x, "weights": gradients.routing, **pairs}
