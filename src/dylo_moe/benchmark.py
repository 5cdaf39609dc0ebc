"""`dylo-moe benchmark`, also `python -m dylo_moe.benchmark`: base against trained, strategy against strategy, in one run.

Every strategy is generated with one loaded model, scored, and compared with the others task by task. Written into the output
directory: benchmark.json (benchmarks/document.schema.json describes it), benchmark.html, benchmark.png; and per benchmark the
samples, as `dylo-moe codegen --root` writes them. The same command continues what an earlier one left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dylo_moe.command_line import DATASETS, Parser, add_decoding, add_executing, add_flag, run_command

BACKENDS = ("peft_moe", "hf")


def add_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model (one of the first three)")
    model.add_argument("--model", help="a checkpoint's directory; with --backend hf any causal language model")
    model.add_argument("--trained-model", metavar="DIR", help="a checkpoint, against its base model: adds the strategy base")
    model.add_argument("--wandb-artifact", help="entity/project/name:version to download; as --trained-model")
    model.add_argument("--backend", choices=BACKENDS, help="peft_moe (the default), or EvalPlus's own hf decoder with its files")
    model.add_argument(
        "--routing-strategy",
        nargs="+",
        metavar="STRATEGY",
        help="one or several of router (the default), single:<i>, best, ensemble, round_robin and base",
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--benchmarks", nargs="+", choices=DATASETS, help="humaneval (the default), mbpp, or both")
    tasks.add_argument("--max-samples", type=int, metavar="N", help="the first N tasks of each benchmark only")
    tasks.add_argument("--version", help="of EvalPlus's task file")
    tasks.add_argument("--output-dir", "--root", dest="output_dir", metavar="DIR", help="default: benchmark_results")
    add_flag(tasks, "json", "print the JSON instead of tables")
    add_decoding(parser.add_argument_group("generation; without --temperature it is greedy"))
    add_executing(parser.add_argument_group("scoring"))


def run(options: dict[str, Any]) -> int:
    """Runs the benchmark and writes its reports; 0 when done.

    Args:
        options: those of the command line that were given, by name.

    Raises:
        DyloMoeError, OSError: one line each.
    """
    from rich.console import Console

    from dylo_moe.benchmarks.report import print_benchmarks
    from dylo_moe.benchmarks.running import as_json, plan_benchmarks, run_benchmarks, write_reports

    to_json = options.get("json", False)
    plan = plan_benchmarks({name: value for name, value in options.items() if name != "json"})
    document = run_benchmarks(plan)
    paths = write_reports(document, plan.directory)
    if to_json:
        print(as_json(document).decode(), end="")
    else:
        print_benchmarks(document, Console())
    for path in paths:
        print(path, file=sys.stderr if to_json else sys.stdout)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a user's mistake (one line on stderr)."""
    parser = Parser(prog="dylo_moe.benchmark", description=__doc__.partition("\n")[0], allow_abbrev=False)
    add_options(parser)
    return run_command(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
