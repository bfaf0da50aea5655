"""Watch whether the folder of all runs can be reached. A folder on a file server may be unreachable for a while.

Nothing may be written while the folder cannot be reached. Otherwise a new folder of the same name could hide the old folder, or
prevent the old folder from being mounted again.
"""

import time
from collections.abc import Callable
from pathlib import Path

from icl.files.writing import StorageError

_CHECK_SECONDS = 1.0
_GIVE_UP_SECONDS = 600.0
"""Seconds for which the folder may be unreachable before the sweep ends."""


class StorageWatch:
    """Check at intervals whether the folder of all runs can be reached.

    Args:
        mark: A file or folder that exists as long as the folder of all runs can be reached; None turns the checks off.
        say: Function that receives a line for each event.
    """

    def __init__(self, mark: Path | None, say: Callable[[str], None]) -> None:
        self.mark, self.say = mark, say
        self._next_check = 0.0
        self._lost_at: float | None = None

    def is_there(self, *, now: bool = False) -> bool:
        """Return whether the folder can be reached. It is checked at most once a second, or immediately if `now` is true.

        Raises:
            StorageError: If the folder has been unreachable for ten minutes.
        """
        if self.mark is None:
            return True
        if now or time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + _CHECK_SECONDS
            self._note(is_there=_exists(self.mark))
        return self._lost_at is None

    def lose(self, error: OSError) -> None:
        """Record that an operation failed. The folder counts as unreachable until a later check succeeds.

        Raises:
            OSError: The same error, if the checks are turned off.
            StorageError: If the folder has been unreachable for ten minutes.
        """
        if self.mark is None:
            raise error
        self._note(is_there=False, why=f" ({error.strerror or error})")
        self._next_check = time.monotonic() + _CHECK_SECONDS

    def _note(self, *, is_there: bool, why: str = "") -> None:
        if is_there:
            if self._lost_at is not None:
                self.say(f"The folder of the runs can be reached again after {time.monotonic() - self._lost_at:.0f} s.")
            self._lost_at = None
        elif self._lost_at is None:
            self._lost_at = time.monotonic()
            self.say(
                f"The folder of the runs cannot be reached{why}: {self.mark}. Waiting until it can be reached again."
            )
        elif time.monotonic() - self._lost_at > _GIVE_UP_SECONDS:
            raise StorageError(
                f"The folder of the runs could not be reached for ten minutes: {self.mark} is missing. "
                "Once it is back, run the same command again."
            )


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True
