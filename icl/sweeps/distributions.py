"""The distributions of a sweep's parameters. They are W&B's distributions, defined by their quantile functions.

Draw i of a parameter is quantile(u), where u is a hash of (seed, name, i) that is uniform on (0, 1). So a draw is the same
after every restart and on every machine, and does not depend on the other parameters of the file. The distributions have the
same names, meanings and defaults as in W&B ("Sweep configuration options"). For example, the bounds of `log_uniform` are
exponents of e, and the bounds of `log_uniform_values` are the values themselves.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

Options = Mapping[str, Any]


class Distribution(NamedTuple):
    """A distribution of W&B."""

    required: tuple[str, ...]
    defaults: dict[str, float]
    """Options that may be left out, with their defaults."""
    quantile: Callable[[float, Options], Any]
    """Function that takes a probability u in (0, 1) and the options. It returns the value below which a draw lies with probability u."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of a sweep: its name, and its distribution with valid options."""

    path: tuple[str, ...]
    """Names from the outermost group to the parameter: `("optim.lr",)`, or `("optim", "lr")` in nested `parameters:`."""
    distribution: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The names in `path`, joined by dots."""
        return ".".join(self.path)


EXPONENTS = {name: f"{name}_values" for name in ("log_uniform", "q_log_uniform", "inv_log_uniform")}
"""Distributions whose `min` and `max` are exponents of e. Each is mapped to the same distribution, but with bounds that are the values
themselves."""


def draw(parameter: Parameter, *, seed: int, index: int) -> Any:
    """Return draw number `index` of a parameter in a random sweep. The value depends only on the arguments."""
    digest = hashlib.blake2b(f"{seed}:{index}:{parameter.name}".encode(), digest_size=8).digest()
    share = ((int.from_bytes(digest, "little") >> 12) + 0.5) * 2**-52  # strictly inside (0, 1)
    return DISTRIBUTIONS[parameter.distribution].quantile(share, parameter.options)


def extremes(parameter: Parameter) -> tuple[Any, Any]:
    """Return approximately the smallest and the largest value that can be drawn.

    Raises:
        OverflowError: If a value exceeds the range of floating-point numbers.
    """
    quantile, options = DISTRIBUTIONS[parameter.distribution].quantile, parameter.options
    low, high = quantile(2**-53, options), quantile(1 - 2**-53, options)
    if any(isinstance(value, float) and not math.isfinite(value) for value in (low, high)) and "values" not in options:
        raise OverflowError
    return low, high


def grid_values(parameter: Parameter) -> list[Any] | None:
    """Return all values of a parameter in a grid, or None if its distribution has no list of values.

    As in W&B, `q_uniform` goes from `min` in steps of `q` and excludes `max`.
    """
    options = parameter.options
    if parameter.distribution == "constant":
        return [options["value"]]
    if parameter.distribution == "categorical":
        return list(options["values"])
    if parameter.distribution == "int_uniform":
        return list(range(options["min"], options["max"] + 1))
    if parameter.distribution == "q_uniform":
        low, step = options["min"], options["q"]
        return [low + k * step for k in range(_num_steps(options))]
    return None


def has_too_long_grid(parameter: Parameter, most: int) -> bool:
    """Return whether a range has more than `most` values in a grid. The values are not listed. Lists in the sweep file are not checked."""
    options = parameter.options
    if parameter.distribution == "int_uniform":
        return options["max"] - options["min"] >= most
    return parameter.distribution == "q_uniform" and _num_steps(options) > most


def _num_steps(options: Options) -> int:
    ratio = (options["max"] - options["min"]) / options["q"]
    return math.ceil(min(ratio, 2.0**60))  # the bound avoids an overflow, and no list is that long


def _uniform(share: float, options: Options) -> float:
    return options["min"] + share * (options["max"] - options["min"])


def _int_uniform(share: float, options: Options) -> int:
    return options["min"] + int(share * (options["max"] - options["min"] + 1))


def _log_uniform(share: float, options: Options) -> float:
    return math.exp(_uniform(share, options))


def _inv_log_uniform(share: float, options: Options) -> float:
    return math.exp(-_uniform(1 - share, options))


def _log_uniform_values(share: float, options: Options) -> float:
    value = math.exp(_uniform(share, {key: math.log(options[key]) for key in ("min", "max")}))
    return min(max(value, options["min"]), options["max"])  # rounding may exceed the bounds


def _normal(share: float, options: Options) -> float:
    return options["mu"] + options["sigma"] * NormalDist().inv_cdf(share)


def _log_normal(share: float, options: Options) -> float:
    return math.exp(_normal(share, options))


def _beta(share: float, options: Options) -> float:
    from scipy.special import betaincinv

    return float(betaincinv(options["a"], options["b"], share))


def _categorical(share: float, options: Options) -> Any:
    return options["values"][int(share * len(options["values"]))]


def _categorical_w_probabilities(share: float, options: Options) -> Any:
    total = 0.0
    for value, probability in zip(options["values"], options["probabilities"], strict=True):
        total += probability
        if share < total:
            return value
    # The probabilities may sum to slightly less than `share`, because of rounding.
    return max(zip(options["probabilities"], options["values"], strict=True), key=lambda pair: pair[0])[1]


def _quantised(quantile: Callable[[float, Options], float]) -> Callable[[float, Options], int | float]:
    """Return a quantile function whose values are rounded to multiples of `q`. If `q` is an integer, the values are integers."""
    return lambda share, options: round(quantile(share, options) / options["q"]) * options["q"]


_BOUNDS, _STEP = ("min", "max"), {"q": 1.0}
_MOMENTS, _SHAPES = {"mu": 0.0, "sigma": 1.0}, {"a": 1.0, "b": 1.0}

DISTRIBUTIONS: dict[str, Distribution] = {
    "constant": Distribution(("value",), {}, lambda _, options: options["value"]),
    "categorical": Distribution(("values",), {}, _categorical),
    "categorical_w_probabilities": Distribution(("values", "probabilities"), {}, _categorical_w_probabilities),
    "int_uniform": Distribution(_BOUNDS, {}, _int_uniform),
    "uniform": Distribution(_BOUNDS, {}, _uniform),
    "q_uniform": Distribution(_BOUNDS, _STEP, _quantised(_uniform)),
    "log_uniform": Distribution(_BOUNDS, {}, _log_uniform),
    "log_uniform_values": Distribution(_BOUNDS, {}, _log_uniform_values),
    "q_log_uniform": Distribution(_BOUNDS, _STEP, _quantised(_log_uniform)),
    "q_log_uniform_values": Distribution(_BOUNDS, _STEP, _quantised(_log_uniform_values)),
    "inv_log_uniform": Distribution(_BOUNDS, {}, _inv_log_uniform),
    "inv_log_uniform_values": Distribution(_BOUNDS, {}, _log_uniform_values),  # log X is uniform if log(1/X) is uniform
    "normal": Distribution((), _MOMENTS, _normal),
    "q_normal": Distribution((), _MOMENTS | _STEP, _quantised(_normal)),
    "log_normal": Distribution((), _MOMENTS, _log_normal),
    "q_log_normal": Distribution((), _MOMENTS | _STEP, _quantised(_log_normal)),
    "beta": Distribution((), _SHAPES, _beta),
    "q_beta": Distribution((), _SHAPES | _STEP, _quantised(_beta)),
}
