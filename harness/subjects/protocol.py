"""What an implementation has to offer to be judged.

Only `name` and `load` are required; what else is missing makes the checks that need it "not applicable".

A subject may also say what it does not do:
    formats: names of the checkpoint formats that it reads, of dylo_moe.formats; the native one, "dylo-moe", unless it says so.
        Without --checkpoint it is judged on specimens in these formats; laws that compare two checkpoints need the native one.
    strategies: those that `generate` knows; all of them unless it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel


class Subject(Protocol):
    """An implementation of LoRA mixtures of experts.

    `load` returns a model with:
        model(input_ids (B, S), attention_mask (B, S), labels=None, *, routing_weights=None, expert_id=None)
            -> an object with .logits (B, S, V), .loss and .aux_loss
            routing_weights (B, S, E) or (B, S, L, E), expert_id int or (B,); with neither the router decides
        model.generate(input_ids, attention_mask, *, strategy, first_sample=0, max_new_tokens, do_sample,
            num_return_sequences, ...) -> (rows, S + new) token ids
            strategy "router", "single:<i>", "best", "ensemble" or "round_robin"
        model.num_experts, model.config, model.last_routing_weights (B, S, E) or (B, S, L, E)
        model.router, whose parameters are the gate's weight and bias; of an X-LoRA classifier those of each Linear; of gates per
            routed unit those of each in turn, in the base model's order of modules (and then of AdaMoLE's threshold gate)
        model.expert_names, adapter names in the order of the weights' columns; the checkpoint's own unless it is there
        model.routed_layers() -> {path in the base model: layer}
            layer.mix(x (B, S, in), weights (B, S, E)) -> (B, S, out)
            layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        model.save_pretrained(directory), in the native format.
    """

    name: str

    def load(
        self,
        checkpoint: Path,
        *,
        base_model: str | None,
        device: str,
        dtype: str | None,
        assume: Mapping[str, object] | None = None,
    ) -> nn.Module:
        """The routed model of a checkpoint, on `device`, in `dtype` (the checkpoint's own for None).

        assume: what the user states because no file records it: options of dylo_moe.read_checkpoint, as {"lora_alpha": 32}.
        """
        ...


class DetachingSubject(Subject, Protocol):
    """A subject that can also give the base model back."""

    def detach(self, model: nn.Module) -> PreTrainedModel:
        """Take experts and routing off; the returned base model must be as if it had never been routed."""
        ...


class DetectingSubject(Subject, Protocol):
    """A subject that names a checkpoint's format."""

    def detect(self, checkpoint: Path) -> str: ...


class DecodingSubject(Subject, Protocol):
    """A subject that writes EvalPlus samples; see harness/checks/decoder.py for what is asked of the decoder."""

    def decoder(self, checkpoint: Path, **options: object) -> object: ...

    def run_codegen(self, checkpoint: Path, dataset: str, **options: object) -> str:
        """Write the samples of a task set, EvalPlus's options and routing_strategy given; returns the sample file's path."""
        ...
