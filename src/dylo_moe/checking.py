"""One solution against one task: what it returns is compared here, outside of the jail that it runs in."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dylo_moe.sandbox.jail import Jail, JailBroken
from dylo_moe.sandbox.level import Level
from dylo_moe.sandbox.records import ERROR, LOADED, NOT_LOADED, TIMEOUT, TOO_LARGE, VALUE, read_records
from dylo_moe.sandbox.stock import runs
from dylo_moe.truth import Answer, Truth

PASS, FAIL, LATE = "pass", "fail", "timeout"
WRONG, ENDED = b"wrong", b"ended"  # besides the kinds of records
LOAD_FACTOR = 2.5  # times the seconds of an input: for what a solution does before its function is called, mostly imports
IDLE_FACTOR = 1.25  # the same: for what it does after its time is over, and for bytes to come through
ENCODE_SECONDS = 5.0  # for an output to become bytes, besides what the expected one took times the factor
ENCODE_FACTOR = 10.0
PART_SECONDS = 60.0  # for all inputs of a part together, besides what the canonical solution may take
PREPARE_SECONDS = 300.0
_EVALPLUS_SECONDS = 60.0  # of one run
_AROUND_SECONDS = 10.0  # for what EvalPlus does around a run
_LARGEST_FACTOR, _LARGEST_MORE = 16, 2**20
ROOT_REASON = "EvalPlus never counts an input of HumanEval/32 as passed"
REASONS = {
    WRONG: "EvalPlus keeps the tolerance of an earlier input, or broadcasts, or asks the solution's own ==",
    ENDED: "the solution ended its process, and EvalPlus believes what such a process wrote",
    TOO_LARGE: "an output far larger than the expected one, which EvalPlus let its own == accept",
    ERROR: "it failed here only: what it does may depend on chance or on memory",
    NOT_LOADED: "it failed here only: what it does may depend on chance or on memory",
    TIMEOUT: "it ran out of time here only",
}
ONLY_THERE = "EvalPlus ran out of time, of which it gives a check 60 s, or counted its own memory as the solution's"


@dataclass
class Found:
    """What became of a part's inputs. cause: why the first failed, empty if none did. failed: numbers of the inputs."""

    cause: bytes = b""
    failed: list[int] = field(default_factory=list)

    @property
    def status(self) -> str:
        return {b"": PASS, TIMEOUT: LATE}.get(self.cause, FAIL)

    def note(self, index: int, cause: bytes) -> None:
        self.cause = self.cause or cause
        self.failed.append(index)


class Checker:
    """Runs the solutions of a task in two jails, of which only the one for EvalPlus's own check knows expected outputs."""

    def __init__(self, level: Level) -> None:
        self._ours, self._stock = Jail(level), Jail(level)
        self._loaded: dict[Jail, Truth] = {}

    def stop(self) -> None:
        self._ours.stop()
        self._stock.stop()

    def check(self, truth: Truth, part: str, solution: str, options: dict[str, Any]) -> dict[str, Any]:
        """The statuses of one solution on "base" or "plus": {"stock", "ours", "reason", "seconds", "failed"}.

        Args:
            options: EvalPlus's "fast_check", "min_time_limit" and "gt_time_limit_factor"; and "stock", whether to run EvalPlus's
                check too (else the status is ours).

        Returns:
            `seconds` is the wall time of the slower check, `failed` the inputs that failed in ours, `reason` why they differ.

        Raises:
            JailBroken: a process that runs solutions does not start.
        """
        self._hand_over(truth, options["stock"])
        begin = time.monotonic()
        found = self._run_ours(truth, part, solution, options)
        middle = time.monotonic()
        stock = self._run_stock(truth, part, solution, options) if options["stock"] else found.status
        seconds = max(middle - begin, time.monotonic() - middle)
        failed = truth.readable([truth.inputs[part][index] for index in found.failed])
        reason = _reason(truth, found, stock)
        return {"stock": stock, "ours": found.status, "reason": reason, "seconds": seconds, "failed": failed}

    def _run_ours(self, truth: Truth, part: str, solution: str, options: dict[str, Any]) -> Found:
        self._ours.finish_load(PREPARE_SECONDS)
        question = {
            "part": part,
            "solution": solution,
            "stop_early": options["fast_check"],
            **_times(truth.answers[part], options),
        }
        stream = _Stream(self._ours.check(question))
        largest = _LARGEST_FACTOR * max((len(answer.data) for answer in truth.answers[part]), default=0) + _LARGEST_MORE
        try:
            found = _judge(read_records(stream, largest), truth, part, options["fast_check"])
            stream.drain()
        except JailBroken:
            return Found(ENDED)
        if found.cause == ENDED and stream.end == "late":
            found.cause = TIMEOUT
        return found

    def _run_stock(self, truth: Truth, part: str, solution: str, options: dict[str, Any]) -> str:
        self._stock.finish_load(PREPARE_SECONDS + options["gt_time_limit_factor"] * truth.total_seconds)
        seconds = truth.seconds(part)
        kept = {name: options[name] for name in ("fast_check", "min_time_limit", "gt_time_limit_factor")}
        least, factor = options["min_time_limit"], options["gt_time_limit_factor"]
        limits = [sum(max(least, factor * s) for s in seconds[run]) for run in runs(seconds)]
        total = sum(min(_EVALPLUS_SECONDS, limit) + _AROUND_SECONDS for limit in limits)
        question = {"part": part, "solution": solution, "options": kept, "idle_seconds": total, "total_seconds": total}
        stream = _Stream(self._stock.check(question))
        try:
            status = json.loads(b"".join(stream))
        except (JailBroken, ValueError):
            return LATE if stream.end == "late" else FAIL
        return status

    def _hand_over(self, truth: Truth, stock: bool) -> None:
        """To both at once, so that one gets ready while the other works."""
        common = {"entry_point": truth.entry_point, "inputs": truth.inputs}
        if not self._knows(self._ours, truth):
            self._ours.load({**common, "stock": False, "as_set": truth.comparison.as_set})
        if stock and not self._knows(self._stock, truth):
            seconds = {part: truth.seconds(part) for part in truth.answers}
            task = {"dataset": truth.dataset, "canonical": truth.canonical, "atol": truth.atol, "seconds": seconds}
            self._stock.load({**common, **task, "stock": True})

    def _knows(self, jail: Jail, truth: Truth) -> bool:
        known = jail.running and self._loaded.get(jail) is truth
        self._loaded[jail] = truth
        return known


class _Stream:
    """Chunks of a check. end: why it ended, once it has."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self.end = ""

    def __iter__(self) -> Iterator[bytes]:
        """The chunks that nobody has had yet. Not `yield from`, with which whoever breaks off would close them."""
        while not self.end:
            try:
                chunk = next(self._chunks)
            except StopIteration as stop:
                self.end = stop.value
                return
            yield chunk

    def drain(self) -> None:
        """Takes the rest, which nobody wants, so that the next answer comes next."""
        for _ in self:
            pass


def _times(answers: list[Answer], options: dict[str, Any]) -> dict[str, Any]:
    """The seconds that a solution has, by what it does, and those after which its process is killed if nothing came."""
    least, factor = options["min_time_limit"], options["gt_time_limit_factor"]
    limits = [max(least, factor * answer.seconds) for answer in answers]
    encoding = [ENCODE_FACTOR * answer.encode_seconds for answer in answers]
    load, canonical = LOAD_FACTOR * least, sum(answer.seconds for answer in answers)
    return {
        "load_seconds": load,
        "seconds": limits,
        "encode_seconds": ENCODE_SECONDS + max(encoding, default=0.0),
        "idle_seconds": IDLE_FACTOR * least + max([load, *map(sum, zip(limits, encoding, strict=True))]),
        "total_seconds": load + min(sum(limits), PART_SECONDS + factor * canonical) + sum(encoding),
    }


def _judge(records: Iterator[tuple[bytes, bytes]], truth: Truth, part: str, stop_early: bool) -> Found:
    kind, _ = next(records, (ENDED, b""))
    if kind != LOADED:
        return Found(kind if kind in REASONS else ENDED)
    found = Found()
    for index in range(len(truth.answers[part])):
        kind, data = next(records, (ENDED, b""))
        if kind == VALUE and not truth.right(part, index, data):
            kind = WRONG
        if kind != VALUE:
            found.note(index, kind if kind in REASONS else ENDED)
            if stop_early or kind == ENDED:
                break
    return found


def _reason(truth: Truth, found: Found, stock: str) -> str:
    """Why one of us passes what the other does not; empty where we agree."""
    if (stock == PASS) == (found.status == PASS):
        return ""
    if truth.comparison.finds_root:
        return ROOT_REASON
    return REASONS[found.cause] if stock == PASS else ONLY_THERE
