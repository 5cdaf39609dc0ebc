"""What the router of a whole model sees of a pass: embeddings, or the last hidden states of a pass of its own.

Shapes: B batch, S sequence, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from dylo_moe.caches import feature_half
from dylo_moe.guessing import Guesses
from dylo_moe.mixture import Mixture
from dylo_moe.pair_cost import PairCost

# What only the full model understands; the decoder below its head gets the rest.
_HEAD_ARGUMENTS = ("labels", "logits_to_keep", "num_items_in_batch", "return_dict")
_RECORDING_ARGUMENTS = ("output_hidden_states", "output_attentions", "output_router_logits")
# Features that a pass of their own makes -> the weight of every expert in it.
_WEIGHTS = {"base": 0.0, "all_experts": 1.0}


class Sight:
    """Of one model.

    Args:
        causal_lm: the transformers model.
        mixture: what its layers mix.
        features: one of ROUTER_FEATURES; "layer" is not seen here.
    """

    def __init__(self, causal_lm: PreTrainedModel, mixture: Mixture, features: str) -> None:
        self.causal_lm = causal_lm
        self.mixture = mixture
        self.weight = _WEIGHTS.get(features)  # None: no pass of its own

    def of(self, inputs: dict[str, Any], guesses: Guesses | None) -> Tensor:
        """(B, S, H). inputs: of the model's forward pass; where it has a cache, they get it.

        guesses: of the generation that the pass is a step of, if any.
        """
        return self._embeddings(inputs) if self.weight is None else self._hidden_states(inputs, guesses)

    def guesses(self, cost: PairCost) -> Guesses | None:
        """For a new generation; None where no pass can run ahead."""
        # Rows of weight 0 would still have the shared adapter.
        if self.weight is None or (self.mixture.shared is not None and self.weight == 0):
            return None
        return Guesses(self.causal_lm, self.mixture, self.weight, cost)

    def _embeddings(self, inputs: dict[str, Any]) -> Tensor:
        if inputs.get("inputs_embeds") is not None:
            return inputs["inputs_embeds"]
        with self.mixture.using(None):  # experts may have embeddings of their own; the router sees the base's
            return self.causal_lm.get_input_embeddings()(inputs["input_ids"])

    @torch.no_grad()
    def _hidden_states(self, inputs: dict[str, Any], guesses: Guesses | None) -> Tensor:
        """After the final norm, (B, S, H), of a pass with no expert or with all of them.

        Without gradient, as in X-LoRA: the base is frozen, and the router learns through its own gate.
        """
        cache = self._cache(inputs)
        if cache is None:
            return self._pass(inputs, None)
        inputs["past_key_values"] = cache
        half = feature_half(cache, self.causal_lm.config.num_hidden_layers)
        if guesses is not None:
            return guesses.features(inputs, half, self._pass)
        return self._pass(inputs, half)

    def _pass(self, inputs: dict[str, Any], cache: Cache | None) -> Tensor:
        """cache: for this pass; None to keep nothing."""
        ignored = (*_HEAD_ARGUMENTS, *_RECORDING_ARGUMENTS, "past_key_values")
        arguments = {name: value for name, value in inputs.items() if name not in ignored}
        if cache is None:
            arguments["use_cache"] = False
        else:
            arguments["past_key_values"] = cache
        route = None
        if self.weight:
            route = torch.full((1, 1, self.mixture.num_experts), self.weight, device=self.causal_lm.device)
        with self.mixture.using(route):
            return self.causal_lm.base_model(**arguments, return_dict=True).last_hidden_state

    def _cache(self, inputs: dict[str, Any]) -> Cache | None:
        if inputs.get("past_key_values") is not None:
            return inputs["past_key_values"]
        wanted = inputs.get("use_cache")
        if wanted is None:
            wanted = getattr(self.causal_lm.config, "use_cache", False) and not self.causal_lm.training
        return DynamicCache(config=self.causal_lm.config) if wanted else None
