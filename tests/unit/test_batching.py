"""Completions that are written together are those that are written alone."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig

from dylo_moe import PeftMoEDecoder
from dylo_moe.batch import Batch, Request
from dylo_moe.batching import DEFAULT_ROWS, SMALL, STEPS_BETWEEN_LOOKS
from dylo_moe.completions import Wanted
from dylo_moe.errors import OptionError
from dylo_moe.penalties import Penalties
from dylo_moe.routes.observing import Tokens, observe
from fixtures.routed import write_routed
from harness.specimens import write_base, write_checkpoint
from tests.unit.runtime.tiny_peft import write_adapter

PROMPTS = ("def add(a, b):\n", "import math\ndef area(radius):\n    '''Area of a circle.'''\n", "x = 1\nfor i in range(9):\n")
STRATEGIES = ("router", "single:1", "best", "ensemble", "round_robin", "base")


def build(path, **options):
    return PeftMoEDecoder(str(path), **{"dataset": "humaneval", "dtype": "float32", "max_new_tokens": 8, **options})


def together(decoder, wanted):
    return {done.wanted: done.text for done in decoder.complete_many(wanted, do_sample=decoder.temperature > 0)}


def alone(decoder, wanted):
    decoder.batch_size, texts = 1, {}
    for one in wanted:
        decoder.routing_strategy = one.strategy
        (texts[one],) = decoder.codegen(one.prompt, decoder.temperature > 0, 1, one.index)
    return texts


def assert_written_alike(path, wanted, **options):
    decoder = build(path, batch_size=5, **options)
    found = together(decoder, wanted)
    assert_alike_but_for_rounding(found, alone(decoder, wanted), lambda: build(path, batch_size=5, dtype="float64", **options))
    assert len(set(found.values())) > len(wanted) // 3


def assert_alike_but_for_rounding(found, expected, build_exact):
    """Where rounding alone decided, it decides otherwise in float64."""
    different = [one for one in found if found[one] != expected[one]]
    if different:
        exact = build_exact()
        assert together(exact, different) == alone(exact, different)
    assert len(different) <= len(found) // 10


@pytest.mark.parametrize("temperature", [0, 0.8], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("family", "features"), [("llama", "base"), ("gpt2", "layer"), ("gemma", "all_experts"), ("qwen", "embedding")]
)
def test_batch_of_prompts_samples_and_strategies_writes_what_each_writes_alone(tmp_path, family, features, temperature):
    base = write_base(tmp_path / "base", family)
    path = write_checkpoint(tmp_path / "checkpoint", base, num_experts=3, features=features)
    wanted = [Wanted(prompt, strategy, index=1) for prompt in PROMPTS for strategy in STRATEGIES]
    assert_written_alike(path, wanted, temperature=temperature)


OWN = {
    "modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "model.norm"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "bias of a LoRA": {"target_modules": ["q_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("kind", ["shared", "feed_forward", *OWN])
def test_base_writes_what_the_base_model_alone_writes_whatever_the_experts_have_besides_their_deltas(tmp_path, kind):
    base = write_base(tmp_path / "base", "qwen" if kind in OWN else "llama")
    if kind in OWN:
        for expert in range(2):
            write_adapter(tmp_path / "checkpoint" / f"expert_{expert}", base, seed=expert, r=2, **OWN[kind])
    else:
        write_routed(tmp_path / "checkpoint", base, kind, num_experts=3)
    decoder = build(tmp_path / "checkpoint", batch_size=4, temperature=0, base_model=str(base), routing_strategy="base")
    others = ("single:1", "round_robin") if kind in OWN else ("router", "single:1")
    wanted = [Wanted(prompt, strategy, 0) for prompt in PROMPTS for strategy in ("base", *others)]
    found = together(decoder, wanted)
    plain = together(build(base, batch_size=4, temperature=0), [Wanted(prompt, "router", 0) for prompt in PROMPTS])
    for prompt in PROMPTS:
        text = plain[Wanted(prompt, "router", 0)]
        assert found[Wanted(prompt, "base", 0)] == text
        assert all(found[Wanted(prompt, strategy, 0)] != text for strategy in others)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """A model whose layers see the last seven tokens and the current one only."""
    path = write_base(tmp_path_factory.mktemp("sliding"), "llama")
    old = AutoModelForCausalLM.from_pretrained(path)
    fields = {k: v for k, v in old.config.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")}
    new = AutoModelForCausalLM.from_config(MistralConfig(**fields, sliding_window=8))
    new.load_state_dict(old.state_dict())
    new.save_pretrained(path)
    return path


def test_rows_of_a_sliding_window_cache_come_and_go(sliding):
    wanted = [Wanted(PROMPTS[number % 3] + "#" * number, "router", 0) for number in range(9)]
    decoder = build(sliding, batch_size=3, temperature=0, max_new_tokens=12)
    decoder.eos = ["a", "e", "\n"]  # so that rows end at different times
    found = together(decoder, wanted)
    assert found == alone(decoder, wanted)
    assert len({len(text) for text in found.values()}) > 2


def prompt(start, length):
    return tuple(range(start, start + length))


@pytest.mark.parametrize("features", ["base", "layer"])
def test_rows_of_the_router_stay_its_own_while_others_leave_and_join(base, tmp_path, features):
    path = write_checkpoint(tmp_path / "checkpoint", base, num_experts=3, features=features)
    setting = build(path, temperature=0, dtype="float64", attn_implementation="sdpa")._setting()
    first = [Request(prompt(20, 5), (1,), 12), Request(prompt(40, 9), (None,), 2), Request(prompt(60, 7), (2,), 12)]
    first += [Request(prompt(80, 4), (None,), 12), Request(prompt(90, 8), (None,), 12)]
    later = [Request(prompt(15, 30), (0,), 12)], [Request(prompt(30, 3), (None,), 12)]
    lonely = {request: Batch(setting, [request]) for request in (*first, *later[0], *later[1])}
    for one in lonely.values():
        one.advance(8)
    batch = Batch(setting, first)
    batch.advance(3)
    batch.shrink()
    assert [text.request for text in batch.texts] == [first[0], *first[2:]]
    for requests in later:
        joining = Batch(setting, requests)
        joining.advance(1)
        batch.join(joining)
    batch.advance(5)
    for text in batch.texts:
        expected = lonely[text.request].texts[0].tokens[: len(text.tokens)]
        assert text.tokens == expected and len(text.tokens) > 5


@pytest.mark.parametrize("longer", [0, 1])
def test_rows_with_and_without_features_join(base, tmp_path, longer):
    path = write_checkpoint(tmp_path / "checkpoint", base, num_experts=3, features="base")
    setting = build(path, temperature=0)._setting()
    requests = [Request(prompt(20, 12 if longer == 0 else 4), (1,), 8), Request(prompt(50, 12 if longer else 4), (None,), 8)]
    for order in (requests, requests[::-1]):
        lonely, (batch, other) = ([Batch(setting, [request]) for request in order] for _ in range(2))
        for one in (*lonely, batch, other):
            one.advance(1)
        batch.join(other)
        for one in (*lonely, batch):
            one.advance(6)
        assert [text.tokens for text in batch.texts] == [one.texts[0].tokens for one in lonely]


def test_penalties_see_the_tokens_of_their_row_and_not_its_padding():
    ids, mask = torch.tensor([[9, 9, 9], [4, 9, 4], [5, 6, 7]]), torch.tensor([[0, 0, 1], [1, 1, 1], [1, 1, 1]])
    scores = torch.ones(3, 12)
    twice = Penalties(GenerationConfig(no_repeat_ngram_size=2))(ids, mask, scores)
    assert [row.isinf().nonzero().flatten().tolist() for row in twice] == [[], [9], []]
    both = Penalties(GenerationConfig(no_repeat_ngram_size=2, repetition_penalty=2.0))(ids, mask, scores)
    assert [row.isinf().nonzero().flatten().tolist() for row in both] == [[], [9], []]
    assert [(row == 0.5).nonzero().flatten().tolist() for row in both] == [[9], [4], [5, 6, 7]]


@pytest.mark.parametrize("first", [3, 40])
def test_longer_or_shorter_rows_join_a_sliding_window_cache(sliding, first):
    setting = build(sliding, temperature=0, max_new_tokens=12)._setting()
    requests = [Request(tuple(range(20, 20 + length)), (None,), 12) for length in (first, 43 - first)]
    lonely = [Batch(setting, [request]) for request in requests]
    batch, other = (Batch(setting, [request]) for request in requests)
    for one in (*lonely, batch, other):
        one.advance(1)
    batch.join(other)
    for one in (*lonely, batch):
        one.advance(9)
    assert [text.tokens for text in batch.texts] == [one.texts[0].tokens for one in lonely]


def test_two_sliding_caches_keep_their_rows_in_step(sliding, tmp_path):
    path = write_checkpoint(tmp_path / "checkpoint", sliding, num_experts=3, features="base")
    wanted = [Wanted(prompt, strategy, 0) for prompt in PROMPTS for strategy in ("router", "single:2")]
    decoder = build(path, batch_size=4, temperature=0)
    decoder.eos = ["a", "e", "\n"]
    assert together(decoder, wanted) == alone(decoder, wanted)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), "llama")


def test_attention_that_cannot_be_padded_in_float64_is_not_padded(base, tmp_path):
    path = write_checkpoint(tmp_path / "checkpoint", base, num_experts=2)
    decoder = build(path, batch_size=8, temperature=0, dtype="float64")
    wanted = [Wanted(prompt, "router", 0) for prompt in PROMPTS]
    found = together(decoder, wanted)
    assert found == alone(decoder, wanted) and all(found.values())
    tokens = [Tokens(0, decoder.encode(prompt)[0].tolist(), 1) for prompt in PROMPTS]
    assert all(np.isfinite(seen.weights).all() for _, seen in observe(decoder.model, tokens, batch_size=3))


def test_rows_that_have_ended_leave_the_batch_and_others_take_their_place(base):
    decoder = build(base, batch_size=4, temperature=0, max_new_tokens=30)
    decoder.eos = ["a", "e", "\n"]
    passes = []
    decoder.model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: passes.append(output.shape[:2]))
    wanted = [Wanted(f"{PROMPTS[0]}{'#' * number}", "router", 0) for number in range(12)]
    done = list(decoder.complete_many(wanted, do_sample=False))
    rows = [rows for rows, _ in passes]
    assert max(rows) == 4
    assert sum(rows) == sum(one.tokens for one in done), "no row stays longer than its text needs"
    assert any(columns > 1 and after > rows for (rows, columns), (after, _) in pairwise(passes)), "rows join those under way"
    assert alone(decoder, wanted) == {one.wanted: one.text for one in done}


def test_large_batch_is_looked_at_every_few_tokens_and_writes_no_other_text_and_none_beyond_the_positions(tmp_path):
    base, positions = write_base(tmp_path / "base", "gpt2"), 40

    def short(dtype):
        decoder = build(base, dtype=dtype, batch_size=12, temperature=0.8, max_new_tokens=30)
        wpe = decoder.model.transformer.wpe
        wpe.weight = torch.nn.Parameter(wpe.weight[:positions])  # one more would be an error
        decoder.model.config.n_positions = positions
        decoder.eos = ["q", "\n"]
        return decoder

    decoder = short("float32")
    wanted = [Wanted("#a" * (1 + number // 2), "router", number) for number in range(24)]
    rows, ticks = [], []
    decoder.model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    done = list(decoder.complete_many(wanted, do_sample=True, tick=ticks.append))
    found = {one.wanted: one.text for one in done}
    assert max(rows) == 12 > SMALL and STEPS_BETWEEN_LOOKS > 1
    assert sum(ticks) == sum(one.tokens for one in done)
    limits = [min(30, positions - decoder.encode(one.wanted.prompt).shape[1]) for one in done]
    assert all(one.tokens <= limit for one, limit in zip(done, limits, strict=True))
    assert len({limit for one, limit in zip(done, limits, strict=True) if one.tokens == limit}) > 1
    assert_alike_but_for_rounding(found, alone(decoder, wanted), lambda: short("float64"))
    assert len(set(found.values())) == len(wanted), "each sample has its own draws"


def test_padding_is_a_token_that_the_row_has(base):
    decoder = build(base, temperature=0)
    requests = [
        Request(tuple(range(start, start + length)), (None,), 3) for start, length in ((40, 3), (60, 6), (90, 2), (20, 8))
    ]
    batch, other = Batch(decoder._setting(), requests[:3]), Batch(decoder._setting(), requests[3:])
    for one in (batch, other):
        one.advance(1)
    batch.join(other)
    for text, row, mask in zip(batch.texts, batch.ids.tolist(), batch.mask.tolist(), strict=True):
        length = sum(mask)
        assert row[-length:] == [*text.request.prompt, *text.tokens]
        assert set(row[:-length]) <= {text.request.prompt[0]} and mask == [0] * (9 - length) + [1] * length


def test_ensemble_among_others_writes_what_generate_writes(base, tmp_path):
    decoder = build(write_checkpoint(tmp_path / "checkpoint", base, num_experts=3), batch_size=8, temperature=0)
    found = together(decoder, [Wanted(prompt, strategy, 0) for prompt in PROMPTS for strategy in ("single:0", "ensemble")])
    for prompt in PROMPTS:
        ids = decoder.encode(prompt)
        written = decoder.model.generate(ids, strategy="ensemble", max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        text = found[Wanted(prompt, "ensemble", 0)]
        assert text and decoder.tokenizer.decode(written).startswith(text)
    assert any(found[Wanted(p, "ensemble", 0)] != found[Wanted(p, "single:0", 0)] for p in PROMPTS)


def test_completions_that_must_be_the_same_are_written_once(base, tmp_path):
    path = write_checkpoint(tmp_path / "checkpoint", base, num_experts=2)
    decoder = build(path, batch_size=64, temperature=0)
    rows = []
    decoder.model.causal_lm.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    wanted = [Wanted(PROMPTS[0], f"single:{i % 2}", 0, task_id=str(i)) for i in range(4)]
    wanted += [Wanted(PROMPTS[0], "round_robin", index) for index in range(4)]
    assert len(together(decoder, wanted)) == 8
    assert max(rows) == 2


def test_no_gradient_is_kept(base):
    decoder = build(base, temperature=0)
    graphs = []
    decoder.model.lm_head.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad))
    together(decoder, [Wanted(PROMPTS[0], "router", 0)])
    assert graphs and not any(graphs)


def test_penalty_for_repeated_tokens_does_not_see_the_padding(base):
    decoder = build(base, batch_size=3, temperature=0)
    wanted = [Wanted(prompt, "router", 0) for prompt in PROMPTS]
    plain = together(decoder, wanted)
    decoder.model.generation_config.repetition_penalty = 1.8
    decoder.model.generation_config.no_repeat_ngram_size = 2
    both = together(decoder, wanted)
    decoder.model.generation_config.no_repeat_ngram_size = None
    decoder.batch_size = 3
    penalised = together(decoder, wanted)
    assert plain != penalised == alone(decoder, wanted)
    decoder.model.generation_config.no_repeat_ngram_size = 2
    assert alone(decoder, wanted) == both
    ids = decoder.encode(PROMPTS[0])
    stock = decoder.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert decoder.tokenizer.decode(stock).startswith(both[wanted[0]])


def test_generation_configuration_that_a_batch_cannot_follow_is_refused(base):
    decoder = build(base, temperature=0)
    decoder.model.generation_config.num_beams = 4
    with pytest.raises(OptionError, match="num_beams=4"):
        decoder.codegen(PROMPTS[0], False, 1)


def test_rows_per_batch_are_chosen_for_the_device(base):
    decoder = build(base, batch_size=None)
    assert decoder.batch_size == DEFAULT_ROWS[decoder.device.type]


LIMITED = """
import resource, sys
import torch
from dylo_moe import PeftMoEDecoder
from dylo_moe.completions import Wanted
from dylo_moe.errors import OutOfMemory

torch.set_num_threads(1)
options = {"dtype": "float32", "temperature": 0, "max_new_tokens": 3, "batch_size": 16}
decoder = PeftMoEDecoder(sys.argv[1], "humaneval", **options)
wanted = [Wanted("a = 1\\n" * 300 + "b" * n, "router", 0) for n in range(5)]
rows = []
decoder.model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))

def texts():
    rows.clear()
    return {done.wanted: done.text for done in decoder.complete_many(wanted, do_sample=False)}

def limit(mebibytes):
    size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + mebibytes * 2**20, resource.RLIM_INFINITY))

free = texts()
all_at_once = max(rows)
limit(int(sys.argv[2]))
assert texts() == free
print("rows", all_at_once, max(rows))
limit(8)
try:
    texts()
except OutOfMemory as error:
    print("refused", error)
"""


def test_batch_that_memory_does_not_take_is_split_and_one_row_that_it_does_not_take_is_refused(base):
    # What glibc keeps of freed memory for the next row would otherwise lie below the limit: at times enough for one.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", LIMITED, str(base), "220"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    _, before, after = next(line for line in lines if line.startswith("rows")).split()
    assert 1 <= int(after) < int(before)
    assert "even alone" in next(line for line in lines if line.startswith("refused"))
