"""Log a run to Weights & Biases (W&B) if the user has set it up. Training never depends on W&B.

W&B is used if `WANDB_MODE` is `online` or `offline`, if the environment has an API key, or if `.netrc` has a login.
`WANDB_MODE=disabled` overrides all of these. If W&B cannot be reached at the start, a message says so and the run is
logged offline. If the network fails later, the end of the program is delayed by at most a minute for each run. If W&B
itself fails, for example because its helper process was killed, a message says so and training goes on without it. The W&B
id of a run is stored in its folder, so that a resumed run continues the same W&B run. All metrics have `step` as their
x axis.
"""

import netrc
import os
import re
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from icl.config import RunConfig
from icl.config.validation import ConfigError, UserError
from icl.files.reading import first_line
from icl.files.redaction import redact
from icl.files.writing import write_atomically
from icl.run_names import run_name
from icl.runs.folder import RunFolder

Mode = Literal["online", "offline"]

_START_SECONDS = 10
_FINISH_SECONDS = 60
_MODES = ("", "online", "offline", "disabled", "dryrun", "run", "shared")
"""Values of $WANDB_MODE that W&B accepts."""

_has_unsent_rows = False
_is_unreachable = False
_said_failures: set[str] = set()
"""Messages about failures of W&B that were printed. W&B usually fails in the same way for all members of a population, so each message is
printed once."""
_ended_runs: weakref.WeakSet = weakref.WeakSet()
"""W&B runs of this process that have ended."""


def wandb_mode() -> Mode | None:
    """Return the mode that the user has chosen for W&B; None if W&B is not set up or is disabled.

    Raises:
        ConfigError: If $WANDB_MODE is not a mode of W&B.
    """
    mode = os.environ.get("WANDB_MODE", "").strip().lower()
    if mode not in _MODES:
        raise ConfigError(f"`WANDB_MODE` must be online, offline or disabled, got {mode!r}.")
    if mode in ("disabled", "dryrun"):
        return None if mode == "disabled" else "offline"
    if mode == "offline":
        return "offline"
    return "online" if mode in ("online", "run", "shared") or os.environ.get("WANDB_API_KEY") or _has_login() else None


def is_disabled() -> bool:
    """Return whether $WANDB_MODE turns W&B off."""
    return os.environ.get("WANDB_MODE", "").strip().lower() == "disabled"


class WandbLog:
    """A W&B run that receives the rows of `metrics.csv`.

    Args:
        run: The W&B run.
        is_lent: Whether the code that began the W&B run also ends it.
    """

    def __init__(self, run: Any, *, is_lent: bool = False) -> None:
        self.run, self.is_lent = run, is_lent
        self.sent = sent_step(run)
        self.has_failed = False

    def log(self, row: Mapping[str, int | float]) -> None:
        """Send one row, unless W&B already has the row.

        W&B has some rows already if a run resumes, because the run repeats the steps after its last save. After an error of W&B, no more
        rows are sent.
        """
        if row["step"] <= self.sent or self.has_failed:
            return
        try:
            self.run.log(row)
        except Exception as error:  # wandb raises many types of errors; none may stop a run
            self.has_failed = True
            say_failure(error)

    def finish(self, exit_code: int) -> None:
        """End the W&B run with the program's exit code, unless the code that began it also ends it (`is_lent`)."""
        if not self.is_lent:
            end_run(self.run, exit_code)


def sent_step(run: Any) -> int:
    """Return the step of the last row that W&B has received from a run, or -1 if W&B has no row."""
    step = run.summary.get("step")
    return -1 if step is None else int(step)


def use_steps(run: Any) -> None:
    """Make `step` the x axis of all metrics of a W&B run."""
    run.define_metric("step")
    run.define_metric("*", step_metric="step")


def end_run(run: Any, exit_code: int) -> None:
    """End a W&B run with the program's exit code, unless the run has ended.

    An exit code above 128 means that a signal stopped the run. Such a run is marked as pre-empted, so that a W&B sweep can
    assign it again. Rows that are not sent within a minute stay on disk, and a message names their folder. W&B's exit
    handlers would try to send these rows, which could delay the end of the program for days. So if there are such rows
    (`has_unsent_rows`), `icl.cli` ends without running the handlers.
    """
    global _has_unsent_rows
    if run in _ended_runs:
        return
    _ended_runs.add(run)
    thread = threading.Thread(target=_finish, args=(run, exit_code), daemon=True)
    thread.start()
    thread.join(_FINISH_SECONDS)
    if thread.is_alive():
        _has_unsent_rows = True
        folder = Path(run.dir).parent
        _say(f"W&B did not receive everything within {_FINISH_SECONDS} s. To send the rest, run `wandb sync {folder}`.")


def _finish(run: Any, exit_code: int) -> None:
    """End a W&B run. If a signal stopped the run, mark the run as pre-empted. If W&B fails, only print a message."""
    global _has_unsent_rows
    try:
        if exit_code > 128:
            run.mark_preempting()
        run.finish(exit_code=exit_code)
    except Exception as error:  # wandb raises many types of errors
        _has_unsent_rows = True
        say_failure(error)


def exit_code_of(error: BaseException) -> int:
    """Return the exit status of `icl.cli` for an error."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return 130
    return error.exit_status if isinstance(error, UserError) else 1


def has_unsent_rows() -> bool:
    """Return whether a W&B run of this process has ended with rows that were not sent."""
    return _has_unsent_rows


def start_wandb(config: RunConfig, folder: RunFolder) -> WandbLog | None:
    """Begin or continue the W&B run for a training run. Return None if W&B is not set up or cannot log even offline."""
    global _is_unreachable
    mode = wandb_mode()
    if mode is None:
        return None
    if os.path.expanduser("~") == "~":  # noqa: PTH111 (`Path` fails here)
        _say("W&B is not used, because it needs a home folder and none is known. Set HOME to use it.")
        return None
    try:
        return WandbLog(_init(config, folder, "offline" if _is_unreachable else mode))
    except Exception as error:  # wandb raises many types of errors; none may stop a run
        _say(f"W&B could not start online ({first_line(error)}); logging offline to {folder.path}/wandb.")
    import wandb

    _is_unreachable = True  # so the other members of a population start offline without waiting
    try:
        wandb.teardown()  # otherwise the failed start would keep the id of the run in use
        return WandbLog(_init(config, folder, "offline"))
    except Exception as error:
        _say(f"W&B could not start offline either ({first_line(error)}), so {folder.path} is not logged to W&B.")
        return None


def _init(config: RunConfig, folder: RunFolder, mode: Mode) -> Any:
    import wandb

    run = wandb.init(
        id=_run_id(folder),
        name=run_name(config),
        project=os.environ.get("WANDB_PROJECT") or "icl",
        config=config.to_dict(),
        dir=str(folder.path),
        mode=mode,
        resume="allow",
        reinit="create_new",  # so that all members of a population can log at the same time
        settings=wandb.Settings(**init_settings()),
    )
    use_steps(run)
    return run


def init_settings() -> dict[str, Any]:
    """Return options of `wandb.Settings`: short timeouts, no output to the terminal, no upload of code."""
    return {
        "init_timeout": _START_SECONDS,
        "login_timeout": 5,
        "console": "off",
        "silent": True,
        "disable_git": True,
        "save_code": False,
    }


def _run_id(folder: RunFolder) -> str:
    """Return the W&B id in the run's folder. Make a new id if there is none, or if the id is unsafe as a part of a path."""
    path = folder.path / "wandb-id"
    run_id = path.read_bytes().strip().decode(errors="replace") if path.is_file() else ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id):
        run_id = os.urandom(6).hex()
        write_atomically(path, run_id.encode())
    return run_id


def _has_login() -> bool:
    """Return whether `.netrc` has a login for W&B's host."""
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    file = os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")  # noqa: PTH111 (`Path` fails without a home)
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def say_failure(error: Exception) -> None:
    """Say that W&B failed, unless the same was said before."""
    sentence = f"W&B failed ({first_line(error)}), so it lacks the rows from here on. Training goes on, and metrics.csv contains every row."
    if sentence not in _said_failures:
        _said_failures.add(sentence)
        _say(sentence)


def _say(sentence: str) -> None:
    print(redact(sentence), file=sys.stderr)
