"""Base weights that experts' files repeat: PEFT saves the base weight of a readout or embedding that has an adapter.

Stock PEFT writes them over the base model while loading (docs/findings.md). Here they are compared with it, and forgotten.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe.errors import ForeignTensor
from dylo_moe.formats import Checkpoint
from dylo_moe.formats.checkpoint import Expert


def compared_with_base(checkpoint: Checkpoint, base: PreTrainedModel) -> Checkpoint:
    """The checkpoint without the base weights that its experts repeat, and a warning for each expert that does.

    Compared in the dtype that the base was loaded in.

    Raises:
        ForeignTensor: one is not the base model's, bit for bit, or the base model's is quantised and cannot be compared.
    """
    notes = []
    for expert in checkpoint.adapters:
        for name, tensor in expert.repeated.items():
            _compare(checkpoint, expert, name, tensor, base.get_parameter(name))
        if expert.repeated:
            notes.append(f"{expert.name} repeats the base weight {', '.join(expert.repeated)}, which is the base model's own")
    if not notes:
        return checkpoint
    return replace(
        checkpoint,
        experts=tuple(replace(expert, repeated={}) for expert in checkpoint.experts),
        shared=None if checkpoint.shared is None else replace(checkpoint.shared, repeated={}),
        warnings=(*checkpoint.warnings, *notes),
    )


def _compare(checkpoint: Checkpoint, expert: Expert, name: str, tensor: Tensor, own: Tensor) -> None:
    if not own.is_floating_point():
        found = f"a base weight, while the base model's is quantised to {own.dtype}"
    elif own.shape != tensor.shape or not torch.equal(tensor.to(own.device, own.dtype), own.detach()):
        found = "a base weight that is not the base model's: loading it would change the base for every expert"
    else:
        return
    raise ForeignTensor(checkpoint.path, f"{expert.name}: {name}", found=found, expected="an adapter of this base model")
