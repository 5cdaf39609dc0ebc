"""Experts as plain PEFT LoRAs: one alone, or one per subdirectory. Stock PEFT loads each."""

from __future__ import annotations

import shutil
from pathlib import Path

from dylo_moe.formats.adapter_write import write_expert
from dylo_moe.formats.checkpoint import Checkpoint
from dylo_moe.formats.tokenizer_files import tokenizer_files


def write_bag(directory: Path, checkpoint: Checkpoint) -> None:
    """Every expert into a subdirectory with its name; the router is not written."""
    for expert in checkpoint.experts:
        write_expert(directory / expert.name, expert, checkpoint.base_model)
    copy_tokenizer(directory, checkpoint)


def write_lora(directory: Path, checkpoint: Checkpoint) -> None:
    """The only expert, at the top of the directory."""
    (expert,) = checkpoint.experts
    write_expert(directory, expert, checkpoint.base_model)
    copy_tokenizer(directory, checkpoint)


def copy_tokenizer(directory: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.tokenizer is not None:
        for path in tokenizer_files(checkpoint.tokenizer):
            shutil.copyfile(path, directory / path.name)
