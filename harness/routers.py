"""What a router is to the judge: its arrays, and what they mean by the definitions in harness/oracles.

Every kind has `deciders`: one for the whole model, or one per routed unit, in the base model's order of modules. A decider takes
what it looks at to scores, and scores to weights; where scores are close, `margin` is small and the choice may go either way.
trained: whether training changes it. drops_out: whether it draws at random while training. sums_to_one: whether a token's weights
sum to 1.

E experts, H hidden size, L routed units, n scores of a decider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from harness.oracles import gates as gate_oracle
from harness.oracles import router as hybrid_oracle
from harness.oracles import xlora as xlora_oracle


class Decider(Protocol):
    """scores (..., n); weights (..., E) or (..., L, E); margin (...,) in units of scores; sensitivity (..., 1) or a number."""

    def scores(self, x: np.ndarray) -> np.ndarray: ...

    def weights(self, scores: np.ndarray) -> np.ndarray: ...

    def margin(self, scores: np.ndarray) -> np.ndarray: ...

    def sensitivity(self, scores: np.ndarray) -> np.ndarray | float: ...


@dataclass(frozen=True)
class HybridGate:
    """DyLoRA-MoE's router: weight (E, H), bias (E,) or None. One gate, also where it looks at every layer's own input."""

    weight: np.ndarray
    bias: np.ndarray | None
    features: str
    top_k: int
    temperature: float

    trained = True
    drops_out = False
    sums_to_one = True

    @property
    def num_experts(self) -> int:
        return len(self.weight)

    @property
    def deciders(self) -> tuple[Decider, ...]:
        return (self,)

    def size(self, units: int) -> int:
        """Products per token."""
        return self.weight.size * (units if self.features == "layer" else 1)

    def permuted(self, order: Sequence[int]) -> HybridGate:
        """The gate of these experts in this order; of fewer experts than it chooses, it chooses all."""
        rows = list(order)
        bias = None if self.bias is None else self.bias[rows]
        return replace(self, weight=self.weight[rows], bias=bias, top_k=min(self.top_k, len(rows)))

    def scores(self, x: np.ndarray) -> np.ndarray:
        return hybrid_oracle.router_logits(x, self.weight, self.bias)

    def weights(self, scores: np.ndarray) -> np.ndarray:
        return hybrid_oracle.evaluation_weights(scores, self.top_k)

    def margin(self, scores: np.ndarray) -> np.ndarray:
        return hybrid_oracle.margin(scores, self.top_k)

    def sensitivity(self, scores: np.ndarray) -> float:
        """A softmax's Jacobian has rows that sum to at most 1/2 in magnitude."""
        return 0.5


@dataclass(frozen=True)
class Classifier:
    """X-LoRA's classifier: the weight (out, in) and bias (out,) or None of each Linear, and what follows the last of them."""

    layers: tuple[tuple[np.ndarray, np.ndarray | None], ...]
    scaling: xlora_oracle.Scaling
    relu: bool = True
    dropout: float = 0.0

    features = "base"
    trained = True

    @property
    def drops_out(self) -> bool:
        return self.dropout > 0 and len(self.layers) > 1

    @property
    def sums_to_one(self) -> bool:
        how = self.scaling
        every = how.top_k is None or how.top_k >= how.num_experts
        if self.sees_whole_batch:
            return False
        return how.global_weight == 1 and (how.softmax_topk or (how.softmax and every))

    @property
    def sees_whole_batch(self) -> bool:
        return self.scaling.softmax_topk and self.scaling.over_batch

    @property
    def num_experts(self) -> int:
        return self.scaling.num_experts

    @property
    def deciders(self) -> tuple[Decider, ...]:
        return (self,)

    def size(self, units: int) -> int:
        return sum(weight.size for weight, _ in self.layers)

    def permuted(self, order: Sequence[int]) -> Classifier:
        rows = self.scaling.num_layers if self.scaling.layerwise else 1
        outputs = [row * self.num_experts + expert for row in range(rows) for expert in order]
        weight, bias = self.layers[-1]
        last = (weight[outputs], None if bias is None else bias[outputs])
        top_k = None if self.scaling.top_k is None else min(self.scaling.top_k, len(order))
        return replace(self, layers=(*self.layers[:-1], last), scaling=replace(self.scaling, num_experts=len(order), top_k=top_k))

    def scores(self, x: np.ndarray) -> np.ndarray:
        return xlora_oracle.scores(x, self.layers, relu=self.relu)

    def weights(self, scores: np.ndarray) -> np.ndarray:
        return xlora_oracle.weights(self.scaling, scores)

    def margin(self, scores: np.ndarray) -> np.ndarray:
        return xlora_oracle.margin(self.scaling, scores)

    def sensitivity(self, scores: np.ndarray) -> float:
        return xlora_oracle.sensitivity(self.scaling)


@dataclass(frozen=True)
class UnitGate:
    """The gate of one unit: weight (experts here, in), bias or None; threshold (1, in) and (1,) are AdaMoLE's second gate.

    A unit with fewer experts than the model has the first of them; the others' weights are 0.
    published: the weight as float32 arithmetic gives it where it is computed and not stored (Arrow's prototypes): the naive loop
    takes it, so that this error is in its tolerance.
    """

    weight: np.ndarray
    rule: gate_oracle.Rule
    num_experts: int
    bias: np.ndarray | None = None
    threshold: tuple[np.ndarray, np.ndarray | None] | None = None
    published: np.ndarray | None = None

    def permuted(self, order: Sequence[int]) -> UnitGate:
        rows = [expert for expert in order if expert < len(self.weight)]
        top_k = None if self.rule.top_k is None else min(self.rule.top_k, len(rows))
        return replace(
            self,
            weight=self.weight[rows],
            rule=replace(self.rule, top_k=top_k),
            num_experts=len(order),
            bias=None if self.bias is None else self.bias[rows],
            published=None if self.published is None else self.published[rows],
        )

    def scores(self, x: np.ndarray) -> np.ndarray:
        """The logits, and after them the threshold's where there is one."""
        logits = gate_oracle.scores(x, self.weight, self.bias)
        if self.threshold is None:
            return logits
        return np.concatenate([logits, gate_oracle.scores(x, *self.threshold)], axis=-1)

    def weights(self, scores: np.ndarray) -> np.ndarray:
        found = gate_oracle.weights(self.rule, *self._split(scores))
        missing = self.num_experts - found.shape[-1]
        return np.concatenate([found, np.zeros((*found.shape[:-1], missing))], axis=-1)

    def margin(self, scores: np.ndarray) -> np.ndarray:
        return gate_oracle.margin(self.rule, *self._split(scores))

    def sensitivity(self, scores: np.ndarray) -> np.ndarray:
        return gate_oracle.sensitivity(self.rule, *self._split(scores))

    def _split(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return (scores, None) if self.threshold is None else (scores[..., :-1], scores[..., -1:])


@dataclass(frozen=True)
class UnitGates:
    """One gate per routed unit, by the unit's path.

    trained: whether the gates are parameters; Arrow's are computed from the experts.
    """

    gates: Mapping[str, UnitGate]
    trained: bool = True

    features = "layer"
    drops_out = False

    @property
    def sums_to_one(self) -> bool:
        """Also for AdaMoLE, which gives all zeros where no expert exceeds the threshold."""
        return all(gate.rule.name not in ("top_p", "switch") for gate in self.gates.values())

    @property
    def hands_on(self) -> bool:
        """Whether some networks give their input, so that the weights alone do not say what the router does."""
        return any(gate.rule.name == "switch" for gate in self.gates.values())

    @property
    def has_no_experts(self) -> bool:
        """Whether all networks give their input, always."""
        return all(gate.rule.mixlora_switch == "inference" for gate in self.gates.values())

    @property
    def counts_tokens(self) -> bool:
        """Whether a token's place in its row counts, which no KV cache holds."""
        return any(gate.rule.mixlora_switch == "training" for gate in self.gates.values())

    @property
    def is_even(self) -> bool:
        """Whether every unit has every expert."""
        return all(len(gate.weight) == gate.num_experts for gate in self.gates.values())

    @property
    def num_experts(self) -> int:
        return next(iter(self.gates.values())).num_experts

    @property
    def deciders(self) -> tuple[Decider, ...]:
        return tuple(self.gates.values())

    def size(self, units: int) -> int:
        return sum(gate.weight.size + (0 if gate.threshold is None else gate.threshold[0].size) for gate in self.gates.values())

    def permuted(self, order: Sequence[int]) -> UnitGates:
        return replace(self, gates={path: gate.permuted(order) for path, gate in self.gates.items()})


Router = HybridGate | Classifier | UnitGates


def in_order(router: Router | None, units: Sequence[str]) -> Router | None:
    """The same router with its gates in the order of these units, which only the base model knows."""
    if not isinstance(router, UnitGates):
        return router
    missing = [path for path in units if path not in router.gates]
    if missing:
        raise ValueError(f"{missing[0]}: found experts and no gate, expected a gate for each of {len(units)} units")
    return replace(router, gates={path: router.gates[path] for path in units})
