"""What the commands' command lines share: EvalPlus's option names, how values are written, what a mistake looks like.

Options may be written with hyphens or underscores (`--n-samples`, `--n_samples`), flags with or without a value
(`--greedy`, `--greedy=True`), ranges as two numbers or as EvalPlus takes them (`--id-range 0 5`, `--id_range=[0,5]`).
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dylo_moe.errors import DyloMoeError, one_line
from dylo_moe.memory import is_out_of_memory

DATASETS = ("humaneval", "mbpp")
SANDBOXES = ("auto", "bwrap", "none")  # as in scoring
USER_MISTAKE = 2
INTERRUPTED, NO_READER = 130, 141  # as a shell counts SIGINT and SIGPIPE
_SHORT = 300
ASSUME = "what the checkpoint's files do not record: an option of read_checkpoint, as top_k=2 or rng_seed=42; repeatable"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_MISTAKE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None, action: Callable[[dict[str, Any]], int]) -> int:
    """Parses `argv` (None for the process's own), runs `action` on the options that were given, and returns the exit code.

    Options that were not given stay out, so that defaults are those of the functions. A user's mistake is one line on
    stderr and exit code 2.
    """
    arguments = parser.parse_args([hyphens(word) for word in (sys.argv[1:] if argv is None else argv)])
    options = {name: value for name, value in vars(arguments).items() if value is not None}
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and tasks need not fit the terminal's encoding
    try:
        if "assume" in options:
            from dylo_moe.formats.options import parse_assumptions

            options["assume"] = parse_assumptions(options["assume"])
        code = action(options)
        sys.stdout.flush()  # here, where somebody listens to its errors
        return code
    except BrokenPipeError:  # nobody reads any more, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except (DyloMoeError, OSError) as error:
        print(f"{parser.prog}: {one_line(_said(error))}", file=sys.stderr)
        return USER_MISTAKE
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = one_line(str(error) or "there is none left", _SHORT)
        print(f"{parser.prog}: not enough memory: {said}; free some, then run the same command again", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED


def _said(error: Exception) -> str:
    """The system's errors as ours are, without their number: "FILE: No such file or directory"."""
    if isinstance(error, OSError) and not isinstance(error, DyloMoeError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def add_flag(group: argparse._ArgumentGroup, name: str, text: str | None = None) -> None:
    group.add_argument(f"--{name}", nargs="?", const=True, type=_truth, metavar="True|False", help=text)


def add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model", help="instead of the one that the checkpoint records")
    parser.add_argument("--assume", action="append", metavar="NAME=VALUE", help=ASSUME)


def add_generation(parser: argparse.ArgumentParser, *, model_required: bool) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--model", required=model_required, help="checkpoint directory (peft_moe), or what the backend takes")
    group.add_argument("--backend", help="peft_moe (the default), or one of EvalPlus's")
    for name in ("root", "version", "base-url", "adapter-path"):
        group.add_argument(f"--{name}")
    group.add_argument("--routing-strategy", help="router, single:<i>, best, ensemble, round_robin or base")
    group.add_argument("--wandb-artifact", help="entity/project/name:version to download; --model is then only a label")
    group.add_argument("--tp", type=int)
    add_flag(group, "jsonl-fmt")
    add_decoding(group)


def add_decoding(group: argparse._ArgumentGroup) -> None:
    """What every command that generates takes: how the model is loaded, and what is drawn from it."""
    group.add_argument("--base-model", help="instead of the one that the checkpoint records")
    for name in ("dtype", "attn-implementation", "device-map"):
        group.add_argument(f"--{name}")
    for name in ("bs", "n-samples", "max-new-tokens", "seed"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--temperature", type=float)
    group.add_argument("--id-range", nargs="+", action=Range, metavar="NUMBER", help="tasks LOW to HIGH - 1")
    for name in ("greedy", "resume", "force-base-prompt", "trust-remote-code", "autocast-adapter-dtype"):
        add_flag(group, name)
    group.add_argument("--assume", action="append", metavar="NAME=VALUE", help=ASSUME)
    group.add_argument("--ray", metavar="ADDRESS", help="generate on a Ray cluster: HOST:PORT, ray://HOST:PORT, auto or local")


def add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring")
    group.add_argument("--samples", help="a sample file or directory, instead of --model")
    add_executing(group)
    for name in ("i-just-wanna-run", "test-details", "mini", "noextreme"):
        add_flag(group, name)
    add_flag(group, "json", "print the result as JSON, without the field eval")


def add_executing(group: argparse._ArgumentGroup) -> None:
    """What every command that runs generated code takes."""
    group.add_argument("--parallel", type=int, help="processes that run code; half of the processors where not given")
    group.add_argument("--sandbox", choices=SANDBOXES, help="for generated code; auto (the default): the best that holds here")
    for name in ("min-time-limit", "gt-time-limit-factor"):
        group.add_argument(f"--{name}", type=float)
    add_flag(group, "base-only", "leave EvalPlus's extra tests out")


class Range(argparse.Action):
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


def numbers(kind: type[int] | type[float]) -> Callable[[str], list]:
    """`0,2,3` -> [0, 2, 3]"""

    def parse(text: str) -> list:
        try:
            return [kind(word) for word in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}, but should be numbers with commas between them") from error

    return parse


def hyphens(word: str) -> str:
    """`--n_samples=3` -> `--n-samples=3`; anything that is not an option stays."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word
