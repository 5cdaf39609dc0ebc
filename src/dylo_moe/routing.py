"""How one forward pass of the base model finds its route: explicit weights, one expert, or the router's choice."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylo_moe.answering import Answering
from dylo_moe.errors import RoutingError
from dylo_moe.formats.checkpoint import ROUTER_FEATURES
from dylo_moe.guessable import computes_tokens_alone
from dylo_moe.guessing import Guesses
from dylo_moe.held import Held, only_known_code
from dylo_moe.mixture import Mixture, Route
from dylo_moe.pair_cost import PairCost
from dylo_moe.routed import RoutedCheckpoint, RoutedLinear
from dylo_moe.row_routes import RowRoutes
from dylo_moe.sampling import Choice
from dylo_moe.sight import Sight
from dylo_moe.threads import PerThread, ThreadState


class Off(Enum):
    """A route to force: no adapter at all, not even the shared one. (None leaves the choice to the router.)"""

    ADAPTERS = "adapters off"


ADAPTERS_OFF = Off.ADAPTERS
Forced = int | Tensor | Off | RowRoutes | None


class _Now(ThreadState):
    """What one thread does."""

    def __init__(self) -> None:
        self._guessing: Guesses | None = None
        self._routed_by_router = False
        self._recordings: list[list[Tensor]] = []


class Routing:
    """Hooks around the causal language model's forward: before it, the route is found and set; after it, unset.

    Because they sit on the innermost model, every caller is routed alike: the PeftModel, `generate`, a Trainer.

    Args:
        causal_lm: the transformers model inside the PeftModel.
        mixture: shared with the routed layers.
        router: maps (B, S, hidden) to (B, S, E); None when every pass names its weights or expert.
        features: one of ROUTER_FEATURES.

    Attributes:
        last_weights: of the last pass, detached.
        pair_cost: says when a generation guesses tokens ahead (see guessing.py); None: never.
        guesses: of the last generation in which some may have been made.
    """

    _guessing = PerThread()  # of the generation under way
    _routed_by_router = PerThread()  # the pass under way
    _recordings = PerThread()

    def __init__(self, causal_lm: PreTrainedModel, mixture: Mixture, router: nn.Module | None, features: str) -> None:
        if features not in ROUTER_FEATURES:
            raise RoutingError(f"router_features={features!r}, but should be one of {', '.join(ROUTER_FEATURES)}")
        self.causal_lm = causal_lm
        self.mixture = mixture
        self.router = router
        self.features = features
        self.last_weights: Tensor | None = None
        self.pair_cost: PairCost | None = PairCost(causal_lm)
        self.guesses: Guesses | None = None
        self._sight = Sight(causal_lm, mixture, features)
        self._answering = Answering(causal_lm, self._answer)
        self.now = _Now()
        self._takes_positions = "position_ids" in inspect.signature(causal_lm.forward).parameters
        self.removed = False
        self._handles = [
            causal_lm.register_forward_pre_hook(self._before, with_kwargs=True),
            causal_lm.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def needs_whole_pass(self) -> bool:
        """Whether what a token gets depends on other tokens of the pass otherwise than through a cache: there is none then."""
        gates = self.router if isinstance(self.router, nn.ModuleList) else (self.router,)
        return any(getattr(gate, "needs_whole_pass", False) for gate in gates)

    def remove(self) -> None:
        """Takes the hooks and the checkpointing wrappers off again."""
        self.removed = True
        for handle in self._handles:
            handle.remove()
        for module in self.causal_lm.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, RoutedCheckpoint):
                module._gradient_checkpointing_func = function.checkpoint

    def forcing(self, route: Forced) -> AbstractContextManager[None]:
        """Every pass inside uses this expert, these weights, no adapter, or each row's own; None: what the router says, or the
        active expert, also where passes around these are forced."""
        return self.mixture.asking(route)

    @contextmanager
    def holding(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[None]:
        """Around a generation with these options: stacks of experts are kept from step to step, and tokens are guessed ahead, if
        only known code runs in it.

        model: all modules that take part.
        """
        previous, outer = self.mixture.held, self._guessing
        self.mixture.held = Held() if only_known_code(model, options) else None
        guessing = None if self.mixture.held is None else self._new_guesses()
        self._guessing, self.guesses = guessing, guessing or self.guesses
        try:
            with nullcontext() if guessing is None else self._answering.installed():
                yield
            if guessing is not None:
                guessing.settle()
        finally:
            if guessing is not None:
                guessing.finish()
            if self.mixture.held is not None:
                self.mixture.held.release()
            self.mixture.held, self._guessing = previous, outer

    @contextmanager
    def choosing(self, choose: Choice) -> Iterator[None]:
        """What is guessed inside will be chosen so from its logits."""
        guesses = self._guessing
        if guesses is None:
            yield
            return
        previous, guesses.choose = guesses.choose, choose
        try:
            yield
        finally:
            guesses.choose = previous

    def _new_guesses(self) -> Guesses | None:
        """For a generation in which only known code runs."""
        if self.pair_cost is None or self.router is None or not self._takes_positions:
            return None
        # A token more in the pass would change every token's weights, or what the router sees.
        if self.needs_whole_pass or not computes_tokens_alone(self.causal_lm, self.router):
            return None
        return self._sight.guesses(self.pair_cost)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Collects the router's weights of the passes inside, with their graph: the auxiliary loss needs it.

        Kept no longer than this: a stored graph would hold the pass's memory. Weights that were given are not collected.
        """
        recorded: list[Tensor] = []
        self._recordings.append(recorded)
        try:
            yield recorded
        finally:
            self._recordings.pop()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        else:
            kwargs = dict(kwargs)
        if self.mixture.held is not None and not torch.compiler.is_compiling():  # which cannot look
            if not self.mixture.held.check() and self._guessing is not None:
                self._guessing.forget()
        weights, expert_id = kwargs.pop("routing_weights", None), kwargs.pop("expert_id", None)
        if isinstance(weights, Tensor) and not weights.is_floating_point():
            weights = weights.to(torch.float32)  # a one-hot row of integers is no list of expert ids
        if weights is not None and expert_id is not None:
            raise RoutingError("routing_weights and expert_id were both given, but should be one of them")
        rows, length = _rows_and_length(kwargs)
        if kwargs.get("position_ids") is None and self._takes_positions:
            _add_position_ids(kwargs)
        self._bind_checkpointing()
        given = weights if weights is not None else expert_id if expert_id is not None else self.mixture.forced
        self._routed_by_router = given is None
        self.mixture.layer_weights = {}
        self.mixture.kept_positions = kwargs.get("logits_to_keep")
        route = self._route(given, kwargs, rows, length)
        if not isinstance(route, nn.Module):  # per-layer weights are known when the pass is over
            self._note(self._as_weights(route, rows, length))
        guesses = self._guesses_here()
        self.mixture.enter(route if guesses is None else guesses.widened(route, kwargs), self._counted(kwargs))
        return (), kwargs

    def _guesses_here(self) -> Guesses | None:
        return self._guessing if self._routed_by_router and not torch.compiler.is_compiling() else None

    def _answer(self) -> Any:
        """The output of the pass under way, where guesses have found it."""
        guesses = self._guesses_here()
        return None if guesses is None else guesses.answer()

    def _counted(self, kwargs: dict[str, Any]) -> Tensor | None:
        """The pass's attention mask, where the router counts tokens and must leave padding out."""
        mask = kwargs.get("attention_mask")
        if mask is None or self.features != "layer" or not (self._routed_by_router and self.needs_whole_pass):
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise RoutingError("the router counts the tokens of a row: attention_mask should be (rows, tokens), 0 at padding")
        return mask

    def _route(self, given: Forced, kwargs: dict[str, Any], rows: int, length: int) -> Route:
        if given is None:
            return self._router_route(kwargs)
        return self._row_route(given, kwargs) if isinstance(given, RowRoutes) else self.as_route(given, rows, length)

    def _row_route(self, routes: RowRoutes, kwargs: dict[str, Any]) -> Route:
        if self.features == "layer" and self.router is not None:
            if self.needs_whole_pass:
                raise RoutingError("the router counts the tokens of a row: no rows of single experts beside it in one pass")
            return routes.gates(self.router)
        return routes.fill(self._router_route(routes.of_routed_rows(kwargs)))

    def _after(self, module: nn.Module, args: tuple, output: object) -> object:
        if not self.mixture.active:  # the pre-hook itself refused
            return output
        route = self.mixture.route
        self.mixture.leave()
        if isinstance(route, nn.Module) and self.mixture.layer_weights:
            by_layer, self.mixture.layer_weights = self.mixture.layer_weights, {}
            self._note(torch.stack([by_layer[index] for index in sorted(by_layer)], dim=2))
        guesses = self._guesses_here()
        return output if guesses is None else guesses.narrowed(output)

    def _note(self, weights: Tensor) -> None:
        self.last_weights = weights.detach()
        if self._routed_by_router and self._recordings:
            self._recordings[-1].append(weights)

    def as_route(self, given: int | Tensor | Off, rows: int, length: int) -> Route:
        """Explicit weights or expert ids as a route.

        Args:
            given: ADAPTERS_OFF; an expert id; (rows,) integer ids; or weights (E,), (B, E), (B, S|1, E), (B, S|1, L, E).
                B is 1, the number of rows, or divides it (generation repeats each prompt for its beams and samples).

        Raises:
            UnknownExpert: an id out of range. RoutingError: a shape that does not fit.
        """
        if given is ADAPTERS_OFF:
            return None
        if not isinstance(given, Tensor):
            return self.mixture.check_expert(given)
        experts = self.mixture.num_experts
        if not given.is_floating_point():
            for expert_id in given.flatten().tolist():
                self.mixture.check_expert(expert_id)
            given = nn.functional.one_hot(given.flatten(), experts).to(torch.float32)
        if given.dim() <= 2:
            given = given.reshape(-1, 1, given.shape[-1])
        if given.shape[0] not in (0, 1, rows) and rows % given.shape[0] == 0:
            given = given.repeat_interleave(rows // given.shape[0], dim=0)
        fits = given.dim() in (3, 4) and given.shape[0] in (1, rows) and given.shape[1] in (1, length)
        layers = self.mixture.num_layers
        if not (fits and given.shape[-1] == experts and (given.dim() == 3 or given.shape[2] == layers)):
            raise RoutingError(
                f"routing_weights of shape {tuple(given.shape)}, but should be ({rows}, {length}, {experts}) or "
                f"({rows}, {length}, {layers}, {experts}), for each of {layers} routed layers"
            )
        return given.to(self.causal_lm.device)

    def _as_weights(self, route: int | Tensor | None, rows: int, length: int) -> Tensor:
        if route is None:
            return torch.zeros(rows, length, self.mixture.num_experts, device=self.causal_lm.device)
        if isinstance(route, int):
            ids = torch.full((rows, length), route, device=self.causal_lm.device)
            return nn.functional.one_hot(ids, self.mixture.num_experts).to(torch.float32)
        return route[:, :length].expand(rows, length, *route.shape[2:])  # guesses that are routed beside a step come after it

    def _router_route(self, kwargs: dict[str, Any]) -> Route:
        if self.router is None:
            raise RoutingError("this model has no router: give routing_weights, expert_id or a strategy")
        if self.needs_whole_pass:
            if kwargs.get("past_key_values") is not None:
                raise RoutingError("the router looks at other tokens of the pass: no past_key_values, but use_cache=False")
            kwargs["use_cache"] = False
        if self.features == "layer":
            return self.router
        _, length = _rows_and_length(kwargs)
        features = self._sight.of(kwargs, self._guesses_here())
        if features.shape[1] == length or getattr(self.router, "is_tokenwise", False):
            return self.router(features)
        return torch.cat([self.router(token) for token in features.split(1, dim=1)], dim=1)  # each as a step of its own

    def _bind_checkpointing(self) -> None:
        # However checkpointing was switched on (ours, transformers', PEFT's or the Trainer's way), it ends up in this attribute.
        for module in _around_layers(self.causal_lm) if self.causal_lm.training else ():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, RoutedCheckpoint):
                module._gradient_checkpointing_func = RoutedCheckpoint(function, self.mixture)


def _around_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those in it, without what routed layers are made of: with many experts that is nearly everything."""
    yield module
    for child in module.children():
        if not isinstance(child, RoutedLinear):
            yield from _around_layers(child)


def _rows_and_length(kwargs: dict[str, Any]) -> tuple[int, int]:
    source = kwargs.get("input_ids")
    source = kwargs.get("inputs_embeds") if source is None else source
    if source is None:
        raise RoutingError("neither input_ids nor inputs_embeds was given, but should be one of them")
    return source.shape[0], source.shape[1]


def _add_position_ids(kwargs: dict[str, Any]) -> None:
    """Positions counted from the first real token, so that left padding changes nothing (transformers: from column 0)."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and isinstance(mask, Tensor) and mask.dim() == 2:
        length = _rows_and_length(kwargs)[1]
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
