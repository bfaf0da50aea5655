"""What a rule of the verdict is: a named function of the evidence that returns a reason, or None."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from icl.sampling.verdict.evidence import Evidence

Verdict: TypeAlias = Literal["ok", "suspect", "invalid"]
Level: TypeAlias = Literal["note", "suspect", "invalid"]


@dataclass(frozen=True)
class Rule:
    """A rule with its consequence: a note leaves the verdict as it is."""

    name: str
    level: Level
    source: str
    """Where the rule and its threshold come from."""
    reason: Callable[[Evidence], str | None]
    """The sentence for the user if the evidence breaks the rule, else None."""


def rule(level: Level, *, source: str) -> Callable[[Callable[[Evidence], str | None]], Rule]:
    """Make a rule of a function; the rule is named as the function, with spaces."""

    def decorate(function: Callable[[Evidence], str | None]) -> Rule:
        return Rule(function.__name__.replace("_", " "), level, source, function)

    return decorate
