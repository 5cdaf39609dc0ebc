"""A program of its own: generates with two checkpoints and five strategies into one directory, killed again and again.

One process imports everything once and forks; a child does what the commands do, and is killed with SIGKILL. Prints one JSON
object per kill, then what there is in the end. Usage: killing.py WAY KILLS SEED DIRECTORY, where WAY is "codegen" (ten
commands `dylo-moe codegen`) or "together" (the strategies of a checkpoint in one go, as `dylo-moe benchmark` does).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from dylo_moe.cli import main
from dylo_moe.evalplus import plan_generation
from dylo_moe.generating import generate_samples
from harness.specimens import write_base, write_checkpoint
from harness.specimens.tasks import TASKS, write_task_set

STRATEGIES = ("router", "single:1", "best", "ensemble", "round_robin")
LONGEST = 600.0


def prepare(place: Path) -> list[Path]:
    base = write_base(place / "base", "llama")
    os.environ["HUMANEVAL_OVERRIDE_PATH"] = str(write_task_set(place / "tasks", "humaneval", TASKS[:3]))
    return [write_checkpoint(place / f"checkpoint{seed}", base, num_experts=2, seed=seed) for seed in range(2)]


def generate(checkpoints: list[Path], root: Path, way: str, rows: int) -> None:
    """The same command, whatever happened before. rows: of a batch."""
    for checkpoint in checkpoints:
        if way == "together":
            options = {
                "dataset": "humaneval",
                "temperature": 0.8,
                "n_samples": 2,
                "dtype": "float32",
                "max_new_tokens": 8,
                "bs": rows,
            }
            generation = plan_generation({"model": str(checkpoint), **options}, STRATEGIES)
            generate_samples(generation, root / "humaneval")
            continue
        for strategy in STRATEGIES:
            words = (
                f"--dataset humaneval --root {root} --temperature 0.8 --n-samples 2 --dtype float32 --max-new-tokens 8".split()
            )
            code = main(["codegen", "--model", str(checkpoint), "--routing-strategy", strategy, "--bs", str(rows), *words])
            assert code == 0, f"codegen ended with {code}"


def start(checkpoints: list[Path], root: Path, way: str, rows: int = 2) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            generate(checkpoints, root, way, rows)
            code = 0
        finally:
            os._exit(code)
    return pid


def size(root: Path) -> int:
    """Bytes of everything in the directory; a file may go while we look."""
    total = 0
    for path in root.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def killed(pid: int, moment: float, root: Path, reached: int) -> int | None:
    """Kills when the directory has `reached` bytes, and `moment` seconds more; the exit code of a child that ended before."""
    deadline = time.monotonic() + LONGEST
    while size(root) < reached and time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return 0
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def run(way: str, kills: int, seed: int, place: Path) -> None:
    checkpoints, chance = prepare(place), random.Random(seed)
    pid = start(checkpoints, place / "undisturbed", way, rows=32)  # killed runs write few at a time, so that there is a middle
    assert os.waitpid(pid, 0)[1] == 0
    whole = size(place / "undisturbed")
    root = place / "killed"
    for number in range(kills):
        early = chance.random() < 0.2  # anywhere in its start; else when about so much has been written
        reached = 0 if early else int(whole * (number + chance.random()) / kills)
        moment = chance.uniform(0, 1.5) if early else chance.uniform(0, 0.02)
        ended = killed(start(checkpoints, root, way), moment, root, reached)
        print(json.dumps({"kill": number, "share": round(size(root) / whole, 3), "ended": ended}), flush=True)
    assert os.waitpid(start(checkpoints, root, way), 0)[1] == 0


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
