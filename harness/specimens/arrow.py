"""Arrow checkpoints as PEFT's save_pretrained lays them out, written by hand: neither peft nor the judged package takes part."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from harness.specimens.adapters import Lora, cast, expert_tensors, read_base, write_adapter, write_json


def write_arrow_checkpoint(  # noqa: PLR0913  the options of a specimen, all keywords
    directory: str | Path,
    base: str | Path,
    *,
    num_experts: int = 4,
    top_k: int = 2,
    temperature: float = 1.0,
    rng_seed: int | None = 42,
    use_gks: bool = False,
    num_general: int = 2,
    subtracted: bool = False,
    targets: str = "attention",
    rank: int = 4,
    alpha: float = 8,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Writes task_<i>/, with use_gks also gks_<i>/, and arrow_router/, whose JSON holds the routing; returns the directory.

    Args:
        base: directory with config.json and model.safetensors of one of the families that `write_base` writes.
        rng_seed: of the prototypes, which are drawn at the first forward pass and never saved; None is PEFT's default.
        use_gks: GenKnowSub: the mean of `num_general` general adapters is taken off the experts at the first forward pass.
        subtracted: the files are those saved after that pass, in which the experts are what is left.
        targets: as in write_checkpoint.

    Before any subtraction each expert's delta has a quarter of its base weight's Frobenius norm. The same arguments give the
    same bytes. arrow_router/ also gets the dummy adapter that PEFT saves there: random A, zero B.
    """
    directory, source = Path(directory), read_base(Path(base))
    lora = Lora(rank, alpha, use_rslora=False, targets=source.targets(targets))
    experts = {f"task_{i}": expert_tensors(source, lora, index=i, seed=seed) for i in range(num_experts)}
    general = {
        f"gks_{i}": expert_tensors(source, lora, index=f"gks_{i}", seed=seed) for i in range(num_general if use_gks else 0)
    }
    experts = {name: cast(tensors, dtype) for name, tensors in experts.items()}
    general = {name: cast(tensors, dtype) for name, tensors in general.items()}
    if use_gks and subtracted:
        experts = {name: _minus_mean(tensors, list(general.values())) for name, tensors in experts.items()}
    for name, tensors in (experts | general).items():
        write_adapter(directory / name, source, lora, tensors)
    dummy = {key: tensor if ".lora_A." in key else torch.zeros_like(tensor) for key, tensor in experts["task_0"].items()}
    write_adapter(directory / "arrow_router", source, lora, dummy)
    routing = {"top_k": top_k, "router_temperature": temperature, "rng_seed": rng_seed, "use_gks": use_gks}
    names = {"task_adapter_names": list(experts), "gks_adapter_names": list(general)}
    _record_routing(directory / "arrow_router" / "adapter_config.json", routing | names)
    return directory


def _minus_mean(tensors: dict[str, Tensor], general: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A and B each less the mean of the general adapters' A and B: GenKnowSub (aclanthology.org/2025.acl-short.54) as in PEFT."""
    return {key: tensor - torch.stack([each[key] for each in general]).mean(dim=0) for key, tensor in tensors.items()}


def _record_routing(path: Path, routing: dict) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, config | {"arrow_config": routing, "task_type": None})
