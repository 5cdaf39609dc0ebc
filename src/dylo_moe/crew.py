"""The workers of a Ray cluster. They stay from one generation to the next, so that each loads the checkpoint once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dylo_moe.cluster import Slots, connected
from dylo_moe.cluster_worker import ShardWorker
from dylo_moe.errors import ClusterError, DyloMoeError
from dylo_moe.memory import is_out_of_memory

ASK_SECONDS = 5.0


@dataclass
class Shard:
    """Some tasks, which one worker generates. taken: journal name -> how many bytes of the worker's are known already."""

    tasks: list[str]
    taken: dict[str, int] = field(default_factory=dict)
    deaths: int = 0


@dataclass(eq=False)
class Member:
    """A worker. host: its machine, None until it has found one; shard: what it does, None while it waits; asked: when."""

    actor: Any
    host: str | None = None
    shard: Shard | None = None
    asked: float = 0.0


@dataclass
class Death:
    """What a worker says that will say nothing any more."""

    reason: str


class Crew:
    """Workers on a cluster, as many as it has slots at the most, hired when they are needed.

    Attributes:
        address: as the user named the cluster.
        members: all that live, with those that still look for a place.
    """

    def __init__(self, slots: Slots, address: str) -> None:
        import ray

        self.slots, self.address = slots, address
        self.members: list[Member] = []
        self._ray = ray
        self._asked: dict[Any, Member] = {}
        self._hire = ray.remote(num_cpus=slots.cpus, num_gpus=slots.gpus, max_restarts=0)(ShardWorker).remote

    def idle(self) -> list[Member]:
        return [member for member in self.members if member.host is not None and member.shard is None]

    def hire(self, count: int) -> None:
        """Until there are `count` of them."""
        while len(self.members) < count:
            member = Member(self._hire())
            self.members.append(member)
            self.ask(member, member.actor.machine.remote())

    def ask(self, member: Member, answer: Any) -> None:
        """answer: what a method of its actor has promised."""
        member.asked = time.monotonic()
        self._asked[answer] = member

    def listen(self) -> Iterator[tuple[Member, Any]]:
        """Answers, of which there are none where nothing comes for a moment. The first one of each member is its machine.

        Raises:
            ClusterError: a worker cannot do its part.
        """
        ready, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=ASK_SECONDS)
        for answer in ready:
            member = self._asked.pop(answer)
            yield member, self._get(member, answer)

    def _get(self, member: Member, answer: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(answer)
        except errors.RayTaskError as error:
            if isinstance(error.cause, DyloMoeError | OSError) or is_out_of_memory(error.cause):
                raise ClusterError(f"{member.host or 'a worker'}: {error.cause}") from None
            raise
        except errors.RayError as error:  # also that Ray killed it because its machine ran out of memory
            return Death(str(error))

    def dismiss(self, member: Member) -> None:
        self.members.remove(member)
        self._asked = {answer: other for answer, other in self._asked.items() if other is not member}
        self._ray.kill(member.actor)

    def disband(self) -> None:
        for member in list(self.members):
            self.dismiss(member)


@contextmanager
def hired(address: str | None) -> Iterator[Crew | None]:
    """The crew of a cluster for as many generations as there are; None without an address. Raises as `cluster.connected`."""
    if address is None:
        yield None
        return
    with connected(address) as slots:
        yield Crew(slots, address)
