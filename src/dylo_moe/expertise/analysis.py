"""From the plan of a generation to what is known of the experts: one benchmark, and several with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dylo_moe.crew import hired
from dylo_moe.decoder import PeftMoEDecoder
from dylo_moe.errors import OptionError
from dylo_moe.evaluation import score_files, warn_unheld
from dylo_moe.expertise.categories import Categories, categorise
from dylo_moe.expertise.document import describe, describe_weights
from dylo_moe.expertise.observing import Observed, observe
from dylo_moe.expertise.passes import read_passes
from dylo_moe.expertise.remarks import benchmark_remarks, weight_remarks
from dylo_moe.expertise.tracking import Track, silently
from dylo_moe.expertise.weights import compare_weights, without_effect
from dylo_moe.formats import Checkpoint, combined_hash
from dylo_moe.generating import Generation
from dylo_moe.identity import versions
from dylo_moe.opened import Opened
from dylo_moe.routes.texts import Text, task_texts, with_samples
from dylo_moe.routes.tokens import encode
from dylo_moe.scoring import Limits
from dylo_moe.spreading import generate_samples

SCHEMA = 1


def strategies_of(checkpoint: Checkpoint, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Every expert alone, the router where there is one, "best", and what else is asked for.

    Raises:
        OptionError: a merged model, which has no experts.
    """
    if not checkpoint.experts:
        raise OptionError(f"{checkpoint.path}: a merged model has no experts to compare")
    singles = [f"single:{expert}" for expert in range(checkpoint.num_experts)]
    router = [] if checkpoint.router is None else ["router"]
    return tuple(dict.fromkeys([*singles, *router, "best", *more]))


@dataclass(frozen=True)
class _Seen:
    """One benchmark before anything is scored. files: strategy -> samples; observed: task -> what router and experts do there;
    names: of the experts; warnings: of loading the checkpoint."""

    files: dict[str, Path]
    categories: Categories
    observed: dict[str, Observed]
    names: list[str]
    warnings: tuple[str, ...]


def _generate_all(generations: Mapping[str, Generation], root: Path, opened: Opened) -> dict[str, dict[str, Path]]:
    """What is not there yet of all benchmarks, by the same workers where a Ray cluster generates."""
    with hired(next(iter(generations.values())).ray) as crew:
        return {name: generate_samples(plan, root / name, opened=opened, crew=crew) for name, plan in generations.items()}


def _see(generation: Generation, files: dict[str, Path], opened: Opened, categories: Categories, track: Track) -> _Seen:
    """Looks at router and experts on every task."""
    decoder = opened.decoder(generation.decoder, generation.strategies[0])
    observed = observe_all(decoder, texts_of(_tasks(generation), files.get("router")), track)
    return _Seen(files, categories, observed, decoder.model.expert_names, decoder.model.checkpoint.warnings)


def _describe(seen: _Seen, generation: Generation, limits: Limits, scoring: Mapping[str, Any]) -> dict[str, Any]:
    """Scores what is not scored yet. As `document.describe`, and: sandbox, measured_alone: how the code ran (see
    `results.summarise`); remarks: lines in plain words; warnings: of loading; files: {strategy: its sample file}."""
    results = score_files(seen.files, generation.task_set, generation.task_ids(), limits, **scoring)
    found = describe(read_passes(results, len(seen.names)), seen.categories, seen.observed, seen.names)
    first = results["single:0"]
    found |= {name: first[name] for name in ("sandbox", "measured_alone") if name in first}
    return {
        **found,
        "remarks": benchmark_remarks(found, seen.names),
        "warnings": list(seen.warnings),
        "files": {name: str(path) for name, path in seen.files.items()},
    }


def _tasks(generation: Generation) -> dict[str, Mapping[str, Any]]:
    return {task: generation.task_set.tasks[task] for task in generation.task_ids()}


def texts_of(tasks: Mapping[str, Mapping[str, Any]], samples: Path | None) -> list[Text]:
    """The prompts, each with the first text that was generated for it, before it was sanitized. samples: STEM.jsonl, or None."""
    texts = task_texts(tasks)
    if samples is None:
        return texts
    raw = samples.with_name(samples.name.removesuffix(".jsonl") + ".raw.jsonl")
    first: dict[str, Text] = {}
    for text in with_samples(texts, raw):
        first.setdefault(text.task, text)
    return list(first.values())


def observe_all(decoder: PeftMoEDecoder, texts: Sequence[Text], track: Track = silently) -> dict[str, Observed]:
    """Task id -> what router and experts do there. Texts are tokenised anew: where what was drawn was no canonical tokenisation
    of its text, the tokens are others."""
    tasks = [text.task for text in texts]
    encoded = encode(decoder, texts, tasks).tokens
    return {tasks[tokens.task]: observe(decoder.model, tokens) for tokens in track(encoded, "router and experts")}


def analyse_experts(
    generations: Mapping[str, Generation],
    root: Path,
    limits: Limits,
    *,
    categories: str | Path | None = None,
    scoring: Mapping[str, Any] | None = None,
    track: Track = silently,
) -> dict[str, Any]:
    """Everything about the experts of one checkpoint, ready for JSON; see document.schema.json.

    One model serves all benchmarks. It is gone when scoring needs the memory.

    Args:
        generations: benchmark -> what to generate for it, all of the same checkpoint, with the strategies of `strategies_of`,
            and perhaps more.
        root: samples and results of a benchmark are in the directory of its name below.
        categories: a file; see `categorise`.
        scoring: `parallel`, `sandbox` and `again` of `score_files`.
        track: shows progress; see tracking.py.

    Raises:
        As `generate_samples`, `score_files` and `categorise`.
    """
    # Of all of them first, because a mistake in the file should not cost a generation.
    sorted_in = {name: categorise(_tasks(plan), categories) for name, plan in generations.items()}
    warn_unheld((scoring or {}).get("sandbox", "auto"))
    opened = Opened(next(iter(generations.values())).decoder)
    files = _generate_all(generations, root, opened)
    seen = {name: _see(plan, files[name], opened, sorted_in[name], track) for name, plan in generations.items()}
    checkpoint = opened.checkpoint
    del opened
    found = {name: _describe(seen[name], plan, limits, scoring or {}) for name, plan in generations.items()}
    # Loading may have given the experts other names, so that they stay in their order.
    names = next(iter(seen.values())).names
    renamed = tuple(replace(expert, name=name) for expert, name in zip(checkpoint.experts, names, strict=True))
    checkpoint = replace(checkpoint, experts=renamed)
    weights = describe_weights(compare_weights(checkpoint, track), without_effect(checkpoint))
    warnings = [*checkpoint.warnings, *(line for one in seen.values() for line in one.warnings)]
    return {
        "schema": SCHEMA,
        "checkpoint": str(checkpoint.path),
        "format": checkpoint.format,
        "hash": combined_hash(checkpoint.hashes),
        "experts": names,
        "warnings": list(dict.fromkeys(warnings)),
        "remarks": weight_remarks(weights, names),
        "benchmarks": found,
        "weights": weights,
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }
