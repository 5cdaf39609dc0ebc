"""The judge on a base quantised to 4 bits: a correct subject raises no alarm, planted faults are caught."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from fixtures.faults import FaultySubject
from fixtures.laws import judge
from harness import outcome
from harness.artifact import load_base
from harness.bench import Bench
from harness.readings import read_artifact
from harness.specimens import write_base, write_checkpoint
from harness.subjects import find_subject
from harness.workings import Workings

LAWS = ("layer.equals_oracle", "model.routing_is_applied", "model.cached_decode_equals_recompute", "model.save_load_bitwise")
UNCOUNTED = "speed.cached_generation_work"
FLOAT64_LAWS = ("layer.gradients_equal_oracle", "layer.half_precision_error_at_most_twice_loop")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, Path]:
    """A native checkpoint, and the quantised base that it is judged on."""
    root = tmp_path_factory.mktemp("quantised")
    base = write_base(root / "base", "llama")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    quantised.save_pretrained(root / "nf4")
    AutoTokenizer.from_pretrained(base).save_pretrained(root / "nf4")
    return write_checkpoint(root / "moe", base, num_experts=3), root / "nf4"


def bench(checkpoint: tuple[Path, Path], subject: object) -> Bench:
    return Bench(checkpoint[0], subject, base_model=str(checkpoint[1]))


@pytest.mark.parametrize("law", LAWS)
def test_a_correct_subject_raises_no_alarm(checkpoint, law):
    found, message = judge(bench(checkpoint, find_subject("dylo-moe")), law)
    assert found == outcome.PASS, message


@pytest.mark.parametrize("law", (*FLOAT64_LAWS, UNCOUNTED))
def test_laws_about_digits_and_counts_that_the_kernel_decides_do_not_apply(checkpoint, law):
    found, message = judge(bench(checkpoint, find_subject("dylo-moe")), law)
    assert found == outcome.NOT_APPLICABLE and "quantised" in message


def test_a_base_of_torchao_is_judged_by_what_its_numbers_stand_for(checkpoint, tmp_path):
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("the package torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    base, config = checkpoint[1].parent / "base", TorchAoConfig(Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(tmp_path)
    place = (checkpoint[0], tmp_path)
    for law in ("layer.equals_oracle", "model.routed_logits_equal_reference", "model.detach_restores_base"):
        found, message = judge(bench(place, find_subject("dylo-moe")), law)
        assert found == outcome.PASS, message
    assert judge(bench(place, FaultySubject(scale_doubled)), "layer.equals_oracle")[0] == outcome.FAIL


def scale_doubled(model: torch.nn.Module) -> None:
    for layer in model.routed_layers().values():
        layer.scaling["expert_1"] *= 2


def laid_out_at_the_first_pass(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True


def test_the_judges_own_base_is_not_laid_out_either(checkpoint, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base = load_base(read_artifact(checkpoint[0], base_model=str(checkpoint[1])), torch.float32)
    layers = [module for module in base.modules() if type(module).__name__ == "Linear4bit"]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_nobody_is_judged_by_a_layout_that_only_some_processors_have(checkpoint):
    place = bench(checkpoint, FaultySubject(laid_out_at_the_first_pass))
    layers = [module for module in place.model.modules() if type(module).__name__ == "Linear4bit"]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    again = [module for module in Workings(place).load().modules() if type(module).__name__ == "Linear4bit"]
    assert not any(layer.support_avx512bf16_for_cpu for layer in again)


@pytest.mark.parametrize("law", ["model.routing_is_applied", "formats.loaded_logits_equal_reference"])
def test_a_doubled_scale_is_caught(checkpoint, law):
    assert judge(bench(checkpoint, find_subject("dylo-moe")), law)[0] == outcome.PASS
    assert judge(bench(checkpoint, FaultySubject(scale_doubled)), law)[0] == outcome.FAIL
