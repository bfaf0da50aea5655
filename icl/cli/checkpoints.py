"""`icl checkpoints`: list, fetch, send or verify the files of a run, here and in its store."""

from pathlib import Path
from typing import TYPE_CHECKING

from icl.command_line import CommandParser
from icl.config import RunConfig
from icl.config.validation import ConfigError, require_run_name, require_store
from icl.files.writing import StorageError
from icl.run_names import run_name
from icl.runs.folder import RunError, RunFolder, local_root, name_of

if TYPE_CHECKING:
    from icl.runs.mirror import Mirror

HELP = "list, fetch, send or verify a run's saved steps, here and in its store"


def run(words: list[str]) -> int:
    """List, fetch, send or verify the files of a run."""
    parser = CommandParser(
        "checkpoints",
        "ls      List the saved steps, here and in the store.\n"
        "pull    Fetch the files that are missing here or differ from those in the store. After an interruption, run the same\n"
        "        command again to continue.\n"
        "push    Send the files that are missing in the store or differ from those here.\n"
        "verify  Check the files here and in the store. Checkpoints, Adam's moments, last.ckpt and previous.ckpt must have the\n"
        "        right digests. No scheduled step and no row of metrics.csv may be missing. config.yaml and status.json must agree\n"
        "        with the other files. Results and figures must be readable.",
        "icl checkpoints runs/quickstart verify",
    )
    parser.add("run RUN", "a run's folder, or its name")
    parser.add_argument("action", choices=("ls", "pull", "push", "verify"), help="what to do (see above)")
    text = "the store: a folder, s3://bucket/prefix or hf://USER/REPO (default: the run's `checkpoints.store`, or s3://$AWS_BUCKET_NAME)"
    parser.add("--store URL", text)
    parser.add(
        "--force",
        "for pull and push: copy every file, even if the source is at an earlier step than the target",
    )
    options = parser.parse_args(words)
    if options.force and options.action not in ("pull", "push"):
        raise ConfigError(f"`--force` works only with pull and push, not with {options.action}; leave out `--force`.")
    folder, mirror = _find(options.run, options.store, options.action)
    if options.action == "ls":
        return _list(folder, mirror)
    if options.action == "verify":
        return _verify(folder, mirror)
    if mirror is None:
        raise ConfigError(
            f"The run {folder.path} has no store; name one with --store URL, checkpoints.store or AWS_BUCKET_NAME."
        )
    from icl.runs.mirror import pull, push

    if options.action == "push":
        names = push(mirror, force=options.force)
        print(f"Sent {len(names):,} files of {mirror.run.path}.\nStore   {mirror.there}")
        return 0
    with mirror.run.lock():
        names = pull(mirror, force=options.force)
    print(f"Fetched {len(names):,} files from {mirror.there}.\nRun     {mirror.run.path}")
    return 0


def _find(word: str, store: str | None, action: str) -> "tuple[RunFolder, Mirror | None]":
    """Return the run's folder and the run's copy in the store. The folder may not exist yet. The copy is None if the run has no store."""
    from icl.runs.mirror import open_mirror, read_config, store_url

    if store is not None:
        require_store(store, "--store")
    is_folder = (Path(word) / "config.yaml").is_file()
    if not is_folder:
        _require_name(word)
    folder = RunFolder(word if is_folder else local_root() / name_of(word))
    config = folder.read_config() if folder.config_file.exists() else None
    url = store or store_url(config or RunConfig())
    # A run with a status but no settings has lost its settings. `verify` reports this itself, so we raise no error here.
    is_lost = action == "verify" and folder.status_file.is_file()
    if url is None and config is None and not is_lost:
        raise ConfigError(
            f"There is no run {folder.path}, and no store in which to look for it; `icl runs` lists the runs here."
        )
    name = run_name(config) if config else name_of(word)
    mirror = open_mirror(folder, url, name, make=action == "push") if url else None
    if config is None and not is_lost and mirror is not None and read_config(mirror.there) is None:
        raise RunError(f"There is no run {folder.path}, and none at {mirror.there}; `icl runs` lists the runs here.")
    return folder, mirror


def _require_name(word: str) -> None:
    """Refuse a word that is not a valid name of a run.

    Raises:
        RunError: If the word is not a valid name.
    """
    try:
        require_run_name(name_of(word))
    except ConfigError:
        raise RunError(
            f"There is no run {word}, and a run in {local_root()} cannot have such a name; `icl runs` lists the runs here."
        ) from None


def _list(folder: RunFolder, mirror: "Mirror | None") -> int:
    """Print a line for every saved step."""
    from icl.runs.checkpoints import list_steps

    steps_here = set(list_steps(folder.checkpoints))
    steps_there = set(list_steps(mirror.checkpoints)) if mirror else set()
    print(f"here   {folder.path}\nstore  {mirror.there if mirror else 'none'}\n")
    for step in sorted(steps_here | steps_there):
        here, there = "here" if step in steps_here else "-", "store" if step in steps_there else "-"
        print(f"step {step:>12,}  {here:5s} {there}")
    print(f"{len(steps_here | steps_there):,} steps: {len(steps_here):,} here, {len(steps_there):,} in the store.")
    return 0


def _verify(folder: RunFolder, mirror: "Mirror | None") -> int:
    from icl.runs.resume_file import NAMES
    from icl.runs.verification import find_damage

    damage = find_damage(folder, mirror)
    places = f"{folder.path} and {mirror.there}" if mirror else f"{folder.path}; it has no store"
    if damage:
        print("\n".join(damage))
        count = f"{len(damage)} faults" if len(damage) > 1 else "1 fault"
        if mirror is None:
            again = f"To train the run again from step 0, delete its {', '.join(NAMES)} and status.json, and run the same `icl train`"
            if (folder.path / "imported.json").is_file():
                again = "To repair the run, delete its folder and import the run again with `icl import`"
            raise StorageError(
                f"{count} in {folder.path}, which has no store to fetch from. The intact files can still be used. {again}."
            )
        repair = (
            "`push --force` repairs the store from the files here, `pull --force` repairs the files here from the store"
        )
        raise StorageError(f"{count} in {places}; {repair}.")
    print(f"There are no faults in {places}.")
    return 0
