"""Try bad inputs to every command and to the Python functions, and check that each one is refused clearly.

`python -m tests.reliability.bad_inputs` tries all of them and prints how many are refused clearly. A refusal is clear if

- the exit status is 1 or 2, or a Python function raises `UserError`, `ValueError` or `TypeError`;
- the message has at most three short lines, names the bad input, and has no traceback;
- the case takes a few seconds at most, and little memory;
- no file is left behind or changed.
"""

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from icl.config.validation import UserError
from tests.reliability.bench import make_bench
from tests.reliability.case import Case, command_case, nowhere_case

SECONDS = 10
"""Processor time in seconds above which a refusal is not clear."""
HANGS = 60
"""Time in seconds after which a case is stopped."""
_MAX_LINES, _MAX_CHARACTERS = 3, 900
_ROOM = 4 * 2**30
"""Address space in bytes that a case may use in addition to the current size of the process."""
_KEPT = re.compile(r"runs/\w+/results(/|$)")
"""Names of results that a command stored for some steps before it refused a later step. Such files may remain."""
_CLEAN = ("AWS_", "WANDB_", "ICL_", "LOCAL_ROOT", "DEVICE")


class _TooLong(BaseException):
    """Raised when the time is up. It is not an `Exception`, so that no command catches it."""


class Outcome(NamedTuple):
    """Outcome of a case."""

    problem: str
    """Reason why the refusal is not clear; empty if it is clear."""
    said: str
    """Message on standard error, or of the exception."""


def all_cases() -> list[Case]:
    """Return every case. Call it in the bench, because the cases of the Python functions use its files."""
    from tests.reliability.api_cases import api_cases
    from tests.reliability.command_cases import COMMAND_CASES, NOWHERE, setting_cases

    typed = [command_case(*row) for row in COMMAND_CASES]
    return [*typed, *map(nowhere_case, NOWHERE), *setting_cases(), *api_cases()]


@contextlib.contextmanager
def bench() -> Iterator[Path]:
    """Change to a temporary working directory with the files of the bench, and clean the environment until the context ends."""
    before, environment = Path.cwd(), dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="icl-bad-inputs-") as folder:
        try:
            for name in [name for name in os.environ if name.startswith(_CLEAN)]:
                del os.environ[name]
            os.environ |= {"WANDB_MODE": "disabled", "DEVICE": "cpu"}
            os.chdir(folder)
            make_bench(Path(folder))
            yield Path(folder)
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(environment)


def attempt(case: Case, folder: Path) -> Outcome:
    """Try a case in the bench, and judge its outcome. Files that it left there are removed."""
    before, saved = _files(folder), dict(os.environ)
    output, errors = io.StringIO(), io.StringIO()
    started = time.process_time()
    os.environ |= case.environment
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            problem, message = _act(case)
    finally:
        os.environ.clear()
        os.environ.update(saved)
    said = f"{errors.getvalue()}{message}".strip()
    changed = [name for name in _differences(before, _files(folder)) if not _KEPT.match(name)]
    for name in changed:
        _remove(folder / name)
    if not problem and changed:
        problem = f"left or changed {', '.join(changed[:3])}"
    if not problem and time.process_time() - started > SECONDS:
        problem = f"took more than {SECONDS} s"
    return Outcome(problem or _unclear(said, case.mentions), said)


def _act(case: Case) -> tuple[str, str]:
    """Run a case. Return a problem with its end, such as a traceback (or nothing), and the message of the exception."""
    try:
        with _limits():
            status = case.act()
    except SystemExit as stop:
        status = stop.code
    except _TooLong:
        return f"took more than {HANGS} s", ""
    except Exception as error:
        if case.group == "api" and isinstance(error, (UserError, ValueError, TypeError)):
            return "", str(error)
        place = traceback.extract_tb(error.__traceback__, limit=-1)[0]
        return f"traceback: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}", str(error)[:300]
    if case.group == "api":
        return f"accepted: {status!r:.60}", ""
    return ("" if status in (1, 2) else f"exit status {status}"), ""


def _unclear(said: str, mentions: Sequence[str]) -> str:
    missing = [word for word in mentions if word.lower() not in said.lower()]
    if "Traceback" in said:
        return "traceback on stderr"
    if not said:
        return "says nothing"
    if len(said.splitlines()) > _MAX_LINES or len(said) > _MAX_CHARACTERS:
        return f"says too much: {len(said.splitlines())} lines, {len(said)} characters"
    return f"does not mention {missing[0]!r}" if missing else ""


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limit time and memory until the context ends."""

    def stop(number: int, frame: object) -> None:
        raise _TooLong

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM, hard))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANGS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (old, hard))


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of every file in the bench, by path. Folders have zeros."""
    files_by_path = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            about = path.lstat()
            is_file = name in files
            files_by_path[str(path.relative_to(folder))] = (about.st_size, about.st_mtime_ns) if is_file else (0, 0)
    return files_by_path


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _remove(path: Path) -> None:
    """Remove a path that a case left, so that the next case starts with the same bench."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)


def main(words: Sequence[str]) -> int:
    """Try all cases, or those with one of the words in their group or line. Print a table and every unclear refusal."""
    tried: Counter[str] = Counter()
    clear: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    with bench() as folder:
        for case in all_cases():
            if words and not any(word in (case.group, case.label) or word in case.label for word in words):
                continue
            started = time.monotonic()
            outcome = attempt(case, folder)
            seconds[case.group] += time.monotonic() - started
            tried[case.group] += 1
            clear[case.group] += not outcome.problem
            if outcome.problem:
                print(f"NOT CLEAR {case.label:.150}\n    {outcome.problem}\n    {outcome.said[:300]!r}", flush=True)
    print(f"\n{'':12s} tried  clear  not clear  seconds")
    for group in [*tried, "all"]:
        of_tried, of_clear, took = (
            sum(one.values()) if group == "all" else one[group] for one in (tried, clear, seconds)
        )
        print(f"{group:12s} {of_tried:5d}  {of_clear:5d}  {of_tried - of_clear:9d}  {took:7.0f}")
    return 0 if tried == clear else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
