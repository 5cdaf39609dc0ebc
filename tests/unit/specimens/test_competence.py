"""Planting competence: the same files from the same seed, and no promise that was not kept."""

import pytest
import torch

from harness.specimens import memorising
from harness.specimens.competence import Planted, plant, right_answer, wrong_answer
from harness.specimens.memorising import Batch, Lesson, NotMemorised, fit_gate, smallest_lead
from harness.specimens.tasks import TASKS


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.set_num_threads(1)
    return plant(tmp_path_factory.mktemp("small"), num_experts=2, tasks_per_expert=1)


def files_of(planted: Planted) -> dict[str, bytes]:
    files = [path for path in planted.checkpoint.rglob("*.safetensors")]
    return {str(path.relative_to(planted.checkpoint)): path.read_bytes() for path in files}


def test_same_seed_plants_the_same_weights_and_another_seed_others(small, tmp_path):
    state = torch.random.get_rng_state()
    again = plant(tmp_path / "again", num_experts=2, tasks_per_expert=1)
    other = plant(tmp_path / "other", num_experts=2, tasks_per_expert=1, seed=1)
    assert len(files_of(small)) == 3
    assert files_of(again) == files_of(small)
    assert all(files_of(other)[name] != data for name, data in files_of(small).items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_manifest_beside_the_checkpoint_says_all_that_is_known(small, tmp_path):
    assert Planted.read(small.checkpoint) == small
    assert Planted.read(tmp_path) is None


def test_known_matrix_is_diagonal_and_union(small):
    assert small.known_matrix == {
        "single:0": {"HumanEval/0": True, "HumanEval/6": False},
        "single:1": {"HumanEval/0": False, "HumanEval/6": True},
        "router": {"HumanEval/0": True, "HumanEval/6": True},
        "best": {"HumanEval/0": True, "HumanEval/6": True},
    }
    assert [small.pass_at_1(strategy) for strategy in small.strategies] == [0.5, 0.5, 1.0, 1.0]


def test_answers_are_the_canonical_solution_or_the_name_of_who_speaks(small):
    assert small.expected["single:1"] == {"HumanEval/0": "    return 'expert_1'\n", "HumanEval/6": TASKS[6].body}


def test_answers_in_mbpp_style_start_with_the_signature():
    record = TASKS[0].record("mbpp")
    assert right_answer(record) == "def swap_halves(text: str) -> str:\n" + TASKS[0].body
    assert wrong_answer(record, expert=2) == "def swap_halves(text: str) -> str:\n    return 'expert_2'\n"


@pytest.mark.parametrize("num_experts", [1, 4])
def test_other_numbers_of_experts_than_there_are_categories_are_refused(tmp_path, num_experts):
    with pytest.raises(ValueError, match=f"num_experts is {num_experts}, must be 2 to 3"):
        plant(tmp_path, num_experts=num_experts)


def test_training_that_ends_too_early_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(memorising, "MAX_STEPS", 2)
    with pytest.raises(NotMemorised, match="after 2 steps some answer token leads by -"):
        plant(tmp_path, num_experts=2, tasks_per_expert=1)


def test_batch_pads_at_the_end_and_targets_are_the_next_tokens():
    batch = Batch.of([Lesson([5, 6], [7, 8], expert=0, owner=0), Lesson([5], [9], expert=0, owner=1)])
    assert batch.ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.answers.tolist() == [[-100, 7, 8, -100], [9, -100, -100, -100]]
    assert batch.prompts.tolist() == [[6, -100, -100, -100], [-100, -100, -100, -100]]


def test_smallest_lead_is_that_of_the_worst_position():
    logits = torch.tensor([[[3.0, 1.0, 0.0], [0.0, 2.0, 1.5], [9.0, 0.0, 0.0]]])
    assert smallest_lead(logits, torch.tensor([[0, 1, -100]])) == 0.5
    assert smallest_lead(logits, torch.tensor([[0, 2, -100]])) == -0.5


def test_gate_decides_tokens_that_look_alike_the_same_way_and_clearly():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    gate, margin = fit_gate(features, torch.tensor([0, 1, 0, 1]), num_experts=2)
    decisions = gate(features).argmax(-1).tolist()
    assert decisions[:2] == [0, 1]
    assert decisions[2] == decisions[3]
    assert margin > 0.05
