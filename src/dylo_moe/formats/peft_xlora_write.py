"""X-LoRA in PEFT's layout, so that stock PEFT's PeftModel.from_pretrained loads it to the same model.

PEFT opens the experts only where `adapters` says, and a relative path is relative to the process. So absolute paths of the
directory's own subdirectories are written, which the user has to change when the directory moves (we do not need them).
The keys of `adapters` are written in numeric order, not sorted as text: PEFT takes them in the file's order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dylo_moe.errors import InvalidField
from dylo_moe.formats.adapter_write import save_tensors, write_expert, write_json
from dylo_moe.formats.bag_write import copy_tokenizer
from dylo_moe.formats.checkpoint import Checkpoint, Expert, XLoraState
from dylo_moe.formats.peft_xlora import CONFIG, PREFIX, classifier_numbers
from dylo_moe.formats.xlora_experts import check_plain


def write_xlora(directory: str | Path, checkpoint: Checkpoint, place: str | Path | None = None) -> None:
    """Write the classifier and, into 0/, 1/ ..., the experts of `checkpoint`.

    Args:
        directory: where to write; created where it does not exist.
        place: where the directory will be in the end, for the paths in `adapters`; None for `directory` itself.

    Raises:
        InvalidField: the router is no X-LoRA classifier, or PEFT cannot express it or an expert; the message says what.
    """
    directory = Path(directory)
    state = _expressible(checkpoint, directory)
    for index, expert in enumerate(checkpoint.experts):
        write_expert(directory / str(index), expert, checkpoint.base_model)
    save_tensors(directory / "adapter_model.safetensors", _tensors(state))
    write_json(directory / CONFIG, _config(checkpoint, state, Path(place or directory).resolve()))
    copy_tokenizer(directory, checkpoint)


def _tensors(state: XLoraState) -> dict[str, Tensor]:
    tensors = {}
    for number, (weight, bias) in zip(_numbers(state), state.layers, strict=True):
        tensors |= {f"{PREFIX}.{number}.weight": weight, f"{PREFIX}.{number}.bias": bias}
    return tensors


def _numbers(state: XLoraState) -> list[int]:
    return classifier_numbers(len(state.layers), state.dropout)


def _config(checkpoint: Checkpoint, state: XLoraState, place: Path) -> dict[str, Any]:
    return {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.base_model,
        "inference_mode": True,
        "adapters": {str(index): str(place / str(index)) for index in range(checkpoint.num_experts)},
        "hidden_size": state.hidden_size,
        "xlora_depth": len(state.layers),
        "xlora_size": state.layers[0][0].shape[0] if len(state.layers) > 1 else 2048,
        "xlora_dropout_p": state.dropout,
        "layerwise_scalings": state.layerwise,
        "enable_softmax": state.enable_softmax,
        "enable_softmax_topk": state.enable_softmax_topk,
        "softmax_temperature": state.softmax_temperature,
        "top_k_lora": state.top_k,
        "global_scaling_weight": state.global_scaling_weight,
        "scaling_pass_value": 0.0,
        "use_trainable_adapters": False,
    }


def _expressible(checkpoint: Checkpoint, directory: Path) -> XLoraState:
    """The router, once it is known that PEFT computes the same."""
    state = checkpoint.router
    if not isinstance(state, XLoraState):
        found = "no router" if state is None else f"a {type(state).__name__}"
        raise InvalidField(directory, "router", found=found, expected="an X-LoRA classifier, the only router of this format")
    if checkpoint.shared is not None:
        raise InvalidField(directory, "shared", found=checkpoint.shared.name, expected="none: X-LoRA weighs every adapter")
    _check_classifier(state, directory)
    for expert in checkpoint.experts:
        check_plain(expert, directory)
        _check_paths(expert, directory)
    return state


def _check_classifier(state: XLoraState, directory: Path) -> None:
    widths = {weight.shape[0] for weight, _ in state.layers[:-1]}
    wrong = {
        "use_relu": len(state.layers) > 1 and not state.use_relu,
        "bias": any(bias is None for _, bias in state.layers),
        "xlora_size": len(widths) > 1,
        "softmax_topk": state.over_batch,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            expected = "Linears with biases, all inner ones of one width, a ReLU after each, and a softmax for each token"
            raise InvalidField(directory, name, found="a classifier that PEFT does not have", expected=expected)


def _check_paths(expert: Expert, directory: Path) -> None:
    """PEFT drops the first parts of a key up to "model.", and then puts "model." before it: only such modules survive."""
    for module in expert.modules:
        if not module.startswith("model.") or module.startswith("model.model."):
            expected = "modules below model., the only ones that PEFT's X-LoRA loads"
            raise InvalidField(directory, f"{expert.name}: {module}", found="an adapter", expected=expected)
