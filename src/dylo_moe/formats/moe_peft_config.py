"""adapter_config.json of MoE-PEFT and of the mixlora package: how the experts are adapted and how they are mixed.

The fields are those of github.com/TUDB-Labs/MoE-PEFT 2.0.2; "mixtral" is what mixlora's first releases called "mixlora".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dylo_moe.errors import InvalidField
from dylo_moe.formats.adapter_config import AdapterConfig, optional_text, parse_alpha, parse_rank
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.router_file import MAX_TEMPERATURE, MIN_TEMPERATURE
from dylo_moe.formats.safetensors_file import require_integer
from dylo_moe.formats.switch import MAX_CAPACITY, SWITCH, stated_switch

MIXLORA, LORAMOE, MOLA = "MIXLORA", "LORAMOE", "MOLA"
LEGACY_STRATEGY = "mixtral"
LEGACY_NAMES = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
# The Linears of a feed-forward block in every architecture that MoE-PEFT knows; its other targets belong to the attention.
FEED_FORWARD_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")
DEFAULT_TOP_K, DEFAULT_TOP_P, DEFAULT_TEMPERATURE, DEFAULT_CAPACITY = 2, 0.8, 0.0, 32
_TASKS = (None, "CAUSAL_LM", "QUESTION_ANS")


@dataclass(frozen=True)
class Mixing:
    """How experts are mixed; the fields of GatesState and GateState of the same names."""

    rule: str
    level: str = "linear"
    top_k: int | None = None
    temperature: float = 1.0
    threshold: float | None = None
    activation: str | None = None
    mixlora_switch: str | None = None
    expert_capacity: int | None = None


@dataclass(frozen=True)
class MoePeftConfig:
    """The validated fields. experts: of each expert; shared: of the one LoRA on the attention; both with their own targets."""

    prefix: str
    num_experts: int
    mixing: Mixing
    experts: AdapterConfig
    shared: AdapterConfig
    base_model: str | None
    is_legacy: bool = False

    @property
    def file(self) -> Path:
        return self.experts.file


def read_moe_peft_config(files: CheckpointFiles, path: Path, kind: str, options: ReadOptions) -> MoePeftConfig:
    """Read and validate the configuration of one peft_type: MIXLORA, LORAMOE or MOLA.

    Raises:
        InvalidField: a wrong type, an impossible value, or something that the files cannot bring back.
    """
    data = files.read_json(path)
    strategy = _strategy(data, kind, path)
    count = parse_rank(data.get("num_experts"), path, "num_experts")
    targets = _targets(data.get("target_modules"), path, is_legacy=strategy == LEGACY_STRATEGY)
    of_experts = targets if kind == MOLA else tuple(name for name in targets if name in FEED_FORWARD_NAMES)
    return MoePeftConfig(
        prefix=kind.lower(),
        num_experts=count,
        mixing=_mixing(files, data, path, strategy=strategy, count=count, options=options),
        experts=_adapter(files, _of_experts(files, data, path), path, of_experts),
        shared=_adapter(files, data, path, tuple(name for name in targets if name not in of_experts)),
        base_model=optional_text(data.get("base_model_name_or_path"), path, "base_model_name_or_path"),
        is_legacy=strategy == LEGACY_STRATEGY,
    )


def _strategy(data: Mapping[str, Any], kind: str, path: Path) -> str:
    if data.get("peft_type") != kind:
        raise InvalidField(path, "peft_type", found=repr(data.get("peft_type"))[:80], expected=repr(kind))
    task = data.get("task_type")
    if task not in _TASKS:
        expected = f"one of {_TASKS}: heads for other tasks are not supported"
        raise InvalidField(path, "task_type", found=repr(task)[:80], expected=expected)
    strategy = data.get("routing_strategy")
    known = ("mixlora", "mixlora-dynamic", "mixlora-switch", LEGACY_STRATEGY) if kind == MIXLORA else (kind.lower(),)
    if strategy not in known:
        raise InvalidField(path, "routing_strategy", found=repr(strategy)[:80], expected=f"one of {', '.join(known)}")
    return strategy


def _mixing(
    files: CheckpointFiles, data: Mapping[str, Any], path: Path, *, strategy: str, count: int, options: ReadOptions
) -> Mixing:
    _check_options(options, strategy, path)
    activation = optional_text(data.get("act_fn"), path, "act_fn")
    if strategy == "loramoe":
        return Mixing("softmax")
    if strategy == "mixlora-dynamic":
        threshold = _number(_value(files, data, "top_p", DEFAULT_TOP_P), path, "top_p", most=1.0)
        temperature = _value(files, data, "temperature", DEFAULT_TEMPERATURE, options.temperature)
        # 0 is how MoE-PEFT writes that the probabilities are not divided.
        temperature = (
            1.0 if temperature == 0 else _number(temperature, path, "temperature", least=MIN_TEMPERATURE, most=MAX_TEMPERATURE)
        )
        return Mixing("top_p", "feed_forward", temperature=temperature, threshold=threshold, activation=activation)
    if strategy == "mixlora-switch":
        files.assumptions["mixlora_switch"] = switch = stated_switch(options, path)
        capacity = _value(files, data, "expert_capacity", DEFAULT_CAPACITY)
        capacity = require_integer(capacity, path, "expert_capacity", low=1, high=MAX_CAPACITY)
        return Mixing(SWITCH, "feed_forward", activation=activation, mixlora_switch=switch, expert_capacity=capacity)
    top_k = _value(files, data, "top_k", DEFAULT_TOP_K, options.top_k)
    if type(top_k) is not int or not 1 <= top_k <= count:
        raise InvalidField(path, "top_k", found=repr(top_k)[:80], expected=f"an integer from 1 to {count}")
    if strategy == "mola":
        return Mixing("softmax_topk", top_k=top_k)
    return Mixing("softmax_topk", "feed_forward", top_k, activation=activation)


def _check_options(options: ReadOptions, strategy: str, path: Path) -> None:
    """What the caller sets must be something that this way of mixing has."""
    has = {"loramoe": None, "mixlora-dynamic": "temperature", "mixlora-switch": None}.get(strategy, "top_k")
    for name in ("top_k", "temperature"):
        given = getattr(options, name)
        if given is not None and name != has:
            raise InvalidField(path, name, found=f"{given!r}, given by the caller", expected=f"none: {strategy} has no {name}")
    if options.router_features not in (None, "layer"):
        found = f"{options.router_features!r}, given by the caller"
        raise InvalidField(path, "features", found=found, expected="'layer': each gate sees its layer's input")


def _value(files: CheckpointFiles, data: Mapping[str, Any], name: str, default: object, given: object = None) -> Any:
    if given is not None:
        return given
    if data.get(name) is None:
        files.assumptions[name] = default
        return default
    return data[name]


def _number(value: object, path: Path, name: str, *, least: float = 0.0, most: float) -> float:
    if type(value) not in (int, float) or not 0 < value <= most or value < least:
        expected = f"a number above 0, from {least:g} to {most:g}"
        raise InvalidField(path, name, found=repr(value)[:80], expected=expected)
    return float(value)


def _targets(value: object, path: Path, *, is_legacy: bool) -> tuple[str, ...]:
    """Plain names; a mapping of names and flags is what users write, a list what MoE-PEFT writes."""
    if isinstance(value, dict):
        value = [name for name, chosen in value.items() if chosen is True]
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise InvalidField(path, "target_modules", found=repr(value)[:80], expected="a list of module names")
    return tuple(dict.fromkeys(LEGACY_NAMES.get(name, name) if is_legacy else name for name in value))


def _of_experts(files: CheckpointFiles, data: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The fields that hold for the experts: MixLoRA's expert_lora overrides the attention's."""
    own = data.get("expert_lora")
    if own is None:
        return data
    if not isinstance(own, dict):
        raise InvalidField(path, "expert_lora", found=repr(own)[:80], expected="an object")
    files.warn(f"{files.relative(path)}: expert_lora holds for the experts, as in MoE-PEFT; the mixlora package ignores it")
    return {**data, **own}


def _adapter(files: CheckpointFiles, data: Mapping[str, Any], path: Path, targets: tuple[str, ...]) -> AdapterConfig:
    for name in ("use_dora", "use_rslora"):
        if data.get(name) is not None and type(data[name]) is not bool:
            raise InvalidField(path, name, found=repr(data[name])[:80], expected="true or false")
    if data.get("use_dora"):
        raise InvalidField(path, "use_dora", found=True, expected="false: MoE-PEFT never saves the magnitudes that DoRA trained")
    if data.get("bias") not in (None, "none"):
        raise InvalidField(path, "bias", found=repr(data["bias"])[:80], expected='"none"')
    return AdapterConfig(
        file=path,
        rank=parse_rank(data.get("r"), path, "r"),
        alpha=parse_alpha(data.get("lora_alpha"), path, "lora_alpha", files),
        use_rslora=bool(data.get("use_rslora")),
        targets=targets,
    )
