"""What a LoRA-MoE checkpoint is once it has been read and validated: frozen, on the CPU, independent of its layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

ROUTER_FEATURES = ("base", "all_experts", "embedding", "layer")
SOFTMAX_TOPK = ("token", "batch")
MIXLORA_SWITCH = ("training", "inference")


@dataclass(frozen=True)
class LoraPair:
    """One adapter on one Linear: delta(x) = scaling * B (A x).

    lora_A: (rank, in_features); lora_B: (out_features, rank).
    scaling is alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA (arXiv 2312.03732).
    magnitude: (out_features,) or None; with it, the adapter is DoRA (arXiv 2402.09353) and no longer a sum of deltas:
        y = magnitude / |W + scaling * B A| * (W x + scaling * B (A x)) + b, with the norm of each row.
    bias: (out_features,) or None, PEFT's lora_bias: delta(x) = scaling * (B (A x) + bias).
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    use_rslora: bool = False
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


@dataclass(frozen=True)
class Expert:
    """One LoRA expert. `modules` maps the module's path in the base model ("model.layers.0.self_attn.q_proj") to its pair.

    targets: plain module names ("q_proj") that must have a pair wherever the base model has such a module; empty where the
        configuration restricts the layers, gives a pattern, or is absent.
    replaced: path of a module of the base that this expert has in a version of its own -> every parameter of it, by its name
        in the module (PEFT's modules_to_save).
    biases: path of a module whose bias, and nothing else, the expert has in a version of its own -> that bias (PEFT's bias).
    repeated: name of a base weight -> what the expert's file says it is: PEFT saves the base weight of a readout or embedding
        that has an adapter. Loading compares it with the base model's; it is not the expert's own.
    """

    name: str
    modules: Mapping[str, LoraPair]
    targets: tuple[str, ...] = ()
    replaced: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    repeated: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterState:
    """A DynamicHybridRouter on disk. weight: (experts, hidden); bias: (experts,)."""

    weight: Tensor
    bias: Tensor
    features: str
    top_k: int = 1
    temperature: float = 2.0

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True)
class XLoraState:
    """X-LoRA's classifier on disk (arXiv 2402.07148): an MLP on the last hidden state of the base model without adapters.

    layers: (weight (out, in), bias (out,) or None) of each Linear; the last has num_experts outputs, num_layers times as many
        if layerwise.
    top_k: None mixes all experts; else the others' scalings become 0 and the rest is not renormalised.
    enable_softmax_topk: a softmax over the scalings of one layer that are not 0.
    softmax_topk: one of SOFTMAX_TOPK: that softmax is taken for each token, or is one over all tokens of all rows of a pass.
    """

    layers: tuple[tuple[Tensor, Tensor | None], ...]
    num_experts: int
    num_layers: int
    layerwise: bool = False
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    softmax_topk: str = "token"
    softmax_temperature: float = 1.0
    top_k: int | None = None
    global_scaling_weight: float = 1.0
    dropout: float = 0.0
    use_relu: bool = True

    features = "base"

    @property
    def hidden_size(self) -> int:
        return self.layers[0][0].shape[1]

    @property
    def over_batch(self) -> bool:
        """Whether a token's weights depend on all tokens and rows of the pass."""
        return self.enable_softmax_topk and self.softmax_topk == "batch"


@dataclass(frozen=True)
class GateState:
    """The gate of one routed unit, on the unit's own input. weight: (experts here, in); bias: (experts here,) or None.

    A unit with fewer experts than the model has the first of them. top_k: None where the rule needs none.
    threshold_weight, threshold_bias: (1, in) and (1,) or None, of AdaMoLE.
    """

    weight: Tensor
    bias: Tensor | None = None
    top_k: int | None = None
    threshold_weight: Tensor | None = None
    threshold_bias: Tensor | None = None


GATE_RULES = {
    "softmax": "softmax over all experts",
    "softmax_topk": "softmax, the top_k kept and renormalised to sum 1",
    "topk_softmax": "softmax over the top_k logits",
    "switch": "softmax, the likeliest expert kept, not renormalised",
    "arrow": "softmax over the top_k of |logits| / temperature",
    "top_p": "softmax / temperature, the likeliest experts until their sum exceeds threshold kept, not renormalised",
    "threshold": "softmax, experts at or above threshold kept and renormalised",
    "adaptive_threshold": "softmax minus max_threshold * sigmoid(threshold gate), the positive part renormalised",
}


@dataclass(frozen=True)
class GatesState:
    """One gate per routed unit. gates: path in the base model -> its gate.

    level: "linear", each unit is a Linear with LoRA pairs; "feed_forward", each unit is a whole MLP and whole MLPs are mixed.
    rule: one of GATE_RULES. threshold: of "top_p", "threshold" and "adaptive_threshold" (there the largest one).
    activation: transformers' name of the MLPs' activation, where a file records it; the base model's must be that one.
    mixlora_switch: of "switch" alone, one of MIXLORA_SWITCH, what an MLP gives for a token x of weight p on expert e:
        "training": p FFN_e(x) for the first expert_capacity tokens of a row that chose e, p x for those after them;
        "inference": x, whatever e and p are.
    """

    gates: Mapping[str, GateState]
    rule: str
    num_experts: int
    level: str = "linear"
    temperature: float = 1.0
    threshold: float | None = None
    activation: str | None = None
    mixlora_switch: str | None = None
    expert_capacity: int | None = None

    features = "layer"


Router = RouterState | XLoraState | GatesState


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint.

    Attributes:
        path: the directory or file that the user named.
        format: the name that `detect_model_format` returns.
        base_model: recorded name or path of the base model; None when no file records it or the checkpoint is its own base.
        base_config: the base model's configuration, where the checkpoint holds it (full-state and merged layouts).
        base_state: base weights by base-model parameter name, where the checkpoint holds them (full-state layouts).
        experts: in router-column order; empty for a merged model.
        router: None for a bag of LoRAs, a plain LoRA, task experts or a merged model.
        shared: an adapter that is no expert: always added, with weight 1, whatever the routing; None in most formats.
        load_balance: fields of MoELoraConfig about the auxiliary loss, where recorded.
        tokenizer: directory that holds tokenizer files, where there is one.
        assumptions: values that no file records and that were therefore assumed, e.g. {"top_k": 1}; shown to the user.
        warnings: one line each; shown to the user.
        hashes: SHA-256 of every file that was read, by path relative to `path`.
    """

    path: Path
    format: str
    base_model: str | None
    experts: tuple[Expert, ...]
    router: Router | None
    shared: Expert | None = None
    base_config: Mapping[str, Any] | None = None
    base_state: Mapping[str, Tensor] | None = None
    load_balance: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    assumptions: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def adapters(self) -> tuple[Expert, ...]:
        """The experts, and the shared adapter after them."""
        return self.experts if self.shared is None else (*self.experts, self.shared)
