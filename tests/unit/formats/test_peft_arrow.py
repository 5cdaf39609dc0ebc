"""PEFT Arrow: what is loaded computes what PEFT's create_arrow_model computes from the same directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dylo_moe import load_checkpoint, read_checkpoint
from dylo_moe.errors import CheckpointError
from harness.specimens import write_base
from harness.specimens.arrow import write_arrow_checkpoint

SEED = 42
CPU = {"rng_device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("arrow") / "llama", "llama")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(5, 300, (2, 9))


def recorded(directory: Path) -> dict:
    return json.loads((directory / "arrow_router" / "adapter_config.json").read_text())["arrow_config"]


def record(directory: Path, **changes: object) -> None:
    path = directory / "arrow_router" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["arrow_config"] |= changes
    path.write_text(json.dumps(config))


def stock(directory: Path, base: Path, *, dtype: torch.dtype = torch.float32, seed: int = SEED) -> PeftModel:
    """PEFT's own model of a directory that holds experts as they were before any forward pass."""
    choices = recorded(directory)
    general = [str(directory / name) for name in choices["gks_adapter_names"]]
    return create_arrow_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
        [str(directory / name) for name in choices["task_adapter_names"]],
        ArrowConfig(
            top_k=choices["top_k"],
            router_temperature=choices["router_temperature"],
            rng_seed=seed,
            use_gks=choices["use_gks"],
        ),
        general_adapter_paths=general or None,
    ).eval()


@torch.no_grad()
def assert_as_exact_as_peft(*models, directory: Path, base: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Against PEFT in float64: at most twice the error of PEFT in `dtype`, and that is far below what the experts change."""
    exact = stock(directory, base, dtype=torch.float64)(ids).logits
    allowed = 2 * (stock(directory, base, dtype=dtype)(ids).logits.double() - exact).abs().max()
    effect = (exact - AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)(ids).logits).abs().max()
    assert allowed < 0.1 * effect
    for model in models:
        assert (model(ids).logits.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize(
    ("num_experts", "top_k", "temperature"), [(1, 1, 1.0), (4, 1, 1.0), (4, 2, 0.3), (4, 3, 1.0), (4, 4, 2.0), (12, 3, 1.0)]
)
def test_logits_equal_pefts(base, tmp_path, ids, num_experts, top_k, temperature):
    path = write_arrow_checkpoint(tmp_path / "a", base, num_experts=num_experts, top_k=top_k, temperature=temperature)
    model = load_checkpoint(path)
    assert model.expert_names == [f"task_{i}" for i in range(num_experts)]
    assert (model.checkpoint.format, model.checkpoint.warnings, model.checkpoint.assumptions) == ("peft-arrow", (), CPU)
    assert_as_exact_as_peft(model, directory=path, base=base, ids=ids)


def test_prototypes_are_pefts_bitwise(base, tmp_path, ids):
    path = write_arrow_checkpoint(tmp_path / "a", base, targets="all-linear", dtype="float16")
    gates = read_checkpoint(path).router.gates
    peft = stock(path, base)
    peft(ids)
    layers = {name: layer for name, layer in peft.get_base_model().named_modules() if hasattr(layer, "lora_arrow")}
    assert sorted(layers) == sorted(gates)
    for name, layer in layers.items():
        assert torch.equal(gates[name].weight, layer.lora_arrow["arrow_router"].prototypes)


@pytest.mark.parametrize(("num_general", "dtype"), [(1, "float32"), (3, "float16")])
def test_general_adapters_are_subtracted_once_whether_saved_before_or_after_a_forward_pass(
    base, tmp_path, ids, num_general, dtype
):
    path = write_arrow_checkpoint(tmp_path / "a", base, use_gks=True, num_general=num_general, dtype=dtype)
    peft = stock(path, base)
    peft.save_pretrained(tmp_path / "before")
    peft(ids)
    peft.save_pretrained(tmp_path / "after")
    before, after = load_checkpoint(tmp_path / "before"), load_checkpoint(tmp_path / "after")
    assert before.checkpoint.assumptions == {**CPU, "genknowsub": "subtract"}
    assert after.checkpoint.assumptions == {**CPU, "genknowsub": "subtracted"}
    assert "not subtracted again" in after.checkpoint.warnings[0]
    assert_as_exact_as_peft(before, after, load_checkpoint(path), directory=path, base=base, ids=ids)


def test_a_specimen_of_subtracted_experts_is_what_peft_saves(base, tmp_path, ids):
    path = write_arrow_checkpoint(tmp_path / "a", base, use_gks=True)
    peft = stock(path, base)
    peft(ids)
    peft.save_pretrained(tmp_path / "after")
    specimen = write_arrow_checkpoint(tmp_path / "b", base, use_gks=True, subtracted=True)
    saved, written = (
        {p.name: load_file(p / "adapter_model.safetensors") for p in d.glob("*_[0-9]")} for d in (tmp_path / "after", specimen)
    )
    assert saved.keys() == written.keys()
    for name, tensors in saved.items():
        assert all(torch.equal(tensor, written[name][key]) for key, tensor in tensors.items())


def test_an_expert_added_later_is_routed_to_as_in_peft(base, tmp_path, ids):
    path = write_arrow_checkpoint(tmp_path / "a", base, num_experts=3)
    other = write_arrow_checkpoint(tmp_path / "b", base, num_experts=1, seed=1)
    peft = stock(path, base)
    peft.load_adapter(str(other / "task_0"), adapter_name="added")
    peft.save_pretrained(tmp_path / "saved")
    model = load_checkpoint(tmp_path / "saved")
    assert model.expert_names == ["added", "task_0", "task_1", "task_2"]
    assert "added is an expert" in model.checkpoint.warnings[0]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, peft(ids).logits, atol=1e-4, rtol=0)
        assert (peft(ids).logits - stock(path, base)(ids).logits).abs().max() > 0.1


def test_a_16_bit_base_is_as_exact_as_in_peft(tmp_path, ids):
    base = write_base(tmp_path / "base", "llama", dtype="bfloat16")
    path = write_arrow_checkpoint(tmp_path / "a", base, dtype="bfloat16", top_k=4)  # all of them: no near ties
    model = load_checkpoint(path)
    assert model.dtype == torch.bfloat16
    assert_as_exact_as_peft(model, directory=path, base=base, ids=ids, dtype=torch.bfloat16)


def test_generated_tokens_equal_pefts_with_and_without_a_cache(base, tmp_path, ids):
    path = write_arrow_checkpoint(tmp_path / "a", base)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = stock(path, base).generate(input_ids=ids, **options)
    model = load_checkpoint(path)
    for use_cache in (True, False):
        assert torch.equal(model.generate(ids, use_cache=use_cache, **options), want)


def test_a_moved_directory_is_the_same_model(base, tmp_path, ids):
    path = write_arrow_checkpoint(tmp_path / "a", base)
    want = load_checkpoint(path)(ids).logits
    shutil.move(path, tmp_path / "elsewhere")
    assert torch.equal(load_checkpoint(tmp_path / "elsewhere", base)(ids).logits, want)


def test_without_a_seed_it_is_refused_unless_one_is_given(base, tmp_path, ids):
    path = write_arrow_checkpoint(tmp_path / "a", base, rng_seed=None)
    with pytest.raises(CheckpointError, match="arrow_config.rng_seed: found null, expected a seed: .* option rng_seed"):
        read_checkpoint(path)
    model = load_checkpoint(path, rng_seed=SEED)
    assert model.checkpoint.assumptions == {**CPU, "rng_seed": SEED}
    assert_as_exact_as_peft(model, directory=path, base=base, ids=ids)


def test_a_given_seed_wins_over_the_recorded_one_with_a_warning(base, tmp_path):
    path = write_arrow_checkpoint(tmp_path / "a", base)
    other = write_arrow_checkpoint(tmp_path / "b", base, rng_seed=7)
    given, want = read_checkpoint(path, rng_seed=7), read_checkpoint(other, rng_seed=7)
    assert "rng_seed 7 was given and used, while arrow_router/adapter_config.json records 42" in given.warnings
    assert (given.assumptions, want.assumptions, want.warnings) == ({**CPU, "rng_seed": 7}, CPU, ())
    for name, gate in given.router.gates.items():
        assert torch.equal(gate.weight, want.router.gates[name].weight)
        assert not torch.equal(gate.weight, read_checkpoint(path).router.gates[name].weight)


def test_options_take_the_place_of_what_is_recorded(base, tmp_path):
    router = read_checkpoint(write_arrow_checkpoint(tmp_path / "a", base), top_k=3, temperature=0.5).router
    assert ({gate.top_k for gate in router.gates.values()}, router.temperature) == ({3}, 0.5)


def test_the_routers_dummy_adapter_is_not_read(base, tmp_path):
    path = write_arrow_checkpoint(tmp_path / "a", base)
    (path / "arrow_router" / "adapter_model.safetensors").write_bytes(b"damaged")
    checkpoint = read_checkpoint(path)
    assert checkpoint.num_experts == 4
    assert "arrow_router/adapter_model.safetensors" not in checkpoint.hashes


def test_general_adapters_without_use_gks_are_left_alone(base, tmp_path):
    path = write_arrow_checkpoint(tmp_path / "a", base, use_gks=True)
    record(path, use_gks=False)
    checkpoint = read_checkpoint(path)
    assert "gks_0, gks_1 were not read: use_gks is false" in checkpoint.warnings
    pair = checkpoint.experts[0].modules["model.layers.0.self_attn.q_proj"]
    stored = load_file(path / "task_0" / "adapter_model.safetensors")
    assert torch.equal(pair.lora_A, stored["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k: found 5, expected an integer from 1 to 4"),
        ({"top_k": True}, "top_k: found True"),
        ({"router_temperature": 0}, "temperature: found 0, expected a number above 0"),
        ({"rng_seed": 1.5}, "rng_seed: found 1.5, expected an integer"),
        ({"rng_seed": True}, "rng_seed: found True, expected an integer"),
        ({"rng_seed": 2**64}, "rng_seed: found 18446744073709551616, expected an integer of at most 64 bits"),
        ({"use_gks": "no"}, "use_gks: found 'no', expected true or false"),
        ({"use_gks": True}, r"gks_adapter_names: found \[\], expected gks_0"),
        ({"task_adapter_names": None}, "task_adapter_names: found None, expected a list of names"),
        ({"task_adapter_names": []}, "task_adapter_names: found .*, expected at least one expert"),
        ({"task_adapter_names": ["task_0", "task_0"]}, "task_adapter_names: found 'task_0' twice"),
        ({"task_adapter_names": ["../task_0"]}, "name: found '../task_0'"),
        ({"task_adapter_names": ["arrow_router"]}, "task_adapter_names: .* not the router's"),
        ({"task_adapter_names": ["task_0", "task_9"]}, "task_9: found no such directory, expected the files of task_9"),
    ],
)
def test_impossible_settings_are_refused_by_name(base, tmp_path, changes, message):
    path = write_arrow_checkpoint(tmp_path / "a", base)
    record(path, **changes)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_checkpoint(path)
    assert "\n" not in str(refusal.value)


def test_mixed_ranks_and_mixed_targets_are_refused(base, tmp_path):
    for name, options in (("rank", {"rank": 2}), ("targets", {"targets": "all-linear"})):
        path = write_arrow_checkpoint(tmp_path / name, base)
        shutil.rmtree(path / "task_1")
        odd = write_arrow_checkpoint(tmp_path / f"odd-{name}", base, **options)
        shutil.copytree(odd / "task_1", path / "task_1")
        with pytest.raises(CheckpointError, match="task_1/adapter_config.json.*expected .*same modules|as in task_0"):
            read_checkpoint(path)


def test_adapters_that_are_more_than_a_and_b_are_refused(base, tmp_path):
    path = write_arrow_checkpoint(tmp_path / "a", base)
    file, weights = path / "task_0" / "adapter_config.json", path / "task_0" / "adapter_model.safetensors"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    tensors = load_file(weights)
    rows = {
        key.replace("lora_B.weight", "lora_magnitude_vector"): t[:, 0].contiguous()
        for key, t in tensors.items()
        if "lora_B" in key
    }
    save_file(tensors | rows, weights)
    with pytest.raises(CheckpointError, match="use_dora: found True, expected none: Arrow routes plain LoRA only"):
        read_checkpoint(path)
