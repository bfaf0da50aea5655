"""Validation of settings and arguments. An error names the setting and its value, and says what to write instead."""

import dataclasses
import math
import numbers
import os
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard, TypeVar, get_args, get_origin

STORE_SCHEMES = ("file", "s3", "hf")
"""Accepted URL schemes for stores. A store without a scheme is a folder."""

MAX_NUMBER = 1e30
"""Largest number in settings. With larger ones, products of float32 numbers overflow."""

_MAX_NAME, _MAX_PATH = 200, 1000
"""Largest number of bytes in each part of a run's name (between slashes), and in the whole name. File systems allow about 255 bytes for
the name of a folder."""

_STEPS = "all, last, a list such as 1,2,3, or a range such as 0:1000:100"

Record = TypeVar("Record")
Bound: TypeAlias = Literal["positive", "zero or positive", "a number"]
"""Range of numbers that a setting accepts."""


class UserError(Exception):
    """Error that the user can fix. The command line prints its message without a traceback."""

    exit_status = 1
    """Exit status of a command that ends with this error."""


class ConfigError(UserError, ValueError):
    """Error for a setting or an argument that cannot be used. The message names the setting or argument, and says why it cannot be used."""

    exit_status = 2


def is_table_name(value: Any) -> TypeGuard[str]:
    """Return whether a value names a table of imported tasks: the table's digest, or `unknown`."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}|unknown", value) is not None


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` with this message if the condition is false."""
    if not condition:
        raise ConfigError(message)


def plain_number(value: Any) -> Any:
    """Convert a NumPy scalar, or an array or tensor without axes, to Python's int, float, bool or str.

    Anything else is returned as it is.
    """
    if type(value) in (bool, int, float, str) or hasattr(value, "mask"):  # numpy.ma.masked has no value
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def whole(name: str, value: Any, minimum: int, maximum: int = 2**63 - 1) -> int:
    """Convert a whole number to an int, and check that it is between `minimum` and `maximum`.

    The value may be a Python or NumPy number, or a tensor or array without axes.

    Raises:
        ConfigError: If the value is not a whole number within these bounds. Truth values, and floats such as 4.0, are also refused.
    """
    number = plain_number(value)
    require_count(name, number, minimum)
    require(number <= maximum, f"`{name}` must be at most {maximum:,}, got {number:,}.")
    return number


def real(name: str, value: Any, bound: Bound, *, repair: str = "") -> float:
    """Convert a finite number to a float. The number may also be a NumPy number, or a tensor or array without axes.

    Raises:
        ConfigError: If the value is not a finite number, or not within `bound`. `repair` is added to the message.
    """
    number = plain_number(value)
    require_number(name, number, bound, repair=repair)
    return float(number)


def require_count(name: str, value: Any, minimum: int) -> None:
    """Refuse a value that is not a whole number of at least `minimum`, or does not fit a 64-bit integer."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    require(is_whole and value >= minimum, f"`{name}` must be a whole number of at least {minimum}, got {value!r}.")
    require(value < 2**63, f"`{name}` must be below 2^63, got {value!r}.")


def require_number(name: str, value: Any, bound: Bound, *, repair: str = "") -> None:
    """Refuse a value that is not a finite number or not within `bound`. `repair` is added to the message."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:  # it may be too large to convert to a float
        raise ConfigError(f"`{name}` must be at most {MAX_NUMBER:g}, got a whole number of {value.bit_length()} bits.")
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(
        is_real and {"positive": value > 0, "zero or positive": value >= 0, "a number": True}[bound],
        f"`{name}` must be {bound} and finite, got {value!r}{repair}.",
    )
    require(abs(value) <= MAX_NUMBER, f"`{name}` must be at most {MAX_NUMBER:g}, got {value!r}.")


def validate(section: str, settings: Any, *, counts: Mapping[str, int], numbers: Mapping[str, Bound]) -> None:
    """Validate the fields of a frozen dataclass of settings by their types and bounds.

    Numbers of NumPy and torch are first replaced by Python numbers, which can be saved and compared. A field whose type
    allows None may be None.

    Args:
        section: Name of the section, for error messages; empty for settings outside the tree.
        settings: The dataclass.
        counts: Smallest value of each field that is a whole number.
        numbers: Bound of each field that is a real number.

    Raises:
        ConfigError: If a value cannot be used.
    """
    for field in dataclasses.fields(settings):
        name = f"{section}.{field.name}".removeprefix(".")
        value = plain_number(getattr(settings, field.name))
        object.__setattr__(settings, field.name, value)
        if value is None and type(None) in get_args(field.type):
            continue
        if get_origin(field.type) is Literal:
            choices = get_args(field.type)
            require(value in choices, f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        elif field.type is bool:
            require(isinstance(value, bool), f"`{name}` must be true or false, got {value!r}.")
        elif field.type is str:
            require(isinstance(value, str), f"`{name}` must be text, got {value!r}.")
        elif field.name in counts:
            require_count(name, value, counts[field.name])
        elif field.name in numbers:
            require_number(name, value, numbers[field.name])


def user_path(text: str | Path) -> Path:
    """Return a path in which a leading `~` or `~name` is replaced by that user's home folder.

    Raises:
        ConfigError: If this home folder is unknown.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"The home folder in {str(text)!r} is not known. Write the whole path, set HOME, or write ./ if ~ is part of a name."
        ) from None


class StepRange(NamedTuple):
    """One step, or equally spaced steps from the first to the last."""

    word: str
    """The text that the user wrote."""
    first: int
    last: int | None
    """Last step; None means the end of training."""
    stride: int

    def holds(self, step: int) -> bool:
        """Return whether a step is in the range."""
        return (
            self.first <= step <= (step if self.last is None else self.last) and (step - self.first) % self.stride == 0
        )


def parse_steps(text: str) -> Literal["all", "last"] | list[StepRange]:
    """Parse a choice of saved steps: `all`, `last`, or a list of steps and ranges such as 1,2,3 or 0:1000:100.

    Raises:
        ConfigError: If the text is none of these, or a range is reversed.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words == ["all"] or words == ["last"]:
        return "all" if words == ["all"] else "last"
    if not words:
        raise ConfigError(f"`sampler.steps` names no step. Write {_STEPS}.")
    return [_step_range(word, text) for word in words]


def require_steps(text: Any) -> None:
    """Refuse a value that is not a choice of saved steps."""
    require(isinstance(text, str), f"`sampler.steps` must be {_STEPS}, got {text!r}.")
    parse_steps(text)


def _step_range(word: str, text: str) -> StepRange:
    match = re.fullmatch(r"(\d{1,20})|(\d{0,20}):(\d{0,20})(?::(0*[1-9]\d{0,19}))?", word, re.ASCII)
    if match is None:
        raise ConfigError(f"`sampler.steps` must be {_STEPS}, got {text!r}.")
    first, last = int(match[1] or match[2] or 0), match[1] or match[3]
    if last and first > int(last):
        raise ConfigError(f"The range {word} of `sampler.steps` is reversed. Write {last}:{first}.")
    return StepRange(word, first, int(last) if last else None, int(match[4] or 1))


def require_run_name(name: str) -> None:
    """Refuse a run's name that cannot be a folder below $LOCAL_ROOT."""
    require(
        all(re.fullmatch(r"[\w.,=+-]+", part) and set(part) != {"."} for part in name.split("/")),
        f"`run_name` must be a folder below $LOCAL_ROOT, and may contain only letters, digits and the characters . , = + - _ /, got {name!r}.",
    )
    require(
        not any(part.startswith("-") for part in name.split("/")),
        f"No part of `run_name` may begin with `-`, because such a name would be read as a command-line option, got {name!r}.",
    )
    longest = max(len(os.fsencode(part)) for part in name.split("/"))
    require(
        longest <= _MAX_NAME and len(os.fsencode(name)) <= _MAX_PATH,
        f"`run_name` must have at most {_MAX_PATH} bytes, and each part between slashes at most {_MAX_NAME}, got "
        f"{len(os.fsencode(name))} bytes, and a part of {longest} bytes.",
    )


def has_type(value: Any, kind: Any) -> bool:
    """Return whether a plain value has the declared type of a field. An int is also a float; a bool is not a number."""
    if isinstance(kind, types.UnionType):
        return any(has_type(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def typed_record(kind: type[Record], tree: Any) -> Record | None:
    """Build a dataclass of plain values from a dict of its fields. Return None if a field is unknown or has the wrong type."""
    try:
        record = kind(**tree)
    except TypeError:
        return None
    are_typed = all(has_type(getattr(record, field.name), field.type) for field in dataclasses.fields(record))  # type: ignore[arg-type]
    return record if are_typed else None


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a plain value is a whole number of at least 0 that fits a 64-bit integer."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def require_store(url: Any, name: str = "checkpoints.store") -> None:
    """Refuse a value that is not the URL or folder of a store. Also refuse credentials in a URL, which would be saved with the run."""
    text = url if isinstance(url, str) else ""
    scheme, _, path = text.partition("://") if "://" in text else ("file", "", text)
    if scheme.lower() == "hf":
        require(
            re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.%-]+)?(/[\w.,=+ -]+)*/?", path) is not None
            and not {".", ".."} & set(path.split("/")),
            f"`{name}` must be hf://USER/REPO, hf://USER/REPO@REVISION or a folder below them, got {re.sub('[^/@]+@', '...@', text)!r}. Set a "
            "token in the variable HF_TOKEN, never in the address.",
        )
    require(
        "@" not in path or scheme.lower() == "hf",
        f"`{name}` must not contain credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead.",
    )
    # Without this check, `s3:bucket` would be accepted as a folder of that name.
    is_slip = re.match(r"(file|s3|https?|gs|hf):(?!//)", text, re.IGNORECASE) is not None
    require(
        bool(path.strip("/")) and not is_slip and scheme.lower() in STORE_SCHEMES,
        f"`{name}` must be a folder, file:///folder, s3://bucket/prefix or hf://USER/REPO, got {url!r}.",
    )
    if "://" in text:
        is_absolute = path.startswith(("/", "~")) == (scheme.lower() == "file")
        require(is_absolute, f"`{name}` must be file:///folder or s3://bucket/prefix, got {url!r}.")


def parse_num_tasks(value: Any) -> int | float:
    """Convert the task diversity M to an int, or to `math.inf` for the Gaussian prior.

    Args:
        value: A positive whole number (an int, a float or text), `"inf"` or `math.inf`.

    Raises:
        ConfigError: If the value is anything else, such as zero, a fraction, None or another word.
    """
    number = plain_number(value)
    if isinstance(value, str):
        text = value.strip().lower().removeprefix("+")
        if text.removeprefix(".") in ("inf", "infinity"):
            return math.inf
        number = float(text.replace("_", "")) if re.fullmatch(r"\d[\d_]*(\.\d*)?(e\d+)?", text) else None
        number = None if number == math.inf else number  # refuse 1e400, which Python reads as infinity
    if number == math.inf:
        return math.inf
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if is_number and 1 <= number < 2**31 and number == int(number):
        return int(number)
    raise ConfigError(
        f"The number of tasks M must be a whole number from 1 to 2^31 - 1, or `inf` for the Gaussian prior, got {value!r}."
    )
