"""The judge's own model of a checkpoint in float64: what every implementation is compared with.

Base model through transformers with eager attention, experts by the loop of harness/loop.py, routing weights by
harness/oracles, every row alone and without its padding, no cache, no state. transformers computes the softmax of attention,
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

from harness.artifact import Adapter, Artifact, Gate, read_artifact
from harness.loop import LoopModel
from harness.oracles import mixture, strategies
from harness.oracles import router as router_oracle


class OracleRouter(nn.Module):
    """The router as the NumPy oracle computes it, always in evaluation mode; `inputs` collects what it was shown."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.definition = gate
        self.inputs: list[np.ndarray] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.inputs.append(hidden.detach().numpy())
        logits = router_oracle.router_logits(self.inputs[-1], self.definition.weight, self.definition.bias)
        return torch.from_numpy(router_oracle.evaluation_weights(logits, self.definition.top_k))


class Reference:
    """See the module. Every answer is computed once per question and kept."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._kept: dict[tuple, np.ndarray] = {}

    @cached_property
    def model(self) -> LoopModel:
        model = LoopModel(replace(self.artifact, gate=None), torch.float64, "eager")
        if self.artifact.gate is not None:
            model.features = self.artifact.gate.features
            model.router = OracleRouter(self.artifact.gate)
        return model

    @property
    def experts(self) -> tuple[Mapping[str, Adapter], ...]:
        return self.artifact.experts

    @property
    def router(self) -> Gate | None:
        return self.artifact.gate

    @property
    def num_experts(self) -> int:
        return len(self.artifact.experts)

    @property
    def base_path(self) -> str | None:
        return self.artifact.base

    @property
    def module_names(self) -> tuple[str, ...]:
        """Paths of the routed modules, in the base model's own order."""
        return tuple(self.model.routed_layers())

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

    def base_logits(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """(B, S, V) with every expert off."""
        return self.logits(ids, mask, weights=torch.zeros(*ids.shape, self.num_experts))

    def routing_weights(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """(B, S, E), or (B, S, L, E) where the router looks at each layer's own input; 0 at padding."""
        return self._keep(("weights", ids, mask), lambda: self._by_row(self._row_weights, ids, mask))

    def router_inputs(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """What the router looks at, (B, S, 1 or L, H); 0 at padding."""
        return self._keep(("router inputs", ids, mask), lambda: self._by_row(self._row_router_inputs, ids, mask))

    def _row_logits(self, row: Tensor, weights: Tensor | None = None) -> np.ndarray:
        return self.model(row, routing_weights=weights).logits.numpy()

    def _row_weights(self, row: Tensor) -> np.ndarray:
        self.model(row)
        return self.model.last_routing_weights.numpy()

    def _row_router_inputs(self, row: Tensor) -> np.ndarray:
        self.model.router.inputs.clear()
        self.model(row)
        return np.stack(self.model.router.inputs, axis=2)

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

    def router_logits(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """(B, S, 1 or L, E)"""
        return router_oracle.router_logits(self.router_inputs(ids, mask), self.router.weight, self.router.bias)

    def router_margin(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """(B, S): how far the nearest routed layer's choice of experts is from a tie."""
        return router_oracle.margin(self.router_logits(ids, mask), self.router.top_k).min(axis=2)

    def training_weights(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """(B, S, E), dense, as the router gives them while training. Not for features "layer", whose inputs
        depend on the weights."""
        return router_oracle.training_weights(self.router_logits(ids, mask)[:, :, 0], self.router.temperature)

    def multi_pass_logits(self, ids: Tensor, mask: Tensor, weights: np.ndarray) -> np.ndarray:
        """DyLoRA-MoE's first generation: sum_e w_e f_e(ids), w (B, S, E) averaged over each row's tokens -> (B, S, V)."""
        valid = mask.cpu().numpy()[..., None]
        row_weights = (weights * valid).sum(axis=1) / valid.sum(axis=1)
        passes = [self.logits(ids, mask, expert_id=expert) for expert in range(self.num_experts)]
        return sum(row_weights[:, expert, None, None] * logits for expert, logits in enumerate(passes))

    def expert_losses(self, ids: Tensor) -> np.ndarray:
        """(E,): mean negative log-likelihood of one prompt, ids (P,), under each expert alone."""
        passes = [self.logits(ids[None], expert_id=expert)[0] for expert in range(self.num_experts)]
        return np.array([strategies.prompt_loss(logits, ids.cpu().numpy()) for logits in passes])

    def ensemble_probabilities(self, ids: Tensor) -> np.ndarray:
        """(V,): next-token distribution after ids (P,) of the uniform mixture of the experts."""
        return strategies.ensemble_distribution(
            np.stack([self.logits(ids[None], expert_id=expert)[0, -1] for expert in range(self.num_experts)])
        )

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
        """One routed layer as arrays; an expert without an adapter on it contributes zeros of rank 1."""
        base = self.model.routed_layers()[module].base_layer
        weight = base.weight.numpy().T if isinstance(base, Conv1D) else base.weight.numpy()
        outputs, inputs = weight.shape
        none = Adapter(np.zeros((1, inputs)), np.zeros((outputs, 1)), 0.0)
        adapters = [expert.get(module, none) for expert in self.experts]
        return mixture.Layer(
            weight,
            None if getattr(base, "bias", None) is None else base.bias.numpy(),
            tuple(a.lora_A for a in adapters),
            tuple(a.lora_B for a in adapters),
            tuple(a.scaling for a in adapters),
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
    """The reference of a checkpoint. assume: what no file records: lora_alpha, top_k, temperature, router_features."""
    return Reference(read_artifact(Path(checkpoint), base_model, assume))
