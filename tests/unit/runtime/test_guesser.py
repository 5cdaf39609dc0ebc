"""Which of two sources a text's next token is guessed from."""

from __future__ import annotations

import torch

from dylo_moe.guesser import Guesser

PREDICTED = 99


def guesses(tokens: list[int], predicted: int = PREDICTED) -> list[int]:
    """What is guessed after each token."""
    guesser, found = Guesser(), []
    for token in tokens:
        guesser.read(torch.tensor([[token]]))
        found.append(int(guesser.guess(torch.tensor([predicted]))))
    return found


def test_nothing_repeated_is_guessed_as_predicted():
    assert guesses([1, 2, 3, 4, 5]) == [PREDICTED] * 5


def test_wrong_predictions_give_way_to_what_followed_before():
    assert guesses([1, 2, 3, 1, 2, 3, 1])[-3:] == [3, 1, 2]


def test_two_tokens_decide_before_one():
    assert guesses([1, 2, 8] * 4 + [5, 2, 9, 1, 2])[-1] == 8  # after 2 alone it was 9 the last time, after 1, 2 it was 8


def test_right_predictions_are_kept():
    tokens = [1, 1, 1, 2] * 6  # what follows 1, 1 differs
    guesser, found = Guesser(), []
    for token, following in zip(tokens, tokens[1:], strict=False):
        guesser.read(torch.tensor([[token]]))
        found.append(int(guesser.guess(torch.tensor([following]))))
    assert found[8:] == tokens[9:]


def test_rows_are_read_apart_and_a_prompt_at_once():
    guesser = Guesser()
    guesser.read(torch.tensor([[1, 2, 3] * 4, [7, 8, 9] * 4]))
    for ids in ([1, 7], [2, 8], [3, 9]):
        guesser.guess(torch.tensor([PREDICTED, PREDICTED]))
        assert guesser.read(torch.tensor(ids)[:, None])
    assert guesser.guess(torch.tensor([PREDICTED, PREDICTED])).tolist() == [[1], [7]]
    assert not guesser.read(torch.tensor([[1], [5]]))


def test_other_rows_begin_anew():
    guesser = Guesser()
    guesser.read(torch.tensor([[1, 2] * 6]))
    guesser.read(torch.tensor([[1], [1]]))
    assert guesser.guess(torch.tensor([PREDICTED, PREDICTED])).tolist() == [[PREDICTED], [PREDICTED]]


def test_texts_are_repeated_as_far_as_all_of_them_are_known():
    guesser = Guesser()
    guesser.read(torch.tensor([[1, 2, 3, 1, 2], [4, 5, 6, 7, 4]]))
    assert guesser.repeat(5) == [[3, 1, 2, 3, 1], [5, 6, 7, 4, 5]]
    assert guesser.repeat(2) == [[3, 1], [5, 6]]
    guesser.read(torch.tensor([[3], [9]]))
    assert guesser.repeat(3) == [[], []], "nothing has followed 9"
