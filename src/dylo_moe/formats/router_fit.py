"""Whether a router and the experts of one checkpoint belong together: layers, units, widths, and what the rule needs."""

from __future__ import annotations

from pathlib import Path

from dylo_moe.errors import ExpertCountMismatch, InvalidField, ShapeMismatch
from dylo_moe.formats.checkpoint import Expert, GatesState, GateState, Router, XLoraState
from dylo_moe.formats.switch import check_switch

TOP_K_RULES = ("softmax_topk", "topk_softmax", "arrow")
THRESHOLD_RULES = ("top_p", "threshold", "adaptive_threshold")


def check_router_fits(router: Router | None, experts: tuple[Expert, ...], path: Path) -> None:
    """The router of a checkpoint in the native format, before it is written and after it is read.

    Raises:
        ExpertCountMismatch, InvalidField, ShapeMismatch: naming what disagrees.
    """
    if router is None:
        return
    if router.num_experts != len(experts):
        raise ExpertCountMismatch(path, "router", found=f"{router.num_experts} experts", expected=len(experts))
    modules = list(dict.fromkeys(module for expert in experts for module in expert.modules))
    if isinstance(router, XLoraState) and router.layerwise and router.num_layers != len(modules):
        raise ShapeMismatch(path, "router.num_layers", found=router.num_layers, expected=f"{len(modules)} adapted modules")
    if isinstance(router, GatesState):
        _check_rule(router, path)
        units = _units(router, modules, path)
        for column, expert in enumerate(experts):
            _check_expert(router, units, expert, column, path)


def unit_of(module: str, router: GatesState) -> str | None:
    """The routed unit that a module belongs to: itself, or the MLP in which it lies; None where there is none."""
    if router.level == "linear":
        return module if module in router.gates else None
    parts = module.split(".")
    inside = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((unit for unit in inside if unit in router.gates), None)


def _check_rule(router: GatesState, path: Path) -> None:
    if (router.threshold is not None) != (router.rule in THRESHOLD_RULES):
        expected = f"{'a threshold' if router.rule in THRESHOLD_RULES else 'null'} for rule {router.rule}"
        raise InvalidField(path, "router.threshold", found=router.threshold, expected=expected)
    check_switch(router, path)
    for unit, gate in router.gates.items():
        _check_gate(router.rule, gate, path, unit)


def _check_gate(rule: str, gate: GateState, path: Path, unit: str) -> None:
    if rule in TOP_K_RULES and gate.top_k is None:
        raise InvalidField(path, f"router.gates: {unit}", found="no top_k", expected=f"top_k, which rule {rule} needs")
    if (gate.threshold_weight is not None) != (rule == "adaptive_threshold"):
        found = "no threshold gate" if gate.threshold_weight is None else "a threshold gate"
        raise InvalidField(path, f"router.gates: {unit}", found=found, expected=f"what rule {rule} needs")


def _units(router: GatesState, modules: list[str], path: Path) -> dict[str, str]:
    """module -> its unit; every module has one and every unit has modules."""
    units = {}
    for module in modules:
        unit = unit_of(module, router)
        if unit is None:
            raise InvalidField(path, "router.gates", found=f"no gate for {module}", expected="one for each adapted module")
        units[module] = unit
    for unit in router.gates.keys() - set(units.values()):
        raise InvalidField(path, "router.gates", found=f"a gate on {unit}, which no expert adapts", expected="none there")
    return units


def _check_expert(router: GatesState, units: dict[str, str], expert: Expert, column: int, path: Path) -> None:
    for module, pair in expert.modules.items():
        rows, inputs = router.gates[units[module]].weight.shape
        if column >= rows:
            found = f"{rows} experts, while {expert.name} is number {column} and adapts it"
            raise ExpertCountMismatch(path, f"router.gates: {module}", found=found, expected="a row for each expert")
        if router.level == "linear" and inputs != pair.lora_A.shape[1]:
            found = f"a gate on {inputs} inputs"
            raise ShapeMismatch(path, f"router.gates: {module}", found=found, expected=f"{pair.lora_A.shape[1]}, as its adapters")
