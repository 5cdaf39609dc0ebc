"""AdaLoRA: each expert against stock PEFT, pruned or not, alone and in a bag with a plain LoRA; and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dylo_moe import detect_model_format, load_checkpoint
from dylo_moe.errors import ExpertEmpty, ForeignTensor, IncompletePair, InvalidField, NonFiniteTensor, ShapeMismatch
from dylo_moe.formats import read_checkpoint
from tests.unit.runtime.tiny_peft import VOCABULARY, load, logits, stock, write_adapter, write_bases

SCHEDULE = {"tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 6}
PLAIN = {"init_r": 5, "target_r": 2, "target_modules": ["q_proj", "up_proj"], **SCHEDULE}


def write_pruned(directory, base, ids, **config):
    """Trained for as long as the schedule runs, so that rank_pattern has cut ranks."""
    torch.manual_seed(4)
    model = get_peft_model(load(base), AdaLoraConfig(**PLAIN, task_type="CAUSAL_LM", **config))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data += 0.3 * torch.randn_like(parameter)
    optimiser = torch.optim.SGD(trained, lr=0.1)
    for step in range(SCHEDULE["total_step"]):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def bag(tmp_path_factory, ids):
    """expert_0 as initialised, 1 with everything beside it, 2 and 3 pruned (3: scaled by its rank), 4 a plain LoRA."""
    root = tmp_path_factory.mktemp("adalora")
    base = write_bases(root / "bases") / "qwen"
    bag = root / "bag"
    write_adapter(bag / "expert_0", base, seed=0, **PLAIN, lora_alpha=8)
    write_adapter(bag / "expert_1", base, seed=1, **PLAIN, bias="all", modules_to_save=["lm_head"], use_rslora=True)
    write_pruned(bag / "expert_2", base, ids, lora_alpha=64)
    write_pruned(bag / "expert_3", base, ids, lora_alpha=0)
    write_adapter(bag / "expert_4", base, seed=5, r=2, target_modules=["q_proj"], init_lora_weights=False)
    return bag, base


def test_each_expert_of_a_mixed_bag_equals_stock_peft(bag, ids):
    directory, base = bag
    assert detect_model_format(directory) == "lora-bag"
    model, plain = load_checkpoint(directory, base_model=str(base)).double(), logits(load(base).double(), ids)
    for e, name in enumerate(model.expert_names):
        wanted = logits(stock(directory / name, base).double(), ids)
        assert (wanted - plain).abs().max() > 1e-4
        assert (logits(model, ids, expert_id=e) - wanted).abs().max() < 1e-6  # E is multiplied in, in float32
    assert sum("AdaLoRA, read as a plain LoRA" in line for line in model.checkpoint.warnings) == 4


def test_alone_it_has_a_format_of_its_own_and_saved_it_is_a_plain_lora(bag, ids, tmp_path):
    directory, base = bag
    assert detect_model_format(directory / "expert_2") == "peft-adalora"
    model = load_checkpoint(directory / "expert_2", base_model=str(base))
    wanted = logits(stock(directory / "expert_2", base), ids)
    assert (logits(model, ids, expert_id=0) - wanted).abs().max() < 1e-6
    model.save_pretrained(tmp_path / "saved")
    assert (logits(stock(tmp_path / "saved" / "experts" / "default", base), ids) - wanted).abs().max() < 1e-6
    assert torch.equal(
        logits(load_checkpoint(tmp_path / "saved", base_model=str(base)), ids, expert_id=0), logits(model, ids, expert_id=0)
    )


def test_ranks_are_those_that_were_not_pruned(bag):
    directory, _ = bag
    pattern = json.loads((directory / "expert_2" / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {key.removesuffix(".lora_E"): sum(kept) for key, kept in pattern.items()}
    (expert,) = read_checkpoint(directory / "expert_2").experts
    assert {module: pair.rank for module, pair in expert.modules.items()} == {m: r for m, r in ranks.items() if r}
    assert min(ranks.values()) < PLAIN["init_r"]


def test_module_that_was_pruned_to_nothing_is_left_out(bag, tmp_path, ids):
    directory, base = bag
    config = json.loads((directory / "expert_2" / "adapter_config.json").read_text())
    tensors = load_file(directory / "expert_2" / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    config["rank_pattern"][f"{module}.lora_E"] = [False] * PLAIN["init_r"]
    for part, shape in (("A", (0, 32)), ("B", (32, 0)), ("E", (0, 1))):
        tensors[f"base_model.model.{module}.lora_{part}"] = torch.zeros(shape)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = load_checkpoint(tmp_path, base_model=str(base))
    assert module not in model.routed_layers()
    assert (logits(model, ids, expert_id=0) - logits(stock(tmp_path, base), ids)).abs().max() < 1e-6


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
DEFECTS = [
    ("no E", lambda c, t: t.pop(KEY + "E"), IncompletePair, "lora_E"),
    ("foreign", lambda c, t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 3)}), ForeignTensor, "lm_head"),
    ("other rank", lambda c, t: t.update({KEY + "A": torch.ones(4, 32)}), ShapeMismatch, "rank 5"),
    ("E is a row", lambda c, t: t.update({KEY + "E": torch.ones(1, 5)}), ShapeMismatch, "rank 5"),
    ("NaN", lambda c, t: t[KEY + "E"].fill_(float("nan")), NonFiniteTensor, "lora_E"),
    ("no rank", lambda c, t: c.pop("init_r"), InvalidField, "init_r"),
    ("pattern of numbers", lambda c, t: c.update(rank_pattern={"q_proj": 4}), InvalidField, "rank_pattern"),
    ("short pattern", lambda c, t: c.update(rank_pattern={"a.lora_E": [True]}), InvalidField, "rank_pattern"),
    ("alpha text", lambda c, t: c.update(lora_alpha="8"), InvalidField, "lora_alpha"),
    ("DoRA", lambda c, t: c.update(use_dora=True), InvalidField, "use_dora"),
    ("targets", lambda c, t: c.update(target_modules=["q_proj"]), InvalidField, "target_modules"),
    ("nothing", lambda c, t: t.clear(), ExpertEmpty, "0 tensors"),
]


@pytest.mark.parametrize(("change", "kind", "word"), [case[1:] for case in DEFECTS], ids=[case[0] for case in DEFECTS])
def test_defect_is_refused_by_name(bag, tmp_path, change, kind, word):
    source = bag[0] / "expert_0"
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(kind, match=word):
        read_checkpoint(tmp_path)
