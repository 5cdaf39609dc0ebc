"""Models, routers and moments with which several tokens in a pass would give others than one by one: nothing is guessed then."""

from __future__ import annotations

import asyncio
import copy
import functools
import pickle
import queue
from io import BytesIO

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from torch import nn
from transformers import DynamicCache, GenerationConfig, GPTNeoConfig, GPTNeoForCausalLM, StaticCache, TextStreamer
from transformers.cache_utils import DynamicLayer

from dylo_moe import DynamicHybridRouter, attach_router, pair_cost
from dylo_moe.guessable import computes_tokens_alone
from dylo_moe.held import only_known_code
from dylo_moe.pair_cost import PairCost
from dylo_moe.row_cache import RoomyLayer
from tests.unit.runtime.price import Always
from tests.unit.runtime.test_chains import model_with, repeated, run
from tests.unit.runtime.test_guessing import model_of

STEPS = 12
OPTIONS = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
WIDTHS = [1, 3, 8]


@pytest.fixture
def ids():
    """A prompt that repeats itself, (1, 27)."""
    return torch.randint(5, 300, (1, 9)).repeat(1, 3)


class Between:
    """A streamer that works between two steps, of known code."""

    __module__ = "transformers.between"

    def __init__(self, work, at=6):
        self._calls = iter([None] * at + [work])

    def put(self, tokens):
        work = next(self._calls, None)
        if work is not None:
            work()

    def end(self):
        pass


class Work:
    """Known code too."""

    __module__ = "transformers.between"

    def __init__(self, function):
        self._function = (function,)  # not looked into

    def __call__(self):
        self._function[0]()


def generated(model, ids, cost, **options):
    """Tokens and the state of the random numbers after them."""
    model.routing.pair_cost = cost
    torch.manual_seed(1)
    return model.generate(ids, **OPTIONS, **options), torch.get_rng_state()


def assert_as_two_passes(model, ids):
    """Alike in logits too, in float64: a token hardly ever shows a route that is a little wrong."""
    options = {"return_dict_in_generate": True, "output_logits": True}
    wanted, then = generated(model, ids, None, **options)
    for width in WIDTHS:
        found, after = generated(model, ids, Always(width), **options)
        assert torch.equal(after, then)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits))


def looks_both_ways(model):
    model.causal_lm.config.is_causal = False


def draws(model):
    for layer in model.causal_lm.model.layers:
        layer.self_attn.attention_dropout = 0.3
        layer.self_attn.train()


def router_draws(model):
    class Drawing(type(model.router)):
        __module__ = "dylo_moe.drawing"

        def forward(self, hidden_states):
            return nn.functional.dropout(super().forward(hidden_states), 0.3, self.training)

    model.router.__class__ = Drawing
    model.router.dropout = nn.Dropout(0.3).train()
    model.router.training = True


@pytest.mark.parametrize("change", [looks_both_ways, draws, router_draws])
def test_what_other_tokens_or_random_numbers_decide_is_not_guessed(specimens, ids, change):
    model = model_of(specimens, experts=0.3)
    change(model)
    assert_as_two_passes(model, ids)
    assert model.routing.guesses is None


@pytest.mark.parametrize(
    ("name", "value"), [("is_causal", False), ("use_bidirectional_attention", True), ("output_router_logits", True)]
)
def test_configurations_of_models_that_look_at_a_whole_pass(specimens, name, value):
    model = model_of(specimens)
    assert computes_tokens_alone(model.causal_lm, model.router)
    setattr(model.causal_lm.config, name, value)
    assert not computes_tokens_alone(model.causal_lm, model.router)


def test_a_module_that_says_it_is_not_causal(specimens):
    model = model_of(specimens)
    model.causal_lm.model.layers[-1].self_attn.is_causal = False
    assert not computes_tokens_alone(model.causal_lm, model.router)


@pytest.mark.parametrize(
    "router",
    [
        lambda size: nn.Sequential(nn.TransformerEncoderLayer(size, 2, 16, batch_first=True), nn.Linear(size, 4), nn.Softmax(-1)),
        lambda size: nn.Sequential(nn.Linear(size, 4), nn.Softmax(1)),
    ],
    ids=["attention", "softmax over tokens"],
)
def test_a_router_that_looks_at_a_whole_pass_sees_each_step_alone(specimens, ids, router):
    model = model_of(specimens, experts=0.3)
    model.router = model.routing.router = router(model.router.input_size).double().eval()
    assert_as_two_passes(model, ids)
    assert model.routing.guesses.made


@pytest.mark.parametrize("at", [5, 6])
@pytest.mark.parametrize("width", WIDTHS)
def test_what_was_found_with_a_weight_is_forgotten_when_it_changes(specimens, ids, width, at):
    model = model_with(specimens, width)
    experts = [expert.weight for layer in model.routed_layers().values() for expert in layer.lora_B.values()]
    originals = [parameter.detach().clone() for parameter in experts]

    def negate(run):
        with torch.no_grad():
            for parameter in experts:
                parameter.neg_()

    def logits(cost):
        model.routing.pair_cost = cost
        with torch.no_grad():
            for parameter, original in zip(experts, originals, strict=True):
                parameter.copy_(original)
        return run(model, ids, repeated(ids), change=negate, at=at)[0]

    torch.testing.assert_close(logits(Always(width)), logits(None))


def test_a_streamer_is_known_code_where_all_that_it_calls_is(specimens):
    class Tokenizer:
        def decode(self, tokens, **options):
            return ""

    model = model_of(specimens)
    streamer = TextStreamer(Tokenizer())
    assert not only_known_code(model, {"streamer": streamer})
    Tokenizer.__module__ = "transformers.own"
    assert only_known_code(model, {"streamer": streamer})
    streamer.put = lambda tokens: None
    assert not only_known_code(model, {"streamer": streamer})


class Loop(asyncio.AbstractEventLoop):
    __module__ = "uvloop"


def test_data_of_options_is_no_code(specimens):
    model, streamer = model_of(specimens), TextStreamer(None)
    config = model.causal_lm.config
    for value in (
        torch.device("cpu"),
        torch.float32,
        torch.Size([1]),
        np.float64(0.7),
        np.ones(2),
        np.random.default_rng(),
        queue.Queue(),
        Loop(),
    ):
        streamer.held = value
        assert only_known_code(model, {"streamer": streamer}), value
    for cache in (
        DynamicCache(config=config),
        DynamicCache(config=config, offloading=True),
        StaticCache(config=config, max_cache_len=8),
    ):
        assert only_known_code(
            model, {"past_key_values": cache, "generation_config": GenerationConfig(max_new_tokens=np.int64(3))}
        )
    for value in (functools.partial(print), print, lambda: None):
        streamer.held = value
        assert not only_known_code(model, {"streamer": streamer}), value


@pytest.mark.parametrize("width", WIDTHS)
def test_a_copy_made_between_two_steps_is_a_model_of_its_own(specimens, ids, width):
    model, made = model_of(specimens, experts=0.3), []

    def duplicate():
        made.append(copy.deepcopy(model))
        made.append(pickle.loads(pickle.dumps(model)))
        torch.save(model, BytesIO())

    wanted, _ = generated(model, ids, Always(width))
    assert torch.equal(generated(model, ids, Always(width), streamer=Between(Work(duplicate)))[0], wanted)
    assert "forward" not in vars(model.causal_lm)
    with torch.no_grad():
        model.causal_lm.lm_head.weight.neg_()
    for twin in made:
        assert torch.equal(generated(twin, ids, Always(width))[0], wanted)
        vars(twin.causal_lm).pop("forward")  # what stood there in the model's stead
        with twin.routing.holding(twin, {}):
            assert "forward" in vars(twin.causal_lm)
        assert "forward" not in vars(twin.causal_lm)
        assert twin(ids).logits.shape == (*ids.shape, twin.causal_lm.config.vocab_size)


def test_a_forward_that_is_put_there_between_two_steps_stays(specimens, ids):
    model = model_of(specimens)
    other = model.causal_lm.forward

    def put():
        model.causal_lm.forward = other

    generated(model, ids, Always(), streamer=Between(Work(put)))
    assert vars(model.causal_lm).pop("forward") is other
    generated(model, ids, Always(), streamer=Between(Work(lambda: delattr(model.causal_lm, "forward"))))
    assert "forward" not in vars(model.causal_lm)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_cache_of_a_narrower_dtype_is_gone_on_with(specimens, ids, width):
    model = model_of(specimens, experts=0.3).float()
    text = torch.cat([ids, ids[:, :1]], dim=1)

    def logits(cost):
        model.routing.pair_cost = cost
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            cache = model(ids, use_cache=True).past_key_values
        cache.layers = [narrow(layer) for layer in cache.layers]
        options = {"past_key_values": cache, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(model.generate(text, **OPTIONS, **options).logits)

    torch.testing.assert_close(logits(Always(width)), logits(None), rtol=1e-4, atol=1e-4)


def narrow(layer):
    layer.keys, layer.values, layer.dtype = layer.keys.bfloat16(), layer.values.bfloat16(), torch.bfloat16
    return layer


@pytest.mark.parametrize(("first", "then"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_roomy_layer_keeps_the_wider_dtype_as_transformers_does(first, then):
    roomy, stock = RoomyLayer(), DynamicLayer()
    for dtype in (first, then, then):
        keys, values = torch.randn(2, 1, 2, 3, 4, dtype=dtype)
        for found, wanted in zip(roomy.update(keys, values), stock.update(keys, values), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_padded_rows_end_where_a_table_of_columns_ends(width):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 6}
    none = {"vocab_size": 60, "bos_token_id": None, "eos_token_id": None}
    base = GPTNeoForCausalLM(GPTNeoConfig(**sizes, **none, max_position_embeddings=40))
    config = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": "all-linear", "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**config), adapter_name="expert_0")
    model.add_adapter("expert_1", LoraConfig(**config))
    model = attach_router(model.double(), DynamicHybridRouter(32, 2).double()).eval()
    ids = torch.randint(2, 60, (2, 4)).repeat(1, 4)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
    model.routing.pair_cost = None
    wanted = model.generate(ids, **options)
    model.routing.pair_cost = Always(width)
    assert torch.equal(model.generate(ids, **options), wanted)
    assert model.routing.guesses.made


def test_a_head_of_several_modules_has_a_price(specimens, ids):
    model = model_of(specimens)
    head = model.causal_lm.lm_head
    model.causal_lm.lm_head = nn.Sequential(nn.Linear(head.in_features, head.in_features), nn.GELU(), head).double()
    assert torch.equal(generated(model, ids, PairCost(model.causal_lm))[0], generated(model, ids, None)[0])
    model.causal_lm.lm_head = nn.Identity()
    assert PairCost(model.causal_lm).width(1, 1.0, 1.0, 16) == 0


def test_a_clock_that_stands_still_says_that_nothing_pays(specimens, monkeypatch):
    cost = PairCost(model_of(specimens).causal_lm)
    monkeypatch.setattr(pair_cost.time, "process_time", lambda: 1.0)
    assert cost.width(1, 1.0, 1.0, 16) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_the_cache_that_is_left_is_as_transformers_makes_it(specimens, ids, width):
    model = model_of(specimens)
    model.routing.pair_cost = Always(width)
    cache = model.generate(ids, return_dict_in_generate=True, **OPTIONS).past_key_values
    assert model.routing.guesses.made
    tensors = {f"{n}.{name}": vars(layer)[name] for n, layer in enumerate(cache.layers) for name in ("keys", "values")}
    assert all(tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())
    assert save(tensors)
