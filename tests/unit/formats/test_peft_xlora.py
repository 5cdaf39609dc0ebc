"""X-LoRA as PEFT saves it: read, run and written back equal to PEFT's own XLoraModel, and damaged files refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dylo_moe import errors, load_checkpoint
from dylo_moe.formats import read_checkpoint
from dylo_moe.formats.peft_xlora_write import write_xlora
from fixtures.xlora import save_like_peft
from harness.specimens import write_base, write_checkpoint
from harness.specimens.xlora import XLoraChoices, write_xlora_checkpoint

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(7, 31).reshape(2, 12)
CASES = {
    "dense": (4, XLoraChoices()),
    "top-1 of 2": (2, XLoraChoices(top_k_lora=1)),
    "12 experts": (12, XLoraChoices(top_k_lora=3)),
    "layerwise, depth 2": (3, XLoraChoices(layerwise_scalings=True, xlora_depth=2)),
    "softmax of top-k, depth 3": (4, XLoraChoices(top_k_lora=2, enable_softmax=False, enable_softmax_topk=True, xlora_depth=3)),
    "everything, depth 4": (
        4,
        XLoraChoices(top_k_lora=2, enable_softmax_topk=True, layerwise_scalings=True, xlora_depth=4, xlora_dropout_p=0.1),
    ),
    "no softmax": (3, XLoraChoices(enable_softmax=False, global_scaling_weight=0.3)),
    "temperature": (3, XLoraChoices(softmax_temperature=2.5, xlora_depth=2, xlora_dropout_p=0.2, global_scaling_weight=1.7)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture
def specimen(base, tmp_path) -> Path:
    return write_xlora_checkpoint(tmp_path / "xlora", base, num_experts=3)


def peft_model(path: Path, base: Path) -> PeftModel:
    """PEFT's own, its experts in numeric order: the order that they were trained in, and that the file's sorting loses."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.use_cache = False
    config = PeftConfig.from_pretrained(str(path))
    config.adapters = {str(number): config.adapters[str(number)] for number in range(len(config.adapters))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(path), config=config).eval()


@torch.no_grad()
def assert_equal_to_peft(ours: torch.nn.Module, theirs: PeftModel) -> None:
    """Our error against PEFT in float64 is at most twice PEFT's own in float32, and the experts matter."""
    got, plain = ours(IDS).logits, theirs(IDS).logits
    with theirs.disable_adapter():
        without = theirs(IDS).logits
    exact = theirs.double()(IDS).logits
    assert (exact - without).abs().max() > 0.1
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()


def tokens(model: torch.nn.Module, **options: object) -> Tensor:
    return model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, **options)


def edit(path: Path, **changes: object) -> None:
    content = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**content, **changes}))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_generation_equal_peft(base, tmp_path, case):
    count, choices = CASES[case]
    path = write_xlora_checkpoint(tmp_path / "xlora", base, num_experts=count, choices=choices)
    ours, theirs = load_checkpoint(path), peft_model(path, base)
    cached = tokens(ours)
    assert torch.equal(cached, tokens(ours, use_cache=False))
    assert torch.equal(cached, tokens(theirs))
    assert_equal_to_peft(ours, theirs)


def test_experts_with_different_targets_equal_peft(base, tmp_path):
    """The layers are counted over all experts, and an expert adapts only its own."""
    path = tmp_path / "xlora"
    write_xlora_checkpoint(path, base, num_experts=2, choices=XLoraChoices(layerwise_scalings=True), targets="all-linear")
    for number, kept in ((0, "_proj"), (1, "q_proj")):
        edit_tensors(path / str(number), lambda t, kept=kept: [t.pop(key) for key in list(t) if f"{kept}." not in key])
    edit(path / "1", target_modules=["q_proj"])
    ours = load_checkpoint(path)
    assert ours.checkpoint.router.num_layers == 14
    assert_equal_to_peft(ours, peft_model(path, base))


@pytest.mark.parametrize("version", ["0.15", "0.18"])
def test_what_peft_saved_before_0_20_is_read_whole(base, tmp_path, version):
    path = write_xlora_checkpoint(tmp_path / "xlora", base, num_experts=12)
    whole = read_checkpoint(path)
    save_like_peft(path, base, version)
    moved = path.rename(tmp_path / "moved")
    read = read_checkpoint(moved)
    assert [expert.name for expert in read.experts] == [f"expert_{number}" for number in range(12)]
    for expert, original in zip(read.experts, whole.experts, strict=True):
        assert expert.modules.keys() == original.modules.keys()
        for module, pair in expert.modules.items():
            assert torch.equal(pair.lora_A, original.modules[module].lora_A)
            assert torch.equal(pair.lora_B, original.modules[module].lora_B)
    assert any("were not read" in line for line in read.warnings)


def test_a_layer_that_lost_its_number_to_peft_0_15_gets_it_back(base, tmp_path):
    """Expert 1's layers 1, 11 and 12 are saved as "layers.", "layers1." and "layers2."."""
    path = write_xlora_checkpoint(tmp_path / "xlora", base, num_experts=2)
    for name in ("0", "1"):
        edit_tensors(path / name, _grow)
    wanted = [set(expert.modules) for expert in read_checkpoint(path).experts]
    save_like_peft(path, base, "0.15")
    assert [set(expert.modules) for expert in read_checkpoint(path).experts] == wanted
    assert any("layers.11." in module for module in wanted[1])


def _grow(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".layers.0." in key]:
        for number in (11, 12):
            tensors[key.replace(".layers.0.", f".layers.{number}.")] = tensors[key].clone()


@pytest.mark.parametrize(
    ("count", "choices", "lost"),
    [
        (4, XLoraChoices(), "layers.0"),
        (3, XLoraChoices(xlora_depth=4), "layers.2"),
        (12, XLoraChoices(xlora_depth=4, xlora_dropout_p=0.1), "layers.9"),
    ],
)
def test_a_classifier_that_peft_0_20_damaged_is_refused_with_the_repair(base, tmp_path, count, choices, lost):
    path = write_xlora_checkpoint(tmp_path / "xlora", base, num_experts=count, choices=choices)
    whole = load_file(path / WEIGHTS)
    assert any(lost in key for key in whole)
    save_like_peft(path, base, "0.20")
    assert not any(lost in key for key in load_file(path / WEIGHTS))
    with pytest.raises(errors.GateMissing, match=r"PEFT 0\.20 .* save_file of what its state_dict\(\)"):
        read_checkpoint(path)


def test_experts_that_peft_0_20_lost_are_refused_unless_the_originals_are_given(base, tmp_path):
    path = write_xlora_checkpoint(tmp_path / "xlora", base, num_experts=3)
    original = shutil.copytree(path, tmp_path / "original")
    whole = load_checkpoint(original)
    edit(path, adapters={str(number): str(original / str(number)) for number in range(3)})
    save_like_peft(path, base, "0.20")
    shutil.copy(original / WEIGHTS, path / WEIGHTS)
    with pytest.raises(errors.ForeignTensor, match=f"recorded at {original}/0: adapters="):
        read_checkpoint(path)
    for given in (original, {str(number): original / str(number) for number in range(3)}):
        with torch.no_grad():
            assert torch.equal(load_checkpoint(path, adapters=given)(IDS).logits, whole(IDS).logits)


def test_a_recorded_path_outside_is_not_opened_unless_it_is_named(base, specimen, tmp_path):
    for number in range(3):
        (specimen / str(number)).rename(tmp_path / f"lora_{number}")
    edit(specimen, adapters={str(number): str(tmp_path / f"lora_{number}") for number in range(3)})
    with pytest.raises(errors.ExpertMissing, match=f"recorded at {tmp_path}/lora_0, which is not opened unbidden"):
        read_checkpoint(specimen)
    assert read_checkpoint(specimen, adapters=tmp_path).num_experts == 3
    with pytest.raises(errors.ExpertMissing, match="adapters.2"):
        read_checkpoint(specimen, adapters={str(number): tmp_path / f"lora_{number}" for number in range(2)})


def test_an_expert_is_found_one_level_down_by_its_recorded_name(specimen):
    (specimen / "experts").mkdir()
    for number in range(3):
        (specimen / str(number)).rename(specimen / "experts" / f"lora_{number}")
    edit(specimen, adapters={str(number): f"/gone/lora_{number}" for number in range(3)})
    assert read_checkpoint(specimen).num_experts == 3
    shutil.copytree(specimen / "experts", specimen / "others")
    with pytest.raises(errors.InvalidField, match="experts/lora_0 and others/lora_0"):
        read_checkpoint(specimen)


def test_trained_experts_are_those_in_the_checkpoint_and_the_user_is_told(base, tmp_path):
    path = write_xlora_checkpoint(tmp_path / "xlora", base, choices=XLoraChoices(use_trainable_adapters=True))
    assert any("trained experts were read" in line for line in read_checkpoint(path).warnings)
    assert any("must be the trained ones" in line for line in read_checkpoint(path, adapters=path).warnings)


DEFECTS = [
    ({"adapters": {"0": "a", "2": "b", "1x": "c"}}, errors.InvalidField, "adapters.*without a gap"),
    ({"adapters": {"0": "a", "01": "b", "2": "c"}}, errors.InvalidField, "adapters.*without a gap"),
    ({"adapters": {}}, errors.InvalidField, "adapters"),
    ({"adapters": {"0": "a", "1": "b", "2": 3}}, errors.InvalidField, r"adapters\[2\]"),
    ({"adapters": {"0": "", "1": ""}}, errors.ExpertCountMismatch, "3 rows"),
    ({"scaling_pass_value": 0.5}, errors.InvalidField, "scaling_pass_value.*base model alone"),
    ({"top_k_lora": 4}, errors.InvalidField, "top_k_lora"),
    ({"top_k_lora": True}, errors.InvalidField, "top_k_lora"),
    ({"softmax_temperature": 0.0}, errors.InvalidField, "softmax_temperature"),
    ({"task_type": "SEQ_CLS"}, errors.InvalidField, "task_type"),
    ({"hidden_size": 47}, errors.ShapeMismatch, "layers.0.weight"),
    ({"xlora_depth": 0}, errors.InvalidField, "xlora_depth"),
    ({"xlora_depth": 2}, errors.GateMissing, "layers.2.weight"),
    ({"layerwise_scalings": True}, errors.ShapeMismatch, "experts times adapted modules"),
    ({"enable_softmax": "yes"}, errors.InvalidField, "enable_softmax"),
    ({"xlora_dropout_p": 2}, errors.InvalidField, "xlora_dropout_p"),
    ({"global_scaling_weight": "1"}, errors.InvalidField, "global_scaling_weight"),
]


@pytest.mark.parametrize(("changes", "error", "message"), DEFECTS, ids=lambda value: str(value)[:40])
def test_a_field_that_cannot_be_is_refused(specimen, changes, error, message):
    edit(specimen, **changes)
    with pytest.raises(error, match=message):
        read_checkpoint(specimen)


def _nan(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values()))[0] = float("nan")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tensors: tensors.update(other=torch.zeros(1)), errors.ForeignTensor),
        (lambda tensors: tensors.pop(next(key for key in tensors if key.endswith("bias"))), errors.GateMissing),
        (lambda tensors: tensors.update({key: value.int() for key, value in tensors.items()}), errors.DtypeUnsupported),
        (_nan, errors.NonFiniteTensor),
    ],
)
def test_a_classifier_with_other_tensors_is_refused(specimen, change, error):
    edit_tensors(specimen, change)
    with pytest.raises(error):
        read_checkpoint(specimen)


def _as_dora(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "lora_B" in key]:
        tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[key]))


def test_an_expert_that_xlora_does_not_weigh_whole_is_refused(specimen):
    edit(specimen / "1", use_dora=True)
    edit_tensors(specimen / "1", _as_dora)
    with pytest.raises(errors.InvalidField, match="plain LoRA"):
        read_checkpoint(specimen)


@pytest.mark.parametrize("case", ["12 experts", "everything, depth 4"])
def test_what_we_write_peft_loads_to_the_same_model(base, tmp_path, case):
    count, choices = CASES[case]
    path = write_xlora_checkpoint(tmp_path / "xlora", base, num_experts=count, choices=choices)
    written = tmp_path / "written"
    write_xlora(written, read_checkpoint(path))
    ours, again = load_checkpoint(path), load_checkpoint(written)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, ours(IDS).logits)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.use_cache = False
    assert_equal_to_peft(ours, PeftModel.from_pretrained(model, str(written)).eval())


def test_what_peft_cannot_express_is_not_written(base, tmp_path):
    native = write_checkpoint(tmp_path / "native", base)
    with pytest.raises(errors.InvalidField, match="the only router of this format"):
        write_xlora(tmp_path / "written", read_checkpoint(native))
    head = write_xlora_checkpoint(tmp_path / "head", base, targets="lm_head")
    with pytest.raises(errors.InvalidField, match="below model"):
        write_xlora(tmp_path / "written", read_checkpoint(head))
