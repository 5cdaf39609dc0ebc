"""State that every thread has for itself: two threads may run one model, each its own passes and generations."""

from __future__ import annotations

import threading
from typing import Any


class ThreadState(threading.local):
    """Attributes of one thread; a thread that comes anew starts with those of __init__, and so does a copy."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()


class PerThread:
    """An attribute that is kept in its object's `now`, a ThreadState."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return getattr(instance.now, self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance.now, self.name, value)
