"""The older code bases whose checkpoints can be imported, with the functions that read them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.importing import icr, raventos, timaeus, timaeus_lm
from icl.importing.pickles import read_pickle
from icl.model.stacked import Params


class Format(NamedTuple):
    """An older code base: how its files are found, read and converted."""

    name: str
    about: str
    """The code base in a few words, for messages."""
    preset: str
    """The preset with the published settings of the code base."""
    patterns: tuple[str, ...]
    """Patterns of the paths of the code base's checkpoint files, relative to the imported folder."""
    read: Callable[[Path], Any]
    is_mine: Callable[[Any], bool]
    step_of: Callable[[Any], int | None]
    facts: Callable[[Any], dict[str, Any]]
    """Function that returns the settings that a file determines, keyed by dotted name."""
    folder_facts: Callable[[Path], dict[str, Any]]
    """Function that returns the settings outside the file: in the name of its folder, or in other files in or above this folder."""
    params: Callable[[Any, RunConfig], Params]
    draw_tasks: Callable[[Any, RunConfig], Float[Tensor, "M D"]]
    """Function that draws the training tasks again, as the older code did from its seed."""
    tasks_seed: int | None
    """Seed with which the older code always draws its tasks. None if the seed differs between runs."""
    is_first_pattern: bool = False
    """Whether only one pattern is used: the first pattern that matches at least one file."""


def _nothing(path: Path) -> dict[str, Any]:
    return {}


FORMATS: Mapping[str, Format] = {
    "icr": Format(
        name="icr",
        about="the code with ICRegConfig (ic_regression.py)",
        preset=icr.PRESET,
        patterns=("*.pt", "*.pth"),
        read=read_pickle,
        is_mine=icr.is_mine,
        step_of=icr.step_of,
        facts=icr.facts,
        folder_facts=_nothing,
        params=icr.params,
        draw_tasks=icr.draw_tasks,
        tasks_seed=0,
    ),
    "timaeus": Format(
        name="timaeus",
        about="timaeus-research/icl",
        preset=timaeus.PRESET,
        patterns=("*.pt", "*.pth"),
        read=read_pickle,
        is_mine=timaeus.is_mine,
        step_of=timaeus.step_of,
        facts=timaeus.facts,
        folder_facts=lambda path: timaeus.folder_facts(path.parent.name),
        params=timaeus.params,
        draw_tasks=timaeus.draw_tasks,
        tasks_seed=None,
    ),
    "raventos": Format(
        name="raventos",
        about="mansheej/icl-task-diversity",
        preset=raventos.PRESET,
        patterns=raventos.PATTERNS,
        read=raventos.read,
        is_mine=raventos.is_mine,
        step_of=raventos.step_of,
        facts=raventos.facts,
        folder_facts=raventos.folder_facts,
        params=raventos.params,
        draw_tasks=raventos.draw_tasks,
        tasks_seed=None,
    ),
    timaeus_lm.NAME: Format(
        name=timaeus_lm.NAME,
        about="the language models of Timaeus",
        preset=timaeus_lm.PRESET,
        patterns=timaeus_lm.PATTERNS,
        read=timaeus_lm.read,
        is_mine=timaeus_lm.is_mine,
        step_of=timaeus_lm.step_of,
        facts=timaeus_lm.facts,
        folder_facts=timaeus_lm.folder_facts,
        params=timaeus_lm.params,
        draw_tasks=timaeus_lm.draw_tasks,
        tasks_seed=None,
        is_first_pattern=True,
    ),
}


def format_of(name: str) -> Format:
    """Return the code base with this name.

    Raises:
        ConfigError: If there is no such code base. The message lists all names.
    """
    if name not in FORMATS:
        raise ConfigError(f"`--from` must be one of {', '.join(FORMATS)}, got {name!r}.")
    return FORMATS[name]
