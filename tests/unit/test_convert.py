"""Checkpoints in other formats: the same tensors, the same logits, or a refusal with the reason; the original is untouched."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dylo_moe import cli, load_checkpoint
from dylo_moe.conversion import check_copy, convert_checkpoint, same_expert
from dylo_moe.errors import CheckpointError, ConversionError, DyloMoeError, OptionError
from dylo_moe.formats import GATE_RULES, GateState, LoraPair, detect_model_format, read_checkpoint, write_native
from fixtures.layouts import BY_NAME, write_layout
from harness.specimens import write_base, write_checkpoint
from harness.specimens.xlora import XLoraChoices, write_xlora_checkpoint
from tests.unit.formats import written
from tests.unit.formats.states import MLPS, classifier, draw, expert, gates, hybrid, mixture, same

IDS = torch.tensor([[5, 9, 33, 7, 21], [8, 2, 60, 3, 4]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def native(base, tmp_path_factory):
    """Three experts of different ranks and alphas, router features "base"."""
    return write_checkpoint(tmp_path_factory.mktemp("native") / "checkpoint", base, num_experts=3, top_k=2)


@pytest.fixture(scope="module")
def full(base, tmp_path_factory):
    """A full state with the base's own config.json: its directory, and what was read of it."""
    source = write_layout(tmp_path_factory.mktemp("full"), base, "D3c")
    return source, read_checkpoint(source)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A full state without any configuration, of a base that is written beside it: base, directory, and what was read."""
    root = tmp_path_factory.mktemp("bare")
    base = write_base(root / "base", "gpt2")
    source = write_layout(root / "in", base, "D1")
    return base, source, read_checkpoint(source, **BY_NAME["D1"].options)


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, **options).logits


def same_experts(first, second):
    return len(first) == len(second) and all(map(same_expert, first, second))


# A pickle is read in a process of its own, which takes seconds: one of each kind of layout.
@pytest.mark.parametrize("name", ["D4", "D5", "lora-bag", "peft-lora"])
def test_layout_becomes_ours_bit_for_bit_and_stays_as_it_was(base, tmp_path, name):
    layout = BY_NAME[name]
    source = write_layout(tmp_path / "in", base, name)
    before = digests(tmp_path / "in")
    given = None if layout.records_base else str(base)
    checkpoint = read_checkpoint(source, **layout.options)
    made = convert_checkpoint(checkpoint, tmp_path / "out", to="dylora", base_model=given)
    copy = read_checkpoint(made.path)
    assert (made.format, copy.format) == ("dylo-moe", "dylo-moe")
    assert same_experts(checkpoint.experts, copy.experts) and same(checkpoint.router, copy.router)
    assert copy.assumptions == {}
    assert digests(tmp_path / "in") == before
    assert not list(made.path.rglob("*.pt")) and not list(made.path.rglob("*.bin"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_full_state_brings_its_base_along(full, tmp_path):
    source, checkpoint = full
    made = convert_checkpoint(checkpoint, tmp_path / "out", to="dylora")
    assert made.notes[-1] == "the base weights are in base/"
    made.path.rename(tmp_path / "moved")
    assert torch.equal(logits(load_checkpoint(tmp_path / "moved")), logits(load_checkpoint(source)))
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "base").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in checkpoint.base_state.items())


def test_base_is_recorded_in_the_dtype_that_its_weights_have(full, tmp_path):
    checkpoint = replace(full[1], base_config={**full[1].base_config, "dtype": "float16"})
    convert_checkpoint(checkpoint, tmp_path / "out", to="dylora")
    assert json.loads((tmp_path / "out" / "base" / "config.json").read_text())["dtype"] == "float32"


def test_full_state_without_configuration_takes_the_named_bases(bare, tmp_path):
    base, source, checkpoint = bare
    made = convert_checkpoint(checkpoint, tmp_path / "out", to="dylora", base_model=str(base))
    original = load_checkpoint(source, base_model=str(base), **BY_NAME["D1"].options)
    assert torch.equal(logits(load_checkpoint(made.path)), logits(original))


def test_full_state_without_any_configuration_asks_for_the_base(bare, tmp_path):
    with pytest.raises(CheckpointError, match="base_model="):
        convert_checkpoint(bare[2], tmp_path / "out", to="dylora")
    assert not (tmp_path / "out").exists()


def test_own_base_wins_over_a_directory_of_the_same_name(full, tmp_path, monkeypatch):
    convert_checkpoint(full[1], tmp_path / "out", to="dylora")
    other = write_base(tmp_path / "here" / "base", "llama", seed=1)
    monkeypatch.chdir(other.parent)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").state_dict()
    loaded = load_checkpoint(tmp_path / "out").causal_lm.state_dict()
    assert torch.equal(own["model.embed_tokens.weight"], loaded["model.embed_tokens.weight"])


@pytest.mark.parametrize("rule", GATE_RULES)
def test_gates_become_ours_bit_for_bit(tmp_path, rule):
    router, experts = gates(rule, bias=True), (expert("code"), expert("maths"))
    if rule == "switch":  # of whole MLPs alone
        router = gates(rule, bias=True, units=MLPS, level="feed_forward")
        experts = tuple(expert(name, [f"{mlp}.up_proj" for mlp in MLPS]) for name in ("code", "maths"))
    shared = expert("attention")
    source = mixture(router, path=tmp_path / "in", experts=experts, shared=shared, format="moe-peft-mola")
    copy = read_checkpoint(convert_checkpoint(source, tmp_path / "out", to="dylora").path)
    assert same_experts(source.adapters, copy.adapters) and same(source.router, copy.router)


def test_relative_base_is_recorded_where_it_is(base, native, tmp_path):
    (base.parent / "checkpoint").mkdir()
    checkpoint = replace(read_checkpoint(native), base_model="../llama", path=base.parent / "checkpoint")
    made = convert_checkpoint(checkpoint, tmp_path / "out", to="dylora")
    assert read_checkpoint(made.path).base_model == str(base)
    assert [note for note in made.notes if "../llama" in note]


def test_name_of_the_hub_is_recorded_as_it_is(tmp_path):
    made = convert_checkpoint(mixture(None, path=tmp_path / "in", base_model="some/model"), tmp_path / "out", to="dylora")
    assert read_checkpoint(made.path).base_model == "some/model"


def test_assumed_values_are_recorded_and_said(base, tmp_path):
    source = write_layout(tmp_path / "in", base, "D5")
    assert read_checkpoint(source).assumptions["top_k"] == 1
    made = convert_checkpoint(source, tmp_path / "out", to="dylora")
    assert any("top_k=1" in note for note in made.notes)


def test_bag_is_loaded_by_stock_peft_and_converts_back(base, native, tmp_path):
    made = convert_checkpoint(native, tmp_path / "bag", to="bag", drop_router=True)
    assert made.format == detect_model_format(made.path) == "lora-bag"
    assert made.notes == ("the router was dropped",)
    ours = load_checkpoint(native)
    for index in range(3):
        stock = AutoModelForCausalLM.from_pretrained(base)
        stock = PeftModel.from_pretrained(stock, made.path / f"expert_{index}").eval()
        assert torch.equal(logits(stock), logits(ours, expert_id=index))
    back = read_checkpoint(convert_checkpoint(made.path, tmp_path / "back", to="dylora").path)
    again = convert_checkpoint(tmp_path / "back", tmp_path / "again", to="bag")
    assert same_experts(back.experts, read_checkpoint(native).experts)
    assert digests(again.path) == digests(made.path)


def test_one_expert_becomes_one_plain_adapter(base, native, tmp_path):
    made = convert_checkpoint(native, tmp_path / "one", to="peft-lora", experts=[1], drop_router=True)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made.path).eval()
    assert torch.equal(logits(stock), logits(load_checkpoint(native), expert_id=1))


def stock_xlora(base, directory):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.use_cache = False  # PEFT's X-LoRA refuses to run with a cache
    return PeftModel.from_pretrained(model, directory).eval()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_hybrid_gate_as_a_classifier_computes_the_same_in_stock_peft(base, tmp_path, top_k):
    source = write_checkpoint(tmp_path / "in", base, num_experts=3, top_k=top_k, features="base")
    made = convert_checkpoint(source, tmp_path / "out", to="xlora")
    expected = logits(load_checkpoint(source))
    assert made.format == detect_model_format(made.path) == "peft-xlora"
    # Logits are up to 12; float32 keeps 7 digits, and another order of additions moves the last ones.
    assert (logits(stock_xlora(base, made.path)) - expected).abs().max() < 1e-4
    assert (logits(load_checkpoint(made.path)) - expected).abs().max() < 1e-4
    assert (logits(load_checkpoint(source), expert_id=0) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "choices",
    [
        XLoraChoices(),
        XLoraChoices(xlora_depth=3, xlora_dropout_p=0.2, layerwise_scalings=True, top_k_lora=2),
        XLoraChoices(enable_softmax=False, enable_softmax_topk=True, top_k_lora=2, global_scaling_weight=0.7),
    ],
)
def test_xlora_becomes_ours_and_xlora_again_with_the_same_tensors_and_logits(base, tmp_path, choices):
    source = write_xlora_checkpoint(tmp_path / "in", base, num_experts=3, choices=choices)
    ours = convert_checkpoint(source, tmp_path / "ours", to="dylora")
    again = convert_checkpoint(ours.path, tmp_path / "again", to="xlora")
    assert torch.equal(logits(load_checkpoint(ours.path)), logits(load_checkpoint(source)))
    assert torch.equal(logits(stock_xlora(base, again.path)), logits(stock_xlora(base, source)))
    for name in ("adapter_model.safetensors", *(f"{index}/adapter_model.safetensors" for index in range(3))):
        assert same(load_file(again.path / name), load_file(source / name))


def test_classifier_without_biases_gets_zeros_for_peft(tmp_path):
    source = mixture(classifier(bias=False), path=tmp_path / "in")
    made = convert_checkpoint(source, tmp_path / "out", to="xlora")
    assert not read_checkpoint(made.path).router.layers[0][1].any()
    assert "biases of zeros" in made.notes[0]


def merged_by_peft(base, native, weights):
    """PEFT's own merge: all adapters loaded, add_weighted_adapter with combination_type cat."""
    names = [f"expert_{index}" for index in range(3)]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), native / "experts" / names[0], adapter_name=names[0]
    )
    for name in names[1:]:
        model.load_adapter(native / "experts" / name, adapter_name=name)
    model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    return model.eval()


@pytest.mark.parametrize("to", ["peft-lora", "bag"])
def test_merged_adapter_equals_pefts_own_tensors_and_logits(base, native, tmp_path, to):
    weights = [0.3, 0.9, -0.2]
    made = convert_checkpoint(native, tmp_path / "one", to=to, merge=weights)
    (one,) = read_checkpoint(made.path).experts
    theirs = merged_by_peft(base, native, weights)
    modules = dict(theirs.base_model.model.named_modules())
    for module, pair in one.modules.items():
        assert pair.rank == 4 + 8 + 3 and pair.scaling == modules[module].scaling["sum"] == 1
        assert torch.equal(pair.lora_A, modules[module].lora_A["sum"].weight)
        assert torch.equal(pair.lora_B, modules[module].lora_B["sum"].weight)
    directory = made.path if to == "peft-lora" else made.path / "merged"
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory).eval()
    assert torch.equal(logits(stock), logits(theirs))
    routed = logits(load_checkpoint(native), routing_weights=torch.tensor([[weights]]))
    assert (logits(stock) - routed).abs().max() < 1e-4 * routed.abs().max()


def test_merge_is_the_sum_of_deltas_and_of_the_shared_adapter(tmp_path):
    first, second, shared = expert("a", rank=3), expert("b", written.MODULES[1:], rank=2), expert("attention")
    source = mixture(gates(), path=tmp_path / "in", experts=(first, second), shared=shared)
    (one,) = read_checkpoint(convert_checkpoint(source, tmp_path / "out", to="peft-lora", merge=[0.5, -2.0]).path).experts

    def delta(each, module):
        pair = each.modules.get(module)
        return 0.0 if pair is None else pair.scaling * pair.lora_B.double() @ pair.lora_A.double()

    for module in written.MODULES:
        wanted = 0.5 * delta(first, module) - 2.0 * delta(second, module) + delta(shared, module)
        assert (delta(one, module) - wanted).abs().max() < 1e-5


def test_merge_of_16_bit_experts_keeps_the_products_in_float32(tmp_path):
    half = [replace(each, modules={m: to_half(p) for m, p in each.modules.items()}) for each in mixture(None).experts]
    source = mixture(None, path=tmp_path / "in", experts=tuple(half))
    (one,) = read_checkpoint(convert_checkpoint(source, tmp_path / "out", to="peft-lora", merge=[0.3, 0.7]).path).experts
    pairs = [each.modules[written.MODULES[0]] for each in half]
    wanted = torch.cat([pair.lora_A.float() * weight * pair.scaling for weight, pair in zip((0.3, 0.7), pairs, strict=True)])
    assert torch.equal(one.modules[written.MODULES[0]].lora_A, wanted)


def to_half(pair):
    return replace(pair, lora_A=pair.lora_A.bfloat16(), lora_B=pair.lora_B.bfloat16())


def test_expert_of_weight_one_alone_stays_as_it_is_even_in_whole_mlps(tmp_path):
    modules = [f"{mlp}.up_proj" for mlp in MLPS]
    experts = (expert("a", modules), expert("b", modules))
    source = mixture(gates(units=MLPS, level="feed_forward"), path=tmp_path / "in", experts=experts)
    (one,) = read_checkpoint(convert_checkpoint(source, tmp_path / "out", to="peft-lora", merge=[0, 1]).path).experts
    assert same_expert(one, experts[1])


def test_pruned_mixture_routes_as_if_the_others_were_never_chosen(native, tmp_path):
    made = convert_checkpoint(native, tmp_path / "out", to="dylora", experts=[0, 2])
    full, pruned = load_checkpoint(native), load_checkpoint(made.path)
    assert pruned.expert_names == ["expert_0", "expert_2"]
    full.router.gate.bias.data[1] = -1e30
    assert (logits(full) - logits(pruned)).abs().max() < 1e-4
    assert made.notes == ()


def test_pruning_below_top_k_clips_it_and_says_so(native, tmp_path):
    made = convert_checkpoint(native, tmp_path / "out", to="dylora", experts=[2])
    assert read_checkpoint(made.path).router.top_k == 1
    assert made.notes == ("top_k was 2 and is 1: there are no more experts",)


@pytest.mark.parametrize("layerwise", [False, True])
def test_pruned_classifier_keeps_the_outputs_of_each_layer(tmp_path, layerwise):
    state = classifier(experts=3, layerwise=layerwise, top_k=3)
    source = mixture(state, path=tmp_path / "in", experts=(expert("a"), expert("b"), expert("c")))
    copy = read_checkpoint(convert_checkpoint(source, tmp_path / "out", to="dylora", experts=[0, 2]).path).router
    count = len(written.MODULES) if layerwise else 1
    weight, bias = state.layers[-1]
    assert torch.equal(copy.layers[-1][0].view(count, 2, 6), weight.view(count, 3, 6)[:, [0, 2]])
    assert torch.equal(copy.layers[-1][1].view(count, 2), bias.view(count, 3)[:, [0, 2]])
    assert (copy.num_experts, copy.top_k) == (2, 2)


def test_pruned_gates_lose_the_rows_and_units_with_fewer_experts_keep_theirs(tmp_path):
    state = replace(gates("topk_softmax", bias=True, rows=3), num_experts=3)
    first = written.MODULES[0]
    state = replace(state, gates={**state.gates, first: GateState(draw(2, 8), top_k=2)})
    experts = (expert("a"), expert("b"), expert("c", written.MODULES[1:]))
    source = mixture(state, path=tmp_path / "in", experts=experts)
    made = convert_checkpoint(source, tmp_path / "out", to="dylora", experts=[1, 2])
    copy = read_checkpoint(made.path).router
    assert torch.equal(copy.gates[first].weight, state.gates[first].weight[1:])
    assert torch.equal(copy.gates[written.MODULES[1]].bias, state.gates[written.MODULES[1]].bias[1:])
    assert (copy.gates[first].top_k, copy.num_experts) == (1, 2)
    assert made.notes == ("top_k was 2 and is 1: there are no more experts",)


def dora(source):
    """The mixture with a magnitude on one module of its first expert."""
    first, *others = source.experts
    pairs = {module: replace(pair, magnitude=draw(8).abs()) for module, pair in first.modules.items()}
    return replace(source, experts=(replace(first, modules=pairs), *others))


def unit_without(rows):
    state = replace(gates(), gates={**gates().gates, written.MODULES[0]: GateState(draw(rows, 8))})
    return mixture(state, experts=(expert("a"), expert("b", written.MODULES[1:])))


MIXED = {
    written.MODULES[0]: LoraPair(draw(4, 8), draw(8, 4), 8.0),
    written.MODULES[1]: LoraPair(draw(4, 8), draw(8, 4), 8.0, True),
}
REFUSED = {
    "router into a bag": (lambda: mixture(hybrid()), {"to": "bag"}, "--drop-router"),
    "router into one adapter": (lambda: mixture(hybrid()), {"to": "peft-lora", "experts": [0]}, "--drop-router"),
    "several into one adapter": (lambda: mixture(None), {"to": "peft-lora"}, "2 experts"),
    "shared into a bag": (lambda: mixture(None, shared=expert("all")), {"to": "bag"}, "always added"),
    "whole MLPs merged": (lambda: mixture(gates(units=MLPS, level="feed_forward")), {"to": "bag", "merge": [1, 1]}, "whole MLPs"),
    "DoRA merged": (lambda: dora(mixture(None)), {"to": "bag", "merge": [1, 1]}, "DoRA"),
    "merge of nothing": (lambda: mixture(None), {"to": "bag", "merge": [0, 0]}, "not all 0"),
    "merge of infinity": (lambda: mixture(None), {"to": "bag", "merge": [1, float("inf")]}, "finite"),
    "merge of one weight": (lambda: mixture(None), {"to": "bag", "merge": [1]}, "2 weights"),
    "merge into a mixture": (lambda: mixture(None), {"to": "dylora", "merge": [1, 1]}, "peft-lora"),
    "no experts": (lambda: mixture(None, experts=()), {"to": "dylora"}, "without experts"),
    "expert beyond the last": (lambda: mixture(None), {"to": "dylora", "experts": [2]}, "0 to 1"),
    "expert twice": (lambda: mixture(None), {"to": "dylora", "experts": [1, 1]}, "ascending"),
    "experts permuted": (lambda: mixture(None), {"to": "dylora", "experts": [1, 0]}, "ascending"),
    "experts none": (lambda: mixture(None), {"to": "dylora", "experts": []}, "0 to 1"),
    "threshold rule pruned": (lambda: mixture(gates("top_p")), {"to": "dylora", "experts": [0]}, "top_p"),
    "unit pruned empty": (lambda: unit_without(1), {"to": "dylora", "experts": [1]}, "would have none"),
    "no router into X-LoRA": (lambda: mixture(None), {"to": "xlora"}, "no router"),
    "gates into X-LoRA": (lambda: mixture(gates()), {"to": "xlora"}, "its own layer's input"),
    "other features into X-LoRA": (lambda: mixture(hybrid("all_experts")), {"to": "xlora"}, "all_experts"),
    "shared into X-LoRA": (lambda: mixture(classifier(), shared=expert("all")), {"to": "xlora"}, "shared"),
    "classifier without ReLU": (lambda: mixture(classifier(use_relu=False)), {"to": "xlora"}, "ReLU"),
    "DoRA into X-LoRA": (lambda: dora(mixture(classifier())), {"to": "xlora"}, "code|DoRA|plain"),
    "merge into X-LoRA": (lambda: mixture(classifier()), {"to": "xlora", "merge": [1, 1]}, "peft-lora"),
    "unknown target": (lambda: mixture(None), {"to": "gguf"}, "dylora"),
    "both scalings in one": (
        lambda: mixture(None, experts=(replace(expert("a"), modules=MIXED),)),
        {"to": "dylora"},
        "use_rslora",
    ),
    "name that is a mark": (lambda: mixture(None, experts=(expert("arrow_router"), expert("b"))), {"to": "bag"}, "peft-arrow"),
    "unknown base": (lambda: mixture(None), {"to": "dylora", "base_model": "/no/base"}, "/no/base"),
}


@pytest.mark.parametrize(("source", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_expressed_is_refused_with_the_reason(tmp_path, source, options, said):
    with pytest.raises(DyloMoeError, match=said) as caught:
        convert_checkpoint(replace(source(), path=tmp_path / "in"), tmp_path / "out", **options)
    assert isinstance(caught.value, ConversionError | OptionError | CheckpointError) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_merged_model_has_nothing_to_convert(base, tmp_path):
    with pytest.raises(ConversionError, match="without experts"):
        convert_checkpoint(base, tmp_path / "out", to="dylora")


def test_experts_of_another_base_are_refused(native, tmp_path):
    other = write_base(tmp_path / "other", "gpt2")
    with pytest.raises(CheckpointError, match="other"):
        convert_checkpoint(native, tmp_path / "out", to="dylora", base_model=str(other))


def test_expert_called_base_cannot_stand_beside_the_base_weights(full, tmp_path):
    checkpoint = full[1]
    renamed = replace(checkpoint, experts=(replace(checkpoint.experts[0], name="base"), *checkpoint.experts[1:]))
    with pytest.raises(ConversionError, match="'base'"):
        convert_checkpoint(renamed, tmp_path / "out", to="bag", drop_router=True)


def occupied(directory):
    (directory / "out").mkdir()
    (directory / "out" / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "target", "said"),
    [
        (occupied, "out", "not an empty directory"),
        (lambda directory: (directory / "out").write_text(""), "out", "not an empty directory"),
        (lambda directory: (directory / "out").symlink_to("nowhere"), "out", "not an empty directory"),
        (lambda directory: None, "in/out", "inside the checkpoint"),
        (lambda directory: None, "in", "inside the checkpoint"),
    ],
)
def test_target_that_is_not_new_is_refused_and_untouched(tmp_path, prepare, target, said):
    source = write_native(tmp_path / "in", mixture(hybrid()))
    prepare(tmp_path)
    before = digests(tmp_path)
    with pytest.raises(OptionError, match=said):
        convert_checkpoint(source, tmp_path / target, to="dylora")
    assert digests(tmp_path) == before


def test_empty_target_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    made = convert_checkpoint(write_native(tmp_path / "in", mixture(hybrid())), tmp_path / "out", to="dylora")
    assert detect_model_format(made.path) == "dylo-moe"


def test_writer_that_loses_a_bit_is_noticed(tmp_path):
    source = mixture(hybrid(), path=tmp_path / "in")
    first, *others = source.experts
    module, pair = next(iter(first.modules.items()))
    changed = replace(pair, lora_A=pair.lora_A.nextafter(torch.tensor(9.0)))
    careless = replace(source, experts=(replace(first, modules={**first.modules, module: changed}), *others))
    check_copy(source, write_native(tmp_path / "right", source), "dylo-moe")
    with pytest.raises(ConversionError, match="experts are not the same"):
        check_copy(source, write_native(tmp_path / "wrong", careless), "dylo-moe")
    with pytest.raises(ConversionError, match="router is not the same"):
        check_copy(source, write_native(tmp_path / "other", replace(source, router=hybrid(top_k=2))), "dylo-moe")


def run(*words, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "dylo_moe.cli", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=120
    )
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line.startswith("dylo-moe:")]


def test_command_converts_and_prints_the_new_directory(base, tmp_path):
    source = write_layout(tmp_path / "in", base, "D5")
    words = ["convert", source, "out", "--to", "peft-lora", "--assume", "top_k=2", "--experts", "0,2", "--merge", "0.25,0.75"]
    code, out, notes = run(*words, cwd=tmp_path)
    assert (code, out) == (0, "out\n")
    assert read_checkpoint(tmp_path / "out").experts[0].modules
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    assert any("warning" in note for note in notes)
    assert any("assumed features" in note for note in notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "bag"], "--drop-router"),
        (["--to", "gguf"], "--to"),
        (["--to", "dylora", "--experts", "0;1"], "--experts"),
        (["--to", "bag", "--merge", "0.5,x"], "--merge"),
        (["--to", "dylora", "--experts", "7"], "0 to 2"),
        (["--to", "dylora", "--assume", "top_k=9"], "top_k"),
        ([], "--to"),
    ],
)
def test_mistake_of_the_command_is_one_line_and_exit_code_2(native, tmp_path, capsys, words, said):
    try:
        code = cli.main(["convert", str(native), str(tmp_path / "out"), *words])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and said in error
    assert not (tmp_path / "out").exists()
