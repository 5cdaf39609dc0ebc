"""What of the file system a Python program needs to read: the interpreter, its libraries, the system's shared libraries."""

from __future__ import annotations

import site
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

_SYSTEM = (
    *("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/etc/ld.so.cache"),
    *("/usr/share/zoneinfo", "/etc/localtime", "/usr/share/locale"),
)
# EvalPlus reads the size of the memory in the process that it has restricted.
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/proc/meminfo")
_OWN = Path(__file__).resolve().parents[1]


def readable() -> list[str]:
    """For generated code: libraries, and devices that hold nothing."""
    paths = sysconfig.get_paths()
    python = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return _outermost([*python, *site.getsitepackages(), *_homes(), *_SYSTEM, *_DEVICES])


def mounted() -> list[str]:
    """For the process that starts it: besides libraries the interpreter and this package. Without devices."""
    base = [sys.base_prefix, sys.prefix, sys.exec_prefix]
    own = [path for path in readable() if path not in _DEVICES]
    return _outermost([*base, *own, "/usr", str(_OWN)])


def import_path() -> str:
    """PYTHONPATH with which a child finds what this process finds."""
    return ":".join(entry for entry in sys.path if entry and Path(entry).exists())


def _homes() -> list[str]:
    """Where packages lie that neither installation holds, as with PYTHONPATH."""
    return [str(Path(find_spec(name).origin).parents[1]) for name in ("numpy", "evalplus")]


def _outermost(paths: list[str]) -> list[str]:
    """Without what does not exist, and what lies in another of them."""
    found = sorted({path for path in paths if Path(path).exists()})
    return [path for path in found if not any(path != other and path.startswith(other.rstrip("/") + "/") for other in found)]
