"""What a worker of a cluster does, without a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ray

from dylo_moe import generating
from dylo_moe.cluster import Slots
from dylo_moe.cluster_worker import ShardWorker
from dylo_moe.crew import Crew, Death, Member
from dylo_moe.errors import ClusterError, OptionError, PromptError, SampleFileError
from dylo_moe.evalplus import plan_generation
from dylo_moe.generating import generate_samples
from dylo_moe.journal import Record
from dylo_moe.journal_lines import checked_line
from dylo_moe.samples import SampleJournal
from dylo_moe.spreading import foreign_journal, part_of
from dylo_moe.spreading import generate_samples as generate_anywhere
from fixtures.loads import counted_loads
from harness.specimens import write_base, write_checkpoint
from harness.specimens.tasks import TASKS, write_task_set

STRATEGIES = ("router", "single:1")


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    place = tmp_path_factory.mktemp("spreading")
    checkpoint = write_checkpoint(place / "checkpoint", write_base(place / "base", "llama"), num_experts=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(place, "humaneval", TASKS[:3])))
        options = {"model": str(checkpoint), "dataset": "humaneval", "temperature": 0.8, "dtype": "float32", "n_samples": 2}
        yield plan_generation({**options, "max_new_tokens": 8}, STRATEGIES)


def heard(worker, taken):
    """Everything that a worker says until it is done."""
    done = False
    while not done:
        found, done = worker.news(taken)
        for name, lines in found.items():
            assert lines.endswith(b"\n")
            yield name, lines
            taken[name] = taken.get(name, 0) + len(lines)


def work(generation, journals, worker=None):
    worker = worker or ShardWorker()
    known = {journal.path.name: journal.excerpt(generation.task_set.tasks) for journal in journals.values()}
    worker.start(generation, known)
    yield from heard(worker, {name: len(content) for name, content in known.items()})
    assert not worker._place.path.exists()


def test_worker_adds_what_is_missing_of_its_tasks_and_nothing_else(planned, tmp_path):
    files = generate_samples(planned, tmp_path / "one")
    tasks = list(planned.task_set.tasks)

    def fill(generation, journals):
        by_name = {journal.path.name: journal for journal in journals.values()}
        for part in (tasks[::2], tasks[1:2]):
            for name, lines in work(part_of(generation, part), journals):
                assert {record.task_id for record in by_name[name].absorb(lines)} <= set(part)

    again = generate_samples(planned, tmp_path / "worker", fill)
    for strategy in STRATEGIES:
        assert again[strategy].name == files[strategy].name
        assert again[strategy].read_bytes() == files[strategy].read_bytes()


def test_worker_loads_a_checkpoint_once_for_all_its_shards(planned, tmp_path, monkeypatch):
    mbpp = replace(planned, decoder={**planned.decoder, "dataset": "mbpp"}, strategies=("base", "router"))
    expected = [generate_samples(generation, tmp_path / "one") for generation in (planned, mbpp)]
    worker, loads = ShardWorker(), counted_loads(monkeypatch)

    def fill(generation, journals):
        by_name = {journal.path.name: journal for journal in journals.values()}
        for task in generation.task_set.tasks:
            for name, lines in work(part_of(generation, [task]), journals, worker):
                by_name[name].absorb(lines)

    found = [generate_samples(generation, tmp_path / "worker", fill) for generation in (planned, mbpp)]
    assert len(loads) == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert {run: path.read_bytes() for run, path in ours.items()} == {run: path.read_bytes() for run, path in theirs.items()}


def test_worker_that_is_given_another_checkpoint_loads_that_one(planned, tmp_path, monkeypatch):
    other = replace(planned, decoder={**planned.decoder, "dtype": "bfloat16"})
    worker, loads = ShardWorker(), counted_loads(monkeypatch)
    identities = []

    def fill(generation, journals):
        ours = list(journals.values())
        for name, lines in work(part_of(generation, list(generation.task_set.tasks)), journals, worker):
            next(journal for journal in ours if journal.path.name == name).absorb(lines)
        identities.append([journal.identity["options"]["dtype"] for journal in ours])

    for generation in (planned, other):
        generate_samples(generation, tmp_path, fill)
    assert identities == [["float32"] * 2, ["bfloat16"] * 2]
    assert len(loads) == 2


def test_worker_with_other_versions_is_named_with_the_difference(planned, tmp_path, monkeypatch):
    other = {**generating.versions(), "torch": "another"}

    def fill(generation, journals):
        monkeypatch.setattr(generating, "versions", lambda: other)
        name, lines = next(work(part_of(generation, list(planned.task_set.tasks)[:1]), journals))
        assert name not in {journal.path.name for journal in journals.values()}
        raise OptionError(foreign_journal(name, lines, list(journals.values())))

    with pytest.raises(OptionError, match="^its samples would be others: versions.torch another, here 2.*same files"):
        generate_samples(planned, tmp_path, fill)


def test_error_of_a_worker_comes_out_of_it(planned):
    long = {"HumanEval/0": {"task_id": "HumanEval/0", "prompt": "# x\n" * 2000, "entry_point": "f"}}
    generation = part_of(planned, [])
    generation.task_set.tasks.update(long)
    with pytest.raises(PromptError, match="positions"):
        list(work(generation, {}))


def test_damaged_lines_of_a_worker_are_refused(tmp_path):
    with SampleJournal(tmp_path, "stem", {}) as journal:
        journal.append([Record("T/0", 0, "a", "b"), Record("T/0", 1, "a", "b")])
        lines = journal.excerpt(["T/0"]).partition(b"\n")[2]
    with SampleJournal(tmp_path, "other", {}) as journal:
        with pytest.raises(SampleFileError, match="damaged after 1 samples"):
            journal.absorb(lines[:-5])
        assert [record.index for record in journal.absorb(lines)] == [0, 1]
        with pytest.raises(SampleFileError, match="for the second time"):
            journal.absorb(lines)


def test_cluster_and_shard_together_are_refused(planned, tmp_path):
    with pytest.raises(OptionError, match="give only one of them"):
        generate_anywhere(replace(planned, ray="auto", shard=(0, 2)), tmp_path)


class Answering:
    """Ray's two names that a crew asks for an answer with; the answer is an error."""

    exceptions = ray.exceptions

    @staticmethod
    def get(answer):
        raise answer


def test_worker_that_ray_kills_for_its_memory_is_dead_and_one_that_lacks_memory_says_so():
    crew = Crew(Slots(1, 1, 0), "local")
    crew._ray = Answering
    member = Member(None, host="here")
    for error in (ray.exceptions.OutOfMemoryError("killed by the memory monitor"), ray.exceptions.ActorDiedError()):
        assert isinstance(crew._get(member, error), Death)
    lacking = ray.exceptions.RayTaskError("start", "", RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(ClusterError, match="here: DefaultCPUAllocator"):
        crew._get(member, lacking)
    with pytest.raises(ray.exceptions.RayTaskError):
        crew._get(member, ray.exceptions.RayTaskError("start", "", RuntimeError("of ours")))


def test_gpu_that_ray_counts_and_torch_does_not_find_is_said_so(tmp_path):
    identity = {"device": "cuda", "options": {"routing_strategy": "router"}}
    ours = [SampleJournal(tmp_path, "stem", identity)]
    lines = checked_line({"identity": {**identity, "device": "cpu"}})
    assert foreign_journal("other", lines, ours).startswith("Ray counts a GPU there, but torch finds none")
