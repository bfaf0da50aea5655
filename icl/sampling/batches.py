"""Minibatches for chains: a pure function of (chain, draw), or an iterable dealt out in turn.

Draws count every move, burn-in included, from 0. Checkpoints of one population see the same minibatches (chain k's at move
t is the same at every checkpoint), which makes their differences less noisy; chains of one checkpoint see different ones.
An iterable gives chain k at move t its batch number t * num_chains + k and starts over when it ends, so the batches do
not depend on how many chains run at once. One that draws from torch's global generator when it starts, as a shuffling
DataLoader does, starts each time from the same state, derived from the seed, and the caller's state is put back.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from icl.checks import ConfigError
from icl.rng import stream

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
    if isinstance(batches, Tensor):
        raise ConfigError("`batches` is one tensor; for full-batch chains give a list that holds it.")
    numbered = _indexed(batches) if isinstance(batches, Sequence) else _Dealer(batches, seed)
    return lambda chain, draw: numbered(draw * num_chains + chain)


def _indexed(batches: Sequence[Batch]) -> Callable[[int], Batch]:
    if not len(batches):
        raise ConfigError("`batches` is empty; a chain needs at least one batch.")
    return lambda number: batches[number % len(batches)]


class _Dealer:
    """Batch number i of an iterable without random access; what can be read once only is kept as it comes."""

    def __init__(self, batches: Iterable[Batch], seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.kept: list[Batch] | None = [] if isinstance(batches, Iterator) else None
        self.length: int | None = None
        self.iterator, self.position, self.last = self._begin(), 0, None

    def __call__(self, number: int) -> Batch:
        if self.length is not None:
            number %= self.length
        if self.kept is not None and number < len(self.kept):
            return self.kept[number]
        if number == self.position - 1:
            return self.last
        if number < self.position:
            self.iterator, self.position = self._begin(), 0
        while self.position <= number:
            try:
                self.last = self._next()
            except StopIteration:
                if not self.position:
                    raise ConfigError("`batches` is empty; a chain needs at least one batch.") from None
                self.length = self.position
                return self(number)
            self.position += 1
            if self.kept is not None:
                self.kept.append(self.last)
        return self.last

    def _begin(self) -> Iterator[Batch]:
        if self.kept is not None:
            assert isinstance(self.batches, Iterator)
            return self.batches
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(stream(self.seed, "llc/batches").low))  # the CPU's alone
            self.state = torch.get_rng_state()
            return iter(self.batches)

    def _next(self) -> Batch:
        if self.kept is not None:
            return next(self.iterator)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            batch = next(self.iterator)
            self.state = torch.get_rng_state()
            return batch


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


def take(batch: Batch, members: Tensor) -> Batch:
    """The rows `members` of a stacked batch."""
    return pytree.tree_map(lambda x: x[members.to(x.device)] if isinstance(x, Tensor) else x, batch)


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
