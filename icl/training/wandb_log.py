"""Weights & Biases, where the user has it set up; training never depends on it.

It is used with `WANDB_MODE=online|offline`, an API key in the environment, or a login in `.netrc`; `WANDB_MODE=disabled` wins over
all. A start that fails falls back to offline in one sentence; a network that fails later costs at most a minute at the end.
One run has one id, kept in its folder, so that a resumed run goes on in the same W&B run. The only step axis is `step`.
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
from icl.presets import run_name
from icl.redaction import redact
from icl.runs import RunFolder
from icl.storage import write_atomically
from icl.validation import ConfigError, UserError

Mode = Literal["online", "offline"]

_START_SECONDS = 10
_FINISH_SECONDS = 60

_MODES = ("", "online", "offline", "disabled", "dryrun", "run", "shared")

_has_unsent_rows = False
_is_out_of_reach = False
_ended: weakref.WeakSet = weakref.WeakSet()
"""The W&B runs of this process that are over."""


def wandb_mode() -> Mode | None:
    """Return how the user wants W&B, or None for not at all.

    Raises:
        ConfigError: If $WANDB_MODE is no mode of W&B.
    """
    mode = os.environ.get("WANDB_MODE", "").strip().lower()
    if mode not in _MODES:
        raise ConfigError(f"`WANDB_MODE` must be online, offline or disabled, got {mode!r}.")
    if mode in ("disabled", "dryrun"):
        return None if mode == "disabled" else "offline"
    if mode == "offline":
        return "offline"
    return "online" if mode == "online" or os.environ.get("WANDB_API_KEY") or _has_login() else None


class WandbLog:
    """One W&B run: takes the rows of `metrics.csv`, except those that it has.

    A run that died is resumed from its last checkpoint, and comes again through steps whose rows W&B took before.

    Args:
        run: The run.
        is_lent: Whether whoever began it will end it.
    """

    def __init__(self, run: Any, *, is_lent: bool = False) -> None:
        self.run, self.is_lent = run, is_lent
        self.sent = sent_step(run)

    def log(self, row: Mapping[str, int | float]) -> None:
        """One row."""
        if row["step"] > self.sent:
            self.run.log(row)

    def finish(self, exit_code: int) -> None:
        """End the W&B run with the program's exit code, unless it is only lent."""
        if not self.is_lent:
            end_run(self.run, exit_code)


def sent_step(run: Any) -> int:
    """The step of the last row that W&B has of a run; -1 if it has none."""
    step = run.summary.get("step")
    return -1 if step is None else int(step)


def use_steps(run: Any) -> None:
    """Make `step` the only axis of a W&B run."""
    run.define_metric("step")
    run.define_metric("*", step_metric="step")


def end_run(run: Any, exit_code: int) -> None:
    """End a W&B run, unless it is over, with the program's exit code: above 128 was pre-empted, and may be handed out again.

    What is not sent within a minute is left behind, and a sentence says where. W&B would go on trying for days
    when the program ends, so `icl.cli` then leaves without its leave (`has_unsent_rows`).
    """
    global _has_unsent_rows
    if run in _ended:
        return
    _ended.add(run)
    if exit_code > 128:
        run.mark_preempting()
    thread = threading.Thread(target=run.finish, kwargs={"exit_code": exit_code}, daemon=True)
    thread.start()
    thread.join(_FINISH_SECONDS)
    if thread.is_alive():
        _has_unsent_rows = True
        folder = Path(run.dir).parent
        _say(f"W&B did not take everything within {_FINISH_SECONDS} s; `wandb sync {folder}` sends the rest.")


def exit_code_of(error: BaseException) -> int:
    """The status with which `icl.cli` ends on an error."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return 130
    return error.exit_status if isinstance(error, UserError) else 1


def has_unsent_rows() -> bool:
    """Whether a W&B run of this process ended with rows that were not sent."""
    return _has_unsent_rows


def start_wandb(config: RunConfig, folder: RunFolder) -> WandbLog | None:
    """Begin or take up the W&B run of a run, or None if the user has no W&B."""
    global _is_out_of_reach
    mode = wandb_mode()
    if mode is None:
        return None
    if os.path.expanduser("~") == "~":  # noqa: PTH111 (`Path` fails here)
        _say("W&B is left out, because it needs a home folder and none is known; set HOME to have it.")
        return None
    try:
        return WandbLog(_init(config, folder, "offline" if _is_out_of_reach else mode))
    except Exception as error:  # wandb raises many kinds; none may stop a run
        _say(f"W&B could not start online ({_first_line(error)}); logging offline to {folder.path}/wandb.")
    import wandb

    _is_out_of_reach = True  # the other members of a population need not wait for it
    try:
        wandb.teardown()  # forget the failed start, which still holds the run's id
        return WandbLog(_init(config, folder, "offline"))
    except Exception as error:
        _say(f"W&B could not start offline either ({_first_line(error)}), so {folder.path} is not logged there.")
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
        reinit="create_new",  # the members of a population log side by side
        settings=wandb.Settings(**init_settings()),
    )
    use_steps(run)
    return run


def init_settings() -> dict[str, Any]:
    """What `wandb.Settings` gets: fail soon, leave the terminal alone, send no code."""
    return {
        "init_timeout": _START_SECONDS,
        "login_timeout": 5,
        "console": "off",
        "silent": True,
        "disable_git": True,
        "save_code": False,
    }


def _run_id(folder: RunFolder) -> str:
    """Return the run's id, made once; one that came with a copied run and is no plain word is replaced."""
    path = folder.path / "wandb-id"
    known = path.read_bytes().strip().decode(errors="replace") if path.is_file() else ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):  # it becomes part of a path
        known = os.urandom(6).hex()
        write_atomically(path, known.encode())
    return known


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _has_login() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    file = os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")  # noqa: PTH111 (`Path` fails where there is no home)
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _say(sentence: str) -> None:
    print(redact(sentence), file=sys.stderr)
