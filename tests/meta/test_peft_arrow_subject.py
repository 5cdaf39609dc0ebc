"""The subject peft-arrow is PEFT's own Arrow, and the judge sees where PEFT is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dylo_moe import load_checkpoint
from harness.bench import Bench
from harness.checks import model as laws
from harness.specimens import write_base
from harness.specimens.arrow import write_arrow_checkpoint
from harness.subjects import find_subject

IDS = torch.tensor([[9, 41, 77, 100, 23], [54, 61, 88, 12, 7]])
EXPERTS = torch.tensor([2, 0])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "llama")


def bench(checkpoint: Path) -> Bench:
    return Bench(checkpoint=checkpoint, subject=find_subject("peft-arrow"))


@torch.no_grad()
def test_it_answers_like_ours_by_its_router_by_one_expert_and_by_one_expert_per_row(base: Path, tmp_path: Path) -> None:
    path = write_arrow_checkpoint(tmp_path / "a", base, num_experts=3)
    stock, ours = find_subject("peft-arrow").load(path), load_checkpoint(path)
    for routing in ({}, {"expert_id": 1}, {"expert_id": EXPERTS}, {}):
        torch.testing.assert_close(stock(IDS, **routing).logits, ours(IDS, **routing).logits, atol=1e-4, rtol=0)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    for strategy in ("single:2", "router"):
        assert torch.equal(stock.generate(IDS, strategy=strategy, **options), ours.generate(IDS, strategy=strategy, **options))


def test_the_judge_passes_it_and_sees_a_second_subtraction(base: Path, tmp_path: Path) -> None:
    laws.check_routed_logits_equal_reference(bench(write_arrow_checkpoint(tmp_path / "once", base, use_gks=True)))
    twice = write_arrow_checkpoint(tmp_path / "twice", base, use_gks=True, subtracted=True)
    with pytest.raises(AssertionError, match="routed logits"):
        laws.check_routed_logits_equal_reference(bench(twice))


def test_it_refuses_what_it_cannot_do(base: Path, tmp_path: Path) -> None:
    path = write_arrow_checkpoint(tmp_path / "a", base, num_experts=2)
    subject = find_subject("peft-arrow")
    with pytest.raises(ValueError, match="cannot be told lora_alpha"):
        subject.load(path, assume={"lora_alpha": 8})
    with pytest.raises(ValueError, match="no arrow_router"):
        subject.load(path / "task_0")
    model = subject.load(path)
    with pytest.raises(ValueError, match="strategy 'ensemble', but should be one of router, single:<i>, i from 0 to 1"):
        model.generate(IDS, strategy="ensemble")
    with pytest.raises(IndexError, match="expert_id 2"):
        model(IDS, expert_id=2)


def test_detaching_it_leaves_the_base(base: Path, tmp_path: Path) -> None:
    subject = find_subject("peft-arrow")
    model = subject.load(write_arrow_checkpoint(tmp_path / "a", base))
    model(IDS)
    assert not [name for name, _ in subject.detach(model).named_parameters() if "lora" in name]
