"""The strongest level that holds on this machine, or the one that the user insists on."""

from __future__ import annotations

import platform
import shutil

from dylo_moe.errors import ScoringError
from dylo_moe.sandbox.canaries import problems
from dylo_moe.sandbox.landlock import version
from dylo_moe.sandbox.level import NONE, Level
from dylo_moe.sandbox.syscalls import MACHINES

SANDBOXES = ("auto", "bwrap", "none")
LANDLOCK_ENOUGH = 3  # before it a file can be cut to nothing without being opened for writing
_ADVICE = "--sandbox none runs it with nothing but EvalPlus's guard, on a machine that may be lost"


def choose(sandbox: str) -> Level:
    """The level for "auto", "bwrap" or "none".

    Raises:
        ScoringError: one line that says what does not hold here. Nothing weaker is taken instead, unless the user says none.
    """
    if sandbox == "none":
        return NONE
    levels = [level for level in candidates() if sandbox == "auto" or level.bwrap]
    reasons = [] if levels else ["no bubblewrap (bwrap) here" if sandbox == "bwrap" else "neither bubblewrap nor Landlock here"]
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        levels, reasons = [], [f"no sandbox for {platform.system()} on {platform.machine()}"]
    for level in levels:
        found = problems(level)
        if not found:
            return level
        reasons.append(f"{level.name}: {'; '.join(found)}")
    raise ScoringError(f"generated code cannot be held: {', '.join(reasons)}; {_ADVICE}")


def candidates() -> list[Level]:
    """What there is on this machine, the strongest first; whether it holds is another question."""
    landlock, bwrap = version() if platform.system() == "Linux" else 0, shutil.which("bwrap")
    inside = [Level(bwrap, landlock, seccomp=True)] if bwrap else []
    alone = [Level("", landlock, seccomp=True, namespaces=more) for more in (True, False)]
    return inside + (alone if landlock >= LANDLOCK_ENOUGH else [])
