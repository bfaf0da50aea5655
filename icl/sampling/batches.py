"""Minibatches for chains: a pure function of (chain, draw), or an iterable dealt out in turn.

Draws count every move, burn-in included, from 0. Checkpoints of one population see the same minibatches (chain k's at move
t is the same at every checkpoint), which makes their differences less noisy; chains of one checkpoint see different ones.
An iterable gives chain k at move t its batch number t * num_chains + k and starts over when it ends, so the batches do
not depend on how many chains run at once. One that draws from torch's global generator when it starts, as a shuffling
DataLoader does, starts its pass e from a state derived from (seed, e), and the caller's state is put back. Where the numbers
of chains and of batches have a common factor, a chain would meet the same few batches for ever and sample the posterior of
those; so one batch is passed over each time the dealing would begin to repeat itself.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from icl.rng import stream
from icl.validation import ConfigError

Batch: TypeAlias = Any
"""A tree (tuples, lists, dicts) of tensors and other values."""
_ARRAYS = (Tensor, np.ndarray)
Batches: TypeAlias = Callable[[int, int], Batch] | Iterable[Batch]


def batch_function(batches: Batches, *, num_chains: int, seed: int) -> Callable[[int, int], Batch]:
    """`batches` as a function of (chain, draw).

    Raises:
        ConfigError: If it is neither a function nor an iterable, or an iterable without a batch.
    """
    if callable(batches):
        return batches
    if not isinstance(batches, Iterable):
        raise ConfigError(
            f"`batches` must be a function (chain, draw) -> batch or an iterable of batches, got {type(batches).__name__}."
        )
    if isinstance(batches, (*_ARRAYS, Mapping)):
        raise ConfigError(
            f"`batches` is one {type(batches).__name__}, not several batches; for full-batch chains give a list that holds it."
        )
    if isinstance(batches, Sequence):
        numbered = _indexed(batches, num_chains)
    elif isinstance(batches, Iterator):
        numbered = _Kept(batches, num_chains)
    else:
        numbered = _Dealer(batches, num_chains, seed)
    return lambda chain, draw: numbered(draw * num_chains + chain)


def _passing_over(number: int, *, length: int, num_chains: int) -> int:
    """The place of batch `number` in the endless row of passes of `length` batches."""
    if math.gcd(length, num_chains) == 1 or length == 1:
        return number
    return number + number // math.lcm(length, num_chains)


def _indexed(batches: Sequence[Batch], num_chains: int) -> Callable[[int], Batch]:
    length = len(batches)
    if not length:
        raise _is_empty()
    return lambda number: batches[_passing_over(number, length=length, num_chains=num_chains) % length]


class _Kept:
    """Batch number i of what can be read once only; kept as it comes."""

    def __init__(self, batches: Iterator[Batch], num_chains: int) -> None:
        self.batches, self.num_chains = batches, num_chains
        self.kept: list[Batch] = []

    def __call__(self, number: int) -> Batch:
        self.kept += itertools.islice(self.batches, max(0, number + 1 - len(self.kept)))
        return self.kept[number] if number < len(self.kept) else _indexed(self.kept, self.num_chains)(number)


class _Dealer:
    """Batch number i of an iterable that can be read again and again, each time perhaps in another order."""

    def __init__(self, batches: Iterable[Batch], num_chains: int, seed: int) -> None:
        self.batches, self.num_chains, self.seed = batches, num_chains, seed
        self.length: int | None = None
        self.last: Batch = None
        self._begin(0)

    def __call__(self, number: int) -> Batch:
        place = number
        if self.length is not None:
            place = _passing_over(number, length=self.length, num_chains=self.num_chains)
        if place == self.position - 1:
            return self.last
        if place < self.position:
            self._begin(0 if self.length is None else place // self.length)
        while self.position <= place:
            try:
                self.last = self._next()
            except StopIteration:
                if self.position == self.epoch * (self.length or 0):
                    raise _is_empty() from None
                is_first, self.length = self.length is None, self.length or self.position
                self._begin(self.epoch + 1)
                if is_first:
                    return self(number)
                continue
            self.position += 1
        return self.last

    def _begin(self, epoch: int) -> None:
        """Start a pass; the CPU's generator alone is set."""
        self.epoch, self.position = epoch, epoch * (self.length or 0)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(stream(self.seed, f"llc/batches/{epoch}").low))
            self.state = torch.get_rng_state()
            self.iterator = iter(self.batches)

    def _next(self) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            batch = next(self.iterator)
            self.state = torch.get_rng_state()
            return batch


def _is_empty() -> ConfigError:
    return ConfigError("`batches` is empty; a chain needs at least one batch.")


def stack_batches(batches: Sequence[Batch], device: torch.device) -> Batch:
    """Batches of equal structure as one, their tensors, arrays and numbers stacked on a leading axis N.

    A batch that all share is expanded, not copied. What is the same in all and no tensor is left as it is.

    Raises:
        ConfigError: If they differ in structure or shape.
    """
    first, spec = pytree.tree_flatten(batches[0])
    if all(batch is batches[0] for batch in batches):
        leaves = [torch.as_tensor(x).to(device) if isinstance(x, _ARRAYS) else x for x in first]
        leaves = [x.expand(len(batches), *x.shape) if isinstance(x, Tensor) else x for x in leaves]
        return pytree.tree_unflatten(leaves, spec)
    rows = [pytree.tree_leaves(batch) for batch in batches]
    try:
        leaves = [_stack(column, device) for column in zip(*rows, strict=True)]
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(
            "Chains that run together need minibatches of one structure and shape; drop a short last batch, or set "
            "`vectorize=False`."
        ) from None
    return pytree.tree_unflatten(leaves, spec)


def _stack(column: Sequence[Any], device: torch.device) -> Any:
    if not isinstance(column[0], _ARRAYS) and all(x == column[0] for x in column):
        return column[0]
    return torch.stack([torch.as_tensor(x) for x in column]).to(device)


def fingerprint(batch: Batch) -> bytes:
    """A digest of what a batch holds, equal for equal batches."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, _ARRAYS):
            array = torch.as_tensor(leaf).detach().cpu().contiguous()
            digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()
