"""adapter_config.json of one PEFT LoRA: the fields that decide what the adapter computes, validated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dylo_moe.errors import InvalidField
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.patterns import MatchBudget, Value, ends_with, find, fullmatch, pattern_value

MAX_RANK = 65_536
# float16 ends at 65,504: an alpha beyond a million overflows it at any rank in use.
MAX_ALPHA = 1e6
MAX_PATTERNS = 10_000

# Fields that change what is computed in a way that is not implemented; only these values are allowed.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "lora_nums": (None,),
    "ensure_weight_tying": (None, False),
}
_BIASES = ("none", "all", "lora_only")
# Initialisations that leave the base model as it is; the others subtract from the base weights while loading.
_HARMLESS_INIT = (None, True, False, "gaussian", "eva", "orthogonal")
# Names inside LoRA layers: DyLoRA-MoE's create_expert collects them into target_modules of every expert but the first.
_PATH = re.compile(r"[A-Za-z0-9_.]{1,500}")
_JUNK = ("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B", "default")


@dataclass(frozen=True)
class AdapterConfig:
    """The validated fields.

    targets, excluded: plain module names, or a regular expression (str), or None where nothing is said.
    layers: the only layers with adapters; None for all. layers_pattern: regular expressions of what stands before their number.
    saved: modules_to_save, endings of module paths. bias: "none", "all" or "lora_only".
    """

    file: Path
    rank: int | None
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] | str | None = None
    excluded: tuple[str, ...] | str | None = None
    layers: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    use_dora: bool = False
    lora_bias: bool = False
    saved: tuple[str, ...] = ()
    bias: str = "none"
    base_model: str | None = None
    budget: MatchBudget = field(default_factory=MatchBudget)

    def rank_of(self, module: str) -> int | None:
        """The rank that the configuration gives a module; None where no file records it."""
        return self._pattern_value(self.rank_pattern, module, self.rank, "rank_pattern")

    def alpha_of(self, module: str) -> float:
        return self._pattern_value(self.alpha_pattern, module, self.alpha, "alpha_pattern")

    def _pattern_value(self, patterns: Mapping[str, Value], module: str, default: Value, name: str) -> Value:
        return pattern_value(patterns, module, default, file=self.file, field=name, budget=self.budget)

    def covers(self, module: str) -> bool:
        """Whether PEFT would put an adapter on this module: peft.tuners.tuners_utils.check_target_module_exists."""
        if self.excludes(module):
            return False
        if self.targets is None or self.targets == "all-linear":
            return True
        if not self._names(self.targets, module, "target_modules"):
            return False
        is_named_whole = not isinstance(self.targets, str) and module in self.targets
        return self.layers is None or is_named_whole or self._layer_of(module) in self.layers

    def excludes(self, module: str) -> bool:
        """Whether exclude_modules names this module, or modules_to_save this one or one around it."""
        is_saved = any(f".{name}." in f".{module}." for name in self.saved)
        return is_saved or self._names(self.excluded, module, "exclude_modules")

    def _names(self, what: tuple[str, ...] | str | None, module: str, field: str) -> bool:
        if isinstance(what, str):
            return fullmatch(what, module, file=self.file, field=field, budget=self.budget)
        return any(ends_with(module, name) for name in what or ())

    def _layer_of(self, module: str) -> int | None:
        """The number of the layer that a module is in: the first one in its path, after one of layers_pattern if there is any."""
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        for start in starts:
            whole = rf"(?:{start}\.(?P<number>\d+)\.).*"
            match = find(whole, module, file=self.file, field="layers_pattern", budget=self.budget)
            if match is not None:
                return int(match["number"]) if match["number"] else None
        return None

    @property
    def names_for_every_layer(self) -> tuple[str, ...]:
        """Plain target names that must have a pair in every layer; empty where the configuration does not say so."""
        restricted = self.layers is not None or self.excluded or self.saved
        return self.targets if isinstance(self.targets, tuple) and not restricted else ()


def read_adapter_config(files: CheckpointFiles, path: Path) -> AdapterConfig:
    """Read and validate one adapter_config.json.

    Raises:
        InvalidField: a field has a wrong type, an impossible value, or asks for a LoRA variant that is not supported.
    """
    data = files.read_json(path)
    if data.get("peft_type") != "LORA":
        raise InvalidField(path, "peft_type", found=repr(data.get("peft_type"))[:80], expected='"LORA"')
    rank_pattern = _pattern(data.get("rank_pattern"), path, "rank_pattern")
    alpha_pattern = _pattern(data.get("alpha_pattern"), path, "alpha_pattern")
    return replace(
        common_fields(data, files, path),
        rank=parse_rank(data.get("r"), path, "r"),
        alpha=parse_alpha(data.get("lora_alpha"), path, "lora_alpha", files),
        rank_pattern={key: parse_rank(value, path, f"rank_pattern[{key}]") for key, value in rank_pattern.items()},
        alpha_pattern={key: parse_alpha(value, path, f"alpha_pattern[{key}]", files) for key, value in alpha_pattern.items()},
    )


def common_fields(data: Mapping[str, Any], files: CheckpointFiles, path: Path) -> AdapterConfig:
    """What the configurations of LoRA and of AdaLoRA have in common: everything but ranks, alphas and their patterns."""
    _refuse_variants(data, path)
    targets = _targets(data.get("target_modules"), files, path)
    return AdapterConfig(
        file=path,
        rank=None,
        alpha=0.0,
        use_rslora=_flag(data.get("use_rslora"), path, "use_rslora"),
        targets=targets,
        excluded=parse_names(data.get("exclude_modules"), path, "exclude_modules"),
        layers=_layers(data, path),
        layers_pattern=_layers_pattern(data, path),
        use_dora=_flag(data.get("use_dora"), path, "use_dora"),
        lora_bias=_flag(data.get("lora_bias"), path, "lora_bias"),
        saved=_saved(data.get("modules_to_save"), path),
        bias=_bias(data.get("bias"), path),
        base_model=optional_text(data.get("base_model_name_or_path"), path, "base_model_name_or_path"),
    )


def parse_rank(value: object, file: Path, name: str) -> int:
    """An int of [1, 65536]; everything else, bool included, is refused with InvalidField."""
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise InvalidField(file, name, found=repr(value)[:80], expected=f"an integer from 1 to {MAX_RANK:,}")
    return value


def parse_alpha(value: object, file: Path, name: str, files: CheckpointFiles) -> float:
    """A finite number of at most a million; a negative one and 0 are worth a warning."""
    value = parse_scale(value, file, name)
    if value <= 0:
        what = "subtracts what it learned" if value < 0 else "has no effect"
        files.warn(f"{files.relative(file)}: {name} is {value:g}: the expert {what}")
    return value


def parse_scale(value: object, file: Path, name: str) -> float:
    """A finite number of at most a million; everything else, bool included, is refused with InvalidField."""
    if type(value) not in (int, float) or not abs(value) <= MAX_ALPHA:
        raise InvalidField(file, name, found=repr(value)[:80], expected=f"a number of at most {MAX_ALPHA:,.0f}")
    return float(value)


def optional_text(value: object, file: Path, name: str) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise InvalidField(file, name, found=repr(value)[:80], expected="text or null")
    return value


def _refuse_variants(data: Mapping[str, Any], file: Path) -> None:
    for name, allowed in _UNSUPPORTED.items():
        if not any(_same(data.get(name), value) for value in allowed):
            raise InvalidField(file, name, found=repr(data[name])[:80], expected="no value: this variant is not supported")
    init = data.get("init_lora_weights")
    if not any(_same(init, value) for value in _HARMLESS_INIT):
        expected = f"one of {_HARMLESS_INIT[1:]}: others change base weights and are not supported"
        raise InvalidField(file, "init_lora_weights", found=repr(init)[:80], expected=expected)
    task = data.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise InvalidField(file, "task_type", found=repr(task)[:80], expected='"CAUSAL_LM" or null')


def _same(value: object, allowed: object) -> bool:
    return type(value) is type(allowed) and value == allowed


def _flag(value: object, file: Path, name: str) -> bool:
    if value not in (None, True, False) or type(value) not in (type(None), bool):
        raise InvalidField(file, name, found=repr(value)[:80], expected="true or false")
    return bool(value)


def _targets(value: object, files: CheckpointFiles, file: Path) -> tuple[str, ...] | str | None:
    if isinstance(value, str) and value:
        return "all-linear" if value.lower() == "all-linear" else value
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise InvalidField(file, "target_modules", found=repr(value)[:80], expected="a list of module names or a pattern")
    junk = [name for name in value if _is_junk(name)]
    if junk:
        files.warn(f"{files.relative(file)}: target_modules: ignored {', '.join(junk)}, which are not modules of the base")
    return tuple(name for name in value if not _is_junk(name))


def parse_names(value: object, file: Path, name: str) -> tuple[str, ...] | str | None:
    """Module names, or one pattern; None where there is nothing."""
    if value is None or value == []:
        return None
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise InvalidField(file, name, found=repr(value)[:80], expected="a list of module names or a pattern")
    return tuple(value)


def _saved(value: object, file: Path) -> tuple[str, ...]:
    names = parse_names(value, file, "modules_to_save")
    if isinstance(names, str) or not all(_PATH.fullmatch(name) for name in names or ()):
        raise InvalidField(file, "modules_to_save", found=repr(value)[:80], expected="a list of module names")
    return names or ()


def _bias(value: object, file: Path) -> str:
    if value is not None and value not in _BIASES:
        raise InvalidField(file, "bias", found=repr(value)[:80], expected=f"one of {', '.join(_BIASES)}")
    return value or "none"


def _layers_pattern(data: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    value = data.get("layers_pattern")
    names = parse_names([value] if isinstance(value, str) and value else value or None, file, "layers_pattern")
    return names or ()


def _is_junk(name: str) -> bool:
    expert_number = name.removeprefix("expert_")
    return name in _JUNK or name.startswith("lora_magnitude_vector") or (name != expert_number and expert_number.isdecimal())


def _pattern(value: object, file: Path, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise InvalidField(file, name, found=repr(value)[:80], expected="an object of patterns and numbers")
    return value


def _layers(data: Mapping[str, Any], file: Path) -> frozenset[int] | None:
    value = data.get("layers_to_transform")
    if value is None or value == []:
        return None
    items = value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in items):
        raise InvalidField(file, "layers_to_transform", found=repr(value)[:80], expected="layer numbers")
    return frozenset(items)
