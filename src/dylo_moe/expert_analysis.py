"""`dylo-moe expert-analysis`: what each expert is good at, whether the router knows it, and which experts are alike.

Written into the output directory: expert_analysis.json (expertise/document.schema.json describes it), expert_analysis.html and
PNG files; and per benchmark the samples. With the directory of `dylo-moe benchmark`, which is the default, nothing is generated
or scored that is there already.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylo_moe.command_line import DATASETS, Parser, add_decoding, add_executing, add_flag, run_command

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dylo_moe.benchmarks.running import BenchmarkPlan
    from dylo_moe.expertise.tracking import Track

NAME = "expert_analysis"
DESCRIPTION = "Compare the experts of a checkpoint with each other, and the router's choices with the best ones."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a user's mistake (one line on stderr)."""
    parser = Parser(prog="dylo_moe.expert_analysis", description=DESCRIPTION, allow_abbrev=False)
    add_options(parser)
    return run_command(parser, argv, run)


def add_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model (one of the first three)")
    model.add_argument("--model", metavar="DIR", help="a checkpoint, of any format with experts")
    model.add_argument("--trained-model", metavar="DIR", help="the same, compared with its base model: adds the strategy base")
    model.add_argument("--wandb-artifact", help="entity/project/name:version to download; as --trained-model")
    model.add_argument(
        "--routing-strategy", nargs="+", metavar="STRATEGY", help="beside every expert, router and best: base, ensemble ..."
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--benchmarks", "--dataset", nargs="+", choices=DATASETS, help="humaneval (the default), mbpp, or both")
    tasks.add_argument("--max-samples", type=int, metavar="N", help="the first N tasks of each benchmark only")
    tasks.add_argument("--version", help="of EvalPlus's task file")
    tasks.add_argument("--categories", metavar="FILE", help='JSON {"HumanEval/0": "text", ...} or CSV: task_id, category')
    tasks.add_argument("--output-dir", "--root", dest="output_dir", metavar="DIR", help="default: benchmark_results")
    add_flag(tasks, "json", "print the JSON instead of tables")
    add_decoding(parser.add_argument_group("generation; without --temperature it is greedy"))
    add_executing(parser.add_argument_group("scoring"))


def run(options: dict[str, Any]) -> int:
    """Analyses, writes and prints. Exit code 0, whatever is found.

    Raises:
        DyloMoeError, OSError: one line each.
    """
    from rich.console import Console

    from dylo_moe.expertise.report import print_analysis
    from dylo_moe.expertise.tracking import on_stderr

    plan = plan_analysis(options)
    document = run_analysis(plan, options.get("categories"), on_stderr)
    paths = write_reports(document, plan.directory)
    if options.get("json"):
        print(as_json(document).decode(), end="")
    else:
        print_analysis(document, Console())
    for path in paths:
        print(path, file=sys.stderr if options.get("json") else sys.stdout)
    return 0


def plan_analysis(options: Mapping[str, Any]) -> BenchmarkPlan:
    """A benchmark of every expert, the router, "best", and what else is asked for.

    Args:
        options: of the command, by name; those not given are missing.

    Raises:
        OptionError: a merged model, which has no experts; as `plan_benchmarks`. CheckpointError: one line.
    """
    from dataclasses import replace

    from dylo_moe.benchmarks.running import plan_benchmarks
    from dylo_moe.expertise.analysis import strategies_of
    from dylo_moe.formats import read_checkpoint

    given = {name: value for name, value in options.items() if name not in ("categories", "json")}
    plan = plan_benchmarks({"routing_strategy": [], **given})
    checkpoint = read_checkpoint(plan.model, **options.get("assume", {}))
    return replace(plan, strategies=strategies_of(checkpoint, plan.strategies))


def run_analysis(plan: BenchmarkPlan, categories: str | Path | None = None, track: Track | None = None) -> dict[str, Any]:
    """Generates and scores what is missing, and compares: the document of `expert_analysis.json`.

    Args:
        categories: a file; see `expertise.categories.categorise`.
        track: shows progress; see expertise/tracking.py.

    Raises:
        As `expertise.analysis.analyse_experts`.
    """
    from dylo_moe.evalplus import plan_generation
    from dylo_moe.expertise.analysis import analyse_experts
    from dylo_moe.expertise.tracking import silently

    options = {"model": plan.checkpoint, "adapter_path": plan.model, **plan.decoding}
    generations = {
        name: plan_generation({**options, "dataset": name}, plan.strategies, tasks) for name, tasks in plan.task_sets.items()
    }
    about = {"categories": categories, "scoring": plan.scoring, "track": track or silently}
    return analyse_experts(generations, plan.directory, plan.limits, **about)


def write_reports(document: Mapping[str, Any], directory: str | Path) -> list[Path]:
    """Writes the JSON, the pictures and the page, all or none, and returns their paths. Raises OutputError."""
    from dylo_moe.atomic import write_together
    from dylo_moe.expertise.report import build_page
    from dylo_moe.pages import png

    directory = Path(directory)
    pictures = {directory / f"{name}.png": png(figure) for name, figure in draw(document).items()}
    page = {directory / f"{NAME}.html": build_page(document).data()}
    files = {directory / f"{NAME}.json": as_json(document), **pictures, **page}
    write_together(files)
    return list(files)


def draw(document: Mapping[str, Any]) -> dict[str, Figure]:
    """File name without its ending -> picture."""
    from dylo_moe.expertise.figures import figures, weight_figures

    names = document["experts"]
    made = {f"{NAME}_{name}": figure for name, (figure, _) in weight_figures(document["weights"], names).items()}
    for benchmark, found in document["benchmarks"].items():
        made |= {f"{NAME}_{benchmark}_{name}": figure for name, (figure, _) in figures(found, names).items()}
    return made


def as_json(document: Mapping[str, Any]) -> bytes:
    import json

    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


if __name__ == "__main__":
    sys.exit(main())
