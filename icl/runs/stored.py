"""Load a checkpoint directly from a store, such as `hf://USER/REPO`, without fetching the run."""

import re

from icl.config.validation import require_store
from icl.files.writing import StorageError
from icl.runs.checkpoints import Checkpoint, CheckpointError, checkpoint_name, list_steps, load_step, parse_checkpoint
from icl.store.base import MissingKeyError, require_key
from icl.store.opening import open_store

_FILE = re.compile(r"(?:(.*)/)?checkpoints/step-\d{9,}\.safetensors")


def load_stored_checkpoint(url: str, step: int | None = None) -> tuple[Checkpoint, str]:
    """Return a checkpoint in a store, and its address.

    Args:
        url: Address of a checkpoint, of a run, or of a store with one run.
        step: The step; None means the last one.

    Raises:
        CheckpointError: If there is no such checkpoint, if it is damaged, or if the store has several runs.
        StorageError: If the store cannot be used.
    """
    require_store(url, "path")
    folder, _, name = url.rstrip("/").rpartition("/")
    if name.endswith(".safetensors"):
        store = open_store(folder)
        try:
            checkpoint = parse_checkpoint(store.read(name), url)
        except MissingKeyError:
            raise CheckpointError(
                f"There is no checkpoint {url}; check the address and the step in the file's name."
            ) from None
        if step not in (None, checkpoint.step):
            raise CheckpointError(
                f"{url} is the checkpoint of step {checkpoint.step:,}, not {step:,}; leave out the step, or give the address of the run."
            )
        return checkpoint, url
    store = open_store(url)
    matches = [match for match in map(_FILE.fullmatch, store.keys()) if match]
    for match in matches:
        require_key(match[0], store)
    runs = sorted({match[1] or "" for match in matches})
    if not runs:
        raise CheckpointError(
            f"There are no checkpoints at {store}. Check the address; a private store needs its owner's token or keys. "
            "To send a run there, use `icl checkpoints RUN push --store URL`."
        )
    if len(runs) > 1:
        raise CheckpointError(
            f"{store} has {len(runs):,} runs: {', '.join(runs[:8])}. Add the name of one run to the address, such as {store}/{runs[0]}."
        )
    address = f"{store}/{runs[0]}".rstrip("/")
    checkpoints = open_store(f"{address}/checkpoints")
    steps = list_steps(checkpoints)
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(
            f"{address} has no checkpoint of step {chosen:,}; it has {len(steps):,} steps from {steps[0]:,} to {steps[-1]:,}."
        )
    try:
        return load_step(checkpoints, chosen), f"{address}/checkpoints/{checkpoint_name(chosen)}"
    except MissingKeyError as error:
        raise StorageError(f"{error} It was removed while we read it; run the same command again.") from None
