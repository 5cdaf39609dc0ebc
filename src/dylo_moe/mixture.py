"""What the routed layers of one model mix in the pass under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor, nn

from dylo_moe.errors import RoutingError, UnknownExpert
from dylo_moe.held import Held
from dylo_moe.plain import Kinds
from dylo_moe.spread import Spread
from dylo_moe.threads import PerThread, ThreadState

# None: adapters off. int: that expert alone. Tensor: (B|1, S|1, E) or (B, S, L, E). nn.Module: routes each layer's own input;
# a ModuleList has one gate per layer, any other module is shared by all of them.
Route = None | int | Tensor | nn.Module


class _Now(ThreadState):
    """What one thread's passes mix."""

    def __init__(self) -> None:
        self.asked: int | Tensor | None = None
        self.kept_positions: int | Tensor | None = None
        self.layer_weights: dict[int, Tensor] = {}
        self.held: Held | None = None
        self._routes: list[Route] = []
        self._tokens: list[Tensor | None] = []
        self._spreads: list[Spread | None] = []


class Mixture:
    """What the routed layers of one model mix at this moment. One object per model, shared by its layers.

    A layer outside of a routed forward pass refuses to run: falling back to any mixture would be silently wrong.

    Args:
        expert_names: adapters in the order of the routing weights' columns.
        shared: an adapter that is no expert: added with weight 1 wherever it exists, unless the adapters are off.

    Attributes:
        active_expert: the one that runs in every pass of which nothing else was asked; None: the router decides.
    """

    asked = PerThread()  # of the passes under way, instead of the router's choice
    kept_positions = PerThread()  # the pass's logits_to_keep
    layer_weights = PerThread()
    held = PerThread()  # while nobody can change a weight
    _routes = PerThread()
    _tokens = PerThread()  # of the routes
    _spreads = PerThread()  # of the routes

    def __init__(self, expert_names: list[str], shared: str | None = None) -> None:
        self.expert_names = expert_names
        self.shared = shared
        self.num_layers = 0
        self.active_expert: int | None = None
        self.kinds = Kinds()
        self.now = _Now()
        self._layouts: dict[tuple, tuple[Tensor, Tensor]] = {}

    @property
    def forced(self) -> int | Tensor | None:
        """What passes use instead of the router's choice."""
        return self.active_expert if self.asked is None else self.asked

    @property
    def num_experts(self) -> int:
        return len(self.expert_names)

    @property
    def route(self) -> Route:
        if not self._routes:
            raise RoutingError("a routed layer was called outside of its model's forward; call the model itself")
        return self._routes[-1]

    @property
    def active(self) -> bool:
        return len(self._routes) > 0  # torch 2.11 compiles no bool() of a list

    @property
    def tokens(self) -> Tensor | None:
        """(B, S), 0 where the pass has padding, for routers that count; None where it has none."""
        return self._tokens[-1]

    def enter(self, route: Route, tokens: Tensor | None = None) -> None:
        self._routes.append(route)
        self._tokens.append(tokens)
        self._spreads.append(None)

    def leave(self) -> None:
        self._routes.pop()
        self._tokens.pop()
        self._spreads.pop()

    @contextmanager
    def asking(self, route: int | Tensor | None) -> Iterator[None]:
        """Passes inside are asked for this route, whatever those around them are; None leaves it to the router.

        A pass that Ctrl-C ended has not left: torch then calls no hook. It is left here.
        """
        asked, depth = self.asked, len(self._routes)
        self.asked = route
        try:
            yield
        finally:
            self.asked = asked
            del self._routes[depth:], self._tokens[depth:], self._spreads[depth:]

    def spread(self, weights: Tensor, shape: tuple[int, int]) -> Spread:
        """The weights (B|1, S|1, E) over an input of (B, S); the route's own are worked out once.

        A checkpointed block has a route of its own, in its first pass as when it is recomputed: it records the same.
        """
        if torch.compiler.is_compiling():
            return Spread(weights, shape, {})
        if not self._routes or weights is not self._routes[-1]:
            return Spread(weights, shape, self._layouts)
        kept = self._spreads[-1]
        if kept is None or kept.shape != shape or kept.grows != torch.is_grad_enabled():
            kept = self._spreads[-1] = Spread(weights, shape, self._layouts)
        return kept

    def pass_spread(self, x: Tensor) -> Spread | None:
        """The spread of the pass over an input x (B, S, in); None unless all layers have the same weights, and these fit x."""
        if x.dim() != 3:
            return None
        spreads, shape = self.now._spreads, x.shape[:2]
        known = spreads[-1] if spreads else None
        if known is not None and known.shape == shape:
            return known
        route = self.route
        if not isinstance(route, Tensor) or route.dim() != 3 or route.shape[2] != self.num_experts:
            return None
        return self.spread(route, shape) if route.shape[0] in (1, shape[0]) and route.shape[1] in (1, shape[1]) else None

    @contextmanager
    def using(self, route: Route, tokens: Tensor | None = None) -> Iterator[None]:
        self.enter(route, tokens)
        try:
            yield
        finally:
            self.leave()

    def weights_at(self, route: Tensor | nn.Module, length: int, *, is_readout: bool) -> Tensor:
        """The weights of a module that is no routed layer of its own, (B|1, length|1, E).

        is_readout: with logits_to_keep, it sees the last positions, or the kept ones, only.

        Raises:
            RoutingError: each layer has its own weights, and this module is none of them.
        """
        if isinstance(route, nn.Module) or route.dim() == 4:
            raise RoutingError("experts with modules or biases of their own need one routing for all layers, not one per layer")
        return self.kept(route, length) if is_readout else route

    def kept(self, weights: Tensor, length: int) -> Tensor:
        """The weights (B, S, E) at the `length` positions that the readout sees."""
        if isinstance(self.kept_positions, Tensor) and weights.shape[1] > 1:
            return weights[:, self.kept_positions]
        return weights[:, -length:] if length < weights.shape[1] else weights

    def check_expert(self, expert_id: int) -> int:
        """Any integer type, NumPy's too, as an int. Raises UnknownExpert unless 0 <= expert_id < num_experts."""
        if isinstance(expert_id, bool) or not isinstance(expert_id, Integral) or not 0 <= expert_id < self.num_experts:
            raise UnknownExpert(f"expert_id={expert_id!r}, but should be an integer from 0 to {self.num_experts - 1}")
        return int(expert_id)
