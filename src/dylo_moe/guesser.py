"""Guesses of a text's next tokens, from the better of two sources: a prediction, and what followed the same tokens the last time.

The second is prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding): code repeats itself.
"""

from __future__ import annotations

from torch import Tensor

# How fast the chance of a right guess follows what happens.
FOLLOWS = 0.2
_PREDICTED, _REPEATED = 0.9, 0.7  # at first


class Guesser:
    """Of the rows of one generation, B of them."""

    def __init__(self) -> None:
        self._texts: list[_Text] = []

    def read(self, ids: Tensor) -> bool:
        """What every row goes on with, (B, S) -> whether each row's last token was what had followed the same ones before."""
        rows = ids.tolist()
        if len(rows) != len(self._texts):
            self._texts = [_Text() for _ in rows]
        for text, tokens in zip(self._texts, rows, strict=True):
            for token in tokens:
                text.read(token)
        return all(text.is_repeated for text in self._texts)

    def guess(self, predicted: Tensor) -> Tensor:
        """What comes next: predicted, (B,), what some model says, or what the text repeats -> (B, 1)."""
        guesses = [text.guess(token) for text, token in zip(self._texts, predicted.tolist(), strict=True)]
        return predicted.new_tensor(guesses)[:, None]

    def repeat(self, count: int) -> list[list[int]]:
        """What comes next where the texts repeat themselves: of each row as many tokens, `count` or fewer."""
        rows = [text.repeat(count) for text in self._texts]
        shortest = min(map(len, rows))
        return [row[:shortest] for row in rows]


class _Text:
    """One row. is_repeated: whether its last token was foreseen by what had followed the ones before it."""

    def __init__(self) -> None:
        self.is_repeated = False
        self._followers: dict[tuple[int | None, int] | int, int] = {}
        self._last: tuple[int | None, int | None] = (None, None)
        self._repeated: int | None = None
        self._predicted: int | None = None
        self._predicted_chance, self._repeated_chance = _PREDICTED, _REPEATED

    def read(self, token: int) -> None:
        self.is_repeated = self._repeated == token
        self._repeated_chance = _followed(self._repeated_chance, self._repeated, token)
        self._predicted_chance = _followed(self._predicted_chance, self._predicted, token)
        if self._last[1] is not None:
            self._followers[self._last] = self._followers[self._last[1]] = token
        self._last, self._predicted = (self._last[1], token), None
        self._repeated = self._follower(self._last)

    def guess(self, predicted: int) -> int:
        self._predicted = predicted
        is_better = self._repeated is not None and self._repeated_chance > self._predicted_chance
        return self._repeated if is_better else predicted

    def repeat(self, count: int) -> list[int]:
        found: list[int] = []
        last = self._last
        while len(found) < count and (token := self._follower(last)) is not None:
            found.append(token)
            last = last[1], token
        return found

    def _follower(self, last: tuple[int | None, int]) -> int | None:
        """What came after these two the last time, or else after the second alone."""
        return self._followers.get(last, self._followers.get(last[1]))


def _followed(chance: float, said: int | None, token: int) -> float:
    """The chance of being right of a source that said this, or nothing, before the token came."""
    return chance if said is None else chance + FOLLOWS * ((said == token) - chance)
