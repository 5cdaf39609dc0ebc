"""validate_moe_modifications: the command.

Exit codes: 0 every required law passed; 1 a law or threshold failed; 2 the command line or a checkpoint is unusable, one line
says why; 3 the judge itself failed, or was ended before it had a verdict; 4 nothing failed, but something required is void or
inconclusive.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.catalogue import Law, explain, no_such_check, read_laws, select
from harness.gate import Gate, load_gate
from harness.guarded import guarded
from harness.options import PROGRAM, baseline_file, output_files, parser, patterns, reproduction
from harness.outcome import EXIT_JUDGE_FAILED, EXIT_PASSED, EXIT_UNUSABLE, Unusable

if TYPE_CHECKING:
    from harness.docket import Settings

EXIT_INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; the command line itself, without `arguments`, in a process of its own."""
    if arguments is None:
        return guarded(lambda: _answered(sys.argv[1:]), PROGRAM)
    return _answered(list(arguments))


def _answered(command: list[str]) -> int:
    from dylo_moe.errors import DyloMoeError  # after argparse is imported, before torch: errors.py imports neither

    options = None
    try:
        options = parser().parse_args(command)
        code = run(options, command)
        sys.stdout.flush()
        return code
    except SystemExit as ended:
        if options is None:  # argparse printed the help
            return EXIT_PASSED
        # No exit code of a subject's may pass for a verdict.
        print(f"{PROGRAM}: code under judgement called sys.exit({ended.code!r}), no verdict", file=sys.stderr)
        return EXIT_JUDGE_FAILED
    except (Unusable, DyloMoeError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_UNUSABLE
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted, no verdict", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again to write what is left, at exit
        print(f"{PROGRAM}: {error.filename or 'standard output'}: {error.strerror}, no verdict", file=sys.stderr)
        return EXIT_JUDGE_FAILED
    except Exception:  # noqa: BLE001  (the last frame: what escapes here is the judge's own failure)
        traceback.print_exc()
        print(f"{PROGRAM}: the judge itself failed; this says nothing about the checkpoint", file=sys.stderr)
        return EXIT_JUDGE_FAILED


def run(options: argparse.Namespace, command: Sequence[str]) -> int:
    laws = read_laws(options.checks)
    gate = load_gate(options.gate)
    if options.list:
        print("\n".join(f"{law.id:<42} {law.statement}" for law in laws))
        return EXIT_PASSED
    if options.explain is not None:
        print(_explained(laws, gate, options.explain))
        return EXIT_PASSED
    return _judge(options, select(laws, patterns(options.only)), gate, command)


def _judge(options: argparse.Namespace, laws: Sequence[Law], gate: Gate, command: Sequence[str]) -> int:
    from harness import baseline, judging, report, verdict
    from harness.progress import Display

    gc.collect()
    gc.freeze()  # what is imported by now stays: no later collection has to walk through torch and transformers
    if options.update_baseline is not None:
        baseline.refuse_unfit_tree(Path.cwd())
    if options.wandb_artifact:
        from dylo_moe import download_artifact

        options.checkpoint = [*options.checkpoint, *map(download_artifact, options.wandb_artifact)]
    outputs = output_files(options)
    with Display(verbose=options.verbose) as display:
        document = judging.judge(_settings(options, laws, gate, command), display)
    verdict.write_verdict(outputs["json"], document)
    document = verdict.read_verdict(outputs["json"])
    for kind, render in (("html", report.html), ("junit_xml", report.junit_xml), ("markdown", report.markdown)):
        if kind in outputs:
            verdict.write_text(outputs[kind], render(document))
    print(report.text(document, outputs))
    if options.update_baseline is not None:
        baseline.update(baseline_file(options), document)
    return document["exit_code"]


def _settings(options: argparse.Namespace, laws: Sequence[Law], gate: Gate, command: Sequence[str]) -> Settings:
    from dylo_moe import parse_assumptions
    from harness.builtin import exhibits_for, users_exhibit
    from harness.docket import Settings
    from harness.subjects import find_subject

    _quieten()
    try:
        subject = find_subject(options.subject)
    except ValueError as error:
        raise Unusable(f"--subject: {error}") from error
    if options.expect_hash and len(options.checkpoint) != 1:
        raise Unusable(f"--expect-hash: needs exactly one --checkpoint, found {len(options.checkpoint)}")
    exhibits = [users_exhibit(path) for path in options.checkpoint] or exhibits_for(subject)
    if not exhibits:
        formats = ", ".join(subject.formats) or "no format"
        raise Unusable(f"--subject: {options.subject} reads {formats}, of which there is no specimen: name a --checkpoint")
    if options.seed < 0:
        raise Unusable(f"--seed: found {options.seed}, expected 0 or more")
    return Settings(
        subject_name=options.subject,
        subject=subject,
        laws=laws,
        gate=gate,
        exhibits=exhibits,
        base_model=options.base_model,
        device=_device(options.device),
        dtype=options.dtype,
        assume=parse_assumptions(options.assume),
        seed=options.seed,
        keep=options.keep,
        expect_hash=options.expect_hash,
        baseline=None if options.update_baseline is not None else options.baseline,
        command=[PROGRAM, *command],
        options=reproduction(options),
    )


def _device(wanted: str) -> str:
    import torch

    if wanted == "cpu":
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise Unusable(f"--device: cuda: no CUDA device is visible to torch {torch.__version__}")
    return "cpu"


def _quieten() -> None:
    """The judge has its own progress display."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _explained(laws: Sequence[Law], gate: Gate, wanted: str) -> str:
    found = [law for law in laws if law.id == wanted]
    if not found:
        raise Unusable(no_such_check(laws, wanted))
    rule = gate.rule(wanted)
    lines = [f"{'required' if rule.required else 'advisory'} ({rule.reason})"]
    named = [name for name in gate.thresholds if name in found[0].tolerance.replace(",", " ").replace(";", " ").split()]
    lines += [f"{name} = {gate.thresholds[name].value} ({gate.thresholds[name].reason})" for name in named]
    return explain(found[0], gate=lines)


if __name__ == "__main__":
    sys.exit(main())
