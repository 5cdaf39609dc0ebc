"""What every format with one gate per Linear must do, and how a defect is planted and seen to be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylo_moe import DyLoRA_MoE, detect_model_format, load_checkpoint
from dylo_moe.errors import CheckpointError
from dylo_moe.formats import read_checkpoint
from fixtures.gated import Gated, Weigh, reference

IDS = torch.tensor([[5, 9, 3, 17, 41, 8, 2, 30, 11], [7, 7, 1, 90, 4, 66, 21, 3, 12]])
# Logits have a standard deviation of 1 to 3, float32 keeps 7 digits of them, and some hundred roundings add up.
FLOAT32 = 1e-4


def assert_equals_the_equation(path: Path, name: str, mixture: Gated, weigh: Weigh, **options: object) -> float:
    """Detected as `name`, loaded, logits equal to the equation in float64; returns the largest difference."""
    assert detect_model_format(path) == name
    model = load_checkpoint(path, **options)
    assert isinstance(model, DyLoRA_MoE)
    assert model.num_experts == mixture.num_experts
    with torch.no_grad():
        got, wanted = model(IDS).logits.double(), reference(mixture, weigh)(IDS).logits
        base = reference(mixture, lambda x, adapted, layer: x.new_zeros(*x.shape[:-1], mixture.num_experts))(IDS).logits
        difference = (got - wanted).abs().max().item()
        assert difference < FLOAT32
        assert (wanted - base).abs().max() > 0.1  # the experts matter
        assert model.last_routing_weights.shape == (*IDS.shape, len(mixture.modules), mixture.num_experts)
        _assert_cache_is_exact(model)
    return difference


def _assert_cache_is_exact(model: DyLoRA_MoE) -> None:
    whole, cache, steps = model(IDS).logits, None, []
    for position in range(IDS.shape[1]):
        output = model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() < FLOAT32
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **settings), model.generate(IDS, use_cache=False, **settings))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites a safetensors file or a pickle after `change` was at its tensors."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    else:
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)


def configure(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def drop(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def drop_all(part: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


def assert_refused(path: Path, kind: type[CheckpointError], *words: str, **options: object) -> None:
    """One line, of this class, that has every word."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **options)
    message = str(caught.value)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {message}"
    assert "\n" not in message
    for word in words:
        assert word in message
