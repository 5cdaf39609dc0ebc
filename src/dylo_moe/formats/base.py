"""The base model: where it is, whether its files can be trusted, and whether the experts fit it. Headers only, no weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from dylo_moe.errors import BaseModelUnknown, IncompletePair, InvalidField, ShapeMismatch
from dylo_moe.formats.checkpoint import Expert, LoraPair, RouterState
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.patterns import ends_with
from dylo_moe.formats.weights import find_weights

# Twice the sizes of any public model; a configuration beyond them is an attack or a slip.
_LIMITS = {
    "hidden_size": 1_000_000,
    "n_embd": 1_000_000,
    "intermediate_size": 10_000_000,
    "n_inner": 10_000_000,
    "num_hidden_layers": 10_000,
    "n_layer": 10_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "n_head": 100_000,
    "head_dim": 100_000,
    "vocab_size": 100_000_000,
}
_OPTIONAL = ("n_inner", "num_key_value_heads", "head_dim")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "auto")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_HUB_ID_CHARACTERS = 193  # two names of 96 characters, the hub's limit
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# tokenizer.json of the largest vocabularies (262,144 pieces) is about 35 MB.
_MAX_TOKENIZER_BYTES = 100_000_000


@dataclass(frozen=True)
class BaseModel:
    """A base model's directory, configuration and tensor shapes.

    shapes: parameter name -> shape; empty for pickled weights, which have no header.
    """

    directory: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    warnings: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int | None:
        return self.config.get("num_hidden_layers", self.config.get("n_layer"))

    @property
    def is_unknown(self) -> bool:
        """Whether no configuration says what kind of model it is, so that either orientation of a weight is possible."""
        return "model_type" not in self.config

    @property
    def is_quantised(self) -> bool:
        """Whether weights may be packed, so that their shapes say nothing."""
        return self.config.get("quantization_config") is not None

    @property
    def is_conv1d(self) -> bool:
        """Whether its Linears are GPT-2's Conv1D, which store the weight as (in, out)."""
        return self.config.get("model_type") == "gpt2"


def resolve_base(recorded: str | None, given: str | None = None, *, checkpoint: str | Path | None = None) -> str:
    """Where to load the base model from: a local directory, or the hub id that the user gave.

    Args:
        recorded: what the checkpoint's files say. Only used when it is a local directory (inside the checkpoint, as it stands,
            or beside the checkpoint) or is in the local Hugging Face cache; it never causes a download.
        given: what the user says; wins.

    Raises:
        BaseModelUnknown: neither leads anywhere; the message asks for base_model=.
    """
    where = Path(checkpoint) if checkpoint is not None else Path(recorded or ".")
    if given:
        return _given(given, where)
    if not recorded:
        raise BaseModelUnknown(where, "base model", found="no record of it", expected="base_model=PATH or hub id")
    for candidate in _candidates(recorded, checkpoint):
        if os.path.isfile(candidate / "config.json"):
            return str(candidate)
    cached = _cached(recorded)
    if cached is not None:
        return cached
    found = f"{repr(recorded)[:200]}, which is neither a local directory nor in the local Hugging Face cache"
    raise BaseModelUnknown(where, "base model", found=found, expected="base_model=PATH or hub id")


def _given(given: str, where: Path) -> str:
    if not isinstance(given, str | os.PathLike):
        raise BaseModelUnknown(where, "base_model", found=repr(given)[:200], expected="a directory, a hub id or a loaded model")
    if os.path.isdir(given) or (_HUB_ID.fullmatch(str(given)) and len(str(given)) <= _HUB_ID_CHARACTERS):
        return str(given)
    raise BaseModelUnknown(where, "base_model", found=repr(given)[:200], expected="an existing directory or a hub id")


def _candidates(recorded: str, checkpoint: str | Path | None) -> list[Path]:
    path = Path(recorded)
    if path.is_absolute() or checkpoint is None:
        return [path]
    return [Path(checkpoint) / path, path, Path(checkpoint).parent / path]


def _cached(name: str) -> str | None:
    if not _HUB_ID.fullmatch(name):
        return None
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return str(Path(found).parent) if isinstance(found, str) else None


def read_base(directory: str | Path) -> BaseModel:
    """Configuration and headers of a base model, checked against each other.

    Raises:
        CheckpointError: MissingFile, UnreadableFile, InvalidField or ShapeMismatch, naming file and field.
    """
    files = CheckpointFiles(Path(directory))
    path = files.root / "config.json"
    config = files.read_json(path)
    check_config(config, path)
    for name in ("auto_map", "_attn_implementation", "custom_generate"):
        if config.get(name):
            files.warn(f"{path}: {name} is not followed")
    weights = find_weights(files, files.root)
    shapes = {key: info.shape for key, info in weights.header.items()}
    if weights.is_pickled:
        files.warn(f"{weights.paths[0]}: a pickle; the experts' shapes are not compared with it before loading")
    base = BaseModel(files.root, config, shapes, tuple(files.warnings))
    check_headers(base, path)
    _check_tokenizer(files, base)
    return base


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises InvalidField when a number of a model's config.json is impossible.

    Only numbers that transformers would use to allocate or to divide are looked at.
    """
    if not isinstance(config.get("model_type"), str):
        raise InvalidField(path, "model_type", found=repr(config.get("model_type"))[:80], expected="a model type")
    for name, limit in _LIMITS.items():
        value = config.get(name)
        if name not in config or (value is None and name in _OPTIONAL):
            continue
        if type(value) is not int or not 1 <= value <= limit:
            raise InvalidField(path, name, found=repr(value)[:80], expected=f"an integer from 1 to {limit:,}")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and shared and heads % shared:
        raise InvalidField(path, "num_key_value_heads", found=shared, expected=f"a divisor of {heads} heads")
    hidden, heads = config.get("hidden_size", config.get("n_embd")), heads or config.get("n_head")
    if hidden and heads and config.get("head_dim") is None and hidden % heads:
        raise InvalidField(path, "hidden_size", found=hidden, expected=f"a multiple of {heads} heads")
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and dtype not in _DTYPES:
        raise InvalidField(path, "dtype", found=repr(dtype)[:80], expected=f"one of {', '.join(_DTYPES)}")


def check_headers(base: BaseModel, path: Path) -> None:
    """Embedding, layer count and head against the configuration; `path` is the config.json that messages name.

    Raises:
        ShapeMismatch: they disagree, or an untied model has no head.
    """
    if not base.shapes:
        return
    name, shape = _embedding(base)
    hidden, vocabulary = base.config.get("hidden_size", base.config.get("n_embd")), base.config.get("vocab_size")
    if name and hidden and vocabulary and shape != (vocabulary, hidden):
        raise ShapeMismatch(path, name, found=f"shape {shape} in the weights", expected=f"{(vocabulary, hidden)}")
    layers = {int(match[1]) for key in base.shapes if (match := _LAYER.search(key))}
    if base.num_layers and layers and layers != set(range(base.num_layers)):
        found = f"{base.num_layers}, while the weights have {len(layers)} layers, up to number {max(layers)}"
        raise ShapeMismatch(path, "num_hidden_layers", found=found, expected="the same number in both")
    has_head = any(ends_with(key, "lm_head.weight") for key in base.shapes)
    if not has_head and base.config.get("tie_word_embeddings") is False:
        raise ShapeMismatch(path, "lm_head.weight", found="no such tensor", expected="a head, since it is not tied")


def _embedding(base: BaseModel) -> tuple[str, tuple[int, ...]]:
    for key, shape in base.shapes.items():
        if any(ends_with(key, name) for name in _EMBEDDINGS):
            return key, shape
    return "", ()


def _check_tokenizer(files: CheckpointFiles, base: BaseModel) -> None:
    path = files.root / "tokenizer.json"
    _, shape = _embedding(base)
    if not shape or not path.is_file():
        return
    tokenizer = files.read_json(path, _MAX_TOKENIZER_BYTES)
    largest = _largest_token(tokenizer)
    if largest >= shape[0]:
        found = f"token id {largest}"
        raise ShapeMismatch(path, "vocabulary", found=found, expected=f"ids below {shape[0]}, the rows of the embedding")


def _largest_token(tokenizer: Mapping[str, Any]) -> int:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = [-1]
    if isinstance(vocabulary, dict):
        ids += [value for value in vocabulary.values() if type(value) is int]
    elif isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            ids.append(entry["id"])
    return max(ids)


def check_experts_fit_base(
    base_directory: str | Path, experts: Iterable[Expert], router: RouterState | None = None
) -> tuple[str, ...]:
    """Compare every expert, and the router, with the headers of the base model; returns warnings.

    Raises:
        ShapeMismatch: a module is not in the base, a pair has other sizes than the base's weight (out, in), or the gate has
            other columns than the hidden size.
        IncompletePair: a module that the expert's configuration targets has no pair: the base has more layers, or tensors
            are missing.
        CheckpointError: whatever `read_base` refuses.
    """
    base = read_base(base_directory)
    check_fit(base, experts, router)
    return base.warnings


def check_fit(base: BaseModel, experts: Iterable[Expert], router: RouterState | None) -> None:
    """As check_experts_fit_base, for a base model whose headers are at hand; pickled weights have none to compare."""
    for expert in experts if base.shapes else ():
        for module, pair in expert.modules.items():
            _check_pair(base, expert.name, module, pair)
        _check_own(base, expert)
        _check_coverage(base, expert)
    hidden = base.config.get("hidden_size", base.config.get("n_embd"))
    if router is not None and router.features != "layer" and hidden and router.hidden_size != hidden:
        found = f"{router.hidden_size} columns, while the base model's hidden size is {hidden}"
        raise ShapeMismatch(base.directory, "gate.weight", found=found, expected="the same number")


def _check_pair(base: BaseModel, name: str, module: str, pair: LoraPair) -> None:
    shape = _weight_shape(base, module)
    field = f"{name}: {module}"
    if base.is_quantised and (shape is None or shape[-1:] == (1,)) and _has_module(base, module):
        return  # packed: several values in one byte, or under names of the package's own
    if shape is None:
        found = f"an adapter on a module that {base.directory.name} does not have"
        raise ShapeMismatch(base.directory, field, found=found, expected="experts of this base model")
    if len(shape) != 2:
        raise ShapeMismatch(base.directory, field, found=f"a base weight of shape {shape}", expected="a Linear")
    outputs, inputs = shape[::-1] if base.is_conv1d and _LAYER.search(module) else shape
    sizes = (pair.lora_B.shape[0], pair.lora_A.shape[1])
    if sizes != (outputs, inputs) and not (base.is_unknown and sizes == (inputs, outputs)):
        found = f"an adapter from {pair.lora_A.shape[1]} to {pair.lora_B.shape[0]}"
        raise ShapeMismatch(base.directory, field, found=found, expected=f"from {inputs} to {outputs}, as the base")


def _weight_shape(base: BaseModel, module: str) -> tuple[int, ...] | None:
    """Shape of a module's weight. Files may lack the first part of the path (GPT-2: "transformer."), or a tied head."""
    for name in (module, module.partition(".")[2]):
        if name and f"{name}.weight" in base.shapes:
            return base.shapes[f"{name}.weight"]
    return _embedding(base)[1] or None if module == "lm_head" else None


def _has_module(base: BaseModel, module: str) -> bool:
    return any(key.startswith((f"{module}.", f"{module.partition('.')[2]}.")) for key in base.shapes)


def _check_own(base: BaseModel, expert: Expert) -> None:
    """Modules and biases that the expert has in versions of its own, against the base's."""
    own = {f"{module}.{name}": tensor for module, tensors in expert.replaced.items() for name, tensor in tensors.items()}
    own |= {f"{module}.bias": tensor for module, tensor in expert.biases.items()}
    for key, tensor in own.items():
        shape = next((base.shapes[name] for name in (key, key.partition(".")[2]) if name in base.shapes), None)
        if shape is None and key == "lm_head.weight":
            shape = _embedding(base)[1]
        if shape is not None and shape != tuple(tensor.shape):
            found = f"shape {tuple(tensor.shape)}"
            raise ShapeMismatch(base.directory, f"{expert.name}: {key}", found=found, expected=f"{shape}, as the base")


def _check_coverage(base: BaseModel, expert: Expert) -> None:
    modules = dict.fromkeys(key.rpartition(".")[0] for key in base.shapes)
    for target in expert.targets:
        for module in modules:
            if ends_with(module, target) and not any(ends_with(own, module) for own in expert.modules):
                found = f"no pair, although the expert targets {target!r}"
                raise IncompletePair(base.directory, f"{expert.name}: {module}", found=found, expected="a pair")
