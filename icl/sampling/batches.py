"""Minibatches of the chains: a function of (chain, draw), or an iterable whose batches go to the chains in turn.

In this module the draw number counts all moves from 0, including burn-in. Chain k at move t gets the same minibatch at every checkpoint,
which makes differences between checkpoints less noisy. The chains of one checkpoint get different minibatches.

If the batches come from an iterable, chain k at move t gets batch number t * num_chains + k. So the batches do not depend on how many
chains run at once. A finite iterable starts over when it ends.

- A shuffling DataLoader draws from torch's global generator. So before pass number e through the iterable, we set this generator to a state
  that depends only on (seed, e). Afterwards we restore the caller's state.
- If the number of chains and the number of batches have a common factor, each chain would see only some of the batches, and would sample
  the posterior of these batches alone. So we skip one batch each time the assignment of batches to chains would repeat.
"""

import hashlib
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from icl.config import ChainsConfig
from icl.config.validation import ConfigError
from icl.rng import stream

Batch: TypeAlias = Any
"""A tree (tuples, lists, dicts) of tensors and other values."""
Batches: TypeAlias = Callable[[int, int], Batch] | Iterable[Batch]
NUM_COMPARED = 4
"""Number of early moves at which we compare the minibatches of different chains. We also compare them at up to twice as many later
moves."""
SHORT_LIST = 32
"""Length below which a list of batches is called short. In repeated passes through a short list, the noise of a chain's consecutive
moves is clearly correlated."""
_ARRAYS = (Tensor, np.ndarray)


class Pool(NamedTuple):
    """A fixed set of minibatches from which the chains' minibatches are taken."""

    size: int
    number_of: Callable[[int, int], int]
    """Function from (chain, draw) to the index of the minibatch in the pool."""
    get: Callable[[int], Batch]
    """Function from an index below `size` to the minibatch."""
    is_uniform: bool
    """Whether the minibatches are drawn uniformly and independently. If not, the chains go through the pool in passes."""


class ChainBatches:
    """The minibatches of several chains, with a record of which chains saw the same minibatches."""

    def __init__(self, batches: Batches, settings: ChainsConfig) -> None:
        self.get = batch_function(batches, num_chains=settings.num_chains, seed=settings.seed)
        self.num_chains, self.num_moves = settings.num_chains, settings.num_moves
        self.pool = _pool(batches, self.num_chains)
        self.length, self.repeats = _length(batches), False
        later = range(NUM_COMPARED, self.num_moves, max(1, (self.num_moves - NUM_COMPARED) // (2 * NUM_COMPARED)))
        self.compared = frozenset(range(NUM_COMPARED)), frozenset(later[: 2 * NUM_COMPARED])
        self.digests: dict[tuple[int, int], bytes] = {}

    def first_distinct(self, num_wanted: int, device: torch.device) -> tuple[list[Batch], bool]:
        """Return the first distinct batches that the chains get, at most `num_wanted`, and whether there seem to be no others."""
        batches: dict[bytes, Batch] = {}
        num_repeats, patience = 0, 2 * self.num_chains
        num_sought = max(2, num_wanted)  # a second batch shows that the first one is not all the data
        for number in range(self.num_moves * self.num_chains):
            draw, chain = divmod(number, self.num_chains)
            batch = self.get(chain, draw)
            key = fingerprint(batch)
            num_repeats = num_repeats + 1 if key in batches else 0
            batches.setdefault(key, batch)
            if len(batches) == num_sought or num_repeats > patience + len(batches):
                break
        are_all = len(batches) <= num_wanted and num_repeats > patience + len(batches)
        self.repeats = are_all and len(batches) > 1 and self.pool is None
        return [to_device(batch, device) for batch in list(batches.values())[:num_wanted]], are_all

    def stacked(self, chains: Sequence[int], draw: int, device: torch.device) -> Batch:
        """Return the batches of one move, with a row for each element of `chains`.

        If a chain number occurs several times in `chains`, its batch is made only once and is used for each of these rows.
        """
        batches = {chain: self.get(chain, draw) for chain in dict.fromkeys(chains)}
        if any(draw in draws for draws in self.compared):
            self.digests |= {(chain, draw): fingerprint(batch) for chain, batch in batches.items()}
        return stack_batches([batches[chain] for chain in chains], device)

    @property
    def is_cyclic(self) -> bool:
        """Whether each chain gets the same batches again and again.

        This is the case for a list with at most as many batches as a chain has moves, and for a function that returns only a few distinct
        batches.
        """
        return self.repeats or 1 < self.length <= self.num_moves

    def is_one(self) -> bool:
        """Return whether all compared moves of all chains used the same batch. This batch is then taken to be all the data."""
        return len(set(self.digests.values())) <= 1

    def is_short_list(self) -> bool:
        """Return whether the chains go repeatedly through a list of fewer than `SHORT_LIST` batches."""
        return 1 < self.length < SHORT_LIST

    def is_shared(self) -> bool:
        """Return whether two chains shared all batches of the early compared moves, or all batches of the late ones.

        The result is False if there is only a single batch.
        """
        if self.is_one():
            return False
        chains = {chain for chain, _ in self.digests}
        for compared in self.compared:
            draws = sorted({draw for _, draw in self.digests} & compared)
            rows = {tuple(self.digests[chain, draw] for draw in draws) for chain in chains}
            if draws and len(rows) < len(chains):
                return True
        return False


def batch_function(batches: Batches, *, num_chains: int, seed: int) -> Callable[[int, int], Batch]:
    """Return `batches` as a function of (chain, draw).

    Raises:
        ConfigError: If `batches` is neither a function nor an iterable, or is empty.
    """
    if callable(batches):
        return batches
    if not isinstance(batches, Iterable):
        raise ConfigError(
            f"`batches` must be a function (chain, draw) -> batch or an iterable of batches, got {type(batches).__name__}."
        )
    if isinstance(batches, (*_ARRAYS, Mapping)):
        raise ConfigError(
            f"`batches` is a single {type(batches).__name__}, not several batches. For full-batch chains, pass a list that "
            "contains it."
        )
    if isinstance(batches, Sequence):
        by_number = _from_sequence(batches, num_chains)
    elif isinstance(batches, Iterator):
        by_number = _FromIterator(batches, num_chains)
    else:
        by_number = _FromIterable(batches, num_chains, seed)
    return lambda chain, draw: by_number(draw * num_chains + chain)


def _pool(batches: Batches, num_chains: int) -> Pool | None:
    """Return the pool of `batches`: the attribute `pool` of a function, or all batches of a list. Return None for anything else."""
    if not isinstance(batches, Sequence) or callable(batches):
        return getattr(batches, "pool", None)
    length = len(batches)

    def number_of(chain: int, draw: int) -> int:
        return _position(draw * num_chains + chain, length=length, num_chains=num_chains) % length

    return Pool(length, number_of, batches.__getitem__, is_uniform=False)


def _length(batches: Batches) -> int:
    """Return the number of batches of a list, or of another iterable that knows its length; 0 if the number is unknown."""
    return 0 if callable(batches) else operator.length_hint(batches)


def _position(number: int, *, length: int, num_chains: int) -> int:
    """Return the position of batch `number` in an endless repetition of `length` batches.

    Skipped batches have positions, but no numbers.
    """
    if math.gcd(length, num_chains) == 1 or length == 1:
        return number
    return number + number // math.lcm(length, num_chains)


def _from_sequence(batches: Sequence[Batch], num_chains: int) -> Callable[[int], Batch]:
    length = len(batches)
    if not length:
        raise _empty_error()
    return lambda number: batches[_position(number, length=length, num_chains=num_chains) % length]


class _FromIterator:
    """Callable that returns the batch with a given number from an iterator.

    It keeps all batches, because an iterator can be read only once.
    """

    def __init__(self, batches: Iterator[Batch], num_chains: int) -> None:
        self.batches, self.num_chains = batches, num_chains
        self.kept: list[Batch] = []

    def __call__(self, number: int) -> Batch:
        self.kept += itertools.islice(self.batches, max(0, number + 1 - len(self.kept)))
        return self.kept[number] if number < len(self.kept) else _from_sequence(self.kept, self.num_chains)(number)


class _FromIterable:
    """Callable that returns the batch with a given number from an iterable.

    The iterable can be read repeatedly, perhaps in a different order each time.
    """

    def __init__(self, batches: Iterable[Batch], num_chains: int, seed: int) -> None:
        self.batches, self.num_chains, self.seed = batches, num_chains, seed
        self.length: int | None = None  # unknown until the first pass has ended
        self.last: Batch = None
        self._start_pass(0)

    def __call__(self, number: int) -> Batch:
        position = number
        if self.length is not None:
            position = _position(number, length=self.length, num_chains=self.num_chains)
        if position == self.next_position - 1:
            return self.last
        if position < self.next_position:  # the batch lies before the current position, so its pass is read again
            self._start_pass(0 if self.length is None else position // self.length)
        while self.next_position <= position:
            try:
                self.last = self._read()
            except StopIteration:
                if self.next_position == self.epoch * (self.length or 0):
                    raise _empty_error() from None
                is_first, self.length = self.length is None, self.length or self.next_position
                self._start_pass(self.epoch + 1)
                if is_first:  # the position depends on the length, which is known only now
                    return self(number)
                continue
            self.next_position += 1
        return self.last

    def _start_pass(self, epoch: int) -> None:
        """Start a pass, with a state of torch's CPU generator that depends only on the seed and the pass."""
        self.epoch, self.next_position = epoch, epoch * (self.length or 0)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(stream(self.seed, f"llc/batches/{epoch}").low))
            self.state = torch.get_rng_state()
            self.iterator = iter(self.batches)

    def _read(self) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            batch = next(self.iterator)
            self.state = torch.get_rng_state()
            return batch


def _empty_error() -> ConfigError:
    return ConfigError("`batches` is empty. A chain needs at least one batch.")


def stack_batches(batches: Sequence[Batch], device: torch.device) -> Batch:
    """Stack the tensors and arrays of batches, and the numbers that differ between batches, on a new leading axis N.

    All other values must be equal in all batches, and stay as they are. If all batches are the same object, its tensors are expanded
    without a copy.

    Raises:
        ConfigError: If the batches differ in structure or shape, or in a value that cannot be stacked.
    """
    first, spec = pytree.tree_flatten(batches[0])
    if all(batch is batches[0] for batch in batches):
        leaves = [torch.as_tensor(x).to(device) if isinstance(x, _ARRAYS) else x for x in first]
        leaves = [x.expand(len(batches), *x.shape) if isinstance(x, Tensor) else x for x in leaves]
        return pytree.tree_unflatten(leaves, spec)
    rows = [pytree.tree_leaves(batch) for batch in batches]
    try:
        leaves = [_stack_leaves(column, device) for column in zip(*rows, strict=True)]
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(
            "Chains that run together need minibatches of equal structure and shape. Drop a short last batch, or set "
            "`vectorize=False`."
        ) from None
    return pytree.tree_unflatten(leaves, spec)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device, and convert its arrays to tensors."""
    return pytree.tree_map(lambda x: x[0] if isinstance(x, Tensor) else x, stack_batches([batch], device))


def _stack_leaves(column: Sequence[Any], device: torch.device) -> Any:
    if not isinstance(column[0], _ARRAYS) and all(x == column[0] for x in column):
        return column[0]
    return torch.stack([torch.as_tensor(x) for x in column]).to(device)


def fingerprint(batch: Batch) -> bytes:
    """Return a digest of a batch's content, equal for equal batches."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, _ARRAYS):
            array = torch.as_tensor(leaf).detach().cpu().contiguous()
            digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()
