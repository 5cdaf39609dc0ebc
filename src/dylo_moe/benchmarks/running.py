"""From the options of a benchmark to its document: what is run, with what, and where it is written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dylo_moe.artifact import download_artifact
from dylo_moe.atomic import write_together
from dylo_moe.benchmarks.document import SCHEMA, benchmark_entry
from dylo_moe.benchmarks.figures import picture
from dylo_moe.benchmarks.report import build_page
from dylo_moe.benchmarks.stock import HF, generate_stock, stock_files, stock_identity
from dylo_moe.errors import OptionError
from dylo_moe.evalplus import BACKEND, checked_range, checked_temperature, make_limits, plan_generation
from dylo_moe.evaluation import score_files, warn_unheld
from dylo_moe.identity import versions
from dylo_moe.pages import png
from dylo_moe.scoring import Limits
from dylo_moe.tasks import TaskSet, load_tasks

CHECKPOINTS = ("model", "trained_model", "wandb_artifact")
WITH_BASE = ("trained_model", "wandb_artifact")
_SCORING = ("parallel", "sandbox", "min_time_limit", "gt_time_limit_factor", "base_only")
_OURS = (*CHECKPOINTS, *_SCORING, "routing_strategy", "benchmarks", "max_samples", "output_dir", "backend", "id_range", "version")
_NOT_RECORDED = ("resume", "ray")  # they decide how a run goes, and nothing of what it writes
REPORTS = ("benchmark.json", "benchmark.html", "benchmark.png")


@dataclass(frozen=True)
class BenchmarkPlan:
    """All that a benchmark needs, checked.

    Attributes:
        checkpoint: what the user named; a directory, an artifact, or with the backend hf any model.
        model: where it lies.
        strategies: names of the runs, each once; () with the backend hf.
        task_sets: benchmark -> the chosen tasks.
        decoding: arguments of `run_codegen`, beside model and dataset.
    """

    checkpoint: str
    model: str
    backend: str
    strategies: tuple[str, ...]
    task_sets: Mapping[str, TaskSet]
    decoding: Mapping[str, Any]
    limits: Limits
    scoring: Mapping[str, Any]
    directory: Path

    @property
    def command(self) -> dict[str, Any]:
        """The options that decided something, for the document."""
        return {
            "checkpoint": self.checkpoint,
            "backend": self.backend,
            "strategies": list(self.strategies),
            "benchmarks": list(self.task_sets),
            **{name: value for name, value in self.decoding.items() if name not in _NOT_RECORDED},
            "min_time_limit": self.limits.min_time_limit,
            "gt_time_limit_factor": self.limits.gt_time_limit_factor,
            "base_only": self.limits.base_only,
        }


def plan_benchmarks(options: Mapping[str, Any]) -> BenchmarkPlan:
    """Checks everything that can be checked before a model is loaded.

    Args:
        options: of the command, by name; those not given are missing.

    Raises:
        OptionError, TaskSetError, ArtifactError: one line each.
    """
    named = [name for name in CHECKPOINTS if name in options]
    if len(named) != 1:
        found = " and ".join(f"--{name}" for name in named) or "no model"
        raise OptionError(f"{found}, but should be one of --model, --trained_model and --wandb_artifact")
    backend = options.get("backend", BACKEND)
    decoding = _decoding(options)
    strategies = _strategies(options, backend, named[0])
    greedy, several = decoding["greedy"], decoding["n_samples"] > 1
    if greedy and several and "round_robin" not in strategies:
        raise OptionError("n_samples above 1, but greedy decoding writes the same sample every time: set a temperature")
    limits = make_limits(
        options.get("base_only", False), False, options.get("min_time_limit"), options.get("gt_time_limit_factor", 4.0)
    )
    task_sets = {name: _tasks(name, options) for name in dict.fromkeys(options.get("benchmarks", ["humaneval"]))}
    checkpoint = options[named[0]]
    return BenchmarkPlan(
        checkpoint=checkpoint,
        model=str(download_artifact(checkpoint)) if named[0] == "wandb_artifact" else checkpoint,
        backend=backend,
        strategies=strategies,
        task_sets=task_sets,
        decoding=decoding,
        limits=limits,
        scoring={name: options[name] for name in ("parallel", "sandbox") if name in options},
        directory=Path(options.get("output_dir", "benchmark_results")),
    )


def run_benchmarks(plan: BenchmarkPlan) -> dict[str, Any]:
    """Generates what is missing, scores what is not scored, and compares: the document of `benchmark.json`.

    Raises:
        As `generate_samples` and `score_files`.
    """
    warn_unheld(plan.scoring.get("sandbox", "auto"))
    made = _generate_all(plan)
    benchmarks = {name: _score(plan, name, found) for name, found in made.items()}
    first = next(iter(next(iter(benchmarks.values()))["runs"].values()))
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": plan.command,
        "versions": dict(versions()),
        "identity": _identity(plan, plan.directory / first["samples_file"]),
        "sandbox": sorted({str(run["sandbox"]) for found in benchmarks.values() for run in found["runs"].values()}),
        "benchmarks": benchmarks,
    }


def write_reports(document: Mapping[str, Any], directory: Path) -> list[Path]:
    """Writes benchmark.json, benchmark.html and benchmark.png, all or none; returns their paths. Raises OutputError."""
    contents = (as_json(document), build_page(document).data(), png(picture(document)))
    files = {directory / name: data for name, data in zip(REPORTS, contents, strict=True)}
    write_together(files)
    return list(files)


@dataclass(frozen=True)
class _Made:
    """The samples of one benchmark. files: by run; new: how many were not there before; seconds: for making them."""

    files: Mapping[str, Path]
    new: int
    seconds: float


def _generate_all(plan: BenchmarkPlan) -> dict[str, _Made]:
    """All benchmarks with one loaded model, which is gone when scoring needs the memory."""
    if plan.backend == HF:
        return _each(plan, lambda name, place: {HF: generate_stock(plan.model, plan.task_sets[name], plan.decoding, place)})
    from dylo_moe.crew import hired
    from dylo_moe.opened import Opened
    from dylo_moe.spreading import generate_samples

    options = {"model": plan.checkpoint, "adapter_path": plan.model, **plan.decoding}
    generations = {
        name: plan_generation({**options, "dataset": name}, plan.strategies, tasks) for name, tasks in plan.task_sets.items()
    }
    opened = Opened(next(iter(generations.values())).decoder)
    with hired(plan.decoding.get("ray")) as crew:
        return _each(plan, lambda name, place: generate_samples(generations[name], place, opened=opened, crew=crew))


def _each(plan: BenchmarkPlan, generate: Callable[[str, Path], Mapping[str, Path]]) -> dict[str, _Made]:
    """generate: a benchmark and its directory -> run -> sample file."""
    made = {}
    for name in plan.task_sets:
        directory = plan.directory / name
        before, started = _counts(directory), time.monotonic()
        files = generate(name, directory)
        new = sum(count - before.get(path, 0) for path, count in _counts(directory).items())
        made[name] = _Made(files, new, time.monotonic() - started)
    return made


def as_json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=1).encode() + b"\n"


def _score(plan: BenchmarkPlan, name: str, made: _Made) -> dict[str, Any]:
    task_set, started = plan.task_sets[name], time.monotonic()
    results = score_files(made.files, task_set, list(task_set.tasks), plan.limits, **plan.scoring)
    entry = benchmark_entry(results)
    for run, path in made.files.items():
        entry["runs"][run]["samples_file"] = str(path.relative_to(plan.directory))
    generation = {**_speed(made.new, made.seconds), "scoring_seconds": time.monotonic() - started}
    return {"task_file": str(task_set.path), "task_file_hash": task_set.hash, "generation": generation, **entry}


def _decoding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `run_codegen`. Without a temperature it is greedy, as DyLoRA-MoE's benchmark was."""
    given = {name: value for name, value in options.items() if name not in _OURS}
    temperature = given.get("temperature", 0.0)
    greedy = given.get("greedy", temperature == 0)
    if greedy and temperature != 0:
        raise OptionError(f"greedy with temperature {temperature:g}, but should be one of them")
    n_samples = given.get("n_samples", 1)
    temperature = checked_temperature(temperature, n_samples, greedy=greedy)
    return {**given, "n_samples": n_samples, "temperature": temperature, "greedy": greedy}


def _strategies(options: Mapping[str, Any], backend: str, named: str) -> tuple[str, ...]:
    """Each once, in the order given; first of all the base where a trained model is compared with it."""
    if backend == HF:
        if "routing_strategy" in options or named == "wandb_artifact":
            raise OptionError(f"routing_strategy and wandb_artifact are options of {BACKEND}, but the backend is {HF}")
        return ()
    base = ["base"] if named in WITH_BASE else []
    return tuple(dict.fromkeys([*base, *options.get("routing_strategy", ["router"])]))


def _tasks(dataset: str, options: Mapping[str, Any]) -> TaskSet:
    most = options.get("max_samples")
    if most is not None and most < 1:
        raise OptionError(f"max_samples {most}, but should be at least 1")
    task_set = load_tasks(dataset, version=options.get("version", "default"))
    return task_set.part(task_set.ids(checked_range(options.get("id_range")))[:most])


def _identity(plan: BenchmarkPlan, samples: Path) -> dict[str, str | None]:
    """The hashes of the files that decide what the model computes, as the samples' manifest holds them."""
    if plan.backend == HF:
        return {"model": stock_identity(plan.model, plan.decoding)["model"]}
    identity = json.loads(samples.with_suffix(".json").read_bytes())["identity"]
    return {name: identity[name] for name in ("checkpoint", "tokenizer", "base")}


def _counts(directory: Path) -> dict[Path, int]:
    """How many samples each journal, or file of EvalPlus's, holds."""
    journals = {path: path.read_bytes().count(b"\n") - 1 for path in directory.glob("*.journal")}
    return journals | {path: path.read_bytes().count(b"\n") for path in stock_files(directory)}


def _speed(samples: int, seconds: float) -> dict[str, Any]:
    return {"new_samples": samples, "seconds": seconds, "samples_per_second": samples / seconds if samples else None}
