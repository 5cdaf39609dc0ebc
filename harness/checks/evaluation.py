"""Laws of evaluation: on a checkpoint with planted competence (harness/specimens/competence.py) every score is known.

The judge runs no text that the subject wrote. It knows each right and wrong answer to the character, has EvalPlus score those,
and then asks the subject for the same characters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoTokenizer

from harness.bench import Bench
from harness.compare import Mismatch, assert_equal
from harness.measure import one_thread
from harness.outcome import NotApplicable
from harness.specimens.competence import Planted, prompt_of
from harness.specimens.scoring import score

SPARE_TOKENS = 8  # beyond the longest answer: a wrong subject may never write an end


def check_known_answers_score_as_known(bench: Bench) -> None:
    """EvalPlus passes the canonical solutions and fails the planted wrong answers: its pass@1 matrix is the known one.

    Reason: a scorer that fails right programs (time limits under load, a checker that counts the caller's memory) or passes
    wrong ones makes every later score worthless; this is the calibration of the one below.
    Tolerance: none; each task and strategy passes or fails.
    """
    planted = _planted(bench)
    for strategy, known in planted.known_matrix.items():
        answers = planted.expected[strategy]
        programs = {task: record["prompt"] + answers[task] for task, record in planted.records.items()}
        got = score(planted.dataset, planted.records.values(), programs)
        assert_equal(got, known, what=f"pass or fail in EvalPlus of the known answers of {strategy}")
    bench.evidence(tasks=len(planted.records), pass_at_1={name: planted.pass_at_1(name) for name in planted.strategies})


def check_planted_competence_is_found(bench: Bench) -> None:
    """Every `single:i`, `router` and `best` answers each task as planted, so that pass@1 is the known one, task by task.

    Reason: experts swapped, summed, scaled or forgotten, a router that looks at the wrong token and a cache that goes stale all
    change some answer; expert i alone passes its own tasks only, and the router passes all.
    Tolerance: none; the right token leads by two logits everywhere, and float32 implementations differ by about 1e-5.
    """
    planted = _planted(bench)
    wrong: list[str] = []
    found: dict[str, float] = {}
    for strategy in planted.strategies:
        write = _writer(bench, planted, strategy)
        wanted, known = planted.expected[strategy], planted.known_matrix[strategy]
        with one_thread():  # the model is tiny: on shared cores a second thread makes it ten times slower
            got = {task: write(prompt_of(record)) for task, record in planted.records.items()}
        wrong += [f"{strategy} on {task}: {_differ(got[task], wanted[task])}" for task in got if got[task] != wanted[task]]
        found[strategy] = sum(known[task] and got[task] == wanted[task] for task in got) / len(got)
    bench.evidence(pass_at_1=found, wrong_answers=len(wrong), first_wrong_answers=wrong[:5], margins=planted.margins)
    if wrong:
        asked = len(planted.strategies) * len(planted.records)
        raise Mismatch(f"{len(wrong)} of {asked} answers are not the planted ones: {wrong[0]}")


def _planted(bench: Bench) -> Planted:
    planted = Planted.read(bench.checkpoint)
    if planted is None:
        raise NotApplicable("nothing is known of what these experts have learned (no competence.json in the checkpoint)")
    return planted


def _writer(bench: Bench, planted: Planted, strategy: str) -> Callable[[str], str]:
    """prompt -> greedy completion: by the subject's EvalPlus decoder, or by its model where it has none."""
    if not hasattr(bench.subject, "decoder"):
        return lambda prompt: _generate(bench, planted, prompt, strategy)
    decoder = bench.subject.decoder(
        planted.checkpoint,
        dataset=planted.dataset,
        base_model=bench.base_model,
        routing_strategy=strategy,
        temperature=0.0,
        max_new_tokens=_room(planted),
        dtype="float32",
    )
    return lambda prompt: decoder.codegen(prompt, do_sample=False, num_samples=1)[0]


def _generate(bench: Bench, planted: Planted, prompt: str, strategy: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(planted.base)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(bench.device)
    end = tokenizer.eos_token_id
    options = {"max_new_tokens": _room(planted), "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    rows = bench.model.generate(ids, torch.ones_like(ids), strategy=strategy, **options)
    return tokenizer.decode(rows[0, ids.shape[1] :], skip_special_tokens=True)


def _room(planted: Planted) -> int:
    tokenizer = AutoTokenizer.from_pretrained(planted.base)
    answers = [text for by_task in planted.expected.values() for text in by_task.values()]
    return max(len(tokenizer(text)["input_ids"]) for text in answers) + SPARE_TOKENS


def _differ(got: str, wanted: str) -> str:
    """Where two texts part, with a little of each."""
    same = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    return f"from character {same} on got {got[same : same + 40]!r}, wanted {wanted[same : same + 40]!r}"
