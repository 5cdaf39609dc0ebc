"""Laws of speed: work is counted and compared with what the shapes demand; time is measured as paired, interleaved ratios.

T tokens of one row, E experts, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.artifact import Adapter, load_base, versions_of
from harness.bench import Bench
from harness.compare import assert_within, is_of_torchao
from harness.measure import PairedRatio, PairedTimer, assert_ratio_at_most, counted_flops
from harness.outcome import NotApplicable

# Features that need a pass of the base model of their own before the routed one.
TWO_PASS_FEATURES = ("base", "all_experts")
LONGEST = {"cpu": 192, "cuda": 1024}
NEW_TOKENS = 16


def check_single_pass_work(bench: Bench) -> None:
    """One routed pass, of a row, of two, in training, does the work of base pass, experts' products and gate, and no more.

    Reason: a mixture in one pass is what makes E experts affordable; E passes do E times this work.
    Tolerance: counted operations against the count that the shapes demand, times work_slack.
    """
    case = _case(bench)
    limit = case.work_limit()
    got = counted_flops(case.routed)
    bench.evidence(
        ratios={"routed/base work": {"ratio": got / case.base_flops, "kind": "count"}},
        limit=limit / case.base_flops,
        tokens=case.ids.shape[1],
    )
    slack = bench.gate.threshold("work_slack")
    _at_most(got, limit * slack, "operations of the routed pass")
    rows = case.in_two_rows()
    _at_most(counted_flops(rows.routed), rows.work_limit() * slack, "operations of the routed pass of two rows")
    if not bench.reference.artifact.feed_forwards:  # where a router's mode decides how many networks run
        _at_most(counted_flops(case.routed_in_training), limit * slack, "operations of the routed pass in training mode")


def check_single_pass_time(bench: Bench) -> None:
    """One routed pass takes the base pass's time times its work, up to a factor.

    Reason: the work limit is worth nothing when Python, copies or a loop over experts take the time.
    Tolerance: the work ratio that the shapes demand, times time_over_work; only for a pass of at least smallest_timed_gflop.
    """
    case = _timed_case(bench)
    limit = case.work_limit() / case.base_flops * bench.gate.threshold("time_over_work")
    timer = PairedTimer(case.routed, case.base_pass, device=bench.device, seed=bench.seed)
    _within(bench, timer, limit, "routed/base time")


def check_faster_than_multi_pass(bench: Bench) -> None:
    """One routed pass is faster than one pass per expert and one for the router, by what its work promises, up to a factor.

    Reason: multi-pass mixing, the first generation's design, is what users compare with.
    Tolerance: routed work over (experts + 1) base passes, times time_over_work, never above 1; only where that promises anything.
    """
    case = _timed_case(bench)
    promised = case.work_limit() / ((bench.num_experts + 1) * case.base_flops)
    if promised * bench.gate.threshold("time_over_work") > 1.0:
        raise NotApplicable(
            f"with {bench.num_experts} experts a routed pass is {promised:.2f} of multi-pass work: no promise to keep"
        )
    timer = PairedTimer(case.routed, case.multi_pass, device=bench.device, seed=bench.seed)
    limit = promised * bench.gate.threshold("time_over_work")
    _within(bench, timer, limit, "routed/multi-pass time")


def check_cached_generation_work(bench: Bench) -> None:
    """Generating n tokens does the work of prefill and n single-token steps per pass, not of n whole prefixes.

    Reason: a router that needs features of the whole prompt tempts implementations to recompute it for every token.
    Tolerance: the base model's counted operations with its cache, times passes and experts, times decode_work_slack.
    """
    case = _cached_case(bench)
    if not all(p.is_floating_point() and not is_of_torchao(p) for p in case.base.parameters()):
        raise NotApplicable("the base is quantised: its kernels for one token at a time are not counted")
    base = counted_flops(case.base_generation)
    limit = base * case.work_limit() / case.base_flops * bench.gate.threshold("decode_work_slack")
    got = counted_flops(case.generation)
    bench.evidence(ratios={"generation routed/base work": {"ratio": got / base, "limit": limit / base, "kind": "count"}})
    _at_most(got, limit, f"operations of generating {NEW_TOKENS} tokens")


def check_cached_generation_time(bench: Bench) -> None:
    """Generating a token with caches takes less time than a pass over the whole sequence.

    Reason: a cache that is kept but not used, or copied at every step, does not show in the operations.
    Tolerance: decode_time_over_recompute; only for a pass of at least smallest_timed_gflop.
    """
    case = _cached_case(_timed_case(bench).bench)
    limit = NEW_TOKENS * bench.gate.threshold("decode_time_over_recompute")
    timer = PairedTimer(case.generation, case.routed, device=bench.device, seed=bench.seed)
    _within(bench, timer, limit, f"{NEW_TOKENS} generated tokens/routed pass time")


@dataclass(frozen=True)
class Case:
    """Everything that is timed or counted; ids (1, T), or two rows of half of it, and the base model alone, through transformers
    and in the subject's dtype.
    """

    bench: Bench
    base: nn.Module
    ids: Tensor
    base_flops: int

    @torch.inference_mode()
    def base_pass(self) -> None:
        self.base(self.ids, use_cache=False)

    @torch.inference_mode()
    def routed(self) -> None:
        self.bench.model(self.ids, **self.weights())

    @torch.no_grad()
    def routed_in_training(self) -> None:
        self.bench.model.train()
        try:
            self.bench.model(self.ids, **self.weights())
        finally:
            self.bench.model.eval()

    def in_two_rows(self) -> Case:
        ids = self.ids[:, : self.ids.shape[1] // 2 * 2].view(2, -1)
        rows = replace(self, ids=ids)
        return replace(rows, base_flops=counted_flops(rows.base_pass))

    @torch.inference_mode()
    def multi_pass(self) -> None:
        for expert in range(self.bench.num_experts):
            self.bench.model(self.ids, expert_id=expert)
        self.base_pass()

    @property
    def prompt(self) -> Tensor:
        return self.ids[:, :-NEW_TOKENS]

    @torch.inference_mode()
    def generation(self) -> None:
        weights = {name: value[:, 0] for name, value in self.weights().items()}
        self.bench.model.generate(self.prompt, torch.ones_like(self.prompt), **weights, **_greedy())

    @torch.inference_mode()
    def base_generation(self) -> None:
        self.base.generate(self.prompt, attention_mask=torch.ones_like(self.prompt), **_greedy())

    def weights(self) -> dict[str, Tensor]:
        """Uniform weights (rows, 1, E) where the checkpoint has no router to choose them."""
        if self.bench.router is not None:
            return {}
        experts = self.bench.num_experts
        return {"routing_weights": torch.full((len(self.ids), 1, experts), 1 / experts, device=self.bench.device)}

    def work_limit(self) -> float:
        """Operations that the shapes demand of a routed pass: base, 2 T r (I + O) per adapter, the router, the router's features,
        and what experts have beyond adapters.

        Where whole feed-forward networks are mixed, each expert that a token may use is a pass through the network.
        """
        tokens, hidden = self.ids.numel(), self.base.config.hidden_size
        artifact = self.bench.reference.artifact
        experts = sum(self._of_expert(expert, tokens) for expert in (*self.bench.experts, artifact.shared))
        router = self.bench.router
        if router is None:
            return self.base_flops + experts
        gate = 2 * tokens * router.size(len(self.bench.reference.unit_names))
        head = 2 * tokens * self.base.config.vocab_size * hidden
        features = self.base_flops - head if router.features in TWO_PASS_FEATURES else 0
        features += experts if router.features == "all_experts" else 0
        return self.base_flops + experts + gate + features + self._networks(tokens)

    def _of_expert(self, expert: Mapping[str, Adapter], tokens: int) -> int:
        """Operations of one expert: its products, its own versions of whole Linears, and DoRA's B A, once, for the norm."""
        adapters = expert.values()
        low_rank = sum(2 * tokens * (adapter.lora_A.size + adapter.lora_B.size) for adapter in adapters)
        norms = sum(2 * len(adapter.lora_B) * adapter.lora_A.size for adapter in adapters if adapter.magnitude is not None)
        own = {path: parameters for path, parameters in versions_of(expert).items() if "weight" in parameters}
        linears = [path for path in own if isinstance(self.base.get_submodule(path), nn.Linear)]
        return low_rank + norms + sum(2 * tokens * own[path]["weight"].size for path in linears)

    def _networks(self, tokens: int) -> int:
        """Operations of the networks' Linears for the second and every further expert of a token."""
        paths = tuple(f"{path}." for path in self.bench.reference.artifact.feed_forwards)
        weights = sum(p.numel() for name, p in self.base.named_parameters() if name.startswith(paths) and p.dim() == 2)
        per_token = self.bench.num_experts
        if self.bench.router is not None and paths:
            rules = [gate.rule for gate in self.bench.router.gates.values()]
            per_token = max(1 if rule.name == "switch" else rule.top_k or per_token for rule in rules)
        return 2 * tokens * weights * (per_token - 1) if paths else 0


def _case(bench: Bench) -> Case:
    """The case of this bench, kept for the next check; as many tokens, up to LONGEST, as a pass worth timing needs."""
    if "speed case" not in bench.kept:
        base = load_base(bench.reference.artifact, bench.dtype).to(bench.device)
        per_token = 2 * sum(p.numel() for p in base.parameters())
        wanted = int(4e9 * _smallest_gflop(bench) / per_token)
        tokens = max(2 * NEW_TOKENS, min(LONGEST[bench.device], wanted))
        ids = torch.as_tensor(bench.rng(7).integers(2, bench.vocab_size, size=(1, tokens)), device=bench.device)
        flops = counted_flops(Case(bench, base, ids, 0).base_pass)
        bench.kept["speed case"] = Case(bench, base, ids, flops)
    return bench.kept["speed case"]


def _timed_case(bench: Bench) -> Case:
    case = _case(bench)
    smallest = _smallest_gflop(bench)
    if case.base_flops < smallest * 1e9:
        raise NotApplicable(
            f"a base pass is {case.base_flops / 1e9:.2g} GFLOP, under {smallest:g}: Python would be timed, not arithmetic"
        )
    return case


def _smallest_gflop(bench: Bench) -> float:
    return bench.gate.threshold("smallest_timed_gflop_cuda" if bench.device == "cuda" else "smallest_timed_gflop")


def _cached_case(bench: Bench) -> Case:
    if getattr(bench.router, "sees_whole_batch", False):
        raise NotApplicable("the checkpoint's own router takes one softmax over all tokens of a pass: nothing can be cached")
    if getattr(bench.router, "counts_tokens", False):
        raise NotApplicable("the checkpoint's own router counts the tokens of a row: no KV cache holds how many there were")
    case = _case(bench)
    if "past_key_values" not in inspect.signature(type(bench.model).forward).parameters:
        raise NotApplicable(f"{type(bench.model).__name__}.forward takes no past_key_values: it promises no cache")
    return case


def _within(bench: Bench, timer: PairedTimer, limit: float, name: str) -> None:
    """Requires the ratio to be within its limit; the evidence is recorded whatever the outcome."""

    def tell(found: PairedRatio) -> None:
        bench.evidence(ratios={name: {**found.evidence(), "limit": limit, "kind": "time"}})

    assert_ratio_at_most(timer, limit, what=name, tell=tell)


def _greedy() -> dict[str, Any]:
    return {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}


def _at_most(got: float, limit: float, what: str) -> None:
    assert_within(max(got - limit, 0.0), 0.0, 0.0, what=f"{what}, {got:.4g} where {limit:.4g} are allowed: excess")
