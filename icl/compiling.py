"""A function that runs many times: its gradient, its one graph where there is a compiler, and the memory it works in.

`torch.compile` makes one graph of a function of tensors at its first call, which takes 10 to 30 seconds; eager and
compiled are the same function and differ by rounding. Whether that pays is a matter of the work ahead alone.
"""

import ctypes
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from icl.compile_cache import note_compiled, start_afresh, use_private_cache

Function = TypeVar("Function", bound=Callable[..., Any])
Leaves = TypeVar("Leaves", Tensor, dict[str, Tensor])

_COMPILING_PAYS = 1e13
"""Floating-point operations from which on compiling pays: some minutes of a CPU, of which it saves a third."""


def compiling_pays(*, num_params: int, num_tokens: int, num_steps: int) -> bool:
    """Whether a training or sampling is long enough to be compiled; by the settings alone, so that resuming repeats it.

    Args:
        num_params: Of one member, so that a packed run does as it would alone.
        num_tokens: Of a member's batch, 2 K B.
        num_steps: Gradients of such a batch, all in all.
    """
    return 6.0 * num_params * num_tokens * num_steps >= _COMPILING_PAYS  # 2 forward and 4 backward for each weight


def grad_and_aux(total: Callable[[Leaves], tuple[Tensor, Tensor]], leaves: Leaves) -> tuple[Leaves, Tensor]:
    """The gradient of the first thing that `total` gives, a number, and the second, cut off from the graph."""
    if torch.compiler.is_compiling():  # which cannot trace autograd; eagerly, autograd is a tenth faster
        grads, (_, aux) = torch.func.grad_and_value(total, has_aux=True)(leaves)
        return grads, aux
    # In this thread: one of autograd's own may still hold a tensor when the step ends, and XLA compiles what it finds alive.
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        tensors, spec = pytree.tree_flatten(leaves)
        # `data`, not `detach`: rows of one tensor would share its version counter, which other threads' updates move on.
        tensors = [tensor.data.requires_grad_() for tensor in tensors]
        value, aux = total(pytree.tree_unflatten(tensors, spec))
        found = torch.autograd.grad(value, tensors, materialize_grads=True)
    return pytree.tree_unflatten(list(found), spec), aux.detach()


def one_graph(
    function: Function,
    *,
    work: str,
    changed: Callable[..., Sequence[Tensor]] = lambda *inputs: (),
    options: dict[str, Any] | None = None,
) -> Function:
    """Return the function as one graph, on CUDA as a CUDA graph; or itself, after a warning, where there is no compiler.

    What is compiled is kept in a folder of the user's own (`icl.compile_cache`). If compiling fails with what is kept there,
    it is tried once more without.

    Args:
        function: Tensors, or trees of them, to tensors.
        work: What it is the step of, for the warning.
        changed: Which of its inputs it changes in place.
        options: The compiler's, on a CPU.
    """
    use_private_cache()  # before torch looks for a folder itself
    # Slow to import, and needed here alone.
    from torch._dynamo import config, error_on_graph_break, exc, mark_static_address

    # Not `fullgraph`: up to torch 2.13 it counts the graphs of a call in a number that all threads share, and fails by chance.
    graph = torch.compile(error_on_graph_break(True)(function), dynamic=False, options=options)
    replayed = torch.compile(function, fullgraph=True, dynamic=False, options=_cuda_options())
    # Its advice is to round products to ten bits, which is not what float32 was asked for.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    has_failed = is_kept = False

    def run(*inputs: Any) -> Any:
        if _device(inputs).type != "cuda":
            return graph(*inputs)
        for tensor in changed(*inputs):
            mark_static_address(tensor)  # changed in place by the graph, never copied
        return pytree.tree_map(torch.clone, replayed(*inputs))

    def call(*inputs: Any) -> Any:
        nonlocal has_failed, is_kept
        if has_failed:
            return function(*inputs)
        config.recompile_limit = max(config.recompile_limit, 2**10)  # each thread's own; a process may train many runs
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 2**12)
        try:
            try:
                outputs = run(*inputs)
            except exc.BackendCompilerFailed:
                if not start_afresh():
                    raise
                outputs = run(*inputs)
        except exc.TorchDynamoException as error:  # raised before anything has run
            has_failed = True
            reason = " ".join(str(error).split("\n")[:2])
            warnings.warn(f"{work} goes on without torch.compile, and more slowly: {reason}", stacklevel=2)
            return function(*inputs)
        if not is_kept:
            is_kept = True
            note_compiled()
        return outputs

    return call  # type: ignore[return-value]


def _cuda_options() -> dict[str, Any]:
    """A CUDA graph of kernels that are chosen by rule: those chosen by timing would round otherwise at the next start."""
    from torch._inductor import config

    options: dict[str, Any] = {"triton.cudagraphs": True, "triton.autotune_pointwise": False, "shape_padding": False}
    if hasattr(config, "deterministic"):  # of later versions
        options["deterministic"] = True
    return options


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step.

    It would hand it back to the system and take it anew, page by page: measured, up to half of a step's time. Other C
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: blocks below 32 MiB, the most that glibc allows, come from the heap
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: of which up to 1 GiB may lie free


def _device(inputs: Any) -> torch.device:
    return next(leaf.device for leaf in pytree.tree_iter(inputs) if isinstance(leaf, Tensor))
