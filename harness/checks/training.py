"""Laws of training: modes, gradients, gradient checkpointing, compilation, the load-balancing loss.

Rows have one length here, so that no padding takes part. B rows, S tokens, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch._dynamo
from torch import Tensor, nn

from harness.bench import Bench
from harness.compare import (
    UNIT_ROUNDOFF,
    as_float64,
    assert_bitwise,
    assert_equal,
    assert_within,
    dot_bound,
    rounding_floor,
    twice_the_loop,
)
from harness.loop import LoopModel
from harness.oracles import balance
from harness.outcome import NotApplicable, Void
from harness.routers import HybridGate
from harness.workings import Workings, workings

# Training steps whose errors make the bound. All gradients of one step share the rounding of its forward pass, so that a step
# is one sample of the loop's error: of two steps of the same code, one often has three times the error of the other.
INPUTS = 8
# Parts of the names of what is trained: adapters, routers, and the experts' own versions of modules and biases.
_TRAINED = ("lora_", "router", "gate.", "modules_to_save", "expert_bias", "versions.")


def check_train_eval_modes(bench: Bench) -> None:
    """While training DyLoRA-MoE's router is dense, softmax(logits / T), and others route as ever; after eval() all is as before.

    Reason: a router may have two modes by definition; a mode that sticks, or dropout that ignores eval(), changes every later
    score.
    Tolerance: what twice the naive loop's error in the router's scores can move a weight by, and two roundings; none for the way
    back.
    """
    w = workings(bench)
    w.need_router()
    model = w.load()
    before = w.ask(model)
    model.train()
    w.ask(model)
    got = as_float64(w.used_weights(model))
    model.eval()
    assert_bitwise(w.ask(model), before, what="logits after train() and eval()")
    router = w.reference.router
    if isinstance(router, HybridGate) and router.features != "layer":
        want, where = w.reference.training_weights(w.ids, w.mask), w.valid
        bound = w.router_error / router.temperature + rounding_floor(1.0, w.dtype)
        assert_within(got[where], want[where], bound, what="routing weights while training")
    elif not isinstance(router, HybridGate) and not router.drops_out:
        want, where = w.routing_weights_like(got)
        assert_within(got[w.decided], want[w.decided], where[w.decided], what="routing weights while training")


def check_gradients_reach_router_and_experts(bench: Bench) -> None:
    """The loss and its gradients for the router and for the experts are those of the loop in float64; the base gets none.

    Reason: a detached weight trains nothing and reports nothing.
    Tolerance: twice the naive loop's largest error in the same dtype, over all gradients of one kind (router, bias, A, B).
    """
    w = workings(bench)
    _need_plain_training(w)
    model = w.load()
    exact, allowed = _exact_and_allowed(w)
    found = _loss_and_gradients(w, model, _ids(w).to(bench.device), exact)
    for name, want in exact.items():
        # Of its kind: a tensor whose own gradient is tiny proves little, and the others of its kind prove it.
        flat = name == "loss" or (w.experts == 1 and name.startswith("router"))  # softmax over one logit has no slope
        effect = None if flat else max(np.abs(of_kind).max() for of_kind in _alike(exact, name))
        assert_within(found[name], want, allowed[_kind(name)], effect=effect, what=name)
    again = _loss_and_gradients(w, model, _ids(w).to(bench.device), exact, adding=True)
    for name in exact.keys() - {"loss"}:
        assert_within(again[name], 2 * exact[name], 2 * allowed[_kind(name)], what=f"{name}, after a second backward()")
    reached = [n for n, p in model.named_parameters() if p.grad is not None and _is_base(n)]
    if reached:
        raise AssertionError(f"the frozen base has gradients: {reached[:3]}")


def check_changed_parameters_take_effect(bench: Bench) -> None:
    """What an optimizer makes of the experts and of the router counts from the next pass on, training or not.

    Reason: stacked, merged or cached copies of parameters go on computing what the model was before the step.
    Tolerance: twice the naive loop's error; and changing the router must change the routing weights.
    """
    w = workings(bench)
    w.need_experts()
    if not all(hasattr(layer, "lora_B") for layer in w.need_method(w.model, "routed_layers")().values()):
        raise NotApplicable("the subject's layers do not show their lora_B")
    model, loop = w.load(), copy.deepcopy(w.naive)
    w.ask(model, routing_weights=w.dense)
    w.ask(model)  # so that whatever is kept between passes is there
    for changed, names in ((model, w.expert_names(model)), (loop, loop.expert_names)):
        _turn_experts(changed, names)
    want = w.ask(loop, w.ids.cpu(), w.mask.cpu(), routing_weights=w.dense.cpu())
    w.same_logits(w.ask(model, routing_weights=w.dense), want, "logits after every expert's B was changed", twice=True)
    router = getattr(model, "router", None)
    if w.experts > 1 and isinstance(router, nn.Module) and w.reference.router.trained:
        _turn_router(w, model)


@torch.no_grad()
def _turn_experts(model: nn.Module, names: Sequence[str]) -> None:
    for layer in model.routed_layers().values():
        for name in names:
            if name in layer.lora_B:
                layer.lora_B[name].weight.mul_(-0.5)  # exact


def _turn_router(w: Workings, model: nn.Module) -> None:
    w.ask(model)
    before = as_float64(w.used_weights(model))
    with torch.no_grad():
        for parameter in model.router.parameters():
            parameter.mul_(-1)
    w.ask(model)
    if np.array_equal(as_float64(w.used_weights(model)), before):
        raise AssertionError("every parameter of the router has changed its sign, and no routing weight is another")


def check_gradient_checkpointing_equal(bench: Bench) -> None:
    """With gradient checkpointing the loss and the gradients are those without.

    Reason: the recomputation runs inside backward(), when the weights of the forward pass may be gone.
    Tolerance: twice the naive loop's largest error, over all gradients of one kind (router, bias, A, B).
    """
    w = workings(bench)
    _need_plain_training(w)
    model = w.load()
    w.need_method(model, "gradient_checkpointing_enable")()
    exact, allowed = _exact_and_allowed(w)
    found = _loss_and_gradients(w, model, _ids(w).to(bench.device), exact)
    for name, want in exact.items():
        assert_within(found[name], want, allowed[_kind(name)], what=f"{name}, checkpointed")


def check_load_balancing_loss(bench: Bench) -> None:
    """`aux_loss` is the load-balancing loss that the checkpoint names, of the weights used, padding not counted; in training too.

    Reason: a loss over padding rewards a router for what it does with nothing.
    Tolerance: the dot-product bound of its sums.
    """
    w = workings(bench)
    w.need_router()
    model = w.load()
    for training in (False, True):
        _compare_balance(w, model.train(training))


def _compare_balance(w: Workings, model: nn.Module) -> None:
    __tracebackhide__ = True
    kind = w.reference.artifact.balance_kind
    with torch.no_grad():
        output = model(w.ids, w.mask, labels=w.ids.masked_fill(w.mask == 0, -100))
    if getattr(output, "aux_loss", None) is None:
        raise NotApplicable("the subject returns no aux_loss")
    weights = as_float64(w.used_weights(model))[w.valid]
    want = balance.loss(weights, kind)
    terms = weights.reshape(-1, w.experts).shape[0] + w.experts + 4
    bound = dot_bound(terms, w.dtype, balance.sensitivity(weights, kind)) + (terms * UNIT_ROUNDOFF[w.dtype]) ** 2
    assert_within(output.aux_loss, want, bound, effect=want if want else None, what=f"{kind} load-balancing loss")


def check_compile_equal(bench: Bench) -> None:
    """torch.compile changes nothing.

    Reason: dynamo specialises on Python state; a weight stored on a module may be baked into the graph of the first call.
    Tolerance: twice the naive loop's error for each of the two; the eager backend needs no compiler and captures the same graph.
    """
    w = workings(bench)
    w.need_experts()
    if not torch._dynamo.is_dynamo_supported():
        raise NotApplicable("torch.compile does not support this Python")
    model = w.load()
    w.ask(model, routing_weights=w.dense)  # so that what a first call sets up is no reason to compile twice
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    for weights in (w.dense, w.dense.roll(1, dims=-1)):
        got = w.ask(compiled, routing_weights=weights)
        w.same_logits(got, w.reference.logits(w.ids, w.mask, weights=weights), "compiled logits")
    torch._dynamo.reset()


def _ids(w: Workings) -> Tensor:
    """Two rows of seven tokens, none of them padding."""
    return torch.stack([prompt[:7] for prompt in w.bench.prompts[:2]]).cpu()


def _loss_and_gradients(
    w: Workings, model: nn.Module, ids: Tensor, exact: dict[str, np.ndarray] | None = None, *, adding: bool = False
) -> dict[str, np.ndarray]:
    """Of one training step: the loss, and the gradients of the router and of the experts in the watched layers.

    adding: to the gradients of the step before.

    The first two tokens are a prompt, without labels, as in any fine-tuning on answers. An expert that no token uses may have
    none where the exact gradient is 0.
    """
    model.train()
    watched = _watched(w, model)
    for parameter in watched.values():
        parameter.requires_grad_()
    if not adding:
        model.zero_grad()
    labels = ids.clone()
    labels[:, :2] = -100
    loss = model(ids, torch.ones_like(ids), labels=labels).loss
    if not loss.requires_grad:
        raise AssertionError("the loss depends on neither the router nor the experts")
    loss.backward()
    missing = [name for name, p in watched.items() if p.grad is None and (exact is None or exact[name].any())]
    if missing:
        raise AssertionError(f"no gradient reaches {', '.join(missing[:4])}")
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in watched.items()}
    return {"loss": as_float64(loss), **{name: as_float64(gradient) for name, gradient in gradients.items()}}


def _watched(w: Workings, model: nn.Module) -> dict[str, nn.Parameter]:
    """The router's parameters, and every expert's A and B in the first, a middle and the last layer of each kind."""
    layers = w.need_method(model, "routed_layers")()
    watched = _router_parameters(w, model) if w.reference.router.trained else {}
    for module in _some_modules(w.reference.module_names):
        for expert, name in enumerate(w.expert_names(model)):
            if name in layers[module].lora_A:
                watched[f"{module} A of expert {expert}"] = layers[module].lora_A[name].weight
                watched[f"{module} B of expert {expert}"] = layers[module].lora_B[name].weight
    return watched


def _some_modules(names: Sequence[str]) -> list[str]:
    """The first, the middle and the last of each kind, in order."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    some = {of_kind[place] for of_kind in kinds.values() for place in (0, len(of_kind) // 2, -1)}
    return [name for name in names if name in some]


def _router_parameters(w: Workings, model: nn.Module) -> dict[str, nn.Parameter]:
    """In the router's own order, which is that of its definition: Linear by Linear, unit by unit, weight before bias."""
    found = {f"router {i}{' bias' if p.dim() == 1 else ''}": p for i, p in enumerate(model.router.parameters())}
    wanted = [tuple(parameter.shape) for parameter in w.naive.router.parameters()]
    assert_equal([tuple(parameter.shape) for parameter in found.values()], wanted, what="shapes of the router's parameters")
    return found


def _need_plain_training(w: Workings) -> None:
    w.need_router()
    w.need_experts_in_charge()
    if w.reference.router.drops_out:
        raise NotApplicable("the router drops inputs at random while training, so that no two steps need agree")


def _exact_and_allowed(w: Workings) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The naive loop's training step in float64, and per kind twice its largest error in the working dtype; once per bench.

    One error for all gradients of a kind, over several inputs, with eager and with fused attention: a tensor of a few elements
    may happen to be exact on one input, which says nothing about the loop's error, and either attention is the published design.
    """
    kept = vars(w).setdefault("_training", {})
    if not kept:
        loops = [LoopModel(w.reference.artifact, dtype, attention) for dtype, attention in _designs(w.dtype)]
        kept["allowed"] = {}
        drawn = torch.from_numpy(w.bench.rng(5).integers(0, w.bench.vocab_size, size=(INPUTS - 1, *_ids(w).shape)))
        for ids in (_ids(w), *drawn):
            with torch.enable_grad():
                exact, *found = (_loss_and_gradients(w, loop, ids) for loop in loops)
            kept.setdefault("exact", exact)
            for name, want in exact.items():
                bound = max(twice_the_loop(step[name], want, w.dtype) for step in found)
                kept["allowed"][_kind(name)] = max(bound, kept["allowed"].get(_kind(name), 0.0))
        of_router = [gradient for name, gradient in kept["exact"].items() if name.startswith("router")]
        if w.experts > 1 and of_router and not any(gradient.any() for gradient in of_router):
            raise Void("the router's gradient is zero for this checkpoint")
    return kept["exact"], kept["allowed"]


def _designs(dtype: torch.dtype) -> tuple[tuple[torch.dtype, str | None], ...]:
    """The exact loop, and the two that compute in the working dtype."""
    return ((torch.float64, "eager"), (dtype, "eager"), (dtype, None))


def _kind(name: str) -> str:
    """ "loss", "router", "bias", "A" or "B"."""
    return name if name == "loss" else "bias" if name.endswith("bias") else name.split()[0 if name.startswith("router") else 1]


def _alike(gradients: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    return [gradient for other, gradient in gradients.items() if _kind(other) == _kind(name)]


def _is_base(name: str) -> bool:
    return not any(part in name for part in _TRAINED)
