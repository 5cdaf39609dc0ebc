"""A base model and experts, as read from disk -> a PeftModel."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from dylo_moe.errors import ShapeMismatch
from dylo_moe.formats import Expert


def add_experts(base: PreTrainedModel, experts: tuple[Expert, ...], *, autocast_adapter_dtype: bool = True) -> PeftModel:
    """Wraps a base in place with one LoRA adapter per expert, every tensor set and none left at its start value.

    The LoraConfig is our own, from the validated fields: nothing that a file says about initialisation is run. Biases of
    an expert's own have no place in a PeftModel; see replaced.add_biases. autocast_adapter_dtype: as in PEFT's from_pretrained.
    """
    peft_model: PeftModel | None = None
    for expert in experts:
        config = _lora_config(expert, fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()))
        with warnings.catch_warnings(), no_init_weights():  # start values would be drawn to be overwritten
            # PEFT 0.21 reads a property that transformers 5.23 deprecates; no user of ours can do anything about it.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            if peft_model is None:
                peft_model = get_peft_model(base, config, expert.name, autocast_adapter_dtype=autocast_adapter_dtype)
            else:
                peft_model.add_adapter(expert.name, config, autocast_adapter_dtype=autocast_adapter_dtype)
        _set_weights(peft_model, expert)
    return peft_model


def _lora_config(expert: Expert, *, fan_in_fan_out: bool) -> LoraConfig:
    first = next(iter(expert.modules.values()))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=first.rank,
        lora_alpha=first.alpha,
        target_modules=list(expert.modules),
        rank_pattern={_exactly(name): pair.rank for name, pair in expert.modules.items()},
        alpha_pattern={_exactly(name): pair.alpha for name, pair in expert.modules.items()},
        use_rslora=first.use_rslora,
        use_dora=first.magnitude is not None,
        lora_bias=first.bias is not None,
        modules_to_save=sorted(expert.replaced) or None,
        fan_in_fan_out=fan_in_fan_out,
        init_lora_weights=False,
    )


def _exactly(module: str) -> str:
    return "^" + module.replace(".", r"\.")


def _set_weights(peft_model: PeftModel, expert: Expert) -> None:
    base, name = peft_model.get_base_model(), expert.name
    for module, pair in expert.modules.items():
        layer = base.get_submodule(module)
        layer.scaling[name] = pair.scaling
        own = {"lora_A": (layer.lora_A[name].weight, pair.lora_A), "lora_B": (layer.lora_B[name].weight, pair.lora_B)}
        if pair.magnitude is not None:
            own["lora_magnitude_vector"] = (layer.lora_magnitude_vector[name].weight, pair.magnitude)
        if pair.bias is not None:
            own["lora_B.bias"] = (layer.lora_B[name].bias, pair.bias)
        for part, (parameter, tensor) in own.items():
            _set(parameter, tensor, f"{name}: {module}.{part}")
    for module, tensors in expert.replaced.items():
        _set_version(base, module, name, tensors)


def _set_version(base: PreTrainedModel, module: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Fills the expert's copy of a module."""
    wrapper = dict(base.named_modules(remove_duplicate=False)).get(module)
    own = wrapper.modules_to_save[name].state_dict(keep_vars=True) if isinstance(wrapper, ModulesToSaveWrapper) else {}
    if own.keys() != tensors.keys():
        found = f"{', '.join(tensors)}"[:200]
        raise ShapeMismatch(module, name, found=found, expected=f"{', '.join(own) or 'a module of the base model'}"[:200])
    for part, tensor in tensors.items():
        _set(own[part], tensor, f"{name}: {module}.{part}")


def _set(parameter: Tensor, tensor: Tensor, field: str) -> None:
    if parameter.shape != tensor.shape:
        raise ShapeMismatch("the base model", field, found=tuple(tensor.shape), expected=tuple(parameter.shape))
    parameter.data = tensor.to(device=parameter.device, dtype=parameter.dtype, copy=True)
