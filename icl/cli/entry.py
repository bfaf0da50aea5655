"""The door for people: `icl COMMAND`. The commands are the modules of `icl.cli`.

A user's mistake is one sentence on standard error and exit status 2; a run that failed exits with 1, one stopped by a
signal with 128 + its number. Heavy imports wait for the command that needs them.
"""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from icl import __version__
from icl.cli.env_file import load_env_file
from icl.config.older import modern_command, modern_setting
from icl.config.validation import ConfigError, UserError, user_path
from icl.files.redaction import redact
from icl.runs.environment import COMMANDS

_ABOUT = "Train small transformers on in-context linear regression and study how they develop."
_MORE = "`icl COMMAND --help` has options and examples. Start with: icl train"
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables by which torchrun, srun and jsrun number the processes that they start."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status, which is 0 only when its work is done."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"icl {__version__}")
        return 0
    if words[0] not in COMMANDS:
        older = modern_command(words)
        if older is not None:
            return _complain(f"There is no command `{words[0]}`; here it is `{older}`.", 2)
        if words[0].startswith("-"):
            option = words[0].partition("=")[0]
            modern = modern_setting(option.strip("-"))
            hint = f" {modern}" if modern else ""
            return _complain(
                f"`{option}` follows a command, such as `icl train`.{hint} `icl --help` lists the commands.", 2
            )
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f" Did you mean `icl {near[0]}`?" if near else ""
        return _complain(f"There is no command `{words[0]}`.{hint} `icl --help` lists them.", 2)
    status = _run(words[0], words[1:])
    wandb_log = sys.modules.get("icl.training.wandb.log")
    if wandb_log is not None and wandb_log.has_unsent_rows():
        sys.stdout.flush()
        os._exit(status)  # W&B's own exit handler would wait for a lost network for days
    return status


def _run(command: str, words: list[str]) -> int:
    """Run a command; return its exit status. Its errors are printed in a sentence."""
    try:
        Path.cwd()
    except OSError as error:  # PyTorch would end the process by an error of its own
        is_gone = isinstance(error, FileNotFoundError)
        reason = "no longer exists" if is_gone else f"cannot be used ({error.strerror})"
        return _complain(
            f"The working folder {reason}; change to one that does (cd), and run the same command there.", 1
        )
    try:
        load_env_file()
        _require_ranks()
        _share_the_machine()
        return importlib.import_module(f"icl.cli.{command}").run([_with_home(word) for word in words])
    except UserError as error:
        return _complain(str(error), error.exit_status)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; what only prints has done its work
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if command == "runs" or {"-h", "--help"} & set(words) else 141
    except OSError as error:
        return _complain(f"{error.strerror or error}: {error.filename or 'a file'}.", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _complain("there is not enough memory for this; ask for fewer prompts, or a smaller batch or model.", 1)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command goes on from the last save.", 130)


def _overview() -> str:
    lines = [f"  icl {name:11s} {importlib.import_module(f'icl.cli.{name}').HELP}" for name in COMMANDS]
    return "\n".join(["usage: icl COMMAND [options]", "", _ABOUT, "", *lines, "", _MORE])


def _with_home(word: str) -> str:
    """Return a word with `~/` at its beginning, or after its `=`, replaced by the home folder, as a shell would.

    Raises:
        ConfigError: If no home folder is known.
    """
    option, tilde, rest = re.fullmatch(r"(--[\w.-]+=)?(~/)?(.*)", word, re.S).groups()  # type: ignore[union-attr]
    return f"{option or ''}{user_path('~')}/{rest}" if tilde else word


def _require_ranks() -> None:
    """Refuse ranks that are no numbers; Lightning reads them while it is imported, and fails.

    Raises:
        ConfigError: Naming the variable.
    """
    for name in _RANKS:
        text = os.environ.get(name)
        if text is not None and not text.strip():
            del os.environ[name]
        elif text is not None and not re.fullmatch(r"[0-9]{1,9}", text.strip()):
            raise ConfigError(f"{name} must be the number of a process, got {text!r}; correct or unset the variable.")


def _share_the_machine() -> None:
    """Let PyTorch's threads that wait for each other go to sleep soon, unless the environment says otherwise.

    By default GNU's OpenMP lets them spin for milliseconds at every operation. Beside one busy program of another terminal
    (Linux lets sessions take turns) a step on two cores then took 400 to 1,100 ms instead of 16, and takes 50 to 100 so; beside
    one of the same terminal 40 to 60 either way, and on an idle machine there is no difference.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "3000"  # read when PyTorch is loaded, which no module has done yet


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory could not be had; torch says so on CPUs by a RuntimeError of no kind of its own."""
    return isinstance(error, MemoryError) or any(
        words in str(error)
        for words in ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    )


def _complain(message: str, status: int) -> int:
    """Print one line; words that are too long to read are cut, and no character moves the cursor."""
    line = re.sub(r"\S{160,}", lambda match: f"{match[0][:60]}...{match[0][-20:]}", " ".join(redact(message).split()))
    print(f"icl: {''.join(c if c.isprintable() else '?' for c in line)}", file=sys.stderr)
    return status
