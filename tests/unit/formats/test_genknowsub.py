"""Whether the general adapters were subtracted already is told from the tensors, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dylo_moe.errors import CheckpointError
from dylo_moe.formats.checkpoint import Expert, LoraPair
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.genknowsub import purify

RANK, INPUTS, OUTPUTS, MODULES = 4, 48, 32, 6


def start(seed: int) -> list[torch.Tensor]:
    """The random A of every module with which a training run begins."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(RANK, INPUTS, generator=generator) for _ in range(MODULES)]


def trained(name: str, first: list[torch.Tensor], *, seed: int, common: float = 0.0, drift: float = 0.2) -> Expert:
    """An adapter that began at `first` with B = 0. common: how much of what all of them learn is the same."""
    own, shared = (torch.Generator().manual_seed(s) for s in (1000 + seed, 999))
    modules = {}
    for index, lora_A in enumerate(first):
        moved = lora_A + drift * torch.randn(RANK, INPUTS, generator=own)
        up = torch.randn(OUTPUTS, RANK, generator=own) * (1 - common) + torch.randn(OUTPUTS, RANK, generator=shared) * common
        modules[f"layer.{index}"] = LoraPair(moved, up, 8.0)
    return Expert(name, modules)


def minus_mean(expert: Expert, general: tuple[Expert, ...]) -> Expert:
    modules = {}
    for module, pair in expert.modules.items():
        mean_A, mean_B = (
            torch.stack([getattr(g.modules[module], half) for g in general]).mean(0) for half in ("lora_A", "lora_B")
        )
        modules[module] = replace(pair, lora_A=pair.lora_A - mean_A, lora_B=pair.lora_B - mean_B)
    return replace(expert, modules=modules)


def same(one: Expert, other: Expert) -> bool:
    pairs = ((pair, other.modules[module]) for module, pair in one.modules.items())
    return all(torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B) for a, b in pairs)


# name: (beginnings of the experts, of the general adapters, how much of what is learned is common, how far A moved)
CASES = {
    "each began elsewhere": ([0, 1], [2, 3], 0.0, 0.2),
    "one general adapter": ([0, 1], [2], 0.0, 0.2),
    "eight general adapters": ([0, 1], list(range(2, 10)), 0.0, 0.2),
    "the general adapters began alike": ([0, 1], [2, 2], 0.0, 0.2),
    "all began alike": ([0, 0], [0, 0], 0.0, 0.2),
    "all began alike and moved far": ([0, 0], [0, 0], 0.0, 1.2),
    "all began alike and learned much the same": ([0, 0], [0, 0], 0.5, 0.2),
    "an expert began as one of the general adapters": ([0, 1], [0, 2], 0.0, 0.2),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "_"))
def test_subtracted_once_whatever_the_adapters_began_with(case, tmp_path):
    firsts, general_firsts, common, drift = CASES[case]
    how = {"common": common, "drift": drift}
    experts = tuple(trained(f"task_{i}", start(seed), seed=i, **how) for i, seed in enumerate(firsts))
    general = tuple(trained(f"gks_{i}", start(seed), seed=50 + i, **how) for i, seed in enumerate(general_firsts))
    want = tuple(minus_mean(expert, general) for expert in experts)
    for stored, state in ((experts, "subtract"), (want, "subtracted")):
        files = CheckpointFiles(tmp_path)
        got = purify(files, stored, general, None)
        assert all(same(a, b) for a, b in zip(got, want, strict=True))
        assert files.assumptions == {"genknowsub": state}
        assert bool(files.warnings) == (state == "subtracted")


def test_only_the_experts_that_were_added_after_the_forward_pass_are_subtracted_from(tmp_path):
    general = tuple(trained(f"gks_{i}", start(10 + i), seed=50 + i) for i in range(2))
    old, new = (trained(f"task_{i}", start(i), seed=i) for i in range(2))
    files = CheckpointFiles(tmp_path)
    got = purify(files, (minus_mean(old, general), new), general, None)
    assert same(got[0], minus_mean(old, general))
    assert same(got[1], minus_mean(new, general))
    assert files.assumptions == {"genknowsub": {"task_0": "subtracted", "task_1": "subtract"}}


def test_what_cannot_be_told_is_refused_unless_the_user_says(tmp_path):
    """Experts that began like the general adapter and learned the same leave next to nothing once it is subtracted."""
    general = (trained("gks_0", start(0), seed=50, common=0.9),)
    rest = minus_mean(trained("task_0", start(0), seed=1, common=0.9), general)
    with pytest.raises(
        CheckpointError, match="task_0: found an expert that may or may not .* genknowsub, subtract or subtracted"
    ):
        purify(CheckpointFiles(tmp_path), (rest,), general, None)
    files = CheckpointFiles(tmp_path)
    assert same(purify(files, (rest,), general, "subtracted")[0], rest)
    assert (files.assumptions, files.warnings) == ({"genknowsub": "subtracted"}, [])
    assert same(purify(files, (rest,), general, "subtract")[0], minus_mean(rest, general))
    assert (files.assumptions, files.warnings) == ({"genknowsub": "subtract"}, [])
    with pytest.raises(CheckpointError, match="genknowsub: found 'maybe', expected one of subtract, subtracted"):
        purify(files, (rest,), general, "maybe")
