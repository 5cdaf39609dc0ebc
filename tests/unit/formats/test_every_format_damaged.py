"""Every field and every tensor of every format, damaged: it reads, or it is refused in one line, and never something else."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dylo_moe import load_checkpoint
from dylo_moe.errors import CheckpointError, ForeignTensor, IncompletePair, InvalidField, MissingFile, OptionError, ShapeMismatch
from dylo_moe.formats import FORMATS, read_checkpoint
from tests.unit.formats.every_format import OPTIONS, write_every_format

# A pickle takes a process each; its tree becomes the same state as that of the full state, which is here.
DAMAGED = [name for name in FORMATS if name != "dylora-bundle"]
VALUES = [None, "", [], {}, -1, True, 2**63, 5e-324, "../..", [[]], [1] * 5]
PER_FORMAT = 60


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    return write_every_format(tmp_path_factory.mktemp("every"))


@pytest.fixture
def copied(written, tmp_path):
    """A function: a fresh copy of a format's directory."""

    def make(name: str) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return shutil.copytree(written[name], tmp_path / name)

    return make


def outcome(path: Path, name: str) -> str:
    try:
        read_checkpoint(path, **OPTIONS.get(name, {}))
    except CheckpointError as error:
        assert "\n" not in str(error)
        return "refused"
    return "read"


def places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in [(*path, key), *places(inner, (*path, key))]]


def changed(content, place, value):
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


@pytest.mark.parametrize("name", DAMAGED)
def test_every_field_is_read_or_refused_whatever_it_holds(copied, name):
    path = copied(name)
    assert outcome(path, name) == "read"
    files = [file for file in sorted(path.rglob("*.json")) if "config" in file.name and "tokenizer" not in file.name]
    cases = [(file, place) for file in files for place in places(json.loads(file.read_text()))]
    outcomes = set()
    for number, (file, place) in enumerate(cases[:: 1 + len(cases) // PER_FORMAT]):
        content = file.read_text()
        file.write_text(json.dumps(changed(json.loads(content), place, VALUES[number % len(VALUES)])))
        outcomes.add(outcome(path, name))
        file.write_text(content)
    assert outcomes <= {"read", "refused"}
    assert outcome(path, name) == "read"


DAMAGE = {
    "dropped": lambda tensors, key: {other: value for other, value in tensors.items() if other != key},
    "renamed": lambda tensors, key: {f"{other}.x" if other == key else other: value for other, value in tensors.items()},
    "doubled": lambda tensors, key: tensors | {f"foundation_model.{key}": tensors[key] + 1},
    "empty": lambda tensors, key: tensors | {key: tensors[key][:0].clone()},
    "scalar": lambda tensors, key: tensors | {key: torch.tensor(1.0)},
    "narrower": lambda tensors, key: tensors | {key: tensors[key][..., :-1].clone()},
    "NaN": lambda tensors, key: tensors | {key: tensors[key] * float("nan")},
    "int8": lambda tensors, key: tensors | {key: tensors[key].to(torch.int8)},
    "float8": lambda tensors, key: tensors | {key: tensors[key].to(torch.float8_e4m3fn)},
}
# arrow_router's own pair takes part in nothing; transformers reads a plain model's weights, and says what it misses.
UNREAD = ("arrow_router", "merged")


@pytest.mark.parametrize("name", DAMAGED)
def test_every_damaged_tensor_is_refused_or_loads_as_what_it_is(copied, name):
    path = copied(name)
    for file in [file for file in sorted(path.rglob("*.safetensors")) if not any(part in UNREAD for part in file.parts)]:
        tensors, content = load_file(file), file.read_bytes()
        keys = [key for key in tensors if "lora" in key or "gat" in key or "rout" in key or "classif" in key] or list(tensors)
        for number, (damage, apply) in enumerate(DAMAGE.items()):
            key = keys[number % len(keys)]
            save_file(apply(tensors, key), file)
            found = outcome(path, name)
            if damage in ("NaN", "int8", "float8", "empty", "scalar", "doubled"):
                assert found == "refused", f"{damage}: {key}"
            file.write_bytes(content)


def edit(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_arrow_experts_of_different_widths_are_refused(copied):
    path = copied("peft-arrow")
    file = path / "task_1" / "adapter_model.safetensors"
    key, tensor = next((key, tensor) for key, tensor in load_file(file).items() if "lora_A" in key)
    save_file(load_file(file) | {key: tensor[:, :-1].clone()}, file)
    with pytest.raises(ShapeMismatch):
        read_checkpoint(path)


def test_arrow_router_on_other_modules_than_the_experts_is_refused(copied):
    path = copied("peft-arrow")
    for targets in (["q_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"], None):
        edit(path / "arrow_router" / "adapter_config.json", target_modules=targets)
        with pytest.raises(InvalidField, match="target_modules"):
            read_checkpoint(path)


def test_adalora_tensor_under_two_prefixes_is_refused(copied):
    path = copied("peft-adalora")
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file(tensors | {key.removeprefix("base_model.model."): tensors[key] + 1}, file)
    with pytest.raises(ForeignTensor, match="two keys"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["loramoe", "hydralora", "adamole"])
@pytest.mark.parametrize("fields", [{"r": [1] * 9, "lora_rank": [1] * 9}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}])
def test_fields_that_a_fork_does_not_have_are_refused(copied, name, fields):
    path = copied(name)
    edit(path / "adapter_config.json", **fields)
    with pytest.raises(InvalidField):
        read_checkpoint(path)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e308])
def test_temperature_that_makes_logits_infinite_is_refused(copied, temperature):
    with pytest.raises(InvalidField, match="temperature"):
        read_checkpoint(copied("peft-arrow"), temperature=temperature)
    path = copied("mixlora")
    edit(path / "adapter_config.json", routing_strategy="mixlora-dynamic", top_p=0.5, temperature=temperature)
    with pytest.raises(InvalidField, match="temperature"):
        read_checkpoint(path)


@pytest.fixture(scope="module")
def other_base(written):
    """A function: a loaded base model with another number of layers."""

    def make(layers: int):
        config = AutoConfig.from_pretrained(written["loramoe"].parent / "base")
        config.num_hidden_layers = layers
        return AutoModelForCausalLM.from_config(config)

    return make


def test_loaded_base_with_other_layers_is_refused(written, other_base):
    load_checkpoint(written["peft-lora"], other_base(2))
    for layers, error in ((1, ShapeMismatch), (3, IncompletePair)):
        with pytest.raises(error):
            load_checkpoint(written["peft-lora"], other_base(layers))


@pytest.mark.parametrize("name", ["merged", "mergoo", "dylora-full-state"])
def test_loaded_base_in_place_of_the_checkpoints_own_is_refused(written, other_base, name):
    with pytest.raises(OptionError, match="comes from the checkpoint itself"):
        load_checkpoint(written[name], other_base(2), **OPTIONS.get(name, {}))


@pytest.mark.parametrize("given", [5, ["x"], "a" * 5000, "~/x", "\0"])
def test_impossible_base_model_is_refused(written, given):
    with pytest.raises(CheckpointError, match="base_model"):
        load_checkpoint(written["loramoe"], given)


@pytest.mark.parametrize("name", ["mergoo", "merged"])
@pytest.mark.parametrize("fields", [{"hidden_act": 5}, {"rms_norm_eps": "x"}, {"rope_parameters": {"rope_type": "x"}}])
def test_configuration_that_transformers_cannot_build_is_refused_in_one_line(copied, name, fields):
    path = copied(name)
    edit(path / "config.json", **fields)
    with pytest.raises(InvalidField, match="configuration") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mergoo", "dylora-full-state"])
@pytest.mark.parametrize("damage", ["dropped", "narrower", "int8", "float8", "scalar"])
def test_damaged_base_weight_in_a_checkpoint_is_refused(written, copied, name, damage):
    path = copied(name)
    file = path / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("lm_head.weight"))
    save_file(DAMAGE[damage](tensors, key), file)
    base = None if name == "mergoo" else str(written["mergoo"].parent / "base")
    with pytest.raises(CheckpointError):
        load_checkpoint(path, base, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("kind", ["gone", "directory", "dangling link"])
def test_expert_without_a_readable_configuration_is_not_left_out(copied, kind):
    path = copied("lora-bag")
    file = path / "expert_0" / "adapter_config.json"
    file.unlink()
    if kind == "directory":
        file.mkdir()
    if kind == "dangling link":
        file.symlink_to("nowhere")
    with pytest.raises(MissingFile, match="expert_0"):
        read_checkpoint(path)


@pytest.mark.parametrize("name, config", [("peft-xlora", "adapter_config.json"), ("xlora", "xlora_config.json")])
def test_mixture_that_lost_its_configuration_is_no_bag(copied, name, config):
    path = copied(name)
    (path / config).unlink()
    with pytest.raises(MissingFile, match=config):
        read_checkpoint(path)


def test_full_state_of_an_untied_model_without_its_head_is_refused(written, copied):
    path = copied("dylora-full-state")
    file = path / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if not key.endswith("lm_head.weight")}, file)
    with pytest.raises(ShapeMismatch, match="lm_head"):
        load_checkpoint(path, str(written["mergoo"].parent / "base"), lora_alpha=8)


@pytest.mark.parametrize("options", [{"expect_hash": 5}, {"expect_hash": {"adapter_config.json": 5}}, {"adapters": {"0": 5}}])
def test_option_of_another_type_is_refused(written, options):
    with pytest.raises(OptionError, match="should hold text"):
        read_checkpoint(written["peft-xlora"], **options)
