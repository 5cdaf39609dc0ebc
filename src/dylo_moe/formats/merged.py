"""A plain transformers model, for example with an expert merged into it; DyLoRA-MoE's marks in config.json do not matter."""

from __future__ import annotations

from dylo_moe.errors import ForeignTensor
from dylo_moe.formats.adapter import check_finite, flat_tensors
from dylo_moe.formats.base import read_base
from dylo_moe.formats.checkpoint import Checkpoint
from dylo_moe.formats.dylora_config import is_dylora_config
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.tokenizer_files import tokenizer_directory
from dylo_moe.formats.weights import find_weights

FORMAT = "merged"


def read_merged(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Hash and check the weights; transformers loads them, so they are not kept.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    config = files.read_json(files.root / "config.json")
    for text in read_base(files.root).warnings:
        files.warn(text)
    weights = find_weights(files, files.root)
    files.convert(weights.paths if weights.is_pickled else ())
    for path in weights.paths:
        tensors = flat_tensors(files.pickle(path), path) if weights.is_pickled else files.tensors(path)
        foreign = [key for key in tensors if key.startswith("foundation_model.") or ".lora_A." in key]
        if foreign:
            raise ForeignTensor(path, foreign[0], found="a tensor of a mixture", expected="a plain model's weights")
        check_finite(tensors, path)
    if is_dylora_config(config):
        files.warn("config.json says DyLoRA-MoE, but the weights are a plain model: there are no experts to route")
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=None,
        experts=(),
        router=None,
        base_config=config,
        tokenizer=tokenizer_directory(files.root),
    )
