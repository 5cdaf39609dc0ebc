"""From sample files to results that are stored beside the samples and used again."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dylo_moe.atomic import write_atomically
from dylo_moe.errors import ScoringError, one_line
from dylo_moe.results import binding, read_samples, result_path, stored, summarise
from dylo_moe.sandbox.ladder import choose
from dylo_moe.scoring import Limits, Scorer
from dylo_moe.tasks import TaskSet


def score_files(
    files: Mapping[str, Path],
    task_set: TaskSet,
    task_ids: Sequence[str],
    limits: Limits,
    *,
    parallel: int | None = None,
    sandbox: str = "auto",
    again: bool = False,
) -> dict[str, dict[str, Any]]:
    """Scores sample files over the given tasks, after the canonical solutions of those tasks, once for all files.

    A result is written beside its samples as soon as it is known, and used again where it is bound to the same samples, tasks,
    limits and sandbox; then nothing runs.

    Args:
        files: a name of your choice -> a sample file or directory.
        again: score although a result is stored.

    Returns:
        name -> its result, as of `results.summarise`, in the order of `files`.

    Raises:
        SampleFileError, TaskSetError: samples cannot be read, or a task has none. ScoringError: as `Scorer.calibrate`.
        OutputError: a result cannot be written.
    """
    samples = {name: read_samples(path, task_set, list(task_ids)) for name, path in files.items()}
    bound = {name: binding(task_set, found, limits, sandbox=sandbox) for name, found in samples.items()}
    known = {} if again else {name: stored(result_path(files[name]), bound[name]) for name in files}
    results = {name: result for name, result in known.items() if result is not None}
    wanted = [name for name in files if name not in results]
    if wanted:
        with Scorer(task_set, limits, parallel=parallel, sandbox=sandbox) as scorer:
            scorer.calibrate(dict.fromkeys(sample.task_id for name in wanted for sample in samples[name]))
            for name in wanted:
                scores = scorer.score(samples[name])
                results[name] = summarise(task_set, scores, limits, bound[name], sandbox=scorer.sandbox)
                write_atomically(result_path(files[name]), json.dumps(results[name]).encode())
    return {name: results[name] for name in files}


def warn_unheld(sandbox: str) -> None:
    """Says before hours of generation what scoring would say after them: that nothing here holds generated code.

    No more than a warning: where all scores are stored, no code runs.
    """
    try:
        choose(sandbox)
    except ScoringError as error:
        print(one_line(f"Warning: what is not scored yet will have no score here: {error}"), file=sys.stderr)
