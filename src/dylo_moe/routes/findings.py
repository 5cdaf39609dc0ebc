"""What is wrong with a routing, in plain words. Every threshold is here, with its reason; none depends on the data.

Shapes: L routed layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dylo_moe.routes.measures import effective_experts
from dylo_moe.routes.tally import Tally


@dataclass(frozen=True)
class Threshold:
    value: float
    reason: str


THRESHOLDS = {
    "collapsed": Threshold(0.95, "with 95 % of the weight on one expert, all others together change an output by a twentieth"),
    "unused": Threshold(0.001, "less than a thousandth of the weight, and never the largest, has no visible effect"),
    "undecided": Threshold(0.99, "above 99 % of the largest possible entropy it is a mean of all experts, as before training"),
    "constant": Threshold(0.01, "shares that vary by less than a hundredth between tokens are fixed weights, without a router"),
    "uneven": Threshold(0.5, "a load that fewer than half of the experts could carry leaves most of what was trained idle"),
    "unrouted": Threshold(0.01, "more than one token in a hundred without any expert is answered by the base model there"),
    "few": Threshold(100, "below 100 tokens the shares are a matter of chance"),
}


@dataclass(frozen=True)
class Finding:
    """kind: "bad", "warning", "note" or "good", as `Page.notice` takes it; about: one of THRESHOLDS, or what it is about."""

    kind: str
    about: str
    text: str


def findings(tally: Tally, experts: Sequence[str], layers: Sequence[str]) -> list[Finding]:
    """What there is to say, the worst first; never empty. layers: the names, or one name for all of them."""
    order = ("bad", "warning", "note", "good")
    found = [*_broken(tally), *_single(experts)]
    if len(experts) > 1 and tally.layers.count.sum():
        found += [*_collapsed(tally, experts), *_undecided(tally), *_constant(tally), *_unused(tally, experts)]
        found += [*_uneven(tally, found), *_layers(tally, layers)]
    if not any(finding.kind in ("bad", "warning") for finding in found) and len(experts) > 1:
        found.append(Finding("good", "all", "no sign of a router that is collapsed, undecided or constant"))
    return sorted(found, key=lambda finding: order.index(finding.kind))


def overall_share(tally: Tally) -> np.ndarray:
    """(E,) mean share over all tokens and layers that have an expert."""
    return tally.layers.share.sum(axis=0) / max(tally.layers.count.sum(), 1.0)


def _limit(name: str) -> float:
    return THRESHOLDS[name].value


def _broken(tally: Tally) -> Iterator[Finding]:
    tokens = int(tally.tokens.sum())
    if tally.broken:
        text = f"{tally.broken} weights of tokens are not finite numbers; they are left out of everything here"
        yield Finding("bad", "broken", text)
    part = tally.unrouted / max(tally.pairs, 1)
    if part > _limit("unrouted"):
        text = f"{part:.1%} of the tokens have no expert at all: every weight is 0, and the base model answers"
        yield Finding("warning", "unrouted", text)
    if tokens < _limit("few"):
        yield Finding("note", "few", f"only {tokens} tokens: below {_limit('few'):.0f} the shares are a matter of chance")


def _single(experts: Sequence[str]) -> Iterator[Finding]:
    if len(experts) == 1:
        yield Finding("note", "single", "there is only one expert, so there is nothing to choose")


def _collapsed(tally: Tally, experts: Sequence[str]) -> Iterator[Finding]:
    share = overall_share(tally)
    top = int(share.argmax())
    if share[top] >= _limit("collapsed"):
        text = f"the router has collapsed: expert {top} ({experts[top]}) takes {share[top]:.1%} of the weight of all tokens"
        yield Finding("bad", "collapsed", text)


def _undecided(tally: Tally) -> Iterator[Finding]:
    """By the shares before the top k were chosen, where there are such: afterwards one may be 1, however close the choice was."""
    sums = tally.before if tally.before.count.sum() else tally.layers
    entropy = sums.entropy.sum() / sums.count.sum()
    if entropy >= _limit("undecided"):
        when = " before the choice of the top k" if sums is tally.before else ""
        text = (
            f"the router is undecided: its weights{when} are as good as uniform ({entropy:.1%} of the largest possible entropy); "
        )
        yield Finding("bad", "undecided", text + "it was not trained, or not loaded")


def _constant(tally: Tally) -> Iterator[Finding]:
    largest = float(tally.spread.max())
    if largest < _limit("constant") and tally.tokens.sum() > 1:
        text = f"the router does not look at its input: no share varies by more than {largest:.2g} between tokens"
        yield Finding("warning", "constant", f"{text} (standard deviation)")


def _unused(tally: Tally, experts: Sequence[str]) -> Iterator[Finding]:
    share, first = overall_share(tally), tally.layers.first.sum(axis=0)
    for expert in np.flatnonzero((share < _limit("unused")) & (first == 0)):
        text = f"expert {expert} ({experts[expert]}) is never used: {share[expert]:.2%} of the weight, never the largest"
        yield Finding("warning", "unused", text)


def _uneven(tally: Tally, before: Sequence[Finding]) -> Iterator[Finding]:
    share = overall_share(tally)
    effective = effective_experts(share)
    if effective < _limit("uneven") * len(share) and not any(finding.about == "collapsed" for finding in before):
        text = f"the load is uneven: {len(share)} experts are used like {effective:.1f} equal ones"
        yield Finding("warning", "uneven", text)


def _layers(tally: Tally, layers: Sequence[str]) -> Iterator[Finding]:
    """Layers that are collapsed or undecided by themselves; the mean of all layers hides them."""
    if len(layers) == 1:
        return
    share, entropy = tally.layers.mean(tally.layers.share), tally.layers.mean(tally.layers.entropy)
    several = tally.here > 1
    for about, is_so, word in (
        ("collapsed", share.max(axis=1) >= _limit("collapsed"), "one expert takes almost all of the weight"),
        ("undecided", entropy >= _limit("undecided"), "the weights are as good as uniform"),
    ):
        found = np.flatnonzero(is_so & several)
        if len(found):
            some = ", ".join(layers[layer] for layer in found[:3]) + (" ..." if len(found) > 3 else "")
            yield Finding("warning", about, f"in {len(found)} of {len(layers)} layers {word}: {some}")
