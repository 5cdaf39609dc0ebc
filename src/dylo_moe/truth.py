"""What the outputs of a task should be, from its canonical solution."""

from __future__ import annotations

import json
import time
from copy import deepcopy
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dylo_moe.bounded import bounded
from dylo_moe.comparison import Comparison
from dylo_moe.sandbox.decoding import Damaged, decode
from dylo_moe.sandbox.encoding import encode_and_ask

PARTS = ("base", "plus")
# Processor time and memory to look at an output, besides so many times what the expected one took to encode, and its bytes.
COMPARE_SECONDS, _SECONDS_FACTOR = 20.0, 20.0
COMPARE_BYTES, _BYTES_FACTOR = 2 * 2**30, 64


@dataclass(frozen=True)
class Answer:
    """One expected output.

    Attributes:
        data: the output, encoded.
        certain: an output of the same bytes is right without looking at the values.
        seconds: what the canonical solution took.
        encode_seconds: what encoding took.
    """

    data: bytes
    certain: bool
    seconds: float
    encode_seconds: float


class Truth:
    """One task: its inputs by part, and an Answer for each. Runs the canonical solution, and nothing else ever.

    Raises whatever the canonical solution raises.
    """

    def __init__(self, dataset: str, record: dict[str, Any]) -> None:
        self.dataset = dataset
        self.id: str = record["task_id"]
        self.entry_point: str = record["entry_point"]
        self.atol: float = record["atol"]
        self.canonical: str = record["prompt"] + record["canonical_solution"]
        self.comparison = Comparison(dataset, self.entry_point, self.atol)
        names: dict[str, Any] = {}
        exec(self.canonical, names)
        function = names[self.entry_point]
        self.inputs: dict[str, list[list]] = {}
        self.answers: dict[str, list[Answer]] = {}
        for part in PARTS:
            inputs = record[f"{part}_input"]
            self.inputs[part] = list(_mbpp().mbpp_deserialize_inputs(self.id, inputs) if dataset == "mbpp" else inputs)
            self.answers[part] = [self._answer(function, arguments) for arguments in self.inputs[part]]

    @property
    def size(self) -> int:
        """Bytes that the answers take."""
        return sum(len(answer.data) for answers in self.answers.values() for answer in answers)

    @property
    def total_seconds(self) -> float:
        return sum(answer.seconds for answers in self.answers.values() for answer in answers)

    def seconds(self, part: str) -> list[float]:
        return [answer.seconds for answer in self.answers[part]]

    def right(self, part: str, index: int, data: bytes) -> bool:
        """Whether these bytes are a right output for that input. This process does not survive some that are made to harm it."""
        answer = self.answers[part][index]
        if answer.certain and data == answer.data:
            return True
        arguments = deepcopy(self.inputs[part][index])
        memory = COMPARE_BYTES + _BYTES_FACTOR * len(answer.data)
        try:
            with bounded(COMPARE_SECONDS + _SECONDS_FACTOR * answer.encode_seconds, memory):
                return self.comparison.right(arguments, decode(answer.data), decode(data))
        except (Damaged, MemoryError):
            return False

    def readable(self, inputs: list[list]) -> list:
        """Inputs as EvalPlus writes them into its results."""
        inputs = _mbpp().mbpp_serialize_inputs(self.id, inputs) if self.dataset == "mbpp" else inputs
        return json.loads(json.dumps(inputs, default=repr))

    def _answer(self, function: Any, arguments: list) -> Answer:
        arguments = deepcopy(arguments)
        begin = time.monotonic()
        value = function(*arguments)
        seconds = time.monotonic() - begin
        begin = time.monotonic()
        data, reflexive = encode_and_ask(self.comparison.expected(value))
        return Answer(data, reflexive and not self.comparison.special, seconds, time.monotonic() - begin)


def _mbpp() -> ModuleType:
    """Takes a second to import."""
    import evalplus.data.mbpp

    return evalplus.data.mbpp
