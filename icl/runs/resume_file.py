"""The files from which a run resumes: `last.ckpt` from the last save, and `previous.ckpt` from the save before it.

Each file is a zip file that `torch.save` writes. We add a zip comment with the SHA-256 of all other bytes. So even a single altered
byte is detected, while torch and older versions of `icl` can still read the file. Files of version 0.1.0 have no such comment. For a
file without this comment, we check the checksums that a zip file contains for its parts.

A resume file may come from a folder or bucket of unknown origin. So we refuse a file that could need much more memory than it has
bytes (`icl.files.torch_files`).
"""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from icl.config import RunConfig
from icl.files.reading import ContentError, first_line, read_bytes
from icl.files.torch_files import parse_torch_file, require_uncompressed
from icl.runs.folder import RunError, RunFolder

_SEAL = b"icl-sha256:"
_END, _NUM_END_BYTES = b"PK\x05\x06", 22
_NUM_SEAL_BYTES = len(_SEAL) + 64
NAMES = ("last.ckpt", "previous.ckpt")
MAX_FILE = 2**34
"""Largest size of a resume file in bytes."""


class ResumeFileError(RunError):
    """Raised if a resume file cannot be used. The message says why."""


class Resume(NamedTuple):
    """The content of an undamaged resume file."""

    step: int
    config: RunConfig
    member: dict[str, Any]
    """The state of the run, as `icl.training.members.Member.state_dict` returned it."""
    data: bytes
    """The whole file."""


def pack(content: dict[str, Any]) -> bytes:
    """Return the bytes of a resume file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    if data[-_NUM_END_BYTES:][:4] != _END or data[-2:] != b"\0\0":
        raise RuntimeError(
            "torch.save did not write an ordinary zip archive, so the state cannot be saved. Use another version of torch."
        )
    sealed = data[:-2] + _NUM_SEAL_BYTES.to_bytes(2, "little") + _SEAL
    return sealed + hashlib.sha256(sealed).hexdigest().encode()


def unpack(data: bytes, name: str) -> dict[str, Any]:
    """Return the content of a resume file.

    Args:
        data: The whole file.
        name: Name of the file in error messages.

    Raises:
        ResumeFileError: If the file is damaged, too large, or could need much more memory than it has bytes.
    """
    if len(data) > MAX_FILE:
        raise ResumeFileError(f"{name} cannot be used: it has {len(data):,} bytes, and the limit is {MAX_FILE:,}.")
    try:
        require_uncompressed(data)
        _require_sealed(data, name)
        content = parse_torch_file(data)
    except ContentError as error:
        reason = str(error)
        sentence = "is damaged or was cut short" if reason.startswith("it is damaged") else f"cannot be used: {reason}"
        raise ResumeFileError(f"{name} {sentence}.") from None
    except ResumeFileError:
        raise
    except Exception as error:  # torch raises many kinds of errors for a damaged file
        raise ResumeFileError(f"{name} is damaged: it cannot be read ({type(error).__name__}).") from None
    if not isinstance(content, dict):
        raise ResumeFileError(f"{name} is damaged: it contains no training state.")
    return content


def parse_resume(data: bytes, name: str) -> Resume:
    """Return the step, the settings and the state of the run in a resume file.

    Raises:
        ResumeFileError: If the file is damaged, or is not a resume file.
    """
    content = unpack(data, name)
    try:
        step, config, member = int(content["global_step"]), content["configs"][0], dict(content["members"][0])
        if not isinstance(content["state_dict"], dict):
            raise TypeError("state_dict")
        return Resume(step, RunConfig.from_dict(config), member, data)
    except Exception as error:  # a damaged file may contain anything in place of these values
        raise ResumeFileError(f"{name} is damaged: {type(error).__name__}, {first_line(error)}.") from None


def read_resume(run: RunFolder) -> tuple[Resume | None, str | None]:
    """Read the newest undamaged resume file of a run.

    Returns:
        Two values. The first is the content of the file, or None if the run has no resume file. The second is a message if `last.ckpt`
        could not be used, else None.

    Raises:
        ResumeFileError: If the run has resume files, but all of them are damaged.
    """
    problems: list[str] = []
    files = (run.resume_file, run.previous_file)
    for file in files:
        resume = _read(file)
        if isinstance(resume, Resume) and problems:
            reason = problems[0].rstrip(".")
            return resume, f"{reason}; the run continues from an earlier save, at step {resume.step:,}."
        if isinstance(resume, Resume):
            return resume, None
        problems.append(resume)
    if not any(file.exists() for file in files):
        return None, None
    raise ResumeFileError(
        f"{' '.join(problems)} So the run cannot be resumed. If the run has a store, fetch its copy with `icl checkpoints {run.path} "
        f"pull --force`. Otherwise, delete {' and '.join(NAMES)} in its folder to train again from step 0; the saved checkpoints stay."
    )


def _read(file: Path) -> Resume | str:
    """Return the content of a resume file, or a sentence that says what is wrong with it."""
    try:
        return parse_resume(read_bytes(file, limit=MAX_FILE), str(file))
    except ContentError as error:
        return f"{file} cannot be read: {error}."
    except FileNotFoundError:
        return f"There is no {file}."
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}."
    except ResumeFileError as error:
        return str(error)


def _require_sealed(data: bytes, name: str) -> None:
    body, digest = data[:-64], data[-64:]
    if body.endswith(_SEAL):
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise ResumeFileError(f"{name} is damaged: its bytes do not match their digest.")
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            is_whole = parts.testzip() is None and parts.comment == b""
    except Exception:  # zipfile raises many kinds of errors for a damaged file
        is_whole = False
    if not is_whole:
        raise ResumeFileError(f"{name} is damaged or was cut short.")
