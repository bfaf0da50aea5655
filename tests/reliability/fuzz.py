"""Damage every file that `icl` reads back, thousands of times, and count how each reader reacts.

    python -m tests.reliability.fuzz --mutations 3000

A tiny run is trained, evaluated, sampled, analysed and copied to a store. Then, for each mutation, one of its files is damaged
(`tests/reliability/mutations.py`), and one of the commands that read the file is run in this process. The command must do its
work, or refuse in one sentence. Any other outcome is `uncaught`: another exception, a traceback in the output, more than ten
seconds of computing, or more than 3 GiB of memory.

If a file has a digest, damage to it must be noticed. So the content that is read from the damaged file is compared with the content
of the undamaged file. If they differ, the outcome is `unnoticed`, which is a fault too. The exception is damage that also makes
the digest right.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from matplotlib.figure import Figure
from PIL import Image

from icl.config.validation import UserError
from icl.plotting import style
from tests.reliability import readers
from tests.reliability.mutations import damaged

SECONDS = 10
"""Largest time of computing. Waiting does not count, because other programs may keep the processor busy."""
MEMORY = 3 * 2**30
"""Largest memory in bytes that a use may add."""
MAX_SENTENCE = 2000
"""Largest number of characters in a sentence of `icl`."""
_TOLD = "damaged|unreadable|altered|left out|cannot be (read|used)|not known|unknown"
"""Pattern of the words with which a command reports a damaged file that it does not use."""
OUTCOMES = ("refused", "mended", "whole", "unnoticed", "uncaught")
"""Outcomes of a trial:

- refused: the command refused in one sentence;
- mended: it did its work, after it had reported the damage or made the file again;
- whole: it did its work with the file as it is;
- unnoticed: it read other content than that of the undamaged file, although the file has a digest;
- uncaught: anything else.
"""
FAULTS = ("unnoticed", "uncaught")


class Trial(NamedTuple):
    """A trial with one damaged file, and its outcome."""

    reader: str
    seed: int
    outcome: str
    detail: str


class TooSlowError(BaseException):
    """Raised in a use that computes for too long. It is not an `Exception`, so that no command catches it."""


def fuzz(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    only: str = "",
    rendered: float = 0.05,
    tell: Callable[[Trial], None] = lambda _: None,
    share: tuple[int, int] = (0, 1),
) -> list[Trial]:
    """Try `count` mutations, spread evenly over the readers.

    Args:
        folder: An empty folder to work in.
        count: Number of mutations, over all processes.
        seed: Seed for the damage.
        only: Word that must be in the names of the readers to try. The default tries all.
        rendered: Share of the mutations after which figures are rendered. After the others, figures are only built, which takes
            a tenth of the time.
        tell: Function that receives every trial when it is done.
        share: Index of this process, and the number of processes.
    """
    bench = Bench(folder)
    chosen = [reader for reader in readers.READERS if only in reader.name]
    trials = []
    for number in range(share[0], count, share[1]):
        reader = chosen[number % len(chosen)]
        trials.append(try_one(bench, reader, seed * 1_000_003 + number, rendered))
        tell(trials[-1])
    return trials


class Bench:
    """Undamaged files, and a working copy of them that is restored before each trial."""

    def __init__(self, folder: Path) -> None:
        self.pristine, self.work = folder / "pristine", folder / "work"
        os.environ |= {"LOCAL_ROOT": str(self.work / "runs"), "DEVICE": "cpu", "WANDB_MODE": "disabled"}
        with _quiet(), unrendered():
            readers.make_files(self.pristine)
        absent = [reader.name for reader in readers.READERS if not any(self.pristine.glob(reader.file))]
        if absent:
            raise RuntimeError(f"There are no files of the kinds {', '.join(absent)}.")
        shutil.copytree(self.pristine, self.work, symlinks=True)
        self._known = _stats(self.work)
        self._contents: dict[tuple[str, str], str | None] = {}

    def restore(self) -> None:
        """Restore files that were changed or removed, and remove files that were added."""
        now = _stats(self.work)
        for name in sorted(now.keys() - self._known.keys()):
            path = self.work / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for name in sorted(self._known):
            if now.get(name) == self._known[name]:
                continue
            source, target = self.pristine / name, self.work / name
            if source.is_dir():
                target.mkdir(exist_ok=True)
            else:
                shutil.rmtree(target, ignore_errors=True)
                shutil.copy2(source, target)
                self._known[name] = _stat(target)

    def content(self, reader: readers.Reader, file: Path) -> str | None:
        """Return the content that is read from an undamaged file."""
        assert reader.content is not None
        key = (reader.name, str(file.relative_to(self.work)))
        if key not in self._contents:
            self._contents[key] = reader.content(self.pristine, self.pristine / key[1])
        return self._contents[key]


def _stats(folder: Path) -> dict[str, tuple[int, ...]]:
    return {str(path.relative_to(folder)): _stat(path) for path in folder.rglob("*")}


def _stat(path: Path) -> tuple[int, ...]:
    about = path.lstat()
    return () if path.is_dir() else (about.st_size, about.st_mtime_ns, about.st_ino)


def try_one(bench: Bench, reader: readers.Reader, seed: int, rendered: float) -> Trial:
    """Damage one file of a restored copy, and run one of its readers."""
    draw = random.Random(seed)
    bench.restore()
    file = draw.choice(sorted(bench.work.glob(reader.file)))
    undamaged = file.read_bytes()
    damage = damaged(reader.kind, undamaged, draw)
    file.write_bytes(damage.data)
    use = draw.choice(reader.uses)
    with contextlib.nullcontext() if draw.random() < rendered else unrendered():
        outcome, detail = outcome_of(lambda: use(bench.work, file), damaged_file=file)
    if outcome in ("mended", "whole") and not damage.is_forged and damage.data != undamaged:
        if use in reader.told_by and outcome == "whole":
            outcome, detail = "unnoticed", "the damage was not reported"
        elif reader.content is not None:
            read = _read(reader.content, bench.work, file, damage.data)
            if read not in (None, bench.content(reader, file)):
                outcome, detail = "unnoticed", str(read)[:200]
    return Trial(reader.name, seed, outcome, detail)


def _read(content: readers.Content, base: Path, file: Path, data: bytes) -> str | None:
    """Return the content that is read from damaged bytes, or None if they are refused."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    try:
        return content(base, file)
    except (UserError, OSError):
        return None


def outcome_of(act: Callable[[], Any], damaged_file: Path | None = None) -> tuple[str, str]:
    """Run a use. Return its outcome, and the sentence or the error."""
    started = time.process_time()
    before = damaged_file.read_bytes() if damaged_file is not None else b""
    try:
        with _quiet() as said, _bounded():
            status = act()
    except UserError as error:
        outcome, detail = "refused", str(error)
    except OSError as error:  # the command line reports these in a sentence
        outcome, detail = "refused", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "uncaught", _where(error)
    else:
        sentences = [line for line in said.getvalue().splitlines() if line.startswith("icl: ")]
        is_rewritten = damaged_file is not None and not (damaged_file.is_file() and damaged_file.read_bytes() == before)
        is_told = bool(sentences) or re.search(_TOLD, said.getvalue()) is not None
        outcome = "refused" if isinstance(status, int) and status else "mended" if is_rewritten or is_told else "whole"
        detail = "; ".join(sentences)
        if "Traceback" in said.getvalue() or any(len(line) > MAX_SENTENCE for line in sentences):
            return "uncaught", said.getvalue()[-2000:]
    if time.process_time() - started > SECONDS:
        return "uncaught", f"it took {time.process_time() - started:.0f} s"
    return outcome, detail


def _where(error: BaseException) -> str:
    """Return an error's type, its message, and the innermost line of `icl` in its traceback."""
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if f"{os.sep}icl{os.sep}" in name:
            place = f"{name.rpartition(f'{os.sep}icl{os.sep}')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Collect all output and suppress warnings, until the context ends."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield said


@contextlib.contextmanager
def unrendered() -> Iterator[None]:
    """Save every figure as one pixel, without a layout, until the context ends."""
    pixel = io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "png")

    def save(figure: Figure, target: io.BytesIO, **_: Any) -> None:
        target.write(pixel.getvalue())

    with mock.patch.object(Figure, "savefig", save), mock.patch.object(style, "tidy", return_value=None):
        yield


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Limit the time, and limit memory to `MEMORY` more than the process uses now, until the context ends."""

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
    """Return a table with a row for each kind of file: the number of mutations, and the number with each outcome."""
    counts = Counter((trial.reader, trial.outcome) for trial in trials)
    names = [reader.name for reader in readers.READERS if any(trial.reader == reader.name for trial in trials)]
    rows = [[name, *(counts[name, outcome] for outcome in OUTCOMES)] for name in names]
    rows.append(["**all**", *(sum(counts[name, outcome] for name in names) for outcome in OUTCOMES)])
    titles = "Refused with an error | Recomputed or reported | Read as it is | Altered unnoticed | Uncaught"
    lines = [f"| Kind of file | Mutations | {titles} |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {name} | {sum(own):,} | {' | '.join(f'{number:,}' for number in own)} |" for name, *own in rows]
    return "\n".join(lines)


def _share(job: tuple[int, int, int, int, str]) -> list[Trial]:
    """Run the trials of one process."""
    index, jobs, count, seed, only = job
    done = 0

    def tell(trial: Trial) -> None:
        nonlocal done
        done += 1
        if trial.outcome in FAULTS:
            print(f"{trial.reader}, seed {trial.seed}, {trial.outcome}: {trial.detail}", file=sys.stderr, flush=True)
        if done % 100 == 0:
            print(f"process {index + 1}: {done} mutations", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        return fuzz(Path(folder), count, seed=seed, only=only, tell=tell, share=(index, jobs))


def main() -> int:
    """Run the trials, and print the table and every fault. Return 1 if there was a fault."""
    parser = argparse.ArgumentParser(description="Damage every file that icl reads back, and count the outcomes.")
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="try only readers with this word in their name")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes; it does not change the mutations")
    options = parser.parse_args()
    jobs = [(index, options.jobs, options.mutations, options.seed, options.only) for index in range(options.jobs)]
    if options.jobs == 1:
        shares = [_share(jobs[0])]
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            shares = list(pool.map(_share, jobs))
    trials = [trial for share in shares for trial in share]
    print(table(trials))
    return int(any(trial.outcome in FAULTS for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
