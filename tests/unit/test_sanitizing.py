"""The sanitizer's process, whose parser reads what models write."""

from __future__ import annotations

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
