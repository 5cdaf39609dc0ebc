"""One run of the judge: exhibits in, verdict out. The command line and the reports are elsewhere."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import outcome, verdict
from harness.baseline import refuse_foreign, regressions
from harness.calibration import calibrate
from harness.docket import Docket, Settings, open_docket
from harness.gate import VERDICTS, Problem, exit_code, problems
from harness.identity import checkpoint_hash
from harness.machine import describe_commit, describe_machine, environment_key, versions
from harness.measure import one_thread
from harness.progress import Display
from harness.session import run_checks


def judge(settings: Settings, display: Display) -> dict:
    """Runs everything; returns the verdict document. Raises Unusable or CheckpointError before judging where the input is
    unusable.
    """
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    machine, found_versions = describe_machine(settings.device), versions()
    environment = environment_key(found_versions, machine)
    with _workplace(settings.keep) as directory:
        dockets = list(_dockets(settings, directory))
        baseline = _baseline(settings, environment, dockets)
        ids = sorted({law.id for docket in dockets for law in docket.laws})
        calibration = calibrate(dockets[0].bench.checkpoint, settings.base_model, ids, settings.assume)
        with nullcontext() if any(exhibit.is_users for exhibit in settings.exhibits) else one_thread():
            # Specimens are so small that a second thread costs ten times what it saves on a shared machine.
            checkpoints = [_judge_one(settings, docket, display) for docket in dockets]
        found = problems(settings.gate, checkpoints, calibration)
        found += [changed for docket in dockets for changed in _changed(docket)]
    found += regressions(settings.gate, baseline, checkpoints) if baseline else []
    code = exit_code(found)
    return {
        "schema": verdict.SCHEMA_VERSION,
        "verdict": VERDICTS[code],
        "exit_code": code,
        "started": started,
        "seconds": round(time.perf_counter() - clock, 2),
        "command": list(settings.command),
        "subject": settings.subject_name,
        "seed": settings.seed,
        "versions": found_versions,
        "machine": machine,
        "environment": environment,
        "commit": describe_commit(Path.cwd()),
        "counts": verdict.counts(checkpoints),
        "checkpoints": checkpoints,
        "calibration": calibration,
        "problems": [problem.as_dict() for problem in found],
        "baseline": baseline and {"path": str(settings.baseline), "commit": baseline["commit"], "started": baseline["started"]},
        "gate": {
            "thresholds": {name: limit.value for name, limit in settings.gate.thresholds.items()},
            "drift": {name: limit.value for name, limit in settings.gate.drift.items()},
        },
    }


@contextmanager
def _workplace(keep: Path | None) -> Iterator[Path]:
    """Where exhibits are written: a temporary directory, or the user's, which stays."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="validate_moe_") as directory:
        yield Path(directory)


def _dockets(settings: Settings, directory: Path) -> Iterator[Docket]:
    for number, exhibit in enumerate(settings.exhibits):
        laws = [law for law in settings.laws if exhibit.wants(law.id)]
        if laws:
            yield open_docket(settings, exhibit, laws, directory / f"{number}")


def _baseline(settings: Settings, environment: Mapping[str, str], dockets: Sequence[Docket]) -> dict | None:
    if settings.baseline is None:
        return None
    baseline = verdict.read_verdict(settings.baseline)
    refuse_foreign(settings.baseline, baseline, environment, [docket.facts for docket in dockets])
    return baseline


def _judge_one(settings: Settings, docket: Docket, display: Display) -> dict:
    display.start(docket.exhibit.name, len(docket.laws))
    results = run_checks(docket.bench, docket.laws, display.result)
    display.finish()
    drift: dict[str, Any] = {}
    for result in results:
        drift.update(result["evidence"].get("drift", {}))
        result["required"] = settings.gate.rule(result["id"]).required
        result["reproduce"] = _reproduction(settings, docket, result["id"])
    return {**docket.facts, "checks": results, "drift": drift}


def _changed(docket: Docket) -> list[Problem]:
    """A checkpoint whose files are others than at the start: no law says which of the two was judged."""
    now = checkpoint_hash(docket.bench.checkpoint)
    if now == docket.facts["hash"]:
        return []
    message = f"files changed while they were judged: hash {docket.facts['hash']} at the start, {now} at the end; judge a copy"
    return [Problem("undecided", docket.facts["name"], "verdict", outcome.VOID, message)]


def _reproduction(settings: Settings, docket: Docket, check: str) -> str:
    checkpoint = f" --checkpoint {shlex.quote(docket.facts['path'])}" if docket.exhibit.is_users else ""
    return f"validate_moe_modifications{checkpoint}{settings.options} --only {check}"
