"""Where a generated text ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

# EvalPlus 0.3.1, evalplus/provider/utility.py. Not read from there: its decoders extend that list in place, so by the
# time a second decoder exists it may hold the stop strings of another data set.
COMMON_STOPS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
CHAT_STOP = "\n```\n"
# Tokens may decode to nothing (special ones), so the window that is searched for a stop string is wider than it.
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


class Ending:
    """Ends a text at the first end token, or with the token that completes a stop string; the prompt is never searched.

    Several new tokens may be asked about at once: the answer is the one that asking after each would have given.

    Args:
        stops: the strings.
        end_tokens: ids of the tokens.
        decode: token ids -> text, the same function that decodes the result.
    """

    def __init__(self, stops: Sequence[str], end_tokens: Iterable[int], decode: Callable[[list[int]], str]) -> None:
        self.stops = tuple(stops)
        self.end_tokens = frozenset(end_tokens)
        self.decode = decode
        self.window = max(map(len, self.stops), default=0) + WINDOW_SLACK

    def length(self, tokens: list[int], seen: int) -> int | None:
        """How many tokens the text has, if it ends with one of those after the first `seen`; None if it goes on.

        An end token is not counted. Those that complete a stop string are.
        """
        fresh = range(seen, len(tokens))
        end = next((place for place in fresh if tokens[place] in self.end_tokens), None)
        upto = len(tokens) if end is None else end
        if self.stops and self._holds(tokens[max(0, seen - self.window) : upto]):
            # A hit in the window is confirmed on the whole text, so that the answer is that of the whole text.
            confirmed = (count for count in range(seen + 1, upto + 1) if self._holds(tokens[:count]))
            return next(confirmed, end)
        return end

    def _holds(self, tokens: list[int]) -> bool:
        text = self.decode(tokens)
        return any(stop in text for stop in self.stops)
