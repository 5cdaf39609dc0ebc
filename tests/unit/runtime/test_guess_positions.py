"""Guesses run one position ahead: not beyond a table of positions, nor where a later position changes the others' passes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from dylo_moe import DynamicHybridRouter, attach_router
from tests.unit.runtime.price import Always
from tests.unit.runtime.test_guessing import Run

NONE = {"vocab_size": 60, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **NONE}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12, "partial_rotary_factor": 1.0}
PROMPT = 9


def _tables() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=12, vocab_size=60, eos_token_id=None))


def _dynamic() -> LlamaForCausalLM:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=12, rope_parameters=rope))


def _long() -> Phi3ForCausalLM:
    rope = {**LONG, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = Phi3Config(**SIZES, max_position_embeddings=64, original_max_position_embeddings=12, rope_parameters=rope)
    return Phi3ForCausalLM(config)


def _model(base):
    torch.manual_seed(0)
    config = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": "all-linear", "init_lora_weights": False}
    model = get_peft_model(base(), LoraConfig(**config), adapter_name="expert_0")
    model.add_adapter("expert_1", LoraConfig(**config))
    return attach_router(model.double(), DynamicHybridRouter(32, 2).double()).eval()


# Beyond the table there is one token more than positions: the last one is not read.
@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize(("base", "steps"), [(_tables, 4), (_dynamic, 8), (_long, 8)])
def test_generation_over_the_border_is_that_of_two_passes(base, steps, width):
    model = _model(base)
    model.routing.pair_cost = Always(width)
    ids = torch.randint(1, 60, (1, 3)).repeat(1, PROMPT // 3)
    options = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    got = model.generate(ids, return_dict_in_generate=True, **options)
    assert model.routing.guesses.made
    model.routing.pair_cost = None
    wanted = model.generate(ids, return_dict_in_generate=True, **options)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits))


@pytest.mark.parametrize("base", [_tables, _dynamic, _long])
def test_text_that_repeats_itself_over_the_border_is_that_of_two_passes(base):
    model, logits = _model(base), []
    text = torch.randint(1, 60, (1, 3)).repeat(1, 6)[:, : 12 if base is _tables else 18]
    for cost in (Always(5), None):
        model.routing.pair_cost = cost
        with model.routing.holding(model, {}):
            run = Run(model, text[:, :PROMPT])
            for column in text[:, PROMPT:].T:
                run.step(column[:, None])
        logits.append(torch.stack(run.logits))
        assert cost is None or model.routing.guesses.right
    torch.testing.assert_close(*logits)
