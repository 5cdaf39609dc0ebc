"""`dylo-moe`: look at checkpoints and convert them; generate samples and score them, with EvalPlus's option names."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

from dylo_moe import benchmark, expert_analysis, routing_analysis
from dylo_moe.command_line import (
    DATASETS,
    Parser,
    add_flag,
    add_generation,
    add_reading,
    add_scoring,
    numbers,
    run_command,
)

# Commands with a file of their own.
COMMANDS = {
    "benchmark": (benchmark, "score a checkpoint; compare its strategies, and its base model, task by task"),
    "expert-analysis": (expert_analysis, "compare the experts, and the router's choices with the best ones"),
    "routing-analysis": (routing_analysis, "see which expert the router chooses for which task, position, layer and token"),
}
TARGETS = ("dylora", "dylo-moe", "xlora", "bag", "peft-lora")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. A user's mistake is one line on stderr and exit code 2."""
    return run_command(build_parser(), argv, _run)


def build_parser() -> argparse.ArgumentParser:
    """Options that are not given stay out of the call, so that the defaults are those of dylo_moe.evalplus."""
    parser = Parser(prog="dylo-moe", description="Look at, convert and score LoRA mixture-of-experts checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    codegen = commands.add_parser("codegen", help="generate samples and print the path of their file", allow_abbrev=False)
    evaluate = commands.add_parser("evaluate", help="score samples, generating them first with --model", allow_abbrev=False)
    for command in (codegen, evaluate):
        command.add_argument("--dataset", required=True, choices=DATASETS)
        add_generation(command, model_required=command is codegen)
    codegen.add_argument("--shard", metavar="I/N", help="only this part of the tasks, as 2/4; `merge` puts the parts together")
    add_scoring(evaluate)
    _add_merge(commands.add_parser("merge", help="make the whole run of the shards in directories", allow_abbrev=False))
    _add_inspect(commands.add_parser("inspect", help="print what a checkpoint holds", allow_abbrev=False))
    for name, (module, text) in COMMANDS.items():
        module.add_options(commands.add_parser(name, help=text, allow_abbrev=False))
    _add_convert(commands.add_parser("convert", help="write a checkpoint in another format", allow_abbrev=False))
    return parser


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIR", help="where codegen --shard wrote, or where you copied it to")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="DIR")
    add_flag(parser, "json", "print JSON instead of a table")
    parser.add_argument("--expect-hash", help="refuse files whose combined SHA-256 is another")
    add_reading(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="IN")
    parser.add_argument("target", metavar="OUT", help="a new or empty directory")
    parser.add_argument("--to", required=True, choices=TARGETS, help="dylora (also called dylo-moe) is our own format")
    parser.add_argument("--experts", type=numbers(int), metavar="0,2,3", help="keep these only")
    parser.add_argument("--merge", type=numbers(float), metavar="0.3,0.7", help="one adapter for these weights (bag, peft-lora)")
    add_flag(parser, "drop-router", "allow a target that has no place for the router")
    add_reading(parser)


def _run(options: dict) -> int:
    commands = {"codegen": _codegen, "evaluate": _evaluate, "merge": _merge, "inspect": _inspect, "convert": _convert}
    commands |= {name: module.run for name, (module, _) in COMMANDS.items()}
    return commands[options.pop("command")](options)


def _codegen(options: dict) -> int:
    from dylo_moe.evalplus import BACKEND, run_codegen

    with contextlib.redirect_stdout(sys.stderr):  # EvalPlus's other backends tell how far they are
        path = run_codegen(**{"backend": BACKEND, **options})
    print(path)
    return 0


def _evaluate(options: dict) -> int:
    from dylo_moe.evalplus import BACKEND, evaluate

    as_json = options.pop("json", False)
    backend = {"backend": BACKEND} if "model" in options else {}
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = evaluate(**{**backend, **options})
    if as_json and result is not None:
        print(json.dumps({name: value for name, value in result.items() if name != "eval"}))
    return 0


def _merge(options: dict) -> int:
    from pathlib import Path

    from dylo_moe.shards import merge_shards

    for path in merge_shards([Path(directory) for directory in options["directories"]]):
        print(path)
    return 0


def _inspect(options: dict) -> int:
    from rich.console import Console

    from dylo_moe.formats import read_checkpoint
    from dylo_moe.inventory import print_inventory, take_inventory

    reading = {**options.get("assume", {}), "expect_hash": options.get("expect_hash")}
    inventory = take_inventory(read_checkpoint(options["checkpoint"], **reading), options.get("base_model"))
    if options.get("json"):
        print(json.dumps(inventory, indent=2))
    else:
        print_inventory(inventory, Console())
    return 0


def _convert(options: dict) -> int:
    from dylo_moe.conversion import convert_checkpoint
    from dylo_moe.formats import read_checkpoint

    checkpoint = read_checkpoint(options.pop("checkpoint"), **options.pop("assume", {}))
    made = convert_checkpoint(checkpoint, **options)
    for kind, lines in (("warning", checkpoint.warnings), ("note", made.notes)):
        for line in lines:
            print(f"dylo-moe: {kind}: {line}", file=sys.stderr)
    print(made.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
