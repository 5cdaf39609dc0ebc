"""Laws of decoding: what text a decoder makes of an EvalPlus prompt.

The subject's `decoder(checkpoint, *, dataset, base_model, routing_strategy, temperature, batch_size, max_new_tokens, dtype,
force_base_prompt, instruction_prefix, response_prefix)` returns an EvalPlus DecoderBase: `codegen(prompt, do_sample,
num_samples)`, `is_direct_completion()`, `eos`, `tokenizer`, `model`. `first_sample` of codegen, and the subject's
`run_codegen(checkpoint, dataset, **options)` -> path, are judged where they exist. Every law but the first compares texts of
one decoder, in float32, on one machine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.bench import Bench
from harness.compare import assert_equal
from harness.outcome import NotApplicable, Void
from harness.specimens.tasks import TASKS, write_task_set
from harness.texts import COLD
from harness.untouched import evalplus_state
from harness.workings import Workings, workings

PROMPT = "def add(a, b):\n"
# Holds stop strings of both data sets.
BUSY_PROMPT = 'import math\n\ndef first():\n    return 1\n\nassert first() == 1\n"""\nSome text.\n"""\ndef add(a, b):\n'
NEW_TOKENS = 12
# What ends a completion in EvalPlus 0.3.1 (provider/utility.py), written down here: its own list changes while it runs.
COMMON_STOPS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
DATASET_STOPS = {
    "humaneval": ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "),
    "mbpp": ('\n"""', "\nassert"),
}
CHAT_STOP = "\n```\n"
INSTRUCTION = "Please solve this:"
RESPONSE = "Here is the solution:"


def check_greedy_equals_reference(bench: Bench) -> None:
    """Greedy, or sampled at a temperature near 0, a decoder writes the reference's tokens, cut at the first stop string.

    Reason: the decoder is where a strategy is lost: every score of upstream's `single:2` was expert 0's.
    Tolerance: none up to the first step whose two best tokens are within twice the bound on logits, or whose routing is a near
    tie; the rest is set aside, and so is `best` where two losses are as near.
    """
    w = workings(bench)
    w.need_experts()
    strategies = ["router"] * (w.reference.router is not None) + [f"single:{expert}" for expert in sorted({0, w.experts - 1})]
    strategies += ["best", "ensemble"]
    texts = {}
    for strategy, temperature in [*((name, 0.0) for name in strategies), (strategies[0], COLD)]:
        decoder = _decoder(w, routing_strategy=strategy, temperature=temperature)
        texts[strategy] = want = _reference_text(w, decoder, strategy)
        (got,) = decoder.codegen(PROMPT, do_sample=temperature > 0, num_samples=1)
        assert_equal(got[: len(want)], want, what=f"text of {strategy} at temperature {temperature:g}")
    if w.experts > 1 and texts["single:0"] == texts[f"single:{w.experts - 1}"]:
        raise Void("the first and the last expert write the same text")


def check_cut_at_earliest_stop(bench: Bench) -> None:
    """A completion ends before the earliest stop string in it, wherever that is and however it falls into tokens.

    Reason: code after a stop string belongs to another function and fails tests that the answer passes.
    Tolerance: none.
    """
    decoder = _decoder(workings(bench))
    whole = _unstopped(decoder)
    places = [(start, length) for length in (1, 4, 2) for start in range(1, len(whole) - length + 1)]
    cuts = [whole[start : start + length] for start, length in places]
    # Not half a character, and nothing that was perhaps a tab, replaced after the cut.
    cuts = [stop for stop in cuts if "\ufffd" not in stop and not (" " in stop and "    " in whole)]
    for stop in cuts[:: max(1, len(cuts) // 5)]:
        end = whole.index(stop) + len(stop)
        later = [c for c in whole[end:] if c != "\ufffd" and whole.index(c) >= end]
        decoder.eos = ["never written \0", *later[:1], stop]
        assert_equal(_greedy(decoder), whole[: whole.index(stop)], what=f"text with the stop string {stop!r}")
    if not cuts:
        raise Void("the completion has no whole characters to cut at")


def check_stops_ignore_prompt_and_history(bench: Bench) -> None:
    """Stop strings in the prompt, and prompts before it, do not change a completion, nor does the data set but by its strings.

    Reason: EvalPlus's hf decoder keeps the criteria of earlier prompts, and 362 of 378 MBPP prompts then stop at once.
    Tolerance: none.
    """
    wholes = []
    for dataset in DATASET_STOPS:
        decoder = _decoder(workings(bench), dataset=dataset)
        stops = list(decoder.eos)
        whole = _unstopped(decoder, BUSY_PROMPT)
        wholes.append(whole)
        decoder.eos = stops
        want = _cut(whole, stops)
        for prompt in ("x\n", PROMPT, BUSY_PROMPT):
            got = _greedy(decoder, prompt)
        assert_equal(got, want, what=f"text after a prompt that holds stop strings of {dataset}, the third prompt in a row")
        if not want:
            raise Void("the completion begins with a stop string")
    assert_equal(wholes[1:], wholes[:1], what="text that no string stops, as a decoder for the other data set writes it")


def check_stop_strings_of_the_data_set(bench: Bench) -> None:
    """A decoder stops at EvalPlus's strings for its own data set and kind of prompt, and at no others.

    Reason: EvalPlus's decoders extend one list for the whole process, so the second one stops at the first one's strings too.
    Tolerance: none; the order is free.
    """
    w = workings(bench)
    for dataset in (*DATASET_STOPS, *DATASET_STOPS):
        decoder = _decoder(w, dataset=dataset)
        assert_equal(sorted(decoder.eos), sorted(COMMON_STOPS + DATASET_STOPS[dataset]), what=f"stop strings of {dataset}")


def check_base_prompt_as_it_is(bench: Bench) -> None:
    """Without a chat the model is given the prompt's own tokens, whitespace at its end included.

    Reason: HumanEval's prompts end inside a function; a lost newline or indent changes what comes next.
    Tolerance: none.
    """
    decoder = _decoder(workings(bench))
    assert decoder.is_direct_completion(), "force_base_prompt=True, but is_direct_completion() is False"
    for prompt in (PROMPT, PROMPT + "    ", "\n\n  x"):
        want = decoder.tokenizer(prompt)["input_ids"]
        assert_equal(_tokens_given(decoder, prompt), list(want), what=f"tokens given to the model for {prompt!r}")


def check_chat_prompt(bench: Bench) -> None:
    """A chat model continues an assistant's turn that breaks off where the code begins, with no special token twice.

    Reason: the template's text already holds the beginning-of-text token, and EvalPlus's encode adds another.
    Tolerance: none.
    """
    w = workings(bench)
    if bench.tokenizer.chat_template is None:
        raise NotApplicable("the tokenizer has no chat template")
    decoder = _decoder(w, force_base_prompt=False, instruction_prefix=INSTRUCTION, response_prefix=RESPONSE)
    assert not decoder.is_direct_completion(), "a tokenizer with a chat template, but is_direct_completion() is True"
    given = _tokens_given(decoder, PROMPT)
    text = decoder.tokenizer.decode(given, skip_special_tokens=False)
    assert text.endswith(f"{RESPONSE}\n```python\n"), f"the model is given a text that ends with {text[-80:]!r}"
    task = f"{INSTRUCTION}\n```\n{PROMPT.strip()}\n```\n"
    assert task in text, f"the task is not in the user's turn as EvalPlus writes it: {text!r}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    template = decoder.tokenizer.apply_chat_template(turns, tokenize=False)
    bos = decoder.tokenizer.bos_token
    if bos is not None:
        assert_equal(text.count(bos), template.count(bos), what=f"{bos} in the prompt, against the template")
    assert_equal(sorted(decoder.eos), sorted((*COMMON_STOPS, CHAT_STOP)), what="stop strings of a chat")
    if w.experts:
        want = _reference_text(w, decoder, _usual_strategy(w), torch.tensor(given))
        assert_equal(_greedy(decoder)[: len(want)], want, what="text in a chat")


def check_tabs(bench: Bench) -> None:
    """Each tab in a completion becomes four spaces, as in EvalPlus.

    Reason: a completion that mixes tabs with the prompt's spaces is no Python; scores are comparable only if both do the same.
    Tolerance: none.
    """
    decoder = _decoder(workings(bench))
    tab = decoder.tokenizer.encode("\t", add_special_tokens=False)
    config = getattr(decoder.model, "generation_config", None)
    if config is None or len(tab) != 1 or decoder.tokenizer.decode(tab) != "\t":
        raise NotApplicable("the model cannot be made to write tabs")
    config.suppress_tokens = [token for token in range(bench.vocab_size) if token != tab[0]]
    assert_equal(_greedy(decoder), "    " * NEW_TOKENS, what="text of a model that writes only tabs")


def check_batch_size(bench: Bench) -> None:
    """What is sampled does not depend on how many samples are drawn together, nor on which of them have ended.

    Reason: a score must not change with the memory of the machine that computed it.
    Tolerance: none; in float32 a draw falls within rounding of a boundary about once in a million tokens.
    """
    decoders = {size: _decoder(workings(bench), batch_size=size, temperature=0.8) for size in (1, 2, 5)}
    for decoder in decoders.values():
        decoder.eos = []
    alone = _samples(decoders[1], 5)
    letters = [c for c in "".join(alone) if c.isascii() and c.isalpha()]
    if len(set(alone)) == 1 or not letters:
        raise Void("all samples are the same text, or none has a letter")
    stop = max(letters, key=lambda letter: len({text.find(letter) for text in alone}))  # at which they end apart
    for size, decoder in decoders.items():
        assert_equal(_samples(decoder, 5), alone, what=f"samples in batches of {size}, against one by one")
        decoder.eos = [stop]
        ended = [text.partition(stop)[0] for text in alone]
        assert_equal(_samples(decoder, 5), ended, what=f"samples in batches of {size} that {stop!r} ends, each at its place")


def check_number_of_samples(bench: Bench) -> None:
    """`codegen` returns as many samples as were asked for, whatever the batch size, and a continued run the rest of them.

    Reason: EvalPlus's decoder returns at most one batch, its loop does not clip what is too many, and resume starts again.
    Tolerance: none.
    """
    w = workings(bench)
    decoder = _decoder(w, batch_size=2, temperature=0.8)
    for count in (1, 2, 5):
        assert_equal(len(_samples(decoder, count)), count, what=f"samples returned for num_samples={count}")
    w.need_option(decoder.codegen, "first_sample")
    later = decoder.codegen(PROMPT, do_sample=True, num_samples=3, first_sample=2)
    assert_equal(later, _samples(decoder, 5)[2:], what="samples 2 to 4, drawn in a second run")


def check_round_robin_by_sample(bench: Bench) -> None:
    """With `round_robin` sample k is written by expert k mod E, across batches and in a continued run.

    Reason: an index that starts again with each batch or run gives some experts more samples than others.
    Tolerance: none.
    """
    w = workings(bench)
    w.need_experts(2)
    single = {e: _greedy(_decoder(w, routing_strategy=f"single:{e}")) for e in sorted({0, 1, w.experts - 1})}
    if len(set(single.values())) < len(single):
        raise Void("two of the experts write the same text")
    decoder = _decoder(w, routing_strategy="round_robin", batch_size=w.experts + 1)
    count = 2 * w.experts + 3
    got = decoder.codegen(PROMPT, do_sample=False, num_samples=count)
    known = [k for k in range(count) if k % w.experts in single]
    assert_equal([got[k] for k in known], [single[k % w.experts] for k in known], what=f"samples {known} of round_robin")
    w.need_option(decoder.codegen, "first_sample")
    got = decoder.codegen(PROMPT, do_sample=False, num_samples=2, first_sample=w.experts - 1)
    assert_equal(got, [single[w.experts - 1], single[0]], what="samples of round_robin in a continued run")


def check_greedy_needs_temperature_zero(bench: Bench) -> None:
    """Greedy decoding with a temperature, and sampling without one, are refused with a ValueError.

    Reason: EvalPlus asserts, which `python -O` removes, and then one of the two is silently ignored.
    Tolerance: none.
    """
    w = workings(bench)
    for temperature, do_sample in ((0.8, False), (0.0, True)):
        decoder = _decoder(w, temperature=temperature)
        try:
            decoder.codegen(PROMPT, do_sample=do_sample, num_samples=1)
        except ValueError:
            continue
        raise AssertionError(f"temperature {temperature} with do_sample={do_sample} was accepted, but should raise ValueError")


def check_evalplus_untouched(bench: Bench) -> None:
    """Building and running decoders changes no list and replaces no function of EvalPlus.

    Reason: whatever else the process evaluates would then be evaluated otherwise.
    Tolerance: none.
    """
    before = evalplus_state()
    for dataset in DATASET_STOPS:
        _greedy(_decoder(workings(bench), dataset=dataset))
    after = evalplus_state()
    assert_equal(after.pop("lists"), before.pop("lists"), what="lists of EvalPlus")
    changed = sorted(name for name in before if after.get(name) is not before[name])
    assert_equal(changed, [], what="functions of EvalPlus that were replaced")


def check_sample_files_never_mix(bench: Bench) -> None:
    """Runs that differ in strategy, in one directory, leave each its own file, and each file stays as it was.

    Reason: EvalPlus names the file by model and temperature and resumes it, so the second run returns the first one's samples.
    Tolerance: none.
    """
    w = workings(bench)
    w.need_experts(2)
    bench.tokenizer  # noqa: B018  (not applicable without one)
    run = w.need_method(bench.subject, "run_codegen")
    if bench.assume:
        raise NotApplicable("a decoder cannot be told what the files do not record")
    with tempfile.TemporaryDirectory(prefix="samples-") as root:
        tasks = write_task_set(Path(root), "humaneval", TASKS[:2])
        with _environment("HUMANEVAL_OVERRIDE_PATH", str(tasks)):
            _compare_runs(w, run, root)


def _compare_runs(w: Workings, run: Any, root: str) -> None:
    __tracebackhide__ = True
    options = {"root": root, "greedy": True, "dtype": "float32", "max_new_tokens": NEW_TOKENS, "base_model": w.bench.base_model}
    strategies = ("single:0", f"single:{w.experts - 1}")
    paths = [Path(run(w.bench.checkpoint, "humaneval", routing_strategy=s, **options)) for s in strategies]
    assert len(set(paths)) == 2, f"both strategies write {paths[0].name}"
    first, second = (path.read_bytes() for path in paths)
    again = Path(run(w.bench.checkpoint, "humaneval", routing_strategy=strategies[0], **options))
    assert_equal(again, paths[0], what="file of the same run, once more")
    assert_equal(paths[0].read_bytes() == first and paths[1].read_bytes() == second, True, what="files unchanged by a third run")
    assert_equal(first.count(b"\n"), 2, what="samples in the first file")


def _decoder(w: Workings, **options: Any) -> Any:
    """The subject's decoder, greedy, on the bare prompt, in float32, unless options say otherwise."""
    make = w.need_method(w.bench.subject, "decoder")
    if w.bench.assume:
        raise NotApplicable("a decoder cannot be told what the files do not record")
    w.bench.tokenizer  # noqa: B018  (not applicable without one)
    usual = {
        "dataset": "humaneval",
        "base_model": w.bench.base_model,
        "routing_strategy": _usual_strategy(w),
        "temperature": 0.0,
        "batch_size": 1,
        "max_new_tokens": NEW_TOKENS,
        "dtype": "float32",
        "force_base_prompt": True,
    }
    return make(w.bench.checkpoint, **{**usual, **options})


def _usual_strategy(w: Workings) -> str:
    return "router" if w.experts == 0 or w.reference.router is not None else "ensemble"


def _greedy(decoder: Any, prompt: str = PROMPT) -> str:
    (text,) = decoder.codegen(prompt, do_sample=False, num_samples=1)
    return text


def _samples(decoder: Any, count: int) -> list[str]:
    return decoder.codegen(PROMPT, do_sample=True, num_samples=count)


def _unstopped(decoder: Any, prompt: str = PROMPT) -> str:
    """The greedy completion with no stop strings at all; Void where it is too short to cut."""
    decoder.eos = []
    text = _greedy(decoder, prompt)
    if len(text) < 6:
        raise Void(f"a completion of {len(text)} characters leaves nothing to cut")
    return text


def _cut(text: str, stops: list[str]) -> str:
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def _reference_text(w: Workings, decoder: Any, strategy: str, ids: Tensor | None = None) -> str:
    """The reference's greedy text up to the first near tie, cut as the decoder has to; after the bare prompt, or ids (P,)."""
    ids = torch.tensor(decoder.tokenizer(PROMPT)["input_ids"]) if ids is None else ids
    tokens, scores = w.reference.greedy(ids, NEW_TOKENS, _scores(w, strategy, ids))
    ranked = np.sort(scores, axis=-1)
    tied = ranked[:, -1] - ranked[:, -2] <= 2 * w.bound
    if strategy == "router":
        routed = torch.cat([ids, torch.tensor(tokens)])[None, :-1]
        tied |= np.logical_or.accumulate(w.near_tie(routed, None)[0])[len(ids) - 1 :]
    if strategy == "best" and w.experts > 1:
        lowest, second = np.sort(w.reference.expert_losses(ids))[:2]
        tied |= second - lowest <= 2 * w.bound
    near = np.flatnonzero(tied)
    tokens = tokens[: near[0]] if len(near) else tokens
    end = w.model.config.eos_token_id
    ends = {*(end if isinstance(end, list) else [end]), decoder.tokenizer.eos_token_id}
    tokens = tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
    w.bench.evidence(**{f"tokens_compared_{strategy}": len(tokens)})
    if not tokens and strategy.startswith("single"):
        raise Void("the first token is a near tie, or ends the text")
    text = decoder.tokenizer.decode(tokens, skip_special_tokens=True)
    return _cut(text, list(decoder.eos)).replace("\t", "    ").rstrip("\ufffd")


def _scores(w: Workings, strategy: str, prompt: Tensor) -> Callable[[Tensor], np.ndarray]:
    """What the reference scores the next token by, under a strategy."""
    if strategy == "ensemble":
        return w.reference.ensemble_probabilities
    expert = int(strategy.partition(":")[2]) if ":" in strategy else None
    if strategy == "best":
        expert = int(w.reference.expert_losses(prompt).argmin())
    return lambda so_far: w.reference.logits(so_far[None], expert_id=expert)[0, -1]


def _tokens_given(decoder: Any, prompt: str) -> list[int]:
    """The token ids of the first pass that `codegen` runs, as the model's first embedding sees them."""
    seen: list[Tensor] = []
    embedding = next((m for m in decoder.model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise NotApplicable("the decoder's model has no embedding to look at")
    handle = embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().cpu()))
    try:
        _greedy(decoder, prompt)
    finally:
        handle.remove()
    return seen[0][0].tolist()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable for as long as the block runs."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
