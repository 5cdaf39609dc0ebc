"""The sanitizer's process, whose parser reads what models write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dylo_moe.sandbox.ladder import LANDLOCK_ENOUGH
from dylo_moe.sandbox.landlock import version
from dylo_moe.sanitizing import Sanitizer


def test_sanitizer_works_with_its_rights_taken_away():
    if version() < LANDLOCK_ENOUGH:
        pytest.skip(f"Landlock {version()} here")
    with Sanitizer() as sanitizer:
        assert sanitizer("def f():\n    return 1\n\nprint(2)\n", "f") == ("def f():\n    return 1", "")
        status = Path(f"/proc/{sanitizer._worker._process.pid}/status").read_text()
    assert "Seccomp:\t2\n" in status and "CapEff:\t0000000000000000\n" in status
    assert "Seccomp:\t2\n" not in Path("/proc/self/status").read_text()


def test_sanitizer_starts_without_the_packages_that_it_does_not_use():
    code = (
        "import sys\nfrom dylo_moe.sanitize_worker import light_sanitize\nsanitize = light_sanitize()\n"
        "assert sanitize('def f():\\n    return 1\\n\\nprint(2)\\n', entrypoint='f') == 'def f():\\n    return 1'\n"
        "assert not {'pandas', 'pyarrow', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
