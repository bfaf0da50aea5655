"""Progress of long work: a progress bar on a terminal, and otherwise a line every ten seconds."""

import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


def progress_bar(
    name: str, total: int, unit: str, *, disable: bool = False, shows_rate: bool = False, **options: Any
) -> tqdm:
    """Return a tqdm progress bar for `total` units of work. Call its method `update` after each unit.

    In a log file, a normal bar would take thousands of lines. So if the output is not a terminal, the bar prints plain lines.

    Args:
        name: Name of the work, shown before the bar.
        total: Number of units.
        unit: Name of a unit, such as `checkpoint`.
        disable: Whether to show nothing, for example because there is only one unit.
        shows_rate: Whether plain lines show units per second and the remaining time. If so, the first line comes after ten seconds.
        options: Further options of tqdm.
    """
    options |= {"total": total, "desc": name, "unit": unit, "disable": disable}
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, mininterval=0.2, **options)
    rate = ", {rate_fmt}, {remaining} left" if shows_rate else ""
    return tqdm(
        bar_format=f"{{desc}} {{n_fmt}}/{{total_fmt}} {unit}s{{postfix}}{rate}",
        mininterval=_SECONDS_BETWEEN_LINES,
        maxinterval=2 * _SECONDS_BETWEEN_LINES,
        delay=_SECONDS_BETWEEN_LINES if shows_rate else 0,
        file=_Lines(),
        **options,
    )


def with_progress(items: Sequence[Item], name: str, unit: str) -> Iterator[Item]:
    """Yield items, with a progress bar if there are several."""
    with progress_bar(name, len(items), unit, disable=len(items) == 1) as bar:
        for item in items:
            yield item
            bar.update()


def set_remaining(bar: tqdm, num_units: int | float) -> None:
    """Set the number of units of work that a bar still expects."""
    bar.total = bar.n + max(0, num_units)
    bar.refresh()


def print_at_once(line: str) -> None:
    """Print a line without delay, even if the output goes to a file or a pipe."""
    print(line, flush=True)


class _Lines(io.StringIO):
    """A stream that prints the output of a bar as plain lines."""

    def write(self, text: str) -> int:
        """Print the text of the bar, but not the spaces that erase it."""
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)
        return len(text)
