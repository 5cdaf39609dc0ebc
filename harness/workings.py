"""What several checks need of one bench, worked out once: inputs, the subject's and the reference's answers, bounds, stock PEFT.

B rows, S tokens, E experts, V vocabulary.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.artifact import Adapter, load_base
from harness.bench import Bench
from harness.compare import as_float64, assert_within, rounding_floor, twice_the_loop
from harness.loop import LoopModel
from harness.loop_versions import plain
from harness.outcome import NotApplicable, Void
from harness.packed import as_on_any_processor
from harness.readings.layouts import NATIVE
from harness.reference import Reference
from harness.routers import Router, UnitGates
from harness.variants import write_variant

# A token whose router scores are closer to a tie than this many times the naive loop's own error may rightly go either
# way; it and what follows it in its row are set aside wherever the router decides.
TIE_FACTOR = 100.0


class Workings:
    """See the module. Laws are judged in float32 or wider: half precision has laws of its own."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.reference: Reference = bench.reference
        self._temporary: list[tempfile.TemporaryDirectory] = []
        self._peft: dict[int, PeftModel] = {}

    # What is asked

    @cached_property
    def ids(self) -> Tensor:
        return self.batch("left")[0]

    @cached_property
    def mask(self) -> Tensor:
        return self.batch("left")[1]

    def batch(self, side: str) -> tuple[Tensor, Tensor]:
        """The bench's rows, padded on that side; only the longest where an answer depends on the rows beside it."""
        ids, mask = self.bench.batch(side)
        whole = slice(None) if not self.sees_whole_batch else mask.all(dim=1).nonzero().flatten()[:1]
        return ids[whole], mask[whole]

    @property
    def sees_whole_batch(self) -> bool:
        """Whether the checkpoint's own definition lets a token depend on later ones and on other rows."""
        return getattr(self.reference.router, "sees_whole_batch", False)

    @cached_property
    def valid(self) -> np.ndarray:
        """(B, S): where there is a token."""
        return self.mask.cpu().numpy().astype(bool)

    @cached_property
    def dense(self) -> Tensor:
        """Random weights with every expert at work, (B, S, E), rows summing to 1 up to rounding, exact in float32."""
        weights = self.bench.rng(2).dirichlet(np.ones(self.experts), size=tuple(self.ids.shape))
        return torch.from_numpy(weights.astype(np.float32)).to(self.bench.device)

    # Who answers

    @cached_property
    def model(self) -> nn.Module:
        """The subject's shared model, in float32 where the checkpoint is narrower. Leave it as you found it."""
        return self.bench.model if self.bench.dtype in (torch.float32, torch.float64) else self.load(dtype="float32")

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def experts(self) -> int:
        return self.reference.num_experts

    @cached_property
    def naive(self) -> LoopModel:
        return LoopModel(self.reference.artifact, self.dtype)

    def load(self, checkpoint: Path | None = None, dtype: str | None = None) -> nn.Module:
        """Another load by the subject, of this checkpoint or of another one, in eval mode."""
        bench = self.bench
        base = bench.base_model
        if checkpoint is not None and base is None and self.reference.artifact.base_state is not None:
            base = self._base_directory  # a copy does not hold the base's weights
        options = {"base_model": base, "device": bench.device, "dtype": dtype or self._dtype_name}
        if checkpoint is None and bench.assume:
            options["assume"] = dict(bench.assume)
        return as_on_any_processor(bench.subject.load(checkpoint or bench.checkpoint, **options).eval())

    @property
    def _dtype_name(self) -> str:
        return "float64" if self.bench.dtype == torch.float64 else "float32"

    def peft(self, expert: int) -> PeftModel:
        """Stock PEFT with this expert alone, from the checkpoint's own files."""
        directory = self.reference.artifact.adapter_directories[expert]
        if self.reference.artifact.shared:
            raise NotApplicable("beside each expert a shared adapter is on, which no adapter of stock PEFT is")
        if directory is None:
            raise NotApplicable("this layout has no directory that stock PEFT can load")
        if expert not in self._peft:
            base = load_base(self.reference.artifact, self.dtype).to(self.bench.device)
            self._peft[expert] = PeftModel.from_pretrained(base, directory).eval()
        return self._peft[expert]

    def variant(self, experts: Sequence[Mapping[str, Adapter]] | None = None, router: Router | None | str = "as it is") -> Path:
        """A copy of the checkpoint in the native layout, with other experts or another router; deleted when the judge ends."""
        self.need_native()
        artifact = replace(self.reference.artifact, base=self._base_directory)
        layers = self.reference.model.routed_layers().values()
        return write_variant(
            self.empty_directory("variant-"),
            artifact,
            experts=artifact.experts if experts is None else experts,
            router=artifact.router if isinstance(router, str) else router,
            transposed=any(isinstance(plain(layer.base_layer), Conv1D) for layer in layers),
        )

    def variant_for_weights(self, experts: Sequence[Mapping[str, Adapter]]) -> Path:
        """A copy with these experts for laws that give the weights: without its router, unless the router says what is mixed."""
        by_network = bool(self.reference.artifact.feed_forwards)
        return self.variant(experts, self.permuted_router(range(len(experts))) if by_network else None)

    def empty_directory(self, prefix: str) -> Path:
        """Deleted when the judge ends."""
        self._temporary.append(tempfile.TemporaryDirectory(prefix=prefix))
        return Path(self._temporary[-1].name)

    @cached_property
    def _base_directory(self) -> str | None:
        """Where the base model lies alone; written once where only the checkpoint itself holds its weights."""
        artifact = self.reference.artifact
        if artifact.base_state is None:
            return artifact.base
        directory = self.empty_directory("base-")
        load_base(artifact, next(iter(artifact.base_state.values())).dtype).save_pretrained(directory)
        return str(directory)

    # Answers

    @torch.no_grad()
    def ask(self, model: nn.Module, ids: Tensor | None = None, mask: Tensor | None = None, **routing: object) -> Tensor:
        """The model's logits, (B, S, V), for these or for the usual inputs; by its router where no routing is given."""
        if ids is None:
            ids, mask = self.ids, self.mask
        routing = routing or self.default_routing
        for option in routing:
            self.need_option(model.forward, option)
        output = model(ids, mask, **routing)
        if not hasattr(output, "logits"):
            raise AssertionError(f"the model returned a {type(output).__name__} without .logits (docs/subjects.md)")
        return output.logits

    @property
    def default_routing(self) -> dict[str, object]:
        """Nothing, so that the router decides; without a router the first expert, which every variant has."""
        return {"expert_id": 0} if self.experts and self.reference.router is None else {}

    @cached_property
    def subject_logits(self) -> Tensor:
        return self.ask(self.model)

    @cached_property
    def reference_logits(self) -> np.ndarray:
        return self.reference.logits(self.ids, self.mask)

    @cached_property
    def effect(self) -> float:
        """How far the experts move the logits, at most."""
        given = self.reference.logits(self.ids, self.mask, weights=self.dense)
        return float(np.abs(given - self.reference.base_logits(self.ids, self.mask))[self.valid].max())

    # What is allowed

    @cached_property
    def bound(self) -> float:
        """How far logits may be from the reference: twice the naive loop's largest error, over several given routings."""
        nothing = torch.zeros_like(self.dense)
        alone = [nothing.index_fill(-1, torch.tensor([e], device=nothing.device), 1) for e in range(min(self.experts, 4))]
        loops, exacts = [], []
        for weights in (self.dense, nothing, *alone):
            loops.append(as_float64(self.ask(self.naive, self.ids.cpu(), self.mask.cpu(), routing_weights=weights.cpu())))
            exacts.append(self.reference.logits(self.ids, self.mask, weights=weights))
        loop, exact = np.stack(loops)[:, self.valid], np.stack(exacts)[:, self.valid]
        return twice_the_loop(loop, exact, self.dtype)

    @cached_property
    def routed_bound(self) -> float:
        """`bound`, and where the router's rule makes more of its scores' errors than a softmax does, what this moves the logits
        by: all weights off by it at once, in random directions. (A low temperature; AdaMoLE's small sum to divide by.)
        """
        if self.reference.router is None:
            return self.bound
        steeper = np.maximum(self.reference.router_sensitivity(self.ids, self.mask) - 0.5, 0)
        if not steeper.any():
            return self.bound
        weights = self.reference.routing_weights(self.ids, self.mask)
        signs = self.bench.rng(9).choice((-1.0, 1.0), size=weights.shape)
        moved = weights + np.where(weights == 0, 0.0, signs * 2 * self.router_error * steeper)
        logits = self.reference.logits(self.ids, self.mask, weights=torch.from_numpy(moved))
        return self.bound + float(np.abs(logits - self.reference_logits)[self.decided].max())

    @cached_property
    def decided(self) -> np.ndarray:
        """(B, S): tokens whose routing, and that of every token before them, is no near tie. Everywhere without a router."""
        if self.reference.router is None:
            return self.valid
        near = self.near_tie(self.ids, self.mask)
        decided = self.valid & ~np.logical_or.accumulate(near & self.valid, axis=1)
        self.bench.evidence(tokens=int(self.valid.sum()), tokens_set_aside_as_near_ties=int((self.valid & ~decided).sum()))
        if not decided.any():
            raise Void("every token's routing is a near tie")
        return decided

    def near_tie(self, ids: Tensor, mask: Tensor | None) -> np.ndarray:
        """(B, S): tokens whose choice of experts rounding could change."""
        return self.reference.router_margin(ids, mask) < TIE_FACTOR * self.router_error

    @cached_property
    def router_error(self) -> float:
        """Largest error of the naive loop's router scores; tokens after a near tie that went the other way do not count."""
        seen = self.naive.router_scores(self.ids.cpu(), self.mask.cpu())
        exact = self.reference.router_scores(self.ids, self.mask)
        errors = np.stack([np.abs(as_float64(got) - want).max(axis=-1) for got, want in zip(seen, exact, strict=True)])
        by_token = errors.max(axis=0)[self.valid]
        return float(by_token[by_token <= 100 * np.median(by_token)].max())

    def routing_weights_like(self, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The reference's routing weights and their bound in the shape of `got`: a router that decides once for all layers may
        say so for each of them."""
        want = self.reference.routing_weights(self.ids, self.mask)
        bound = np.broadcast_to(self.router_bound, want.shape)
        if got.ndim == 4 and want.ndim == 3:
            want, bound = (np.broadcast_to(values[:, :, None], got.shape) for values in (want, bound))
        return want, bound

    @property
    def router_bound(self) -> np.ndarray:
        """How far routing weights may be from the reference's, broadcasting to them: what twice the naive loop's error in the
        router's scores can move them by, and two roundings."""
        largest = float(np.abs(self.reference.routing_weights(self.ids, self.mask)).max())
        moved = 2 * self.router_error * self.reference.router_sensitivity(self.ids, self.mask)
        return moved + rounding_floor(max(largest, 1.0), self.dtype)

    def expert_names(self, model: nn.Module) -> list[str]:
        """What the model calls its experts, in the order of the weights' columns."""
        return list(getattr(model, "expert_names", self.reference.artifact.names))

    def same_logits(
        self,
        got: Tensor,
        want: object,
        what: str,
        *,
        twice: bool = False,
        where: np.ndarray | None = None,
        bound: float | None = None,
    ) -> None:
        """Logits against the reference, or, with `twice`, of two answers that may each be off by the bound, `self.bound` or
        the given one."""
        __tracebackhide__ = True
        where = self.valid if where is None else where
        bound = (self.bound if bound is None else bound) * (2 if twice else 1)
        assert_within(as_float64(got)[where], as_float64(want)[where], bound, effect=self.effect, what=what)

    # What is needed

    def need_experts(self, at_least: int = 1) -> None:
        if self.experts < at_least:
            raise NotApplicable(f"the checkpoint has {self.experts} experts, the law is about {at_least} or more")

    def need_native(self) -> None:
        if NATIVE not in getattr(self.bench.subject, "formats", (NATIVE,)):
            raise NotApplicable("the law needs the native layout, which the subject does not read")

    def need_router(self) -> None:
        self.need_experts()
        if self.reference.router is None:
            raise NotApplicable("the checkpoint has no router")

    def need_tokens_alone(self) -> None:
        if self.sees_whole_batch:
            raise NotApplicable("the checkpoint's own router takes one softmax over all tokens of all rows: none stands alone")

    def need_cache(self) -> None:
        self.need_tokens_alone()
        if getattr(self.reference.router, "counts_tokens", False):
            raise NotApplicable("the checkpoint's own router counts the tokens of a row: no KV cache holds how many there were")

    def need_experts_in_charge(self) -> None:
        if getattr(self.reference.router, "has_no_experts", False):
            raise NotApplicable("the checkpoint's own router hands every MLP's input on: no expert and no gate has an effect")

    def need_method(self, owner: object, name: str) -> Callable:
        """The attribute `name`, or NotApplicable: a subject need not offer everything."""
        found = getattr(owner, name, None)
        if not callable(found):
            raise NotApplicable(f"the subject has no {name}")
        return found

    def can(self, strategy: str) -> bool:
        """Whether the subject generates by this strategy, "single" without its number."""
        known = getattr(self.bench.subject, "strategies", None)
        return known is None or any(name.partition(":")[0] == strategy for name in known)

    def need_strategy(self, strategy: str) -> None:
        if not self.can(strategy):
            raise NotApplicable(f"the subject has no strategy {strategy}")

    def has_option(self, function: Callable, name: str) -> bool:
        parameters = inspect.signature(function).parameters
        return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def need_option(self, function: Callable, name: str) -> None:
        if not self.has_option(function, name):
            raise NotApplicable(f"the subject's {getattr(function, '__name__', 'function')} has no option {name}")

    def used_weights(self, model: nn.Module) -> Tensor:
        """The routing weights of the model's last pass, (B, S, E) or (B, S, L, E)."""
        if not hasattr(model, "last_routing_weights"):
            raise NotApplicable("the subject does not say which routing weights it used")
        return model.last_routing_weights

    def need_units_to_be_linears(self) -> None:
        if self.reference.artifact.feed_forwards:
            raise NotApplicable("whole feed-forward networks are mixed here, and no Linear alone")

    def need_sums(self, reason: str) -> None:
        """No DoRA here: all experts are sums of deltas. reason: why the law is about no others."""
        held = (*self.reference.experts, self.reference.artifact.shared)
        if any(adapter.magnitude is not None for expert in held for adapter in expert.values()):
            raise NotApplicable(f"experts have magnitudes (DoRA): {reason}")

    def layers_alone(self) -> list[str]:
        """Routed Linears that a law may ask alone: the routing of an expert's own bias is known to a whole pass only."""
        names = [name for name in self.reference.module_names if name not in self.reference.artifact.versioned]
        if not names:
            raise NotApplicable("experts have a bias of their own in every routed Linear: those are judged in whole passes")
        return names

    @property
    def is_any_order_possible(self) -> bool:
        """Whether experts can change places: where units have different numbers of them, each has the first ones."""
        return not isinstance(self.reference.router, UnitGates) or self.reference.router.is_even

    def permuted_router(self, order: Sequence[int]) -> Router | None:
        """The router of these experts in this order; of fewer experts than it chooses, it chooses all."""
        router = self.reference.router
        if not self.is_any_order_possible and list(order) != sorted(order):
            raise NotApplicable("the units have different numbers of experts, each the first of them: no other order is possible")
        return None if router is None else router.permuted(order)


def workings(bench: Bench) -> Workings:
    """The one Workings of a bench, kept on it."""
    return vars(bench).setdefault("_workings", None) or _start(bench)


def _start(bench: Bench) -> Workings:
    bench._workings = Workings(bench)
    return bench._workings
