"""Names of runs, made from the settings that differ from the preset, or that differ among several runs."""

import dataclasses
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from icl.config import RunConfig, flatten, is_free_on_resume
from icl.presets import preset

MEMBER_SEEDS = ("seeds.model", "seeds.data", "seeds.noise")
"""Settings that `population.seeds` sets in each member of a population."""
MAX_SLUG = 120
"""Largest number of characters in a run name that is made from settings. The end of a longer name is replaced by a hash."""


def run_name(config: RunConfig) -> str:
    """Return the `run_name` of a run if it is set. Otherwise, return the preset's name with the settings that differ from the preset.

    The name leaves out the section `population`, and settings that may change when a run is resumed.

    Examples:
        >>> from icl.config import TaskConfig
        >>> run_name(RunConfig(task=TaskConfig(num_tasks=8)))
        'quickstart,num_tasks=8'
    """
    if config.run_name is not None:
        return config.run_name
    settings = {
        key: value
        for key, value in flatten(config.to_dict()).items()
        if not key.startswith("population.") and not is_free_on_resume(key)
    }
    base = flatten(preset(config.preset).to_dict())
    differences = [f"{_short(key, settings)}={value}" for key, value in settings.items() if value != base.get(key)]
    return _slug([config.preset, *differences])


def varying_names(configs: Sequence[RunConfig]) -> list[str]:
    """Return a name for each of several runs, made from the settings that differ among the runs.

    If each run uses one seed for its model, data and noise, as in a population, this seed appears as `seed`. The number of tasks
    appears as `M`. If all runs have equal settings, the names are empty. Runs with equal settings have equal names.

    Examples:
        >>> from icl.config import TaskConfig
        >>> varying_names([RunConfig(task=TaskConfig(num_tasks=8)), RunConfig(task=TaskConfig(num_tasks=64))])
        ['M=8', 'M=64']
    """
    trees = [defaultdict(lambda: None, config.all_settings()) for config in configs]
    keys = [
        key
        for key in dict.fromkeys(key for tree in trees for key in tree)
        if key != "run_name" and not is_free_on_resume(key)
    ]
    varying = [key for key in keys if len({str(tree[key]) for tree in trees}) > 1]
    names = {key: _short(key, keys) for key in varying} | {"task.num_tasks": "M"}
    if all(len({tree[key] for key in MEMBER_SEEDS}) == 1 for tree in trees):
        varying = [key for key in varying if key not in MEMBER_SEEDS[1:]]
        names[MEMBER_SEEDS[0]] = "seed"
    return [", ".join(f"{names[key]}={tree[key]}" for key in varying) for tree in trees]


def sampler_name(config: RunConfig) -> str:
    """Return a name made from the settings of the sampler that differ from the preset, or `preset` if there are none.

    Examples:
        >>> from icl.config import SamplerConfig
        >>> sampler_name(RunConfig(sampler=SamplerConfig(lr=1e-5)))
        'lr=1e-05'
    """
    settings, base = dataclasses.asdict(config.sampler), dataclasses.asdict(preset(config.preset).sampler)
    return _slug([f"{key}={value}" for key, value in settings.items() if value != base.get(key)] or ["preset"])


def _short(key: str, keys: Iterable[str]) -> str:
    """Return the part of a dotted key after the last dot if no other key ends in the same part, else the whole key.

    Keys of the section `seeds` are never shortened.
    """
    section, _, leaf = key.rpartition(".")
    is_unique = sum(other.rpartition(".")[2] == leaf for other in keys) == 1
    return leaf if is_unique and section != "seeds" else key


def _slug(words: Sequence[str]) -> str:
    slug = re.sub(r"[^\w.,=+-]", "-", ",".join(words))
    if len(slug) <= MAX_SLUG:
        return slug
    return f"{slug[: MAX_SLUG - 9]}-{hashlib.sha256(slug.encode()).hexdigest()[:8]}"
