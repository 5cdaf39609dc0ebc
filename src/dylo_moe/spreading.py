"""The same samples as in one process, from the machines of a Ray cluster: workers generate, this process alone writes."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from dylo_moe.crew import Crew, Death, Member, Shard, hired
from dylo_moe.errors import ClusterError, OptionError, SampleFileError, one_line
from dylo_moe.generating import Generation
from dylo_moe.generating import generate_samples as generate_here
from dylo_moe.identity import difference
from dylo_moe.journal_lines import whole_lines
from dylo_moe.opened import Opened
from dylo_moe.progress import Progress
from dylo_moe.samples import SampleJournal

# Until one worker has found a place and imported what it needs; one that waits behind others may wait longer. Ray's autoscaler
# takes minutes to start a machine, and its workers have niceness 15, which is a thirtieth of a processor beside other work.
START_SECONDS = 600.0
SILENT_SECONDS = 900.0  # without an answer from a worker, which answers every second but while it loads a model
DEATHS = 3  # of workers, one after the other, without a sample between them
_KEPT = "the samples so far are kept, and the same command continues"
_UNSEEN = ("base_input", "plus_input")  # what workers need not know of a task; a thousand times as long as the rest


def generate_samples(
    generation: Generation, directory: Path, *, opened: Opened | None = None, crew: Crew | None = None
) -> dict[str, Path]:
    """`generating.generate_samples`, on the cluster that `generation.ray` names, if it names one.

    Args:
        crew: of that cluster, where several generations share its workers; None to hire some for this one.

    Raises:
        ClusterError, OptionError: as `cluster.connected`, or because no worker can do its part. What was generated until then
            is kept, and the same call continues.
    """
    if generation.ray is None:
        return generate_here(generation, directory, opened=opened)
    if generation.shard is not None:
        raise OptionError("ray and shard: a cluster takes all shards, so give only one of them")
    with nullcontext(crew) if crew else hired(generation.ray) as crew:
        generation = replace(generation, device=crew.slots.device)
        return generate_here(generation, directory, functools.partial(_spread, crew), opened=opened)


def _spread(crew: Crew, generation: Generation, journals: Mapping[str, SampleJournal]) -> None:
    try:
        _Run(crew, generation, journals).finish()
    except ConnectionError as error:  # Ray's own, of an address ray://
        lost = one_line(f"{crew.address}: the connection is lost: {error}", 300)
        raise ClusterError(f"{lost}; {_KEPT}") from error
    except BaseException:
        crew.disband()
        raise


class _Run:
    """The shards of one generation, and those that no worker has now."""

    def __init__(self, crew: Crew, generation: Generation, journals: Mapping[str, SampleJournal]) -> None:
        self.crew, self.generation = crew, generation
        self.wanted = {journal.path.name: generation.samples_of(strategy) for strategy, journal in journals.items()}
        self.journals = {journal.path.name: journal for journal in journals.values()}
        self.waiting: list[Shard] = []
        self.placeless = 0  # workers that died before they had found a place, one after the other
        self.heard = time.monotonic()

    def finish(self) -> None:
        """Returns when no sample is missing."""
        tasks = [task for task in self.generation.task_ids() if self.missing([task])]
        count = min(self.crew.slots.count, len(tasks))
        self.waiting = [Shard(tasks[number::count]) for number in range(count)]
        label = f"{self.generation.task_set.dataset} on {count} workers"
        with Progress(label, [task for task in tasks for _ in range(self.missing([task]))]) as self.progress:
            while self.waiting or self.working():
                self.assign()
                for member, found in self.crew.listen():
                    self.hear(member, found)
                self.check_silence()

    def missing(self, tasks: list[str]) -> int:
        """How many samples of these tasks are not there yet."""
        wanted = self.wanted.items()
        return sum(len(self.journals[name].missing(task, n_samples)) for name, n_samples in wanted for task in tasks)

    def working(self) -> list[Member]:
        return [member for member in self.crew.members if member.shard is not None]

    def assign(self) -> None:
        """Gives what is missing of each shard that waits to a worker that is free, with the samples that are there."""
        self.crew.hire(min(self.crew.slots.count, len(self.waiting) + len(self.working())))
        for member in self.crew.idle()[: len(self.waiting)]:
            shard = self.waiting.pop(0)
            part = [task for task in shard.tasks if self.missing([task])]
            known = {name: journal.excerpt(part) for name, journal in self.journals.items()}
            shard.taken = {name: len(content) for name, content in known.items()}
            member.shard = shard
            self.crew.ask(member, member.actor.start.remote(part_of(self.generation, part), known))

    def hear(self, member: Member, found: Any) -> None:
        self.heard = time.monotonic()
        if isinstance(found, Death):
            self.bury(member, found.reason)
        elif member.host is None:
            member.host, self.placeless = found, 0
        else:
            self.take(member, member.shard, *found)

    def take(self, member: Member, shard: Shard, found: dict[str, bytes], done: bool) -> None:
        """Writes what a worker has found, and asks it for more."""
        for name, lines in found.items():
            if name not in self.journals:
                raise ClusterError(f"{member.host}: {foreign_journal(name, lines, list(self.journals.values()))}")
            for record in self.journals[name].absorb(lines):
                self.progress.finish(record.task_id)
            shard.taken[name] += len(lines)
            shard.deaths = 0
        if not done:
            self.crew.ask(member, member.actor.news.remote(shard.taken))
            return
        member.shard = None
        if lost := self.missing(shard.tasks):
            raise SampleFileError(f"{member.host}: its worker ended with {lost} samples missing")

    def bury(self, member: Member, reason: str) -> None:
        """Another worker continues where the dead one stopped."""
        self.crew.dismiss(member)
        where = member.host or "a machine"
        if member.shard is None:
            self.placeless += 1
            deaths, doing = self.placeless, "before it had a task"
        else:
            self.waiting.append(member.shard)
            member.shard.deaths += 1
            deaths, doing = member.shard.deaths, f"with task {member.shard.tasks[0]}"
        if deaths > DEATHS:
            raise ClusterError(f"{where}: a worker died {doing}, and {DEATHS} others before it: {reason}")
        self.progress.say(one_line(f"The worker on {where} died ({reason}): another one continues", 200))

    def check_silence(self) -> None:
        """Nothing waits for ever: neither for a place in the cluster, nor for a worker that says nothing any more."""
        now = time.monotonic()
        for member in self.working():
            if now - member.asked > SILENT_SECONDS:
                self.bury(member, f"no answer for {SILENT_SECONDS:g} s")
        if self.waiting and not self.working() and now - self.heard > START_SECONDS:
            slots = self.crew.slots
            need = "1 GPU" if slots.gpus else f"{slots.cpus} processors"
            raise ClusterError(
                f"{self.crew.address}: no worker with {need} found a place within {START_SECONDS:g} s: the cluster is busy, "
                f"or machines are gone; {_KEPT}"
            )


def part_of(generation: Generation, tasks: list[str]) -> Generation:
    """The same generation of these tasks only, with paths that mean the same in another working directory."""
    every = generation.task_set.tasks
    seen = {task: {name: value for name, value in every[task].items() if name not in _UNSEEN} for task in tasks}
    decoder = {**generation.decoder, "adapter_path": str(generation.checkpoint.absolute())}
    if decoder["base_model"] is not None and Path(decoder["base_model"]).is_dir():
        decoder["base_model"] = str(Path(decoder["base_model"]).absolute())
    task_set = replace(generation.task_set, tasks=seen)
    return replace(generation, decoder=decoder, task_set=task_set, task_range=None, ray=None, device=None)


def foreign_journal(name: str, lines: bytes, journals: Sequence[SampleJournal]) -> str:
    """Why a worker writes a journal that nobody asked it for."""
    found = whole_lines(lines, Path(name))[0][0]["identity"]
    ours = [journal.identity for journal in journals]
    same = [identity for identity in ours if identity["options"]["routing_strategy"] == found["options"]["routing_strategy"]]
    expected = (same or ours)[0]
    if expected["device"] == "cuda" != found["device"]:
        return "Ray counts a GPU there, but torch finds none; install torch for it, or start Ray there with --num-gpus 0"
    where = difference(found, expected)
    return f"its samples would be others: {where}; every machine needs the same files at the same path, and the same packages"
