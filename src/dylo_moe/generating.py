"""Generates the samples of a task set with a checkpoint, continuing where an earlier run was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evalplus.utils import progress

from dylo_moe.decoder import PeftMoEDecoder
from dylo_moe.formats import Checkpoint, read_checkpoint
from dylo_moe.formats.base import resolve_base
from dylo_moe.identity import SCHEMA, checkpoint_identity, local_directory, versions
from dylo_moe.samples import Record, SampleJournal, sample_stem
from dylo_moe.sanitizing import Sanitizer
from dylo_moe.tasks import TaskSet

# Options of the decoder that do not decide what is generated, and those that the hashes stand for.
_NOT_IDENTITY = ("name", "adapter_path", "base_model", "batch_size", "device_map", "wandb_artifact")


@dataclass(frozen=True)
class Generation:
    """What to generate. decoder: keyword arguments of PeftMoEDecoder; task_range: numbers [low, high), or None for all."""

    task_set: TaskSet
    task_range: tuple[int, int] | None
    n_samples: int
    greedy: bool
    resume: bool
    decoder: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return Path(self.decoder["adapter_path"] or self.decoder["name"])


def generate_samples(generation: Generation, directory: Path) -> Path:
    """Completes the samples in `directory` and returns the path of the sample file. The model is loaded only if any are missing.

    Raises:
        CheckpointError, OptionError, UnknownStrategy, PromptError, SampleFileError: one line each.
    """
    checkpoint = read_checkpoint(generation.checkpoint, **(generation.decoder["assume"] or {}))
    base = _base(checkpoint, generation.decoder["base_model"])
    decoder = None
    if base is not None and local_directory(base) is None:  # not fetched yet, so it cannot be hashed yet
        decoder = PeftMoEDecoder(**generation.decoder)
    identity = run_identity(generation, checkpoint, base)
    task_ids = generation.task_set.ids(generation.task_range)
    with SampleJournal(directory, _stem(generation, identity), identity, resume=generation.resume) as journal:
        missing = [task for task in task_ids if journal.count(task) < generation.n_samples]
        if missing:
            _fill(generation, journal, missing, decoder or PeftMoEDecoder(**generation.decoder))
        return journal.export(generation.task_set.tasks, generation.n_samples, versions())


def run_identity(generation: Generation, checkpoint: Checkpoint, base: str | Path | None) -> dict[str, Any]:
    """Everything that decides the samples; see identity.py. The device's kind is part of it: its arithmetic differs."""
    options = {name: value for name, value in generation.decoder.items() if name not in _NOT_IDENTITY}
    return {
        "schema": SCHEMA,
        **checkpoint_identity(checkpoint, base),
        "task_file": generation.task_set.hash,
        "greedy": generation.greedy,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "device_map": str(generation.decoder["device_map"]),
        "options": options,
        "versions": versions(),
    }


def _base(checkpoint: Checkpoint, given: str | None) -> str | Path | None:
    """The base model's place, or None where the checkpoint holds all weights; a merged checkpoint is its own base."""
    if not checkpoint.experts:
        return checkpoint.path
    if checkpoint.base_state is not None and given is None:
        return None
    return resolve_base(checkpoint.base_model, given, checkpoint=checkpoint.path)


def _stem(generation: Generation, identity: dict[str, Any]) -> str:
    options = generation.decoder
    label = options["name"].strip("./")
    return sample_stem(label, [options["routing_strategy"], "peft_moe", f"temp_{options['temperature']:g}"], identity)


def _fill(generation: Generation, journal: SampleJournal, missing: list[str], decoder: PeftMoEDecoder) -> None:
    with Sanitizer() as sanitizer, progress(generation.task_set.dataset) as bar:
        for task_id in bar.track(missing):
            task = generation.task_set.tasks[task_id]
            prompt = task["prompt"].strip() + "\n"
            have = journal.count(task_id)
            texts = decoder.codegen(
                prompt,
                do_sample=not generation.greedy,
                num_samples=generation.n_samples - have,
                first_sample=have,
            )
            raw = [prompt + text if decoder.is_direct_completion() else text for text in texts]
            clean = [sanitizer(text, task["entry_point"]) for text in raw]
            journal.append(
                Record(task_id, have + i, solution, text, note)
                for i, (text, (solution, note)) in enumerate(zip(raw, clean, strict=True))
            )
            for index, (_, note) in enumerate(clean, start=have):
                if note:
                    bar.console.print(f"{task_id} sample {index}: {note}")
