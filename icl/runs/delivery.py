"""Deliver a run's files to its store: record which files have arrived, and upload files that were made after training.

The file `.delivered` in the run's folder contains the address of the copy and the digests of the files that are known to have
arrived. So `icl` sends each result and figure only once. If a run has ended and has a complete copy, the command that trains the
run does not access the store again.
"""

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence

from icl.config import RunConfig
from icl.config.validation import user_path
from icl.files.reading import ContentError, parse_json, read_bytes
from icl.files.redaction import redact
from icl.files.writing import StorageError, write_atomically
from icl.run_names import run_name
from icl.runs.copied_files import copied_names
from icl.runs.folder import RunFolder
from icl.runs.mirror import open_mirror, store_url, write_card
from icl.runs.transfer import digest_or_none, same_file
from icl.store.base import sha256

_NOTE = ".delivered"
_MADE_LATER = ("results/", "figures/", "report.html")
_MAX_NAMES = 8
_MAX_NOTE = 2**26
"""Largest size in bytes of the file `.delivered`, which has about a hundred bytes for each file of the run."""


class UploadError(StorageError):
    """Raised if files did not reach the store. The message names the files, and the command that sends them."""


def is_delivered(run: RunFolder, config: RunConfig) -> bool:
    """Return whether a run has ended and its copy is complete, according to `.delivered`.

    Only the digest of `status.json` is compared, because training sends this file last.
    """
    status = run.read_status()
    arrived = _read_note(run, config)
    is_done = status is not None and status.is_done
    return is_done and arrived.get("status.json") == sha256(run.status_file.read_bytes())


def note_delivered(run: RunFolder, config: RunConfig, names: Iterable[str]) -> None:
    """Record in `.delivered` that the run's store has the current content of these files."""
    note_digests(run, config, {name: run.store.digest(name) for name in names})


def send_results(run: RunFolder) -> list[str]:
    """Send a run's results, figures and reports to its store, except those that the store already has.

    Return the names of the sent files.

    If the run itself was never sent to a store, nothing is sent.

    Raises:
        UploadError: If the store cannot be used, or has no copy of this run.
    """
    config = run.read_config()
    url = store_url(config)
    if url is None or not (run.path / "run-id").is_file():
        return []
    arrived = _read_note(run, config)
    made = [name for name in copied_names(run.store) if name.startswith(_MADE_LATER)]
    # Each file is read once. If a file is rewritten during the upload, the note below records the digest of the bytes that were sent.
    left = {name: data for name in made if arrived.get(name) != sha256(data := run.store.read(name))}
    digests = {name: sha256(data) for name, data in left.items()}
    if not left:
        return []
    try:
        mirror = open_mirror(run, url, run_name(config))
        if not same_file(mirror.here, mirror.there, "run-id"):
            raise StorageError("the store has no copy of this run")
        sent = [name for name in left if digest_or_none(mirror.there, name) != digests[name]]
        if sent:
            mirror.there.write_many({name: left[name] for name in sent})
            write_card(mirror)
    except StorageError as error:
        raise UploadError(describe_left(run, url, list(left), str(error))) from None
    note_digests(run, config, digests)
    if sent:
        print(f"Uploaded {', '.join(sent)} to {mirror.there}.")
    return sent


def describe_left(run: RunFolder, url: str, left: Sequence[str], reason: str) -> str:
    """Return the message of an `UploadError`."""
    shown = ", ".join(left[:_MAX_NAMES]) + (f" and {len(left) - _MAX_NAMES} more" if len(left) > _MAX_NAMES else "")
    config = run.read_config()
    command = f"icl checkpoints {shlex.quote(str(run.path))} push"
    if store_url(config) != url:
        command += f" --store {shlex.quote(url)}"
    files = f"{len(left)} files" if len(left) > 1 else "1 file"
    return (
        f"{files} of {run.path} did not reach {url.rstrip('/')}/{run_name(config)}: {shown} ({reason.rstrip('.')}). "
        f"Nothing is lost: `{command}` sends the missing files."
    )


def note_digests(run: RunFolder, config: RunConfig, digests: Mapping[str, str]) -> None:
    """Record in `.delivered` that the run's store has files with these digests."""
    note = {"place": _place(config), "files": _read_note(run, config) | dict(digests)}
    write_atomically(run.path / _NOTE, (json.dumps(note, indent=1) + "\n").encode())


def _read_note(run: RunFolder, config: RunConfig) -> dict[str, str]:
    """Return the recorded digests of the files in the run's store. If `.delivered` is about another store, return an empty dict."""
    try:
        note = parse_json(read_bytes(run.path / _NOTE, limit=_MAX_NOTE))
        return dict(note["files"]) if note["place"] == _place(config) else {}
    except (OSError, ContentError, ValueError, TypeError, KeyError):
        return {}


def _place(config: RunConfig) -> str:
    """Return the addresses of the run's copy and of the server. Credentials are removed, because the addresses are saved in a file."""
    url = store_url(config) or ""
    root = url.rstrip("/") if "://" in url else str(user_path(url).resolve())
    names = ("HF_ENDPOINT",) if url.lower().startswith("hf://") else ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    server = redact(next((value for value in map(os.environ.get, names) if value), ""))
    return f"{root}/{run_name(config)} {server}".rstrip()
