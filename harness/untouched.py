"""What of EvalPlus no decoder may change: whatever else the process evaluates would then be evaluated otherwise."""

from __future__ import annotations

from typing import Any


def evalplus_state() -> dict[str, Any]:
    """The functions and classes of EvalPlus that others use, and copies of its lists."""
    import evalplus.codegen
    import evalplus.evaluate
    import evalplus.provider.base
    import evalplus.provider.utility

    modules = (evalplus.codegen, evalplus.evaluate, evalplus.provider, evalplus.provider.base, evalplus.provider.utility)
    found: dict[str, Any] = {"lists": {}}
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, list) and not name.startswith("__"):
                found["lists"][f"{module.__name__}.{name}"] = list(value)
            elif callable(value):
                found[f"{module.__name__}.{name}"] = value
    return found
