"""Which Linears of one module read the same tensor: by the names that transformers' models give them."""

from __future__ import annotations

from collections.abc import Iterable

# In the order in which the models call them.
_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def siblings(paths: Iterable[str]) -> list[list[str]]:
    """paths: of Linears in a model -> those of each group of two or more, in the order in which they are called.

    Whether they are given the same tensor is looked at again in each pass: this only says where to look.
    """
    known = set(paths)
    parents = dict.fromkeys(path.rpartition(".")[0] for path in paths)
    groups = [[f"{parent}.{name}" for name in names if f"{parent}.{name}" in known] for parent in parents for names in _GROUPS]
    return [group for group in groups if len(group) > 1]
