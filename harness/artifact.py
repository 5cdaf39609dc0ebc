"""A checkpoint as the judge knows it: float64 arrays, whatever the layout. harness/readings says how they get here.

r rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from harness.packed import as_on_any_processor, dequantised
from harness.routers import HybridGate, Router


@dataclass(frozen=True)
class Adapter:
    """One expert on one Linear: delta(x) = scaling * (B (A x) + bias); lora_A (r, I), lora_B (O, r), float64.

    bias: (O,) or None, of B, which is PEFT's lora_bias. magnitude: (O,) or None; with it, the expert is DoRA
    (arXiv 2402.09353, eq. 5): magnitude / |W + scaling B A| * (W x + scaling B A x) in place of W x, the norm of each row.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    scaling: float
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None


class Expert(dict[str, Adapter]):
    """Module's path in the base model -> its Adapter, and what the expert has beside them, in float64.

    replaced: path of a module -> its parameters by name, in the expert's own version (PEFT's modules_to_save);
    biases: path of a module -> the expert's own version of its bias (PEFT's bias).
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        replaced: Mapping[str, Mapping[str, np.ndarray]] | None = None,
        biases: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        super().__init__(adapters)
        self.replaced, self.biases = dict(replaced or {}), dict(biases or {})


def versions_of(expert: Mapping[str, Adapter]) -> dict[str, dict[str, np.ndarray]]:
    """Path of a module -> those of its parameters that the expert has in a version of its own."""
    if not isinstance(expert, Expert):
        return {}
    return {module: dict(parameters) for module, parameters in expert.replaced.items()} | {
        module: {"bias": bias} for module, bias in expert.biases.items()
    }


@dataclass(frozen=True)
class Artifact:
    """A checkpoint as the judge understands it.

    experts[e] maps a module's path in the base model to its Adapter; names[e] is the expert's name;
    adapter_directories[e] is where stock PEFT finds it, None where the layout has no such directory.
    shared: adapters that are no expert, by module: added with weight 1 whatever the routing.
    feed_forwards: paths of the networks that are mixed as a whole; empty where each Linear is mixed.
    reader says who read the files.
    """

    path: Path
    base: str | None
    names: tuple[str, ...]
    experts: tuple[Mapping[str, Adapter], ...]
    router: Router | None
    balance: Mapping[str, Any]
    adapter_directories: tuple[Path | None, ...]
    reader: str
    shared: Mapping[str, Adapter] = field(default_factory=dict)
    feed_forwards: tuple[str, ...] = ()
    base_config: Mapping[str, Any] | None = None
    base_state: Mapping[str, Tensor] | None = field(default=None, repr=False)

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that hold an expert's adapter, sorted."""
        return tuple(sorted({module for expert in self.experts for module in expert}))

    @property
    def versioned(self) -> tuple[str, ...]:
        """Paths of the modules that some expert has, or whose bias it has, in a version of its own, sorted."""
        return tuple(sorted({module for expert in self.experts for module in versions_of(expert)}))

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def balance_kind(self) -> str:
        """The load-balancing loss: DyLoRA-MoE's unless recorded; no other format has one at inference or fine-tuning."""
        published = "mse" if self.router is None or isinstance(self.router, HybridGate) else "none"
        return self.balance.get("load_balance_loss_type", published)


def load_base(artifact: Artifact, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The base model alone, through transformers, in eval mode. attention: "eager", "sdpa" or None for the default."""
    options = {} if attention is None else {"attn_implementation": attention}
    config = _base_config(artifact)
    if artifact.base_state is not None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in artifact.base_state.items()}, strict=False)
        model.tie_weights()
    else:
        model = AutoModelForCausalLM.from_pretrained(artifact.base, config=config, dtype=dtype, **options)
        if getattr(config, "quantization_config", None) is not None and dtype == torch.float64:
            model = dequantised(model).to(dtype)  # what the stored numbers stand for, without the kernel's own rounding
    return as_on_any_processor(model).eval().requires_grad_(False)


def _base_config(artifact: Artifact) -> PreTrainedConfig:
    """The checkpoint's own copy of the base's configuration, or the base's; upstream renames its model_type."""
    recorded = artifact.base_config or {}
    types = [recorded.get("model_type"), recorded.get("_dylora_original_type")]
    known = next((name for name in types if name in CONFIG_MAPPING), None)
    if known is None:
        return AutoConfig.from_pretrained(artifact.base)
    fields = {name: value for name, value in recorded.items() if not name.startswith("_") and name != "model_type"}
    return AutoConfig.for_model(known, **fields)
