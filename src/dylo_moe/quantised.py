"""Quantised base models: which package runs them, and two defects of bitsandbytes on a CPU.

The base layer stays as it is; PEFT's LoRA layer for it is routed as any other, and deltas are added to the base's own output.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dylo_moe.errors import InvalidField

# quant_method of a config.json -> the package that transformers needs for it, on which PEFT has a LoRA layer.
PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "torchao": "torchao",
    "hqq": "hqq",
    "eetq": "eetq",
    "aqlm": "aqlm",
}
_LAYS_OUT = "support_avx512bf16_for_cpu"  # of a Linear4bit


def check_package(quantization: Any, path: str | Path) -> None:
    """Raises InvalidField unless the package that runs this quantization is installed.

    quantization: None, a transformers quantization config, or the field of that name of a config.json.
    """
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization.quant_method
    if (
        method is None
        and isinstance(quantization, Mapping)
        and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit"))
    ):
        method = "bitsandbytes"  # files of transformers before 4.31 leave the name out
    method = getattr(method, "value", method)
    if method not in PACKAGES:
        expected = f"one of {', '.join(PACKAGES)}"
        raise InvalidField(path, "quantization_config.quant_method", found=repr(method)[:80], expected=expected)
    package = PACKAGES[method]
    if importlib.util.find_spec(package) is None:
        found = f"{method}, for which the package {package} is not installed"
        raise InvalidField(path, "quantization_config", found=found, expected=f"pip install {package}")


def keep_scales(base_layer: nn.Module) -> None:
    """Gives an 8-bit weight the scales back that PEFT's DoRA takes from it on the CPU.

    DoRA reads the weight through `Int8Params.to`, which marks it as not yet prepared; at the next pass, bitsandbytes prepares
    it again from scales that are no longer there. docs/findings.md has a reproduction.
    """
    weight = getattr(base_layer, "weight", None)
    if getattr(weight, "CB", None) is not None and getattr(weight, "SCB", None) is None:
        weight.SCB = base_layer.state.SCB


def keep_layout(model: nn.Module) -> list[nn.Module]:
    """Keeps bitsandbytes from laying 4-bit weights out anew; what has been already is laid out as in files again.

    On CPUs with AVX512-BF16 it does so at the first pass in eval mode. Then PEFT's DoRA reads other numbers, gradients do not get
    through the layer, and its output is of bfloat16 whatever the compute dtype. docs/findings.md has a reproduction.

    Returns:
        The layers that would have; `lay_out` lets them again.
    """
    layers = [module for module in model.modules() if getattr(module, _LAYS_OUT, False)]
    for layer in layers:
        setattr(layer, _LAYS_OUT, False)
        layer.state_dict()  # puts the weight back
    return layers


def lay_out(layers: list[nn.Module]) -> None:
    """Gives layers back what `keep_layout` took from them."""
    for layer in layers:
        setattr(layer, _LAYS_OUT, True)
