"""Named, counter-based random streams: every draw is a pure function of (seed, stream, step, index).

Nothing here keeps state or touches the global generator. A stream's 64-bit key is a hash of its seed and name; the
128-bit counter holds (block, index, step); Philox4x32-10 maps the two to four 32-bit words. So prompt 7 of step
1,000 is the same numbers whatever ran before, on one rank or eight, alone or in a batch. Integers are exact on every
device; normals are made in float64 and rounded once to float32, so devices agree up to rounding in the last place.

Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3; the constants
and known answers are those of their Random123 library. Normals are Box and Muller 1958.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(NamedTuple):
    """The key of one stream, made by `stream`, or those of N streams, made by `together`; then draws have an axis N first."""

    low: int | Int64[Tensor, "N 1 1 1"]
    high: int | Int64[Tensor, "N 1 1 1"]


def stream(seed: int, name: str) -> Stream:
    """The stream called `name` under `seed`: equal for equal arguments, independent for different ones."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return Stream(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def together(streams: Sequence[Stream], *, device: torch.device | str = "cpu") -> Stream:
    """Several streams as one, to draw from all of them at once what each would give alone."""
    return Stream(*(_kept(words, torch.device(device)).view(-1, 1, 1, 1) for words in zip(*streams, strict=True)))


def philox(
    key: Stream, counter: tuple[Int64[Tensor, "..."], Int64[Tensor, "..."], Int64[Tensor, "..."], Int64[Tensor, "..."]]
) -> tuple[Int64[Tensor, "..."], Int64[Tensor, "..."], Int64[Tensor, "..."], Int64[Tensor, "..."]]:
    """Philox4x32-10: four counter words to four random words, each in [0, 2^32) and held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps; the bits are those of uint64
        c0 = (_high(product1) & _WORD) ^ c1 ^ k0
        c2 = (_high(product0) & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def normal(
    key: Stream, steps: Int64[Tensor, " S"], indices: Int64[Tensor, " B"], size: int
) -> Float[Tensor, "*N S B {size}"]:
    """Standard normals, `size` for each step and index, in float32 on the device of `steps`.

    A shorter draw is the beginning of a longer one.
    """
    device = steps.device
    if device.type == "mps":  # has no float64
        key = Stream(*(word.cpu() if isinstance(word, Tensor) else word for word in key))
        return normal(key, steps.cpu(), indices.cpu(), size).to(device)
    first, second, third, fourth = _words(key, steps, indices, num_blocks=-(-size // 4))
    radius = _radius(torch.stack((first, third), dim=-1))  # N S B W 2
    angle = torch.stack((second, fourth), dim=-1).double() * (2 * math.pi * 2**-32)  # N S B W 2
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)  # N S B W 2 2
    return pairs.flatten(-3)[..., :size].float()  # N S B size


def integers(
    key: Stream, steps: Int64[Tensor, " S"], indices: Int64[Tensor, " B"], bound: int | Sequence[int]
) -> Int64[Tensor, "*N S B"]:
    """Whole numbers uniform on 0 .. bound - 1, by multiply-and-shift of 64 random bits (bias below bound / 2^64).

    Args:
        key: The stream or streams.
        steps: The steps.
        indices: The indices.
        bound: One for all, or of each of N streams.

    Raises:
        ValueError: If a bound is not in 1 .. 2^31 - 1.
    """
    bounds = [bound] if isinstance(bound, int) else list(bound)
    for one in bounds:
        if not 1 <= one < 2**31:
            raise ValueError(f"`bound` must be from 1 to 2^31 - 1, got {one}.")
    limit = bound if isinstance(bound, int) else _kept(tuple(bounds), steps.device).view(-1, 1, 1)
    high, low, _, _ = (word.squeeze(-1) for word in _words(key, steps, indices, num_blocks=1))
    return _high(high * limit + _high(low * limit))


@lru_cache(maxsize=256)
def _kept(words: tuple[int, ...], device: torch.device) -> Int64[Tensor, " N"]:
    """On a device once and for all: to copy them for every draw is to wait for a GPU every time."""
    with torch.inference_mode(False):
        return torch.tensor(words, device=device)


def _words(key: Stream, steps: Tensor, indices: Tensor, *, num_blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for each step, index and block; the counter is (block, index, step low, step high)."""
    shape = (len(steps), len(indices), num_blocks)
    block = torch.arange(num_blocks, device=steps.device).expand(shape)
    index = indices[:, None].expand(shape)
    step = steps[:, None, None].expand(shape)
    return philox(key, (block, index & _WORD, step & _WORD, _high(step) & _WORD))


def _high(words: Tensor) -> Tensor:
    return torch.bitwise_right_shift(words, 32)  # XLA's `>>` rounds negative numbers towards zero


def _radius(words: Tensor) -> Tensor:
    uniform = (words.double() + 0.5) * 2**-32  # strictly inside (0, 1)
    return (-2 * uniform.log()).sqrt()
