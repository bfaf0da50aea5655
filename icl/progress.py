"""Progress of long work: a live bar on a terminal, and a line every ten seconds elsewhere."""

import io
import sys
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


def progress_bar(name: str, total: int, unit: str, *, disable: bool = False, **options: Any) -> tqdm:
    """Return tqdm's bar for `total` units of work; it is moved on by its `update`.

    In a log file a live bar would be thousands of lines, so there the bar prints plain lines.

    Args:
        name: What is done, before the bar.
        total: Number of units.
        unit: Name of a unit, such as `checkpoint`.
        disable: Whether to show nothing, for work of a single unit.
        options: Further options of tqdm.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=name, unit=unit, disable=disable, dynamic_ncols=True, mininterval=0.2, **options)
    form = f"{{desc}} {{n_fmt}}/{{total_fmt}} {unit}s{{postfix}}"
    return tqdm(
        total=total,
        desc=name,
        unit=unit,
        disable=disable,
        bar_format=form,
        mininterval=_SECONDS_BETWEEN_LINES,
        maxinterval=2 * _SECONDS_BETWEEN_LINES,
        file=_Lines(),
        **options,
    )


class _Lines(io.StringIO):
    """A stream that prints what a bar writes as plain lines."""

    def write(self, text: str) -> int:
        """Print a state of the bar; nothing for the spaces that wipe it out."""
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)
        return len(text)
