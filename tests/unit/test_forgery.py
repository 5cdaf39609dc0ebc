"""Solutions that want a score which they do not deserve: EvalPlus's own check gives it to most, ours to none."""

from __future__ import annotations

import pytest

from dylo_moe.scoring import Limits, Sample, Scorer
from dylo_moe.tasks import load_tasks
from harness.specimens.tasks import write_records

TASK = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return [x * 1.5, x + 0.25]\n",
    "contract": "",
    "base_input": [[1], [2]],
    "plus_input": [[3], [4]],
    "atol": 0,
}
LIMITS = Limits(base_only=True, min_time_limit=1.0)
# Writes "passed" into the shared memory that EvalPlus's process reads, found in the frames of its checker.
_SHARED = """
import sys
frame = sys._getframe()
while frame is not None:
    if "stat" in frame.f_locals and "details" in frame.f_locals:
        shared = frame.f_locals
        shared["stat"].value = 0
        shared["progress"].value = len(shared["details"])
        for i in range(len(shared["details"])):
            shared["details"][i] = True
    frame = frame.f_back
import posix
posix._exit(0)
"""
_EQUAL = "class Equal(list):\n    def __eq__(self, other):\n        return True\n"
# What the process of a solution knows: everything that the collector tracks, and the variables of every caller.
_FOUND = """
import gc, sys

def f(x):
    frame = sys._getframe().f_back
    while frame is not None:
        expected = frame.f_locals.get("expected")
        if expected:
            return expected[x - 1]
        frame = frame.f_back
    for thing in gc.get_objects():
        if type(thing) is list and len(thing) == 2 and all(type(row) is list and row[1:] for row in thing):
            if [row[0] for row in thing] == [1.5, 3.0]:
                return thing[x - 1]
"""
FORGERIES = {  # name: (solution, whether EvalPlus falls for it)
    "always equal": (_EQUAL + "def f(x):\n    return Equal()\n", True),
    "equal in a list": ("class Any:\n    __eq__ = lambda a, b: True\ndef f(x):\n    return [Any(), Any()]\n", True),
    "found": (_FOUND, True),
    "shared memory": (_SHARED, True),
    "patched comparison": (
        "import numpy\nnumpy.allclose = lambda *a, **k: True\ndef f(x):\n    return [0.0, 0.0]\n",
        True,
    ),
    "exit": ("import posix\nposix._exit(0)\n", False),
    "exit in a call": ("def f(x):\n    raise SystemExit(0)\n", False),
    "every descriptor": (
        "import posix, struct\ndef f(x):\n    for number in range(3, 256):\n        try:\n"
        "            posix.write(number, struct.pack('<cQ', b'v', 0) * 9)\n        except OSError:\n            pass\n",
        False,
    ),
    "patched encoding": (
        "import sys\nfor name, module in list(sys.modules.items()):\n    if name.endswith('outputs'):\n"
        "        module.encode = lambda value, limit: b'B' + (1).to_bytes(8, 'little') + bytes([1])\n"
        "def f(x):\n    return [x * 1.5, x + 0.25]\n",
        True,  # whose function is right, and which harms itself
    ),
    "nothing": ("def f(x):\n    return None\n", False),
}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = write_records(tmp_path_factory.mktemp("tasks") / "tasks.jsonl", [TASK])
        patch.setenv("HUMANEVAL_OVERRIDE_PATH", str(path))
        with Scorer(load_tasks("humaneval"), LIMITS) as scorer:
            yield scorer


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_score_is_not_believed_and_the_next_sample_is_right(scorer, forgery):
    solution, fooled = FORGERIES[forgery]
    samples = [Sample("HumanEval/0", 0, solution), Sample("HumanEval/0", 1, "def f(x):\n    return [1.5 * x, 0.25 + x]\n")]
    forged, honest = (score.parts["base"] for score in scorer.score(samples))
    assert (honest["ours"], honest["stock"]) == ("pass", "pass")
    assert forged["ours"] != "pass"
    assert (forged["stock"] == "pass") is fooled
    assert bool(forged["reason"]) is (forged["stock"] == "pass")


def leave_and_take(places):
    """Two solutions: one that has seen the expected outputs in EvalPlus's own check leaves them in files, one looks there."""
    leave = f"""
import io, sys
def f(x):
    frame = sys._getframe()
    while frame is not None:
        expected = frame.f_locals.get("expected")
        for place in {places} if expected else ():
            try:
                io.open(place, "w").write(repr(expected))
            except OSError:
                pass
        frame = frame.f_back
    return [0]
"""
    take = f"""
import ast, io
def f(x):
    for place in {places}:
        try:
            return ast.literal_eval(io.open(place).read())[x - 1]
        except OSError:
            pass
"""
    return [Sample("HumanEval/0", index, text) for index, text in enumerate((leave, take, leave, take))]


def test_what_one_solution_knows_does_not_reach_the_next(scorer, tmp_path):
    places = [f"{directory}/left" for directory in (tmp_path, "/tmp", "/dev/shm", "/var/tmp", ".", "..", "/proc/self")]
    statuses = [[score.parts["base"]["ours"] for score in scorer.score(leave_and_take(places))]]
    with Scorer(scorer.task_set, LIMITS, sandbox="none") as free:
        statuses.append([score.parts["base"]["ours"] for score in free.score(leave_and_take([str(tmp_path / "left")]))])
    assert statuses == [["fail"] * 4, ["fail", "pass"] * 2]
