"""PeftMoEDecoder on tiny real checkpoints."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from dylo_moe import PeftMoEDecoder
from dylo_moe.decoder import sample_seed
from dylo_moe.errors import OptionError, PromptError, UnknownStrategy
from dylo_moe.prompts import SPLITTER, chat_prompt
from dylo_moe.stopping import COMMON_STOPS, Ending, cut_at_stop, stop_strings
from harness.specimens import write_base, write_checkpoint

PROMPT = "def add(a, b):\n"
EXPERTS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, base):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), base, num_experts=EXPERTS)


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("chat"), "llama", chat_template=True)


def build(path, **options):
    return PeftMoEDecoder(str(path), **{"dataset": "humaneval", "dtype": "float32", "max_new_tokens": 16, **options})


def greedy(path, **options):
    return build(path, temperature=0, **options)


def only(decoder, *texts):
    """Lets the model write nothing but these one-token texts."""
    allowed = {decoder.tokenizer.encode(text, add_special_tokens=False)[0] for text in texts}
    others = [token for token in range(len(decoder.tokenizer)) if token not in allowed]
    decoder.model.generation_config.suppress_tokens = others
    return decoder


def test_checkpoint_is_described_by_the_decoders_attributes(checkpoint, base):
    decoder = greedy(checkpoint)
    assert decoder.model_format == "dylo-moe"
    assert decoder.base_model_name == str(base)
    assert decoder.device == decoder.model.device
    assert decoder.routing_strategy == "router"
    assert decoder.is_direct_completion()


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_experts_on_a_base_of_16_bits_have_the_dtype_that_was_asked_for(checkpoint, autocast, dtype):
    decoder = greedy(checkpoint, dtype="bfloat16", autocast_adapter_dtype=autocast)
    assert {p.dtype for name, p in decoder.model.named_parameters() if "lora_" in name} == {dtype}


def test_adapter_path_is_the_checkpoint_and_name_a_label(checkpoint):
    decoder = greedy("a label", adapter_path=str(checkpoint))
    assert str(decoder) == "a label"
    assert decoder.codegen(PROMPT, do_sample=False, num_samples=1) == greedy(checkpoint).codegen(PROMPT, False, 1)


def test_evalplus_stop_list_stays_as_it_was_after_building_and_running_decoders(checkpoint):
    from evalplus.provider.utility import EOS

    before = list(EOS)
    humaneval, mbpp = greedy(checkpoint), greedy(checkpoint, dataset="mbpp")
    humaneval.codegen(PROMPT, do_sample=False, num_samples=1)
    assert before == EOS == list(COMMON_STOPS)
    assert humaneval.eos is not EOS
    assert "\ndef " in humaneval.eos and "\ndef " not in mbpp.eos
    assert '\n"""' in mbpp.eos and '\n"""' not in humaneval.eos


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("start", [3, 9, 17])
def test_text_ends_before_the_earliest_stop_string(checkpoint, start, length):
    decoder = greedy(checkpoint, max_new_tokens=24)
    decoder.eos = []
    (whole,) = decoder.codegen(PROMPT, do_sample=False, num_samples=1)
    stop = whole[start : start + length]
    decoder.eos = ["never written", stop]
    assert decoder.codegen(PROMPT, do_sample=False, num_samples=1) == [whole[: whole.index(stop)]]


def test_generation_ends_with_the_step_that_completes_a_stop_string(checkpoint):
    decoder = greedy(checkpoint, max_new_tokens=24)
    decoder.eos = []
    (whole,) = decoder.codegen(PROMPT, do_sample=False, num_samples=1)
    decoder.eos = [whole[:2]]
    steps = []
    hook = decoder.model.causal_lm.lm_head.register_forward_hook(lambda *_: steps.append(1))
    assert decoder.codegen(PROMPT, do_sample=False, num_samples=1) == [""]
    hook.remove()
    assert 1 <= len(steps) <= 3


def test_stop_string_in_the_prompt_stops_nothing(checkpoint):
    decoder = greedy(checkpoint)
    prompt = "import math\n\ndef first():\n    pass\n\ndef add(a, b):\n"
    assert any(stop in prompt for stop in decoder.eos)
    with_stops = decoder.codegen(prompt, do_sample=False, num_samples=1)
    decoder.eos = []
    (free,) = decoder.codegen(prompt, do_sample=False, num_samples=1)
    assert with_stops == [cut_at_stop(free, stop_strings("humaneval", direct_completion=True))]
    assert with_stops != [""]


def test_answer_does_not_depend_on_the_prompts_before(checkpoint):
    decoder = greedy(checkpoint)
    first = decoder.codegen(PROMPT, do_sample=False, num_samples=1)
    for prompt in ("x", "import os\n" * 9, "def f():\n"):
        decoder.codegen(prompt, do_sample=False, num_samples=1)
    assert decoder.codegen(PROMPT, do_sample=False, num_samples=1) == first


def test_special_token_that_is_a_stop_string_ends_the_text(checkpoint):
    decoder = only(greedy(checkpoint, max_new_tokens=5), "<|bos|>")
    steps = []
    decoder.model.causal_lm.lm_head.register_forward_hook(lambda *_: steps.append(1))
    decoder.codegen(PROMPT, do_sample=False, num_samples=1)
    without, _ = len(steps), steps.clear()
    decoder.eos = ["<|bos|>"]
    assert decoder.codegen(PROMPT, do_sample=False, num_samples=1) == [""]
    assert len(steps) == without - 4


@pytest.mark.parametrize("strategy", ["router", "single:1", "best", "ensemble", "round_robin"])
def test_batch_size_does_not_change_what_is_sampled(checkpoint, strategy):
    texts = []
    for size in (1, 2, 5, 7):
        decoder = build(checkpoint, batch_size=size, routing_strategy=strategy)
        texts.append(decoder.codegen(PROMPT, do_sample=True, num_samples=5))
    assert [len(t) for t in texts] == [5] * 4
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert len(set(texts[0])) == 5


def test_batch_size_does_not_change_what_a_merged_model_samples(base):
    texts = [build(base, batch_size=size).codegen(PROMPT, do_sample=True, num_samples=5) for size in (1, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 5


@pytest.mark.parametrize("strategy", ["router", "round_robin"])
def test_continued_samples_are_those_of_one_run(checkpoint, strategy):
    decoder = build(checkpoint, routing_strategy=strategy, batch_size=2)
    together = decoder.codegen(PROMPT, num_samples=5)
    assert decoder.codegen(PROMPT, num_samples=2) + decoder.codegen(PROMPT, num_samples=3, first_sample=2) == together


def test_other_seed_gives_other_samples(checkpoint):
    assert build(checkpoint, seed=1).codegen(PROMPT, num_samples=2) != build(checkpoint).codegen(PROMPT, num_samples=2)


def test_samples_do_not_depend_on_torch_global_seed(checkpoint):
    decoder = build(checkpoint)
    torch.manual_seed(1)
    first = decoder.codegen(PROMPT, num_samples=2)
    torch.manual_seed(2)
    assert decoder.codegen(PROMPT, num_samples=2) == first


def test_round_robin_sample_k_comes_from_expert_k_modulo_experts(checkpoint):
    singles = [greedy(checkpoint, routing_strategy=f"single:{i}").codegen(PROMPT, False, 1)[0] for i in range(EXPERTS)]
    assert len(set(singles)) == EXPERTS
    decoder = greedy(checkpoint, routing_strategy="round_robin", batch_size=2)
    assert decoder.codegen(PROMPT, do_sample=False, num_samples=5) == [singles[k % EXPERTS] for k in range(5)]
    assert decoder.codegen(PROMPT, do_sample=False, num_samples=2, first_sample=4) == [singles[1], singles[2]]


def test_greedy_gives_as_many_samples_as_asked(checkpoint):
    texts = greedy(checkpoint).codegen(PROMPT, do_sample=False, num_samples=3)
    assert len(texts) == 3 and len(set(texts)) == 1


def test_greedy_decoding_needs_temperature_zero(checkpoint):
    with pytest.raises(OptionError, match="greedy decoding with temperature 0.8"):
        build(checkpoint).codegen(PROMPT, do_sample=False, num_samples=1)


def test_temperature_zero_needs_greedy_decoding(checkpoint):
    with pytest.raises(OptionError, match="sampling with temperature 0"):
        greedy(checkpoint).codegen(PROMPT, do_sample=True, num_samples=1)


def test_tabs_become_four_spaces(base):
    decoder = only(greedy(base, max_new_tokens=3), "\t")
    assert decoder.codegen(PROMPT, do_sample=False, num_samples=1) == ["    " * 3]


def test_chat_prompt_holds_one_beginning_of_text_token(chat_base):
    decoder = greedy(chat_base, instruction_prefix="Please:", response_prefix="Here:")
    decoder.tokenizer.chat_template = "{{ bos_token }}" + decoder.tokenizer.chat_template
    assert not decoder.is_direct_completion()
    ids = decoder.encode(PROMPT)[0].tolist()
    assert ids.count(decoder.tokenizer.bos_token_id) == 1
    text = decoder.tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "[user]\nPlease:\n```\ndef add(a, b):\n```\n\n[assistant]\nHere:\n```python\n"


def test_chat_decoder_stops_at_the_end_of_the_code_block_only(chat_base):
    decoder = greedy(chat_base, instruction_prefix="Please:", response_prefix="Here:")
    assert decoder.eos == [*COMMON_STOPS, "\n```\n"]
    assert len(decoder.codegen(PROMPT, do_sample=False, num_samples=1)) == 1


def test_base_prompt_can_be_forced_on_a_chat_model(chat_base):
    decoder = greedy(chat_base, force_base_prompt=True)
    assert decoder.is_direct_completion()
    assert decoder.tokenizer.decode(decoder.encode(PROMPT)[0], skip_special_tokens=True) == PROMPT


def test_chat_prompt_without_prefixes_is_refused(chat_base):
    with pytest.raises(PromptError, match="instruction_prefix"):
        greedy(chat_base).codegen(PROMPT, do_sample=False, num_samples=1)


def template(text):
    """A tokenizer with this chat template; the template engine is transformers' own."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def apply_chat_template(turns, tokenize):
        return render_jinja_template([turns], chat_template=text)[0][0]

    return SimpleNamespace(apply_chat_template=apply_chat_template)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{{ messages[0].content }}", "rewrites or drops"),
        ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "more than 1 s"),
        ("{{ messages[7].content.x }}", "failed"),
        ("{{ raise_exception('only user turns') }}", "only user turns"),
        ("{% for a in range(1100) %}{{ 'x' * 1000 }}{% endfor %}", "characters"),
        ("{{ ''.__class__.__mro__ }}", "failed"),
    ],
    ids=["drops the splitter", "loops for ever", "missing turn", "refuses", "too much text", "leaves the sandbox"],
)
def test_bad_chat_template_is_one_clear_error(text, word):
    assert chat_prompt(template("{{ messages[1].content }}"), "t", "i", "r", seconds=5) == "r\n```python\n"
    begin = time.monotonic()
    with pytest.raises(PromptError, match=word):
        chat_prompt(template(text), "t", "i", "r", seconds=1)
    assert time.monotonic() - begin < 5


def test_splitter_is_the_one_of_evalplus():
    from evalplus.provider.utility import _MAGIC_SPLITTER_

    assert SPLITTER == _MAGIC_SPLITTER_


def test_prompt_longer_than_the_model_is_refused(checkpoint):
    with pytest.raises(PromptError, match="2048 positions"):
        greedy(checkpoint).codegen("word " * 3000, do_sample=False, num_samples=1)


def test_completion_ends_where_the_models_positions_end(base):
    decoder = only(greedy(base, max_new_tokens=16), "a")
    decoder.model.config.max_position_embeddings = decoder.encode(PROMPT).shape[1] + 5
    assert decoder.codegen(PROMPT, do_sample=False, num_samples=1) == ["aaaaa"]


def test_tokenizer_without_pad_token_works_in_batches(checkpoint):
    decoder = build(checkpoint, batch_size=3)
    wanted = decoder.codegen(PROMPT, num_samples=3)
    decoder.tokenizer.pad_token = None
    assert decoder.codegen(PROMPT, num_samples=3) == wanted


def test_unknown_strategy_names_the_legal_ones(checkpoint):
    with pytest.raises(UnknownStrategy, match="round_robin"):
        greedy(checkpoint, routing_strategy="single:3")


def test_merged_model_has_no_strategy_but_router(base):
    assert greedy(base).model_format == "merged"
    with pytest.raises(UnknownStrategy, match="only 'router'"):
        greedy(base, routing_strategy="single:0")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"wandb_artifact": "a/b/c:v0", "adapter_path": "d"}, "only one can be the checkpoint"),
        ({"dtype": "float8"}, "bfloat16"),
        ({"dataset": "evalperf"}, "humaneval"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_impossible_option_is_named(checkpoint, options, word):
    with pytest.raises(OptionError, match=word):
        build(checkpoint, **options)


def test_loaded_model_is_used_as_it_is(checkpoint):
    first = greedy(checkpoint)
    second = greedy(checkpoint, model=first.model, routing_strategy="single:2")
    assert second.model is first.model
    assert second.codegen(PROMPT, False, 1) == greedy(checkpoint, routing_strategy="single:2").codegen(PROMPT, False, 1)


def test_sample_seed_depends_on_seed_prompt_and_index():
    seeds = {sample_seed(s, p, k) for s in (0, 1) for p in ("a", "b") for k in range(3)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert sample_seed(0, "a", 1) == sample_seed(0, "a", 1)


def ending_of(stops, texts, ends=()):
    """Of a tokenizer whose token i writes texts[i]."""
    return Ending(stops, ends, lambda ids: "".join(texts[i] for i in ids))


def test_text_ends_with_the_token_that_completes_a_stop_string():
    ending = ending_of(["\ndef "], {1: "a", 2: "\n", 3: "def ", 4: "b"})
    assert ending.length([2, 1, 3], 0) is None
    assert ending.length([1, 2, 3], 2) == 3
    assert ending.length([1, 2, 3, 4, 4], 1) == 3


def test_text_ends_before_the_first_end_token_unless_a_stop_string_came_before_it():
    ending = ending_of(["b"], {1: "a", 2: "b"}, ends=[7, 8])
    assert ending.length([1, 1, 7, 2], 0) == 2
    assert ending.length([1, 2, 8], 0) == 2
    assert ending.length([7], 0) == 0


def test_stop_string_after_more_tokens_than_the_window_is_seen():
    ending = Ending(["xyz"], [], lambda ids: "".join(map(chr, ids)))
    row = [ord("a")] * 200 + [ord(c) for c in "xyz"]
    assert ending.length(row[:-1], 198) is None
    assert ending.length(row, 202) == 203


@given(st.lists(st.integers(1, 4), max_size=30), st.integers(1, 9))
def test_asking_about_several_tokens_at_once_ends_where_asking_after_each_does(tokens, stride):
    ending = ending_of(["ab", "abcd", "bca"], {1: "a", 2: "b", 3: "c", 4: "d"}, ends=[4])
    each = (ending.length(tokens[: n + 1], n) for n in range(len(tokens)))
    together = (ending.length(tokens[: n + stride], n) for n in range(0, len(tokens), stride))
    assert next((n for n in together if n is not None), None) == next((n for n in each if n is not None), None)


def test_top_k_of_transformers_applies_where_the_model_says_nothing(base):
    """Stock generation keeps 50 candidates when no configuration says otherwise; so do we, or samples would differ in kind."""
    decoder = build(base)
    assert decoder.model.generation_config.top_k is None
    assert GenerationConfig._get_default_generation_params()["top_k"] == 50
