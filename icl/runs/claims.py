"""Ownership of a run's place in a store.

`run-id` is drawn once, in the folder that the run began in. A copy belongs to the folder with the same id; any other run of
that name is refused, whatever its settings. A folder without a run that asks for the same settings takes the copy over, id
included: it is the same run, resumed elsewhere. `run-id` holds the settings too. So a place whose machine was lost before
`config.yaml` arrived is taken over in the same way. Nobody ever replaces a `run-id`, so two machines that take one place at
once agree on it; they compute the same run.
"""

import secrets

import yaml

from icl.config import RunConfig
from icl.config.validation import UserError
from icl.runs.checkpoints import list_steps, load_step
from icl.runs.folder import RunError, config_differences, parse_config
from icl.store.base import Store, read_or_none
from icl.store.opening import open_store


def claim(here: Store, there: Store, config: RunConfig) -> None:
    """Make the place in the store this run's own, or find that it is.

    Args:
        here: The run's folder.
        there: The place.
        config: The run's settings.

    Raises:
        RunError: If it belongs to another run.
        StorageError: If the store or the folder cannot be used.
    """
    kept = read_or_none(here, "run-id")
    offered = kept or _new_id(config)
    owner = read_or_none(there, "run-id")
    if owner is None and there.create("run-id", offered):
        owner = offered
    owner = owner or read_or_none(there, "run-id") or b""
    if owner != offered:
        is_begun = read_or_none(there, "config.yaml") is None  # and no more: its machine is just starting, or was lost
        if not is_begun or kept is not None or not _is_of(there, owner, config):
            raise RunError(_describe_owner(there, is_begun))
    if kept is None:
        here.write("run-id", owner)


def _new_id(config: RunConfig) -> bytes:
    """Return a new run's id: a random word, and below it the settings."""
    settings = yaml.safe_dump(config.to_dict(), sort_keys=False)
    return f"{secrets.token_hex(8)}\n{settings}".encode()


def _is_of(there: Store, owner: bytes, config: RunConfig) -> bool:
    """Return whether the run whose id is in a store has these settings. 0.1.0 wrote settings into checkpoints only."""
    settings = owner.partition(b"\n")[2]
    checkpoints = open_store(f"{there}/checkpoints")
    try:
        if settings:
            return not config_differences(parse_config(settings, str(there)), config)
        steps = list_steps(checkpoints)
        return bool(steps) and not config_differences(load_step(checkpoints, steps[0]).config, config)
    except UserError:
        return False


def _describe_owner(there: Store, is_begun: bool) -> str:
    if not is_begun:
        return (
            f"{there} holds another run of that name, and nothing was copied over it; "
            "give this one another --run_name, or another --checkpoints.store."
        )
    return (
        f"{there} was taken by another run of that name, of which nothing can be resumed yet. Give this one another "
        f"--run_name; or, if that run's machine was lost, delete {there}/run-id and run the same command again."
    )
