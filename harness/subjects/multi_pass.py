"""DyLoRA-MoE's first generation as a subject: logits = sum_e w_e f_e(ids), a full pass per expert, w averaged over each row.

It is what users compare a single pass with, and not equal to it: the laws say where it differs. Experts, router and files are
the naive loop's; only the mixing is another, so every law that a mixture in the layers alone keeps is broken here on purpose.
"""

from __future__ import annotations

from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from harness.subjects.naive_loop import NaiveLoopModel, NaiveLoopSubject


class MultiPassModel(NaiveLoopModel):
    """NaiveLoopModel with E passes and mixed logits. Weights for each layer are averaged over the layers: passes know none."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        routing_weights: Tensor | None = None,
        expert_id: int | Tensor | None = None,
    ) -> MoeCausalLMOutputWithPast:
        weights = self.explicit_weights(input_ids, routing_weights, expert_id)
        chosen_by_router = weights is None
        if chosen_by_router and self.features == "layer":  # each layer's input is known only within a pass
            super().forward(input_ids, attention_mask)
            weights = self.last_routing_weights
        elif chosen_by_router:
            weights = self.router(self.router_features(input_ids, attention_mask))
        weights = weights.mean(dim=2) if weights.dim() == 4 else weights
        passes = [super(MultiPassModel, self).forward(input_ids, attention_mask, expert_id=e) for e in range(self.num_experts)]
        self.last_routing_weights = weights.detach()
        by_row = _mean_over_tokens(weights, attention_mask)
        logits = sum(by_row[:, e, None, None].to(found.logits.dtype) * found.logits for e, found in enumerate(passes))
        if labels is None:
            return MoeCausalLMOutputWithPast(logits=logits)
        loss = self.base.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        auxiliary = self.load_balance(weights, attention_mask) if chosen_by_router else None
        if auxiliary is not None:
            loss = loss + self.balance.get("router_aux_loss_coef", 0.01) * auxiliary
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=auxiliary, logits=logits)


def _mean_over_tokens(weights: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, E) -> (B, E), padding not counted."""
    if mask is None:
        return weights.mean(dim=1)
    counted = mask.to(weights)[..., None]
    return (weights * counted).sum(dim=1) / counted.sum(dim=1)


class MultiPassSubject(NaiveLoopSubject):
    name = "multi-pass"
    formats = ("dylo-moe",)
    model_class = MultiPassModel


def make() -> MultiPassSubject:
    return MultiPassSubject()
