"""load_checkpoint: a directory on disk -> a model that runs, whatever the format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dylo_moe.adapters import add_experts
from dylo_moe.building import buildable
from dylo_moe.errors import InvalidField, OptionError, ShapeMismatch, one_line
from dylo_moe.expert import expert_order
from dylo_moe.formats import Adapters, Checkpoint, read_checkpoint
from dylo_moe.formats.base import BaseModel, check_experts_fit_base, check_fit, read_base, resolve_base
from dylo_moe.model import DyLoRA_MoE, attach_router
from dylo_moe.quantised import check_package
from dylo_moe.repeated import compared_with_base
from dylo_moe.replaced import add_biases
from dylo_moe.routers import build_config, build_router


def load_checkpoint(  # noqa: PLR0913 - from_pretrained's own habit: one option per thing that files may not hold
    path: str | Path,
    base_model: str | PreTrainedModel | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    *,
    lora_alpha: float | None = None,
    top_k: int | tuple[int, ...] | None = None,
    temperature: float | None = None,
    router_features: str | None = None,
    rng_seed: int | None = None,
    genknowsub: str | None = None,
    softmax_topk: str | None = None,
    mixlora_switch: str | None = None,
    adapters: Adapters = None,
    expect_hash: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    autocast_adapter_dtype: bool = True,
) -> DyLoRA_MoE | PreTrainedModel:
    """Loads a LoRA-MoE checkpoint of any known format, in evaluation mode; experts and router are trainable, the base is not.

    Args:
        path: the checkpoint's directory.
        base_model: a local directory, a hub id (the only way in which anything is fetched), or a loaded model, which is
            then wrapped in place; None takes what the checkpoint records.
        dtype: of the base model, "auto" or None for the one it is stored in; the router keeps its own, or takes
            float32 for one of 16 bits.
        device_map: as in transformers' from_pretrained.
        lora_alpha, top_k, temperature, router_features, rng_seed, genknowsub, softmax_topk, mixlora_switch, adapters: for layouts
            whose files do not hold them, and to override; see read_checkpoint.
        expect_hash: refuse files whose hash is another.
        quantization_config: as in from_pretrained, a BitsAndBytesConfig for example; a base that is stored quantised needs none.
        autocast_adapter_dtype: as in PEFT, experts on a base of 16 bits are float32. False gives them the base's dtype: half the
            memory, and products that a GPU has units for.

    Returns:
        A DyLoRA_MoE; for a merged checkpoint, which has no experts, the plain transformers model. Its attribute
        `checkpoint` is the validated Checkpoint, with warnings and assumptions.

    Raises:
        CheckpointError: one line, naming file and field. OptionError: options that contradict one another.
    """
    checkpoint = read_checkpoint(
        path,
        lora_alpha=lora_alpha,
        top_k=top_k,
        temperature=temperature,
        router_features=router_features,
        rng_seed=rng_seed,
        genknowsub=genknowsub,
        softmax_topk=softmax_topk,
        mixlora_switch=mixlora_switch,
        adapters=adapters,
        expect_hash=expect_hash,
    )
    options = {
        "dtype": dtype or "auto",
        "device_map": device_map,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "quantization_config": quantization_config,
    }
    base, notes = _base(checkpoint, base_model, {name: value for name, value in options.items() if value is not None})
    checkpoint = compared_with_base(replace(checkpoint, warnings=(*checkpoint.warnings, *notes)), base)
    if not checkpoint.experts:
        base.checkpoint = checkpoint
        return base.eval()
    checkpoint = _named_in_order(checkpoint)
    peft_model = add_experts(base, checkpoint.adapters, autocast_adapter_dtype=autocast_adapter_dtype)
    model = attach_router(peft_model, build_router(checkpoint, base), build_config(checkpoint))
    add_biases(model.causal_lm, {expert.name: expert.biases for expert in checkpoint.experts}, model.features)
    model.checkpoint = replace(checkpoint, warnings=(*checkpoint.warnings, *model.notes))
    return model.eval()


def _named_in_order(checkpoint: Checkpoint) -> Checkpoint:
    """Names that keep the experts in the order of the router's columns.

    A routed model orders the names task_1, task_0 by their numbers (see expert_order), a checkpoint need not.
    """
    names = [expert.name for expert in checkpoint.experts]
    if expert_order(names) == names:
        return checkpoint
    experts = tuple(replace(expert, name=f"{index}_{expert.name}") for index, expert in enumerate(checkpoint.experts))
    note = f"the experts {', '.join(names)} are in this order; they are called {experts[0].name}, ... so that they stay in it"
    return replace(checkpoint, experts=experts, warnings=(*checkpoint.warnings, one_line(note)))


def _base(
    checkpoint: Checkpoint, given: str | PreTrainedModel | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The base model and what there is to warn about it."""
    if "quantization_config" in options:
        _check_can_quantise(checkpoint, given, options["quantization_config"])
    if isinstance(given, PreTrainedModel):
        _check_given(checkpoint, given)
        return given, ()
    if checkpoint.base_state is not None:
        return _from_state(checkpoint, given, options), ()
    if not checkpoint.experts:
        return _from_directory(checkpoint.path, checkpoint.base_config, options), ()
    location = resolve_base(checkpoint.base_model, given, checkpoint=checkpoint.path)
    if not os.path.isdir(location):  # a hub id that the user gave
        return AutoModelForCausalLM.from_pretrained(location, **options), ()
    notes = check_experts_fit_base(location, checkpoint.adapters, checkpoint.router)
    return _from_directory(location, read_base(location).config, options), notes


def _check_given(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """A loaded base must not take the place of weights that the checkpoint brings, and the experts must fit it."""
    if checkpoint.base_state is not None or not checkpoint.experts:
        raise OptionError(
            f"a loaded base_model cannot be used with {checkpoint.format}: the base comes from the checkpoint itself;"
            " give the directory of its configuration, or nothing"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():  # what is packed, and is named otherwise by some packages
        if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
            shapes[f"{name}.weight"] = (module.out_features, module.in_features)
    base = BaseModel(Path("the given base_model"), model.config.to_dict(), shapes)
    check_fit(base, checkpoint.adapters, checkpoint.router)


def _check_can_quantise(checkpoint: Checkpoint, given: str | PreTrainedModel | None, quantization: Any) -> None:
    if isinstance(given, PreTrainedModel):
        raise OptionError("quantization_config has no effect on a base_model that is loaded already; quantise it when loading it")
    if checkpoint.base_state is not None:
        raise OptionError(
            f"quantization_config cannot be used with {checkpoint.format}: the base comes from the checkpoint itself"
        )
    check_package(quantization, "the given quantization")


def _from_directory(path: str | Path, fields: Mapping[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    """A local base. Its configuration is built from the validated fields, so that none of them can name code or a kernel."""
    check_package(fields.get("quantization_config"), Path(path) / "config.json")
    if options["trust_remote_code"]:
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options)
    config = _as_config(fields, path)
    with buildable(path):
        return AutoModelForCausalLM.from_pretrained(path, config=config, local_files_only=True, **options)


def _from_state(checkpoint: Checkpoint, given: str | None, options: dict[str, Any]) -> PreTrainedModel:
    """A base whose weights are in the checkpoint itself; only its configuration may come from elsewhere."""
    if checkpoint.base_config is not None:
        config = _as_config(checkpoint.base_config, checkpoint.path)
    else:
        config = AutoConfig.from_pretrained(resolve_base(checkpoint.base_model, given, checkpoint=checkpoint.path))
    state = checkpoint.base_state
    widest = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    dtype = options["dtype"] if options["dtype"] != "auto" else widest
    attention = options.get("attn_implementation")
    with buildable(checkpoint.path):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    for name, own in model.state_dict().items():
        if name in state and state[name].shape != own.shape:
            raise ShapeMismatch(checkpoint.path, name, found=f"shape {tuple(state[name].shape)}", expected=f"{tuple(own.shape)}")
    missing, unexpected = model.load_state_dict(state, strict=False)
    # What can be tied counts only where the configuration ties it: a head of its own must be in the checkpoint.
    tied = getattr(model, "_tied_weights_keys", None) if config.tie_word_embeddings else None
    lost = sorted(set(missing) - set(tied or ()))
    if lost or unexpected:
        found = f"{len(lost)} tensors missing {lost[:3]}, {len(unexpected)} unknown {sorted(unexpected)[:3]}"
        raise ShapeMismatch(checkpoint.path, "base weights", found=found, expected="the base model's own tensors")
    model.tie_weights()
    return _placed(model, options.get("device_map"))


def _placed(model: PreTrainedModel, device_map: Any) -> PreTrainedModel:
    """On one device: a base whose weights are in the checkpoint itself is not spread over several."""
    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values()))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return model if device_map is None else model.to(device_map)


def _as_config(fields: Mapping[str, Any], path: str | Path) -> PretrainedConfig:
    values = {name: value for name, value in fields.items() if not name.startswith("_") and name != "auto_map"}
    # Upstream marks a merged model as "dylora-moe" beside the base's type, in either of these fields.
    marked = [fields.get("model_type"), fields.get("_dylora_original_type")]
    model_type = next((name for name in marked if isinstance(name, str) and name in CONFIG_MAPPING), None)
    if model_type is None:
        raise InvalidField(path, "model_type", found=repr(marked[0]), expected="a model type that transformers knows")
    with buildable(path):
        return AutoConfig.for_model(model_type, **{name: value for name, value in values.items() if name != "model_type"})
