"""Writes many completions with one model: rows sorted by length, batches as large as they may be and memory allows."""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from dylo_moe.batch import Batch, Request, Setting, Text
from dylo_moe.errors import OutOfMemory
from dylo_moe.memory import is_out_of_memory
from dylo_moe.routing import ADAPTERS_OFF

DEFAULT_ROWS = {"cpu": 32, "cuda": 128}
# Tokens of one prefill pass. Its attention takes rows * length**2 numbers, so a whole batch of long prompts may not fit at once.
PREFILL_CELLS = 8192
# Larger batches are looked at for texts that have ended only every few steps: decoding them takes longer than a surplus token.
STEPS_BETWEEN_LOOKS = 4
SMALL = 8  # rows
# Finished rows leave together, when they are this share of the batch: each leaving copies the cache.
LEAVING_SHARE = 1 / 8


def complete(setting: Setting, requests: Sequence[Request], rows: int, tick: Callable[[int], None]) -> Iterator[Text]:
    """The finished texts of all requests, in the order in which they end.

    Args:
        rows: of a batch at most; a request with more gets a batch of its own.
        tick: called now and then with the number of tokens written since the last call.

    Raises:
        OutOfMemory: one request alone does not fit.
    """
    for is_off in (False, True):  # without adapters a pass is another one, and a faster one
        chosen = [request for request in requests if (ADAPTERS_OFF in request.routes) == is_off]
        yield from _complete(setting, Queue(chosen, rows), tick)


class Queue:
    """Requests that wait, longest prompts first, and those in the batch.

    Attributes:
        cells: rows * columns that a batch may have; learnt from the batch that did not fit.
    """

    def __init__(self, requests: Sequence[Request], rows: int) -> None:
        self.waiting = _longest_first(requests)
        self.rows = rows
        self.cells = math.inf
        self.current: list[Request] = []

    def take(self, *, same_length: bool) -> list[Request]:
        """The next requests for which there is room beside those in the batch; at least one if there are none in it."""
        taken: list[Request] = []
        while self.waiting and self._fits(taken, self.waiting[0], same_length=same_length):
            taken.append(self.waiting.popleft())
            self.current.append(taken[-1])
        return taken

    def finish(self, texts: Sequence[Text]) -> list[Text]:
        """Those of the batch's texts that have ended since it was asked last."""
        current = {id(request) for request in self.current}
        finished = [text for text in texts if text.length is not None and id(text.request) in current]
        done = {id(text.request) for text in finished}
        self.current = [request for request in self.current if id(request) not in done]
        return finished

    def split(self) -> None:
        """Those in the batch wait again, and from now on a batch may have half the size of this one.

        Raises:
            OutOfMemory: it is one request.
        """
        if len(self.current) == 1:
            raise _alone(self.current[0])
        self.cells = _cells(self.current) / 2
        self.waiting = _longest_first([*self.current, *self.waiting])
        self.current = []

    def _fits(self, taken: list[Request], request: Request, *, same_length: bool) -> bool:
        if taken and same_length and len(taken[0].prompt) != len(request.prompt):
            return False
        if taken and _rows([*taken, request]) * len(taken[0].prompt) > PREFILL_CELLS:
            return False
        wanted = [*self.current, request]
        return not self.current or (_rows(wanted) <= self.rows and _cells(wanted) <= self.cells)


def _complete(setting: Setting, queue: Queue, tick: Callable[[int], None]) -> Iterator[Text]:
    batch: Batch | None = None
    while queue.waiting or queue.current:
        finished: list[Text] | None = None
        try:
            with setting.held():
                batch = _refilled(batch, setting, queue, tick)
                finished = _until_some_finish(batch, queue, tick)
                batch = _without(batch, queue)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if finished is None:  # not inside of the handler: the error's traceback holds the batch's tensors
            batch = None
            queue.split()
            free_memory()
        else:
            yield from finished


def _refilled(batch: Batch | None, setting: Setting, queue: Queue, tick: Callable[[int], None]) -> Batch:
    """The batch with new rows, where it has become small."""
    if batch is not None and (batch.rows > queue.rows // 2 or not setting.can_pad):
        return batch
    while requests := queue.take(same_length=not setting.can_pad):
        joining = Batch(setting, requests)
        tick(joining.advance(1))
        if batch is None:
            batch = joining
        else:
            batch.join(joining)
        if not setting.can_pad:
            break
    return batch


def _until_some_finish(batch: Batch, queue: Queue, tick: Callable[[int], None]) -> list[Text]:
    while not (finished := queue.finish(batch.texts)):
        tick(batch.advance(1 if batch.rows <= SMALL else STEPS_BETWEEN_LOOKS))
    return finished


def _without(batch: Batch, queue: Queue) -> Batch | None:
    """The batch after its finished rows have left, if that pays; None after the last."""
    if not queue.current:
        return None
    if batch.rows - _rows(queue.current) >= LEAVING_SHARE * batch.rows:
        batch.shrink()
    return batch


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _longest_first(requests: Sequence[Request]) -> deque[Request]:
    return deque(sorted(requests, key=lambda request: -len(request.prompt)))


def _rows(requests: Sequence[Request]) -> int:
    return sum(len(request.routes) for request in requests)


def _cells(requests: Sequence[Request]) -> int:
    return _rows(requests) * max(request.columns for request in requests)


def _alone(request: Request) -> OutOfMemory:
    return OutOfMemory(
        f"a prompt of {len(request.prompt)} tokens and up to {request.limit} new ones in {len(request.routes)} rows do not fit "
        "into memory even alone; use a smaller max_new_tokens or dtype, or a machine with more memory"
    )
