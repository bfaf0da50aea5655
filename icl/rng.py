"""Counter-based random streams: every draw is a pure function of (seed, stream, step, index).

The functions of this module keep no state and do not use the global generator. The key of a stream is a 64-bit hash of its seed and name.
Each draw has a 128-bit counter (block, index, step). Philox4x32-10 maps the key and the counter to four random 32-bit words. So prompt 7 of
step 1,000 always has the same numbers. It does not matter what ran before, how many processes there are, or which other prompts are in
the batch.

Integers are exact on every device. Normals are computed in float64 and rounded once to float32, so the normals of two devices differ at
most in the last place.

Source: Salmon, Moraes, Dror and Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", section 3.3. The constants, and the known
answers in our tests, come from their library Random123. Normals are computed by the method of Box and Muller (1958).
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# torch cannot compute with uint64. So words of 32 bits are stored in int64, and this mask cuts off higher bits after every product or sum.
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(NamedTuple):
    """The key of one stream, made by `stream`, or the keys of N streams, made by `together`.

    Draws from N streams have a leading axis N.
    """

    low: int | Int64[Tensor, "N 1 1 1"]
    high: int | Int64[Tensor, "N 1 1 1"]


def stream(seed: int, name: str) -> Stream:
    """Return the stream of this seed and name. Streams with different arguments are independent."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return Stream(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def together(streams: Sequence[Stream], *, device: torch.device | str = "cpu") -> Stream:
    """Join N streams, so that one call draws from all of them. Each stream gives the same numbers as if it were used alone."""
    return Stream(
        *(_device_tensor(words, torch.device(device)).view(-1, 1, 1, 1) for words in zip(*streams, strict=True))
    )


def philox(
    key: Stream, counter: tuple[Int64[Tensor, "..."], Int64[Tensor, "..."], Int64[Tensor, "..."], Int64[Tensor, "..."]]
) -> tuple[Int64[Tensor, "..."], Int64[Tensor, "..."], Int64[Tensor, "..."], Int64[Tensor, "..."]]:
    """Apply Philox4x32-10 to four counter words. Counter words and results are in [0, 2^32), stored in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product can exceed int64 and wrap around. Its 64 bits are still the lowest 64 bits of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (_high(product1) & _WORD) ^ c1 ^ k0
        c2 = (_high(product0) & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def normal(
    key: Stream, steps: Int64[Tensor, " S"], indices: Int64[Tensor, " B"], size: int
) -> Float[Tensor, "*N S B {size}"]:
    """Draw `size` standard normals for each step and index, in float32 on the device of `steps`.

    The first numbers are the same for every `size`.
    """
    device = steps.device
    if device.type == "mps":  # MPS has no float64
        key = Stream(*(word.cpu() if isinstance(word, Tensor) else word for word in key))
        return normal(key, steps.cpu(), indices.cpu(), size).to(device)
    first, second, third, fourth = _words(key, steps, indices, num_blocks=-(-size // 4))
    uniform = (torch.stack((first, third), dim=-1).double() + 0.5) * 2**-32  # N S B W 2; never 0, so its log is finite
    radius = (-2 * uniform.log()).sqrt()  # N S B W 2
    angle = torch.stack((second, fourth), dim=-1).double() * (2 * math.pi * 2**-32)  # N S B W 2
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)  # N S B W 2 2
    return pairs.flatten(-3)[..., :size].float()  # N S B size


def uniform(
    key: Stream, steps: Int64[Tensor, " S"], indices: Int64[Tensor, " B"], size: int, *, first_block: int = 0
) -> Float[Tensor, "*N S B {size}"]:
    """Draw `size` uniform numbers in (0, 1) for each step and index, in float64. MPS devices cannot do this, because they have no float64.

    Args:
        key: The stream or streams.
        steps: The steps.
        indices: The indices.
        size: Number of draws.
        first_block: First block of the counter. Draws from different blocks of a stream are independent. `normal` uses the blocks
            below `size` / 4.
    """
    words = torch.stack(_words(key, steps, indices, num_blocks=-(-size // 4), first_block=first_block), dim=-1)
    return (words.double() + 0.5).mul(2**-32).flatten(-2)[..., :size]  # N S B size


def integers(
    key: Stream, steps: Int64[Tensor, " S"], indices: Int64[Tensor, " B"], bound: int | Sequence[int]
) -> Int64[Tensor, "*N S B"]:
    """Draw one whole number for each step and index, uniformly from 0 to bound - 1.

    The number is floor(u * bound / 2^64) for 64 random bits u (multiply and shift). The bias is below bound / 2^64.

    Args:
        key: The stream or streams.
        steps: The steps.
        indices: The indices.
        bound: One bound, or a bound for each of N streams.

    Raises:
        ValueError: If a bound is not from 1 to 2^31 - 1.
    """
    bounds = [bound] if isinstance(bound, int) else list(bound)
    for number in bounds:
        if not 1 <= number < 2**31:
            raise ValueError(f"`bound` must be from 1 to 2^31 - 1, got {number}.")
    limit = bound if isinstance(bound, int) else _device_tensor(tuple(bounds), steps.device).view(-1, 1, 1)
    high, low, _, _ = (word.squeeze(-1) for word in _words(key, steps, indices, num_blocks=1))
    return _high(high * limit + _high(low * limit))


def words(
    key: Stream, steps: Int64[Tensor, " S"], indices: Int64[Tensor, " B"], size: int
) -> Int64[Tensor, "*N S B {size}"]:
    """Draw `size` words of 32 random bits for each step and index, as whole numbers from 0 to 2^32 - 1.

    The first words are the same for every `size`.
    """
    drawn = _words(key, steps, indices, num_blocks=-(-size // 4))
    return torch.stack(drawn, dim=-1).flatten(-2)[..., :size]  # N S B size


@lru_cache(maxsize=256)
def _device_tensor(words: tuple[int, ...], device: torch.device) -> Int64[Tensor, " N"]:
    """Copy numbers to a device, and cache the copy. Without the cache, every draw would wait for another copy to the GPU."""
    with torch.inference_mode(False):  # the tensor is kept, and may later be used where gradients are recorded
        return torch.tensor(words, device=device)


def _words(
    key: Stream, steps: Tensor, indices: Tensor, *, num_blocks: int, first_block: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four random words for each step, index and block.

    The counter is (block, index, low 32 bits of the step, high 32 bits of the step).
    """
    shape = (len(steps), len(indices), num_blocks)
    block = (first_block + torch.arange(num_blocks, device=steps.device)).expand(shape)
    index = indices[:, None].expand(shape)
    step = steps[:, None, None].expand(shape)
    return philox(key, (block, index & _WORD, step & _WORD, _high(step) & _WORD))


def _high(words: Tensor) -> Tensor:
    """Return the upper 32 bits. We call a shift function, because on XLA devices `words >> 32` rounds negative numbers towards zero."""
    return torch.bitwise_right_shift(words, 32)
