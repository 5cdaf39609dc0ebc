"""Which requests share a batch, and what is done when memory does not take it."""

from __future__ import annotations

import pytest
import torch

from dylo_moe.batch import Request
from dylo_moe.batching import PREFILL_CELLS, Queue
from dylo_moe.errors import OutOfMemory
from dylo_moe.memory import is_out_of_memory
from dylo_moe.routing import ADAPTERS_OFF


def request(length, rows=1, limit=10):
    return Request((1,) * length, (None,) * rows, limit)


def test_longest_prompts_come_first_and_a_batch_has_no_more_rows_than_asked():
    queue = Queue([request(n) for n in (3, 9, 5)], rows=2)
    assert [len(r.prompt) for r in queue.take(same_length=False)] == [9, 5]
    assert queue.take(same_length=False) == []


def test_request_with_more_rows_than_a_batch_gets_its_own():
    queue = Queue([request(5, rows=4), request(3)], rows=2)
    assert [len(r.routes) for r in queue.take(same_length=False)] == [4]


def test_batch_that_did_not_fit_is_halved_until_one_request_is_alone():
    queue = Queue([request(10) for _ in range(8)], rows=8)
    sizes = []
    while len(taken := queue.take(same_length=False)) > 1:
        sizes.append(len(taken))
        queue.split()
    assert sizes == [8, 4, 2]
    with pytest.raises(OutOfMemory, match="10 tokens and up to 10 new ones"):
        queue.split()


def test_prompts_of_one_pass_are_as_many_as_its_attention_may_take():
    queue = Queue([request(PREFILL_CELLS // 2) for _ in range(3)], rows=8)
    assert [len(queue.take(same_length=False)) for _ in range(3)] == [2, 1, 0]


def test_split_keeps_those_that_wait():
    queue = Queue([request(n) for n in (9, 8, 7, 6, 5)], rows=2)
    queue.take(same_length=False)
    queue.split()
    assert (queue.current, [len(r.prompt) for r in queue.waiting]) == ([], [9, 8, 7, 6, 5])


def test_rows_of_one_length_only_where_a_model_cannot_be_padded():
    queue = Queue([request(n) for n in (5, 5, 4)], rows=8)
    assert [len(r.prompt) for r in queue.take(same_length=True)] == [5, 5]


def test_errors_of_memory_are_told_from_others():
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(None)
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RuntimeError("CUDA error: out of memory")
    handle = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert all(is_out_of_memory(error) for error in (*gpu, handle))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(caught.value)


def test_requests_differ_by_what_is_written():
    assert len({request(3), request(3), Request((1,) * 3, (ADAPTERS_OFF,), 10), Request((1,) * 3, (None,), 10, seed=1)}) == 3
