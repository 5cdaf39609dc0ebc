"""Stacks that a generation holds: used, and never out of date, whatever changes a weight and however."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor, TemperatureLogitsWarper

from dylo_moe import load_checkpoint
from dylo_moe.held import only_known_code
from dylo_moe.plain import Plain
from dylo_moe.sums import Sums

STEPS = 5
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
ALL_LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def model(specimens):
    # Dense weights: grouped sums need no stack.
    return load_checkpoint(specimens(features="embedding", top_k=4)).eval()


def logits(generate, ids, **options) -> torch.Tensor:
    return torch.stack(generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **ALL_LOGITS, **options).logits)


def weight(model):
    return next(iter(model.routed_layers().values())).lora_B[model.expert_names[1]].weight


class Counted(TorchDispatchMode):
    def __init__(self, operator):
        super().__init__()
        self.operator, self.calls = operator, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.operator
        return func(*args, **(kwargs or {}))


def test_held_stacks_are_made_once_and_give_the_same(model, ids):
    with Counted(torch.ops.aten.cat.default) as held:
        got = logits(model.generate, ids)
    with Counted(torch.ops.aten.cat.default) as plain:
        wanted = logits(model.causal_lm.generate, ids)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    layers = model.routed_layers().values()
    led = {id(follower) for layer in layers for follower in layer.siblings}
    leaders = [layer for layer in layers if id(layer) not in led]
    # Without: in each pass a stack of each layer's B, and one of A for those that read the same tensor.
    # Held: each layer's two, and one of A for those, once.
    in_each_pass = STEPS * (len(layers) + len(leaders))
    assert plain.calls - held.calls == in_each_pass - 2 * len(layers) - sum(bool(leader.siblings) for leader in leaders)
    assert model.mixture.held is None


def test_held_stacks_under_autocast_give_the_same(model, ids):
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = logits(model.generate, ids), logits(model.causal_lm.generate, ids)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_experts_of_another_dtype_than_the_base_generate_the_same(specimens, ids):
    model = load_checkpoint(specimens(features="embedding", top_k=4), dtype="bfloat16").eval()
    for layer in model.routed_layers().values():
        layer.lora_A.float()
        layer.lora_B.float()
    got, wanted = logits(model.generate, ids), logits(model.causal_lm.generate, ids)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def in_place(model):
    with torch.no_grad():
        weight(model).mul_(-3)


def through_data(model):
    weight(model).data.mul_(-3)


def through_numpy(model):
    weight(model).detach().numpy()[:] *= -3


def other_memory(model):
    weight(model).data = weight(model).data * -3


def other_parameter(model):
    layer = next(iter(model.routed_layers().values())).lora_B[model.expert_names[1]]
    layer.weight = torch.nn.Parameter(layer.weight.detach() * -3)


def other_module(model):
    layer = next(iter(model.routed_layers().values()))
    name = model.expert_names[1]
    new = torch.nn.Linear(*layer.lora_B[name].weight.shape[::-1], bias=False)
    new.weight.data = layer.lora_B[name].weight.detach() * -3
    layer.lora_B[name] = new


def loaded(model, **options):
    state = {name: -3 * tensor if "lora_B" in name else tensor for name, tensor in model.causal_lm.state_dict().items()}
    model.causal_lm.load_state_dict(state, **options)


def loaded_by_assignment(model):
    loaded(model, assign=True)


def optimizer_step(model):
    parameter = weight(model).requires_grad_()
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=1.0).step()


def scaling(model):
    next(iter(model.routed_layers().values())).scaling[model.expert_names[1]] *= -3


def order_of_experts(model):
    model.mixture.expert_names.reverse()


CHANGES = [in_place, through_data, through_numpy, other_memory, other_parameter, other_module, loaded, loaded_by_assignment]
CHANGES += [optimizer_step, scaling, order_of_experts]


@pytest.mark.parametrize("change", CHANGES)
def test_generation_after_a_change_is_that_of_the_changed_model(model, ids, change):
    before = logits(model.generate, ids)
    change(model)
    after = logits(model.generate, ids)
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after, logits(model.causal_lm.generate, ids), rtol=1e-5, atol=1e-5)


def test_generation_after_a_move_is_that_of_the_moved_model(model, ids):
    logits(model.generate, ids)
    model.to(torch.float64)
    got = logits(model.generate, ids)  # transformers rounds what it returns to float32
    assert weight(model).dtype == torch.float64
    torch.testing.assert_close(got, logits(model.causal_lm.generate, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", [in_place, other_memory, other_parameter, loaded, loaded_by_assignment, optimizer_step])
@torch.no_grad()
def test_a_change_that_leaves_a_trace_is_found_before_the_next_pass(model, ids, change):
    with model.routing.holding(model, {}):
        assert model.mixture.held is not None
        before = model(ids).logits
        change(model)
        got = model(ids).logits
    assert (got - before).abs().max() > 1e-3
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-5, atol=1e-5)


class Meddler(LogitsProcessor):
    """A user's callback that writes to a weight without a trace, in the middle of a generation."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 2:
            through_data(self.model)
        return scores


def test_a_callback_that_writes_without_a_trace_is_seen(model, ids):
    original = weight(model).detach().clone()
    got = logits(model.generate, ids, logits_processor=LogitsProcessorList([Meddler(model)]))
    weight(model).data.copy_(original)
    wanted = logits(model.causal_lm.generate, ids, logits_processor=LogitsProcessorList([Meddler(model)]))
    assert (wanted[2] - logits_without_meddling(model, original, ids)[2]).abs().max() > 1e-4
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def logits_without_meddling(model, original, ids):
    weight(model).data.copy_(original)
    return logits(model.causal_lm.generate, ids)


def test_what_is_known_code(model):
    assert only_known_code(model, {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)]), "num_beams": 2})
    assert not only_known_code(model, {"logits_processor": [Meddler(model)]})
    assert not only_known_code(model, {"prefix_allowed_tokens_fn": lambda batch, ids: [1]})
    assert not only_known_code(model, {"streamer": Meddler(model)})
    handle = model.causal_lm.model.layers[0].register_forward_hook(lambda *_: None)
    assert not only_known_code(model, {})
    handle.remove()
    assert not only_known_code(model, {"logits_processor": [PrefixConstrainedLogitsProcessor(lambda batch, ids: [1], 1)]})
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        assert not only_known_code(model, {})
        handle.remove()
    assert only_known_code(model, {})
    layer = model.causal_lm.model.layers[0]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    assert not only_known_code(model, {})
    del layer.forward
    model.router = type("Own", (type(model.router),), {"__module__": "users.own"})(8, 2)
    assert not only_known_code(model, {})


def test_frozen_inference_weights_are_not_held(model, ids):
    with torch.inference_mode():
        weight(model).data = weight(model).data * 2
        other_parameter(model)
        with model.routing.holding(model, {}):
            before = model(ids).logits
            weight(model).mul_(-3)
            assert (model(ids).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_memory_of_stacks_is_free_when_the_generation_is_over(model, ids, interrupted):
    """Without the garbage collector, which does not know how large they are."""
    made, passes = [], []
    stacked, finished = Sums.stacked, Plain.finished

    def interrupt(plain, *given):
        passes.append(plain)
        if interrupted and len(passes) == 2 * len(model.routed_layers()) + 2:  # k, in the third pass
            raise KeyboardInterrupt
        return finished(plain, *given)

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sums, "stacked", lambda sums: made.append(stacked(sums)) or made[-1])
            patch.setattr(Plain, "finished", interrupt)
            with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
                model.generate(ids, **GREEDY)
        passes.clear()
        kept = [weakref.ref(tensor) for sums in made for tensor in sums.stack]
        assert len(kept) == 2 * len(model.routed_layers())
        made.clear()
        assert not any(tensor() is not None for tensor in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("rows", [1, 3])
def test_each_step_multiplies_once_by_the_a_of_those_that_read_the_same(model, ids, monkeypatch, rows):
    columns = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, matrix: columns.append(matrix.shape[1]) or multiply(x, matrix))
    logits(model.generate, ids[:rows, :2])
    layers = model.routed_layers().values()
    led = {id(follower) for layer in layers for follower in layer.siblings}
    assert len(columns) == STEPS * (len(layers) - len(led))
