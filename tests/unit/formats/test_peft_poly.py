"""PEFT Poly: each task is an expert that computes what PEFT's PolyModel computes for that task id."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dylo_moe import detect_model_format, load_checkpoint, read_checkpoint
from dylo_moe.errors import CheckpointError, UnknownExpert
from fixtures.poly import change_poly_config, write_poly
from harness.specimens import write_base

TASKS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("poly") / "llama", "llama")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(5, 300, (4, 9))


@pytest.fixture
def tasks() -> torch.Tensor:
    return torch.tensor([2, 0, 1, 2])


def stock(directory: Path, base: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), directory).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("splits", "skills", "dtype"), [(1, 4, torch.float32), (4, 3, torch.float32), (2, 2, torch.float32), (4, 3, torch.bfloat16)]
)
def test_logits_of_a_batch_of_tasks_equal_pefts(tmp_path, ids, tasks, splits, skills, dtype):
    base = write_base(tmp_path / "base", "llama", dtype=str(dtype).removeprefix("torch."))
    path = write_poly(tmp_path / "poly", base, tasks=TASKS, skills=skills, splits=splits, dtype=dtype)
    model = load_checkpoint(path)
    assert (detect_model_format(path), model.expert_names) == ("peft-poly", ["task_0", "task_1", "task_2"])
    exact = stock(path, base, torch.float64)(ids, task_ids=tasks).logits
    allowed = 2 * (stock(path, base, dtype)(ids, task_ids=tasks).logits.double() - exact).abs().max()
    other = stock(path, base, torch.float64)(ids, task_ids=tasks.roll(1)).logits
    assert allowed < 0.1 * (other - exact).abs().max()
    assert (model(ids, expert_id=tasks).logits.double() - exact).abs().max() <= allowed
    for task in range(TASKS):
        rows = tasks == task
        assert (model(ids[rows], expert_id=task).logits.double() - exact[rows]).abs().max() <= allowed


def test_what_peft_saves_loads_and_generates_the_same_tokens(base, tmp_path, ids, tasks):
    peft = stock(write_poly(tmp_path / "poly", base, tasks=TASKS, splits=2), base)
    peft.save_pretrained(tmp_path / "saved")
    model = load_checkpoint(tmp_path / "saved")
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = peft.generate(input_ids=ids, task_ids=tasks, **options)
    assert torch.equal(model.generate(ids, expert_id=tasks, **options), want)
    assert torch.equal(model.generate(ids[:1], strategy="single:2", **options | {"attention_mask": None}), want[:1])


def test_tasks_are_said_to_be_experts_and_others_do_not_exist(base, tmp_path, ids):
    model = load_checkpoint(write_poly(tmp_path / "poly", base, tasks=TASKS))
    assert "tasks are experts: give the task id of each row as expert_id" in model.checkpoint.warnings
    with pytest.raises(UnknownExpert):
        model(ids, expert_id=TASKS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tasks": 4}, r"module_logits: found shape \(3, 8\), expected \(4, 8\)"),
        ({"n_skills": 8, "n_splits": 1}, r"poly_lora_A: found shape .*, expected n_splits 1, n_skills 8 and r 4"),
        ({"r": 8}, "poly_lora_A: found shape .* r 8"),
        ({"n_tasks": 0}, "n_tasks: found 0, expected an integer from 1"),
        ({"n_skills": True}, "n_skills: found True"),
        ({"poly_type": "mhr"}, "poly_type: found 'mhr', expected 'poly'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: found"),
        ({"target_modules": ["q_proj"]}, "target_modules: found .*, which does not cover"),
        (
            {"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]},
            "target_modules: found 'up_proj', for which there is no",
        ),
        ({"target_modules": None}, "target_modules: found nothing"),
    ],
)
def test_a_configuration_that_does_not_fit_the_tensors_is_refused(base, tmp_path, changes, message):
    path = write_poly(tmp_path / "poly", base, splits=2)
    change_poly_config(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("part", "replacement", "message"),
    [
        ("poly_lora_B", None, "found no poly_lora_B, expected all three of a module"),
        ("poly_lora_A", torch.full((1, 4, 48, 4), float("nan")), "values that are NaN or infinite"),
        ("poly_lora_A", torch.zeros(1, 4, 48, 4, dtype=torch.int8), "expected float64, float32, float16 or bfloat16"),
        ("poly_lora_B", torch.zeros(1, 4, 4), r"poly_lora_B: found shape \(1, 4, 4\)"),
        ("poly_lora_X", torch.zeros(1), "found a tensor that is no part of Poly"),
    ],
)
def test_damaged_tensors_are_refused(base, tmp_path, part, replacement, message):
    path = write_poly(tmp_path / "poly", base) / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.model.layers.1.self_attn.q_proj.{part}"
    tensors.pop(key, None)
    save_file(tensors | ({} if replacement is None else {key: replacement}), path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path.parent)
