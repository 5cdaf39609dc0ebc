"""The shards of a run become the whole run: strictly, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dylo_moe.errors import SampleFileError, one_line
from dylo_moe.identity import difference, identity_hash
from dylo_moe.journal import Content, Plan, Record, read_journal, shard_name, shard_text
from dylo_moe.samples import SampleJournal

_AGAIN = "run the command of this shard again"


@dataclass(frozen=True)
class Shard:
    """One finished shard. stem: that of the whole run's files."""

    path: Path
    stem: str
    content: Content

    @property
    def plan(self) -> Plan:
        return self.content.plan

    @property
    def records(self) -> Iterable[Record]:
        return (record for of_task in self.content.records.values() for record in of_task.values())


def merge_shards(directories: Sequence[Path]) -> list[Path]:
    """Makes the whole run of the shards that lie in (or below) the directories, for each run of which there are any.

    The files are written beside the run's first shard, and are byte for byte those that one process writes. Nothing is written
    before all shards of all runs have been found good.

    Returns:
        The paths of the sample files, in the order of their names.

    Raises:
        SampleFileError: a shard is missing, there twice, unfinished, damaged or of another number of shards; shards of different
            identities, tasks or numbers of samples; a sample is missing, or there twice and different.
        OSError: a file cannot be read or written.
    """
    runs: dict[str, list[Shard]] = {}
    for path in _paths(directories):
        shard = _read(path)
        runs.setdefault(identity_hash(shard.content.identity), []).append(shard)
    merged = {key: _checked(shards, runs) for key, shards in runs.items()}
    return sorted(_write(shards, samples) for shards, samples in merged.values())


def _paths(directories: Sequence[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for directory in directories:
        here = sorted(directory.rglob("*.shard-*-of-*.journal"))
        if not here:
            raise SampleFileError(f"{directory}: no shards here (*.shard-1-of-4.journal, as codegen --shard 1/4 writes)")
        found |= {path.resolve(): path for path in here}
    return list(found.values())


def _read(path: Path) -> Shard:
    """A shard that is whole and finished.

    Raises:
        SampleFileError: it is not.
    """
    content, good = read_journal(path)
    if content is None or good != path.stat().st_size:
        raise SampleFileError(f"{path}: its end was cut off; {_AGAIN}")
    stem = path.name.rpartition(".shard-")[0]
    key = identity_hash(content.identity)[:12]
    if content.shard is None or path.name != f"{stem}{shard_name(content.shard)}.journal" or not stem.endswith(key):
        raise SampleFileError(f"{path}: the name of another file; its content is shard {content.shard} of a run {key}")
    if content.plan is None or not content.plan.chosen:
        raise SampleFileError(f"{path}: not finished; {_AGAIN}")
    for task in content.plan.part(content.shard):
        if gaps := content.missing(task, content.plan.n_samples):
            raise SampleFileError(f"{path}: sample {gaps[0]} of {task} is missing; {_AGAIN}")
    if foreign := set(content.records) - set(content.plan.order):
        raise SampleFileError(f"{path}: samples of {min(foreign)}, which its data set does not have")
    return Shard(path, stem, content)


def _checked(shards: list[Shard], runs: Mapping[str, list[Shard]]) -> tuple[list[Shard], dict[tuple[str, int], Record]]:
    """The shards of one run in their order, and all their samples."""
    count = shards[0].content.shard[1]
    by_number: dict[int, Shard] = {}
    for shard in shards:
        number, of = shard.content.shard
        if of != count:
            raise SampleFileError(f"{shard.path}: one of {of} shards, but {shards[0].path} is one of {count}")
        if shard.plan != shards[0].plan:
            raise SampleFileError(f"{shard.path}: {_difference(shard.plan, shards[0].plan)} in {shards[0].path}; {_AGAIN}")
        if number in by_number and by_number[number].content != shard.content:
            raise SampleFileError(
                f"{shard.path} and {by_number[number].path}: different samples as the same shard of the same run"
            )
        by_number[number] = shard
    if missing := [shard_text((number, count)) for number in range(count) if number not in by_number]:
        raise SampleFileError(f"{shards[0].path}: shard {', '.join(missing)} of its run is missing{_hint(shards[0], runs)}")
    ordered = [by_number[number] for number in range(count)]
    samples: dict[tuple[str, int], Record] = {}
    for shard in ordered:
        for record in shard.records:
            _take(samples, record, shard.path)
    return ordered, samples


def _take(samples: dict[tuple[str, int], Record], record: Record, path: Path) -> None:
    if samples.setdefault((record.task_id, record.index), record) != record:
        raise SampleFileError(f"{path}: sample {record.index} of {record.task_id} is another one than in the other shards")


def _write(shards: list[Shard], samples: dict[tuple[str, int], Record]) -> Path:
    first, plan = shards[0], shards[0].plan
    with SampleJournal(first.path.parent, first.stem, first.content.identity) as journal:
        for of_task in journal.records.values():
            for record in of_task.values():
                _take(samples, record, journal.path)
        places = {task: position for position, task in enumerate(plan.order)}
        new = [record for key, record in samples.items() if key[1] not in journal.records.get(key[0], {})]
        journal.append(sorted(new, key=lambda record: (places[record.task_id], record.index)))
        return journal.export(plan.order, plan.n_samples, plan.versions, chosen=plan.chosen)


def _difference(found: Plan, other: Plan) -> str:
    if found.n_samples != other.n_samples:
        return f"{found.n_samples} samples of each task, but {other.n_samples}"
    return f"a shard of {len(found.chosen)} tasks from {_first(found)}, but {len(other.chosen)} from {_first(other)}"


def _first(plan: Plan) -> str:
    return plan.chosen[0] if plan.chosen else "none"


def _hint(shard: Shard, runs: Mapping[str, list[Shard]]) -> str:
    """What to say where the shards that are missing may have been made with something else."""
    for others in runs.values():
        if others[0].content.identity != shard.content.identity and others[0].content.shard[1] == shard.content.shard[1]:
            where = difference(others[0].content.identity, shard.content.identity)
            return one_line(f"; {others[0].path} is of another run: {where}")
    return ""
