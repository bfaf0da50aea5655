"""On a CPU a population's members go side by side, each on a core of its own; elsewhere all together.

A member fills a core's caches, and products as small as its own are hardly faster on two cores than on one: members on
different cores wait for each other once a move, not once an operation. PyTorch's operations, autograd and graphs
compiled with `WITHOUT_LOCK` run without Python's lock, so threads do. As many run at once as PyTorch has threads.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from icl.population import Params, size
from icl.sampling.batches import Batch
from icl.sampling.gradients import Gradient

WITHOUT_LOCK = {"cpp_wrapper": True}
"""Options of the compiler for a graph that lets go of Python's lock."""


def side_by_side(gradient: Gradient) -> Gradient:
    """The same gradient, found member by member on a CPU; a member's numbers do not depend on who else there is."""
    has_run = False

    def call(moving: Params, frozen: Params, batch: Batch) -> tuple[Params, Tensor]:
        nonlocal has_run
        num_members = size(moving)
        if next(iter(moving.values())).device.type != "cpu":
            return gradient(moving, frozen, batch)

        def member(i: int) -> tuple[Params, Tensor]:
            with torch.no_grad():  # is each thread's own
                return gradient(*(_rows(tree, i) for tree in (moving, frozen, batch)))

        num_threads = torch.get_num_threads()
        at_once = min(num_threads, num_members)
        if at_once == 1:
            found = [member(i) for i in range(num_members)]
        else:
            workers = _workers(at_once, num_threads // at_once)
            first = [] if has_run else [workers.submit(member, 0).result()]  # compiles, while the others wait
            found = first + list(workers.map(member, range(len(first), num_members)))
        has_run = True
        grads, values = zip(*found, strict=True)
        return {name: torch.cat([one[name] for one in grads]) for name in moving}, torch.cat(values)

    return call


@cache
def _workers(num: int, num_threads: int) -> ThreadPoolExecutor:
    """So many Python threads, each with so many of PyTorch's own."""
    own, all_there = torch.get_num_threads(), threading.Barrier(num)

    def begin() -> None:
        torch.get_num_threads()  # PyTorch sets a thread's number at its first question
        torch.set_num_threads(num_threads)

    workers = ThreadPoolExecutor(num, thread_name_prefix="icl-member", initializer=begin)
    list(workers.map(lambda _: all_there.wait(), range(num)))
    torch.set_num_threads(own)  # theirs became the default of threads to come
    return workers


def _rows(tree: Any, i: int) -> Any:
    """Member i of stacked tensors, with its axis kept."""
    return pytree.tree_map(lambda leaf: leaf[i : i + 1] if isinstance(leaf, Tensor) else leaf, tree)
