"""What can be judged: the built-in names, and any `package.module:factory`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from harness.subjects.protocol import Subject

BUILT_IN = {
    "dylo-moe": "harness.subjects.dylo_moe_subject:make",
    "naive-loop": "harness.subjects.naive_loop:make",
    "multi-pass": "harness.subjects.multi_pass:make",
    "peft-xlora": "harness.subjects.peft_xlora:make",
    "peft-arrow": "harness.subjects.peft_arrow:make",
}


def find_subject(name: str) -> Subject:
    """The subject called `name`, or made by calling `package.module:factory`.

    Raises:
        ValueError: the name is neither; the message is one line and lists the built-in names.
    """
    module_name, colon, factory = BUILT_IN.get(name, name).partition(":")
    if not colon or not module_name or not factory.isidentifier():
        raise ValueError(f"unknown subject {name!r}: expected package.module:factory or one of {', '.join(BUILT_IN)}")
    if str(Path.cwd()) not in sys.path:  # a console script does not look where the user stands
        sys.path.append(str(Path.cwd()))
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"subject {name!r}: {_cause(error)}") from error
    make = getattr(module, factory, None)
    if not callable(make):
        raise ValueError(f"subject {name!r}: {module_name} has no function {factory!r}")
    try:
        subject = make()
    except (Exception, SystemExit) as error:
        raise ValueError(f"subject {name!r}: {_cause(error)}") from error
    missing = [member for member in ("name", "load") if not hasattr(subject, member)]
    if missing:
        raise ValueError(f"subject {name!r}: what {factory}() returned has no {' and no '.join(missing)}")
    return subject


def _cause(error: BaseException) -> str:
    return str(error) if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"


__all__ = ["BUILT_IN", "Subject", "find_subject"]
