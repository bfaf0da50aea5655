"""Read the file `.env` of the working folder, and decide which variables it may set.

A folder that comes from somebody else may contain such a file. So only the variables of a fixed list and most variables of
W&B are set. None of these variables names a program or a configuration file, or changes how programs are loaded. All other
variables in the file are ignored, and a message names them. They are not an error, because other programs may need them.

The file cannot send the user's secrets to a server of its choice. `${NAME}` in a value stands for a variable of the same file, never for
a variable of the environment. The address of a server is ignored if `icl` would use a key at this server that is not from the file.
"""

import io
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from icl.config.validation import ConfigError
from icl.files.reading import ContentError, read_bytes

_NAMES = frozenset(
    (
        *("LOCAL_ROOT", "DEVICE", "OMP_NUM_THREADS", "HF_TOKEN", "HF_ENDPOINT", "AWS_BUCKET_NAME"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
        *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    )
)
_ENDPOINTS = {
    "WANDB_BASE_URL": ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"),
    "HF_ENDPOINT": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"),
    "AWS_ENDPOINT_URL": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    "AWS_ENDPOINT_URL_S3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
}
"""Variables with the address of a server, each with the variables of the credentials that are used at this server."""
_AWS_KEY = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_MAX_BYTES = 2**20
_MAX_REFERENCES = 100
"""Largest number of `${NAME}` in a value."""
_MANY_SPACES = re.compile(r"[^\S\n]{200}")
"""Pattern of 200 spaces in a row. We refuse such a file, because python-dotenv's time grows with the square of this number."""
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
        ConfigError: If the file is too large, cannot be read or is not text in UTF-8, or if a value contains a null character, is too
            long, or refers to a variable that the file does not set.
    """
    if not path.is_file():
        return
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(
            f"{path.absolute()} has {path.stat().st_size:,} bytes, but at most {_MAX_BYTES:,} are read; remove or shorten it."
        )
    variables = _read_variables(path)
    new = {name: value for name, value in variables.items() if may_be_set(name) and name not in os.environ}
    diverted = [name for name in _ENDPOINTS if name in new and _would_use_key(name, variables)]
    for name, value in new.items():
        if name in diverted:
            continue
        if "\0" in value:
            raise ConfigError(f"{path.absolute()} sets {name} to a value with a null character; write the value again.")
        os.environ[name] = re.sub(r"^\$HOME(?=/|$)", "~", value) if name == "LOCAL_ROOT" else value
    for name in diverted:
        print(
            f"icl: {path} sets {name}. `icl` ignores this address, because it would use a key there that is not from this file; "
            f"if you trust the address, export {name} in the shell.",
            file=sys.stderr,
        )
    ignored = [name for name in variables if not may_be_set(name)]
    if ignored:
        names = ", ".join(map(_shown, ignored[:8])) + (f" and {len(ignored) - 8} more" if len(ignored) > 8 else "")
        print(
            f"icl: {path} sets {names}, which `icl` ignores in this file; to set a variable anyway, export it in the shell.",
            file=sys.stderr,
        )


def may_be_set(name: str) -> bool:
    """Return whether `.env` may set a variable of this name."""
    return name in _NAMES or bool(_WANDB.fullmatch(name) and not _NOT_OF_WANDB.fullmatch(name))


def _read_variables(path: Path) -> dict[str, str]:
    """Return the variables of the file, with values in place of `${NAME}`. Variables without a value are left out."""
    from dotenv.main import DotEnv
    from dotenv.variables import Variable, parse_variables

    variables: dict[str, str] = {}
    known = {"HOME": os.environ.get("HOME", "~")}  # the home folder is no secret
    left = _MAX_BYTES
    for name, value in DotEnv(None, stream=io.StringIO(_read_text(path)), interpolate=False).dict().items():
        if value is None:
            continue
        if value.count("${") > _MAX_REFERENCES:
            raise ConfigError(f"{path.absolute()} has more than {_MAX_REFERENCES} `${{` in a value; write it again.")
        atoms = list(parse_variables(value))
        unknown = [
            atom.name
            for atom in atoms
            if isinstance(atom, Variable) and atom.default is None and atom.name not in known
        ]
        if unknown and may_be_set(name) and name not in os.environ:
            raise ConfigError(
                f"{path.absolute()} sets {name} to a value with ${{{_shown(unknown[0])}}}, but no line above sets {_shown(unknown[0])}; "
                f"write the value itself instead of ${{{_shown(unknown[0])}}}, or export {name} in the shell."
            )
        parts = [atom.resolve(known) for atom in atoms]
        left -= sum(map(len, parts))
        if left < 0:
            raise ConfigError(
                f"The values in {path.absolute()} have more than {_MAX_BYTES:,} characters together; shorten them."
            )
        variables[name] = known[name] = "".join(parts)
    return variables


def _read_text(path: Path) -> str:
    try:
        text = read_bytes(path, limit=_MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(
            f"{path.absolute()} is not text in UTF-8, so it was not read; save it as UTF-8, or remove it."
        ) from None
    except (ContentError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path.absolute()} cannot be read: {reason}; check its permissions, or remove it.") from None
    if _MANY_SPACES.search(text):
        raise ConfigError(f"{path.absolute()} contains 200 spaces in a row; remove them.")
    return text


def _would_use_key(endpoint: str, variables: Mapping[str, str]) -> bool:
    """Return whether a key that is not from the file would be used at an address from the file."""
    keys = _ENDPOINTS[endpoint]
    if any(os.environ.get(key) and os.environ[key] != variables.get(key) for key in keys):
        return True
    if endpoint.startswith("AWS_"):  # boto3 finds keys in many places, such as ~/.aws/credentials or the machine's role
        return not all(variables.get(key) for key in _AWS_KEY)
    # W&B has a separate login for each address, but the login of the Hub is used at any address, unless there is a token.
    token = os.environ.get("HF_TOKEN", variables.get("HF_TOKEN", "")).strip()
    return endpoint == "HF_ENDPOINT" and not token and _has_hub_login()


def _has_hub_login() -> bool:
    """Return whether the user has logged in to the Hub by `hf auth login`.

    We look for the login ourselves. The package `huggingface_hub` could tell, but it reads `HF_ENDPOINT` when it is imported, and
    `HF_ENDPOINT` is not set yet.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    file = os.environ.get("HF_TOKEN_PATH") or f"{home}/token"
    return Path(os.path.expandvars(os.path.expanduser(file))).exists()  # noqa: PTH111 (Path's method fails without a home)


def _shown(name: str) -> str:
    return name if re.fullmatch(r"\w{1,64}", name) else repr(name[:64])
