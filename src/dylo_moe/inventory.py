"""What a checkpoint holds, without its base model's weights: for `dylo-moe inspect`, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dylo_moe.errors import BaseModelUnknown, one_line
from dylo_moe.formats import (
    GATE_RULES,
    Checkpoint,
    Expert,
    GatesState,
    LoraPair,
    Router,
    RouterState,
    XLoraState,
    check_experts_fit_base,
    combined_hash,
    resolve_base,
)


def take_inventory(checkpoint: Checkpoint, base_model: str | None = None) -> dict[str, Any]:
    """Everything that `dylo-moe inspect --json` prints. The keys are stable; new ones may be added.

    path, format: text. hash: the combined SHA-256 that `expect_hash` takes. files: SHA-256 by relative name.
    base: {recorded: text or null, in_checkpoint: whether the checkpoint holds base weights, resolved: path, hub id or null}.
    experts: [{name, modules: how many, targets: [last part of their paths], ranks, alphas, scalings: [each value once],
        use_rslora: [...], dora: true or false, beside: [modules and biases that the expert has in a version of its own],
        parameters: how many numbers it has, in `beside` too, dtypes: [...], norm: Frobenius norm of all s B A together}, ...].
    shared: the same of the adapter that is always added, or null.
    router: null, or {kind: "dynamic_hybrid", "xlora" or "gates", features, experts, parameters, shapes: {name: [sizes]}, and the
        settings of its kind: top_k, temperature; layerwise, enable_softmax ...; rule, level, threshold, mixlora_switch,
        expert_capacity, units}.
    assumptions: {name: value}. warnings: [line, ...].

    Args:
        base_model: as in load_checkpoint; wins over what is recorded.

    Raises:
        CheckpointError: base_model leads nowhere, or the experts do not fit the base model that is there.
    """
    base, warnings = _base(checkpoint, base_model)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "hash": combined_hash(checkpoint.hashes),
        "base": base,
        "experts": [_expert(expert) for expert in checkpoint.experts],
        "shared": None if checkpoint.shared is None else _expert(checkpoint.shared),
        "router": _router(checkpoint.router),
        "assumptions": {name: _plain(value) for name, value in checkpoint.assumptions.items()},
        "warnings": [*checkpoint.warnings, *warnings],
        "files": dict(sorted(checkpoint.hashes.items())),
    }


def _base(checkpoint: Checkpoint, given: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    own = checkpoint.base_state is not None or not checkpoint.experts
    found = {"recorded": checkpoint.base_model, "in_checkpoint": own, "resolved": None}
    if own and given is None:
        return found, ()
    try:
        place = resolve_base(checkpoint.base_model, given, checkpoint=checkpoint.path)
    except BaseModelUnknown as error:
        if given is not None:
            raise
        return found, (str(error),)
    notes = check_experts_fit_base(place, checkpoint.adapters, checkpoint.router) if Path(place).is_dir() else ()
    return {**found, "resolved": place}, notes


def _expert(expert: Expert) -> dict[str, Any]:
    pairs = list(expert.modules.values())
    tensors = [t for pair in pairs for t in (pair.lora_A, pair.lora_B, pair.magnitude, pair.bias) if t is not None]
    tensors += [tensor for module in expert.replaced.values() for tensor in module.values()] + list(expert.biases.values())
    return {
        "name": expert.name,
        "modules": len(pairs),
        "targets": _once(module.rpartition(".")[2] for module in expert.modules),
        "ranks": _once(pair.rank for pair in pairs),
        "alphas": _once(pair.alpha for pair in pairs),
        "scalings": _once(pair.scaling for pair in pairs),
        "use_rslora": _once(pair.use_rslora for pair in pairs),
        "dora": any(pair.magnitude is not None for pair in pairs),
        "beside": [*expert.replaced, *(f"{module}.bias" for module in expert.biases)],
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": _once(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
        "norm": math.sqrt(sum(delta_norm(pair) ** 2 for pair in pairs)),
    }


def delta_norm(pair: LoraPair) -> float:
    """Frobenius norm of scaling * B A, in float64.

    |BA|^2 = tr(A^T B^T B A) = sum((B^T B) * (A A^T)): two (rank, rank) products instead of one (out, in).
    """
    lora_A, lora_B = pair.lora_A.double(), pair.lora_B.double()
    square = ((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum().item()
    return abs(pair.scaling) * math.sqrt(max(square, 0.0))  # rounding may leave a tiny negative number of a zero delta


def _router(state: Router | None) -> dict[str, Any] | None:
    if state is None:
        return None
    if isinstance(state, RouterState):
        tensors = {"gate.weight": state.weight, "gate.bias": state.bias}
        settings = {"kind": "dynamic_hybrid", "top_k": state.top_k, "temperature": state.temperature}
    elif isinstance(state, XLoraState):
        tensors = {f"layers.{i}.{name}": t for i, pair in enumerate(state.layers) for name, t in _named(pair)}
        names = ("layerwise", "enable_softmax", "enable_softmax_topk", "softmax_topk", "use_relu", "dropout")
        settings = {"kind": "xlora", "top_k": state.top_k, "temperature": state.softmax_temperature, "depth": len(state.layers)}
        settings |= {name: getattr(state, name) for name in (*names, "num_layers", "global_scaling_weight")}
    else:
        tensors, settings = _gate_tensors(state), _gate_settings(state)
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {
        **settings,
        "features": state.features,
        "experts": state.num_experts,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }


def _named(pair: tuple) -> list[tuple[str, Any]]:
    return list(zip(("weight", "bias"), pair, strict=True))


def _gate_tensors(state: GatesState) -> dict[str, Any]:
    parts = ("weight", "bias", "threshold_weight", "threshold_bias")
    return {f"{unit}.{part}": getattr(gate, part) for unit, gate in state.gates.items() for part in parts}


def _gate_settings(state: GatesState) -> dict[str, Any]:
    names = ("rule", "level", "temperature", "threshold", "activation", "mixlora_switch", "expert_capacity")
    top_ks = _once(gate.top_k for gate in state.gates.values())
    settings = {name: getattr(state, name) for name in names}
    return {"kind": "gates", "top_k": top_ks[0] if len(top_ks) == 1 else top_ks, **settings, "units": len(state.gates)}


def _once(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _plain(value: Any) -> Any:
    """A value that json can write."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def print_inventory(inventory: Mapping[str, Any], console: Console) -> None:
    """The same as text: a few lines, then one table row per expert, then what there is to warn about."""
    for name, value in _headlines(inventory):
        console.print(f"{name:<10} {value}", soft_wrap=True, markup=False, highlight=False)
    if inventory["experts"]:
        console.print(_table(inventory))
    for name, value in inventory["assumptions"].items():
        console.print(f"assumed    {name} = {value}", markup=False, highlight=False)
    for line in inventory["warnings"]:
        console.print(f"warning    {one_line(line)}", markup=False, highlight=False)
    for name, digest in inventory["files"].items():
        console.print(f"{digest}  {one_line(name)}", soft_wrap=True, markup=False, highlight=False)


def _headlines(inventory: Mapping[str, Any]) -> list[tuple[str, str]]:
    base, router = inventory["base"], inventory["router"]
    inside = "weights are in the checkpoint" if base["in_checkpoint"] else "not found on this machine"
    where = f"{base['recorded'] or 'not recorded'} ({base['resolved'] or inside})"
    lines = [("checkpoint", inventory["path"]), ("format", inventory["format"]), ("base", where)]
    first, *more = _router_lines(router)
    lines += [("router", first), *(("", line) for line in more)]
    lines.append(("hash", inventory["hash"]))
    return [(name, one_line(value)) for name, value in lines]


def _router_lines(router: Mapping[str, Any] | None) -> list[str]:
    if router is None:
        return ["none"]
    shapes = list(router["shapes"].values())
    widths = " ".join("x".join(map(str, shape)) for shape in shapes[:6]) + (" ..." if len(shapes) > 6 else "")
    first = f"{router['kind']}, features {router['features']}, {router['experts']} experts, temperature {router['temperature']:g}"
    first += "" if router["top_k"] is None else f", top_k {router['top_k']}"
    lines = [first, f"{router['parameters']:,} parameters: {widths}"]
    if router["kind"] == "gates":
        line = f"{router['units']} gates on {router['level']}: {router['rule']}, {GATE_RULES[router['rule']]}"
        switch = f", as in {router['mixlora_switch']}, expert_capacity {router['expert_capacity']}"
        lines.insert(1, line + (switch if router["mixlora_switch"] else ""))
    return lines


def _table(inventory: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("expert", "rank", "alpha", "scaling", "modules", "targets", "parameters", "norm"):
        table.add_column(name, justify="left" if name in ("expert", "targets") else "right", overflow="fold")
    shared = [] if inventory["shared"] is None else [{**inventory["shared"], "name": f"{inventory['shared']['name']} (always)"}]
    for expert in (*inventory["experts"], *shared):
        numbers = (_some(expert[name]) for name in ("ranks", "alphas", "scalings"))
        kind = " DoRA" if expert["dora"] else ""
        targets = " ".join([*expert["targets"], *(f"+{name}" for name in expert["beside"])]) + kind
        size = (f"{expert['parameters']:,}", f"{expert['norm']:.4g}")
        table.add_row(expert["name"], *numbers, str(expert["modules"]), one_line(targets), *size)
    return table


def _some(values: list[float]) -> str:
    """The values, or their range if they are more than two."""
    listed = [f"{value:g}" for value in values]
    return " ".join(listed) if len(listed) <= 2 else f"{min(values):g}-{max(values):g}"
