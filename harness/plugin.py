"""pytest is the runner; this is the little that it needs: the fixture `bench`, and an outcome for every check."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from harness import compare, outcome
from harness.bench import Bench

MESSAGE_LIMIT = 2000
EXCUSED = "the subject excused itself with the judge's NotApplicable; what it does not offer it should not have"


class JudgePlugin:
    """Runs the checks on one bench. `results` holds one dict per check, in the order they ran, as verdict.json has
    them.

    Args:
        bench: what each check receives.
        wanted: ids of the checks to run.
        notify: called with each result as soon as it is known.
    """

    def __init__(self, bench: Bench, wanted: Collection[str], notify: Callable[[dict], None] = lambda result: None) -> None:
        self._bench = bench
        self._wanted = frozenset(wanted)
        self._notify = notify
        self.results: list[dict] = []
        self.judge_failures: list[str] = []
        self.interrupted = False

    @pytest.fixture(name="bench")
    def bench_fixture(self) -> Bench:
        return self._bench

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if check_id(item) in self._wanted]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.judge_failures.append(f"{report.nodeid}: {report.longrepr}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.failed:
            self.judge_failures.append(f"{report.nodeid}: {report.longrepr}")

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo) -> None:
        self.interrupted = type(excinfo.value) is KeyboardInterrupt  # and not pytest's own, of a file that cannot be collected

    def pytest_internalerror(self, excrepr: object) -> None:
        self.judge_failures.append(str(excrepr))

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Iterator[None]:
        start = time.perf_counter()
        error: BaseException | None = None
        with compare.recording() as comparisons:
            try:
                yield
            except (Exception, SystemExit) as raised:  # noqa: BLE001  (whatever a check raises is its outcome)
                error = raised
        result = self._result(pyfuncitem, error, time.perf_counter() - start)
        result["evidence"] = {**compare.summary(comparisons), **self._bench.take_evidence()}
        self.results.append(result)
        self._notify(result)
        return True

    def _result(self, item: pytest.Function, error: BaseException | None, seconds: float) -> dict:
        statement = (item.function.__doc__ or "").strip().split("\n")[0]
        result = {
            "id": check_id(item),
            "outcome": outcome.outcome_of(error),
            "statement": statement,
            "seconds": round(seconds, 4),
            "message": _message(error),
        }
        if result["outcome"] == outcome.NOT_APPLICABLE and outcome.is_raised_by_subject(error, self._subjects_classes()):
            result |= {"outcome": outcome.ERROR, "message": f"{EXCUSED}: {error}"}
        if result["outcome"] == outcome.ERROR and error is not None:
            result["blame"] = "subject" if outcome.is_subjects_fault(error, self._subjects_classes()) else "judge"
            result["traceback"] = "".join(traceback.format_exception(error))[-4000:]
        return result

    def _subjects_classes(self) -> list[type]:
        loaded = self._bench.__dict__.get("model")
        return [type(thing) for thing in (self._bench.subject, loaded) if thing is not None]


def check_id(item: pytest.Item) -> str:
    """ "layer.equals_oracle" for `check_equals_oracle` in layer.py."""
    return f"{Path(item.path).stem}.{item.name.removeprefix('check_')}"


def _message(error: BaseException | None) -> str:
    if error is None:
        return ""
    text = str(error) if isinstance(error, compare.Mismatch | outcome.NotApplicable | outcome.Void | outcome.Inconclusive) else ""
    text = text or f"{type(error).__name__}: {error}"
    return text if len(text) <= MESSAGE_LIMIT else f"{text[: MESSAGE_LIMIT - 3]}..."
