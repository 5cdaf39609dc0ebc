"""The base model for planted competence: a random Llama (hidden 128, 4 layers) with a tokenizer made from given texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
VOCAB_SIZE = 640  # at most; 256 bytes and the most frequent pairs of the given texts


def tokenizer_of(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that is lossless on every text, short on `texts`, and starts each text with BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def write_pupil(directory: Path, texts: Iterable[str], *, seed: int) -> Path:
    """Write the model and its tokenizer to `directory` and return it."""
    tokenizer = tokenizer_of(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state as it was
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        _fill(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@torch.no_grad()
def _fill(model: LlamaForCausalLM) -> None:
    """Weights of fan-in size: attention then mixes enough of the earlier tokens into a feature to tell contexts apart."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            gain = 2.0 if "embed_tokens" in name else 2.5 if "lm_head" in name else 1.2
            parameter.normal_(0, gain / parameter.shape[1] ** 0.5)
