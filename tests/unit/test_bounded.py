"""Values that are made to keep the process busy that judges them."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from dylo_moe.bounded import bounded
from dylo_moe.sandbox.encoding import encode
from dylo_moe.truth import Truth

RECORD = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return [i + 0.5 for i in range(x)]\n",
    "base_input": [[1], [3000]],
    "plus_input": [],
    "atol": 0,
}
# Ten thousand numbers of one hash: a set of them takes a hundred million comparisons, in one call that no signal interrupts.
BUSY = """
import sys
from dylo_moe.bounded import bounded
numbers = [k * (2 ** 61 - 1) for k in range(40000)]
sys.stdin.close()
with bounded({seconds}, 2 ** 30):
    set(numbers[:{count}])
print("done")
"""


@pytest.mark.parametrize(("count", "status"), [(40000, -signal.SIGPROF), (10, 0)])
def test_process_that_takes_too_long_over_a_value_ends(count, status):
    done = subprocess.run([sys.executable, "-c", BUSY.format(seconds=0.2, count=count)], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (status, b"" if status else b"done\n")


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, [range(10**12)]),  # NumPy takes it for as many numbers
        (0, ["x" * 10**6] + [0.0] * 9999),  # an array of texts gives each the room of the longest
        (1, np.zeros((10**6, 1), np.int8)),  # compared with each of three thousand
    ],
    ids=["range", "texts", "column"],
)
def test_small_value_that_stands_for_a_large_one_is_wrong(index, value):
    truth = Truth("humaneval", RECORD)
    assert truth.right("base", index, encode([i + 0.5 + 1e-9 for i in range(RECORD["base_input"][index][0])]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not truth.right("base", index, encode(value))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "in KiB: a gigabyte"


def test_limits_are_gone_afterwards():
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), bounded(10.0, 2**28):
        bytearray(2**29)
    assert len(bytearray(2**29)) == 2**29
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
