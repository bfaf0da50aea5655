"""Parallel calls: results keep their order and do not depend on the number of threads, and the caller's threads are unchanged."""

import threading

import pytest
import torch

from icl.compute.calls import in_parallel


@pytest.fixture(params=[1, 2, 3, 7])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_their_order_and_an_error_is_not_lost(num_threads):
    matrices = torch.randn(9, 50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = in_parallel(torch.linalg.det)([(matrix,) for matrix in matrices])
    torch.testing.assert_close(torch.stack(results), torch.linalg.det(matrices), rtol=1e-9, atol=0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        in_parallel(torch.matmul)([(matrix, torch.ones(51, 1, dtype=torch.float64)) for matrix in matrices])


@pytest.mark.parametrize("each", [None, 1])
def test_threads_are_shared_out_or_one_each_and_the_callers_number_stays(num_threads, each):
    def note(number):
        return number, torch.get_num_threads()

    results = in_parallel(note, threads_each=each)([(number,) for number in range(3)])
    assert results == [(number, each or max(1, num_threads // 3)) for number in range(3)]
    assert torch.get_num_threads() == num_threads


def test_as_many_run_at_once_as_there_are_threads_after_the_first_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        at_once, all_there = [], threading.Barrier(3)

        def meet(number):
            if number:
                all_there.wait(timeout=10)  # a BrokenBarrierError if fewer than three run together
            at_once.append(number)
            return number

        assert in_parallel(meet)([(number,) for number in range(4)]) == [0, 1, 2, 3]
        assert at_once[0] == 0
    finally:
        torch.set_num_threads(before)


def test_no_gradients_are_recorded_and_mixed_precision_is_the_callers(num_threads):
    weight = torch.ones(4, 4, requires_grad=True)
    multiply = in_parallel(torch.matmul)
    with torch.autocast("cpu", torch.bfloat16):
        halves = multiply([(weight, weight)] * 3)
    wholes = multiply([(weight, weight)] * 3)
    assert [result.dtype for result in (*halves, *wholes)] == [torch.bfloat16] * 3 + [torch.float32] * 3
    assert not any(result.requires_grad for result in (*halves, *wholes))
