"""What a model's generation configuration does to the logits besides sampling, as `generate` would do it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from dylo_moe.errors import OptionError

# Values that change nothing; anything else of these is refused, because leaving it out would change the texts in silence.
_NEUTRAL = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None,),
    "diversity_penalty": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None, {}),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "stop_strings": (None,),
    "remove_invalid_values": (None, False),
}
# They ask only which tokens a row has, so all rows can be asked at once, padding and all.
_SETS_OF_TOKENS = (RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor)


class Penalties:
    """The logits processors of a generation configuration, for rows that are padded on the left.

    Args:
        config: of the model.

    Raises:
        OptionError: it asks for something that cannot be done in a batch of our own.
    """

    def __init__(self, config: GenerationConfig) -> None:
        for name, neutral in _NEUTRAL.items():
            value = getattr(config, name, None)
            if value not in neutral:
                raise OptionError(f"the model's generation_config.json asks for {name}={value!r}, which is not available here")
        self._processors = LogitsProcessorList(_processors(config))

    def __call__(self, ids: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        """ids, mask: (rows, columns), padding repeats the row's first token; scores: (rows, vocabulary) -> the same shape."""
        if not self._processors:
            return scores
        if all(isinstance(processor, _SETS_OF_TOKENS) for processor in self._processors):
            return self._processors(ids, scores)
        rows = [self._processors(row[keep.bool()][None], score[None]) for row, keep, score in zip(ids, mask, scores, strict=True)]
        return torch.cat(rows)


def _processors(config: GenerationConfig) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    if config.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        found.append(NoBadWordsLogitsProcessor(config.bad_words_ids, config.eos_token_id))
    if config.suppress_tokens is not None:
        found.append(SuppressTokensLogitsProcessor(config.suppress_tokens))
    return found
