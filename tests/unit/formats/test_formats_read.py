"""Every layout gives its experts, router and settings exactly as they were written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dylo_moe.errors import ForeignTensor, InvalidField
from dylo_moe.formats import detect_model_format, read_checkpoint
from tests.unit.formats import written


def assert_experts(checkpoint, alpha):
    """Expert K of every hand-written checkpoint was drawn with seed K."""
    for number, expert in enumerate(checkpoint.experts):
        wanted = written.pairs(seed=number)
        assert sorted(expert.modules) == sorted(written.MODULES)
        for module, pair in expert.modules.items():
            assert torch.equal(pair.lora_A, wanted[f"base_model.model.{module}.lora_A.weight"])
            assert torch.equal(pair.lora_B, wanted[f"base_model.model.{module}.lora_B.weight"])
            assert (pair.alpha, pair.rank, pair.scaling) == (alpha, 4, alpha / 4)


def assert_gate(checkpoint, experts=2):
    assert torch.equal(checkpoint.router.weight, written.gate(experts)["gate.weight"])
    assert torch.equal(checkpoint.router.bias, written.gate(experts)["gate.bias"])


def test_native_gives_experts_router_and_settings(tmp_path):
    checkpoint = read_checkpoint(written.native(tmp_path))
    assert (checkpoint.format, checkpoint.base_model) == ("dylo-moe", "base")
    assert_experts(checkpoint, 8)
    assert_gate(checkpoint)
    assert (checkpoint.router.features, checkpoint.router.top_k, checkpoint.router.temperature) == ("base", 1, 2.0)
    assert checkpoint.load_balance == {"load_balance_loss_type": "mse", "router_aux_loss_coef": 0.01}
    assert (dict(checkpoint.assumptions), checkpoint.warnings) == ({}, ())


def test_native_without_router_has_none(tmp_path):
    written.native(tmp_path, router=None)
    (tmp_path / "router.safetensors").unlink()
    assert read_checkpoint(tmp_path).router is None


def test_separated_directories_record_what_no_file_holds(tmp_path):
    checkpoint = read_checkpoint(written.separated(tmp_path))
    assert (checkpoint.format, checkpoint.base_model) == ("dylora-separated", "base")
    assert_experts(checkpoint, 8)
    assert_gate(checkpoint)
    assert checkpoint.assumptions == {"top_k": 1, "temperature": 2.0, "features": "all_experts"}
    assert (checkpoint.router.top_k, checkpoint.router.temperature) == (1, 2.0)


def test_options_take_the_place_of_assumptions(tmp_path):
    path = written.separated(tmp_path)
    router = read_checkpoint(path, top_k=2, temperature=0.5, router_features="base")
    assert (router.router.top_k, router.router.temperature, router.router.features) == (2, 0.5, "base")
    assert router.assumptions == {}


def test_flat_adapter_directories_read(tmp_path):
    for number in range(2):
        written.write_adapter(tmp_path / "peft_adapters" / f"expert_{number}", written.pairs(seed=number))
    save_file(written.gate(), tmp_path / "router.safetensors")
    assert_experts(read_checkpoint(tmp_path), 8)


def test_separated_pickles_read_with_recorded_router_settings(tmp_path):
    checkpoint = read_checkpoint(written.separated_pickles(tmp_path))
    assert checkpoint.format == "dylora-separated"
    assert_experts(checkpoint, 16)
    assert_gate(checkpoint)
    assert (checkpoint.router.top_k, checkpoint.router.temperature) == (2, 3.0)
    assert any("expert_maturity" in text for text in checkpoint.warnings)


def test_full_state_gives_base_weights_without_wrappers(tmp_path):
    save_file(written.full_state(), tmp_path / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path, lora_alpha=16)
    assert checkpoint.format == "dylora-full-state"
    assert_experts(checkpoint, 16)
    assert_gate(checkpoint)
    assert sorted(checkpoint.base_state) == sorted(
        [f"{module}.weight" for module in written.MODULES] + ["model.embed_tokens.weight"]
    )


def test_full_state_takes_router_settings_from_the_parents_state_directory(tmp_path):
    best = tmp_path / "best_model"
    best.mkdir()
    save_file(written.full_state(), best / "model.safetensors")
    (tmp_path / "dylo_moe_state").mkdir()
    torch.save(written.nested_router(), tmp_path / "dylo_moe_state" / "router.pt")
    router = read_checkpoint(best, lora_alpha=16).router
    assert (router.top_k, router.temperature) == (2, 3.0)


def test_full_state_ignores_a_state_directory_with_another_gate(tmp_path):
    best = tmp_path / "best_model"
    best.mkdir()
    save_file(written.full_state(), best / "model.safetensors")
    (tmp_path / "dylo_moe_state").mkdir()
    other = written.nested_router()
    other["gate_state_dict"]["weight"] = other["gate_state_dict"]["weight"] + 1
    torch.save(other, tmp_path / "dylo_moe_state" / "router.pt")
    checkpoint = read_checkpoint(best, lora_alpha=16)
    assert checkpoint.router.top_k == 1
    assert any("another gate" in text for text in checkpoint.warnings)


def test_sharded_full_state_equals_the_single_file(tmp_path):
    state = written.full_state()
    half = len(state) // 2
    shards = {"a.safetensors": list(state)[:half], "b.safetensors": list(state)[half:]}
    for name, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
    placed = {key: name for name, keys in shards.items() for key in keys}
    written.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": placed})
    checkpoint = read_checkpoint(tmp_path, lora_alpha=16)
    assert_experts(checkpoint, 16)
    assert len(checkpoint.base_state) == len(written.MODULES) + 1


def test_bundle_reads_its_four_sections(tmp_path):
    state = written.full_state()
    bundle = {
        "foundation_model": {
            key.removeprefix("foundation_model."): value for key, value in state.items() if key.startswith("foundation")
        },
        "router": written.gate(),
        "expert_manager": {"num_experts": 2, "lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.1},
        "model_config": {"model_name": "base"},
    }
    torch.save(bundle, tmp_path / "any.pt")
    checkpoint = read_checkpoint(tmp_path / "any.pt")
    assert (checkpoint.format, checkpoint.base_model) == ("dylora-bundle", "base")
    assert_experts(checkpoint, 16)
    assert_gate(checkpoint)


def test_first_releases_single_file_is_full_state(tmp_path):
    name = "dylo_moe_weights_poc.pt"
    torch.save(written.full_state(), tmp_path / name)
    assert detect_model_format(tmp_path / name) == detect_model_format(tmp_path) == "dylora-full-state"
    assert_experts(read_checkpoint(tmp_path / name, lora_alpha=16), 16)


def test_alpha_that_no_file_records_is_asked_for(tmp_path):
    save_file(written.full_state(), tmp_path / "model.safetensors")
    with pytest.raises(InvalidField, match="lora_alpha="):
        read_checkpoint(tmp_path)


def test_plain_lora_is_one_expert_without_router(tmp_path):
    checkpoint = read_checkpoint(written.write_adapter(tmp_path / "lora"))
    assert (checkpoint.format, checkpoint.num_experts, checkpoint.router) == ("peft-lora", 1, None)
    assert_experts(checkpoint, 8)


def test_bag_is_sorted_by_number(tmp_path):
    for number in (10, 9, 1, 11, 0):
        written.write_adapter(tmp_path / f"expert_{number}", written.pairs(seed=number))
    names = [expert.name for expert in read_checkpoint(tmp_path).experts]
    assert names == ["expert_0", "expert_1", "expert_9", "expert_10", "expert_11"]


def test_twelve_separated_experts_keep_their_numbers(tmp_path):
    checkpoint = read_checkpoint(written.separated(tmp_path, experts=12))
    assert [expert.name for expert in checkpoint.experts] == [f"expert_{number}" for number in range(12)]
    assert_experts(checkpoint, 8)


def test_merged_model_has_no_experts(tmp_path):
    checkpoint = read_checkpoint(written.base(tmp_path))
    assert (checkpoint.format, checkpoint.experts, checkpoint.router) == ("merged", (), None)
    assert "model.safetensors" in checkpoint.hashes


def test_patterns_give_ranks_and_alphas_per_module(tmp_path):
    special = "model.layers.1.self_attn.q_proj"
    others = [module for module in written.MODULES if module != special]
    tensors = written.pairs(4, modules=others) | written.pairs(2, modules=[special])
    written.write_adapter(
        tmp_path / "lora", tensors, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={r".*\.q_proj": 6}
    )
    modules = read_checkpoint(tmp_path / "lora").experts[0].modules
    assert (modules[special].rank, modules[special].alpha, modules[special].scaling) == (2, 6, 3.0)
    assert (modules["model.layers.0.self_attn.q_proj"].alpha, modules["model.layers.0.self_attn.v_proj"].alpha) == (6, 8)


def test_rank_stabilised_scaling_uses_the_root(tmp_path):
    written.write_adapter(tmp_path / "lora", use_rslora=True)
    assert read_checkpoint(tmp_path / "lora").experts[0].modules[written.MODULES[0]].scaling == 4.0


def test_negative_alpha_and_junk_targets_are_warnings(tmp_path):
    targets = [*written.TARGETS, "base_layer", "lora_A", "expert_0", "lora_magnitude_vector"]
    written.write_adapter(tmp_path / "lora", lora_alpha=-8, target_modules=targets)
    warnings = " ".join(read_checkpoint(tmp_path / "lora").warnings)
    assert "-8" in warnings
    assert "lora_magnitude_vector" in warnings


def test_pickle_beside_safetensors_is_named_and_not_opened(tmp_path):
    written.write_adapter(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.bin").write_bytes(b"not a pickle")
    warnings = read_checkpoint(tmp_path / "lora").warnings
    assert any("adapter_model.bin was not" in text for text in warnings)


def test_optimizer_and_training_arguments_are_never_opened(tmp_path):
    path = written.separated(tmp_path)
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"):
        (path / name).write_bytes(b"not a pickle")
    assert not any(name.endswith((".pt", ".bin", ".pth")) for name in read_checkpoint(path).hashes)


def test_reading_leaves_the_directory_as_it_was(tmp_path):
    path = written.separated(tmp_path)
    before = {entry: (entry.stat().st_mtime_ns, entry.read_bytes()) for entry in path.rglob("*") if entry.is_file()}
    read_checkpoint(path)
    after = {entry: (entry.stat().st_mtime_ns, entry.read_bytes()) for entry in path.rglob("*") if entry.is_file()}
    assert before == after


def test_pickled_plain_model_that_holds_a_mixture_is_refused(tmp_path):
    written.base(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(written.full_state(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ForeignTensor, match="foundation_model"):
        read_checkpoint(tmp_path)
