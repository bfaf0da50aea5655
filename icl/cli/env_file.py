"""Read the file `.env` of the working folder, and decide which variables it may set.

A folder that comes from somebody else may contain such a file. So only the variables of a fixed list and most variables of
W&B are set. None of these variables names a program or a configuration file, or changes how programs are loaded. All other
variables in the file are ignored, and a message names them. They are not an error, because other programs may need them.
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
"""W&B variables that `.env` may not set: they name a file, a program or a configuration, reroute W&B's traffic, or are set
by W&B's agent."""


def load_env_file(path: Path = Path(".env")) -> None:
    """Set the allowed variables of a `.env` file. Variables that are already in the environment keep their values.

    Raises:
        ConfigError: If the file is too large or not text in UTF-8, or if a value contains a null character.
    """
    if not path.is_file():
        return
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(
            f"{path.absolute()} has {path.stat().st_size:,} bytes, but at most {_MAX_BYTES:,} are read; remove or shorten it."
        )
    from dotenv.main import DotEnv

    try:
        # If the file uses `${NAME}`, the environment takes precedence over the file, as it does for NAME itself.
        variables = DotEnv(path, encoding="utf-8-sig", override=False).dict()
    except UnicodeDecodeError:
        raise ConfigError(
            f"{path.absolute()} is not text in UTF-8, so it was not read; save it as UTF-8, or remove it."
        ) from None
    for name, value in variables.items():
        if value is None or name in os.environ or not may_be_set(name):
            continue
        if "\0" in value:
            raise ConfigError(f"{path.absolute()} sets {name} to a value with a null character; write the value again.")
        os.environ[name] = re.sub(r"^\$HOME(?=/|$)", "~", value) if name == "LOCAL_ROOT" else value
    ignored = [name for name, value in variables.items() if value is not None and not may_be_set(name)]
    if ignored:
        names = ", ".join(map(_shown, ignored[:8])) + (f" and {len(ignored) - 8} more" if len(ignored) > 8 else "")
        print(
            f"icl: {path} sets {names}, which `icl` ignores in this file; to set a variable anyway, export it in the shell.",
            file=sys.stderr,
        )


def may_be_set(name: str) -> bool:
    """Return whether `.env` may set a variable of this name."""
    return name in _NAMES or bool(_WANDB.fullmatch(name) and not _NOT_OF_WANDB.fullmatch(name))


def _shown(name: str) -> str:
    return name if re.fullmatch(r"\w{1,64}", name) else repr(name[:64])
