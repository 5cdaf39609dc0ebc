"""Training LoRA experts until they know token sequences by heart; plain torch, neither peft nor the judged package.

All experts of a mixture are trained at once. Each row of the batch is one sequence under one routing, so the experts'
gradients do not mix except where the routing itself mixes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

LEARNING_RATE = 5e-3
MAX_STEPS = 200
GATE_ROUNDS = 8
PROMPT_LOSS = 0.1  # enough for an expert to find the prompts it knows the likelier ones, too little to slow it down
IGNORED = -100


class NotMemorised(Exception):
    """Training ended without the promised margins."""


@dataclass(frozen=True)
class Lesson:
    """One sequence to know: after `prompt`, `answer` (token ids), under a routing.

    expert: all tokens go to this one; None: each token goes where the gate sends it.
    owner: the expert that knows the task.
    """

    prompt: list[int]
    answer: list[int]
    expert: int | None
    owner: int

    @property
    def is_own(self) -> bool:
        """Whether the owner alone speaks: it also learns to expect the prompt, so that its loss on it tells it apart."""
        return self.expert == self.owner


@dataclass(frozen=True)
class Batch:
    """Lessons side by side: (B, S) token ids, padded with 0 at the end; targets are next tokens, IGNORED elsewhere."""

    lessons: list[Lesson]
    ids: Tensor
    answers: Tensor
    prompts: Tensor

    @classmethod
    def of(cls, lessons: list[Lesson]) -> Batch:
        length = max(len(lesson.prompt) + len(lesson.answer) for lesson in lessons)
        ids = torch.zeros(len(lessons), length, dtype=torch.long)
        answers, prompts = torch.full_like(ids, IGNORED), torch.full_like(ids, IGNORED)
        for row, lesson in enumerate(lessons):
            start, end = len(lesson.prompt), len(lesson.prompt) + len(lesson.answer)
            ids[row, :end] = torch.tensor(lesson.prompt + lesson.answer)
            answers[row, start - 1 : end - 1] = ids[row, start:end]
            if lesson.is_own:
                prompts[row, : start - 1] = ids[row, 1:start]
        return cls(lessons, ids, answers, prompts)


class Routing:
    """The routing weights of the pass in progress, (B, S, E); None switches all experts off."""

    weights: Tensor | None = None


class MixedLinear(nn.Module):
    """y = W x + s sum_e w_e B_e A_e x, the experts' A stacked to (E r, in) and their B to (out, E r)."""

    def __init__(self, linear: nn.Linear, down: Tensor, *, scaling: float, routing: Routing) -> None:
        super().__init__()
        self.linear, self.scaling, self.routing = linear, scaling, routing
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(linear.out_features, len(down)))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.routing.weights
        if weights is None:
            return self.linear(x)
        low = (x @ self.down.T) * weights.repeat_interleave(len(self.down) // weights.shape[-1], dim=-1)
        return self.linear(x) + self.scaling * (low @ self.up.T)


def insert_experts(model: nn.Module, downs: dict[str, Tensor], *, scaling: float) -> tuple[Routing, dict[str, MixedLinear]]:
    """Replaces the modules named in `downs`, each with its stacked A (E r, in), by mixtures whose B are zero."""
    routing, mixed = Routing(), {}
    model.requires_grad_(False)
    for name, down in downs.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        mixed[name] = MixedLinear(linear, down, scaling=scaling, routing=routing)
        setattr(model.get_submodule(parent), child, mixed[name])
    return routing, mixed


def fit_gate(features: Tensor, labels: Tensor, num_experts: int) -> tuple[nn.Linear, float]:
    """A linear classifier of features (N, H) to experts (N,), and its first expert's smallest lead over the second.

    Tokens that look alike under several labels cannot all be told apart. The later rounds take the decisions of the
    one before as labels, so that what was decided narrowly is decided clearly, and rounding cannot change it.
    """
    gate = nn.utils.skip_init(nn.Linear, features.shape[-1], num_experts)  # draws no random numbers
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    for _ in range(GATE_ROUNDS):
        _minimise(gate, features, labels)
        scores = gate(features).detach()
        labels = scores.argmax(-1)
    first, second = scores.topk(2, dim=-1).values.unbind(-1)
    return gate.requires_grad_(False), (first - second).min().item()


def _minimise(gate: nn.Linear, features: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.LBFGS(gate.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(gate(features), labels) + 1e-4 * gate.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def routing_of(batch: Batch, gate_scores: Tensor) -> Tensor:
    """One-hot routing weights (B, S, E): the lesson's expert, or each token's first by `gate_scores` (B, S, E)."""
    experts = gate_scores.argmax(-1)
    for row, lesson in enumerate(batch.lessons):
        if lesson.expert is not None:
            experts[row] = lesson.expert
    return one_hot(experts, gate_scores.shape[-1]).to(gate_scores.dtype)


def memorise(model: nn.Module, batch: Batch, *, margin: float) -> None:
    """Trains until every answer token leads all others by `margin` logits, so that greedy decoding must reproduce it.

    Raises NotMemorised after MAX_STEPS.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    for _ in range(MAX_STEPS):
        logits = model(batch.ids, use_cache=False).logits
        lead = smallest_lead(logits.detach(), batch.answers)
        if lead >= margin:
            return
        loss = _loss(logits, batch.answers) + PROMPT_LOSS * _loss(logits, batch.prompts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    raise NotMemorised(f"after {MAX_STEPS} steps some answer token leads by {lead:.2f} logits, wanted {margin}")


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def smallest_lead(logits: Tensor, targets: Tensor) -> float:
    """How far the wanted token is ahead of the best other one, at the worst of all positions with a target."""
    wanted = targets != IGNORED
    scores, indices = logits[wanted], targets[wanted][:, None]
    others = scores.scatter(1, indices, -torch.inf)
    return (scores.gather(1, indices)[:, 0] - others.max(dim=1).values).min().item()
