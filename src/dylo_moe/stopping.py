"""Where a generated text ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria

# EvalPlus 0.3.1, evalplus/provider/utility.py. Not read from there: its decoders extend that list in place, so by the
# time a second decoder exists it may hold the stop strings of another data set.
COMMON_STOPS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
CHAT_STOP = "\n```\n"
# Tokens may decode to nothing (special ones), so the window that is searched after each step is wider than a stop string.
WINDOW_SLACK = 16


def stop_strings(dataset: str, *, direct_completion: bool) -> list[str]:
    """A fresh list of the strings that end a completion: EvalPlus's for base prompts of `dataset`, or for chat prompts.

    Raises:
        ValueError: a base prompt of a data set other than "humaneval" and "mbpp".
    """
    from evalplus.provider.utility import extra_eos_for_direct_completion

    return [*COMMON_STOPS, *(extra_eos_for_direct_completion(dataset) if direct_completion else [CHAT_STOP])]


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to the earliest occurrence of any stop string; whole where there is none."""
    found = [position for position in (text.find(stop) for stop in stops) if position >= 0]
    return text[: min(found)] if found else text


class StopStrings(StoppingCriteria):
    """Ends each row for itself as soon as the text it has generated holds a stop string; the prompt is never searched.

    One object serves one `generate` call. After each token only a window of the last tokens is decoded, and a hit there
    is confirmed on the row's whole generated text, so that the answer is that of the whole text.

    Args:
        stops: the strings.
        prompt_length: tokens of the prompt, padding included; the same for every row.
        decode: token ids of one row -> text, the same function that decodes the result.
    """

    def __init__(self, stops: Sequence[str], prompt_length: int, decode: Callable[[Tensor], str]) -> None:
        self.stops = tuple(stops)
        self.prompt_length = prompt_length
        self.decode = decode
        self.window = max(map(len, self.stops), default=0) + WINDOW_SLACK
        self._done: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """input_ids: (rows, length) -> (rows,) bool, True for the rows that have ended."""
        generated = input_ids[:, self.prompt_length :].cpu()
        self._done = self._done or [False] * len(generated)
        self._done = [done or self._has_stop(row) for done, row in zip(self._done, generated, strict=True)]
        return torch.tensor(self._done, dtype=torch.bool, device=input_ids.device)

    def _has_stop(self, row: Tensor) -> bool:
        return self._holds(self.decode(row[-self.window :])) and (len(row) <= self.window or self._holds(self.decode(row)))

    def _holds(self, text: str) -> bool:
        return any(stop in text for stop in self.stops)
