"""Tools for functions of tensors that are called many times: gradients, compilation, parallel calls, and reuse of memory.

`torch.compile` compiles a function to one graph at its first call, which takes 10 to 30 seconds. The results of the eager and the compiled
function differ by rounding. We compile only if the whole training or sampling is long enough (`compiling_pays`).

The matrix products of these models are so small that two cores compute a product hardly faster than one core. It is faster to give each
core whole calls of a function (`in_parallel`). Then the cores wait for each other only once, at the end, and not after every operation.
Python threads are enough for this, because PyTorch's operations and autograd release Python's global interpreter lock (GIL), and so do
graphs that were compiled with `RELEASE_GIL`.
"""

import ctypes
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from icl.compute.compile_cache import note_compiled, start_afresh, use_private_cache

Function = TypeVar("Function", bound=Callable[..., Any])
Leaves = TypeVar("Leaves", Tensor, dict[str, Tensor])
Result = TypeVar("Result")

RELEASE_GIL = {"cpp_wrapper": True}
"""Options of `torch.compile` for a graph that releases Python's global interpreter lock while it runs."""

_COMPILING_PAYS = 1e13
"""Compile only above this many floating-point operations. They take a few minutes on a CPU, and compiling saves a third of this time."""


def compiling_pays(*, num_params: int, num_tokens: int, num_steps: int) -> bool:
    """Return whether training or sampling is so long that compiling saves time.

    The answer depends only on the settings, so a resumed run makes the same choice.

    Args:
        num_params: Number of parameters of one member, that is, of one model of a population, not of the whole population. So the answer
            is the same as if the member ran alone.
        num_tokens: Number of tokens in a member's batch. A prompt of K examples has 2 K tokens.
        num_steps: Total number of steps, each with one gradient on such a batch.
    """
    # Each weight takes 2 operations per token in the forward pass and 4 in the backward pass.
    return 6.0 * num_params * num_tokens * num_steps >= _COMPILING_PAYS


def grad_and_aux(total: Callable[[Leaves], tuple[Tensor, Tensor]], leaves: Leaves) -> tuple[Leaves, Tensor]:
    """Return the gradient of the first result of `total` with respect to `leaves`, and its second result, detached."""
    if (
        torch.compiler.is_compiling()
    ):  # the compiler cannot trace autograd; in eager mode, autograd is a tenth faster than torch.func
        grads, (_, aux) = torch.func.grad_and_value(total, has_aux=True)(leaves)
        return grads, aux
    # Keep autograd from using threads. A thread may still refer to a tensor when the step ends, and XLA compiles the computation of every
    # tensor that is still referred to.
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        tensors, spec = pytree.tree_flatten(leaves)
        # We use `data` instead of `detach`, because detached rows of one tensor share a version counter. Updates of other rows in other
        # threads would increase this counter, and autograd would report that the rows of this call were modified.
        tensors = [tensor.data.requires_grad_() for tensor in tensors]
        value, aux = total(pytree.tree_unflatten(tensors, spec))
        gradients = torch.autograd.grad(value, tensors, materialize_grads=True)
    return pytree.tree_unflatten(list(gradients), spec), aux.detach()


def one_graph(
    function: Function,
    *,
    work: str,
    changed: Callable[..., Sequence[Tensor]] = lambda *inputs: (),
    options: dict[str, Any] | None = None,
) -> Function:
    """Return the function compiled to one graph. On CUDA this is a CUDA graph.

    Results of the compiler are cached in a private folder of the user (`icl.compute.compile_cache`). If compiling fails with this cache, we
    try once more with an empty cache. If this fails too, a warning says so, and calls run the function without compilation.

    Args:
        function: Function of tensors, or trees of tensors, that returns tensors.
        work: Name of the work that the warning mentions, such as "Training".
        changed: Function of the same inputs that returns the tensors that `function` changes in place.
        options: Options of `torch.compile` for CPUs.
    """
    use_private_cache()  # call this before torch chooses a folder
    # Imported here, because this import is slow and no other function needs it.
    from torch._dynamo import config, error_on_graph_break, exc, mark_static_address

    # On CPUs we do not use `fullgraph`. Up to torch 2.13 it counts graphs in a variable that all threads share, so it fails at random.
    graph = torch.compile(error_on_graph_break(True)(function), dynamic=False, options=options)
    replayed = torch.compile(function, fullgraph=True, dynamic=False, options=_cuda_options())
    # This warning advises to round products to ten bits, but we want float32.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    has_failed = is_noted = False

    def run(*inputs: Any) -> Any:
        if _device(inputs).type != "cuda":
            return graph(*inputs)
        for tensor in changed(*inputs):
            mark_static_address(tensor)  # the graph changes this tensor in place, so CUDA graphs must not copy it
        return pytree.tree_map(torch.clone, replayed(*inputs))

    def call(*inputs: Any) -> Any:
        nonlocal has_failed, is_noted
        if has_failed:
            return function(*inputs)
        # These limits apply to each thread separately. We raise them because one process may train many runs.
        config.recompile_limit = max(config.recompile_limit, 2**10)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 2**12)
        try:
            try:
                outputs = run(*inputs)
            except exc.BackendCompilerFailed:
                if not start_afresh():
                    raise
                outputs = run(*inputs)
        except exc.TorchDynamoException as error:  # raised before the graph has run, so no tensor has changed
            has_failed = True
            reason = " ".join(str(error).split("\n")[:2])
            warnings.warn(f"{work} continues without torch.compile, so it is slower: {reason}", stacklevel=2)
            return function(*inputs)
        if not is_noted:
            is_noted = True
            note_compiled()
        return outputs

    return call  # type: ignore[return-value]


def _cuda_options() -> dict[str, Any]:
    """Return options for a CUDA graph. Kernels are not chosen by timing, so results are rounded in the same way in every process."""
    from torch._inductor import config

    options: dict[str, Any] = {"triton.cudagraphs": True, "triton.autotune_pointwise": False, "shape_padding": False}
    if hasattr(config, "deterministic"):  # only later versions of torch have this option
        options["deterministic"] = True
    return options


def in_parallel(
    function: Callable[..., Result], *, threads_each: int | None = None
) -> Callable[[Sequence[tuple[Any, ...]]], list[Result]]:
    """Return a function that applies `function` to many tuples of arguments in parallel, preserving order.

    No gradients are recorded. The calls use the autocast (mixed precision) settings of the calling thread.

    Args:
        function: Function to apply. It must not change data that other calls read. Its first call runs alone, because this call may compile
            the function. During compilation, Ctrl-C waits for the compiler.
        threads_each: Number of PyTorch threads for each call. With 1, results do not depend on the number of cores. By default, PyTorch's
            threads are divided between the calls.
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
            # PyTorch keeps the gradient mode and the autocast settings per thread, so a worker does not inherit them from the caller.
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


def keep_freed_memory() -> None:
    """Make glibc keep the memory that a step frees, so that the next step can use it again.

    By default glibc returns this memory to the system, and then requests it again page by page. In our measurements, these requests take up
    to half of a step's time. With other C libraries, this function does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        # M_MMAP_THRESHOLD: allocate blocks below 32 MiB on the heap. glibc allows no larger threshold.
        mallopt(-3, 2**25)
        # M_TRIM_THRESHOLD: return free memory of the heap to the system only above 1 GiB.
        mallopt(-1, 2**30)


@cache
def _workers(num_workers: int, threads_per_worker: int) -> ThreadPoolExecutor:
    """Start Python threads, each with `threads_per_worker` PyTorch threads. The caller's number of threads does not change."""
    callers_threads, all_started = torch.get_num_threads(), threading.Barrier(num_workers)

    def initialise() -> None:
        torch.get_num_threads()  # the first call in a new thread resets the number, so it must come before the next line
        torch.set_num_threads(threads_per_worker)

    workers = ThreadPoolExecutor(num_workers, thread_name_prefix="icl-worker", initializer=initialise)
    # The executor starts a thread only when all other threads are busy. So we let the threads wait until all have started.
    list(workers.map(lambda _: all_started.wait(), range(num_workers)))
    # `set_num_threads` in a worker also changed the default for threads that start later, so restore this default.
    torch.set_num_threads(callers_threads)
    return workers


def _device(inputs: Any) -> torch.device:
    return next(leaf.device for leaf in pytree.tree_iter(inputs) if isinstance(leaf, Tensor))
