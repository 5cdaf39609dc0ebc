"""Planted competence: a checkpoint whose every answer to every task of a task set is known beforehand.

Expert i of a tiny mixture learns by heart the solutions of the tasks of group i. To the tasks of the other groups it learns
to answer `return 'expert_i'`, which is wrong for every task and tells who spoke. The router learns to send the tokens of
each task to the expert that knows it. So every pass or fail, and every character of every answer, is known for each
strategy, and a subject that swaps, sums, scales or forgets experts cannot score the same.

    planted = plant(directory)                       three experts, six tasks each: some 13 s on one core
    planted.expected["single:1"]["HumanEval/3"]      the text that follows the prompt
    planted.known_matrix["single:1"]["HumanEval/3"]  whether EvalPlus passes it

Known by construction, not by a run of the judged: training ends when the right token leads by some logits everywhere.
Not known, so not promised: other dtypes than float32, sampling, and the strategy "ensemble".
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness.measure import one_thread
from harness.specimens.checkpoints import write_checkpoint
from harness.specimens.memorising import Lesson
from harness.specimens.pupil import write_pupil
from harness.specimens.tasks import CATEGORIES, TASKS, write_records
from harness.specimens.teaching import ALPHA, RANK, teach

MANIFEST = "competence.json"


@dataclass(frozen=True)
class Planted:
    """Where the planted files are and what is known of them; JSON beside the checkpoint holds the same.

    groups: for each expert the ids of the tasks it knows. margins: how far each decision is from the next one.
    """

    checkpoint: Path
    base: Path
    task_file: Path
    dataset: str
    groups: list[list[str]]
    margins: dict[str, float]

    @property
    def strategies(self) -> list[str]:
        return [*(f"single:{expert}" for expert in range(len(self.groups))), "router", "best"]

    @cached_property
    def records(self) -> dict[str, dict]:
        """The task file's lines by task id, in its order."""
        lines = map(json.loads, self.task_file.read_text(encoding="utf-8").splitlines())
        return {record["task_id"]: record for record in lines}

    @property
    def expected(self) -> dict[str, dict[str, str]]:
        """strategy -> task id -> the text that must follow the prompt, greedily decoded."""
        return {strategy: {task: self._answer(strategy, task) for task in self.records} for strategy in self.strategies}

    @property
    def known_matrix(self) -> dict[str, dict[str, bool]]:
        """strategy -> task id -> whether that answer is right."""
        return {strategy: {task: self._knows(strategy, task) for task in self.records} for strategy in self.strategies}

    def pass_at_1(self, strategy: str) -> float:
        known = self.known_matrix[strategy]
        return sum(known.values()) / len(known)

    def _knows(self, strategy: str, task: str) -> bool:
        return not strategy.startswith("single:") or task in self.groups[int(strategy.partition(":")[2])]

    def _answer(self, strategy: str, task: str) -> str:
        record = self.records[task]
        if self._knows(strategy, task):
            return right_answer(record)
        return wrong_answer(record, int(strategy.partition(":")[2]))

    def write(self) -> Planted:
        fields = {**asdict(self), "checkpoint": "", "base": str(self.base), "task_file": str(self.task_file)}
        (self.checkpoint / MANIFEST).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        return self

    @classmethod
    def read(cls, checkpoint: Path) -> Planted | None:
        """What was planted in `checkpoint`, or None if nothing was."""
        manifest = checkpoint / MANIFEST
        if not manifest.is_file():
            return None
        fields = json.loads(manifest.read_text(encoding="utf-8"))
        paths = {"checkpoint": checkpoint, "base": Path(fields["base"]), "task_file": Path(fields["task_file"])}
        return cls(**{**fields, **paths})


def plant(
    directory: Path,
    *,
    num_experts: int = 3,
    tasks_per_expert: int = 6,
    seed: int = 0,
    dataset: str = "humaneval",
    features: str = "base",
) -> Planted:
    """Write task file, base model and checkpoint under `directory`; expert i knows the tasks of category i.

    dataset: "humaneval" or "mbpp". features: what the router looks at, "base" or "embedding".
    Raises NotMemorised where a margin is not reached.
    """
    if not 2 <= num_experts <= len(CATEGORIES):
        raise ValueError(f"num_experts is {num_experts}, must be 2 to {len(CATEGORIES)}: one category of tasks each")
    groups = [[task for task in TASKS if task.category == name][:tasks_per_expert] for name in CATEGORIES[:num_experts]]
    records = [[task.record(dataset) for task in group] for group in groups]
    return plant_records(directory, records, dataset=dataset, seed=seed, features=features)


def plant_records(directory: Path, groups: list[list[dict]], *, dataset: str, seed: int = 0, features: str = "base") -> Planted:
    """As `plant`, for EvalPlus records of your own: expert i knows those of `groups[i]`."""
    directory = Path(directory).resolve()
    records = [record for group in groups for record in group]
    task_file = write_records(directory / "tasks.jsonl", records)
    base = write_pupil(directory / "base", [text for r in records for text in (prompt_of(r), right_answer(r))], seed=seed)
    checkpoint = write_checkpoint(
        directory / "checkpoint",
        base,
        num_experts=len(groups),
        features=features,
        targets="all-linear",
        ranks=(RANK,),
        alphas=(ALPHA,),
        seed=seed,
    )
    lessons = _lessons(groups, AutoTokenizer.from_pretrained(base))
    with one_thread():  # on shared cores a second thread makes this ten times slower, and weights depend on the number
        margins = teach(checkpoint, base, lessons, features=features)
    ids = [[record["task_id"] for record in group] for group in groups]
    return Planted(checkpoint, base, task_file, dataset, ids, margins).write()


def prompt_of(record: dict) -> str:
    """The prompt as EvalPlus gives it to a decoder (evalplus/codegen.py)."""
    return record["prompt"].strip() + "\n"


def right_answer(record: dict) -> str:
    return record["canonical_solution"].strip("\n") + "\n"


def wrong_answer(record: dict, expert: int) -> str:
    """What an expert says to a task it does not know: its name. In MBPP's style the answer starts with the signature."""
    signature = re.search(rf"^def {record['entry_point']}\(.*:\n", record["canonical_solution"], re.MULTILINE)
    return f"{signature.group() if signature else ''}    return 'expert_{expert}'\n"


def _lessons(groups: list[list[dict]], tokenizer: PreTrainedTokenizerFast) -> list[Lesson]:
    """Each task under each expert alone and under the router."""
    lessons = []
    for owner, group in enumerate(groups):
        for record in group:
            prompt = tokenizer(prompt_of(record))["input_ids"]
            for expert in (*range(len(groups)), None):
                text = right_answer(record) if expert in (owner, None) else wrong_answer(record, expert)
                answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
                lessons.append(Lesson(prompt, answer, expert, owner))
    return lessons
