"""Causal attention over the few tokens of a prompt: on CPUs by a kernel of our own, elsewhere by PyTorch's operations.

The kernel (tiny_attention.cpp) is compiled when `icl` is installed. Where there was no compiler, or on other devices and
in other precisions, the same numbers up to rounding come from the formula that is written out in `attention_by_formula`.
Both can be differentiated twice, in reverse mode.
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
    """What each querying token gathers from those before it and itself, its heads side by side.

    Args:
        queries: Of every `stride`-th token: query i is token i * stride.
        keys: Of all tokens.
        values: Of all tokens.
        num_heads: How many heads the C channels are.
        stride: From one querying token to the next.
    """
    if has_kernel_for(queries):
        flat = (tensor.flatten(0, 1) for tensor in (queries, keys, values))
        return _Attention.apply(*flat, num_heads, stride).unflatten(0, queries.shape[:2])
    return attention_by_formula(queries, keys, values, num_heads=num_heads, stride=stride)


def has_kernel_for(tensor: Tensor) -> bool:
    """Whether attention over tensors of this device and precision is the kernel's."""
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
    """The same by PyTorch's operations, on any device and in any precision."""
    num_tokens = keys.shape[-2]
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=keys.device).triu(1)[::stride]  # Q T
    q, k, v = (heads.unflatten(-1, (num_heads, -1)).transpose(-3, -2) for heads in (queries, keys, values))  # N H . c
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # N H Q T
    pattern = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # N H Q T
    return (pattern @ v).transpose(-3, -2).flatten(-2)  # N Q C


def _gradients_by_formula(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, stride: int
) -> _Gradients:
    formula = partial(attention_by_formula, num_heads=num_heads, stride=stride)
    return torch.func.vjp(formula, q, k, v)[1](gradient)


class _Attention(torch.autograd.Function):
    """The kernel, with its gradient; tensors (B, Q or T, C)."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> Tensor:
        return torch.ops.icl.attention_forward(q, k, v, num_heads, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.num_heads, ctx.stride = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = _AttentionGradient.apply(gradient, *ctx.saved_tensors, ctx.num_heads, ctx.stride)
        return *found, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        mapped = _Attention.apply(*_as_prompts(info.batch_size, in_dims, inputs))
        return mapped.unflatten(0, (info.batch_size, -1)), 0


class _AttentionGradient(torch.autograd.Function):
    """The kernel's gradient, whose own gradient is the formula's."""

    @staticmethod
    def forward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> _Gradients:
        return torch.ops.icl.attention_backward(gradient, q, k, v, num_heads, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Gradients) -> None:
        *tensors, ctx.num_heads, ctx.stride = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        formula = partial(_gradients_by_formula, num_heads=ctx.num_heads, stride=ctx.stride)
        found = torch.func.vjp(formula, *ctx.saved_tensors)[1](gradients)
        return *found, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[_Gradients, tuple[int, int, int]]:
        mapped = _AttentionGradient.apply(*_as_prompts(info.batch_size, in_dims, inputs))
        dq, dk, dv = (tensor.unflatten(0, (info.batch_size, -1)) for tensor in mapped)
        return (dq, dk, dv), (0, 0, 0)


def _as_prompts(size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """Tensors with a mapped axis, or the same for all, as tensors with more prompts; other inputs as they are."""

    def one(value: Any, axis: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value.expand(size, *value.shape) if axis is None else value.movedim(axis, 0)).flatten(0, 1)

    return [one(*pair) for pair in zip(inputs, in_dims, strict=True)]


def _compiled_kernel() -> ctypes.CDLL | None:
    """The kernel's library, if it was compiled from the source that is there and finds PyTorch's OpenMP runtime."""
    spec = find_spec("icl._tiny_attention")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        library.attention_source.argtypes, library.attention_source.restype = [], ctypes.c_char_p
        source = library.attention_source().decode()
    except OSError:
        return None
    except AttributeError:
        source = "none"
    if _SOURCE.exists() and sha256(_SOURCE.read_bytes()).hexdigest() != source:
        warnings.warn(
            "The kernel of attention was compiled from another version of icl, so PyTorch's operations do its work; run "
            "`pip install -e .` again.",
            stacklevel=2,
        )
        return None
    sizes = [ctypes.c_int64] * 7  # prompts, heads, queries, tokens, channels of a head, stride, lanes
    library.attention_lanes.argtypes, library.attention_lanes.restype = [], ctypes.c_int64
    for function, num_tensors in ((library.attention_forward, 4), (library.attention_backward, 7)):
        function.argtypes, function.restype = [*[ctypes.c_void_p] * num_tensors, *sizes], None
    return library


def _register(kernel: ctypes.CDLL) -> torch.library.Library:
    """Makes the kernel two operations of PyTorch, which a compiled graph can call."""

    def sizes(inputs: Sequence[Tensor], num_heads: int, stride: int) -> tuple[int, ...]:
        """What the kernel is told; it would read what is not there if this were not true."""
        *_, q, k, v = inputs
        (num_prompts, num_queries, width), num_tokens = q.shape, k.shape[1]
        fit = k.shape == v.shape == (num_prompts, num_tokens, width) and all(
            one.shape == q.shape for one in inputs[:-2]
        )
        fit = fit and all(one.dtype == torch.float32 for one in inputs) and num_heads >= 1 and stride >= 1
        if not fit or width % num_heads or (num_queries - 1) * stride >= num_tokens:
            raise ValueError(
                f"Attention of {num_heads} heads at stride {stride} of {[(one.dtype, tuple(one.shape)) for one in inputs]}."
            )
        torch.get_num_threads()  # PyTorch sets a thread's number at its first question
        return num_prompts, num_heads, num_queries, num_tokens, width // num_heads, stride, _LANES

    def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> Tensor:
        inputs, out = [tensor.contiguous() for tensor in (q, k, v)], q.new_empty(q.shape)
        pointers = [tensor.data_ptr() for tensor in (out, *inputs)]
        kernel.attention_forward(*pointers, *sizes(inputs, num_heads, stride))
        return out

    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> _Gradients:
        inputs = [tensor.contiguous() for tensor in (gradient, q, k, v)]
        found = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        pointers = [tensor.data_ptr() for tensor in (*found, *inputs)]
        kernel.attention_backward(*pointers, *sizes(inputs, num_heads, stride))
        return found

    def shape_forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> Tensor:
        return q.new_empty(q.shape)

    def shape_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, stride: int) -> _Gradients:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    operations = torch.library.Library("icl", "DEF")
    operations.define("attention_forward(Tensor q, Tensor k, Tensor v, int num_heads, int stride) -> Tensor")
    operations.define(
        "attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, int num_heads, int stride) "
        "-> (Tensor, Tensor, Tensor)"
    )
    for key, forwards, backwards in (("CPU", forward, backward), ("Meta", shape_forward, shape_backward)):
        operations.impl("attention_forward", forwards, key)
        operations.impl("attention_backward", backwards, key)
    return operations


_KERNEL = _compiled_kernel()
HAS_KERNEL = _KERNEL is not None
"""Whether the kernel was compiled when `icl` was installed and could be loaded."""
_LANES = 0 if _KERNEL is None else _KERNEL.attention_lanes()
"""Numbers in a vector, the most that this processor has: 16, 8 or 4."""
_OPERATIONS = None if _KERNEL is None else _register(_KERNEL)  # registered for as long as this is there
ON_CPUS = f"kernel, {_LANES} lanes" if HAS_KERNEL else "PyTorch's operations"
"""What does the work there, in words: where it is another, numbers differ by rounding."""
