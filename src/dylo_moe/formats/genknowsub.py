"""GenKnowSub (aclanthology.org/2025.acl-short.54) as PEFT does it: the mean of general adapters, taken off each expert.

PEFT subtracts in place at the first forward pass and does not record it, so that a directory may hold the experts as they
were or as they are after it, and looks the same. The tensors tell: see `_state`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dylo_moe.errors import InvalidField
from dylo_moe.formats.checkpoint import Expert, LoraPair
from dylo_moe.formats.files import CheckpointFiles

SUBTRACT = "subtract"
SUBTRACTED = "subtracted"
CHOICES = (SUBTRACT, SUBTRACTED)
# Chance makes a share of sqrt(general adapters / numbers in all A), 0.1 in the tiniest of models.
CLEAR = 0.3

Pairs = Mapping[str, tuple[Tensor, Tensor]]


def purify(
    files: CheckpointFiles, experts: tuple[Expert, ...], general: tuple[Expert, ...], stated: str | None
) -> tuple[Expert, ...]:
    """The experts as the model runs them: less the mean of A and the mean of B of the general adapters; scalings play no part.

    Args:
        experts, general: with the same modules and ranks, in float32 or wider.
        stated: "subtract" or "subtracted", where the user knows what the directory holds; None decides from the tensors.

    Raises:
        InvalidField: `stated` is neither, or None and the tensors do not tell.
    """
    if stated not in (None, *CHOICES):
        raise InvalidField(files.root, "genknowsub", found=repr(stated)[:80], expected=f"one of {', '.join(CHOICES)}")
    mean = _mean(general)
    states = {expert.name: stated or _state(expert, general, mean) for expert in experts}
    for name, state in states.items():
        if state is None:
            found = "an expert that may or may not have had the general adapters subtracted already"
            raise InvalidField(files.root / name, "", found=found, expected=f"the option genknowsub, {' or '.join(CHOICES)}")
    done = [name for name, state in states.items() if state == SUBTRACTED]
    if done and stated is None:
        files.warn(f"{', '.join(done)}: saved after a forward pass, so the general adapters are not subtracted again")
    found = set(states.values())
    files.assumptions["genknowsub"] = found.pop() if len(found) == 1 else dict(states)
    return tuple(expert if states[expert.name] == SUBTRACTED else _less(expert, mean) for expert in experts)


def _mean(general: tuple[Expert, ...]) -> Pairs:
    """module -> mean A (rank, in), mean B (out, rank)."""
    means = {}
    for module in general[0].modules:
        pairs = [adapter.modules[module] for adapter in general]
        means[module] = (torch.stack([p.lora_A for p in pairs]).mean(0), torch.stack([p.lora_B for p in pairs]).mean(0))
    return means


def _less(expert: Expert, mean: Pairs) -> Expert:
    modules = {}
    for module, pair in expert.modules.items():
        lora_A, lora_B = pair.lora_A - mean[module][0], pair.lora_B - mean[module][1]
        modules[module] = LoraPair(lora_A, lora_B, pair.alpha, pair.use_rslora)
    return Expert(expert.name, modules, expert.targets)


def _state(expert: Expert, general: tuple[Expert, ...], mean: Pairs) -> str | None:
    """SUBTRACT, SUBTRACTED, or None where the tensors do not tell.

    The share of the mean A in the expert's A is about 0 where the two began at different random numbers, and from 0 to 1 where
    they began at the same; the share of the mean B, which begins at zero, is 0 in the first case and from 0 to 1 in the second.
    Both are one less once the mean is subtracted, so that a sign tells. That leaves 0 in A open: an expert that began elsewhere
    then has 0 in B and the size of the general adapters; one that began at the same numbers and was subtracted from is smaller
    and has less than 0 in B, unless it learned the same as they.
    """
    pairs = expert.modules
    share_A = _share([(pairs[module].lora_A, mean[module][0]) for module in pairs])
    share_B = _share([(pairs[module].lora_B, mean[module][1]) for module in pairs]) or 0.0  # untrained general adapters
    if share_A is None:
        return None
    if abs(share_A) >= CLEAR:
        return SUBTRACT if share_A > 0 else SUBTRACTED
    size = sum(_square(pair.lora_A) for pair in pairs.values())
    usual = sum(_square(pair.lora_A) for adapter in general for pair in adapter.modules.values()) / len(general)
    is_small = size < 0.8 * usual
    if share_B <= -CLEAR and is_small:
        return SUBTRACTED
    return SUBTRACT if abs(share_B) < CLEAR and not is_small else None


def _share(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """<tensor, mean> / <mean, mean> over all modules together; None where the mean is zero."""
    whole = sum(_square(mean) for _, mean in pairs)
    return None if whole == 0 else sum(float((tensor.double() * mean.double()).sum()) for tensor, mean in pairs) / whole


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
