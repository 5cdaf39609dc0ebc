"""A model that transformers cannot build from a configuration: one line instead of its many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from dylo_moe.errors import InvalidField

# What transformers raises for values that no model of the type can have; its classes check few of them, and by many means.
_REFUSALS = (
    StrictDataclassError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
)


@contextmanager
def buildable(path: str | Path) -> Iterator[None]:
    """Around building a model or its configuration.

    Raises:
        InvalidField: transformers refuses or fails. Running out of a device's memory stays what it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        expected = "values and options from which transformers builds this model"
        raise InvalidField(path, "configuration", found=found, expected=expected) from error
