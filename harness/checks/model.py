"""Laws of the routed model as a whole: what its forward pass may and may not depend on.

Unless said otherwise logits may be off by twice the naive loop's own largest error against float64, measured on the same inputs
with weights given from outside. Where the router decides, tokens near a tie, and what follows them, are set aside, and what a
rule makes of its scores' errors beyond a softmax is added (Workings.routed_bound).
B rows, S tokens, E experts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from harness.bench import Bench
from harness.compare import as_float64, assert_bitwise, assert_within
from harness.outcome import NotApplicable, Void
from harness.workings import Workings, workings


def check_routing_is_applied(bench: Bench) -> None:
    """Every choice of weights gives the logits that the reference gives for it: each expert alone, mixtures, none.

    Reason: stock PEFT ignores routing weights without an error and returns the plain sum of all experts.
    Tolerance: twice the naive loop's error; void unless the choices differ by 100 times that.
    """
    w = workings(bench)
    w.need_experts()
    by_layer = torch.stack([w.dense.roll(index, dims=1) for index in range(len(w.reference.unit_names))], dim=2)
    choices = {"no expert": torch.zeros_like(w.dense), "a mixture": w.dense}
    if not w.reference.artifact.versioned:  # a module that is in no layer has no weights of a layer
        choices["a mixture for each layer"] = by_layer
    for what, weights in choices.items():
        try:
            got = w.ask(w.model, routing_weights=weights)
        except ValueError as refusal:
            if weights.dim() < by_layer.dim():
                raise
            bench.evidence(weights_for_each_layer=f"refused: {refusal}")  # a subject need not take them, if it says so
            continue
        w.same_logits(got, w.reference.logits(w.ids, w.mask, weights=weights), what)
    for expert in range(min(w.experts, 4)):
        want = w.reference.logits(w.ids, w.mask, expert_id=expert)
        w.same_logits(w.ask(w.model, routing_weights=_one_hot(w, expert)), want, f"expert {expert} alone")


def check_router_equals_oracle(bench: Bench) -> None:
    """The routing weights are those of the float64 router on the features that the checkpoint names.

    Reason: softmax before top-k, weights not renormalised, the wrong token or the wrong features all route plausibly.
    Tolerance: what twice the naive loop's error in the router's scores can move a weight by, and two roundings. A softmax moves
    by at most half of what its logits move by (its Jacobian's rows sum to at most 1/2); temperatures and thresholds change that.
    """
    w = workings(bench)
    w.need_router()
    w.ask(w.model, w.ids.flip(0), w.mask.flip(0))  # so that weights of the pass before are seen to be others
    w.ask(w.model)
    got = as_float64(w.used_weights(w.model))
    want, bound = w.routing_weights_like(got)
    used = want[w.decided].reshape(-1, w.experts)
    spread = 1.0 if w.experts == 1 else float(np.ptp(used, axis=0).max())
    assert_within(got[w.decided], want[w.decided], bound[w.decided], effect=spread, what="routing weights")


def check_routed_logits_equal_reference(bench: Bench) -> None:
    """With the router in charge, the logits are the reference's.

    Reason: weights and layers can each be right and still be joined wrongly: late by a token, shared between rows.
    Tolerance: twice the naive loop's error.
    """
    w = workings(bench)
    w.need_router()
    w.same_logits(w.subject_logits, w.reference_logits, "routed logits", where=w.decided, bound=w.routed_bound)


def check_causal(bench: Bench) -> None:
    """Logits at a token do not depend on the tokens after it.

    Reason: a router that pools over the sequence lets the future choose the experts; such a model cannot decode.
    Tolerance: twice the naive loop's error for each of the two passes.
    """
    w = workings(bench)
    w.need_experts()
    w.need_tokens_alone()
    changed = w.ids.clone()
    changed[:, -3:] = (changed[:, -3:] + 17) % bench.vocab_size
    before, after = as_float64(w.subject_logits), as_float64(w.ask(w.model, changed, w.mask))
    past = w.decided.copy()
    past[:, -3:] = False
    moved = float(np.abs(after - before)[:, -3:].max())
    assert_within(after[past], before[past], 2 * w.routed_bound, effect=moved, what="logits of the tokens before the change")


def check_history_independent(bench: Bench) -> None:
    """An answer does not depend on what was asked before: the first call after loading equals a later one, bitwise.

    Reason: DyLoRA-MoE's first forward routed on other features than its second, and generate() depended on the call before it.
    Tolerance: none; the same operations on the same numbers.
    """
    w = workings(bench)
    w.need_experts()
    model = w.load()
    first = w.ask(model)
    ids, mask = w.ids.flip(0)[:2], w.mask.flip(0)[:2]
    w.ask(model, ids, mask, routing_weights=w.dense[:2])
    w.ask(model, ids, mask, expert_id=w.experts - 1)
    w.ask(model, ids, mask)
    if callable(getattr(model, "generate", None)):
        for strategy in ["ensemble"] * w.can("ensemble") + [f"single:{w.experts - 1}"]:
            model.generate(ids, mask, strategy=strategy, do_sample=False, max_new_tokens=2, pad_token_id=0)
    assert_bitwise(w.ask(model), first, what="logits of the same input, asked first and asked last")


def check_deterministic(bench: Bench) -> None:
    """Two calls with the same input give the same logits, bitwise.

    Reason: MixLoRA's dropout stays active at inference, so its logits differ by 0.97 between two calls.
    Tolerance: none.
    """
    w = workings(bench)
    w.need_experts()
    assert_bitwise(w.ask(w.model, routing_weights=w.dense), w.ask(w.model, routing_weights=w.dense), what="given weights")
    assert_bitwise(w.ask(w.model), w.subject_logits, what="logits")


def check_rows_independent(bench: Bench) -> None:
    """A row in a batch gives what it gives alone.

    Reason: routing that averages over the batch makes a score depend on the batch size.
    Tolerance: twice the naive loop's error for each of the two passes.
    """
    w = workings(bench)
    w.need_experts()
    w.need_tokens_alone()
    for row, prompt in enumerate(bench.prompts):
        alone = w.ask(w.model, prompt[None], torch.ones_like(prompt)[None])[0]
        together, where = w.subject_logits[row, -len(prompt) :], w.decided[row, -len(prompt) :]
        if where.any():
            assert_within(
                alone[where], together[where], 2 * w.routed_bound, effect=w.effect, what=f"row {row} alone and in the batch"
            )


def check_padding_side_invariant(bench: Bench) -> None:
    """Padding on the right gives what padding on the left gives.

    Reason: positions counted from the padding, or a router fed with it, make an answer depend on the batch.
    Tolerance: twice the naive loop's error for each of the two passes.
    """
    w = workings(bench)
    w.need_experts()
    w.need_tokens_alone()
    ids, mask = w.batch("right")
    right = w.ask(w.model, ids, mask)[mask.bool()]
    left, where = w.subject_logits[w.mask.bool()], w.decided[w.valid]
    assert_within(right[where], left[where], 2 * w.routed_bound, effect=w.effect, what="logits under right and left padding")


def check_cached_decode_equals_recompute(bench: Bench) -> None:
    """Feeding tokens with the cache, one by one and a few together, gives the logits of the whole sequence at once.

    Reason: a router with a pass of its own needs a cache of its own; PEFT's X-LoRA appends both to one, off by 0.15.
    Tolerance: twice the naive loop's error for each of the two.
    """
    w = workings(bench)
    w.need_experts()
    w.need_cache()
    w.need_option(w.model.forward, "past_key_values")
    pieces, cache = [], None
    length = w.ids.shape[1]
    for start, end in itertools.pairwise((0, length - 6, length - 5, length - 4, length - 1, length)):
        with torch.no_grad():
            step = w.model(w.ids[:, start:end], w.mask[:, :end], past_key_values=cache, use_cache=True, **w.default_routing)
        cache = step.past_key_values
        pieces.append(step.logits)
    got = as_float64(torch.cat(pieces, dim=1))
    assert_within(
        got[w.decided], as_float64(w.subject_logits)[w.decided], 2 * w.routed_bound, effect=w.effect, what="decoded logits"
    )


def check_expert_id_equals_one_hot(bench: Bench) -> None:
    """`expert_id=i` is the one-hot weight of expert i, and one id per row gives each row its own expert.

    Reason: upstream's `single:2` ran expert 0.
    Tolerance: twice the naive loop's error.
    """
    w = workings(bench)
    w.need_experts()
    w.need_option(w.model.forward, "expert_id")
    for expert in {0, w.experts - 1}:
        want = w.reference.logits(w.ids, w.mask, expert_id=expert)
        w.same_logits(w.ask(w.model, expert_id=expert), want, f"expert_id={expert}")
    ids = torch.arange(len(w.ids), device=w.ids.device) % w.experts
    want = w.reference.logits(w.ids, w.mask, expert_id=ids)
    w.same_logits(w.ask(w.model, expert_id=ids), want, f"expert_id={ids.tolist()}")


def check_one_expert_equals_peft(bench: Bench) -> None:
    """A mixture of one expert is that adapter in stock PEFT, whatever the router says, where its weights sum to 1.

    Reason: softmax over one logit is 1, so nothing else may remain of the mixture.
    Tolerance: twice the naive loop's error for each of the two.
    """
    w = workings(bench)
    w.need_experts()
    router = w.permuted_router([0])
    if router is not None and not router.sums_to_one:
        raise NotApplicable("this router gives a single expert another weight than 1")
    model = w.load(w.variant(w.reference.experts[:1], router))
    with torch.no_grad():
        want = w.peft(0)(**_plain_inputs(w)).logits
    got = w.ask(model)
    w.same_logits(got, want, "one expert", twice=True)


def check_permutation(bench: Bench) -> None:
    """Permuting the experts on disk together with the router's rows changes no logits.

    Reason: names sorted as text put expert_10 before expert_2, so that the router's columns fit other experts after a reload.
    Tolerance: twice the naive loop's error for each of the two.
    """
    w = workings(bench)
    w.need_experts(2)
    w.need_router()
    order = np.roll(np.arange(w.experts), 1).tolist()
    model = w.load(w.variant([w.reference.experts[e] for e in order], w.permuted_router(order)))
    got = as_float64(w.ask(model))
    assert_within(got[w.decided], as_float64(w.subject_logits)[w.decided], 2 * w.routed_bound, effect=w.effect, what="logits")


def check_two_models_share_nothing(bench: Bench) -> None:
    """Another model of the same kind, loaded and used between two calls, changes nothing.

    Reason: state in a class or a module (a registry of hooks, a current-weights global) mixes up models in one process.
    Tolerance: none.
    """
    w = workings(bench)
    w.need_experts()
    before = w.ask(w.model)
    experts = w.reference.experts[::-1][: max(1, w.experts - 1)]
    other = w.load(w.variant_for_weights(experts))
    theirs = w.ask(other, expert_id=0)
    if w.experts > 1 and w.is_any_order_possible:  # and one with another router of the same shape
        order = range(w.experts)[::-1]
        w.ask(w.load(w.variant([w.reference.experts[e] for e in order], w.permuted_router(order))), **w.default_routing)
    assert_bitwise(w.ask(w.model), before, what="logits before and after using another model")
    assert_bitwise(w.ask(other, expert_id=0), theirs, what="the other model's logits")


def check_deepcopy_independent(bench: Bench) -> None:
    """A deep copy answers bitwise the same, and changing its experts or its router leaves the original alone.

    Reason: hooks and shared contexts are copied by reference; a trainer's best-model copy then follows the model in training.
    Tolerance: none.
    """
    w = workings(bench)
    w.need_experts()
    before = w.ask(w.model, routing_weights=w.dense)
    twin = copy.deepcopy(w.model)
    assert_bitwise(w.ask(twin, routing_weights=w.dense), before, what="logits of the copy")
    layer = next(iter(w.need_method(twin, "routed_layers")().values()))
    with torch.no_grad():
        next(iter(layer.lora_B.values())).weight.mul_(3)
    changed = w.ask(twin, routing_weights=w.dense)
    if torch.equal(changed, before):
        raise Void("tripling an expert in the copy did not change the copy")
    assert_bitwise(w.ask(w.model, routing_weights=w.dense), before, what="logits of the original after changing the copy")
    if w.reference.router is not None:
        routed = w.ask(w.model)
        with torch.no_grad():
            for parameter in getattr(twin, "router", twin).parameters():
                parameter.mul_(-1)
        assert_bitwise(w.ask(w.model), routed, what="routed logits of the original after changing the copy's router")


def check_dtype_move(bench: Bench) -> None:
    """Moving to float64 and back changes no bit; in float64 the logits are the reference's; in bfloat16 it still runs.

    Reason: weights, scalings or buffers kept aside do not follow `.to()`.
    Tolerance: none for the way back; twice the naive float32 loop's error for float64.
    """
    w = workings(bench)
    w.need_experts()
    model = w.load(dtype="float32")
    before = w.ask(model, routing_weights=w.dense)
    model.to(torch.float64)
    right_ids, right_mask = w.batch("right")  # eager attention has no finite softmax for a row of padding in float64
    want = w.reference.logits(right_ids, right_mask, weights=w.dense.double())
    wide = w.ask(model, right_ids, right_mask, routing_weights=w.dense.double())
    where = right_mask.cpu().numpy().astype(bool)
    w.same_logits(wide, want, "float64", where=where)
    model.to(torch.float32)
    assert_bitwise(w.ask(model, routing_weights=w.dense), before, what="logits after float64 and back")
    model.to(torch.bfloat16)
    narrow = w.ask(model, routing_weights=w.dense)
    for logits in (narrow, w.ask(model)):
        if logits.dtype != torch.bfloat16 or not torch.isfinite(logits[w.mask.bool()]).all():
            raise AssertionError(f"after .to(bfloat16) the logits are {logits.dtype} and finite: {torch.isfinite(logits).all()}")


def check_save_load_bitwise(bench: Bench) -> None:
    """Saving and loading gives the same logits, routing weights and training loss, bitwise.

    Reason: PEFT 0.20 and 0.21 lose a layer of an X-LoRA classifier; upstream saved empty experts after generate().
    Tolerance: none; tensors are copied.
    """
    w = workings(bench)
    w.need_experts()
    save = w.need_method(w.model, "save_pretrained")
    directory = w.empty_directory("saved-")
    save(directory)
    again = w.load(directory)
    assert_bitwise(w.ask(again, routing_weights=w.dense), w.ask(w.model, routing_weights=w.dense), what="given weights")
    last = w.experts - 1
    assert_bitwise(w.ask(again, expert_id=last), w.ask(w.model, expert_id=last), what=f"expert_id={last}")
    if w.reference.router is not None:
        assert_bitwise(w.ask(again), w.subject_logits, what="routed logits")
        assert_bitwise(w.used_weights(again), _asked_weights(w), what="routing weights")
        for got, want, what in zip(_training_step(w, again), _training_step(w, w.load()), ("weights", "loss"), strict=True):
            assert_bitwise(got, want, what=f"{what} while training")


def check_detach_restores_base(bench: Bench) -> None:
    """After detaching, no hook is left, and parameters and logits are bitwise those of a base that was never routed.

    Reason: PEFT's mixed-adapter hooks accumulate (peft #2761); a forgotten hook changes a model that nobody routes any more.
    Tolerance: none.
    """
    from harness.artifact import load_base

    w = workings(bench)
    w.need_experts()
    detach = w.need_method(bench.subject, "detach")
    if any(getattr(expert, "biases", None) for expert in w.reference.experts):
        raise NotApplicable("experts have biases of their own, which no PEFT model could keep apart: detaching is refused")
    if w.reference.artifact.versioned:
        raise NotApplicable("experts have modules of their own, and PEFT's unload() leaves the active expert's in the base")
    model = w.load()
    w.ask(model)
    restored = detach(model)
    untouched = load_base(w.reference.artifact, w.dtype).to(bench.device)
    left = [name for name, module in restored.named_modules() if any(not _is_transformers_own(hook) for hook in _hooks(module))]
    if left:
        raise AssertionError(f"hooks left behind on {left[:3]}")
    want = dict(untouched.named_parameters())
    got = dict(restored.named_parameters())
    if set(got) != set(want):
        raise AssertionError(f"parameters differ: {sorted(set(got) ^ set(want))[:4]}")
    for name in want:
        assert_bitwise(got[name], want[name], what=name)
    with torch.no_grad():
        inputs = _plain_inputs(w)
        logits = restored.eval()(**inputs).logits, untouched(**inputs).logits
    where = w.mask.bool()
    assert_bitwise(logits[0][where], logits[1][where], what="logits of the restored base")


def _hooks(module: nn.Module) -> list[Callable]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _is_transformers_own(hook: Callable) -> bool:
    """What transformers leaves on any model once it was asked for hidden states: it records nothing until it is asked again."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def _one_hot(w: Workings, expert: int) -> Tensor:
    weights = torch.zeros_like(w.dense)
    weights[..., expert] = 1
    return weights


def _plain_inputs(w: Workings) -> dict[str, Tensor]:
    """For models that do not count positions from the first real token by themselves."""
    positions = (w.mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": w.ids, "attention_mask": w.mask, "position_ids": positions}


@torch.no_grad()
def _training_step(w: Workings, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Routing weights and loss in training mode, where the temperature and the load-balancing loss count."""
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(w.bench.seed)
        loss = model(w.ids, w.mask, labels=w.ids.masked_fill(w.mask == 0, -100)).loss
    return w.used_weights(model), loss


def _asked_weights(w: Workings) -> Tensor:
    w.ask(w.model)
    return w.used_weights(w.model)
