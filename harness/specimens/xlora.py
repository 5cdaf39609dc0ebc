"""X-LoRA checkpoints in PEFT's layout, written by hand: neither peft nor the judged package takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from harness.specimens.adapters import Lora, cast, draw, expert_tensors, read_base, write_adapter, write_json

SPREAD = 4.0  # standard deviation of the classifier's logits on features of unit size: near ties are rare
_PREFIX = "base_model.internal_xlora_classifier.layers"


@dataclass(frozen=True)
class XLoraChoices:
    """What the root's adapter_config.json says of the classifier; the names are those of PEFT's XLoraConfig.

    xlora_dropout_p: above 0 it also shifts the classifier's keys: its layers are counted with their dropouts.
    """

    xlora_depth: int = 1
    xlora_size: int = 24
    xlora_dropout_p: float = 0.0
    layerwise_scalings: bool = False
    top_k_lora: int | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    softmax_temperature: float = 1.0
    global_scaling_weight: float = 1.0
    scaling_pass_value: float = 0.0
    use_trainable_adapters: bool = False


def write_xlora_checkpoint(  # noqa: PLR0913  the options of a specimen, all keywords
    directory: str | Path,
    base: str | Path,
    *,
    num_experts: int = 4,
    choices: XLoraChoices | None = None,
    targets: str = "attention",
    ranks: Sequence[int] = (4, 8, 3),
    alphas: Sequence[float] = (8, 8, 9),
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Writes `num_experts` random experts into 0/, 1/ ... and a random classifier at the root; returns the directory.

    Args:
        base: directory with config.json and model.safetensors of one of the families that `write_base` writes. Stock PEFT
            loads X-LoRA experts only below "model.": of these families not of gpt2, and not with targets="lm_head".
        ranks, alphas: cycled over the experts.

    The experts are those of `write_checkpoint` with the same arguments. `adapters` records the absolute paths of the
    experts' directories, as PEFT does.
    """
    directory, source, choices = Path(directory), read_base(Path(base)), choices or XLoraChoices()
    for index in range(num_experts):
        lora = Lora(ranks[index % len(ranks)], alphas[index % len(alphas)], False, source.targets(targets))
        adapter = expert_tensors(source, lora, index=index, seed=seed)
        write_adapter(directory / str(index), source, lora, cast(adapter, dtype))
    outputs = num_experts * (len(adapter) // 2 if choices.layerwise_scalings else 1)
    tensors = cast(classifier_tensors(choices, source.hidden_size, outputs, seed=seed), dtype)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "XLORA",
            "task_type": "CAUSAL_LM",
            "auto_mapping": None,
            "base_model_name_or_path": str(source.path),
            "revision": None,
            "inference_mode": True,
            "hidden_size": source.hidden_size,
            "adapters": {str(index): str((directory / str(index)).resolve()) for index in range(num_experts)},
            **vars(choices),
        },
    )
    return directory


def classifier_tensors(choices: XLoraChoices, hidden_size: int, outputs: int, *, seed: int) -> dict[str, Tensor]:
    """The classifier under PEFT's names, in float64: weights (out, in) and biases (out,) of `xlora_depth` Linears."""
    stride = 3 if choices.xlora_dropout_p > 0 else 2
    widths = [hidden_size, *[choices.xlora_size] * (choices.xlora_depth - 1), outputs]
    tensors = {}
    for number in range(choices.xlora_depth):
        inputs, rows = widths[number : number + 2]
        is_last = number == choices.xlora_depth - 1
        # A ReLU halves the mean square: 2 restores it, so that logits spread alike at every depth.
        gain = (SPREAD if is_last else 1.0) * (1.0 if number == 0 else 2**0.5)
        key = f"{_PREFIX}.{stride * number}"
        tensors[f"{key}.weight"] = draw((rows, inputs), seed, f"{key}.weight") * gain / inputs**0.5
        tensors[f"{key}.bias"] = draw((rows,), seed, f"{key}.bias") * 0.5
    return tensors
