"""Run one function on many inputs in parallel, on a CPU's cores.

The matrix products of these models are so small that two cores are hardly faster than one core at computing a product.
It is faster to give each core whole calls of a function: the cores then wait for each other once, at the end, and not
after every operation. Python threads suffice for this. PyTorch's operations and autograd release Python's global
interpreter lock (GIL), and so do graphs that were compiled with `RELEASE_GIL`.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

RELEASE_GIL = {"cpp_wrapper": True}
"""Options of `torch.compile` for a graph that releases Python's global interpreter lock while it runs."""


def in_parallel(
    function: Callable[..., Result], *, threads_each: int | None = None
) -> Callable[[Sequence[tuple[Any, ...]]], list[Result]]:
    """Return a function that applies `function` to many tuples of arguments in parallel, preserving order.

    No gradients are recorded. Autocast (mixed precision) has the settings of the calling thread.

    Args:
        function: Function to apply. It must not change data that other calls read. Its first call runs alone, because it may
            compile (Ctrl-C then waits for the compiler).
        threads_each: Number of PyTorch threads of each call. With 1, results do not depend on the number of cores. By default the
            calls share the threads that PyTorch has.
    """
    has_run = False

    def call(inputs: Sequence[tuple[Any, ...]]) -> list[Result]:
        nonlocal has_run
        if not inputs:
            return []
        autocast: dict[str, Any] = {
            "dtype": torch.get_autocast_dtype("cpu"),
            "enabled": torch.is_autocast_enabled("cpu"),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }

        def run(arguments: tuple[Any, ...]) -> Result:
            # PyTorch keeps both settings per thread, so a worker does not have the caller's.
            with torch.no_grad(), torch.autocast("cpu", **autocast):
                return function(*arguments)

        num_threads = torch.get_num_threads()
        num_workers = max(1, num_threads // threads_each) if threads_each else min(num_threads, len(inputs))
        threads_per_worker = threads_each or num_threads // num_workers
        if (num_workers, threads_per_worker) == (1, num_threads):
            return [run(arguments) for arguments in inputs]
        workers = _workers(num_workers, threads_per_worker)
        num_alone = 0 if has_run else 1
        alone = [workers.submit(run, arguments).result() for arguments in inputs[:num_alone]]
        results = alone + list(workers.map(run, inputs[num_alone:]))
        has_run = True
        return results

    return call


@cache
def _workers(num_workers: int, threads_per_worker: int) -> ThreadPoolExecutor:
    """Start Python threads, each with this many PyTorch threads; the caller's number stays as it is."""
    callers_threads, all_started = torch.get_num_threads(), threading.Barrier(num_workers)

    def initialise() -> None:
        torch.get_num_threads()  # the first call in a new thread resets the number, so call it before the next line
        torch.set_num_threads(threads_per_worker)

    workers = ThreadPoolExecutor(num_workers, thread_name_prefix="icl-worker", initializer=initialise)
    # The executor starts a thread only when all other threads are busy. So we let the threads wait until all have started.
    list(workers.map(lambda _: all_started.wait(), range(num_workers)))
    # `set_num_threads` in a worker also changed the default of threads that start later. Set it back.
    torch.set_num_threads(callers_threads)
    return workers
