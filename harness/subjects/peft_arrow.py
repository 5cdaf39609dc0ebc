"""Stock PEFT's Arrow behind the protocol: create_arrow_model on the directories of a saved one, with the settings it records.

PEFT itself cannot load what it saved. What PEFT's Arrow does not have is absent, and the laws about it are not applicable:
weights that are given, the weights that were used, single layers, training, every strategy but the router's and single experts',
and the native format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

STRATEGIES = ("router", "single:<i>")
ROUTER = "arrow_router"
ASSUMED = ("top_k", "temperature", "rng_seed", "genknowsub")


class PeftArrowModel(nn.Module):
    """See the protocol; `peft` is the PeftModel. Experts that are named are PEFT's adapters, alone."""

    def __init__(self, peft: PeftModel) -> None:
        super().__init__()
        self.peft = peft

    @property
    def config(self) -> object:
        return self.peft.get_base_model().config

    @property
    def expert_names(self) -> list[str]:
        return self.peft.peft_config[ROUTER].arrow_config.task_adapter_names

    @property
    def num_experts(self) -> int:
        return len(self.expert_names)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        expert_id: int | Tensor | None = None,
        past_key_values: object | None = None,
        use_cache: bool | None = None,
    ) -> MoeCausalLMOutputWithPast:
        options = {"past_key_values": past_key_values, "use_cache": use_cache}
        adapters = None
        if isinstance(expert_id, Tensor) and expert_id.dim() == 1:
            adapters, expert_id = [self._name(e) for e in expert_id.tolist()], None
        with self._active(ROUTER if expert_id is None else self._name(expert_id)):
            output = self.peft(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                position_ids=_positions(attention_mask, input_ids.shape[1]),
                **({} if adapters is None else {"adapter_names": adapters}),
                **{name: value for name, value in options.items() if value is not None},
            )
        return MoeCausalLMOutputWithPast(loss=output.loss, logits=output.logits, past_key_values=output.past_key_values)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, strategy: str = "router", **options: Any
    ) -> Tensor:
        """(B, S) -> (B * num_return_sequences, S + new); options of transformers' generate."""
        kind, _, number = strategy.partition(":")
        if strategy != "router" and not (kind == "single" and number.isdecimal() and int(number) < self.num_experts):
            legal = f"{', '.join(STRATEGIES)}, i from 0 to {self.num_experts - 1}"
            raise ValueError(f"strategy {strategy!r}, but should be one of {legal}")
        with self._active(ROUTER if strategy == "router" else self._name(int(number))):
            return self.peft.generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """PEFT's own, in PEFT's layout."""
        self.peft.save_pretrained(str(directory))

    def _name(self, expert_id: int) -> str:
        if not 0 <= int(expert_id) < self.num_experts:
            raise IndexError(f"expert_id {expert_id}, but should be from 0 to {self.num_experts - 1}")
        return self.expert_names[int(expert_id)]

    @contextmanager
    def _active(self, adapter: str) -> Iterator[None]:
        self.peft.set_adapter(adapter)
        try:
            yield
        finally:
            self.peft.set_adapter(ROUTER)


class PeftArrowSubject:
    name = "peft-arrow"
    formats = ("peft-arrow",)
    strategies = STRATEGIES

    def load(
        self,
        checkpoint: Path,
        *,
        base_model: str | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        assume: Mapping[str, object] | None = None,
    ) -> nn.Module:
        """assume: any of top_k, temperature, rng_seed, genknowsub ("subtracted" turns use_gks off)."""
        unknown = sorted(set(assume or {}) - set(ASSUMED))
        if unknown:
            raise ValueError(f"PEFT's Arrow cannot be told {', '.join(unknown)}, only {', '.join(ASSUMED)}")
        recorded, base = _recorded(Path(checkpoint))
        choices = _choices(recorded, dict(assume or {}))
        model = AutoModelForCausalLM.from_pretrained(base_model or base, dtype=dtype or "auto", local_files_only=True)
        peft = create_arrow_model(
            model,
            [str(Path(checkpoint) / name) for name in recorded["task_adapter_names"]],
            choices,
            general_adapter_paths=[str(Path(checkpoint) / name) for name in recorded["gks_adapter_names"] or ()] or None,
        )
        return PeftArrowModel(peft).to(device).eval()

    def detach(self, model: PeftArrowModel) -> PreTrainedModel:
        return model.peft.unload()


def _recorded(checkpoint: Path) -> tuple[dict[str, Any], str | None]:
    """(arrow_config, base model)."""
    path = checkpoint / ROUTER / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{checkpoint}: no {ROUTER}/adapter_config.json, without which it is no Arrow checkpoint")
    config = json.loads(path.read_text(encoding="utf-8"))
    return config["arrow_config"], config["base_model_name_or_path"]


def _choices(recorded: Mapping[str, Any], assume: Mapping[str, Any]) -> ArrowConfig:
    subtracted = assume.get("genknowsub") == "subtracted"
    return ArrowConfig(
        top_k=assume.get("top_k", recorded["top_k"]),
        router_temperature=assume.get("temperature", recorded["router_temperature"]),
        rng_seed=assume.get("rng_seed", recorded["rng_seed"]),
        use_gks=recorded["use_gks"] and not subtracted,
    )


def _positions(mask: Tensor | None, length: int) -> Tensor | None:
    """Counted from the first real token, as transformers' generate does and its forward does not."""
    return None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def make() -> PeftArrowSubject:
    return PeftArrowSubject()
