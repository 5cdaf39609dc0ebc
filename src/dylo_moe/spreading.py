"""The same samples as in one process, from the machines of a Ray cluster: workers generate, this process alone writes."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dylo_moe.cluster import Slots, connected
from dylo_moe.cluster_worker import ShardWorker
from dylo_moe.errors import ClusterError, DyloMoeError, OptionError, SampleFileError, one_line
from dylo_moe.generating import Generation
from dylo_moe.generating import generate_samples as generate_here
from dylo_moe.identity import difference
from dylo_moe.journal_lines import whole_lines
from dylo_moe.opened import Opened
from dylo_moe.progress import Progress
from dylo_moe.samples import SampleJournal

START_SECONDS = 120.0  # until one worker has found a place; a worker that waits behind others may wait longer
SILENT_SECONDS = 900.0  # without an answer from a worker, which answers every second but while it loads a model
DEATHS = 3  # of a worker, one after the other, without a sample between them
_UNSEEN = ("base_input", "plus_input")  # what workers need not know of a task; a thousand times as long as the rest


def generate_samples(generation: Generation, directory: Path, *, opened: Opened | None = None) -> dict[str, Path]:
    """`generating.generate_samples`, on the cluster that `generation.ray` names, if it names one.

    Raises:
        ClusterError, OptionError: as `cluster.connected`, or because no worker can do its part. What was generated until then
            is kept, and the same call continues.
    """
    if generation.ray is None:
        return generate_here(generation, directory, opened=opened)
    if generation.shard is not None:
        raise OptionError("ray and shard: a cluster takes all shards, so give only one of them")
    with connected(generation.ray) as slots:
        generation = replace(generation, device=slots.device)
        return generate_here(generation, directory, functools.partial(_spread, slots), opened=opened)


@dataclass
class _Shard:
    """Some tasks, and the worker that generates them now. host: its machine, None until it has found one."""

    tasks: list[str]
    worker: Any = None
    host: str | None = None
    taken: dict[str, int] = field(default_factory=dict)
    deaths: int = 0
    heard: float = 0.0


def _spread(slots: Slots, generation: Generation, journals: Mapping[str, SampleJournal]) -> None:
    _Run(slots, generation, journals).finish()


class _Run:
    """The shards of one generation, and what their workers are asked now."""

    def __init__(self, slots: Slots, generation: Generation, journals: Mapping[str, SampleJournal]) -> None:
        import ray

        self.ray, self.slots, self.generation = ray, slots, generation
        self.wanted = {journal.path.name: generation.samples_of(strategy) for strategy, journal in journals.items()}
        self.journals = {journal.path.name: journal for journal in journals.values()}
        self.actor = ray.remote(num_cpus=slots.cpus, num_gpus=slots.gpus, max_restarts=0)(ShardWorker)
        self.asked: dict[Any, _Shard] = {}
        self.heard = time.monotonic()

    def finish(self) -> None:
        """Returns when no sample is missing."""
        tasks = [task for task in self.generation.task_ids() if self.missing([task])]
        count = min(self.slots.count, len(tasks))
        label = f"{self.generation.task_set.dataset} on {count} workers"
        with Progress(label, [task for task in tasks for _ in range(self.missing([task]))]) as self.progress:
            for number in range(count):
                self.begin(_Shard(tasks[number::count]))
            while self.asked:
                ready, _ = self.ray.wait(list(self.asked), num_returns=1, timeout=5)
                for answer in ready:
                    self.hear(answer, self.asked.pop(answer))
                self.check_silence()

    def missing(self, tasks: list[str]) -> int:
        """How many samples of these tasks are not there yet."""
        wanted = self.wanted.items()
        return sum(len(self.journals[name].missing(task, n_samples)) for name, n_samples in wanted for task in tasks)

    def begin(self, shard: _Shard) -> None:
        """Gives what is missing of a shard to a new worker, with the samples that are there."""
        shard.tasks = [task for task in shard.tasks if self.missing([task])]
        if not shard.tasks:
            return
        known = {name: journal.excerpt(shard.tasks) for name, journal in self.journals.items()}
        shard.taken, shard.host = {name: len(content) for name, content in known.items()}, None
        shard.worker = self.actor.remote()
        self.ask(shard, shard.worker.start.remote(part_of(self.generation, shard.tasks), known))

    def ask(self, shard: _Shard, answer: Any) -> None:
        shard.heard = time.monotonic()
        self.asked[answer] = shard

    def hear(self, answer: Any, shard: _Shard) -> None:
        try:
            found = self.ray.get(answer)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DyloMoeError | OSError):
                raise ClusterError(f"{shard.host or 'a worker'}: {error.cause}") from None
            raise
        except (self.ray.exceptions.RayActorError, self.ray.exceptions.RaySystemError) as error:
            self.bury(shard, str(error))
            return
        self.heard = time.monotonic()
        if shard.host is None:
            shard.host, found = found, ({}, False)
        self.take(shard, *found)

    def take(self, shard: _Shard, found: dict[str, bytes], done: bool) -> None:
        """Writes what a worker has found, and asks it for more."""
        for name, lines in found.items():
            if name not in self.journals:
                raise ClusterError(f"{shard.host}: {foreign_journal(name, lines, list(self.journals.values()))}")
            for record in self.journals[name].absorb(lines):
                self.progress.finish(record.task_id)
            shard.taken[name] += len(lines)
            shard.deaths = 0
        if not done:
            self.ask(shard, shard.worker.news.remote(shard.taken))
            return
        self.ray.kill(shard.worker)
        if lost := self.missing(shard.tasks):
            raise SampleFileError(f"{shard.host}: its worker ended with {lost} samples missing")

    def bury(self, shard: _Shard, reason: str) -> None:
        """Another worker continues where the dead one stopped."""
        shard.deaths += 1
        if shard.deaths > DEATHS:
            raise ClusterError(f"{shard.host or 'a worker'}: died {shard.deaths} times with task {shard.tasks[0]}: {reason}")
        self.progress.say(one_line(f"The worker on {shard.host or 'a machine'} died ({reason}): another one continues", 200))
        self.ray.kill(shard.worker)
        self.begin(shard)

    def check_silence(self) -> None:
        """Nothing waits for ever: neither for a place in the cluster, nor for a worker that says nothing any more."""
        now = time.monotonic()
        started = [(answer, shard) for answer, shard in self.asked.items() if shard.host is not None]
        for answer, shard in started:
            if now - shard.heard > SILENT_SECONDS:
                del self.asked[answer]
                self.bury(shard, f"no answer for {SILENT_SECONDS:g} s")
        if self.asked and not started and now - self.heard > START_SECONDS:
            need = "1 GPU" if self.slots.gpus else f"{self.slots.cpus} processors"
            raise ClusterError(
                f"{self.generation.ray}: no worker with {need} found a place within {START_SECONDS:g} s: the cluster is busy, "
                "or machines are gone; the samples so far are kept, and the same command continues"
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
    where = difference(found, (same or ours)[0])
    return f"its samples would be others: {where}; every machine needs the same files at the same path, and the same packages"
