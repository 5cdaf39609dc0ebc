"""The sanitizer's process, whose parser reads what models write, and its limits beside those of the machine."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dylo_moe.errors import ScoringError
from dylo_moe.sandbox.jail import Jail
from dylo_moe.sandbox.ladder import LANDLOCK_ENOUGH
from dylo_moe.sandbox.landlock import version
from dylo_moe.sandbox.level import NONE
from dylo_moe.sanitizing import Sanitizer


def test_sanitizer_works_with_its_rights_taken_away():
    if version() < LANDLOCK_ENOUGH:
        pytest.skip(f"Landlock {version()} here")
    with Sanitizer() as sanitizer:
        assert sanitizer("def f():\n    return 1\n\nprint(2)\n", "f") == ("def f():\n    return 1", "")
        status = Path(f"/proc/{sanitizer._worker._process.pid}/status").read_text()
    assert "Seccomp:\t2\n" in status and "CapEff:\t0000000000000000\n" in status
    assert "Seccomp:\t2\n" not in Path("/proc/self/status").read_text()


LIMITED = """
import resource, sys
from dylo_moe.errors import ScoringError
from dylo_moe.sandbox.canaries import problems
from dylo_moe.sandbox.ladder import candidates
from dylo_moe.sanitizing import Sanitizer

solution = "def f():\\n    return 1\\n\\nprint(2)\\n"
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30,) * 2)
with Sanitizer() as sanitizer:
    print(sanitizer(solution, "f"))
print([problems(level) for level in candidates()[-1:]])
resource.setrlimit(resource.RLIMIT_AS, (100 * 2**20,) * 2)
with Sanitizer() as sanitizer:
    try:
        print(sanitizer(solution, "f"))
    except ScoringError as error:
        print(error)
"""


def test_limit_of_the_machine_below_ours_is_kept_to_and_never_the_solutions_fault():
    """`ulimit -v`, as batch schedulers set it: both children have limits of their own, which they cannot raise above it."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-1000:]
    cleaned, held, refused = done.stdout.splitlines()
    assert cleaned == repr(("def f():\n    return 1", ""))
    assert held == "[()]" or version() < LANDLOCK_ENOUGH
    assert refused.startswith("the process that sanitizes solutions does not start: dylo_moe.sanitize_worker died")


def test_sanitizer_that_died_of_the_machine_is_asked_again():
    with Sanitizer() as sanitizer:
        sanitizer.start()
        sanitizer._worker._process.kill()
        assert sanitizer("def f():\n    return 1\n\nprint(2)\n", "f") == ("def f():\n    return 1", "")


def test_memory_for_generated_code_that_is_no_number_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("EVALPLUS_MAX_MEMORY_BYTES", "4G")
    with pytest.raises(ScoringError, match="EVALPLUS_MAX_MEMORY_BYTES is '4G', but should be a number of bytes"):
        Jail(NONE).load({})
    assert not list(tmp_path.iterdir())


def test_sanitizer_starts_without_the_packages_that_it_does_not_use():
    code = (
        "import sys\nfrom dylo_moe.sanitize_worker import light_sanitize\nsanitize = light_sanitize()\n"
        "assert sanitize('def f():\\n    return 1\\n\\nprint(2)\\n', entrypoint='f') == 'def f():\\n    return 1'\n"
        "assert not {'pandas', 'pyarrow', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
