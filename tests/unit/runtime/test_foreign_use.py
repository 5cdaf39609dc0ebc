"""What users of PEFT and of transformers' Trainer do with a routed model."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dylo_moe import DynamicHybridRouter, attach_router, detach_router, load_checkpoint
from dylo_moe.errors import RoutingError
from tests.unit.runtime.stock import E
from tests.unit.runtime.test_model import close, routed


def test_integer_routing_weights_are_weights_and_not_expert_ids(specimens, ids):
    model = routed(specimens)
    one_hot = torch.tensor([0, 1, 0, 0])
    four = torch.cat([ids, ids[:1]])  # as many rows as experts: the row of weights would fit as a list of ids
    with torch.no_grad():
        assert torch.equal(model(four, routing_weights=one_hot).logits, model(four, routing_weights=one_hot.float()).logits)
        per_token = one_hot.expand(3, 9, E)
        assert torch.equal(model(ids, routing_weights=per_token).logits, model(ids, routing_weights=per_token.float()).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(four, routing_weights=one_hot, **options), model.generate(four, expert_id=1, **options))


def peft_with(specimens, **options):
    base = AutoModelForCausalLM.from_pretrained(specimens().parent / "llama")
    config = {"r": 3, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    model = get_peft_model(base, LoraConfig(**config), adapter_name="expert_0")
    model.add_adapter("expert_1", LoraConfig(**config))
    return model.eval()


def test_routed_head_mixes_the_kept_positions_by_their_own_weights(specimens, ids):
    model = attach_router(peft_with(specimens, target_modules=["q_proj", "lm_head"]), DynamicHybridRouter(48, 2)).eval()
    weights = torch.rand(3, 9, 2)
    with torch.no_grad():
        full = model(ids, routing_weights=weights).logits
        for kept in (torch.tensor([0, 3]), torch.arange(8, -1, -1)):
            close(model(ids, routing_weights=weights, logits_to_keep=kept).logits, full[:, kept])


def test_tokens_trained_beside_the_lora_are_refused_by_name(specimens):
    with pytest.raises(RoutingError, match="trained beside the LoRA"):
        attach_router(peft_with(specimens, trainable_token_indices=[1, 2]), None)


def test_config_that_switches_routing_off_is_refused(specimens):
    with pytest.raises(RoutingError, match="use_moe_routing"):
        routed(specimens, use_moe_routing=False)


def test_what_peft_methods_set_on_the_routed_model_holds_after_detach(specimens, ids):
    model = routed(specimens)
    with torch.no_grad():
        expected = model(ids, expert_id=1).logits
        model.peft_model.set_adapter("expert_1")
        peft_model = detach_router(model)
        assert peft_model.active_adapter == "expert_1"
        assert torch.equal(peft_model(ids).logits, expected)


def test_trainer_trains_with_gradient_checkpointing_and_saves(specimens, ids, tmp_path):
    model = load_checkpoint(specimens())
    before = model.router.gate.weight.detach().clone()
    options = {"max_steps": 2, "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "save_steps": 2}
    options |= {"per_device_train_batch_size": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=model, args=TrainingArguments(str(tmp_path), **options), train_dataset=data).train()
    assert not torch.equal(model.router.gate.weight, before)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(saved["router.gate.weight"], model.router.gate.weight)


def offload(module) -> None:
    """As accelerate does what a device_map leaves no room for."""
    attach_align_device_hook(module, "cpu", offload=True, weights_map=dict(module.state_dict()))


def test_experts_that_are_offloaded_are_refused_and_not_read_from_nowhere(specimens, ids):
    model = peft_with(specimens)
    offload(model.get_base_model().model.layers[1])
    with pytest.raises(RoutingError, match=r"layers\.1\.self_attn\.q_proj: experts are offloaded"):
        attach_router(model, DynamicHybridRouter(48, 2))


@pytest.mark.parametrize("grad", [False, True])
def test_experts_that_are_offloaded_later_are_refused(specimens, ids, grad):
    model = attach_router(peft_with(specimens), DynamicHybridRouter(48, 2)).eval()
    with torch.set_grad_enabled(grad):
        model(ids)
        offload(model.causal_lm.model.layers[1])
        with pytest.raises(RoutingError, match="experts are offloaded"):
            model(ids)
