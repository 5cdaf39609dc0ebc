"""Which models compute a token alike in a pass of one and in a pass of several: only for these can tokens be guessed."""

from __future__ import annotations

import math
from itertools import chain

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def computes_tokens_alone(causal_lm: PreTrainedModel, router: nn.Module) -> bool:
    """Whether what a token gets hangs on no token behind it, on no other row, and on no random number."""
    text = causal_lm.config.get_text_config()
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", False):
        return False
    if getattr(text, "output_router_logits", False):  # transformers then counts the tokens of a pass, by its mask
        return False
    modules = list(chain(causal_lm.modules(), router.modules()))
    return not any(module.training or getattr(module, "is_causal", True) is False for module in modules)


def alike_positions(config: PretrainedConfig) -> float:
    """How many positions a pass computes as it would without a later one beside it.

    A table of positions ends; rotary frequencies that depend on the length of the text ("dynamic", "longrope") are all rows'.
    """
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    limits = [getattr(text, "max_position_embeddings", None)]
    for kind in (rotary, *(kind for kind in rotary.values() if isinstance(kind, dict))):
        if kind.get("rope_type") == "longrope":
            limits += [kind.get("original_max_position_embeddings"), getattr(text, "original_max_position_embeddings", None)]
    return min((limit for limit in limits if limit is not None), default=math.inf)
