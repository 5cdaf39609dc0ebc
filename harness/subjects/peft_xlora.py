"""Stock PEFT's X-LoRA behind the protocol. It reads PEFT's X-LoRA directories, and generates as PEFT does, without a cache.

The router's own way is untouched PEFT. Weights and experts that are named are PEFT's too, by public means only: a forward hook
on the classifier returns them in the place of its own, top-k is off and the global weight is 1 for that pass.
What PEFT does not have is absent: the strategies "best", "ensemble" and "round_robin", and the native format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

STRATEGIES = ("router", "single:<i>")


class PeftXLoraLayer:
    """One LoRA layer of the X-LoRA model, alone."""

    def __init__(self, owner: PeftXLoraModel, layer: LoraLayer) -> None:
        self._owner = owner
        self._layer = layer
        self.base_layer, self.lora_A, self.lora_B = layer.base_layer, layer.lora_A, layer.lora_B
        self.scaling = layer.scaling

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """x: (B, S, in); weights: (B, S, E) -> (B, S, out)."""
        scalings = weights.unsqueeze(2).expand(-1, -1, self._owner.num_layers, -1)
        with self._owner.plain_weights():
            return self._layer(x, scalings=scalings)


class PeftXLoraModel(nn.Module):
    """See the protocol; `peft` is the PeftModel."""

    def __init__(self, peft: PeftModel) -> None:
        super().__init__()
        self.peft = peft
        self._given: Tensor | None = None
        self.router.register_forward_hook(self._instead)

    @property
    def router(self) -> nn.Module:
        return self.peft.base_model.internal_xlora_classifier

    @property
    def config(self) -> object:
        return self.peft.get_base_model().config

    @property
    def num_experts(self) -> int:
        return self.router.n_classes

    @property
    def num_layers(self) -> int:
        return self.router.n_layers

    @property
    def last_routing_weights(self) -> Tensor | None:
        """What the layers made of the last scalings, (B, S, L, E): after top-k and its softmax, times the global weight."""
        scalings = self.peft.base_model.get_latest_scalings()
        if scalings is None:
            return None
        layers = [layer.forward.__self__.get_maybe_topk_scalings(scalings) for layer in self._lora_layers().values()]
        return torch.stack(layers, dim=2) * self.peft.base_model.get_global_scaling_weight()

    def routed_layers(self) -> dict[str, PeftXLoraLayer]:
        return {name: PeftXLoraLayer(self, layer) for name, layer in self._lora_layers().items()}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        routing_weights: Tensor | None = None,
        expert_id: int | Tensor | None = None,
        past_key_values: object | None = None,
        use_cache: bool | None = None,
    ) -> MoeCausalLMOutputWithPast:
        given = self._as_scalings(input_ids, routing_weights, expert_id)
        options = {"past_key_values": past_key_values, "use_cache": use_cache}
        with self._routed_by(given):
            output = self.peft(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                position_ids=_positions(attention_mask, input_ids.shape[1]),
                **{name: value for name, value in options.items() if value is not None},
            )
        return MoeCausalLMOutputWithPast(loss=output.loss, logits=output.logits, past_key_values=output.past_key_values)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, strategy: str = "router", **options: object
    ) -> Tensor:
        """(B, S) -> (B * num_return_sequences, S + new); options of transformers' generate."""
        kind, _, number = strategy.partition(":")
        if strategy != "router" and not (kind == "single" and number.isdecimal() and int(number) < self.num_experts):
            legal = f"{', '.join(STRATEGIES)}, i from 0 to {self.num_experts - 1}"
            raise ValueError(f"strategy {strategy!r}, but should be one of {legal}")
        given = None if strategy == "router" else self._as_scalings(input_ids[:1, :1], None, int(number))
        with self._routed_by(given):
            return self.peft.generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """PEFT's own, in PEFT's layout."""
        self.peft.save_pretrained(str(directory))

    @contextmanager
    def plain_weights(self) -> Iterator[None]:
        """Weights are mixed as they are: no top-k, no softmax over it, a global weight of 1."""
        xlora, config = self.peft.base_model, self.router.config
        before = config.top_k_lora, config.enable_softmax_topk, config.global_scaling_weight
        xlora.set_topk_lora(None)
        xlora.set_global_scaling_weight(1.0)
        config.enable_softmax_topk = False
        try:
            yield
        finally:
            config.top_k_lora, config.enable_softmax_topk, config.global_scaling_weight = before

    @contextmanager
    def _routed_by(self, given: Tensor | None) -> Iterator[None]:
        if given is None:
            yield
            return
        self._given = given
        try:
            with self.plain_weights():
                yield
        finally:
            self._given = None

    def _instead(self, module: nn.Module, args: tuple, scalings: Tensor) -> Tensor | None:
        return None if self._given is None else self._given.to(scalings).expand_as(scalings)

    def _as_scalings(self, ids: Tensor, weights: Tensor | None, expert_id: int | Tensor | None) -> Tensor | None:
        """(B|1, S|1, L|1, E), or None where the classifier decides."""
        if weights is not None:
            return weights if weights.dim() == 4 else weights.unsqueeze(2)
        if expert_id is None:
            return None
        experts = torch.as_tensor(expert_id, device=ids.device).reshape(-1, 1, 1)
        if not 0 <= int(experts.min()) <= int(experts.max()) < self.num_experts:
            raise IndexError(f"expert_id {expert_id}, but should be from 0 to {self.num_experts - 1}")
        return nn.functional.one_hot(experts, self.num_experts)

    def _lora_layers(self) -> dict[str, LoraLayer]:
        return {name: m for name, m in self.peft.get_base_model().named_modules() if isinstance(m, LoraLayer)}


class PeftXLoraSubject:
    name = "peft-xlora"
    formats = ("peft-xlora",)
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
        if assume:
            raise ValueError(f"PEFT's X-LoRA takes everything from the files, but was told {', '.join(assume)}")
        config = PeftConfig.from_pretrained(str(checkpoint))
        if config.peft_type != "XLORA":
            raise ValueError(f"{checkpoint}: a {config.peft_type.value} checkpoint, which PEFT's X-LoRA does not read")
        config.use_trainable_adapters = True  # else PEFT freezes the experts; the laws ask what their gradients are
        # A moved checkpoint records where its experts were. Where they still are PEFT reads them there, and must: the copies that
        # its save_pretrained puts inside hold base weights, whose names send its loader round an endless loop (0.21.2).
        # The file's order is PEFT's order.
        inside = {name: str(Path(checkpoint) / name) for name in config.adapters}
        config.adapters = {name: path if Path(path).is_dir() else inside[name] for name, path in config.adapters.items()}
        base = AutoModelForCausalLM.from_pretrained(
            base_model or config.base_model_name_or_path, dtype=dtype or "auto", local_files_only=True
        )
        base.config.use_cache = False  # PEFT refuses to load otherwise
        return PeftXLoraModel(PeftModel.from_pretrained(base, str(checkpoint), config=config)).to(device).eval()

    def detach(self, model: PeftXLoraModel) -> PreTrainedModel:
        return model.peft.base_model.lora_model.unload()


def _positions(mask: Tensor | None, length: int) -> Tensor | None:
    """Counted from the first real token, as transformers' generate does and its forward does not."""
    return None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def make() -> PeftXLoraSubject:
    return PeftXLoraSubject()
