"""The command line of validate_moe_modifications: its options, and what can be told from them alone."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from harness.catalogue import CHECKS
from harness.outcome import Unusable

PROGRAM = "validate_moe_modifications"
OUTPUT = Path("validation")
DTYPES = ("float32", "bfloat16", "float16")


class OneLineParser(argparse.ArgumentParser):
    """Raises Unusable where argparse would print its usage and exit: a mistake is answered in one line."""

    def error(self, message: str) -> NoReturn:
        raise Unusable(f"{message}; --help shows every option")


def parser() -> argparse.ArgumentParser:
    made = OneLineParser(
        allow_abbrev=False,
        prog=PROGRAM,
        description="Judge a LoRA mixture-of-experts checkpoint and the code that runs it. Without --checkpoint it judges "
        "specimens that it writes itself, and so the subject alone.",
        epilog="exit codes: 0 passed, 1 a law or threshold failed, 2 unusable input, 3 the judge failed, 4 undecided",
    )
    what = made.add_argument_group("what is judged")
    what.add_argument("--checkpoint", type=Path, action="append", default=[], metavar="DIR", help="a checkpoint; repeatable")
    what.add_argument(
        "--wandb-artifact",
        action="append",
        default=[],
        metavar="NAME",
        help="a checkpoint to download: entity/project/name:version; repeatable; needs dylo-moe[wandb]",
    )
    what.add_argument(
        "--base-model", metavar="NAME_OR_PATH", help="base model, where it is not the one that the checkpoint records"
    )
    what.add_argument(
        "--subject", default="dylo-moe", metavar="NAME", help="implementation: dylo-moe, naive-loop or package.module:factory"
    )
    what.add_argument("--expect-hash", metavar="SHA256", help="refuse the checkpoint unless its hash is this")
    what.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what no file of the checkpoint records: an option of dylo_moe.read_checkpoint, as lora_alpha=32, top_k=[2,1] or "
        "rng_seed=42; repeatable",
    )
    which = made.add_argument_group("which checks")
    which.add_argument("--only", action="append", default=[], metavar="IDS", help="ids or globs, comma separated; repeatable")
    which.add_argument("--list", action="store_true", help="print every check's id and statement")
    which.add_argument("--explain", metavar="ID", help="print a check's statement, reason, tolerance and thresholds")
    which.add_argument(
        "--checks", type=Path, default=CHECKS, metavar="DIR", help="check files to run in place of the built-in ones"
    )
    how = made.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu")
    how.add_argument("--dtype", choices=DTYPES, help="dtype to load in; the checkpoint's own by default")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--gate", type=Path, metavar="FILE", help="TOML file with your rules, thresholds and drift budgets")
    how.add_argument("--keep", type=Path, metavar="DIR", help="write the specimens here and leave them")
    how.add_argument("--verbose", action="store_true", help="a line per check")
    _add_outputs(made)
    return made


def _add_outputs(made: argparse.ArgumentParser) -> None:
    out = made.add_argument_group("what is written")
    out.add_argument("--json", type=Path, metavar="FILE", help=f"the verdict; {OUTPUT}/verdict.json by default")
    out.add_argument("--html", type=Path, metavar="FILE", help=f"the report; {OUTPUT}/report.html by default")
    out.add_argument("--junit-xml", type=Path, metavar="FILE")
    out.add_argument("--markdown", type=Path, metavar="FILE")
    out.add_argument("--baseline", type=Path, metavar="FILE", help="an earlier verdict: worse than it is a failure")
    out.add_argument(
        "--update-baseline",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="write this run as a baseline, from a clean tagged git tree; to --baseline's file unless FILE is given",
    )


def reproduction(options: argparse.Namespace) -> str:
    """The options that change what a check sees, as a command line; `--checkpoint` is added per checkpoint."""
    words = []
    for name in ("base_model", "subject", "device", "dtype", "seed"):
        value = getattr(options, name)
        if value is not None and value != parser().get_default(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    for stated in options.assume:
        words += ["--assume", stated]
    if options.checks != CHECKS:
        words += ["--checks", str(options.checks)]
    return "".join(f" {shlex.quote(word)}" for word in words)


def patterns(only: Sequence[str]) -> list[str]:
    return [pattern.strip() for entry in only for pattern in entry.split(",") if pattern.strip()]


def output_files(options: argparse.Namespace) -> dict[str, Path]:
    """Where each document goes. Raises Unusable for a place that is inside a checkpoint or cannot be written, before any work."""
    outputs = {"json": options.json or OUTPUT / "verdict.json", "html": options.html or OUTPUT / "report.html"}
    outputs |= {name: getattr(options, name) for name in ("junit_xml", "markdown") if getattr(options, name) is not None}
    places = outputs if options.keep is None else {**outputs, "keep": options.keep}
    for name, path in places.items():
        for checkpoint in options.checkpoint:
            if path.resolve().is_relative_to(checkpoint.resolve()):
                raise Unusable(f"--{name.replace('_', '-')}: {path} is inside the checkpoint {checkpoint}; write it elsewhere")
    for name, path in outputs.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unusable(f"--{name.replace('_', '-')}: {path}: {error.strerror}") from error
        if path.is_dir():
            raise Unusable(f"--{name.replace('_', '-')}: {path} is a directory")
    return outputs


def baseline_file(options: argparse.Namespace) -> Path:
    if options.update_baseline != Path():
        return options.update_baseline
    return options.baseline or OUTPUT / "baseline.json"
