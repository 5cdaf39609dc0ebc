"""DyLoRA_MoE: a frozen base, its LoRA experts and a router, run in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from dylo_moe.config import MoELoraConfig
from dylo_moe.errors import RoutingError
from dylo_moe.expert import ExpertManager, expert_order
from dylo_moe.formats import Checkpoint, write_native
from dylo_moe.guard import guard, unguard
from dylo_moe.mixture import Mixture
from dylo_moe.quantised import keep_layout, lay_out
from dylo_moe.replaced import check_versions, has_biases, saved_modules
from dylo_moe.routable import notes_on, restore_layers, routable_layers, route_layers, routed_units
from dylo_moe.routed import RoutedLinear
from dylo_moe.router import load_balancing_loss
from dylo_moe.routing import Routing
from dylo_moe.saving import stored_expert, stored_router
from dylo_moe.strategies import Strategy, generate_with_strategy, parse_strategy
from dylo_moe.xlora_router import XLoraRouter


class DyLoRA_MoE(nn.Module):
    """A PeftModel with several LoRA adapters whose Linears are mixed per token by a router.

    Build it with `attach_router` or `load_checkpoint`.

    Args:
        peft_model: a PeftModel; each LoRA adapter is an expert (see `expert.expert_order`).
        router: maps (batch, seq, hidden) to (batch, seq, experts) or (batch, seq, layers, experts); or a ModuleList with one gate
            per routed layer, for the features "layer"; None if every call names weights, expert or strategy.
        config: how to route; None takes the router's own values and the features "base".

    Raises:
        RoutingError: adapters that are not a LoRA or DoRA on Linear or Conv1D, or numbers of experts that disagree.

    Attributes:
        notes: what to know about experts that are not sums of deltas, one line each.
    """

    def __init__(self, peft_model: PeftModel, router: nn.Module | None, config: MoELoraConfig | None = None) -> None:
        super().__init__()
        shared = config.shared_adapter if config is not None else None
        names = expert_order([name for name in peft_model.peft_config if name != shared])
        self.moe_config = config or _default_config(router, len(names))
        if not self.moe_config.use_moe_routing:
            raise RoutingError("config.use_moe_routing is False; use the PeftModel itself for plain LoRA")
        layers = routable_layers(peft_model.get_base_model())
        mixture = Mixture(names, shared)
        _check_shared(peft_model, shared)
        _check_counts(router, self.moe_config, names)
        _check_router_values(router, self.moe_config)
        _check_no_biases(peft_model)
        versions = saved_modules(peft_model.get_base_model())
        check_versions(versions, mixture, self.moe_config.router_features)
        self.notes = notes_on(layers, versions)
        units = routed_units(peft_model.get_base_model(), layers, mixture, self.moe_config.routing_level)
        _check_router_width(router, self.moe_config.router_features, peft_model.get_base_model(), units)
        self._units = tuple(units)
        self.peft_model = peft_model
        self.router = router
        self.mixture = mixture
        self.expert_manager = ExpertManager(peft_model)
        self._trainable_before = {n: p.requires_grad for n, p in peft_model.named_parameters()}
        self._laid_out = keep_layout(self.causal_lm)
        route_layers(self.causal_lm, layers, mixture, units)
        guard(peft_model)
        self.routing = Routing(self.causal_lm, self.mixture, router, self.moe_config.router_features)
        # The router must not be dense because nobody called eval() on it while the model was evaluated.
        self.training = self.causal_lm.training
        if router is not None:
            router.to(self.device).train(self.training)
        if any(self._trainable_before.values()):
            self.expert_manager.activate_all_experts()

    @property
    def causal_lm(self) -> PreTrainedModel:
        return self.peft_model.get_base_model()

    @property
    def config(self) -> Any:
        return self.causal_lm.config

    @property
    def generation_config(self) -> Any:
        return self.causal_lm.generation_config

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.causal_lm.dtype

    @property
    def expert_names(self) -> list[str]:
        return self.mixture.expert_names

    @property
    def num_experts(self) -> int:
        return self.mixture.num_experts

    @property
    def features(self) -> str:
        return self.routing.features

    @property
    def last_routing_weights(self) -> Tensor | None:
        """Weights of the last forward pass, (batch, seq, experts), or (batch, seq, layers, experts) where each layer has
        its own; one-hot when an expert was named; None before the first pass. During generation: of the last step."""
        return self.routing.last_weights

    @property
    def last_guesses(self) -> tuple[int, int] | None:
        """Of the last generation whose router needed a pass of its own: steps that were guessed before they came, and how many of
        them came so. None before the first one."""
        guesses = self.routing.guesses
        return None if guesses is None else (guesses.made, guesses.right)

    def routed_layers(self) -> dict[str, RoutedLinear]:
        """The routed layers in module order, by their name in the base model."""
        return {n: m for n, m in self.causal_lm.named_modules() if isinstance(m, RoutedLinear)}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        routing_weights: Tensor | None = None,
        expert_id: int | Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **model_inputs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """One routed pass.

        Args:
            input_ids, attention_mask: (batch, seq); the mask covers the cached tokens too.
            labels: (batch, seq), -100 where there is no loss. `loss` is then the base model's loss plus
                router_aux_loss_coef times `aux_loss`; `aux_loss` is there only if the router chose the weights.
            routing_weights: (batch, seq, experts) or (batch, seq, layers, experts), used instead of the router.
                A sequence length of 1 broadcasts.
            expert_id: one expert for all rows, or (batch,) ids; used instead of the router.
            past_key_values: a cache that this model returned, or an empty one.
            model_inputs: what the base model's forward takes: inputs_embeds, position_ids, logits_to_keep, ...

        Raises:
            UnknownExpert, RoutingError, CacheWithoutFeatures.
        """
        if self.routing.removed:
            raise RoutingError("this model was detached; attach_router makes another one of its PeftModel")
        with self.routing.forcing(None), self.routing.recording() as recorded:
            output = self.peft_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                routing_weights=routing_weights,
                expert_id=expert_id,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **{**model_inputs, "return_dict": True},
            )
        loss, aux_loss = output.loss, self._aux_loss(recorded, attention_mask)
        if loss is not None and aux_loss is not None:
            loss = loss + self.moe_config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=output.logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        strategy: str = "router",
        routing_weights: Tensor | None = None,
        expert_id: int | Tensor | None = None,
        first_sample: int = 0,
        seeds: list[int] | None = None,
        **options: Any,
    ) -> Any:
        """transformers' `generate`, routed. Every option of it is passed on.

        Args:
            inputs: token ids (batch, seq); also accepted as `input_ids`.
            strategy: "router", "single:<i>", "best", "ensemble", "round_robin", or "base" (every adapter off).
            routing_weights: (experts,) or (batch, experts), fixed for all tokens; instead of a strategy.
            expert_id: one id or (batch,) ids; instead of a strategy.
            first_sample: index of the first returned row, for "round_robin": row b uses expert (first_sample + b) % E.
            seeds: with do_sample, one seed per returned row: a row's draws then do not depend on the other rows.

        Raises:
            UnknownStrategy: the message names the legal ones. UnknownExpert, RoutingError.
        """
        inputs = options.pop("input_ids", None) if inputs is None else inputs
        given = routing_weights if routing_weights is not None else expert_id
        if given is not None and (strategy != "router" or (routing_weights is not None and expert_id is not None)):
            raise RoutingError("give one of strategy, routing_weights and expert_id, not several")
        if isinstance(routing_weights, Tensor) and not routing_weights.is_floating_point():
            given = routing_weights.to(torch.float32)  # a one-hot row of integers is no list of expert ids
        if given is None:
            has_router = self.router is not None or self.mixture.active_expert is not None
            chosen = parse_strategy(strategy, self.num_experts, has_router=has_router)
        else:
            chosen = Strategy("given", route=given)
        return generate_with_strategy(
            self, inputs, attention_mask, chosen, first_sample=first_sample, seeds=seeds, options=options
        )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        """As transformers', with its options (a Trainer gives every_n_layers and offload). Non-reentrant checkpointing only
        (transformers' default): the other kind loses the router's gradient, which torch reports as an error."""
        self.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.causal_lm.gradient_checkpointing_disable()

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes the native format: experts that stock PEFT loads, router.safetensors and moe_config.json.

        Loading it gives every tensor back bitwise.

        Raises:
            CheckpointError: the directory holds something else. RoutingError: a router that no checkpoint can describe.
        """
        write_native(save_directory, self._as_checkpoint(Path(save_directory)))

    def _aux_loss(self, recorded: list[Tensor], attention_mask: Tensor | None) -> Tensor | None:
        if not recorded:
            return None
        weights, mask = recorded[-1], None
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -weights.shape[1] :]
        return load_balancing_loss(weights, self.moe_config.load_balance_loss_type, mask)

    def _as_checkpoint(self, path: Path) -> Checkpoint:
        experts = tuple(stored_expert(name, self.causal_lm) for name in self.expert_names)
        config, shared = self.moe_config, self.mixture.shared
        return Checkpoint(
            path=path,
            format="dylo-moe",
            base_model=self.causal_lm.config.name_or_path or None,
            experts=experts,
            router=stored_router(self.router, self._units, self.features, config.routing_level),
            shared=None if shared is None else stored_expert(shared, self.causal_lm),
            load_balance={
                "load_balance_loss_type": config.load_balance_loss_type,
                "router_aux_loss_coef": config.router_aux_loss_coef,
            },
        )


def attach_router(peft_model: PeftModel, router: nn.Module | None, config: MoELoraConfig | None = None) -> DyLoRA_MoE:
    """Routes a plain PeftModel: from now on its LoRA adapters are experts, mixed by the router instead of summed.

    The PeftModel itself is routed too; `detach_router` gives it back exactly as it was.
    """
    return DyLoRA_MoE(peft_model, router, config)


def detach_router(model: DyLoRA_MoE) -> PeftModel:
    """Takes the routing off again and returns the PeftModel: its own layers, flags and hooks as before `attach_router`.

    Parameters keep what training made of them. The DyLoRA_MoE object is of no more use.
    """
    if not isinstance(model, DyLoRA_MoE):
        raise RoutingError(f"detach_router takes the model that attach_router returned, not a {type(model).__name__}")
    if model.routing.removed:
        raise RoutingError("this model was detached already; its PeftModel may be routed by another one")
    if has_biases(model.causal_lm):
        raise RoutingError("experts have biases of their own, for which a PeftModel has no place; save_pretrained keeps them")
    model.routing.remove()
    restore_layers(model.causal_lm)
    lay_out(model._laid_out)
    unguard(model.peft_model)
    for name, parameter in model.peft_model.named_parameters():
        parameter.requires_grad_(model._trainable_before.get(name, parameter.requires_grad))
    return model.peft_model


def _default_config(router: nn.Module | None, num_experts: int) -> MoELoraConfig:
    per_layer = isinstance(router, nn.ModuleList)
    kind = "gates" if per_layer else "xlora" if isinstance(router, XLoraRouter) else "dynamic_hybrid"
    return MoELoraConfig(
        num_experts=num_experts,
        top_k_experts=getattr(router, "top_k", None) or 1,
        router_temperature=getattr(router, "temperature", None) or 2.0,
        router_type=kind,
        router_features="layer" if per_layer else "base",
    )


def _check_shared(peft_model: PeftModel, shared: str | None) -> None:
    if shared is not None and shared not in peft_model.peft_config:
        found = ", ".join(peft_model.peft_config)
        raise RoutingError(f"config.shared_adapter={shared!r}, but should be None or one of the adapters {found}")


def _check_counts(router: nn.Module | None, config: MoELoraConfig, names: list[str]) -> None:
    counts = {"adapters": len(names), "config.num_experts": config.num_experts}
    for index, gate in enumerate(router if isinstance(router, nn.ModuleList) else [router]):
        if hasattr(gate, "num_experts"):
            counts[f"router[{index}].num_experts" if gate is not router else "router.num_experts"] = gate.num_experts
    if len(set(counts.values())) != 1:
        raise RoutingError("the number of experts differs: " + ", ".join(f"{k}={v}" for k, v in counts.items()))


def _check_router_values(router: nn.Module | None, config: MoELoraConfig) -> None:
    if isinstance(router, nn.ModuleList) and config.router_features != "layer":
        raise RoutingError(f"router_features={config.router_features!r}, but a router per layer has the features 'layer'")
    if isinstance(router, nn.ModuleList) and config.routing_level == "linear" and any(map(_is_switch, router)):
        raise RoutingError(
            "routing_level='linear', but gates of the rule switch need 'feed_forward': they hand an MLP's input on"
        )
    for field, name in (("top_k_experts", "top_k"), ("router_temperature", "temperature")):
        found = getattr(router, name, None)
        if found is not None and found != getattr(config, field):
            raise RoutingError(f"config.{field}={getattr(config, field)}, but the router's {name} is {found}")


def _is_switch(gate: nn.Module) -> bool:
    return getattr(gate, "mixlora_switch", None) is not None


def _check_no_biases(peft_model: PeftModel) -> None:
    for name, config in peft_model.peft_config.items():
        if getattr(config, "bias", "none") != "none":
            what = f"adapter {name} was trained with bias={config.bias!r}: PEFT has overwritten the base model's own biases"
            raise RoutingError(f"{what}; load_checkpoint reads its directory beside an intact base")


def _check_router_width(router: nn.Module | None, features: str, causal_lm: PreTrainedModel, units: dict[str, int]) -> None:
    """units: input width by path, of what is routed."""
    if isinstance(router, nn.ModuleList) and len(router) != len(units):
        raise RoutingError(f"{len(router)} gates for {len(units)} routed layers, but should be one each")
    gates = list(router) if isinstance(router, nn.ModuleList) else [router] * len(units)
    if features != "layer":
        gates, units = [router], {"the hidden state": causal_lm.get_input_embeddings().weight.shape[1]}
    for gate, (name, found) in zip(gates, units.items(), strict=True):
        width = getattr(gate, "input_size", None)
        if width is not None and found != width:
            raise RoutingError(f"the router takes inputs of width {width}, but {name} has width {found}")
