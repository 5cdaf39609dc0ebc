from __future__ import annotations

import json

import pytest
from peft import LoraConfig

from dylo_moe import MoELoraConfig


def test_round_trip_keeps_every_field(tmp_path):
    config = MoELoraConfig(
        r=3, lora_alpha=5, num_experts=7, top_k_experts=2, router_temperature=1.5, router_features="layer", target_modules=["q"]
    )
    config.save_pretrained(tmp_path)
    again = MoELoraConfig.from_pretrained(tmp_path)
    assert type(again) is MoELoraConfig
    assert again.to_dict() == config.to_dict()


def test_stock_peft_reads_what_lora_config_gives(tmp_path):
    config = MoELoraConfig(r=3, lora_alpha=5, num_experts=7, target_modules=["q"]).lora_config()
    assert type(config) is LoraConfig
    config.save_pretrained(tmp_path)
    assert "num_experts" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert LoraConfig.from_pretrained(tmp_path).r == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", 0),
        ("num_experts", True),
        ("num_experts", 2.0),
        ("top_k_experts", 0),
        ("top_k_experts", 3),
        ("router_temperature", 0),
        ("router_temperature", float("nan")),
        ("router_aux_loss_coef", -1),
        ("router_hidden_size", 0),
        ("router_type", "other"),
        ("load_balance_loss_type", "other"),
        ("router_features", "other"),
    ],
)
def test_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        MoELoraConfig(**{"num_experts": 2, field: value})


def test_unknown_field_in_a_file_is_refused(tmp_path):
    MoELoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_expert": 3}))
    with pytest.raises(ValueError, match="num_expert"):
        MoELoraConfig.from_pretrained(tmp_path)
