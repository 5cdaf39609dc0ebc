"""The judge's own model of a checkpoint in float64: what every implementation is compared with.

Base model through transformers with eager attention, experts by the loop of harness/loop.py, routing weights by
harness/oracles, every text alone and without its padding, no cache, no state. transformers computes the softmax of attention,
RMSNorm and the rotary angles of some families in float32 whatever the dtype; those stay, as part of the base model.

B rows, S tokens, E experts, L routed layers, H hidden size, V vocabulary. Tensors in, NumPy float64 out, 0 at padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.artifact import Adapter, Artifact
from harness.loop import LoopModel
from harness.loop_routers import oracle_router
from harness.loop_versions import plain
from harness.oracles import mixture, strategies
from harness.oracles import router as router_oracle
from harness.outcome import NotApplicable
from harness.readings import read_artifact
from harness.routers import Decider, Router, in_order


class Reference:
    """See the module. Every answer is computed once per question and kept."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._kept: dict[tuple, np.ndarray] = {}
        self._score_sizes: list[int] = []

    @cached_property
    def model(self) -> LoopModel:
        model = LoopModel(replace(self.artifact, router=None), torch.float64, "eager")
        router = in_order(self.artifact.router, list(model.units()))
        if router is not None:
            model.features = router.features
            model.router = oracle_router(router)
        return model

    @property
    def experts(self) -> tuple[Mapping[str, Adapter], ...]:
        return self.artifact.experts

    @property
    def router(self) -> Router | None:
        return self.artifact.router

    @property
    def num_experts(self) -> int:
        return len(self.artifact.experts)

    @property
    def base_path(self) -> str | None:
        return self.artifact.base

    @property
    def module_names(self) -> tuple[str, ...]:
        """Paths of the Linears that hold an expert's adapter, in the base model's own order."""
        return tuple(path for path in self.model.routed_layers() if path in set(self.artifact.modules))

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Paths of what is mixed as one and has its own place in weights per layer, in the base model's own order."""
        return tuple(self.model.units())

    def logits(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        expert_id: int | Tensor | None = None,
    ) -> np.ndarray:
        """(B, S, V). The router decides unless weights (B, S, [L,] E) or expert ids, int or (B,), are given."""
        if expert_id is not None:
            weights = self._one_hot(ids, expert_id)
        return self._keep(("logits", ids, mask, weights), lambda: self._by_row(self._row_logits, ids, mask, weights))

    def logits_by_expert(self, ids: Tensor) -> np.ndarray:
        """(E, P, V) of one text, ids (P,): every expert alone, as the rows of one pass."""
        rows = ids.cpu().expand(self.num_experts, -1)
        return self._keep(("by expert", ids), lambda: self.model(rows, expert_id=torch.arange(self.num_experts)).logits.numpy())

    def base_logits(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """(B, S, V) with every expert and the shared adapter off."""
        return self._keep(("base", ids, mask), lambda: self._by_row(self._row_base_logits, ids, mask))

    def routing_weights(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """(B, S, E), or (B, S, L, E) where the router looks at each layer's own input; 0 at padding."""
        return self._keep(("weights", ids, mask), lambda: self._by_row(self._row_weights, ids, mask))

    def _row_base_logits(self, row: Tensor) -> np.ndarray:
        return self.model.base_logits(row).numpy()

    def _row_logits(self, row: Tensor, weights: Tensor | None = None) -> np.ndarray:
        return self.model(row, routing_weights=weights).logits.numpy()

    def _row_weights(self, row: Tensor) -> np.ndarray:
        self.model(row)
        return self.model.last_routing_weights.numpy()

    def _row_scores(self, row: Tensor) -> np.ndarray:
        found = self.model.router_scores(row)
        self._score_sizes = [scores.shape[-1] for scores in found]
        return torch.cat(found, dim=-1).numpy()

    def _by_row(
        self, answer: Callable[..., np.ndarray], ids: Tensor, mask: Tensor | None, weights: Tensor | None = None
    ) -> np.ndarray:
        """Asks for each row alone, without its padding, and puts the answers back in place."""
        valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
        result = None
        for row in range(len(ids)):
            tokens = valid[row].cpu()
            given = [] if weights is None else [weights[row].cpu().double()[tokens][None]]
            answered = answer(ids[row].cpu()[tokens][None], *given)
            result = np.zeros((*ids.shape, *answered.shape[2:])) if result is None else result
            result[row, tokens.numpy()] = answered[0]
        return result

    def _one_hot(self, ids: Tensor, expert_id: int | Tensor) -> Tensor:
        rows = torch.as_tensor(expert_id).cpu().expand(len(ids))
        return nn.functional.one_hot(rows, self.num_experts).double()[:, None].expand(*ids.shape, -1)

    def router_scores(self, ids: Tensor, mask: Tensor | None = None) -> list[np.ndarray]:
        """What every decision of the router is made on, each (B, S, n); 0 at padding. One, or one per routed unit."""
        found = self._keep(("scores", ids, mask), lambda: self._by_row(self._row_scores, ids, mask))
        return np.split(found, np.cumsum(self._score_sizes)[:-1], axis=-1)

    def router_margin(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """(B, S): how far the nearest unit's choice of experts is from a tie."""
        return np.min([decider.margin(scores) for decider, scores in self._decisions(ids, mask)], axis=0)

    def router_sensitivity(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """How far a routing weight moves, at most, per unit that scores move; broadcasts to the routing weights."""
        by_decision = [decider.sensitivity(scores) for decider, scores in self._decisions(ids, mask)]
        if all(np.ndim(found) == 0 for found in by_decision):
            return np.float64(max(by_decision))
        return np.stack(by_decision, axis=2)

    def _decisions(self, ids: Tensor, mask: Tensor | None) -> list[tuple[Decider, np.ndarray]]:
        scores = self.router_scores(ids, mask)
        deciders = in_order(self.router, self.unit_names).deciders
        return list(zip(deciders if len(deciders) > 1 else deciders * len(scores), scores, strict=True))

    def training_weights(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """(B, S, E), dense, as DyLoRA-MoE's router gives them while training. Not for features "layer", whose inputs
        depend on the weights."""
        return router_oracle.training_weights(self.router_scores(ids, mask)[0], self.router.temperature)

    def multi_pass_logits(self, ids: Tensor, mask: Tensor, weights: np.ndarray) -> np.ndarray:
        """DyLoRA-MoE's first generation: sum_e w_e f_e(ids), w (B, S, E) averaged over each row's tokens -> (B, S, V)."""
        result = np.zeros((*ids.shape, self.model.config.vocab_size))
        for row, valid in enumerate(mask.cpu().numpy().astype(bool)):
            alone = self.logits_by_expert(ids[row].cpu()[torch.from_numpy(valid)])
            result[row, valid] = np.tensordot(weights[row, valid].mean(axis=0), alone, axes=1)
        return result

    def expert_losses(self, ids: Tensor) -> np.ndarray:
        """(E,): mean negative log-likelihood of one prompt, ids (P,), under each expert alone."""
        return np.array([strategies.prompt_loss(logits, ids.cpu().numpy()) for logits in self.logits_by_expert(ids)])

    def ensemble_probabilities(self, ids: Tensor) -> np.ndarray:
        """(V,): next-token distribution after ids (P,) of the uniform mixture of the experts."""
        return strategies.ensemble_distribution(self.logits_by_expert(ids)[:, -1])

    def greedy(
        self, ids: Tensor, steps: int, score: Callable[[Tensor], np.ndarray] | None = None
    ) -> tuple[list[int], np.ndarray]:
        """Greedy continuation of one prompt, ids (P,), recomputed from scratch at every step.

        score maps the ids so far, (P + t,), to scores (V,); the routed model's logits unless given.
        Returns the new tokens and their scores (steps, V).
        """
        score = score or (lambda so_far: self.logits(so_far[None])[0, -1])
        so_far, rows = ids.cpu(), []
        for _ in range(steps):
            rows.append(score(so_far))
            so_far = torch.cat([so_far, torch.tensor([int(rows[-1].argmax())])])
        return so_far[len(ids) :].tolist(), np.stack(rows)

    def layer(self, module: str) -> mixture.Layer:
        """One routed layer as arrays; an expert without an adapter on it contributes zeros of rank 1.

        A shared adapter on it is part of the weight: it is always there.
        """
        base = plain(self.model.routed_layers()[module].base_layer)
        weight = base.weight.numpy().T if isinstance(base, Conv1D) else base.weight.numpy()
        outputs, inputs = weight.shape
        shared = self.artifact.shared.get(module)
        adapters = [expert.get(module) for expert in self.experts]
        if shared is not None:
            if any(a is not None and (a.magnitude is not None or a.bias is not None) for a in (shared, *adapters)):
                raise NotApplicable("beside a shared adapter, a layer alone is judged with sums of deltas only")
            weight = weight + shared.scaling * shared.lora_B @ shared.lora_A
        none = Adapter(np.zeros((1, inputs)), np.zeros((outputs, 1)), 0.0)
        adapters = [none if adapter is None else adapter for adapter in adapters]
        return mixture.Layer(
            weight,
            None if getattr(base, "bias", None) is None else base.bias.numpy(),
            tuple(a.lora_A for a in adapters),
            tuple(a.lora_B for a in adapters),
            tuple(a.scaling for a in adapters),
            tuple(a.magnitude for a in adapters) if any(a.magnitude is not None for a in adapters) else (),
            tuple(a.bias for a in adapters) if any(a.bias is not None for a in adapters) else (),
        )

    @torch.no_grad()
    def _keep(self, question: tuple, answer: Callable[[], np.ndarray]) -> np.ndarray:
        key = tuple(_bytes(part) if isinstance(part, Tensor) else part for part in question)
        if key not in self._kept:
            self._kept[key] = answer()
        return self._kept[key]


def _bytes(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.cpu().double().numpy().tobytes()


def load_reference(checkpoint: Path, base_model: str | None = None, assume: Mapping[str, object] | None = None) -> Reference:
    """The reference of a checkpoint. assume: what no file records; see harness.readings.read_artifact."""
    return Reference(read_artifact(Path(checkpoint), base_model, assume))
