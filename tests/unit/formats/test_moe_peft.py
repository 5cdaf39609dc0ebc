"""MoE-PEFT's three formats: what is read, and what is refused and why; the checkpoints are written by hand in fixtures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dylo_moe import errors, load_checkpoint
from dylo_moe.cli import main
from dylo_moe.formats import detect_model_format, read_checkpoint
from dylo_moe.formats.checkpoint import Checkpoint, GateState
from fixtures.moe_peft import FORMATS, Recipe, adapter_tensors, write_moe_peft
from harness.specimens import write_base

STRATEGIES = ("mixlora", "mixlora-dynamic", "loramoe", "mola")
SWITCH = Recipe("mixlora-switch", expert_capacity=5)
MLP = "layers.0.mlp"
EXPERT = f"{MLP}.up_proj.experts.1.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture
def write(base, tmp_path):
    """Writes a recipe as safetensors, then changes tensors and fields of the configuration (None takes a field away)."""

    def written(recipe: Recipe | None = None, change=None, **fields):
        write_moe_peft(tmp_path, base, replace(recipe or Recipe(), safetensors=True))
        if change is not None:
            tensors = load_file(tmp_path / "adapter_model.safetensors")
            change(tensors)
            save_file(tensors, tmp_path / "adapter_model.safetensors")
        config = json.loads((tmp_path / "adapter_config.json").read_text()) | fields
        (tmp_path / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return tmp_path

    return written


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_tensor_finds_its_place(base, tmp_path, strategy):
    is_pickle = strategy in ("mixlora", "mola")  # a pickle costs a process
    recipe = Recipe(strategy, num_experts=3, rank=2, alpha=5, use_rslora=True, safetensors=not is_pickle)
    write_moe_peft(tmp_path, base, recipe)
    checkpoint = read_checkpoint(tmp_path)
    assert detect_model_format(tmp_path) == checkpoint.format == FORMATS[recipe.peft_type]
    assert checkpoint.base_model == str(base) and checkpoint.num_experts == checkpoint.router.num_experts == 3
    prefix, wanted = f"{recipe.peft_type.lower()}.", adapter_tensors(recipe, base)
    for expert in checkpoint.adapters:
        for module, pair in expert.modules.items():
            place = prefix + module.removeprefix("model.")
            place += "" if expert.name == "shared" else f".experts.{expert.name.removeprefix('expert_')}"
            assert torch.equal(pair.lora_A, wanted.pop(f"{place}.lora_A.weight"))
            assert torch.equal(pair.lora_B, wanted.pop(f"{place}.lora_B.weight"))
            assert pair.scaling == 5 / 2**0.5
    for unit, gate in checkpoint.router.gates.items():
        assert torch.equal(gate.weight, wanted.pop(f"{prefix}{unit.removeprefix('model.')}.moe_gate.weight"))
        assert gate.weight.dtype == torch.float32
    assert not wanted


def test_each_strategy_says_how_it_mixes(write):
    seen = {}
    for strategy in STRATEGIES:
        state = read_checkpoint(write(Recipe(strategy, top_k=1, top_p=0.7, temperature=0.0))).router
        seen[strategy] = (state.rule, state.level, next(iter(state.gates.values())).top_k, state.threshold, state.temperature)
    assert seen == {
        "mixlora": ("softmax_topk", "feed_forward", 1, None, 1.0),
        "mixlora-dynamic": ("top_p", "feed_forward", None, 0.7, 1.0),
        "loramoe": ("softmax", "linear", None, None, 1.0),
        "mola": ("softmax_topk", "linear", 1, None, 1.0),
    }


def test_the_units_are_blocks_or_linears_and_the_attention_is_shared(write):
    mixlora, mola = read_checkpoint(write()), read_checkpoint(write(Recipe("mola")))
    assert list(mixlora.router.gates) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert set(mixlora.shared.modules) == {f"model.layers.{n}.self_attn.{m}_proj" for n in (0, 1) for m in "qv"}
    assert mixlora.router.activation == "silu"
    assert mola.shared is None and set(mola.router.gates) == set(mola.experts[0].modules)
    assert len(mola.router.gates) == 10 and mola.router.activation is None
    assert read_checkpoint(write(Recipe(targets=("down_proj",)))).shared is None


def test_the_first_releases_of_mixlora_hold_the_same(write):
    modern, legacy = read_checkpoint(write()), read_checkpoint(write(Recipe(legacy=True)))
    assert list(legacy.router.gates) == list(modern.router.gates)
    for old, new in zip(legacy.adapters, modern.adapters, strict=True):
        assert old.name == new.name and set(old.modules) == set(new.modules) and set(old.targets) == set(new.targets)


def test_a_gate_under_its_old_and_its_new_name_is_refused(write):
    with pytest.raises(errors.ForeignTensor, match="the same tensor under two keys"):
        read_checkpoint(write(Recipe(legacy=True), put(GATE, torch.ones(3, 48))))


def test_expert_lora_holds_for_the_experts_only(write):
    checkpoint = read_checkpoint(write(Recipe(rank=4, alpha=8, expert_lora={"r": 2, "lora_alpha": 3})))
    assert {pair.scaling for expert in checkpoint.experts for pair in expert.modules.values()} == {1.5}
    assert {pair.scaling for pair in checkpoint.shared.modules.values()} == {2.0}
    assert any("expert_lora" in warning for warning in checkpoint.warnings)


def first_gate(checkpoint: Checkpoint) -> GateState:
    return next(iter(checkpoint.router.gates.values()))


def test_what_the_caller_says_wins_and_what_nobody_says_is_recorded(write):
    assert first_gate(read_checkpoint(write(), top_k=3)).top_k == 3
    assert read_checkpoint(write(Recipe("mixlora-dynamic", temperature=0.5)), temperature=2.0).router.temperature == 2.0
    without = read_checkpoint(write(top_k=None))
    assert first_gate(without).top_k == 2 and without.assumptions == {"top_k": 2}
    without = read_checkpoint(write(Recipe("mixlora-dynamic"), top_p=None, temperature=None))
    assert without.router.threshold == 0.8 and without.assumptions == {"top_p": 0.8, "temperature": 0.0}


@pytest.mark.parametrize(
    ("strategy", "options", "word"),
    [
        ("mixlora", {"temperature": 1.0}, "mixlora has no temperature"),
        ("mixlora-dynamic", {"top_k": 1}, "mixlora-dynamic has no top_k"),
        ("loramoe", {"top_k": 1}, "loramoe has no top_k"),
        ("mola", {"top_k": (1, 2)}, "from 1 to 3"),
        ("mola", {"top_k": 4}, "from 1 to 3"),
        ("mola", {"router_features": "base"}, "features"),
    ],
)
def test_options_that_do_not_fit_are_refused(write, strategy, options, word):
    directory = write(Recipe(strategy))
    read_checkpoint(directory)
    with pytest.raises(errors.InvalidField, match=word):
        read_checkpoint(directory, **options)


@pytest.mark.parametrize("reading", ["training", "inference"])
def test_a_switch_is_read_as_the_caller_says_and_that_is_recorded(write, reading):
    checkpoint = read_checkpoint(write(SWITCH), mixlora_switch=reading)
    state = checkpoint.router
    assert (state.rule, state.level, state.mixlora_switch, state.expert_capacity) == ("switch", "feed_forward", reading, 5)
    assert state.activation == "silu" and first_gate(checkpoint).top_k is None and checkpoint.shared is not None
    assert checkpoint.assumptions == {"mixlora_switch": reading}
    assert [line.startswith("mixlora-switch as in") for line in checkpoint.warnings] == [True]
    without = read_checkpoint(write(SWITCH, expert_capacity=None), mixlora_switch=reading)
    assert without.assumptions == {"mixlora_switch": reading, "expert_capacity": 32} and without.router.expert_capacity == 32


@pytest.mark.parametrize(
    ("recipe", "fields", "options", "word"),
    [
        (SWITCH, {}, {}, r"mixlora_switch: found nothing, .* expected mixlora_switch=training \(p FFN_e"),
        (SWITCH, {}, {"mixlora_switch": "both"}, "found 'both', expected one of training, inference"),
        (SWITCH, {}, {"mixlora_switch": "training", "top_k": 1}, "mixlora-switch has no top_k"),
        (SWITCH, {}, {"mixlora_switch": "training", "temperature": 1.0}, "mixlora-switch has no temperature"),
        (SWITCH, {"expert_capacity": 0}, {"mixlora_switch": "training"}, "expert_capacity: found 0, expected an integer from 1"),
        (SWITCH, {"expert_capacity": True}, {"mixlora_switch": "inference"}, "expert_capacity"),
        (Recipe("mixlora"), {}, {"mixlora_switch": "training"}, "only MoE-PEFT's mixlora-switch has it"),
        (Recipe("mola"), {}, {"mixlora_switch": "inference"}, "only MoE-PEFT's mixlora-switch has it"),
        (Recipe("mixlora"), {}, {"mixlora_switch": "both"}, "one of training, inference"),
    ],
)
def test_a_switch_that_cannot_be_read_is_refused_in_one_line(write, recipe, fields, options, word):
    directory = write(recipe, **fields)
    with pytest.raises(errors.InvalidField, match=word) as caught:
        read_checkpoint(directory, **options)
    assert "\n" not in str(caught.value)


def test_the_command_shows_the_reading_that_was_asked_for(write, capsys):
    directory = str(write(SWITCH))
    assert main(["inspect", directory]) == 2
    assert "mixlora_switch=inference (each MLP hands its input on" in capsys.readouterr().err
    assert main(["inspect", directory, "--assume", "mixlora_switch=training"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "switch, softmax, the likeliest expert kept, not renormalised, as in training, expert_capacity 5" in shown
    assert "assumed mixlora_switch = training" in shown
    assert main(["inspect", directory, "--assume", "mixlora_switch=inference", "--json"]) == 0
    router = json.loads(capsys.readouterr().out)["router"]
    assert (router["mixlora_switch"], router["expert_capacity"]) == ("inference", 5)


def put(key, tensor):
    return lambda tensors: tensors.update({f"mixlora.{key}": tensor})


def drop(*parts):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if all(part in key for part in parts)]


def move(old, new):
    return lambda tensors: [tensors.update({key.replace(old, new): tensors.pop(key)}) for key in list(tensors) if old in key]


GATE = f"{MLP}.moe_gate.weight"
TENSOR_DEFECTS = {
    "no tensors": (lambda tensors: tensors.clear(), errors.ExpertEmpty, "0 tensors"),
    "no gate": (drop("layers.1", "moe_gate"), errors.GateMissing, "mixlora.layers.1.mlp.moe_gate.weight"),
    "no gates": (drop("moe_gate"), errors.GateMissing, "moe_gate"),
    "gate of a Linear": (put(f"{MLP}.up_proj.moe_gate.weight", torch.ones(3, 48)), errors.ForeignTensor, "up_proj.moe_gate"),
    "gate transposed": (put(GATE, torch.ones(48, 3)), errors.ShapeMismatch, r"\(48, 3\)"),
    "gate too narrow": (put(GATE, torch.ones(3, 40)), errors.ShapeMismatch, r"\(3, 48\)"),
    "gate of two experts": (put(GATE, torch.ones(2, 48)), errors.ShapeMismatch, r"\(2, 48\)"),
    "gate of integers": (put(GATE, torch.ones(3, 48, dtype=torch.int8)), errors.DtypeUnsupported, "moe_gate"),
    "NaN in a gate": (put(GATE, torch.full((3, 48), torch.nan)), errors.NonFiniteTensor, "moe_gate"),
    "infinity in an expert": (put(EXPERT, torch.full((4, 48), torch.inf)), errors.NonFiniteTensor, "up_proj.experts.1"),
    "an expert less": (drop("experts.2."), errors.ExpertCountMismatch, "experts 0, 1"),
    "an expert more": (move("experts.2.", "experts.3."), errors.ExpertCountMismatch, "experts 0, 1, 3"),
    "no experts": (drop("experts"), errors.ExpertEmpty, "no tensors of an expert"),
    "half a pair": (drop(EXPERT), errors.IncompletePair, "no lora_A"),
    "an expert without a Linear": (drop("layers.0.mlp.up_proj.experts.1."), errors.IncompletePair, r"up_proj.experts.1"),
    "a layer without a Linear": (drop("layers.1.mlp.up_proj"), errors.IncompletePair, r"layers.1.mlp.up_proj"),
    "a layer left out": (move("layers.1.", "layers.2."), errors.IncompletePair, "layers.1."),
    "attention without a Linear": (drop("layers.1.self_attn.q_proj"), errors.IncompletePair, "layers.1.self_attn.q_proj"),
    "no attention": (drop("self_attn"), errors.IncompletePair, "q_proj, v_proj"),
    "experts in the attention": (
        move("self_attn.q_proj", "self_attn.q_proj.experts.0"),
        errors.IncompletePair,
        "self_attn.q_proj",
    ),
    "another rank": (put(EXPERT, torch.ones(5, 48)), errors.ShapeMismatch, "rank"),
    "a classifier": (lambda tensors: tensors.update(classifier=torch.ones(2, 48)), errors.ForeignTensor, "classifier"),
    "another prefix": (move("mixlora.", "mola."), errors.ForeignTensor, "mola."),
    "a magnitude": (put(f"{MLP}.up_proj.experts.1.magnitude", torch.ones(80)), errors.ForeignTensor, "magnitude"),
    "not targeted": (move("self_attn.v_proj", "self_attn.k_proj"), errors.InvalidField, "target_modules"),
}


@pytest.mark.parametrize(("change", "kind", "word"), TENSOR_DEFECTS.values(), ids=TENSOR_DEFECTS)
def test_defective_tensors_are_refused_by_name(write, change, kind, word):
    read_checkpoint(write())
    with pytest.raises(kind, match=word) as caught:
        read_checkpoint(write(change=change))
    assert "\n" not in str(caught.value)


CONFIG_DEFECTS = {
    "switch": (
        {"routing_strategy": "mixlora-switch"},
        "mixlora_switch=training .* or mixlora_switch=inference .each MLP hands its",
    ),
    "unknown strategy": ({"routing_strategy": "mixlora-static"}, "routing_strategy"),
    "no strategy": ({"routing_strategy": None}, "routing_strategy"),
    "strategy of another type": ({"routing_strategy": "mola"}, "routing_strategy"),
    "DoRA": ({"use_dora": True}, "never saves the magnitudes"),
    "DoRA of the experts": ({"expert_lora": {"use_dora": True}}, "never saves the magnitudes"),
    "expert_lora no object": ({"expert_lora": 4}, "expert_lora"),
    "bias": ({"bias": "all"}, "bias"),
    "classification": ({"task_type": "SEQ_CLS"}, "task_type"),
    "no rank": ({"r": None}, " r: "),
    "rank as text": ({"r": "4"}, " r: "),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "flag as number": ({"use_rslora": 1}, "use_rslora"),
    "no experts": ({"num_experts": 0}, "num_experts"),
    "experts as truth": ({"num_experts": True}, "num_experts"),
    "top_k of none": ({"top_k": 0}, "top_k"),
    "top_k too large": ({"top_k": 4}, "top_k"),
    "top_k as fraction": ({"top_k": 2.0}, "top_k"),
    "targets as pattern": ({"target_modules": ".*proj"}, "target_modules"),
    "no targets": ({"target_modules": []}, "target_modules"),
    "act_fn as number": ({"act_fn": 3}, "act_fn"),
}


@pytest.mark.parametrize(("fields", "word"), CONFIG_DEFECTS.values(), ids=CONFIG_DEFECTS)
def test_defective_configurations_are_refused_by_name(write, fields, word):
    read_checkpoint(write())
    with pytest.raises(errors.InvalidField, match=word) as caught:
        read_checkpoint(write(**fields))
    assert caught.value.file.name == "adapter_config.json" and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"top_p": True}, "top_p"), ({"temperature": -1}, "temperature")],
)
def test_defective_thresholds_are_refused_by_name(write, fields, word):
    read_checkpoint(write(Recipe("mixlora-dynamic"), top_p=1.0, temperature=0))
    with pytest.raises(errors.InvalidField, match=word):
        read_checkpoint(write(Recipe("mixlora-dynamic"), **fields))


def test_expert_counts_that_disagree_are_refused(write):
    with pytest.raises(errors.ExpertCountMismatch, match="num_experts of adapter_config.json is 4"):
        read_checkpoint(write(num_experts=4))


def test_targets_may_be_flags_and_may_name_what_the_base_does_not_have(write):
    flags = dict.fromkeys(("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj"), True) | {"k_proj": False}
    checkpoint = load_checkpoint(write(target_modules=flags)).checkpoint
    assert "qkv_proj" in checkpoint.shared.targets and "k_proj" not in checkpoint.shared.targets


def test_a_target_that_the_base_has_but_the_file_has_not_is_refused(write):
    directory = write(target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(errors.IncompletePair, match="o_proj"):
        load_checkpoint(directory)


def test_another_base_is_refused(write, tmp_path_factory):
    directory = write()
    load_checkpoint(directory)
    with pytest.raises(errors.ShapeMismatch, match="expected from 88 to 56"):
        load_checkpoint(directory, base_model=str(write_base(tmp_path_factory.mktemp("qwen"), "qwen")))
    with pytest.raises(errors.ShapeMismatch, match="does not have"):
        load_checkpoint(directory, base_model=str(write_base(tmp_path_factory.mktemp("gpt2"), "gpt2")))
    with pytest.raises(errors.IncompletePair, match=r"layers\.1"):
        load_checkpoint(write(change=drop("layers.1.")))
