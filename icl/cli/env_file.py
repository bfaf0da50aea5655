"""`.env` of the working folder: which variables it may set, and how they are read.

A folder that comes from somebody else may hold such a file, so only a closed list of names counts. None of them names a
file that is run or configures a program, or changes how programs are loaded. Whatever else stands there is left out, with a
line that says so: other programs may need it, so it is no error.
"""

import os
import re
import sys
from pathlib import Path

from icl.config.validation import ConfigError

_NAMES = frozenset(
    (
        *("LOCAL_ROOT", "DEVICE", "OMP_NUM_THREADS", "HF_TOKEN", "HF_ENDPOINT", "AWS_BUCKET_NAME"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
        *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    )
)
_MAX_BYTES = 2**20
_WANDB = re.compile(r"WANDB_[A-Z0-9][A-Z0-9_]*")
_NOT_OF_WANDB = re.compile(
    r"WANDB_(X_.*|.*(CONFIG|SETTINGS|LAUNCH|DOCKER|SERVICE|PROXY|PROXIES|SSL|HEADERS|JUPYTER|NOTEBOOK|SWEEP).*"
    r"|.*(FILE|PATHS?|ROOT|EXECUTABLE|PROGRAM|ARGS|(?<!DISABLE_)CODE|CODE_DIR))"
)
"""Variables of W&B that name a file, a program or a configuration, that reroute its traffic, or that its agent sets."""


def load_env_file(path: Path = Path(".env")) -> None:
    """Set the variables of a `.env` file that may be set there; what the environment has already stays.

    Raises:
        ConfigError: If the file is too large or not text in UTF-8, or a value cannot be a variable's.
    """
    if not path.is_file():
        return
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(
            f"{path.absolute()} has {path.stat().st_size:,} bytes, and at most {_MAX_BYTES:,} are read; remove or shorten it."
        )
    from dotenv.main import DotEnv

    try:
        # Of the two values of a `${NAME}`, that of the environment counts, as it does for NAME itself.
        variables = DotEnv(path, encoding="utf-8-sig", override=False).dict()
    except UnicodeDecodeError:
        raise ConfigError(
            f"{path.absolute()} is not text in UTF-8, so nothing of it was read; save it as UTF-8, or remove it."
        ) from None
    for name, value in variables.items():
        if value is None or name in os.environ or not may_be_set(name):
            continue
        if "\0" in value:
            raise ConfigError(f"{path.absolute()} sets {name} to a text with a null character; write the value again.")
        os.environ[name] = re.sub(r"^\$HOME(?=/|$)", "~", value) if name == "LOCAL_ROOT" else value
    ignored = [name for name, value in variables.items() if value is not None and not may_be_set(name)]
    if ignored:
        names = ", ".join(map(_shown, ignored[:8])) + (f" and {len(ignored) - 8} more" if len(ignored) > 8 else "")
        print(
            f"icl: {path} sets {names}, which icl does not take from that file; export it in the shell if it is meant.",
            file=sys.stderr,
        )


def may_be_set(name: str) -> bool:
    """Return whether `.env` may set a variable of this name."""
    return name in _NAMES or bool(_WANDB.fullmatch(name) and not _NOT_OF_WANDB.fullmatch(name))


def _shown(name: str) -> str:
    return name if re.fullmatch(r"\w{1,64}", name) else repr(name[:64])
