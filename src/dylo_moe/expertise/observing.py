"""What the model does on a task, apart from its answer: the router's weights, and what every expert expects next.

Shapes: B batch, S tokens, L routed layers, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dylo_moe.expertise.answers import divergences, same_choices
from dylo_moe.expertise.choices import NOBODY
from dylo_moe.model import DyLoRA_MoE
from dylo_moe.strategies import best_experts

# Numbers of next-token distributions that are compared at once, float32: of long prompts the last positions are compared.
LOGITS = 2**25
_EQUAL = 1e-6


@dataclass(frozen=True)
class Task:
    """Token ids: the whole prompt, (1, S), and what the router's model answered, (1, G); G may be 0."""

    prompt: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Observed:
    """Of one task.

    Attributes:
        prompt: (E,) the router's weights, mean of their absolute values over the prompt's tokens (and layers), as shares of 1;
            all 0 where it weighs nobody; None without a router.
        answer: the same over the tokens of the answer; None without a router or answer.
        best: the expert with the lowest loss on the prompt, as the strategy "best" chooses.
        divergence: (E, E) mean KL divergence of the next-token distributions on the prompt, nats.
        same_choice: (E, E) share of positions whose likeliest next token is the same.
        positions: how many positions of the prompt were compared, its last ones.
    """

    prompt: np.ndarray | None
    answer: np.ndarray | None
    best: int
    divergence: np.ndarray
    same_choice: np.ndarray
    positions: int

    @property
    def chosen(self) -> int:
        """The expert with the most weight over the answer, or over the prompt where there is no answer; see `heaviest`."""
        return self.chosen_on_prompt if self.answer is None else self.chosen_on_answer

    @property
    def chosen_on_prompt(self) -> int:
        return heaviest(self.prompt)

    @property
    def chosen_on_answer(self) -> int:
        return heaviest(self.answer)

    @property
    def moved(self) -> bool:
        """Whether prompt and answer have different heaviest experts."""
        return self.answer is not None and self.chosen_on_prompt != self.chosen_on_answer


def heaviest(shares: np.ndarray | None) -> int:
    """The expert with more weight than any other; NOBODY where two share the first place, as with a uniform router."""
    if shares is None or not shares.any():
        return NOBODY
    top = np.flatnonzero(shares >= shares.max() * (1 - _EQUAL))
    return int(top[0]) if len(top) == 1 else NOBODY


@torch.no_grad()
def observe(model: DyLoRA_MoE, task: Task) -> Observed:
    """Runs the prompt and answer through the router once, and the prompt through every expert."""
    prompt, answer = None, None
    if model.router is not None:
        length = task.prompt.shape[1]
        weights = router_shares(model, torch.cat([task.prompt, task.answer], dim=1))
        prompt = _mean_share(weights[:length])
        answer = _mean_share(weights[length:]) if task.answer.shape[1] else None
    logits = _expert_logits(model, task.prompt)
    return Observed(
        prompt=prompt,
        answer=answer,
        best=int(best_experts(model, task.prompt)),
        divergence=divergences(logits).double().cpu().numpy(),
        same_choice=same_choices(logits).double().cpu().numpy(),
        positions=logits.shape[1],
    )


def router_shares(model: DyLoRA_MoE, input_ids: Tensor) -> np.ndarray:
    """Absolute routing weights of every token, the mean over layers where each has its own, (S, E). input_ids: (1, S).

    Absolute, because an X-LoRA without a softmax may weigh below 0, and such an expert speaks too.
    """
    model(input_ids)
    weights = model.last_routing_weights[0].double().abs()
    return (weights.mean(dim=1) if weights.dim() == 3 else weights).cpu().numpy()


def _mean_share(weights: np.ndarray) -> np.ndarray:
    """(S, E) -> (E,)"""
    mean = weights.mean(axis=0)
    return mean / mean.sum() if mean.any() else mean


def _expert_logits(model: DyLoRA_MoE, prompt: Tensor) -> Tensor:
    """What every expert alone expects after the prompt's tokens, the last of them if they are many; (E, positions, V)."""
    experts, vocabulary = model.num_experts, model.config.get_text_config().vocab_size
    kept = min(prompt.shape[1], max(1, LOGITS // (experts * vocabulary)))
    ids = prompt.expand(experts, -1)
    each = torch.arange(experts, device=prompt.device)
    return model(ids, torch.ones_like(ids), expert_id=each, use_cache=False, logits_to_keep=kept).logits


def loads(observed: list[Observed]) -> np.ndarray | None:
    """(E,) the router's mean share of every expert, over the tasks, answers where there are any; None without a router."""
    shares = [seen.prompt if seen.answer is None else seen.answer for seen in observed]
    return None if not shares or shares[0] is None else np.mean(shares, axis=0)
