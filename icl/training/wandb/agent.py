"""Train a run in a W&B sweep, started by `wandb agent`.

A point of a sweep is one combination of the settings that the sweep varies. W&B assigns a point to each run.

First, the settings from the file and the command line are resolved, still without the settings of the point, and are passed to
`wandb.init`. W&B then adds the settings of the point to `wandb.config`, with names such as `optim.lr`, or `lr` in a section `optim`.
Then all settings are resolved again: the point and the command line override the file. A command line that contradicts the point is
refused. The name of the run depends on its whole configuration. So if W&B assigns a point again, the run continues from its last
save. The new W&B run first receives the rows that were logged before.
"""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from icl.config import RunConfig, flatten
from icl.config.validation import UserError
from icl.files.reading import MAX_YAML, ContentError, first_line, parse_yaml, read_bytes
from icl.run_names import run_name
from icl.runs.metrics_file import whole_rows
from icl.signals import defer, deferred, handling
from icl.training.wandb.log import WandbLog, end_run, exit_code_of, init_settings, say_failure, use_steps

PARENT_PROCESS = os.getppid()
"""Process id of the agent. We read the id before slow imports, because the agent may die while torch is imported."""
_SWEEP_VARIABLE = "WANDB_SWEEP_ID"
_POINT_VARIABLE = "WANDB_SWEEP_PARAM_PATH"
_OWN_KEYS = ("_wandb", "wandb_version")


class SweepError(UserError):
    """Raised if this run cannot join its W&B sweep. The message says why."""


def in_sweep(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether `wandb agent` started this program and W&B is not disabled."""
    return bool(environment.get(_SWEEP_VARIABLE)) and environment.get("WANDB_MODE", "").lower() != "disabled"


def work_at_point(read_base: Callable[[], RunConfig], work: Callable[[Any, dict[str, Any]], int]) -> int:
    """Work on the point of the sweep that the agent assigned. Report the exit status to W&B in every case, even after an error.

    Args:
        read_base: Function that resolves all settings except those of the point.
        work: Function that takes the W&B run and the settings of the point. It returns the exit status.

    Raises:
        SweepError: If this run cannot join the sweep.
        UserError: Any error that the two functions raise.
    """
    # If a signal interrupts `wandb.init`, W&B considers the run finished. So signals are handled only after `wandb.init` has
    # returned.
    with handling({signal.SIGTERM: defer, signal.SIGINT: defer}):
        try:
            base = read_base()
        except UserError as error:  # for example, `${args}` passed an invalid value of the point on the command line
            end_run(join_sweep({}), exit_code_of(error))
            raise
        run = join_sweep(base.to_dict())
    # Until training installs its own handlers, a signal raises KeyboardInterrupt, so that the end is reported to W&B.
    interrupt = signal.default_int_handler
    with handling({signal.SIGTERM: interrupt, signal.SIGINT: interrupt}):
        try:
            if deferred:
                deferred.clear()
                raise KeyboardInterrupt
            status = work(run, swept_settings(run, base))
        except BaseException as error:
            end_run(run, exit_code_of(error))
            raise
        end_run(run, status)  # must come last: W&B may at once assign a pre-empted point to another agent
        return status


def join_sweep(base: Mapping[str, Any]) -> Any:
    """Begin the W&B run of this point, and return it.

    Args:
        base: All settings except those of the point.

    Raises:
        SweepError: If W&B cannot be reached or refuses the run. Only W&B knows the settings of the point, so the run cannot continue.
    """
    import wandb

    try:
        run = wandb.init(config=dict(base), resume="allow", settings=wandb.Settings(**init_settings()))
    except Exception as error:  # wandb raises many types of errors
        raise SweepError(
            f"W&B did not return the settings of this sweep's point ({first_line(error)}). Check WANDB_BASE_URL and the login."
        ) from None
    use_steps(run)
    return run


def swept_settings(run: Any, base: RunConfig) -> dict[str, Any]:
    """Return the settings of the point, keyed by dotted name such as `optim.lr`.

    The agent writes the swept keys to a file. Without that file, the settings of the point are those in `wandb.config`
    that differ from the base settings.
    """
    config = {key: value for key, value in dict(run.config).items() if key not in _OWN_KEYS}
    dotted = {key: value for key, value in config.items() if "." in key}
    values = flatten({key: value for key, value in config.items() if key not in dotted}) | dotted
    names = _swept_names()
    if names is None:
        base_values = flatten(base.to_dict())
        names = {key for key, value in values.items() if key in dotted or base_values.get(key) != value}
    return {key: values[key] for key in values if key in names}


def describe_run(run: Any, config: RunConfig, *, suffix: str = "") -> None:
    """Set the name and the configuration of the W&B run, without the swept keys, which W&B locks.

    If W&B fails, only print a message.
    """
    try:
        run.name = run_name(config) + suffix
        names = _swept_names() or set()
        locked = names | {name.partition(".")[0] for name in names if name not in dict(run.config)}
        settings = {key: value for key, value in config.to_dict().items() if key not in locked}
        run.config.update(settings, allow_val_change=True)
    except Exception as error:  # wandb raises many types of errors
        say_failure(error)


def replay(run: Any, metrics_file: Path, until: int) -> None:
    """Send the rows of earlier W&B runs of this point up to the step `until`, except rows that this W&B run already has.

    If W&B fails, only print a message.
    """
    log = WandbLog(run, is_lent=True)
    for row in whole_rows(metrics_file):
        if int(row["step"]) <= until:
            log.log({key: int(value) if key == "step" else float(value) for key, value in row.items() if value})


def _swept_names() -> set[str] | None:
    """Return the swept keys from the agent's file; None if the file is missing or cannot be read."""
    path = os.environ.get(_POINT_VARIABLE)
    try:
        content = parse_yaml(read_bytes(Path(path), limit=MAX_YAML)) if path else None
    except (OSError, ContentError):
        return None
    if not isinstance(content, dict):
        return None
    tree = {
        key: value["value"] if isinstance(value, dict) and "value" in value else value
        for key, value in content.items()
        if key not in _OWN_KEYS
    }
    return set(flatten(tree))
