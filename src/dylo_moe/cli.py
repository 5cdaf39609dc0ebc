"""`dylo-moe`: look at checkpoints and convert them; generate samples and score them, with EvalPlus's option names.

Options may be written with hyphens or underscores (`--n-samples`, `--n_samples`), flags with or without a value
(`--greedy`, `--greedy=True`), ranges as two numbers or as EvalPlus takes them (`--id-range 0 5`, `--id_range=[0,5]`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dylo_moe.errors import DyloMoeError

DATASETS = ("humaneval", "mbpp")
TARGETS = ("dylora", "dylo-moe", "xlora", "bag", "peft-lora")
USER_MISTAKE = 2
INTERRUPTED = 130
ASSUME = "what the checkpoint's files do not record: an option of read_checkpoint, as top_k=2 or rng_seed=42; repeatable"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. A user's mistake is one line on stderr and exit code 2."""
    arguments = build_parser().parse_args([_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)])
    options = {name: value for name, value in vars(arguments).items() if value is not None and name != "command"}
    try:
        if "assume" in options:
            from dylo_moe.formats.options import parse_assumptions

            options["assume"] = parse_assumptions(options["assume"])
        return {"codegen": _codegen, "evaluate": _evaluate, "inspect": _inspect, "convert": _convert}[arguments.command](options)
    except (DyloMoeError, OSError) as error:
        print(f"dylo-moe: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Options that are not given stay out of the call, so that the defaults are those of dylo_moe.evalplus."""
    parser = _Parser(prog="dylo-moe", description="Look at, convert and score LoRA mixture-of-experts checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    codegen = commands.add_parser("codegen", help="generate samples and print the path of their file", allow_abbrev=False)
    evaluate = commands.add_parser("evaluate", help="score samples, generating them first with --model", allow_abbrev=False)
    for command in (codegen, evaluate):
        command.add_argument("--dataset", required=True, choices=DATASETS)
        _add_generation(command, model_required=command is codegen)
    _add_scoring(evaluate)
    _add_inspect(commands.add_parser("inspect", help="print what a checkpoint holds", allow_abbrev=False))
    _add_convert(commands.add_parser("convert", help="write a checkpoint in another format", allow_abbrev=False))
    return parser


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="DIR")
    _add_flag(parser, "json", "print JSON instead of a table")
    parser.add_argument("--expect-hash", help="refuse files whose combined SHA-256 is another")
    _add_reading(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="IN")
    parser.add_argument("target", metavar="OUT", help="a new or empty directory")
    parser.add_argument("--to", required=True, choices=TARGETS, help="dylora (also called dylo-moe) is our own format")
    parser.add_argument("--experts", type=_numbers(int), metavar="0,2,3", help="keep these only")
    parser.add_argument("--merge", type=_numbers(float), metavar="0.3,0.7", help="one adapter for these weights (bag, peft-lora)")
    _add_flag(parser, "drop-router", "allow a target that has no place for the router")
    _add_reading(parser)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model", help="instead of the one that the checkpoint records")
    parser.add_argument("--assume", action="append", metavar="NAME=VALUE", help=ASSUME)


def _add_generation(parser: argparse.ArgumentParser, *, model_required: bool) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--model", required=model_required, help="checkpoint directory (peft_moe), or what the backend takes")
    group.add_argument("--backend", help="peft_moe (the default), or one of EvalPlus's")
    for name in ("root", "version", "attn-implementation", "dtype", "base-url", "base-model", "adapter-path"):
        group.add_argument(f"--{name}")
    group.add_argument("--routing-strategy", help="router, single:<i>, best, ensemble or round_robin")
    group.add_argument("--wandb-artifact", help="entity/project/name:version to download; --model is then only a label")
    for name in ("bs", "n-samples", "tp", "max-new-tokens", "seed"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--temperature", type=float)
    group.add_argument("--id-range", nargs="+", action=_Range, metavar="NUMBER", help="tasks LOW to HIGH - 1")
    for name in ("greedy", "resume", "force-base-prompt", "jsonl-fmt", "trust-remote-code"):
        _add_flag(group, name)
    group.add_argument("--device-map")
    group.add_argument("--assume", action="append", metavar="NAME=VALUE", help=ASSUME)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring")
    group.add_argument("--samples", help="a sample file or directory, instead of --model")
    group.add_argument("--parallel", type=int)
    for name in ("min-time-limit", "gt-time-limit-factor"):
        group.add_argument(f"--{name}", type=float)
    for name in ("base-only", "i-just-wanna-run", "test-details", "mini", "noextreme"):
        _add_flag(group, name)
    _add_flag(group, "json", "print the result as JSON, without the field eval")


def _add_flag(group: argparse._ArgumentGroup, name: str, text: str | None = None) -> None:
    group.add_argument(f"--{name}", nargs="?", const=True, type=_truth, metavar="True|False", help=text)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_MISTAKE, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Range(argparse.Action):
    """`0 5`, `[0,5]`, `(0,5)` or `0,5` -> [0, 5]."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list, option: str | None = None
    ) -> None:
        words = re.sub(r"[\[\](),]", " ", " ".join(values)).split()
        if len(words) != 2 or not all(word.isdigit() for word in words):
            parser.error(f"argument --id-range: {' '.join(values)!r}, but should be two numbers, as in --id-range 0 5")
        setattr(namespace, self.dest, [int(word) for word in words])


def _truth(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r}, but should be True or False")
    return values[text.lower()]


def _numbers(kind: type[int] | type[float]) -> Callable[[str], list]:
    """`0,2,3` -> [0, 2, 3]"""

    def numbers(text: str) -> list:
        try:
            return [kind(word) for word in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}, but should be numbers with commas between them") from error

    return numbers


def _hyphens(word: str) -> str:
    """`--n_samples=3` -> `--n-samples=3`; anything that is not an option stays."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _codegen(options: dict) -> int:
    from dylo_moe.evalplus import BACKEND, run_codegen

    print(run_codegen(**{"backend": BACKEND, **options}))
    return 0


def _evaluate(options: dict) -> int:
    from dylo_moe.evalplus import BACKEND, evaluate

    as_json = options.pop("json", False)
    backend = {"backend": BACKEND} if "model" in options else {}
    result = evaluate(**{**backend, **options})
    if as_json and result is not None:
        print(json.dumps({name: value for name, value in result.items() if name != "eval"}))
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
