"""Turns a random checkpoint, as write_checkpoint leaves it, into one whose experts know given lessons: files in, files out."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from harness.specimens.memorising import (
    IGNORED,
    Batch,
    Lesson,
    MixedLinear,
    NotMemorised,
    Routing,
    fit_gate,
    insert_experts,
    memorise,
    routing_of,
)

RANK, ALPHA = 16, 32
TOKEN_MARGIN = 2.0  # logits between the right token and the next; float32 implementations differ by about 1e-5
GATE_MARGIN = 0.05  # the same for the router's logits
LOSS_MARGIN = 0.5  # nats per prompt token between the expert that knows a prompt and the others, for "best"
PREFIX = "base_model.model."


def teach(checkpoint: Path, base: Path, lessons: list[Lesson], *, features: str) -> dict[str, float]:
    """Train the checkpoint's experts and router on the lessons, in place; returns the margins reached.

    features: "base" (last hidden state with the experts off) or "embedding".
    Raises NotMemorised where a margin is not reached.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    experts = sorted((checkpoint / "experts").iterdir(), key=lambda path: int(path.name.rpartition("_")[2]))
    files = [expert / "adapter_model.safetensors" for expert in experts]
    batch = Batch.of(lessons)
    with torch.no_grad():
        seen = model.model(batch.ids).last_hidden_state if features == "base" else model.model.embed_tokens(batch.ids)
    gate, gate_margin = _train_router(checkpoint / "router.safetensors", seen, batch, num_experts=len(files))
    routing, mixed = insert_experts(model, _stacked_downs(files), scaling=ALPHA / RANK)
    routing.weights = routing_of(batch, gate(seen))
    memorise(model, batch, margin=TOKEN_MARGIN)
    _write_experts(files, mixed)
    loss_margin = _prompt_loss_margin(model, routing, batch, num_experts=len(files))
    return _assured({"token": TOKEN_MARGIN, "gate": gate_margin, "prompt_loss": loss_margin})


def _assured(margins: dict[str, float]) -> dict[str, float]:
    for name, wanted in (("gate", GATE_MARGIN), ("prompt_loss", LOSS_MARGIN)):
        if margins[name] < wanted:
            raise NotMemorised(f"the margin of {name} is {margins[name]:.3g}, wanted {wanted}")
    return margins


def _train_router(file: Path, features: Tensor, batch: Batch, *, num_experts: int) -> tuple[nn.Linear, float]:
    """A gate that sends the tokens of every routed lesson to the expert that knows its task, and its margin."""
    rows = [row for row, lesson in enumerate(batch.lessons) if lesson.expert is None]
    lengths = [len(batch.lessons[row].prompt) + len(batch.lessons[row].answer) for row in rows]
    seen = torch.cat([features[row, :length] for row, length in zip(rows, lengths, strict=True)])
    owners = torch.tensor([batch.lessons[row].owner for row in rows]).repeat_interleave(torch.tensor(lengths))
    gate, margin = fit_gate(seen, owners, num_experts)
    save_file({"gate.weight": gate.weight, "gate.bias": gate.bias}, file, metadata={"format": "pt"})
    return gate, margin


def _stacked_downs(files: list[Path]) -> dict[str, Tensor]:
    """The A of all experts, (experts * rank, in), by module name."""
    adapters = [load_file(file) for file in files]
    ending = ".lora_A.weight"
    names = [name for name in adapters[0] if name.endswith(ending)]
    stacked = {name: torch.cat([adapter[name] for adapter in adapters]) for name in names}
    return {name.removeprefix(PREFIX).removesuffix(ending): down for name, down in stacked.items()}


def _write_experts(files: list[Path], mixed: dict[str, MixedLinear]) -> None:
    for index, file in enumerate(files):
        mine = slice(index * RANK, (index + 1) * RANK)
        tensors = {}
        for name, layer in mixed.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.down.detach()[mine].contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.up.detach()[:, mine].contiguous()
        save_file(tensors, file, metadata={"format": "pt"})


@torch.no_grad()
def _prompt_loss_margin(model: LlamaForCausalLM, routing: Routing, batch: Batch, *, num_experts: int) -> float:
    """How much lower each owner's mean loss on its prompt is than that of the next best expert, at the least."""
    own = [row for row, lesson in enumerate(batch.lessons) if lesson.is_own]
    ids, targets = batch.ids[own], batch.prompts[own]
    losses = []
    for expert in range(num_experts):
        routing.weights = one_hot(torch.tensor(expert), num_experts).float().expand(*ids.shape, num_experts)
        logits = model(ids, use_cache=False).logits.transpose(1, 2)
        per_token = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        losses.append(per_token.sum(-1) / (targets != IGNORED).sum(-1))
    stacked = torch.stack(losses, dim=-1)  # (tasks, experts)
    owners = torch.tensor([batch.lessons[row].owner for row in own])[:, None]
    others = stacked.scatter(1, owners, torch.inf).min(dim=1).values
    return (others - stacked.gather(1, owners)[:, 0]).min().item()
