"""From the plan of a generation to what is known of the experts: one benchmark, and several with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dylo_moe.decoder import PeftMoEDecoder
from dylo_moe.errors import OptionError
from dylo_moe.evaluation import score_files
from dylo_moe.expertise.categories import categorise
from dylo_moe.expertise.document import describe, describe_weights
from dylo_moe.expertise.observing import Observed, observe
from dylo_moe.expertise.passes import read_passes
from dylo_moe.expertise.remarks import benchmark_remarks, weight_remarks
from dylo_moe.expertise.tracking import Track, silently
from dylo_moe.expertise.weights import compare_weights, without_effect
from dylo_moe.formats import Checkpoint, combined_hash, read_checkpoint
from dylo_moe.generating import Generation
from dylo_moe.identity import versions
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


def analyse_benchmark(
    generation: Generation,
    directory: Path,
    limits: Limits,
    *,
    categories: str | Path | None = None,
    scoring: Mapping[str, Any] | None = None,
    track: Track = silently,
) -> dict[str, Any]:
    """Generates and scores what is not there yet, looks at router and experts on every task, and describes what was found.

    Args:
        generation: with the strategies of `strategies_of`, and perhaps more.
        directory: where samples and results are, or go.
        categories: a file; see `categorise`.
        scoring: `parallel`, `sandbox` and `again` of `score_files`.
        track: shows progress; see tracking.py.

    Returns:
        As `document.describe`, and: sandbox, measured_alone: how the code ran (see `results.summarise`); remarks: lines in plain
        words; warnings: of loading the checkpoint; files: {strategy: its sample file}.

    Raises:
        As `generate_samples`, `score_files` and `categorise`.
    """
    tasks = {task: generation.task_set.tasks[task] for task in generation.task_ids()}
    sorted_in = categorise(tasks, categories)  # first, because a mistake in the file should not cost a generation
    files = generate_samples(generation, directory)
    results = score_files(files, generation.task_set, list(tasks), limits, **(scoring or {}))
    decoder = PeftMoEDecoder(**generation.decoder, routing_strategy=generation.strategies[0])
    observed = observe_all(decoder, texts_of(tasks, files.get("router")), track)
    names = decoder.model.expert_names
    found = describe(read_passes(results, len(names)), sorted_in, observed, names)
    first = results["single:0"]
    found |= {name: first[name] for name in ("sandbox", "measured_alone") if name in first}
    return {
        **found,
        "remarks": benchmark_remarks(found, names),
        "warnings": list(decoder.model.checkpoint.warnings),
        "files": {name: str(path) for name, path in files.items()},
    }


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

    Args:
        generations: benchmark -> what to generate for it, all of the same checkpoint; see `analyse_benchmark`.
        root: samples and results of a benchmark are in the directory of its name below.

    Raises:
        As `analyse_benchmark`.
    """
    first = next(iter(generations.values()))
    checkpoint = read_checkpoint(first.checkpoint, **(first.decoder["assume"] or {}))
    options = {"categories": categories, "scoring": scoring, "track": track}
    found = {name: analyse_benchmark(plan, root / name, limits, **options) for name, plan in generations.items()}
    # Loading may have given the experts other names, so that they stay in their order.
    names = [expert["name"] for expert in next(iter(found.values()))["experts"]]
    renamed = tuple(replace(expert, name=name) for expert, name in zip(checkpoint.experts, names, strict=True))
    checkpoint = replace(checkpoint, experts=renamed)
    weights = describe_weights(compare_weights(checkpoint, track), without_effect(checkpoint))
    warnings = [*checkpoint.warnings, *(line for one in found.values() for line in one["warnings"])]
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
