"""A checkpoint whose scores are known: checkpoint -> detection -> loading -> routing -> decoding -> EvalPlus -> pass@1."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.bench import Bench
from harness.checks import evaluation
from harness.compare import Mismatch
from harness.outcome import NotApplicable
from harness.specimens.competence import Planted, plant, prompt_of, wrong_answer
from harness.specimens.tasks import DATASETS, write_records
from harness.subjects import dylo_moe_subject, naive_loop

from .scoring_run import assert_diagonal_and_union, assert_scored_as_known, scored_run

STRATEGIES = ("single:0", "single:1", "single:2", "router")


@pytest.fixture(scope="module", params=DATASETS)
def planted(request, tmp_path_factory) -> Planted:
    torch.set_num_threads(1)
    return plant(tmp_path_factory.mktemp(request.param), dataset=request.param)


@pytest.fixture(scope="module")
def runs(planted, tmp_path_factory):
    root = tmp_path_factory.mktemp("samples")
    return {strategy: scored_run(planted, strategy, root) for strategy in STRATEGIES}


def test_eighteen_tasks_score_as_known_under_every_strategy(planted, runs):
    assert len(planted.records) == 18
    assert_scored_as_known(planted, runs)


def test_matrix_is_diagonal_and_router_scores_the_union(planted, runs):
    assert_diagonal_and_union(planted, runs)
    assert [runs[strategy].result["pass@1"] for strategy in STRATEGIES] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Planted:
    torch.set_num_threads(1)
    return plant(tmp_path_factory.mktemp("small"), num_experts=3, tasks_per_expert=1, features="embedding")


def test_round_robin_samples_pass_where_their_expert_knows_the_task(small, tmp_path):
    run = scored_run(small, "round_robin", tmp_path, n_samples=3)
    assert run.passed == {task: [task in group for group in small.groups] for task in small.records}
    assert run.result["pass@1"] == pytest.approx(1 / 3)


def test_stock_peft_writes_what_was_planted(small):
    """The planted facts do not depend on the judged: stock PEFT finds them in the same files."""
    tokenizer = AutoTokenizer.from_pretrained(small.base)
    for expert in range(3):
        base = AutoModelForCausalLM.from_pretrained(small.base)
        model = PeftModel.from_pretrained(base, small.checkpoint / "experts" / f"expert_{expert}").eval()
        for task, record in small.records.items():
            inputs = tokenizer(prompt_of(record), return_tensors="pt")
            rows = model.generate(**inputs, max_new_tokens=96, do_sample=False)
            text = tokenizer.decode(rows[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert text == small.expected[f"single:{expert}"][task]


@pytest.mark.parametrize("subject", [dylo_moe_subject, naive_loop])
def test_laws_of_evaluation_hold_for_correct_subjects(small, subject):
    bench = Bench(small.checkpoint, subject.make())
    evaluation.check_known_answers_score_as_known(bench)
    evaluation.check_planted_competence_is_found(bench)
    assert bench.take_evidence()["pass_at_1"] == pytest.approx(dict(zip(small.strategies, [1 / 3] * 3 + [1.0, 1.0], strict=True)))


def swap_experts(checkpoint: Path) -> None:
    first, second = (checkpoint / "experts" / name for name in ("expert_0", "expert_1"))
    first.rename(checkpoint / "experts" / "other")
    second.rename(first)
    (checkpoint / "experts" / "other").rename(second)


def forget_an_expert(checkpoint: Path) -> None:
    file = checkpoint / "experts" / "expert_2" / "adapter_model.safetensors"
    tensors = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def route_all_to_expert_0(checkpoint: Path) -> None:
    file = checkpoint / "router.safetensors"
    gate = load_file(file)
    save_file({**gate, "gate.bias": torch.tensor([1e4, 0.0, 0.0])}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fault", "first_wrong"),
    [(swap_experts, "single:0"), (forget_an_expert, "single:2"), (route_all_to_expert_0, "router")],
)
def test_planted_fault_is_found_by_the_law(small, tmp_path, fault, first_wrong):
    checkpoint = shutil.copytree(small.checkpoint, tmp_path / "checkpoint")
    fault(checkpoint)
    with pytest.raises(Mismatch, match=f"answers are not the planted ones: {first_wrong} on HumanEval/"):
        evaluation.check_planted_competence_is_found(Bench(checkpoint, dylo_moe_subject.make()))


def test_wrong_answer_that_passes_is_found_by_the_calibration(small, tmp_path):
    """A task whose right answer is what expert 1 says to tasks that it does not know."""
    records = [dict(record) for record in small.records.values()]
    records[0]["canonical_solution"] = wrong_answer(records[0], expert=1)
    faulty = replace(small, checkpoint=tmp_path, task_file=write_records(tmp_path / "tasks.jsonl", records))
    faulty.write()
    with pytest.raises(Mismatch, match="pass or fail in EvalPlus of the known answers of single:1"):
        evaluation.check_known_answers_score_as_known(Bench(tmp_path, dylo_moe_subject.make()))


def test_laws_do_not_apply_where_nothing_is_planted(tmp_path):
    for law in (evaluation.check_known_answers_score_as_known, evaluation.check_planted_competence_is_found):
        with pytest.raises(NotApplicable, match="competence.json"):
            law(Bench(tmp_path, dylo_moe_subject.make()))
