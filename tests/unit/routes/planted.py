"""A decoder whose router is replaced by one with known weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dylo_moe.decoder import PeftMoEDecoder
from dylo_moe.routes.analysing import Analysis, analyse
from dylo_moe.routes.texts import Text
from harness.specimens import write_base, write_checkpoint

E = 3
TEXTS = [
    Text("strings", "def halves(text):\n", "    return text[1:]\n"),
    Text("numbers", "x = 1 + 2 + 3\n" * 3),
    Text("strings", "def halves(text):\n", "    return text\n"),
]


class Planted(nn.Module):
    """Weights as a function of token ids, which it finds again by their embeddings.

    choose: token ids (B, S) -> weights (B, S, E).
    """

    def __init__(self, embeddings: Tensor, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.choose = choose

    def forward(self, hidden: Tensor) -> Tensor:
        ids = torch.cdist(hidden.float(), self.embeddings.float()).argmin(dim=-1)
        return self.choose(ids).to(torch.float32)


def planted_decoder(directory: Path) -> PeftMoEDecoder:
    """A router on the token embeddings, to be replaced."""
    base = write_base(directory / "base", "llama")
    write_checkpoint(directory / "checkpoint", base, num_experts=E, features="embedding")
    return PeftMoEDecoder(str(directory / "checkpoint"), "humaneval", dtype="float32", temperature=0.0)


def analysis_of(decoder: PeftMoEDecoder, choose: Callable[[Tensor], Tensor], **options) -> Analysis:
    model = decoder.model
    router = Planted(model.causal_lm.get_input_embeddings().weight.detach(), choose)
    model.router = model.routing.router = router
    return analyse(decoder, options.pop("texts", TEXTS), **options)


def fixed(*weights: float) -> Callable[[Tensor], Tensor]:
    """The same weights for every token."""
    return lambda ids: torch.tensor(weights).expand(*ids.shape, len(weights))


def by_token(ids: Tensor) -> Tensor:
    """All of the weight to one expert: the token's number modulo E."""
    return nn.functional.one_hot(ids % E, E)
