"""Many calls of one function, side by side on a CPU's cores.

Products as small as these models' are hardly faster on two cores than on one: calls on different cores wait for each
other once, at the end, not once an operation. PyTorch's operations, autograd and graphs compiled with `WITHOUT_LOCK` run
without Python's lock, so Python's threads do.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

WITHOUT_LOCK = {"cpp_wrapper": True}
"""Options of the compiler for a graph that lets go of Python's lock."""


def side_by_side(
    function: Callable[..., Result], *, threads_each: int | None = None
) -> Callable[[Sequence[tuple[Any, ...]]], list[Result]]:
    """What makes many calls of a function of tensors at once and gives their results in order; autograd records nothing.

    Args:
        function: Must not change what other calls read. Its very first call runs alone, for it may compile
            (Ctrl-C then waits for the compiler).
        threads_each: PyTorch's threads for each call. If 1, results do not depend on how many cores there are; by default
            calls share out what there are.
    """
    has_run = False

    def call(arguments: Sequence[tuple[Any, ...]]) -> list[Result]:
        nonlocal has_run
        if not arguments:
            return []
        precision = _mixed_precision()

        def one(these: tuple[Any, ...]) -> Result:
            with torch.no_grad(), torch.autocast("cpu", **precision):  # both are each thread's own
                return function(*these)

        num_threads = torch.get_num_threads()
        at_once = max(1, num_threads // threads_each) if threads_each else min(num_threads, len(arguments))
        each = threads_each or num_threads // at_once
        if (at_once, each) == (1, num_threads):
            return [one(these) for these in arguments]
        workers = _workers(at_once, each)
        num_first = 0 if has_run else 1
        first = [workers.submit(one, these).result() for these in arguments[:num_first]]
        found = first + list(workers.map(one, arguments[num_first:]))
        has_run = True
        return found

    return call


def _mixed_precision() -> dict[str, Any]:
    """The calling thread's, as `torch.autocast` takes it."""
    return {
        "dtype": torch.get_autocast_dtype("cpu"),
        "enabled": torch.is_autocast_enabled("cpu"),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


@cache
def _workers(num: int, num_threads: int) -> ThreadPoolExecutor:
    """So many Python threads, each with so many of PyTorch's own."""
    own, all_there = torch.get_num_threads(), threading.Barrier(num)

    def begin() -> None:
        torch.get_num_threads()  # PyTorch sets a thread's number at its first question
        torch.set_num_threads(num_threads)

    workers = ThreadPoolExecutor(num, thread_name_prefix="icl-core", initializer=begin)
    list(workers.map(lambda _: all_there.wait(), range(num)))
    torch.set_num_threads(own)  # theirs became the default of threads to come
    return workers
