"""X-LoRA as PEFT saves it: adapter_config.json with peft_type XLORA, the classifier beside it, the experts elsewhere.

`adapters` maps the experts' names "0", "1", ... to the paths that they had when they were trained. The file's keys are
sorted as text, so that "10" comes before "2", and PEFT permutes the experts when it loads eleven or more; here they are
put in the order of their numbers, which is the order of the classifier's outputs.

PEFT 0.20 and later save a classifier without the tensors whose keys contain an expert's name (layers.0 always).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dylo_moe.errors import GateMissing, InvalidField
from dylo_moe.formats.adapter import weights_file
from dylo_moe.formats.adapter_config import optional_text
from dylo_moe.formats.checkpoint import Checkpoint
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.tokenizer_files import tokenizer_directory
from dylo_moe.formats.xlora_classifier import ClassifierConfig, check_header, read_classifier
from dylo_moe.formats.xlora_classifier import classifier_config as read_fields
from dylo_moe.formats.xlora_experts import Place, base_of, modules_of, read_experts

FORMAT = "peft-xlora"
CONFIG = "adapter_config.json"
PREFIX = "base_model.internal_xlora_classifier.layers"
_REPAIR = (
    "all of them; where the model is still at hand, save_file of what its state_dict() has with internal_xlora_classifier in"
    " the key, as adapter_model.safetensors"
)
_EARLY_PEFT = (
    "enable_softmax_topk is computed for each token; PEFT before 0.18 took one softmax over the whole batch, as the option"
    " softmax_topk=batch does"
)


def read_peft_xlora(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Read a directory that PEFT's save_pretrained wrote, or one repaired by hand.

    Raises:
        GateMissing: the classifier is one of those that PEFT 0.20 and later damage; the message says how to save it whole.
        ExpertMissing, ForeignTensor: see read_experts.
        CheckpointError: any of its subclasses, naming file and field.
    """
    path = files.root / CONFIG
    data = files.read_json(path)
    if data.get("task_type") not in (None, "CAUSAL_LM"):
        raise InvalidField(path, "task_type", found=repr(data["task_type"])[:80], expected='"CAUSAL_LM" or null')
    places = _places(data.get("adapters"), path)
    config = read_fields(data, path, len(places), options, softmax_topk="token")
    if config.use_trainable_adapters:  # what lies at the recorded paths is what they were before the training
        places = [replace(place, recorded=None) for place in places]
        _warn_of_training(files, options)
    if config.enable_softmax_topk and data.get("peft_version") is None and options.softmax_topk is None:
        files.warn(_EARLY_PEFT)
    names = [f"{PREFIX}.{number}" for number in classifier_numbers(config.depth, config.dropout)]
    classifier = _whole_classifier(files, names, places, config)
    read = read_experts(files, places, options.adapters)
    experts = tuple(expert for expert, _ in read)
    recorded = optional_text(data.get("base_model_name_or_path"), path, "base_model_name_or_path")
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=base_of(files, recorded, [adapter for _, adapter in read]),
        experts=experts,
        router=read_classifier(files, classifier, names, config, num_experts=len(experts), num_layers=len(modules_of(experts))),
        load_balance={"load_balance_loss_type": "none", "router_aux_loss_coef": 0.0},
        tokenizer=tokenizer_directory(files.root),
    )


def classifier_numbers(depth: int, dropout: float) -> list[int]:
    """PEFT's numbers of the classifier's Linears: each but the last is followed by a ReLU and, if there is one, a Dropout."""
    stride = 3 if dropout > 0 else 2
    return [stride * number for number in range(depth)]


def _places(adapters: object, path: Path) -> list[Place]:
    """The experts in numeric order. PEFT itself runs no other names than "0", "1", ..."""
    if not isinstance(adapters, Mapping) or not adapters:
        raise InvalidField(path, "adapters", found=repr(adapters)[:80], expected="an object of expert names and paths")
    keys = [str(number) for number in range(len(adapters))]
    if set(adapters) != set(keys):
        found = ", ".join(repr(key) for key in list(adapters)[:8])
        expected = 'the names "0", "1", ... without a gap: with others, PEFT itself fails and no order is recorded'
        raise InvalidField(path, "adapters", found=found, expected=expected)
    # A "0" of our own would do, but PEFT's save_pretrained takes it for the number of a layer.
    return [Place(key, f"expert_{key}", optional_text(adapters[key], path, f"adapters[{key}]")) for key in keys]


def _whole_classifier(files: CheckpointFiles, names: list[str], places: list[Place], config: ClassifierConfig) -> Path:
    """The classifier's file, its header checked. Raises GateMissing where PEFT 0.20 or later lost a part of it."""
    file = weights_file(files, files.root)
    keys = list(files.header(file)) if file.suffix == ".safetensors" else files.pickle_keys(file)
    experts = {place.key for place in places}
    lost = [name for name in names if name.rpartition(".")[2] in experts]
    if lost and not any(key.startswith(f"{name}.") for name in lost for key in keys):
        found = f"{len(keys)} tensors, none of {', '.join(name.removeprefix('base_model.') for name in lost[:3])}"
        found += ": PEFT 0.20 and later leave out what is numbered like an expert"
        raise GateMissing(file, f"{lost[0]}.weight", found=found, expected=_REPAIR)
    if file.suffix == ".safetensors":
        check_header(files.header(file), names, config, len(places), file)
    return file


def _warn_of_training(files: CheckpointFiles, options: ReadOptions) -> None:
    if options.adapters is None:
        files.warn("use_trainable_adapters: the trained experts were read; PEFT would load the recorded, untrained ones")
    else:
        files.warn("use_trainable_adapters: the experts that were given must be the trained ones, not those they started from")
