"""What the model does on a task, apart from its answer: the router's weights, and what every expert expects next.

Shapes: S tokens, L routed layers, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dylo_moe.expertise.answers import divergences, same_choices
from dylo_moe.expertise.choices import NOBODY
from dylo_moe.model import DyLoRA_MoE
from dylo_moe.routes.measures import dominant, shares_of
from dylo_moe.routes.observing import Tokens
from dylo_moe.routes.observing import observe as observe_routing

# Numbers of next-token distributions that are compared at once, float32: of long prompts the last positions are compared.
LOGITS = 2**25


@dataclass(frozen=True)
class Observed:
    """Of one task.

    Attributes:
        prompt: (E,) the router's weights as shares of 1, the mean over the prompt's tokens (and layers); all 0 where it weighs
            nobody; None without a router.
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
    expert = dominant(shares) if shares is not None and shares.any() else None
    return NOBODY if expert is None else expert


@torch.no_grad()
def observe(model: DyLoRA_MoE, tokens: Tokens) -> Observed:
    """Runs prompt and answer through the router once, and the prompt through every expert.

    tokens: of the prompt, and behind it what the router's model answered, if it did.
    """
    prompt, answer = None, None
    if model.router is not None:
        ((_, seen),) = observe_routing(model, [tokens], 1)
        shares = shares_of(seen.weights).mean(axis=1)
        prompt = _mean_share(shares[: tokens.prompt_length])
        answer = _mean_share(shares[tokens.prompt_length :]) if len(tokens.ids) > tokens.prompt_length else None
    ids = torch.tensor([tokens.ids[: tokens.prompt_length]], device=model.device)
    logits, losses = _experts_alone(model, ids)
    return Observed(
        prompt=prompt,
        answer=answer,
        best=int(losses.argmin()),
        divergence=divergences(logits).double().cpu().numpy(),
        same_choice=same_choices(logits).double().cpu().numpy(),
        positions=logits.shape[1],
    )


def _mean_share(shares: np.ndarray) -> np.ndarray:
    """(S, E) -> (E,), with the sum 1 although some tokens may have weighed nobody."""
    mean = shares.mean(axis=0)
    return np.minimum(mean / mean.sum(), 1.0) if mean.any() else mean


def _experts_alone(model: DyLoRA_MoE, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """What every expert alone expects after the prompt's tokens, the last of them if they are many, (E, positions, V).

    And its mean loss on the prompt, (E,), as `strategies.prompt_losses` has it. prompt: (1, S).

    One expert after the other: the next-token distributions of all of them together may not fit into memory.
    """
    vocabulary = model.config.get_text_config().vocab_size
    kept = max(1, LOGITS // (model.num_experts * vocabulary))
    logits, losses = [], []
    for expert in range(model.num_experts):
        found = model(prompt, torch.ones_like(prompt), expert_id=expert, use_cache=False).logits[0]
        lost = F.cross_entropy(found[:-1].float(), prompt[0, 1:], reduction="sum") / max(1, prompt.shape[1] - 1)
        logits.append(found[-kept:].float())
        losses.append(lost)
    return torch.stack(logits), torch.stack(losses)


def loads(observed: Sequence[Observed]) -> np.ndarray | None:
    """(E,) the router's mean share of every expert, over the tasks, answers where there are any; None without a router."""
    shares = [seen.prompt if seen.answer is None else seen.answer for seen in observed]
    return None if not shares or shares[0] is None else np.minimum(np.mean(shares, axis=0), 1.0)
