"""Classifiers, gates and a shared adapter in the native format: bitwise there and back, each defect refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dylo_moe import errors
from dylo_moe.formats import GATE_RULES, GateState, read_checkpoint, write_native
from tests.unit.formats import written
from tests.unit.formats.states import MLPS, classifier, draw, expert, gates, mixture, same


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classifier_reads_back_bit_for_bit(tmp_path, layerwise, bias, dtype):
    state = classifier(layerwise=layerwise, bias=bias, dtype=dtype)
    assert same(state, read_checkpoint(write_native(tmp_path / "x", mixture(state))).router)


def test_every_setting_of_a_classifier_reads_back(tmp_path):
    settings = {"enable_softmax": False, "enable_softmax_topk": True, "softmax_temperature": 0.3, "top_k": 1}
    settings |= {"global_scaling_weight": -0.7, "dropout": 0.2, "use_relu": False}
    state = classifier(**settings)
    default = classifier()
    assert all(getattr(state, name) != getattr(default, name) for name in settings)
    assert same(state, read_checkpoint(write_native(tmp_path / "x", mixture(state))).router)


@pytest.mark.parametrize("rule", [rule for rule in GATE_RULES if rule != "switch"])
@pytest.mark.parametrize("bias", [False, True])
def test_gates_of_every_rule_read_back_bit_for_bit(tmp_path, rule, bias):
    state = gates(rule, bias=bias)
    assert same(state, read_checkpoint(write_native(tmp_path / "x", mixture(state))).router)


def of_mlps(rule, **settings):
    modules = [f"{mlp}.{name}" for mlp in MLPS for name in ("up_proj", "down_proj")]
    state = replace(gates(rule, units=MLPS, level="feed_forward"), activation="silu", **settings)
    return mixture(state, experts=(expert("a", modules), expert("b", modules)))


SWITCH = {"mixlora_switch": "inference", "expert_capacity": 7}


@pytest.mark.parametrize(("rule", "settings"), [("softmax_topk", {}), ("switch", SWITCH)])
def test_gates_of_whole_mlps_read_back(tmp_path, rule, settings):
    source = of_mlps(rule, **settings)
    assert same(source.router, read_checkpoint(write_native(tmp_path / "x", source)).router)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("mixlora_switch", None, "a value for rule switch"),
        ("mixlora_switch", "batch", "null, training, inference"),
        ("expert_capacity", None, "a value for rule switch"),
        ("expert_capacity", 0, "an integer from 1"),
        ("expert_capacity", 2.0, "an integer from 1"),
        ("rule", "softmax", "null for rule softmax"),
        ("level", "linear", "no gate for|feed_forward"),
    ],
)
def test_defective_switch_is_refused_by_name(tmp_path, field, value, word):
    target = write_native(tmp_path / "x", of_mlps("switch", **SWITCH))
    put(field, value)(target)
    with pytest.raises(errors.InvalidField, match=word):
        read_checkpoint(target)


def test_a_switch_is_for_whole_mlps_only(tmp_path):
    with pytest.raises(errors.InvalidField, match="feed_forward, for rule switch"):
        write_native(tmp_path / "x", mixture(replace(gates("switch"), **SWITCH)))


def test_unit_with_fewer_experts_reads_back(tmp_path):
    state = gates()
    first = written.MODULES[0]
    state = replace(state, gates={**state.gates, first: GateState(draw(1, 8))})
    source = mixture(state, experts=(expert("a"), expert("b", written.MODULES[1:])))
    assert same(state, read_checkpoint(write_native(tmp_path / "x", source)).router)


def test_shared_adapter_reads_back_and_is_no_expert(tmp_path):
    shared = expert("attention", written.MODULES[:2], rank=3)
    copy = read_checkpoint(write_native(tmp_path / "x", mixture(gates(), shared=shared)))
    assert [each.name for each in copy.experts] == ["code", "maths"]
    assert copy.shared.name == "attention" and same(dict(shared.modules), dict(copy.shared.modules))
    assert copy.warnings == ()


def test_rewriting_without_shared_adapter_removes_it(tmp_path):
    write_native(tmp_path / "x", mixture(gates(), shared=expert("attention")))
    assert read_checkpoint(write_native(tmp_path / "x", mixture(None))).shared is None
    assert not (tmp_path / "x" / "shared").exists()


@pytest.mark.parametrize(
    ("state", "options", "changed"),
    [
        (classifier, {"top_k": 2, "temperature": 3}, {"top_k": 2, "softmax_temperature": 3.0}),
        (lambda: gates("arrow"), {"temperature": 3.0}, {"temperature": 3.0}),
    ],
)
def test_option_takes_the_place_of_what_is_recorded(tmp_path, state, options, changed):
    read = read_checkpoint(write_native(tmp_path / "x", mixture(state())), **options).router
    assert {name: getattr(read, name) for name in changed} == changed


def test_option_top_k_goes_to_every_gate(tmp_path):
    read = read_checkpoint(write_native(tmp_path / "x", mixture(gates("arrow"))), top_k=2).router
    assert {gate.top_k for gate in read.gates.values()} == {2}


@pytest.mark.parametrize("options", [{"router_features": "base"}, {"top_k": 3}, {"top_k": (1, 2)}, {"temperature": math.inf}])
def test_impossible_option_is_refused(tmp_path, options):
    target = write_native(tmp_path / "x", mixture(gates("arrow")))
    with pytest.raises(errors.InvalidField, match=next(iter(options)).removeprefix("router_")):
        read_checkpoint(target, **options)


def configure(change):
    """A fault in moe_config.json: change(section)."""

    def plant(directory):
        path = directory / "moe_config.json"
        config = json.loads(path.read_text())
        change(config["router"])
        path.write_text(json.dumps(config))

    return plant


def put(name, value):
    return configure(lambda section: section.update({name: value}))


def put_inside(kind, name, value):
    return configure(lambda section: section[kind][0].update({name: value}))


def tensors(change):
    def plant(directory):
        path = directory / "router.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path)

    return plant


FIRST, UNIT = "classifier.layers.0.weight", f"gates.{written.MODULES[0]}.weight"
NAN = torch.full((6, 8), torch.nan)
CLASSIFIER_DEFECTS = {
    "lost layer": (tensors(lambda held: held.pop(FIRST)), errors.GateMissing, FIRST),
    "lost bias": (tensors(lambda held: held.pop("classifier.layers.0.bias")), errors.GateMissing, "layers.0.bias"),
    "foreign tensor": (tensors(lambda held: held.update(x=draw(1))), errors.ForeignTensor, "x"),
    "other shape": (tensors(lambda held: held.update({FIRST: draw(8, 6)})), errors.ShapeMismatch, FIRST),
    "NaN": (tensors(lambda held: held.update({FIRST: NAN})), errors.NonFiniteTensor, FIRST),
    "integers": (tensors(lambda held: held.update({FIRST: NAN.bool()})), errors.DtypeUnsupported, FIRST),
    "no file": (lambda directory: (directory / "router.safetensors").unlink(), errors.GateMissing, "router.safetensors"),
    "unknown type": (put("type", "oracle"), errors.InvalidField, "oracle"),
    "type a list": (put("type", ["xlora"]), errors.InvalidField, "router"),
    "no layers": (put("layers", []), errors.InvalidField, "router.layers"),
    "layer a number": (put("layers", [3]), errors.InvalidField, "router.layers"),
    "broken chain": (put_inside("layers", "outputs", 7), errors.ShapeMismatch, r"router.layers\[1\].inputs"),
    "width of text": (put_inside("layers", "inputs", "8"), errors.InvalidField, "inputs"),
    "bias a number": (put_inside("layers", "bias", 1), errors.InvalidField, "bias"),
    "other layerwise": (put("layerwise", True), errors.ShapeMismatch, "router.layers"),
    "flag of text": (put("enable_softmax", "yes"), errors.InvalidField, "enable_softmax"),
    "top_k 0": (put("top_k", 0), errors.InvalidField, "top_k"),
    "top_k 3": (put("top_k", 3), errors.InvalidField, "top_k"),
    "temperature 0": (put("softmax_temperature", 0), errors.InvalidField, "softmax_temperature"),
    "dropout 1": (put("dropout", 1.0), errors.InvalidField, "dropout"),
    "scaling of text": (put("global_scaling_weight", "1"), errors.InvalidField, "global_scaling_weight"),
    "number of layers 0": (put("num_layers", 0), errors.InvalidField, "num_layers"),
}


@pytest.mark.parametrize(("plant", "kind", "word"), CLASSIFIER_DEFECTS.values(), ids=CLASSIFIER_DEFECTS)
def test_defective_classifier_is_refused_by_name(tmp_path, plant, kind, word):
    target = write_native(tmp_path / "x", mixture(classifier()))
    read_checkpoint(target)
    plant(target)
    with pytest.raises(kind, match=word) as caught:
        read_checkpoint(target)
    assert "\n" not in str(caught.value)


def test_layerwise_classifier_of_another_number_of_modules_is_refused(tmp_path):
    fewer = (expert("a", written.MODULES[:3]), expert("b", written.MODULES[:3]))
    with pytest.raises(errors.ShapeMismatch, match="3 adapted modules"):
        write_native(tmp_path / "x", mixture(classifier(layerwise=True), experts=fewer))


GATE_DEFECTS = {
    "lost gate": (tensors(lambda held: held.pop(UNIT)), errors.GateMissing, "q_proj"),
    "foreign tensor": (tensors(lambda held: held.update({"gates.x.weight": draw(2, 8)})), errors.ForeignTensor, "gates.x"),
    "other shape": (tensors(lambda held: held.update({UNIT: draw(8, 2)})), errors.ShapeMismatch, "q_proj"),
    "NaN": (tensors(lambda held: held.update({UNIT: NAN[:2]})), errors.NonFiniteTensor, "q_proj"),
    "unknown rule": (put("rule", "argmax"), errors.InvalidField, "argmax"),
    "activation a number": (put("activation", 3), errors.InvalidField, "activation"),
    "rule a list": (put("rule", ["softmax"]), errors.InvalidField, "rule"),
    "unknown level": (put("level", "block"), errors.InvalidField, "block"),
    "rule without its threshold": (put("rule", "top_p"), errors.InvalidField, "threshold"),
    "threshold without its rule": (put("threshold", 0.5), errors.InvalidField, "threshold"),
    "rule without its threshold gate": (
        configure(lambda section: section.update(rule="adaptive_threshold", threshold=0.1)),
        errors.InvalidField,
        "no threshold gate",
    ),
    "temperature negative": (put("temperature", -1), errors.InvalidField, "temperature"),
    "gates an object": (put("gates", {}), errors.InvalidField, "gates"),
    "unit a number": (put_inside("gates", "unit", 3), errors.InvalidField, "unit"),
    "unit twice": (put_inside("gates", "unit", written.MODULES[1]), errors.InvalidField, "unit"),
    "experts 3": (put_inside("gates", "experts", 3), errors.InvalidField, "experts"),
    "experts 1": (put_inside("gates", "experts", 1), errors.ShapeMismatch, "q_proj"),
    "inputs 0": (put_inside("gates", "inputs", 0), errors.InvalidField, "inputs"),
    "top_k 3": (put_inside("gates", "top_k", 3), errors.InvalidField, "top_k"),
    "no top_k": (put_inside("gates", "top_k", None), errors.InvalidField, "top_k"),
    "unknown threshold gate": (put_inside("gates", "threshold_gate", "bias"), errors.InvalidField, "threshold_gate"),
    "lost threshold gate": (put_inside("gates", "threshold_gate", "weight"), errors.GateMissing, "threshold_weight"),
}


@pytest.mark.parametrize(("plant", "kind", "word"), GATE_DEFECTS.values(), ids=GATE_DEFECTS)
def test_defective_gates_are_refused_by_name(tmp_path, plant, kind, word):
    target = write_native(tmp_path / "x", mixture(gates("softmax_topk")))
    read_checkpoint(target)
    plant(target)
    with pytest.raises(kind, match=word) as caught:
        read_checkpoint(target)
    assert "\n" not in str(caught.value)


def without(state, unit):
    return replace(state, gates={name: gate for name, gate in state.gates.items() if name != unit})


def wide(state, unit):
    return replace(state, gates={**state.gates, unit: GateState(draw(2, 9))})


@pytest.mark.parametrize(
    ("router", "kind", "word"),
    [
        (without(gates(), written.MODULES[2]), errors.InvalidField, f"no gate for {written.MODULES[2]}"),
        (gates(units=(*written.MODULES, "lm_head")), errors.InvalidField, "lm_head"),
        (wide(gates(), written.MODULES[2]), errors.ShapeMismatch, "9 inputs"),
        (gates(rows=1), errors.ExpertCountMismatch, "number 1"),
        (gates(units=MLPS, level="feed_forward"), errors.InvalidField, "no gate for"),
        (replace(gates(), num_experts=3), errors.ExpertCountMismatch, "3 experts"),
    ],
)
def test_router_that_does_not_fit_the_experts_is_not_written(tmp_path, router, kind, word):
    with pytest.raises(kind, match=word):
        write_native(tmp_path / "x", mixture(router))
    assert list(tmp_path.iterdir()) == []


def change_config(**values):
    def plant(directory):
        path = directory / "moe_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return plant


def lose_shared(directory):
    for path in (directory / "shared").iterdir():
        path.unlink()
    (directory / "shared").rmdir()


@pytest.mark.parametrize(
    ("plant", "kind", "word"),
    [
        (change_config(shared=None), errors.InvalidField, "shared"),
        (change_config(shared={"name": "code"}), errors.InvalidField, "no expert has"),
        (change_config(shared={"name": "a.b"}), errors.InvalidField, "a.b"),
        (change_config(shared="attention"), errors.InvalidField, "shared"),
        (change_config(shared={"name": "attention", "scaling": 3.0}), errors.InvalidField, "scaling"),
        (lose_shared, errors.MissingFile, "shared"),
    ],
)
def test_defective_shared_adapter_is_refused_by_name(tmp_path, plant, kind, word):
    target = write_native(tmp_path / "x", mixture(gates(), shared=expert("attention")))
    read_checkpoint(target)
    plant(target)
    with pytest.raises(kind, match=word):
        read_checkpoint(target)


def test_shared_adapter_with_an_experts_name_is_not_written(tmp_path):
    with pytest.raises(errors.InvalidField, match="twice"):
        write_native(tmp_path / "x", mixture(gates(), shared=expert("code")))
