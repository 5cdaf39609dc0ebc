"""Texts as the model reads them, and tokens as a reader can tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dylo_moe.decoder import PeftMoEDecoder
from dylo_moe.prompts import chat_prompt
from dylo_moe.routes.observing import Tokens
from dylo_moe.routes.texts import Text

_MARKS = {" ": "·", "\n": "⏎\n", "\t": "⇥"}
_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}  # how byte-level tokenizers name their tokens
_WORD_START = "▁"  # how SentencePiece writes the space before a word, which decoding one token alone drops


@dataclass(frozen=True)
class Encoded:
    """tokens: one per text that has any. kept: the numbers of these texts. cut: how many were longer than the model can read."""

    tokens: list[Tokens]
    kept: list[int]
    cut: int


def encode(decoder: PeftMoEDecoder, texts: Sequence[Text], tasks: Sequence[str]) -> Encoded:
    """Token ids of prompt and completion, each encoded for itself, as generating them does.

    Args:
        decoder: its tokenizer, its chat template unless it completes bare prompts, and the length that its model can read.
        tasks: the names, in the order that gives them their numbers.
    """
    numbers = {task: number for number, task in enumerate(tasks)}
    limit = getattr(decoder.model.config.get_text_config(), "max_position_embeddings", None)
    tokens, kept, cut = [], [], 0
    for index, text in enumerate(texts):
        prompt = prompt_ids(decoder, text.prompt)
        ids = prompt + decoder.tokenizer(text.completion, add_special_tokens=False)["input_ids"]
        if ids:
            tokens.append(Tokens(numbers[text.task], ids[:limit], min(len(prompt), len(ids[:limit]))))
            kept.append(index)
            cut += len(ids) > len(ids[:limit])
    return Encoded(tokens, kept, cut)


def prompt_ids(decoder: PeftMoEDecoder, prompt: str) -> list[int]:
    """The prompt as `PeftMoEDecoder.codegen` gives it to the model: bare, or in the tokenizer's chat template."""
    direct = decoder.is_direct_completion()
    text = prompt
    if not direct:
        text = chat_prompt(decoder.tokenizer, prompt, decoder.instruction_prefix, decoder.response_prefix, name=decoder.name)
    return decoder.tokenizer(text, add_special_tokens=direct)["input_ids"]


@dataclass(frozen=True)
class Piece:
    """A token for a reader: spaces, line ends and everything that cannot be printed are visible."""

    text: str
    is_special: bool


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Piece]:
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [Piece(visible(_text(tokenizer, number, name)), number in special) for number, name in zip(ids, names, strict=True)]


def _text(tokenizer: PreTrainedTokenizerBase, number: int, name: str) -> str:
    text = tokenizer.decode([number], clean_up_tokenization_spaces=False)
    if "\ufffd" in text and all(char in _BYTES for char in name):  # a part of a character
        return bytes(_BYTES[char] for char in name).decode("utf-8", "backslashreplace")
    return f" {text}" if name.startswith(_WORD_START) and not text.startswith(" ") else text


def visible(text: str) -> str:
    """Space as a dot, a line end as an arrow and a line end, and what has no picture (control characters, marks that turn the
    direction of the text) as an escape. An empty text is an empty-set sign."""
    shown = "".join(_MARKS.get(char) or (char if char.isprintable() else ascii(char)[1:-1]) for char in text)
    return shown or "∅"
