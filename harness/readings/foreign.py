"""Every other layout, through dylo_moe.read_checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.artifact import Adapter, Artifact, Expert
from harness.oracles.gates import Rule
from harness.oracles.xlora import Scaling
from harness.readings.files import adapter_directory, array
from harness.routers import Classifier, HybridGate, UnitGate, UnitGates

_NOT_PEFTS = ("adamole", "hydralora", "loramoe", "mergoo", "mixlora", "moe-peft-loramoe", "moe-peft-mola", "mola", "peft-poly")


def read(path: Path, base_model: str | None, assume: Mapping[str, Any]) -> Artifact:
    from dylo_moe import read_checkpoint

    checkpoint = read_checkpoint(path, **assume)
    state = checkpoint.router
    by_network = getattr(state, "level", None) == "feed_forward"
    # Otherwise the files hold more than the experts, or are of another program that gives them PEFT's names.
    whole = checkpoint.assumptions.get("genknowsub") in (None, "subtracted") and checkpoint.format not in _NOT_PEFTS
    return Artifact(
        path=path,
        base=str(path) if checkpoint.format == "merged" else base_model or checkpoint.base_model,
        names=tuple(expert.name for expert in checkpoint.experts),
        experts=tuple(_expert(expert) for expert in checkpoint.experts),
        router=None if state is None else _ROUTERS[type(state).__name__](state),
        balance=checkpoint.load_balance,
        adapter_directories=tuple(adapter_directory(path, expert.name) if whole else None for expert in checkpoint.experts),
        reader="",
        shared={} if checkpoint.shared is None else _expert(checkpoint.shared),
        feed_forwards=tuple(state.gates) if by_network else (),
        base_config=checkpoint.base_config,
        base_state=checkpoint.base_state,
    )


def _expert(expert: Any) -> Expert:
    adapters = {
        name: Adapter(array(pair.lora_A), array(pair.lora_B), pair.scaling, _optional(pair.magnitude), _optional(pair.bias))
        for name, pair in expert.modules.items()
    }
    replaced = {module: {name: array(t) for name, t in own.items()} for module, own in expert.replaced.items()}
    return Expert(adapters, replaced, {module: array(bias) for module, bias in expert.biases.items()})


def _hybrid(state: Any) -> HybridGate:
    return HybridGate(array(state.weight), _optional(state.bias), state.features, state.top_k, state.temperature)


def _classifier(state: Any) -> Classifier:
    scaling = Scaling(
        state.num_experts,
        state.num_layers,
        layerwise=state.layerwise,
        softmax=state.enable_softmax,
        softmax_topk=state.enable_softmax_topk,
        over_batch=state.over_batch,
        temperature=state.softmax_temperature,
        top_k=state.top_k,
        global_weight=state.global_scaling_weight,
    )
    layers = tuple((array(weight), _optional(bias)) for weight, bias in state.layers)
    return Classifier(layers, scaling, relu=state.use_relu, dropout=state.dropout)


def _gates(state: Any) -> UnitGates:
    found = {}
    for path, gate in state.gates.items():
        rule = Rule(state.rule, gate.top_k, state.temperature, state.threshold, state.mixlora_switch, state.expert_capacity)
        threshold = None
        if gate.threshold_weight is not None:
            threshold = (array(gate.threshold_weight), _optional(gate.threshold_bias))
        found[path] = UnitGate(array(gate.weight), rule, state.num_experts, _optional(gate.bias), threshold)
    return UnitGates(found, trained=state.rule != "arrow")


def _optional(tensor: Any) -> Any:
    return None if tensor is None else array(tensor)


# By class name: the states are public through Checkpoint.router only.
_ROUTERS: dict[str, Any] = {"RouterState": _hybrid, "XLoraState": _classifier, "GatesState": _gates}
