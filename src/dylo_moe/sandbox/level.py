"""How strongly generated code is held."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Level:
    """Layers around generated code.

    Attributes:
        bwrap: path of bubblewrap, which gives the process its own file system, network, processes and users; "" without.
        landlock: the kernel's version of Landlock; 0 without.
        seccomp: a filter of system calls.
        namespaces: its own network without bubblewrap, where the kernel lets us.
    """

    bwrap: str = ""
    landlock: int = 0
    seccomp: bool = False
    namespaces: bool = False

    @property
    def name(self) -> str:
        """For people and results: "bwrap+landlock+seccomp", "landlock+seccomp", "none"."""
        layers = {"bwrap": self.bwrap, "landlock": self.landlock, "seccomp": self.seccomp}
        return "+".join(name for name, there in layers.items() if there) or "none"

    def as_dict(self) -> dict[str, Any]:
        """Level(**this) is the level again."""
        return asdict(self)


NONE = Level()
