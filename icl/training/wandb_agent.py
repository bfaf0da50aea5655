"""A run as a point of a W&B sweep: `wandb agent` starts the program, and `wandb.config` says which point it is.

The settings are resolved without the point first and given to `wandb.init`; what comes back is the point's, under its own
names (`optim.lr`, or `lr` in a section `optim`), and is resolved again in its place between file and command line. The
point's run name comes from the whole configuration, so a point handed out again goes on from its checkpoint, and the rows
it already has are sent to the new W&B run first.
"""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icl.config import RunConfig, flatten
from icl.metrics_file import whole_rows
from icl.presets import run_name
from icl.reading import MAX_YAML, ContentError, parse_yaml, read_bytes
from icl.training.wandb_log import init_settings, sent_step, use_steps
from icl.validation import UserError

STARTED_BY = os.getppid()
"""The agent's process, noted before anything slow: an agent may die while torch is imported."""
_SWEEP_VARIABLE = "WANDB_SWEEP_ID"
_POINT_VARIABLE = "WANDB_SWEEP_PARAM_PATH"
_OWN_KEYS = ("_wandb", "wandb_version")


class SweepError(UserError):
    """A W&B sweep that this run cannot take part in; the message says why."""


def in_sweep(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `wandb agent` started this program, and W&B is not disabled."""
    return bool(environment.get(_SWEEP_VARIABLE)) and environment.get("WANDB_MODE", "").lower() != "disabled"


def join_sweep(base: Mapping[str, Any]) -> Any:
    """Begin the W&B run that the agent announced, with the settings as they are without the point.

    From here on SIGTERM is an interruption that W&B learns of, even before training listens for it.

    Raises:
        SweepError: If W&B cannot be reached or refuses; inside a sweep that ends the run.
    """
    import wandb

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run = wandb.init(config=dict(base), resume="allow", settings=wandb.Settings(**init_settings()))
    except Exception as error:  # wandb raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SweepError(
            f"W&B did not hand over this sweep's point ({reason}); check WANDB_BASE_URL and the login."
        ) from None
    use_steps(run)
    return run


def swept_settings(run: Any, base: RunConfig) -> dict[str, Any]:
    """The point's own settings, by dotted key: what `wandb.config` holds that the run did not bring itself.

    The file that the agent leaves names the swept keys exactly; without it they are the ones whose values differ.
    """
    config = {key: value for key, value in dict(run.config).items() if key not in _OWN_KEYS}
    dotted = {key: value for key, value in config.items() if "." in key}
    values = flatten({key: value for key, value in config.items() if key not in dotted}) | dotted
    names = _announced_names()
    if names is None:
        brought = flatten(base.to_dict())
        names = {key for key, value in values.items() if key in dotted or brought.get(key) != value}
    return {key: values[key] for key in values if key in names}


def describe_run(run: Any, config: RunConfig) -> None:
    """Give the W&B run its name and the whole resolved configuration."""
    run.name = run_name(config)
    names = _announced_names() or set()
    locked = {name.partition(".")[0] for name in names if name not in dict(run.config)}
    tree = config.to_dict()
    run.config.update({key: value for key, value in tree.items() if key not in locked | names}, allow_val_change=True)


def replay(run: Any, metrics_file: Path, until: int) -> None:
    """Send the rows that an earlier W&B run of this point has logged, up to a step; W&B's requeue brings the same run."""
    sent = sent_step(run)
    for row in whole_rows(metrics_file):
        if sent < int(row["step"]) <= until:
            run.log({key: int(value) if key == "step" else float(value) for key, value in row.items() if value})


def _announced_names() -> set[str] | None:
    """The swept keys by the agent's own file, or None if there is none that can be read."""
    path = os.environ.get(_POINT_VARIABLE)
    try:
        content = parse_yaml(read_bytes(Path(path), limit=MAX_YAML)) if path else None
    except (OSError, ContentError):
        return None
    if not isinstance(content, dict):
        return None
    entries = {key: value for key, value in content.items() if key not in _OWN_KEYS}
    tree = {
        key: value["value"] if isinstance(value, dict) and "value" in value else value for key, value in entries.items()
    }
    return set(flatten(tree))
