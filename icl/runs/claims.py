"""Ownership of a run's copy in a store.

The file `run-id` contains a run's id and settings. The id is drawn at random once, in the folder where the run begins. A copy belongs
to the folder with the same id. A folder with another id cannot use the copy, even if the settings are the same.

A new folder has no id yet. If its run has the same settings as the copy, the folder takes over the copy and the copy's id. This
happens when a run is resumed on another machine. This works even if the first machine was lost before `config.yaml` arrived in the
store, because `run-id` contains the settings too.

A `run-id` is never replaced. So if two machines claim a copy at the same moment, they agree on the id and compute the same run.
"""

import secrets

import yaml

from icl.config import RunConfig, config_differences
from icl.config.validation import UserError
from icl.runs.checkpoints import list_steps, load_step
from icl.runs.folder import RunError, parse_config
from icl.store.base import Store, read_or_none
from icl.store.opening import open_store


def claim(here: Store, there: Store, config: RunConfig) -> None:
    """Claim the copy of a run in a store, so that the copy belongs to the run's folder.

    If the copy already belongs to the run's folder, nothing is changed.

    Args:
        here: The run's folder.
        there: The folder of the copy in the store. This folder may be empty.
        config: The run's settings.

    Raises:
        RunError: If the copy belongs to another run.
        StorageError: If the store or the folder cannot be used.
    """
    kept = read_or_none(here, "run-id")
    offered = kept or _new_id(config)
    owner = read_or_none(there, "run-id")
    if owner is None and there.create("run-id", offered):
        owner = offered
    owner = owner or read_or_none(there, "run-id") or b""
    if owner != offered:
        # The copy has no config.yaml if its run has just begun, or if the machine of that run was lost before config.yaml arrived.
        is_begun = read_or_none(there, "config.yaml") is None
        if not is_begun or kept is not None or not _is_of(there, owner, config):
            raise RunError(_describe_owner(there, is_begun))
    if kept is None:
        here.write("run-id", owner)


def _new_id(config: RunConfig) -> bytes:
    """Return the content of `run-id` for a new run: a line with a random id, and the settings below it."""
    settings = yaml.safe_dump(config.to_dict(), sort_keys=False)
    return f"{secrets.token_hex(8)}\n{settings}".encode()


def _is_of(there: Store, owner: bytes, config: RunConfig) -> bool:
    """Return whether a copy belongs to a run with these settings. `owner` is the content of the copy's `run-id`.

    A `run-id` that version 0.1.0 wrote contains no settings. The settings are then read from the first checkpoint.
    """
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
            f"{there} contains another run of that name, so nothing was copied to it; "
            "give this run another --run_name, or another --checkpoints.store."
        )
    return (
        f"{there} was taken by another run of that name, which has not saved anything yet. Give this run another "
        f"--run_name. If the machine of that run was lost, delete {there}/run-id and run the same command again."
    )
