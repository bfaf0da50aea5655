"""A progress bar over chain-moves: one chain's move is one unit of work, whatever else is done beside it."""

import sys
from collections.abc import Callable
from typing import TypeAlias

from tqdm import tqdm

Tick: TypeAlias = Callable[[int], None]
"""Told the chain-moves that were done since it last was."""


class MoveBar:
    """How many chain-moves are done of those there are, with the time that is left."""

    def __init__(self, name: str, total: int) -> None:
        self.bar = tqdm(total=total, desc=name, unit=" moves", unit_scale=True, mininterval=0.5)

    def __enter__(self) -> "MoveBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def expect(self, moves: int) -> None:
        """So many more are to be made than was thought, or fewer."""
        self.bar.total += moves
        self.bar.refresh()

    def leave(self, moves: int) -> None:
        """So many are still to be made."""
        self.bar.total = self.bar.n + moves
        self.bar.refresh()

    def advance(self, moves: int) -> None:
        """So many were made."""
        self.bar.update(moves)

    def name(self, text: str) -> None:
        """What is being done, before the bar."""
        self.bar.set_description(text)

    def tell(self, text: str) -> None:
        """The latest news, behind the bar."""
        self.bar.set_postfix_str(text)


def say(line: str) -> None:
    """A line on the standard output, above whatever bar there is."""
    tqdm.write(line)
    sys.stdout.flush()
