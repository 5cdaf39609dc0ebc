"""What a target format can say of a mixture, and in which words; what it cannot is refused with the reason."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dylo_moe.errors import ConversionError
from dylo_moe.formats import Checkpoint, GatesState, RouterState, XLoraState


def expressed(checkpoint: Checkpoint, to: str, *, drop_router: bool) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint as the target describes it, computing the same, and a line for everything that is lost.

    Raises:
        ConversionError: the target has no place for something that matters.
    """
    if not checkpoint.experts:
        raise refusal(checkpoint, to, "it is a whole model without experts, so there is nothing to convert")
    if to == "xlora":
        return _as_xlora(checkpoint)
    if to in ("bag", "peft-lora"):
        return _as_adapters(checkpoint, to, drop_router)
    return checkpoint, ()


def refusal(checkpoint: Checkpoint, to: str, reason: str) -> ConversionError:
    return ConversionError(f"{checkpoint.path} ({checkpoint.format}) cannot become {to}: {reason}")


def _as_adapters(checkpoint: Checkpoint, to: str, drop_router: bool) -> tuple[Checkpoint, tuple[str, ...]]:
    count = checkpoint.num_experts
    if to == "peft-lora" and count > 1:
        raise refusal(checkpoint, to, f"it has {count} experts; choose one (--experts 0) or fix their weights (--merge 0.5,0.5)")
    if checkpoint.shared is not None:
        reason = f"its adapter {checkpoint.shared.name!r} is always added, which plain LoRAs cannot say; --merge adds it to one"
        raise refusal(checkpoint, to, reason)
    if checkpoint.router is not None and not drop_router:
        reason = "plain LoRAs have no place for its router; add --drop-router to lose it, or use --to dylora"
        raise refusal(checkpoint, to, reason)
    notes = () if checkpoint.router is None else ("the router was dropped",)
    return replace(checkpoint, router=None), notes


def _as_xlora(checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    router = checkpoint.router
    if router is None:
        raise refusal(checkpoint, "xlora", "it has no router, and X-LoRA is one")
    if isinstance(router, GatesState):
        reason = "each of its gates looks at its own layer's input, X-LoRA's classifier at the base model's last hidden state"
        raise refusal(checkpoint, "xlora", reason)
    if isinstance(router, XLoraState):
        state, notes = _in_pefts_words(checkpoint, router)
    else:
        state, notes = _hybrid_as_classifier(checkpoint, router)
    modules = {module for expert in checkpoint.experts for module in expert.modules}
    return replace(checkpoint, router=replace(state, num_layers=len(modules))), notes


def _in_pefts_words(checkpoint: Checkpoint, state: XLoraState) -> tuple[XLoraState, tuple[str, ...]]:
    """What the standalone package can say in two ways: no bias, which is a bias of zeros; settings that have no effect."""
    if len(state.layers) > 1 and not state.use_relu:
        raise refusal(checkpoint, "xlora", "its classifier has no ReLU between its layers, PEFT's always has")
    layers = tuple((weight, _zeros(weight) if bias is None else bias) for weight, bias in state.layers)
    changed = any(bias is None for _, bias in state.layers)
    notes = ("the classifier got biases of zeros, because PEFT's has biases",) if changed else ()
    return replace(state, layers=layers, use_relu=True), notes


def _zeros(weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0])


def _hybrid_as_classifier(checkpoint: Checkpoint, state: RouterState) -> tuple[XLoraState, tuple[str, ...]]:
    """DyLoRA's gate as a classifier of depth 1: no softmax, the top_k logits kept, a softmax over them.

    The same numbers in evaluation, with one exception of measure zero: X-LoRA takes a logit of exactly 0 for one that top_k
    has removed.
    """
    if state.features != "base":
        reason = f"its router looks at {state.features!r}, X-LoRA's classifier at the base model's last hidden state"
        raise refusal(checkpoint, "xlora", reason)
    classifier = XLoraState(
        layers=((state.weight, state.bias),),
        num_experts=state.num_experts,
        num_layers=1,
        enable_softmax=False,
        enable_softmax_topk=True,
        top_k=state.top_k,
    )
    return classifier, ("the router's temperature, which acts in training only, was dropped",)
