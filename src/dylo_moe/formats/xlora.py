"""X-LoRA as its authors' own package saves it (github.com/EricLBuehler/xlora): xlora_config.json, xlora_classifier.*.

The experts are plain PEFT LoRAs in subdirectories by name, at the top or one level down (X-LoRA_adapters/). The classifier is
PEFT's under other names: inner.{i}, counted with a ReLU and a Dropout after each where enable_relu_and_dropout, and last.
"""

from __future__ import annotations

from pathlib import Path

from dylo_moe.errors import InvalidField, MissingFile
from dylo_moe.formats.adapter_config import optional_text
from dylo_moe.formats.checkpoint import Checkpoint
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.tokenizer_files import tokenizer_directory
from dylo_moe.formats.xlora_classifier import ClassifierConfig, classifier_config, read_classifier
from dylo_moe.formats.xlora_experts import Place, base_of, modules_of, read_experts

FORMAT = "xlora"
CONFIG = "xlora_config.json"
CLASSIFIERS = ("xlora_classifier.safetensors", "xlora_classifier.pt")


def read_xlora(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Read a directory that xlora's save_pretrained wrote.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    path = files.root / CONFIG
    data = files.read_json(path)
    places = _places(data.get("adapters"), path)
    config = classifier_config(data, path, len(places), options, softmax_topk="batch")
    classifier = _classifier(files)
    read = read_experts(files, places, options.adapters)
    experts = tuple(expert for expert, _ in read)
    recorded = optional_text(data.get("base_model_id"), path, "base_model_id")
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=base_of(files, recorded, [adapter for _, adapter in read]),
        experts=experts,
        router=read_classifier(
            files, classifier, _names(config), config, num_experts=len(experts), num_layers=len(modules_of(experts))
        ),
        load_balance={"load_balance_loss_type": "none", "router_aux_loss_coef": 0.0},
        tokenizer=tokenizer_directory(files.root),
    )


def _places(adapters: object, path: Path) -> list[Place]:
    """The experts in the order of the list. A name of digits alone would be a layer's number to PEFT, so it gets a prefix."""
    names = list(adapters) if isinstance(adapters, list | dict) else []
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise InvalidField(path, "adapters", found=repr(adapters)[:80], expected="a list of different expert names")
    recorded = adapters if isinstance(adapters, dict) else {}
    places = []
    for name in names:
        known = optional_text(recorded.get(name), path, f"adapters[{name}]")
        places.append(Place(name, f"expert_{name}" if name.isdecimal() else name, known))
    return places


def _classifier(files: CheckpointFiles) -> Path:
    found = [name for name in CLASSIFIERS if files.exists(files.root / name)]
    if not found:
        raise MissingFile(files.root / CLASSIFIERS[0], "", found="no such file", expected="the classifier")
    if len(found) > 1:
        files.warn(f"{found[0]} was read, {found[1]} was not")
    elif found[0] != CLASSIFIERS[0]:
        files.warn(f"{found[0]}, a pickle, was read; safetensors would be safer")
    return files.root / found[0]


def _names(config: ClassifierConfig) -> list[str]:
    stride = 3 if config.use_relu else 1
    return [*[f"inner.{stride * number}" for number in range(config.depth - 1)], "last"]
