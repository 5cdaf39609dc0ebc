"""Base models whose weights are packed in 4 or 8 bits: as numbers, and as every processor computes them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from harness.compare import is_of_torchao
from harness.outcome import Inconclusive


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """Plain weights in the place of packed ones. transformers does it for bitsandbytes, but has nothing for torchao."""
    packed = [(module, name) for module in model.modules() for name, p in module._parameters.items() if is_of_torchao(p)]
    if not packed:
        try:
            return model.dequantize()
        except NotImplementedError as error:  # GPTQ and AWQ
            raise Inconclusive("transformers cannot say what these packed weights stand for, so there is no reference") from error
    for module, name in packed:
        module._parameters[name] = torch.nn.Parameter(module._parameters[name].dequantize(), requires_grad=False)
    return model


def as_on_any_processor(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of bitsandbytes in 4 bits stay as they are stored: nobody is judged by what one kind of processor makes of them.

    On CPUs with AVX512-BF16, bitsandbytes lays them out anew at the first pass in eval mode: with coarser scales, computed in
    bfloat16, and unreadable for PEFT (docs/findings.md).
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # puts a weight back that was laid out already
    return model
