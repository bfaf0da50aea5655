"""Damage every file that `icl` reads back, thousands of times, and count what each reader makes of it.

    python -m tests.reliability.fuzz --mutations 3000

A tiny run is trained, evaluated, sampled, analysed and copied to a store. Then, for each mutation, one of its files is damaged
(`tests/reliability/mutations.py`) and one of the commands that read it is run in this process. It must do its work, or refuse in
one sentence. Anything else is uncaught: another exception, a traceback in the output, more than ten seconds of computing, or more than 3 GiB.

A file with a digest must not be read as if it were whole: unless the damage made the digest right again, what is read of it is compared with
what is read of the undamaged file. If it differs, the damage went unnoticed, which counts as a fault as well.
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
"""Of computing, not of waiting: other programs may keep the processor busy."""
MEMORY = 3 * 2**30
MAX_SENTENCE = 2000
_TOLD = "damaged|unreadable|altered|left out|cannot be (read|used)|not known|unknown"
"""Words by which a command says that it does without a file."""
OUTCOMES = ("refused", "mended", "whole", "unnoticed", "uncaught")
"""Refused in a sentence; done, after saying what is damaged or making it again; done with the file as it is; with other content than the
undamaged file although a digest guards it; anything else."""
FAULTS = ("unnoticed", "uncaught")


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
    rendered: float = 0.05,
    tell: Callable[[Trial], None] = lambda _: None,
    share: tuple[int, int] = (0, 1),
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
        share: Of several processes, which this one is, and how many there are.
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
    """Undamaged files, and a copy of them to work in that is made whole again before each trial."""

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
        """Put back what was changed or removed, and remove what was added."""
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
        """Return what is read of an undamaged file."""
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
    """Damage one file of a fresh copy, and let a reader of it have it."""
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
            outcome, detail = "unnoticed", "nothing was said of it"
        elif reader.content is not None:
            read = _read(reader.content, bench.work, file, damage.data)
            if read not in (None, bench.content(reader, file)):
                outcome, detail = "unnoticed", str(read)[:200]
    return Trial(reader.name, seed, outcome, detail)


def _read(content: readers.Content, base: Path, file: Path, data: bytes) -> str | None:
    """Return what is read of damaged bytes, or None if they are refused."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    try:
        return content(base, file)
    except (UserError, OSError):
        return None


def outcome_of(act: Callable[[], Any], damaged_file: Path | None = None) -> tuple[str, str]:
    """Return what came of a use: an outcome, and the sentence or the error."""
    started = time.process_time()
    before = damaged_file.read_bytes() if damaged_file is not None else b""
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


@contextlib.contextmanager
def unrendered() -> Iterator[None]:
    """Let every figure that is saved be one pixel, without a layout."""
    pixel = io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "png")

    def save(figure: Figure, target: io.BytesIO, **_: Any) -> None:
        target.write(pixel.getvalue())

    with mock.patch.object(Figure, "savefig", save), mock.patch.object(style, "tidy", return_value=None):
        yield


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
    """Return a row for each kind of file: mutations, and how many ended in each way."""
    counts = Counter((trial.reader, trial.outcome) for trial in trials)
    names = [reader.name for reader in readers.READERS if any(trial.reader == reader.name for trial in trials)]
    rows = [[name, *(counts[name, outcome] for outcome in OUTCOMES)] for name in names]
    rows.append(["**all**", *(sum(counts[name, outcome] for name in names) for outcome in OUTCOMES)])
    titles = "Refused in a sentence | Recomputed or reported | Read as it is | Altered unnoticed | Uncaught"
    lines = [f"| Kind of file | Mutations | {titles} |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {name} | {sum(own):,} | {' | '.join(f'{number:,}' for number in own)} |" for name, *own in rows]
    return "\n".join(lines)


def _share(job: tuple[int, int, int, int, str]) -> list[Trial]:
    """Do one process's share of the trials."""
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
    """Try, print the table and every fault; 1 if there is one."""
    parser = argparse.ArgumentParser(description="Damage every file that icl reads back, and count what comes of it.")
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="processes; the mutations are the same for any number")
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
