"""Damage every file that `icl` reads back, thousands of times, and count what each reader makes of it.

    python -m tests.reliability.fuzz --mutations 3000

A tiny run is trained, evaluated, sampled, analysed and copied to a store. Then, for each mutation, one of its files is damaged
(`tests/reliability/mutations.py`) and one of the commands that read it is run in this process. It must do its work, or refuse in
one sentence. Anything else is uncaught: another exception, a traceback in the output, more than ten seconds of computing, or more than 3 GiB.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from matplotlib.figure import Figure
from PIL import Image

from icl.validation import UserError
from tests.reliability import readers
from tests.reliability.mutations import damaged

SECONDS = 10
"""Of computing, not of waiting: other programs may keep the processor busy."""
MEMORY = 3 * 2**30
MAX_SENTENCE = 2000
OUTCOMES = ("refused", "accepted", "uncaught")


class Trial(NamedTuple):
    """One damaged file and what became of it."""

    reader: str
    seed: int
    outcome: str
    detail: str


class TooSlowError(BaseException):
    """Raised in whatever runs longer than `SECONDS`; nothing catches it."""


def fuzz(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    only: str = "",
    rendered: float = 0.2,
    tell: Callable[[Trial], None] = lambda _: None,
) -> list[Trial]:
    """Try `count` mutations, spread evenly over the readers.

    Args:
        folder: An empty folder to work in.
        count: Mutations in all.
        seed: Of the damage.
        only: A word in the names of the readers to try; left out, all.
        rendered: Share of the mutations after which figures are rendered; after the others they are built only, which takes a
            tenth of the time.
        tell: Takes every trial as it is done.
    """
    pristine, work = folder / "pristine", folder / "work"
    os.environ |= {"LOCAL_ROOT": str(work / "runs"), "DEVICE": "cpu", "WANDB_MODE": "disabled"}
    with _quiet(), unrendered():
        readers.make_files(pristine)
    chosen = [reader for reader in readers.READERS if only in reader.name]
    trials = []
    for number in range(count):
        reader = chosen[number % len(chosen)]
        trials.append(try_one(pristine, work, reader, seed * 1_000_003 + number, rendered))
        tell(trials[-1])
    return trials


def try_one(pristine: Path, work: Path, reader: readers.Reader, seed: int, rendered: float) -> Trial:
    """Damage one file of a fresh copy, and let a reader of it have it."""
    draw = random.Random(seed)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work, symlinks=True)
    file = draw.choice(sorted(work.glob(reader.file)))
    file.write_bytes(damaged(reader.kind, file.read_bytes(), draw))
    use = draw.choice(reader.uses)
    with contextlib.nullcontext() if draw.random() < rendered else unrendered():
        outcome, detail = outcome_of(lambda: use(work, file))
    return Trial(reader.name, seed, outcome, detail)


def outcome_of(act: Callable[[], Any]) -> tuple[str, str]:
    """Return what came of a use: an outcome, and the sentence or the error."""
    started = time.process_time()
    try:
        with _quiet() as said, _bounded():
            status = act()
    except UserError as error:
        outcome, detail = "refused", str(error)
    except OSError as error:  # the command line tells these in a sentence
        outcome, detail = "refused", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "uncaught", _where(error)
    else:
        sentences = [line for line in said.getvalue().splitlines() if line.startswith("icl: ")]
        outcome = "refused" if isinstance(status, int) and status else "accepted"
        detail = "; ".join(sentences)
        if "Traceback" in said.getvalue() or any(len(line) > MAX_SENTENCE for line in sentences):
            return "uncaught", said.getvalue()[-2000:]
    if time.process_time() - started > SECONDS:
        return "uncaught", f"it took {time.process_time() - started:.0f} s"
    return outcome, detail


def _where(error: BaseException) -> str:
    """Return an error's kind, message and the last line of `icl` that it came through."""
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if f"{os.sep}icl{os.sep}" in name:
            place = f"{name.rpartition(f'{os.sep}icl{os.sep}')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Collect what is printed, warnings included."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield said


def unrendered() -> Any:
    """Let every figure that is saved be one pixel."""
    pixel = io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "png")

    def save(figure: Figure, target: io.BytesIO, **_: Any) -> None:
        target.write(pixel.getvalue())

    return mock.patch.object(Figure, "savefig", save)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Limit the time, and the memory to `MEMORY` more than the process has."""

    def stop(number: int, frame: object) -> None:
        raise TooSlowError(f"more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def table(trials: list[Trial]) -> str:
    """Return a row for each reader: mutations, refused, accepted, uncaught."""
    counts = Counter((trial.reader, trial.outcome) for trial in trials)
    names = list(dict.fromkeys(trial.reader for trial in trials))
    rows = [[name, *(counts[name, outcome] for outcome in OUTCOMES)] for name in names]
    rows.append(["all", *(sum(counts[name, outcome] for name in names) for outcome in OUTCOMES)])
    lines = [f"| {'Reader':34s} | Mutations | Refused | Accepted | Uncaught |", "|---|---|---|---|---|"]
    lines += [f"| {name:34s} | {sum(own):9,} | {own[0]:7,} | {own[1]:8,} | {own[2]:8,} |" for name, *own in rows]
    return "\n".join(lines)


def main() -> int:
    """Try, print the table and every uncaught error; 1 if there is one."""
    parser = argparse.ArgumentParser(description="Damage every file that icl reads back, and count what comes of it.")
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers with this in their name")
    options = parser.parse_args()

    def tell(trial: Trial) -> None:
        if trial.outcome == "uncaught":
            print(f"{trial.reader}, seed {trial.seed}: {trial.detail}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trials = fuzz(Path(folder), options.mutations, seed=options.seed, only=options.only, tell=tell)
    print(table(trials))
    return int(any(trial.outcome == "uncaught" for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
