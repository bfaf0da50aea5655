"""Causal attention over the few tokens of a prompt, with our own kernel on CPUs.

In each head of c channels, attention is softmax(q k^T / sqrt(c)) v (Vaswani et al. 2017, equation 1), where a token attends to itself and
to the tokens before it. A prompt has so few tokens (15 for K = 8) that PyTorch's operations spend more time on calls, copies and masks than
on arithmetic. The kernel in `attention.cpp` computes one head of one prompt at a time, so that the data of this head stay in the fastest
cache.

The kernel is compiled when `icl` is installed. `attention_by_formula` computes the same result, up to rounding, with PyTorch's operations.
It is used if the kernel could not be compiled, on devices other than CPUs, and in precisions other than float32. `attention` and
`attention_by_formula` can both be differentiated twice in reverse mode, and mapped by `torch.vmap`.
"""

import ctypes
import math
import warnings
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".cpp")
_Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]


def attention(
    queries: Float[Tensor, "N B Q C"],
    keys: Float[Tensor, "N B T C"],
    values: Float[Tensor, "N B T C"],
    *,
    num_heads: int,
    stride: int,
) -> Float[Tensor, "N B Q C"]:
    """Return, for each querying token, the weighted mean of the values of this token and the tokens before it.

    Args:
        queries: Queries of every `stride`-th token; query i belongs to token i * stride.
        keys: Keys of all tokens.
        values: Values of all tokens.
        num_heads: Number of heads H. The C channels are sorted by head: first all channels of head 1, then of head 2, and so on.
        stride: Distance from one querying token to the next.
    """
    if has_kernel_for(queries):
        merged = (tensor.flatten(0, 1) for tensor in (queries, keys, values))  # NB . C
        return _Attention.apply(*merged, num_heads, stride).unflatten(0, queries.shape[:2])
    return attention_by_formula(queries, keys, values, num_heads=num_heads, stride=stride)


def has_kernel_for(tensor: Tensor) -> bool:
    """Return whether the kernel can compute attention for tensors with the device and the dtype of `tensor`."""
    is_float32 = tensor.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return HAS_KERNEL and tensor.device.type == "cpu" and is_float32


def attention_by_formula(
    queries: Float[Tensor, "*N Q C"],
    keys: Float[Tensor, "*N T C"],
    values: Float[Tensor, "*N T C"],
    *,
    num_heads: int,
    stride: int,
) -> Float[Tensor, "*N Q C"]:
    """Compute the result of `attention` with PyTorch's operations, on any device and in any precision."""
    num_tokens = keys.shape[-2]
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=keys.device).triu(1)[::stride]  # Q T
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(-3, -2) for part in (queries, keys, values))  # N H . c
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # N H Q T
    pattern = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # N H Q T
    return (pattern @ v).transpose(-3, -2).flatten(-2)  # N Q C


def _gradients_by_formula(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, stride: int
) -> _Gradients:
    formula = partial(attention_by_formula, num_heads=num_heads, stride=stride)
    return torch.func.vjp(formula, q, k, v)[1](gradient)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.num_heads, ctx.stride = inputs
    ctx.save_for_backward(*tensors)


class _Attention(torch.autograd.Function):
    """The kernel as a differentiable function of q (B, Q, C), k and v (B, T, C).

    We write subclasses of `Function` because `torch.library.register_autograd` does not work under `torch.func.grad` (torch 2.13).
    """

    setup_context = staticmethod(_save_inputs)

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> Tensor:
        return torch.ops.icl.attention_forward(q, k, v, num_heads, stride)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _AttentionGradient.apply(gradient, *ctx.saved_tensors, ctx.num_heads, ctx.stride)
        return *gradients, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        mapped = _Attention.apply(*_fold_mapped_axis(info.batch_size, in_dims, inputs))
        return mapped.unflatten(0, (info.batch_size, -1)), 0


class _AttentionGradient(torch.autograd.Function):
    """Gradient of the kernel. The derivative of this gradient comes from the formula, because the kernel computes no second derivatives."""

    setup_context = staticmethod(_save_inputs)

    @staticmethod
    def forward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> _Gradients:
        return torch.ops.icl.attention_backward(gradient, q, k, v, num_heads, stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        formula = partial(_gradients_by_formula, num_heads=ctx.num_heads, stride=ctx.stride)
        second = torch.func.vjp(formula, *ctx.saved_tensors)[1](gradients)
        return *second, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[_Gradients, tuple[int, int, int]]:
        mapped = _AttentionGradient.apply(*_fold_mapped_axis(info.batch_size, in_dims, inputs))
        dq, dk, dv = (tensor.unflatten(0, (info.batch_size, -1)) for tensor in mapped)
        return (dq, dk, dv), (0, 0, 0)


def _fold_mapped_axis(size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """Merge the axis that `torch.vmap` maps over into the axis of prompts. Inputs other than tensors do not change."""

    def fold(value: Any, axis: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value.expand(size, *value.shape) if axis is None else value.movedim(axis, 0)).flatten(0, 1)

    return [fold(*pair) for pair in zip(inputs, in_dims, strict=True)]


def _compiled_kernel() -> ctypes.CDLL | None:
    """Load the library of the kernel.

    Return None if the library is missing, was compiled from another version of `attention.cpp`, or does not find
    PyTorch's OpenMP runtime.
    """
    spec = find_spec("icl.model._attention")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        library.attention_source.argtypes, library.attention_source.restype = [], ctypes.c_char_p
        digest = library.attention_source().decode()
    except OSError:
        return None
    except AttributeError:  # libraries compiled by older versions have no digest
        digest = "none"
    if _SOURCE.exists() and sha256(_SOURCE.read_bytes()).hexdigest() != digest:
        warnings.warn(
            "The attention kernel was compiled from another version of icl, so PyTorch's operations are used instead. Run "
            "`pip install -e .` to compile it again.",
            stacklevel=2,
        )
        return None
    sizes = [ctypes.c_int64] * 7  # prompts, heads, queries, tokens, channels of a head, stride, lanes
    library.attention_lanes.argtypes, library.attention_lanes.restype = [], ctypes.c_int64
    for function, num_tensors in ((library.attention_forward, 4), (library.attention_backward, 7)):
        function.argtypes, function.restype = [*[ctypes.c_void_p] * num_tensors, *sizes], None
    return library


def _register(kernel: ctypes.CDLL) -> torch.library.Library:
    """Register the kernel as two PyTorch operations, which compiled graphs can call.

    `torch.library.custom_op` would be shorter, but its checks cost 8 us more per call: 35 us instead of 27 us for 4 prompts
    of 15 tokens (torch 2.13, one CPU thread). A training step of a model with two layers makes four such calls.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> Tensor:
        out = q.new_empty(q.shape)
        _run(kernel.attention_forward, [out], [q, k, v], num_heads, stride)
        return out

    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> _Gradients:
        gradients = _empty_gradients(gradient, q, k, v, num_heads, stride)
        _run(kernel.attention_backward, gradients, [gradient, q, k, v], num_heads, stride)
        return gradients

    operations = torch.library.Library("icl", "DEF")
    inputs = "Tensor q, Tensor k, Tensor v, int num_heads, int stride"
    operations.define(f"attention_forward({inputs}) -> Tensor")
    operations.define(f"attention_backward(Tensor gradient, {inputs}) -> (Tensor, Tensor, Tensor)")
    operations.impl("attention_forward", forward, "CPU")
    operations.impl("attention_backward", backward, "CPU")
    # Meta tensors have shapes but no numbers. The compiler uses them to find the shapes of the results.
    operations.impl("attention_forward", lambda q, *_: q.new_empty(q.shape), "Meta")
    operations.impl("attention_backward", _empty_gradients, "Meta")
    return operations


def _empty_gradients(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> _Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _run(function: Any, outputs: Sequence[Tensor], inputs: Sequence[Tensor], num_heads: int, stride: int) -> None:
    """Check the dtypes and shapes of the tensors, and call a function of the kernel.

    Without the check, the kernel could read beyond a tensor's memory.
    """
    *others, q, k, v = inputs  # the gradient, if any, has the shape of q
    (num_prompts, num_queries, width), num_tokens = q.shape, k.shape[1]
    if not (
        all(tensor.dtype == torch.float32 for tensor in inputs)
        and all(tensor.shape == q.shape for tensor in others)
        and k.shape == v.shape == (num_prompts, num_tokens, width)
        and num_heads >= 1
        and width % num_heads == 0
        and stride >= 1
        and (num_queries - 1) * stride < num_tokens
    ):
        given = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in inputs)
        raise ValueError(
            f"The attention kernel takes float32 queries (B, Q, C), keys and values (B, T, C). The number of heads must divide C. "
            f"Query i belongs to token i * stride, which must be below T. Got {num_heads} heads, stride {stride} and {given}."
        )
    contiguous = [tensor.contiguous() for tensor in inputs]  # keep the copies alive until the kernel has returned
    # In a new thread, PyTorch passes the number of threads to OpenMP only when `get_num_threads` is called.
    torch.get_num_threads()
    pointers = [tensor.data_ptr() for tensor in (*outputs, *contiguous)]
    function(*pointers, num_prompts, num_heads, num_queries, num_tokens, width // num_heads, stride, _LANES)


_KERNEL = _compiled_kernel()
HAS_KERNEL = _KERNEL is not None
"""Whether the kernel was compiled when `icl` was installed, and could be loaded."""
_LANES = 0 if _KERNEL is None else _KERNEL.attention_lanes()
"""Number of float32 numbers in the longest vector register of this processor: 16, 8 or 4. It is 0 without the kernel."""
_OPERATIONS = None if _KERNEL is None else _register(_KERNEL)  # the operations exist as long as this object does
ON_CPUS = f"kernel, {_LANES} lanes" if HAS_KERNEL else "PyTorch's operations"
"""Description of how this installation computes attention on CPUs. It is saved with a run, because each method has different rounding
errors."""
