"""LoRA-MoE checkpoints in the native format, written by hand: neither peft nor the judged package takes part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from harness.specimens.adapters import Lora, cast, draw, expert_tensors, read_base, write_adapter, write_json

GATE_SPREAD = 4.0  # standard deviation of the gate's logits on features of unit size: near ties are rare


def write_checkpoint(  # noqa: PLR0913  the options of a specimen, all keywords
    directory: str | Path,
    base: str | Path,
    *,
    num_experts: int = 4,
    features: str = "base",
    targets: str = "attention",
    ranks: Sequence[int] = (4, 8, 3),
    alphas: Sequence[float] = (8, 8, 9),
    use_rslora: bool = False,
    top_k: int = 1,
    temperature: float = 2.0,
    dtype: str = "float32",
    router: bool = True,
    balance: str = "mse",
    aux_coefficient: float = 0.01,
    seed: int = 0,
) -> Path:
    """Writes `num_experts` random experts and a router for the base model in `base`; returns the directory.

    Args:
        base: directory with config.json and model.safetensors of one of the families that `write_base` writes.
        targets: "attention", "all-linear", or "lm_head" (only where the head is not tied to the embeddings;
            ValueError elsewhere).
        ranks, alphas: cycled over the experts.
        features: what the router looks at; recorded only.
        router: False writes a bag of experts, "router": null.
        balance, aux_coefficient: the load-balancing loss and its weight; recorded only.

    Each expert's delta has a quarter of its base weight's Frobenius norm. The same arguments give the same bytes.
    """
    directory, source = Path(directory), read_base(Path(base))
    recorded = []
    for index in range(num_experts):
        lora = Lora(ranks[index % len(ranks)], alphas[index % len(alphas)], use_rslora, source.targets(targets))
        name = f"expert_{index}"
        tensors = expert_tensors(source, lora, index=index, seed=seed)
        write_adapter(directory / "experts" / name, source, lora, cast(tensors, dtype))
        recorded.append({"name": name, "scaling": lora.scaling})
    gate = {"type": "dynamic_hybrid", "features": features, "hidden_size": source.hidden_size}
    if router:
        tensors = gate_tensors(num_experts, source.hidden_size, seed=seed)
        save_file(cast(tensors, dtype), directory / "router.safetensors", metadata={"format": "pt"})
    write_json(
        directory / "moe_config.json",
        {
            "format": "dylo_moe",
            "format_version": 1,
            "base_model_name_or_path": str(source.path),
            "num_experts": num_experts,
            "experts": recorded,
            "router": {**gate, "top_k": top_k, "temperature": temperature} if router else None,
            "load_balance": {"load_balance_loss_type": balance, "router_aux_loss_coef": aux_coefficient},
        },
    )
    return directory


def gate_tensors(num_experts: int, hidden_size: int, *, seed: int) -> dict[str, Tensor]:
    """The router's tensors: gate.weight (experts, hidden) and gate.bias (experts,), in float64."""
    weight = draw((num_experts, hidden_size), seed, "gate.weight") * GATE_SPREAD / hidden_size**0.5
    return {"gate.weight": weight, "gate.bias": draw((num_experts,), seed, "gate.bias") * 0.5}
