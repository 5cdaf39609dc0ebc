"""A forward that runs no pass where its output is known already."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_INSTALLING = threading.Lock()  # not one of each model: models are copied


class Answering:
    """Stands in the place of a model's forward while it generates, in however many threads; its hooks run as ever.

    Args:
        model: whose forward.
        answer: the output of the pass that would begin now in this thread, None where it is not known.
    """

    def __init__(self, model: nn.Module, answer: Callable[[], Any]) -> None:
        self._model = model
        self._answer = answer
        self._generations = 0
        self._put_by_others: Any = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        with _INSTALLING:
            self._generations += 1
            if self._generations == 1:
                self._put_by_others = self._model.__dict__.get("forward")
                self._model.forward = self._around(self._model.forward)
        try:
            yield
        finally:
            with _INSTALLING:
                self._generations -= 1
                if self._generations == 0:
                    del self._model.forward
                    if self._put_by_others is not None:
                        self._model.forward = self._put_by_others

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        answer = self._answer

        @functools.wraps(forward)  # generate looks at its arguments
        def answered(*args: Any, **kwargs: Any) -> Any:
            known = answer()
            return forward(*args, **kwargs) if known is None else known

        return answered
