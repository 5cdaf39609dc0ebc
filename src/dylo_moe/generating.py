"""Generates the samples of a task set with a checkpoint, continuing where an earlier run was stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dylo_moe.completions import Wanted
from dylo_moe.decoder import PeftMoEDecoder, check_strategy
from dylo_moe.identity import SCHEMA, versions
from dylo_moe.journal import Record
from dylo_moe.opened import Opened
from dylo_moe.progress import Progress
from dylo_moe.recording import Recorder
from dylo_moe.samples import SampleJournal, sample_stem
from dylo_moe.tasks import TaskSet

# Options of the decoder that do not decide what is generated, and those that the hashes stand for.
_NOT_IDENTITY = ("name", "adapter_path", "base_model", "batch_size", "device_map", "wandb_artifact")


@dataclass(frozen=True)
class Generation:
    """What to generate.

    Attributes:
        task_range: numbers [low, high), or None for all.
        n_samples: of each task and strategy; greedy strategies but "round_robin" have one, whatever this says.
        decoder: keyword arguments of PeftMoEDecoder, without routing_strategy.
        strategies: as `routing_strategy` of PeftMoEDecoder, each once; all of them run on one loaded model.
        shard: (i, n): of the chosen tasks only those whose position in the list is i mod n; None for all.
        ray: address of the Ray cluster that generates (see cluster.py), or None for this process.
        device: kind of device that generates where that is not this process, "cpu" or "cuda".
    """

    task_set: TaskSet
    task_range: tuple[int, int] | None
    n_samples: int
    greedy: bool
    resume: bool
    decoder: dict[str, Any]
    strategies: tuple[str, ...] = ("router",)
    shard: tuple[int, int] | None = None
    ray: str | None = None
    device: str | None = None

    @property
    def checkpoint(self) -> Path:
        return Path(self.decoder["adapter_path"] or self.decoder["name"])

    def task_ids(self) -> list[str]:
        """The chosen tasks of this shard, in the order of the task file; a shard may have none."""
        index, count = self.shard or (0, 1)
        return self.task_set.ids(self.task_range)[index::count]

    def samples_of(self, strategy: str) -> int:
        return 1 if self.greedy and strategy != "round_robin" else self.n_samples


Fill = Callable[[Generation, dict[str, SampleJournal]], None]


def generate_samples(
    generation: Generation, directory: Path, fill: Fill | None = None, *, opened: Opened | None = None
) -> dict[str, Path]:
    """Completes the samples in `directory`. The model is loaded once for all strategies, and only if samples are missing.

    Args:
        fill: adds what is missing to the journals (strategy -> journal); None to generate it in this process.
        opened: the checkpoint, where several generations share it; None to open it for this one.

    Returns:
        strategy -> the path of its sample file.

    Raises:
        CheckpointError, OptionError, UnknownStrategy, PromptError, SampleFileError: one line each.
    """
    opened = opened or Opened(generation.decoder)
    for strategy in generation.strategies:
        check_strategy(strategy, len(opened.checkpoint.experts), has_router=opened.checkpoint.router is not None)
    with ExitStack() as stack:
        journals = {}
        for strategy in generation.strategies:
            identity = run_identity(generation, strategy, opened.hashes)
            options = {"resume": generation.resume, "shard": generation.shard}
            journal = SampleJournal(directory, _stem(generation, strategy, identity), identity, **options)
            journals[strategy] = stack.enter_context(journal)
        if _missing(generation, journals):
            if fill is None:
                _fill(generation, journals, opened.decoder(generation.decoder, generation.strategies[0]))
            else:
                fill(generation, journals)
        return {strategy: _export(generation, strategy, journal) for strategy, journal in journals.items()}


def _export(generation: Generation, strategy: str, journal: SampleJournal) -> Path:
    tasks = generation.task_set
    chosen = tasks.ids(generation.task_range)
    return journal.export(tasks.tasks, generation.samples_of(strategy), versions(), chosen=chosen)


def run_identity(generation: Generation, strategy: str, hashes: Mapping[str, str | None]) -> dict[str, Any]:
    """Everything that decides the samples. The device's kind is part of it: its arithmetic differs. hashes: of `Opened`."""
    options = {name: value for name, value in generation.decoder.items() if name not in _NOT_IDENTITY}
    return {
        "schema": SCHEMA,
        **hashes,
        "task_file": generation.task_set.hash,
        "greedy": generation.greedy,
        "device": generation.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "device_map": str(generation.decoder["device_map"]),
        "options": {**options, "routing_strategy": strategy},
        "versions": versions(),
    }


def _stem(generation: Generation, strategy: str, identity: dict[str, Any]) -> str:
    label = generation.decoder["name"].strip("./")
    return sample_stem(label, [strategy, "peft_moe", f"temp_{generation.decoder['temperature']:g}"], identity)


def _missing(generation: Generation, journals: dict[str, SampleJournal]) -> list[Wanted]:
    """The samples that no journal has; all strategies of a task one after the other."""
    wanted = []
    for task_id in generation.task_ids():
        prompt = generation.task_set.tasks[task_id]["prompt"].strip() + "\n"
        for strategy, journal in journals.items():
            indices = journal.missing(task_id, generation.samples_of(strategy))
            wanted += [Wanted(prompt, strategy, index, task_id) for index in indices]
    return wanted


def _fill(generation: Generation, journals: dict[str, SampleJournal], decoder: PeftMoEDecoder) -> None:
    tasks, wanted = generation.task_set.tasks, _missing(generation, journals)
    label = f"{generation.task_set.dataset} {', '.join(generation.strategies)}"
    with Progress(label, [one.task_id for one in wanted]) as progress, Recorder(progress.say) as recorder:
        for done in decoder.complete_many(wanted, do_sample=not generation.greedy, tick=progress.tick):
            one = done.wanted
            text = one.prompt + done.text if decoder.is_direct_completion() else done.text
            recorder.add(journals[one.strategy], Record(one.task_id, one.index, text, text), tasks[one.task_id]["entry_point"])
            progress.finish(one.task_id)
