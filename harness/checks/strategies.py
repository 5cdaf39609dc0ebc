"""Laws of generation: what each routing strategy writes.

Greedy texts are compared token for token with texts that the float64 reference writes without a cache. At a first difference the
two candidates' logits must be a near tie, in the subject's own pass and in the reference's: within twice the bound on logits.
P prompt tokens, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from harness.bench import Bench
from harness.compare import assert_equal, assert_within
from harness.oracles import strategies
from harness.outcome import NotApplicable, Void
from harness.texts import NEW_TOKENS, generating, greedily, next_logits, same_text
from harness.workings import Workings

SAMPLES = 1000
FEW = 8  # experts; an ensemble of more costs as many passes for every token, so fewer prompts are asked
FALSE_ALARM = 1e-6  # of the one statistical check, per run
ILLEGAL = ("single:{experts}", "single:-1", "single:x", "single:", "nonsense", "")


def check_single_equals_stock_peft(bench: Bench) -> None:
    """`single:<i>` writes what stock PEFT writes with adapter i, token for token.

    Reason: upstream's `single:2` ran expert 0, because generate() routed again.
    Tolerance: none but a near tie; both are given the same options.
    """
    w = generating(bench)
    for expert in sorted({0, w.experts // 2, w.experts - 1}):
        peft = w.peft(expert)
        for prompt in bench.prompts[:2]:
            want = peft.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], **greedily(w))
            got = _generate(w, prompt, strategy=f"single:{expert}")
            same_text(w, got, want[0, len(prompt) :].tolist(), prompt, lambda ids, e=expert: _single(w, ids, e))
    _need_different_texts(w, bench.prompts[0])


def check_router_equals_recompute(bench: Bench) -> None:
    """`router` writes what the reference writes by recomputing every token, with the router in charge of each.

    Reason: upstream chose one expert for the whole text from a mean over the prompt; a stale cache looks the same.
    Tolerance: none but a near tie, of logits or of the routing.
    """
    w = generating(bench, "router")
    w.need_router()
    for prompt in bench.prompts:
        want, _ = w.reference.greedy(prompt, NEW_TOKENS)
        got = _generate(w, prompt, strategy="router")
        whole = torch.cat([prompt.cpu(), torch.tensor(want)])[None]
        if not w.near_tie(whole, None).any():
            same_text(w, got, want, prompt, lambda ids: w.reference.logits(ids[None])[0, -1])
    routed = w.reference.greedy(bench.prompts[0], NEW_TOKENS)[0]
    if w.experts > 1 and all(routed == _text_of(w, bench.prompts[0], expert) for expert in range(w.experts)):
        raise Void("every expert alone writes what the router writes")


def check_best_is_lowest_prompt_loss(bench: Bench) -> None:
    """`best` writes with the expert whose own pass has the lowest loss on the prompt, chosen for each prompt.

    Reason: taking the router's favourite, or a loss under the sum of experts, is not this.
    Tolerance: losses nearer than the bound on logits are a tie and the prompt is set aside; texts as above.
    """
    w = generating(bench, "best")
    chosen, decided = [], 0
    for prompt in bench.prompts:
        losses = w.reference.expert_losses(prompt)
        best = strategies.best_expert(losses)
        chosen.append(best)
        if _tied(w, losses):
            continue
        decided += 1
        _same_as_expert(w, _generate(w, prompt, strategy="best"), prompt, best)
    bench.evidence(best_experts=chosen, prompts_decided=decided)
    if not decided:
        raise Void("every prompt's losses are tied")
    _need_different_texts(w, bench.prompts[0])


def check_ensemble_equals_mixture(bench: Bench) -> None:
    """`ensemble` takes the most likely token of the mean of the experts' next-token distributions.

    Reason: averaging logits, or routing once more, gives other texts; upstream's `ensemble` was its router.
    Tolerance: none but a near tie of probabilities, within twice what the bound on logits can move one.
    """
    w = generating(bench, "ensemble")
    for prompt in bench.prompts if w.experts <= FEW else bench.prompts[:1]:
        want, _ = w.reference.greedy(prompt, NEW_TOKENS, w.reference.ensemble_probabilities)
        same_text(w, _generate(w, prompt, strategy="ensemble"), want, prompt, w.reference.ensemble_probabilities)
    _need_different_texts(w, bench.prompts[0])


def check_ensemble_samples_mixture(bench: Bench) -> None:
    """Sampled, `ensemble` draws the next token from the mean of the experts' next-token distributions.

    Reason: greedy texts can agree where the distributions do not; averaged logits sharpen the distribution.
    Tolerance: Hoeffding's bound on the shares of the likeliest tokens, over all of them, at a false-alarm rate of 1e-6;
    the smallest share that is surely detected is twice that, and is in the evidence.
    """
    w = generating(bench, "ensemble")
    prompt = bench.prompts[3]
    torch.manual_seed(bench.seed)
    options = {"do_sample": True, "num_return_sequences": SAMPLES, "max_new_tokens": 1, "pad_token_id": 0}
    options |= _plain_sampling(w)
    rows = w.model.generate(prompt[None], torch.ones_like(prompt)[None], strategy="ensemble", **options)
    want = w.reference.ensemble_probabilities(prompt)
    likeliest = np.argsort(-want)[:20]
    shares = np.bincount(rows[:, len(prompt)].cpu().numpy(), minlength=len(want)) / len(rows)
    allowed = math.sqrt(math.log(2 * len(likeliest) / FALSE_ALARM) / (2 * len(rows)))
    bench.evidence(samples=len(rows), minimum_detectable_effect=2 * allowed, false_alarm_rate=FALSE_ALARM)
    assert_within(shares[likeliest], want[likeliest], allowed, what="share of the likeliest tokens")


def check_round_robin(bench: Bench) -> None:
    """`round_robin` writes sample k with expert k mod E, also when it resumes from a later sample.

    Reason: a resumed run that starts again at expert 0 gives some experts more samples than others, and another pass@k.
    Tolerance: none but a near tie.
    """
    w = generating(bench, "round_robin")
    w.need_option(w.model.generate, "first_sample")
    for first in (0, w.experts + 1):
        ids, mask = bench.batch("left")
        rows = w.model.generate(ids, mask, strategy="round_robin", first_sample=first, **greedily(w))
        for row, prompt in enumerate(bench.prompts):
            expert = strategies.round_robin_expert(first + row, w.experts)
            _same_as_expert(w, rows[row, ids.shape[1] :].tolist(), prompt, expert)
    _need_different_texts(w, bench.prompts[0])


def check_base_is_model_without_adapters(bench: Bench) -> None:
    """`base` writes what the base model writes with every adapter off, the shared one too, token for token.

    Reason: against a base that keeps an adapter on, every gain looks smaller than it is.
    Tolerance: none but a near tie.
    """
    w = generating(bench, "base")
    same = 0
    for prompt in bench.prompts[:2]:
        want, _ = w.reference.greedy(prompt, NEW_TOKENS, partial(_base_logits, w))
        try:
            got = _generate(w, prompt, strategy="base")
        except ValueError as error:
            raise NotApplicable("the subject has no strategy base") from error
        same_text(w, got, want, prompt, partial(_base_logits, w))
        same += want == _text_of(w, prompt, 0)
    if same == 2:
        raise Void("expert 0 writes what the base model writes")


def _base_logits(w: Workings, ids: Tensor) -> np.ndarray:
    """The base model's logits after a text, (V,)."""
    return w.reference.base_logits(ids[None])[0, -1]


def check_one_expert_all_agree(bench: Bench) -> None:
    """With one expert every strategy writes the same text.

    Reason: the degenerate case in which all definitions meet (megablocks tests its mixture so).
    Tolerance: none but a near tie.
    """
    w = generating(bench)
    router = w.permuted_router([0])
    model = w.load(w.variant(w.reference.experts[:1], router))
    prompt = bench.prompts[0]
    legal = ["single:0", *(name for name in ("best", "ensemble", "round_robin") if w.can(name))]
    legal += ["router"] if router is not None and router.sums_to_one else []
    for strategy in legal:
        rows = model.generate(prompt[None], torch.ones_like(prompt)[None], strategy=strategy, **greedily(w))
        _same_as_expert(w, rows[0, len(prompt) :].tolist(), prompt, 0)


def check_illegal_strategies_refused(bench: Bench) -> None:
    """A strategy that does not exist is refused with a ValueError that names the legal ones.

    Reason: a typing error that falls back to some default scores another model than the one asked for.
    Tolerance: none.
    """
    w = generating(bench)
    prompt = bench.prompts[3]
    names = [name for name in ("single", "best", "ensemble", "round_robin", "router") if w.can(name)]
    names = names if w.reference.router else [name for name in names if name != "router"]
    for pattern in ILLEGAL:
        strategy = pattern.format(experts=w.experts)
        refusal = _refusal(w, prompt, strategy)
        unnamed = [legal for legal in names if legal not in refusal]
        assert_equal(unnamed, [], what=f"legal strategies not named in the refusal of {strategy!r}: {refusal!r}")


def check_batch_equals_rows(bench: Bench) -> None:
    """Each row of a padded batch gets the text that its prompt gets alone, by `router`, `best` and `ensemble`.

    Reason: EvalPlus scores depended on the batch size wherever padding reached the router or the positions.
    Tolerance: none but a near tie, of logits, of the routing or of the losses that `best` compares.
    """
    w = generating(bench)
    strategies_here = ["router"] if w.reference.router and not w.sees_whole_batch else []
    strategies_here += ["best", "ensemble"] if w.experts <= FEW else ["best"]
    for strategy in filter(w.can, strategies_here):
        _compare_batch(w, strategy)


def _compare_batch(w: Workings, strategy: str) -> None:
    __tracebackhide__ = True
    ids, mask = w.bench.batch("left")
    rows = w.model.generate(ids, mask, strategy=strategy, **greedily(w))
    for row, prompt in enumerate(w.bench.prompts):
        want = _generate(w, prompt, strategy=strategy)
        losses = w.reference.expert_losses(prompt) if strategy == "best" else np.zeros(0)
        if strategy == "best" and _tied(w, losses):
            continue
        if strategy == "router" and w.near_tie(torch.cat([prompt.cpu(), torch.tensor(want)])[None], None).any():
            continue
        expert = strategies.best_expert(losses) if strategy == "best" else None
        score = w.reference.ensemble_probabilities if strategy == "ensemble" else partial(next_logits, w, expert)
        same_text(w, rows[row, ids.shape[1] :].tolist(), want, prompt, score)


def _tied(w: Workings, losses: np.ndarray) -> bool:
    """Whether rounding could change which of the experts' losses is lowest."""
    return w.experts > 1 and np.partition(losses, 1)[1] - losses.min() <= 2 * w.bound


def check_beam_search_equals_stock_peft(bench: Bench) -> None:
    """Beam search with one expert is stock PEFT's beam search with that adapter.

    Reason: beams reorder the cache; a second cache that is not reordered with it belongs to other beams.
    Tolerance: none but a tie of the beams: the scores of the two texts may differ by the bound on logits per token.
    """
    w = generating(bench)
    w.need_option(w.model.generate, "num_beams")
    expert, prompt = w.experts - 1, bench.prompts[1]
    options = {**greedily(w), "num_beams": 3}
    want = w.peft(expert).generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
    got = _generate(w, prompt, strategy=f"single:{expert}", num_beams=3)
    if got != want[0, len(prompt) :].tolist():
        scores = [_text_score(w, prompt, text, expert) for text in (got, want[0, len(prompt) :].tolist())]
        assert_within(scores[0], scores[1], 2 * NEW_TOKENS * w.bound, what="log-probability of the beam's text")
    if w.reference.router is not None:
        _compare_routed_beams(w)


def _compare_routed_beams(w: Workings) -> None:
    """Routed beams, with the cache and without it, must write the same, after every prompt: some beams never change places."""
    __tracebackhide__ = True
    options = {"strategy": "router", "num_beams": 4, "max_new_tokens": NEW_TOKENS + 2}
    for prompt in w.bench.prompts:
        texts = [_generate(w, prompt, use_cache=use, **options) for use in (True, False)]
        routed = [torch.cat([prompt.cpu(), torch.tensor(text)])[None] for text in texts]
        if texts[0] == texts[1] or any(w.near_tie(ids, None).any() for ids in routed):
            continue
        scores = [_text_score(w, prompt, text, None) for text in texts]
        what = f"log-probability of the routed beams' text after {len(prompt)} tokens, cached and recomputed"
        assert_within(scores[0], scores[1], 2 * len(texts[0]) * w.bound, what=what)


def _plain_sampling(w: Workings) -> dict[str, object]:
    """Switches off every warper of transformers; the naive loop has none to switch off."""
    try:
        w.need_option(w.model.generate, "top_k")
    except NotApplicable:
        return {}
    return {"top_k": 0, "top_p": 1.0, "temperature": 1.0}


def _generate(w: Workings, prompt: Tensor, **options: object) -> list[int]:
    rows = w.model.generate(prompt[None], torch.ones_like(prompt)[None], **{**greedily(w), **options})
    return rows[0, len(prompt) :].tolist()


def _single(w: Workings, ids: Tensor, expert: int) -> np.ndarray:
    return w.reference.logits(ids[None], expert_id=expert)[0, -1]


def _same_as_expert(w: Workings, got: list[int], prompt: Tensor, expert: int) -> None:
    __tracebackhide__ = True
    want = _text_of(w, prompt, expert)
    same_text(w, got, want, prompt, lambda ids: _single(w, ids, expert))


def _need_different_texts(w: Workings, prompt: Tensor) -> None:
    """Void unless two experts write different texts after this prompt: otherwise any expert would have passed."""
    if w.experts == 1:
        return
    first = _text_of(w, prompt, 0)
    if all(_text_of(w, prompt, expert) == first for expert in range(1, w.experts)):
        raise Void("all experts write the same text")


def _text_of(w: Workings, prompt: Tensor, expert: int) -> list[int]:
    return w.reference.greedy(prompt, NEW_TOKENS, lambda ids: _single(w, ids, expert))[0]


def _refusal(w: Workings, prompt: Tensor, strategy: str) -> str:
    try:
        w.model.generate(prompt[None], torch.ones_like(prompt)[None], strategy=strategy, **greedily(w))
    except ValueError as error:
        return str(error)
    raise AssertionError(f"strategy {strategy!r} was accepted, but should raise ValueError")


def _text_score(w: Workings, prompt: Tensor, text: list[int], expert: int | None) -> float:
    ids = torch.cat([prompt.cpu(), torch.tensor(text)])
    logits = torch.from_numpy(w.reference.logits(ids[None], expert_id=expert)[0])
    steps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    return float(steps.gather(1, ids[len(prompt) :, None]).sum())
