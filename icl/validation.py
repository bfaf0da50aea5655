"""Checks of settings at the door: what cannot be used is one sentence that says what, why, and what to write instead."""

import dataclasses
import math
import numbers
import os
import re
import types
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard, get_args, get_origin

STORE_SCHEMES = ("file", "s3")
"""What may stand before :// in the place of a store; a place without :// is a folder."""


MAX_NUMBER = 1e30
"""Largest setting: with larger ones the products of float32 numbers overflow."""

_MAX_NAME, _MAX_PATH = 200, 1000
"""Bytes of a run's name; file systems take about 255 in each folder's name."""

_STEPS = "all, last, a list such as 1,2,3, or a range such as 0:1000:100"

Bound: TypeAlias = Literal["positive", "zero or positive", "a number"]
"""Which numbers will do."""


class UserError(Exception):
    """Something that one sentence explains and the user can mend; the command line prints it without a traceback."""

    exit_status = 1
    """Of the command that ends with it."""


class ConfigError(UserError, ValueError):
    """A setting that cannot be used; the message says which, why, and what to write instead."""

    exit_status = 2


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def plain_number(value: Any) -> Any:
    """Return the int, float, bool or text that a NumPy scalar, or an array or tensor without axes, holds; else `value` itself."""
    if type(value) in (bool, int, float, str) or hasattr(value, "mask"):  # numpy.ma.masked holds nothing
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def take_plain_numbers(settings: Any) -> None:
    """Replace the numbers of NumPy and torch in a frozen dataclass by Python's, which can be saved and compared."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        plain = plain_number(value)
        if plain is not value:
            object.__setattr__(settings, field.name, plain)


def whole(name: str, value: Any, minimum: int, maximum: int = 2**63 - 1) -> int:
    """Return a whole number from `minimum` to `maximum` as an int, be it NumPy's, or in a tensor or array without axes.

    Raises:
        ConfigError: If it is anything else; truth values and floats such as 4.0 are no counts.
    """
    number = plain_number(value)
    require_count(name, number, minimum)
    require(number <= maximum, f"`{name}` must be at most {maximum:,}, got {number:,}.")
    return number


def real(name: str, value: Any, bound: Bound, *, repair: str = "") -> float:
    """Return a finite number within its bound as a float, be it NumPy's, or in a tensor or array without axes.

    Raises:
        ConfigError: If it is anything else; `repair` ends the sentence.
    """
    number = plain_number(value)
    require_number(name, number, bound, repair=repair)
    return float(number)


def require_count(name: str, value: Any, minimum: int) -> None:
    """Refuse what is no whole number of at least `minimum`, or too large for a 64-bit integer."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= minimum, f"`{name}` must be a whole number of at least {minimum}, got {value!r}.")
    require(value < 2**63, f"`{name}` must be below 2^63, got {value!r}.")


def require_number(name: str, value: Any, bound: Bound, *, repair: str = "") -> None:
    """Refuse what is no finite number, or outside its bound; `repair` ends the sentence."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:  # which may be too large for a float
        raise ConfigError(f"`{name}` must be at most {MAX_NUMBER:g}, got a whole number of {value.bit_length()} bits.")
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(
        real and {"positive": value > 0, "zero or positive": value >= 0, "a number": True}[bound],
        f"`{name}` must be {bound} and finite, got {value!r}{repair}.",
    )
    require(abs(value) <= MAX_NUMBER, f"`{name}` must be at most {MAX_NUMBER:g}, got {value!r}.")


def require_words(section: str, settings: Any) -> None:
    """Refuse choices, texts and truth values of the wrong kind, so that no typing error picks a behaviour silently."""
    for field in dataclasses.fields(settings):
        name, value = f"{section}.{field.name}", getattr(settings, field.name)
        if get_origin(field.type) is Literal:
            choices = get_args(field.type)
            require(value in choices, f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        elif field.type is bool:
            require(isinstance(value, bool), f"`{name}` must be true or false, got {value!r}.")
        elif field.type is str:
            require(isinstance(value, str), f"`{name}` must be text, got {value!r}.")


def user_path(text: str | Path) -> Path:
    """Path with a leading `~` or `~name` replaced by that user's home folder.

    Raises:
        ConfigError: If no such home folder is known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"The home folder in {str(text)!r} is not known; write the whole path, set HOME, or write ./ before a plain ~."
        ) from None


class StepRange(NamedTuple):
    """A step, or several from the first to the last at equal distances."""

    word: str
    """As it was written."""
    first: int
    last: int | None
    """None: to the end."""
    stride: int

    def holds(self, step: int) -> bool:
        """Return whether a step is one of them."""
        return (
            self.first <= step <= (step if self.last is None else self.last) and (step - self.first) % self.stride == 0
        )


def parse_steps(text: str) -> Literal["all", "last"] | list[StepRange]:
    """Return what a choice of saved steps means: `all`, `last`, or a list of steps and ranges such as 1,2,3 or 0:1000:100.

    Raises:
        ConfigError: If it is none of these, or a range is reversed.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words == ["all"] or words == ["last"]:
        return "all" if words == ["all"] else "last"
    if not words:
        raise ConfigError(f"`sampler.steps` names no step; write {_STEPS}.")
    return [_step_range(word, text) for word in words]


def require_steps(text: Any) -> None:
    """Refuse what is no choice of saved steps."""
    require(isinstance(text, str), f"`sampler.steps` must be {_STEPS}, got {text!r}.")
    parse_steps(text)


def _step_range(word: str, text: str) -> StepRange:
    match = re.fullmatch(r"(\d{1,20})|(\d{0,20}):(\d{0,20})(?::(0*[1-9]\d{0,19}))?", word, re.ASCII)
    if match is None:
        raise ConfigError(f"`sampler.steps` must be {_STEPS}, got {text!r}.")
    first, last = int(match[1] or match[2] or 0), match[1] or match[3]
    if last and first > int(last):
        raise ConfigError(f"The range {word} of `sampler.steps` is reversed; write {last}:{first}.")
    return StepRange(word, first, int(last) if last else None, int(match[4] or 1))


def require_run_name(name: str) -> None:
    """Refuse a run's name that is no folder below $LOCAL_ROOT."""
    require(
        all(re.fullmatch(r"[\w.,=+-]+", part) and set(part) != {"."} for part in name.split("/")),
        f"`run_name` may hold letters, digits and . , = + - _ / only and stays below $LOCAL_ROOT, got {name!r}.",
    )
    require(
        not any(part.startswith("-") for part in name.split("/")),
        f"`run_name` must not begin with -, which marks an option, got {name!r}.",
    )
    longest = max(len(os.fsencode(part)) for part in name.split("/"))
    require(
        longest <= _MAX_NAME and len(os.fsencode(name)) <= _MAX_PATH,
        f"`run_name` is too long: a folder's name may have {_MAX_NAME} bytes and all of it {_MAX_PATH}, got {longest} and {len(name)}.",
    )


def has_type(value: Any, kind: Any) -> bool:
    """Return whether a plain value is of the declared type of a field; a whole number is a float, a truth value no number."""
    if isinstance(kind, types.UnionType):
        return any(has_type(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a plain value is a whole number of at least zero that fits 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def require_store(url: Any, name: str = "checkpoints.store") -> None:
    """Refuse what is no place of a store; a URL that carries a user or a password would be saved with the run."""
    text = url if isinstance(url, str) else ""
    scheme, _, place = text.partition("://") if "://" in text else ("file", "", text)
    require("@" not in place, f"`{name}` must not carry credentials; set AWS_ACCESS_KEY_ID and its kin instead.")
    require(
        bool(place.strip("/")) and scheme.lower() in STORE_SCHEMES,
        f"`{name}` must be a folder, file:///folder or s3://bucket/prefix, got {url!r}.",
    )
    if "://" in text:
        is_whole = place.startswith(("/", "~")) == (scheme.lower() == "file")
        require(is_whole, f"`{name}` must be file:///folder or s3://bucket/prefix, got {url!r}.")


def parse_num_tasks(value: Any) -> int | float:
    """The task diversity M as an int, or `math.inf` for the Gaussian prior.

    Args:
        value: A positive whole number, `"inf"` or `math.inf`.

    Raises:
        ConfigError: For anything else: zero, fractions, None, other words.
    """
    number = plain_number(value)
    if isinstance(value, str):
        text = value.strip().lower().removeprefix("+")
        if text.removeprefix(".") in ("inf", "infinity"):
            return math.inf
        number = float(text.replace("_", "")) if re.fullmatch(r"\d[\d_]*(\.\d*)?(e\d+)?", text) else None
        number = None if number == math.inf else number  # a number too large for a float is no infinity
    if number == math.inf:
        return math.inf
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if is_number and 1 <= number < 2**31 and number == int(number):
        return int(number)
    raise ConfigError(
        f"The number of tasks M must be a whole number from 1 to 2^31 - 1, or `inf` for the Gaussian prior, got {value!r}."
    )
