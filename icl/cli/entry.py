"""Entry point of the command line, `icl COMMAND`. Each command is a module of `icl.cli`.

A user's mistake is reported in one line on standard error, with exit status 2. The exit status is 1 if a run failed,
and 128 + the number of the signal if a signal stopped it. Slow imports are made only by the commands that need them.
"""

import difflib
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from icl import __version__
from icl.cli.env_file import load_env_file
from icl.config.older import modern_command, modern_setting
from icl.config.validation import ConfigError, UserError, user_path
from icl.files.redaction import redact
from icl.runs.environment import COMMANDS
from icl.signals import Handler, defer, handling

_ABOUT = "Train small transformers on in-context linear regression and study how they develop."
_MORE = "`icl COMMAND --help` lists options and examples. Start with: icl train"
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables in which torchrun, srun and jsrun give each process its rank, that is, its index among the processes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status, which is 0 only if the work of the command is done."""
    if arguments is None:
        _open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help", "--version"):
        return _reporting_errors(lambda: _introduce(words), only_prints=True)
    if words[0] not in COMMANDS:
        older = modern_command(words)
        if older is not None:
            return _complain(f"There is no command `{words[0]}`; its new name is `{older}`.", 2)
        if words[0].startswith("-"):
            option = words[0].partition("=")[0]
            modern = modern_setting(option.strip("-"))
            hint = f" {modern}" if modern else ""
            return _complain(
                f"`{option}` must follow a command, such as `icl train`.{hint} `icl --help` lists the commands.", 2
            )
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f" Did you mean `icl {near[0]}`?" if near else ""
        return _complain(f"There is no command `{words[0]}`.{hint} `icl --help` lists the commands.", 2)
    only_prints = words[0] == "runs" or bool({"-h", "--help"} & set(words))
    status = _reporting_errors(lambda: _run(words[0], words[1:]), only_prints=only_prints)
    wandb_log = sys.modules.get("icl.training.wandb.log")
    if wandb_log is not None and wandb_log.has_unsent_rows():
        sys.stdout.flush()
        os._exit(status)  # without a network, W&B's exit handler would wait for days
    waiting = sys.modules.get("icl.store.waiting")
    # Only a process that runs nothing but `icl` may be ended here. In such a process, `arguments` is None.
    if arguments is None and waiting is not None and waiting.would_block_exit():
        sys.stdout.flush()
        os._exit(status)
    return status


def _run(command: str, words: list[str]) -> int:
    """Run a command, and return its exit status."""
    _require_working_folder()
    load_env_file()
    _require_ranks()
    _share_the_machine()
    with handling(_signals_of_a_point()):
        module = importlib.import_module(f"icl.cli.{command}")
    return module.run([_with_home(word) for word in words])


def _reporting_errors(work: Callable[[], int], *, only_prints: bool) -> int:
    """Do some work, and return its exit status. An error is printed in one line.

    The program that reads the output, such as `head`, may end early. If the work only prints, the exit status is then 0.
    """
    try:
        try:
            return work()
        finally:
            _flush()  # while an error can still be reported
    except UserError as error:
        return _complain(str(error), error.exit_status)
    except BrokenPipeError:
        return 0 if only_prints else 141
    except OSError as error:
        return _complain(f"{error.strerror or error}: {error.filename or 'a file'}.", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _complain("there is not enough memory; use fewer prompts, a smaller batch or a smaller model.", 1)
    except KeyboardInterrupt:
        return _complain("interrupted; run the same command again to continue from the last save.", 130)


def _flush() -> None:
    """Send all printed text to its reader. If this fails, discard the text, because Python would try to send it again at the exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _require_working_folder() -> None:
    """Refuse a working folder that cannot be used. Without this check, PyTorch would end the process with a message of its own.

    Raises:
        UserError: If there is no usable working folder. The message says why.
    """
    try:
        Path.cwd()
    except OSError as error:
        is_gone = isinstance(error, FileNotFoundError)
        reason = "no longer exists" if is_gone else f"cannot be used ({error.strerror})"
        raise UserError(
            f"The working folder {reason}; change to another folder (cd), and run the same command there."
        ) from None


def _open_streams() -> None:
    """Make it safe to print: open every output stream, and let it print `?` for a character that its encoding lacks (± in ASCII).

    A stream that the user has closed (`>&-`) is replaced by the null device. Otherwise, the next file that the program opens would get the
    stream's number, and messages of libraries would be written into this file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", errors="replace", closefd=False))
        elif stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _introduce(words: Sequence[str]) -> int:
    """Print the version, or the list of commands."""
    print(f"icl {__version__}" if words[:1] == ["--version"] else _overview())
    return 0


def _overview() -> str:
    lines = [f"  icl {name:11s} {importlib.import_module(f'icl.cli.{name}').HELP}" for name in COMMANDS]
    return "\n".join(["usage: icl COMMAND [options]", "", _ABOUT, "", *lines, "", _MORE])


def _with_home(word: str) -> str:
    """Replace a leading `~/` by the home folder, as a shell does. A word such as `--option=~/FILE` is also changed.

    Raises:
        ConfigError: If no home folder is known.
    """
    option, tilde, rest = re.fullmatch(r"(--[\w.-]+=)?(~/)?(.*)", word, re.S).groups()  # type: ignore[union-attr]
    return f"{option or ''}{user_path('~')}/{rest}" if tilde else word


def _require_ranks() -> None:
    """Refuse process ranks (`_RANKS`) that are not whole numbers, and unset empty ones.

    Lightning reads these variables when it is imported, and fails if a value is not a whole number.

    Raises:
        ConfigError: If a rank is not a whole number from 0. The message names the variable.
    """
    for name in _RANKS:
        text = os.environ.get(name)
        if text is not None and not text.strip():
            del os.environ[name]
        elif text is not None and not re.fullmatch(r"[0-9]{1,9}", text.strip()):
            raise ConfigError(
                f"The environment variable {name} must be the rank of a process (0, 1, ...), got {text!r}; correct or unset it."
            )


def _signals_of_a_point() -> dict[signal.Signals, Handler]:
    """Return handlers that defer signals, or no handlers if `wandb agent` did not start this program.

    The handlers are used while modules are imported, which takes seconds. Later, `icl.training.wandb.agent.work_at_point` handles
    the deferred signals: this function returns the sweep point to W&B, so that another agent can train the point. If a signal ended
    the program during the imports, W&B would never assign the point again.
    """
    return {signal.SIGTERM: defer, signal.SIGINT: defer} if os.environ.get("WANDB_SWEEP_ID") else {}


def _share_the_machine() -> None:
    """Let waiting threads of PyTorch sleep after a short time, unless an environment variable already sets how they wait.

    By default, waiting threads of GNU's OpenMP spin for milliseconds at every operation. We measured a step that takes 16 ms
    on two idle cores:

    - While another terminal runs a busy program, the step takes 400 to 1,100 ms by default, and 50 to 100 ms with our
      setting. (Linux divides processor time among terminals, not among programs.)
    - While the same terminal runs a busy program, the step takes 40 to 60 ms with either setting.
    - On an idle machine, the setting makes no difference.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "3000"  # PyTorch reads this variable when it is imported, which happens later


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the error says that memory ran out. On CPUs, torch raises a plain RuntimeError for this."""
    return isinstance(error, MemoryError) or any(
        words in str(error)
        for words in ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    )


def _complain(message: str, status: int) -> int:
    """Print an error in one line on standard error, and return the exit status.

    Very long words are shortened, and characters that move the cursor are replaced by `?`.
    """
    line = re.sub(r"\S{160,}", lambda match: f"{match[0][:60]}...{match[0][-20:]}", " ".join(redact(message).split()))
    print(f"icl: {''.join(c if c.isprintable() else '?' for c in line)}", file=sys.stderr)
    return status
